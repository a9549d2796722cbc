"""ReverseHG against closed forms, and its truncation and checkpoints."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import (
    CURVATURE,
    GOAL,
    RATE,
    START,
    STEPS,
    TARGET,
    TOLERANCE,
    assert_close,
    assert_identical,
    heavy_ball,
    model_and_data,
    network_problem,
    proximal_quadratic,
    scalar_quadratic,
    variable,
)

import farhox
from farhox._core.cut import kept_bytes
from farhox.dynamics import InnerDynamics
from farhox.problem.back_step import BackStep
from farhox.problem.inner_training import InnerTraining

dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
checkpoints = pytest.mark.parametrize("checkpoint_every", [
    None, 3, "sqrt", *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 2, 7, 20))])
Q = 1 - RATE * CURVATURE
END = TARGET + Q ** STEPS * (START - TARGET)


@pytest.mark.covering
@dtypes
@checkpoints
def test_scalar_quadratic_has_its_closed_form(dtype, checkpoint_every):
    case = scalar_quadratic(dtype, ("target", "rate", "initial"))
    result = farhox.ReverseHG(checkpoint_every=checkpoint_every).compute(*case[:3])
    expected = [(END - GOAL) * (1 - Q ** STEPS),
                -(END - GOAL) * CURVATURE * STEPS * Q ** (STEPS - 1) * (START - TARGET),
                (END - GOAL) * Q ** STEPS]
    assert_close(expected, case.expected, 1e-12)
    assert_close(result.gradients, expected, TOLERANCE[dtype])
    assert_close([result.state.variables[0], result.outer_loss], [END, (END - GOAL) ** 2 / 2], TOLERANCE[dtype])
    w = TARGET + Q ** np.arange(STEPS) * (START - TARGET)
    assert_close([result.inner_losses], [CURVATURE / 2 * (w - TARGET) ** 2], TOLERANCE[dtype])
    assert_close([result.diagnostics["inner_gradient_norm"]], [abs(CURVATURE * (w[-1] - TARGET))], TOLERANCE[dtype])
    assert_close([result.diagnostics["hypergradient_norm"]], [np.linalg.norm(expected)], TOLERANCE[dtype])
    assert result.diagnostics["finite"]


def test_scalar_quadratic_has_the_published_values():
    result = farhox.ReverseHG().compute(*scalar_quadratic(outer=("target", "rate", "initial"))[:3])
    np.testing.assert_allclose(
        np.array(result.gradients), [0.0191944372224, -0.2228433715, 0.0050935627776], rtol=1e-9)
    np.testing.assert_allclose(result.outer_loss, 2.94953472e-4, rtol=1e-9)


@pytest.mark.one_case
@dtypes
def test_learning_rate_schedule_has_its_closed_form_at_each_step(dtype):
    case = scalar_quadratic(dtype, ("schedule",))
    (gradient,) = farhox.ReverseHG().compute(*case[:3]).gradients
    w = TARGET + Q ** np.arange(STEPS) * (START - TARGET)
    expected = -(END - GOAL) * CURVATURE * (w - TARGET) * Q ** np.arange(STEPS - 1, -1, -1)
    assert_close([gradient], [expected], TOLERANCE[dtype])
    np.testing.assert_allclose(np.sum(gradient), -0.2228433715, rtol=TOLERANCE[dtype])


@pytest.mark.one_case
@dtypes
@pytest.mark.parametrize("checkpoint_every", [None, 2, "sqrt"])
@pytest.mark.parametrize("truncation, published", [(1, 0.0048576), (3, 0.011852544), (5, None)])
def test_truncation_keeps_the_last_steps(dtype, truncation, published, checkpoint_every):
    case = scalar_quadratic(dtype, ("target",))
    (gradient,) = farhox.ReverseHG(truncation, checkpoint_every).compute(*case[:3]).gradients
    assert_close([gradient], [(END - GOAL) * (1 - Q ** truncation)], TOLERANCE[dtype])
    if published:
        np.testing.assert_allclose(gradient, published, rtol=TOLERANCE[dtype])


@pytest.mark.one_case
@pytest.mark.parametrize("checkpoint_every", [None, 3])
def test_truncation_beyond_the_first_step_is_the_whole_hypergradient(checkpoint_every):
    case = scalar_quadratic(outer=("target", "rate", "initial"))
    for truncation in (STEPS, STEPS + 5):
        result = farhox.ReverseHG(truncation, checkpoint_every).compute(*case[:3])
        assert_close(result.gradients, case.expected, 1e-9)


def test_truncation_of_zero_keeps_the_explicit_gradient_alone():
    w, scale = variable(START), variable(2.0)
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - scale), lambda goal: scale * keras.ops.square(w - goal),
        inner_variables=[w], outer_variables=[scale], dynamics=farhox.GradientDescent(0.1))
    result = farhox.ReverseHG(truncation=0).compute(problem, tf.fill([3], tf.constant(1.0, tf.float64)),
                                                    tf.constant(1.0, tf.float64))
    assert_close(result.gradients, [(result.state.variables[0] - 1.0) ** 2], 1e-12)


@pytest.mark.one_case
@dtypes
@checkpoints
def test_each_step_back_uses_the_minibatch_of_that_step(dtype, checkpoint_every):
    w, target, rate = (variable(value, dtype) for value in (3.0, 0.5, 0.2))
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - target), lambda goal: keras.ops.square(w - goal) / 2,
        inner_variables=[w], outer_variables=[target, rate], dynamics=farhox.GradientDescent(rate))
    curvatures, goal = tf.constant([1.0, 2.0, 0.5], dtype), tf.constant(1.0, dtype)
    gathered = farhox.gather(tf.constant([0.5, 9.0, 1.0, 2.0], dtype), [[2], [3], [0]])
    scalar = farhox.BilevelProblem(
        lambda a: problem._inner_objective(a[0]), problem._outer_objective, [w], [target, rate], problem.dynamics)
    for p, batches in ((problem, curvatures), (scalar, gathered)):
        result = farhox.ReverseHG(checkpoint_every=checkpoint_every).compute(p, batches, goal)
        assert_close([result.state.variables[0]], [1.58], TOLERANCE[dtype])
        assert_close(result.gradients, [0.32944, -3.219], TOLERANCE[dtype])


@pytest.mark.one_case
@dtypes
@pytest.mark.parametrize("nesterov", [False, True])
def test_heavy_ball_has_its_hypergradient(dtype, nesterov):
    case = heavy_ball(dtype, nesterov)
    result = farhox.ReverseHG().compute(*case[:3])
    assert_close(result.gradients, case.expected, TOLERANCE[dtype])
    if not nesterov:
        np.testing.assert_allclose(result.state.variables[0], 0.52095, rtol=TOLERANCE[dtype])
        np.testing.assert_allclose(result.outer_loss, 0.11474445125, rtol=TOLERANCE[dtype])
        np.testing.assert_allclose(np.array(result.gradients), [-0.475035561, 5.85997912, 1.17079820], rtol=1e-4)


@pytest.mark.slow
def test_many_steps_reach_the_implicit_meta_gradient():
    case = proximal_quadratic(steps=60)
    case.problem.dynamics = farhox.GradientDescent(0.2)
    assert_close(farhox.ReverseHG().compute(*case[:3]).gradients, case.expected, 1e-9)


def small_network():
    """A layer that draws, and a learned rate."""
    model, inner_batches, outer_batch = model_and_data("Dropout", steps=7)
    rate = variable(0.3)
    return farhox.supervised_problem(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                                     farhox.Momentum(rate, 0.5), [rate]), inner_batches, outer_batch


@pytest.mark.parametrize("make, truncation, lengths", [
    (small_network, None, (3,)), *(pytest.param(
        lambda: network_problem("BatchNormalization", "momentum", steps=7, extra=[keras.layers.Dropout(0.5)]),
        *case, marks=pytest.mark.slow) for case in ((None, (3, "sqrt")), (5, (3,))))])
def test_checkpoints_change_no_bit(make, truncation, lengths, float64):
    case = make()
    whole = tf.function(lambda: farhox.ReverseHG(truncation).compute(*case[:3]), autograph=False)()
    for checkpoint_every in lengths:
        method = farhox.ReverseHG(truncation, checkpoint_every)
        assert_identical(tf.function(lambda: method.compute(*case[:3]), autograph=False)(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_what_is_kept_stays_within_the_memory_and_changes_nothing_but_rounding(checkpoint_every, float64):
    # Wide enough for a product of matrices to be dearer than the bytes of what comes out of it.
    model = keras.Sequential([keras.Input([300]), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)])
    rate, decay = variable(0.1), variable(0.5)
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), farhox.Momentum(rate, decay),
        outer_variables=[rate, decay])
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 4, 300)), random.integers(0, 3, (7, 4))
    stored, gradients = [], []
    for memory in (0, 7 * 4 * 5 * 8, None):
        training = InnerTraining(problem, (x, y))
        step = BackStep(training, range(len(problem.inner_variables)))
        segment = checkpoint_every or 7
        stored.append(segment * kept_bytes(step.kept(np.inf if memory is None else memory, segment)))
        method = farhox.ReverseHG(checkpoint_every=checkpoint_every, memory=memory)
        gradients.append(method.compute(problem, (x, y), (x[0], y[0])).gradients)
    for other in gradients[1:]:
        assert_close(other, gradients[0], 1e-12)
    assert stored[0] == 0 < stored[1] <= 7 * 4 * 5 * 8 and stored[1] <= stored[2]


@pytest.mark.parametrize("memory", [-1, 1.5, True, "64MB"])
def test_memory_must_be_a_number_of_bytes(memory):
    with pytest.raises(ValueError, match="memory must be a non-negative integer"):
        farhox.ReverseHG(memory=memory)


@pytest.mark.slow
def test_replay_is_exact_with_dropout_batch_norm_and_minibatches(float64):
    model, (x, y), outer_batch = model_and_data("BatchNormalization", steps=5, extra=[keras.layers.Dropout(0.5)])
    rate = variable(0.3)
    problem = farhox.BilevelProblem(
        lambda batch: keras.ops.mean(keras.losses.sparse_categorical_crossentropy(
            batch[1], model(batch[0], training=True), from_logits=True)),
        lambda batch: keras.ops.mean(keras.losses.sparse_categorical_crossentropy(
            batch[1], model(batch[0], training=False), from_logits=True)),
        model.trainable_variables, [rate], farhox.Momentum(rate), model.non_trainable_variables)
    indices = np.random.default_rng(1).integers(0, 20, (5, 4))
    batches = farhox.gather((x.reshape(20, 4), y.reshape(20)), indices)
    expected = unrolled.unrolled_hypergradient(problem, batches, outer_batch)
    assert_close(unrolled.finite_differences(problem, batches, outer_batch), expected, 1e-8)
    for checkpoint_every in (None, 2, "sqrt"):
        result = farhox.ReverseHG(checkpoint_every=checkpoint_every).compute(problem, batches, outer_batch)
        assert_close(result.gradients, expected, 1e-10)
    seeds = [v for v in model.non_trainable_variables if not keras.backend.is_float_dtype(v.dtype)]
    assert seeds, "The network draws no random numbers."


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("checkpoint_every", [None, 2])
@pytest.mark.parametrize("reads_statistics", [False, True])
def test_first_order_dynamics_are_exact_whether_or_not_statistics_count(reads_statistics, checkpoint_every, float64):
    model, inner_batches, outer_batch = model_and_data("BatchNormalization", steps=4)
    rate, decay = variable(0.3), variable(0.5)
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        farhox.Momentum(rate, decay, first_order=True), [rate, decay], learn_initialization=True,
        training_at_outer=not reads_statistics)
    result = farhox.ReverseHG(checkpoint_every=checkpoint_every).compute(problem, inner_batches, outer_batch)
    assert_close(result.gradients, unrolled.unrolled_hypergradient(problem, inner_batches, outer_batch), 1e-11)


@pytest.mark.parametrize("method", [
    farhox.ReverseHG(), farhox.ReverseHG(checkpoint_every=2), farhox.ReverseHG(checkpoint_every=3),
    farhox.ReverseHG(truncation=2), farhox.ReverseHG(checkpoint_every="memory", memory=150)])
def test_the_adjoint_of_momenta_is_left_out_of_the_last_step_alone(method, float64, monkeypatch):
    case = heavy_ball("float64")
    taken, run = [], BackStep.run

    def looked_at(self, t, state, after, kept, adjoint, *arguments, **settings):
        taken.append([part is None for part in adjoint])
        return run(self, t, state, after, kept, adjoint, *arguments, **settings)

    monkeypatch.setattr(BackStep, "run", looked_at)
    result = method.compute(*case[:3])
    assert sum(map(any, taken)) == 1 and [False, True] in taken and [False, False] in taken
    if method.truncation is None:
        assert_close(result.gradients, case.expected, TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("dynamics, reads_statistics, walked", [
    (farhox.GradientDescent(0.3, first_order=True), False, 0), (farhox.GradientDescent(0.3, first_order=True), True, 1),
    (farhox.GradientDescent(0.3), False, 1), (farhox.Momentum(0.3, 0.5, first_order=True), False, 1)])
def test_the_way_back_is_left_out_where_steps_pass_the_adjoint_on(dynamics, reads_statistics, walked, float64):
    model, inner_batches, outer_batch = model_and_data("BatchNormalization", steps=6)
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), dynamics, learn_initialization=True,
        training_at_outer=not reads_statistics)
    inner_batches = farhox.data.batches.as_inner_batches(inner_batches)

    def graph_of(method):
        graph = tf.function(lambda: method.compute(problem, inner_batches, outer_batch).gradients, autograph=False)
        return graph.get_concrete_function()

    def operations(kind, function):
        return sum(kind in op.type for op in function.graph.get_operations())

    function = graph_of(farhox.ReverseHG())
    assert operations("While", function) - operations("While", graph_of(farhox.ReverseHG(truncation=0))) == walked
    # Where no step is walked back, the losses of the steps are all that is stored.
    assert (operations("TensorListReserve", function) > 1) == walked
    assert_close(function(), unrolled.unrolled_hypergradient(problem, inner_batches, outer_batch), 1e-11)


def test_online_computation_goes_on_from_the_state():
    case = scalar_quadratic(outer=("target", "rate"))
    first = farhox.ReverseHG().compute(case.problem, case.inner_batches[:4], case.outer_batch)
    second = farhox.ReverseHG().compute(case.problem, case.inner_batches[4:], case.outer_batch, state=first.state)
    assert_close([second.state.variables[0]], [END], 1e-12)
    assert int(second.state.step) == STEPS
    # The steps before belong to the state that was passed in: this is the truncated hypergradient.
    truncated = farhox.ReverseHG(truncation=STEPS - 4).compute(*case[:3])
    assert_close(second.gradients, truncated.gradients, 1e-12)


@pytest.mark.slow
def test_integer_slots_of_the_optimizer_pass_through():
    """A dynamics with an integer in its state: the adjoint leaves it out."""
    case = scalar_quadratic(outer=("target",), dynamics=_CountingDescent)
    assert_close(farhox.ReverseHG().compute(*case[:3]).gradients, case.expected, 1e-9)
    assert int(farhox.ReverseHG().compute(*case[:3]).state.slots[0]) == STEPS


class _CountingDescent(InnerDynamics):
    def __init__(self, rate):
        self.rate = rate

    def initial_slots(self, variables):
        return [tf.constant(0)]

    def update(self, gradients, variables, slots, step):
        return [w - RATE * g for w, g in zip(variables, gradients)], [slots[0] + 1]


def explicit_problem():
    """An outer variable that the inner and the outer objective depend on, and a learned initial value."""
    w, scale = variable(START, name="w"), variable(2.0)
    return farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - scale), lambda goal: scale * keras.ops.square(w - goal),
        inner_variables=[w], outer_variables=[scale, w], dynamics=farhox.Momentum(0.1, 0.5))


@pytest.mark.one_case
@pytest.mark.parametrize("checkpoint_every", [None, 3])
@pytest.mark.parametrize("make", [
    pytest.param(
        lambda: network_problem("BatchNormalization", "momentum", steps=4, extra=[keras.layers.Dropout(0.5)])[:3],
        marks=pytest.mark.slow),
    lambda: (explicit_problem(), tf.constant([1.0, 2.0, 0.5, 1.5], tf.float64), tf.constant(1.0, tf.float64)),
], ids=["network", "explicit dependence"])
def test_weights_of_steps_give_the_hypergradient_of_the_weighted_outer_losses(make, checkpoint_every, float64):
    problem, inner_batches, outer_batch = make()
    inner_batches = farhox.data.batches.as_inner_batches(inner_batches)
    weights = (0.1, 0.0, 0.3, 0.6)
    expected = [0.0] * len(problem.outer_variables)
    for t, weight in enumerate(weights):
        first = tf.nest.map_structure(lambda leaf: leaf[:t + 1], inner_batches)  # noqa: B023
        expected = [a + weight * b for a, b in zip(
            expected, unrolled.unrolled_hypergradient(problem, first, outer_batch))]
    last = unrolled.outer_loss(problem, problem.outer_values(), inner_batches, outer_batch)
    for setting in (weights, lambda: tf.constant(weights, tf.float64)):
        method = farhox.ReverseHG(checkpoint_every=checkpoint_every, step_weights=setting)
        result = tf.function(lambda: method.compute(problem, inner_batches, outer_batch), autograph=False)()
        assert_close(result.gradients, expected, 1e-10)
        assert_close([result.outer_loss], [last], 1e-12)


@pytest.mark.slow
def test_all_weight_on_the_last_step_is_the_hypergradient_of_the_last_state():
    case = scalar_quadratic(outer=("target", "rate", "initial"))
    weights = (0.0,) * (STEPS - 1) + (1.0,)
    assert_close(farhox.ReverseHG(step_weights=weights).compute(*case[:3]).gradients, case.expected, 1e-9)


@pytest.mark.parametrize("weights", [(0.5, 0.4), (1.5, -0.5), [0.5, 0.5], (), "uniform", (True,)])
def test_weights_of_steps_must_be_non_negative_and_sum_to_one(weights):
    with pytest.raises(ValueError, match="step_weights must be a tuple of non-negative numbers that sum to one"):
        farhox.ReverseHG(step_weights=weights)


def test_weights_of_steps_are_over_all_of_a_known_number_of_steps():
    with pytest.raises(ValueError, match="cannot come with a truncation. Received: truncation=3"):
        farhox.ReverseHG(truncation=3, step_weights=(1.0,))
    case = scalar_quadratic(outer=("target",))
    with pytest.raises(ValueError, match=rf"one entry per inner step.*Received: shape \(2,\) for T={STEPS}"):
        farhox.ReverseHG(step_weights=(0.5, 0.5)).compute(*case[:3])
    case.problem.stop_tolerance = 0.1
    with pytest.raises(ValueError, match="in advance. Received a problem with stop_tolerance=0.1"):
        farhox.ReverseHG(step_weights=(0.5, 0.5)).compute(*case[:3])


@pytest.mark.parametrize("truncation", [-1, 1.5, True, "all"])
def test_truncation_must_be_a_non_negative_integer(truncation):
    with pytest.raises(ValueError, match="truncation must be a non-negative integer"):
        farhox.ReverseHG(truncation=truncation)


@pytest.mark.parametrize("checkpoint_every", [0, -2, 2.0, True, "log"])
def test_checkpoint_every_must_be_a_positive_integer_or_sqrt(checkpoint_every):
    with pytest.raises(ValueError, match="checkpoint_every must be a positive integer, 'sqrt', 'memory' or None"):
        farhox.ReverseHG(checkpoint_every=checkpoint_every)


def test_initial_values_have_no_effect_on_a_state_that_is_passed_in():
    case = scalar_quadratic(outer=("target", "initial"))
    state = case.problem.initial_state()
    with pytest.raises(ValueError, match="depends on 'w'.*a state that is passed in does not depend on initial values"):
        farhox.ReverseHG().compute(*case[:3], state=state)

"""Inner training that stops on the norm of its gradient: the same as a training of just as many steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    CURVATURE,
    RATE,
    START,
    STEPS,
    TARGET,
    assert_close,
    assert_identical,
    model_and_data,
    network_problem,
    scalar_quadratic,
)

import farhox
from farhox.hypergradients import DartsHG, EpisodesHG, EvoGradHG, ReversibleHG
from farhox.insight import health
from farhox.linear_solvers import Direct

Q = 1 - RATE * CURVATURE
# Norms before the steps: 5, 4, 3.2, 2.56, 2.048, ... The first below 2.6 is that of the fourth step.
TOLERANCE, TAKEN = 2.6, 4
METHODS = {
    "reverse": farhox.ReverseHG(),
    "checkpoint_every_step": farhox.ReverseHG(checkpoint_every=1),
    "checkpoint_3": farhox.ReverseHG(checkpoint_every=3),
    "checkpoint_sqrt": farhox.ReverseHG(checkpoint_every="sqrt"),
    "truncated": farhox.ReverseHG(truncation=2),
    "truncated_checkpoints": farhox.ReverseHG(truncation=3, checkpoint_every=2),
    "truncated_to_nothing": farhox.ReverseHG(truncation=0),
    "forward": farhox.ForwardHG(),
    "implicit": farhox.ImplicitHG(Direct()),
    "evograd": EvoGradHG(sigma=0.1),
    "darts": DartsHG(),
    "reversible": ReversibleHG(),
}
methods = pytest.mark.parametrize("name", list(METHODS))


def stopping(name, tolerance=TOLERANCE, steps=STEPS):
    """The scalar quadratic with batches that differ, so that a step with another batch shows."""
    through_path = name not in ("implicit", "evograd", "truncated_to_nothing")
    return scalar_quadratic(
        outer=("target", "rate") if through_path else ("target",), steps=steps, stop_tolerance=tolerance,
        curvatures=np.linspace(CURVATURE, CURVATURE + 0.01, STEPS)[:steps],
        dynamics=(lambda rate: farhox.Momentum(rate, 0.5)) if name == "reversible" else None)


@pytest.mark.one_case
@methods
def test_early_stop_equals_a_training_of_as_many_steps(name):
    early, fixed = (METHODS[name].compute(*case[:3]) for case in (
        stopping(name), stopping(name, tolerance=None, steps=TAKEN)))
    taken = int(early.diagnostics["inner_steps"])
    assert taken == TAKEN
    assert_close(early.gradients, fixed.gradients, 1e-12)
    assert_close([early.outer_loss, early.state.variables[0]], [fixed.outer_loss, fixed.state.variables[0]], 1e-14)
    assert int(early.state.step) == taken
    for key in ("inner_gradient_norm", "inner_steps"):
        np.testing.assert_allclose(early.diagnostics[key], fixed.diagnostics[key], rtol=1e-14)
    assert early.diagnostics["inner_gradient_norm"] < TOLERANCE
    # The last loss fills the rest.
    losses = early.inner_losses.numpy()
    assert losses.shape == (STEPS,)
    assert np.all(np.diff(losses[:taken]) < 0)
    np.testing.assert_array_equal(losses[taken:], losses[taken - 1])


@pytest.mark.slow
@pytest.mark.one_case
@methods
def test_tolerance_that_is_never_reached_changes_no_bit(name):
    never, without = (METHODS[name].compute(*stopping(name, tolerance)[:3]) for tolerance in (1e-9, None))
    assert_identical(never, without)
    assert int(never.diagnostics["inner_steps"]) == STEPS


@pytest.mark.one_case
@pytest.mark.parametrize("name", [
    name if name in ("checkpoint_3", "forward", "implicit") else pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS])
def test_first_step_is_always_taken(name):
    result = METHODS[name].compute(*stopping(name, tolerance=1e9)[:3])
    assert int(result.diagnostics["inner_steps"]) == 1


@pytest.mark.slow
def test_truncation_counts_back_from_the_last_step_taken():
    case = scalar_quadratic(outer=("target",), stop_tolerance=TOLERANCE)
    end = TARGET + Q ** TAKEN * (START - TARGET)
    for truncation in (1, 3, 10):
        result = farhox.ReverseHG(truncation).compute(*case[:3])
        assert_close(result.gradients, [(end - 1.0) * (1 - Q ** min(truncation, TAKEN))], 1e-12)


@pytest.mark.slow
def test_initial_values_have_their_gradient():
    case = scalar_quadratic(outer=("target", "initial"), stop_tolerance=TOLERANCE)
    end = TARGET + Q ** TAKEN * (START - TARGET)
    for method in (farhox.ReverseHG(), farhox.ReverseHG(checkpoint_every=2), farhox.ForwardHG(),
                   farhox.ReverseHG(truncation=STEPS)):
        result = method.compute(*case[:3])
        assert_close(result.gradients, [(end - 1.0) * (1 - Q ** TAKEN), (end - 1.0) * Q ** TAKEN], 1e-12)
    # Truncated, the initial value is out of reach.
    assert farhox.ReverseHG(truncation=2).compute(*case[:3]).gradients[1] == 0


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("name", ["reverse", "checkpoint_sqrt", "truncated", "forward"])
def test_network_with_masks_and_statistics_replays_the_steps_it_took(name, float64):
    case = network_problem("BatchNormalization", "momentum", steps=12, extra=[keras.layers.Dropout(0.3)])
    norms = []
    state = case.problem.initial_state()
    for t in range(12):
        batch = tf.nest.map_structure(lambda leaf: leaf[t], case.inner_batches)
        step = case.problem.step(state, case.problem.outer_values(), batch)
        state = step.state
        norms.append(float(step.gradient_norm))
    tolerance = 1.0001 * min(norms[:9])
    taken = 1 + next(t for t, norm in enumerate(norms) if norm < tolerance)
    fixed = tf.function(lambda: METHODS[name].compute(
        case.problem, tf.nest.map_structure(lambda leaf: leaf[:taken], case.inner_batches), case.outer_batch),
        autograph=False)()
    case.problem.stop_tolerance = tolerance
    early = tf.function(lambda: METHODS[name].compute(*case[:3]), autograph=False)()
    assert 1 < taken < 12 and int(early.diagnostics["inner_steps"]) == taken
    assert_close(early.gradients, fixed.gradients, 1e-10)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("name", ["checkpoint_3", "truncated_checkpoints", "forward", "reversible"])
def test_xla_stops_at_the_same_step(name):
    case = stopping(name)
    eager = METHODS[name].compute(*case[:3])
    compiled = tf.function(lambda: METHODS[name].compute(*case[:3]), autograph=False, jit_compile=True)()
    assert_close(compiled.gradients, eager.gradients, 1e-9)
    assert int(compiled.diagnostics["inner_steps"]) == int(eager.diagnostics["inner_steps"])
    assert_close([compiled.inner_losses], [eager.inner_losses], 1e-12)


def test_loss_that_is_not_a_number_does_not_stop_the_training():
    case = scalar_quadratic(outer=("target",), initial=float("nan"), stop_tolerance=TOLERANCE)
    assert int(farhox.ReverseHG().compute(*case[:3]).diagnostics["inner_steps"]) == STEPS


@pytest.mark.slow
def test_fit_evaluate_and_train_inner_stop_too():
    case = scalar_quadratic("float32", outer=("target",), stop_tolerance=TOLERANCE)
    optimizer = farhox.HyperOptimizer(case.problem)
    optimizer.compile(keras.optimizers.SGD(0.0))
    end = TARGET + Q ** TAKEN * (START - TARGET)
    logs = optimizer.fit((case.inner_batches, case.outer_batch), verbose=0).history
    last_loss = CURVATURE / 2 * (Q ** (TAKEN - 1) * (START - TARGET)) ** 2
    np.testing.assert_allclose([logs["outer_loss"][0], logs["inner_loss"][0]], [(end - 1) ** 2 / 2, last_loss], 1e-5)
    evaluated = optimizer.evaluate((case.inner_batches, case.outer_batch), verbose=0, return_dict=True)
    np.testing.assert_allclose(evaluated["outer_loss"], (end - 1) ** 2 / 2, 1e-5)
    losses = optimizer.train_inner(case.inner_batches)
    np.testing.assert_allclose(losses[-1], last_loss, 1e-5)
    np.testing.assert_allclose(case.problem.inner_variables[0].numpy(), end, 1e-5)


@pytest.mark.slow
def test_hypergradient_check_stops_too():
    case = scalar_quadratic(outer=("target", "rate"), stop_tolerance=TOLERANCE)
    assert farhox.check_hypergradient(*case[:3], farhox.ReverseHG()).maximum_error < 1e-6


@pytest.mark.slow
def test_episodes_stop_by_themselves():
    case = scalar_quadratic(outer=("target",), stop_tolerance=TOLERANCE)
    result = EpisodesHG(farhox.ReverseHG()).compute(
        case.problem, tf.stack([case.inner_batches, 4 * case.inner_batches]), tf.stack([case.outer_batch] * 2))
    # Norms with four times the curvature: 20, 4, 0.8.
    assert result.state.step.numpy().tolist() == [TAKEN, 3]
    assert result.diagnostics["inner_steps"] == 3.5


@pytest.mark.slow
def test_health_counts_the_steps_taken():
    case = scalar_quadratic(outer=("target",), stop_tolerance=TOLERANCE)
    assert health(*case[:3], farhox.ReverseHG()).steps == TAKEN


@pytest.mark.slow
def test_supervised_problem_takes_a_tolerance():
    model, inner_batches, outer_batch = model_and_data("Dense")
    rate = farhox.Hyperparameter(0.1, low=0.0, name="rate")
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), farhox.GradientDescent(rate), [rate],
        stop_tolerance=100.0)
    result = farhox.ReverseHG().compute(problem, inner_batches, outer_batch)
    assert int(result.diagnostics["inner_steps"]) == 1


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("inf"), True, "small"])
def test_tolerance_must_be_a_positive_number(tolerance):
    with pytest.raises(ValueError, match="stop_tolerance must be a positive number, a callable"):
        scalar_quadratic(stop_tolerance=tolerance)


def on_the_border(dynamics, constraint=None, stop_tolerance=1e-6):
    """A minimum with an inner gradient of -0.5 in the first entry: by a bound, or an L1 penalty of 0.5."""
    w, theta = (keras.Variable(value, dtype="float64", name=name)
                for value, name in (([1.0, 1.0], "w"), (0.5, "theta")))
    w.constraint = constraint
    return farhox.BilevelProblem(
        lambda batch: 0.5 * (w[0] + 0.5) ** 2 + 0.5 * (w[1] - 2.0 * theta) ** 2 + 0.0 * batch,
        lambda batch: keras.ops.sum(w), [w], [theta], dynamics, stop_tolerance=stop_tolerance)


@pytest.mark.one_case
@pytest.mark.parametrize("dynamics, constraint, end", [
    (farhox.dynamics.ProximalGradient(0.5, farhox.dynamics.L1(0.5)), None, [0.0, 0.5]),
    (farhox.dynamics.ProximalGradient(0.5, farhox.constraints.Box(low=0.0)), None, [0.0, 1.0]),
    (farhox.GradientDescent(0.5), keras.constraints.NonNeg(), [0.0, 1.0]),
    (farhox.Momentum(0.3, 0.3), farhox.constraints.Box(low=0.0), [0.0, 1.0]),
    (farhox.KerasDynamics(keras.optimizers.SGD(0.5)), keras.constraints.NonNeg(), [0.0, 1.0])],
    ids=["penalty", "projection", "constraint", "momentum", "keras"])
def test_training_stops_at_a_minimum_where_the_gradient_is_not_zero(dynamics, constraint, end):
    problem = on_the_border(dynamics, constraint)
    result = farhox.ReverseHG().compute(problem, farhox.repeat(np.zeros([]), 200), np.zeros([]))
    assert 1 < int(result.diagnostics["inner_steps"]) < 60 and result.diagnostics["inner_gradient_norm"] < 1e-6
    np.testing.assert_allclose(result.state.variables[0], end, atol=1e-5)


def test_a_tolerance_on_a_gradient_that_a_decoupled_decay_holds_up_is_refused():
    decayed = farhox.KerasDynamics(keras.optimizers.SGD(0.5, weight_decay=0.1))
    with pytest.raises(ValueError, match="KerasDynamics does not here, because of a weight decay"):
        on_the_border(decayed)
    on_the_border(decayed, stop_tolerance=None)


@pytest.mark.slow
def test_a_tolerance_may_follow_the_hyper_iterations():
    tolerance = [3.5, 2.6, 2.1]
    counts = [3, 4, 5]

    def schedule(iteration):
        return tf.gather(tf.constant(tolerance), iteration)

    case = scalar_quadratic(outer=("target",), stop_tolerance=schedule)
    assert int(farhox.ReverseHG().compute(*case[:3]).diagnostics["inner_steps"]) == counts[0]
    optimizer = farhox.HyperOptimizer(case.problem)
    optimizer.compile(keras.optimizers.SGD(0.0))
    for count in counts:
        result = optimizer.step(case.inner_batches, case.outer_batch)
        assert int(result.diagnostics["inner_steps"]) == count
    parts = farhox.hypergradients.ObjectivesHG(
        farhox.ReverseHG(), [(case.problem.outer_objective, case.problem.outer_variables)])
    assert int(parts.compute(*case[:3], iteration=2).diagnostics["inner_steps"]) == 5
    # The count is that of the optimizer: a training that goes on from saved weights goes on with it.
    optimizer.optimizer.iterations.assign(1)
    losses = optimizer.train_inner(case.inner_batches).numpy()
    assert len(np.unique(losses)) == 4

"""ReversibleHG: steps are undone to the bit, hypergradients are those of ReverseHG, memory is a buffer of few bits."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import STEPS, assert_close, heavy_ball, network_problem, scalar_quadratic, variable

import farhox
from farhox.hypergradients import ReversibleHG
from farhox.hypergradients.reversible import _Fixed


def network(momentum=0.9, steps=20, rate=0.05, name="Dense", extra=()):
    """A network whose learning rate, L2 strength and weights of the examples are learned."""
    case = network_problem(name, "momentum", steps=steps, extra=extra)
    problem = case.problem
    learned = problem.dynamics.learning_rate
    learned.assign(rate)
    return case._replace(problem=farhox.BilevelProblem(
        problem._inner_objective, problem._outer_objective, problem.inner_variables,
        [learned, *problem.outer_variables[2:]], farhox.Momentum(learned, momentum), problem.state_variables))


def compiled(method, case, **options):
    return tf.function(lambda: method.compute(*case[:3]), autograph=False, **options)()


@pytest.mark.parametrize("ratio", [(9, 10), (7, 1000), *(pytest.param(ratio, marks=pytest.mark.slow) for ratio in (
    (1, 2), (99, 100), (9_999, 10_000)))])
def test_ratio_is_undone_exactly_whatever_the_numbers(ratio):
    fixed = _Fixed(ratio, 40)
    random = np.random.default_rng(0)
    steps = min(fixed.steps_per_word(), 200)
    start = tf.constant(random.integers(-2 ** 60, 2 ** 60, 1000) // random.integers(1, 2 ** 50, 1000))
    values, digits, additions = [start], [tf.zeros_like(start)], []
    for _ in range(steps):
        values, digits = fixed.multiply(values, digits)
        assert np.all(digits[0] >= 0)
        additions.append(tf.constant(random.integers(-2 ** 40, 2 ** 40, 1000)))
        values = [values[0] + additions[-1]]
    for addition in reversed(additions):
        values, digits = fixed.divide([values[0] - addition], digits)
    np.testing.assert_array_equal(values[0], start)
    assert not np.any(digits[0])


def test_multiplication_is_right_up_to_the_last_places():
    fixed = _Fixed((9, 10), 40)
    start = np.random.default_rng(0).integers(-2 ** 50, 2 ** 50, 1000)
    values, _ = fixed.multiply([tf.constant(start)], [tf.zeros(1000, tf.int64)])
    assert np.max(np.abs(values[0].numpy() - 0.9 * start)) <= 10


@pytest.mark.one_case
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_heavy_ball_has_its_hypergradient(momentum):
    w, target, rate = variable(3.0, name="w"), variable(0.5, name="target"), variable(0.1, name="rate")
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - target), lambda goal: keras.ops.square(w - goal) / 2,
        inner_variables=[w], outer_variables=[target, rate, w], dynamics=farhox.Momentum(rate, momentum))
    data = tf.fill([5], tf.constant(2.0, tf.float64)), tf.constant(1.0, tf.float64)
    result = ReversibleHG().compute(problem, *data)
    expected = farhox.ReverseHG().compute(problem, *data)
    assert_close(result.gradients, expected.gradients, 1e-9)
    if momentum == 0.5:
        assert_close(result.gradients[:2], [-0.475035561, 5.85997912], 1e-7)
    assert result.diagnostics["reversed_exactly"]


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [
    0.9, pytest.param(0.123, marks=pytest.mark.slow), pytest.param(0.99, marks=pytest.mark.slow)])
def test_hypergradient_is_that_of_reverse_mode_up_to_rounding(momentum, float64):
    case = network(momentum, steps=60)
    expected, result = compiled(farhox.ReverseHG(), case), compiled(ReversibleHG(), case)
    assert result.diagnostics["reversed_exactly"]
    assert_close(result.gradients, expected.gradients, 1e-8)
    assert_close([result.outer_loss, result.inner_losses], [expected.outer_loss, expected.inner_losses], 1e-8)
    assert_close(result.state.variables + result.state.slots, expected.state.variables + expected.state.slots, 1e-8)
    assert int(result.state.step) == 60
    tf.nest.assert_same_structure(result.state, expected.state)
    assert result.diagnostics.keys() > expected.diagnostics.keys()


@pytest.mark.slow
def test_error_is_that_of_the_fractional_bits(float64):
    case = network(steps=30)
    expected = compiled(farhox.ReverseHG(), case).gradients
    errors = []
    for bits in (12, 40):
        result = compiled(ReversibleHG(fractional_bits=bits), case)
        assert result.diagnostics["reversed_exactly"]
        errors.append(max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(result.gradients, expected)))
    assert errors[1] < errors[0] / 10_000


@pytest.mark.slow
def test_replay_has_the_masks_and_statistics_of_each_step(float64):
    case = network(name="BatchNormalization", extra=[keras.layers.Dropout(0.5)])
    expected, result = compiled(farhox.ReverseHG(), case), compiled(ReversibleHG(), case)
    assert result.diagnostics["reversed_exactly"]
    assert_close(result.gradients, expected.gradients, 1e-9)
    assert_close([v for v in result.state.state_variables if v.dtype.is_floating],
                 [v for v in expected.state.state_variables if v.dtype.is_floating], 1e-9)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_float32_training_is_undone_exactly_in_graphs_and_under_xla(jit_compile):
    case = network(steps=12)
    result = compiled(ReversibleHG(), case, jit_compile=jit_compile)
    assert result.diagnostics["reversed_exactly"]
    assert_close(result.gradients, compiled(farhox.ReverseHG(), case).gradients, 1e-4)


@pytest.mark.slow
def test_convolutions_are_undone_exactly():
    case = network(steps=30, name="ConvBatchNormalization")
    assert compiled(ReversibleHG(), case).diagnostics["reversed_exactly"]


@pytest.mark.slow
def test_ten_thousand_steps_end_at_the_initial_bits_with_a_small_buffer():
    """`reversed_exactly` compares all integers with those of the start; the hypergradient is a number because of it."""
    case = network(steps=1, rate=0.01)
    steps = 10_000
    batches = farhox.gather(
        tf.nest.map_structure(lambda leaf: leaf[0], case.inner_batches),
        np.random.default_rng(0).integers(0, 4, (steps, 4)))
    result = compiled(ReversibleHG(), case._replace(inner_batches=batches))
    assert result.diagnostics["reversed_exactly"]
    assert np.all(np.isfinite(result.gradients[0]))
    entries = sum(math.prod(v.shape) for v in case.problem.inner_variables)
    stored = int(result.diagnostics["stored_bytes"])
    # log2(10/9) = 0.152 bits for each step; words are filled up to a few bits.
    assert 8 * stored / (entries * steps) < 0.18
    assert stored < entries * steps * 8 / 300  # ReverseHG stores a variable and a momentum of four bytes each.


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("momentum, bits", [(0.9, 0.152), (0.99, 0.0145), (0.5, 1.0)])
def test_buffer_grows_by_the_logarithm_of_the_momentum(momentum, bits):
    case = scalar_quadratic(outer=("target",), steps=5_000,
                            dynamics=lambda rate: farhox.Momentum(1e-4, momentum))
    result = compiled(ReversibleHG(), case)
    assert result.diagnostics["reversed_exactly"]
    used = 8 * int(result.diagnostics["stored_bytes"]) / 5_000
    np.testing.assert_allclose(bits, -math.log2(momentum), rtol=5e-3)
    assert bits < used < 1.2 * bits + 64 / 5_000


@pytest.mark.slow
def test_learned_schedules_and_rates_per_variable(float64):
    case = network(steps=4)
    problem = case.problem
    schedule = farhox.LearnedSchedule(4, 0.05, dtype="float64")
    count = len(problem.inner_variables)
    problem = farhox.BilevelProblem(
        problem._inner_objective, problem._outer_objective, problem.inner_variables,
        [schedule, *problem.outer_variables],
        farhox.Momentum([schedule] + [problem.dynamics.learning_rate] * (count - 1), 0.9))
    expected = farhox.ReverseHG().compute(problem, *case[1:3]).gradients
    assert_close(ReversibleHG().compute(problem, *case[1:3]).gradients, expected, 1e-9)


@pytest.mark.slow
def test_state_that_is_passed_back_goes_on(float64):
    case = network(steps=20)
    whole = compiled(ReversibleHG(), case)
    first, second = (tf.nest.map_structure(lambda leaf: leaf[part], case.inner_batches)
                     for part in (slice(0, 12), slice(12, 20)))
    method = ReversibleHG()
    state = compiled(method, case._replace(inner_batches=first)).state
    result = tf.function(
        lambda: method.compute(case.problem, second, case.outer_batch, state=state), autograph=False)()
    assert_close(result.state.variables, whole.state.variables, 1e-9)
    assert int(result.state.step) == 20
    expected = farhox.ReverseHG().compute(case.problem, second, case.outer_batch, state=state).gradients
    assert_close(result.gradients, expected, 1e-8)


def test_initial_values_have_no_effect_on_a_state_that_is_passed_in():
    case = scalar_quadratic(outer=("target", "initial"), dynamics=lambda rate: farhox.Momentum(0.1, 0.9))
    with pytest.raises(ValueError, match="depends on 'w'.*a state that is passed in does not depend on initial values"):
        ReversibleHG().compute(*case[:3], state=case.problem.initial_state())


@pytest.mark.parametrize("start", [3e9, float("nan")])
def test_what_leaves_the_range_is_not_a_number_afterwards(start):
    case = scalar_quadratic(outer=("target",), initial=start, dynamics=lambda rate: farhox.Momentum(0.1, 0.9))
    result = ReversibleHG(fractional_bits=40).compute(*case[:3])
    assert not result.diagnostics["finite"]
    assert np.isnan(result.outer_loss) and np.isnan(result.gradients[0])


@pytest.mark.slow
def test_diverged_training_is_not_a_number():
    case = scalar_quadratic(outer=("target",), steps=60, dynamics=lambda rate: farhox.Momentum(30.0, 0.9))
    result = ReversibleHG().compute(*case[:3])
    assert np.isnan(result.outer_loss) and np.isnan(result.gradients[0])


def test_hypergradient_of_a_training_that_cannot_be_undone_is_not_a_number():
    """An inner gradient that is another one each time it is computed."""
    case = scalar_quadratic(outer=("target",), steps=30)
    w, target = case.problem.inner_variables[0], case.problem.outer_variables[0]
    problem = farhox.BilevelProblem(
        lambda a: keras.ops.square(w - target) * (1.0 + tf.math.floormod(tf.timestamp(), 0.1)),
        case.problem._outer_objective, [w], [target], farhox.Momentum(0.1, 0.9))
    result = compiled(ReversibleHG(), case._replace(problem=problem))
    assert not result.diagnostics["reversed_exactly"]
    assert not result.diagnostics["finite"]
    assert np.isnan(result.gradients[0]) and np.isfinite(result.outer_loss)


@pytest.mark.slow
def test_fit_trains_with_it():
    case = scalar_quadratic("float32", outer=("target", "rate"), dynamics=lambda rate: farhox.Momentum(rate, 0.9))
    optimizer = farhox.HyperOptimizer(case.problem, ReversibleHG(), online=True)
    optimizer.compile(keras.optimizers.SGD(0.01))
    history = optimizer.fit((case.inner_batches, case.outer_batch), epochs=3, verbose=0)
    assert history.history["skipped_updates"] == [0, 0, 0]
    assert int(optimizer.step(case.inner_batches, case.outer_batch).state.step) == 4 * STEPS


@pytest.mark.parametrize("dynamics", [
    farhox.GradientDescent(0.1), farhox.Adam(0.1), farhox.Momentum(0.1, 0.9, nesterov=True)])
def test_other_dynamics_are_errors_that_name_the_way_out(dynamics):
    case = scalar_quadratic(outer=("target",), dynamics=lambda rate: dynamics)
    with pytest.raises(ValueError, match="undoes farhox.Momentum without nesterov.*use ReverseHG.checkpoint_every='sq"):
        ReversibleHG().compute(*case[:3])


@pytest.mark.parametrize("momentum", [0.0, 1.0, lambda step: tf.constant(0.9)])
def test_momentum_must_be_a_float_between_zero_and_one(momentum):
    case = scalar_quadratic(outer=("target",), dynamics=lambda rate: farhox.Momentum(rate, momentum))
    with pytest.raises(ValueError, match="needs a float strictly between 0 and 1.*use ReverseHG.checkpoint_every="):
        ReversibleHG().compute(*case[:3])


def test_learned_momentum_is_an_error_that_names_the_way_out():
    with pytest.raises(ValueError, match="To learn the momentum, or without any, use ReverseHG"):
        ReversibleHG().compute(*heavy_ball()[:3])


def test_constraints_of_inner_variables_are_an_error_that_names_them():
    case = scalar_quadratic(outer=("target",), dynamics=lambda rate: farhox.Momentum(rate, 0.9))
    case.problem.inner_variables[0].constraint = keras.constraints.NonNeg()
    with pytest.raises(ValueError, match="cannot undo constraints of the inner variables. Received: constraints on '"):
        ReversibleHG().compute(*case[:3])


def test_momentum_must_be_a_ratio_of_small_integers():
    case = scalar_quadratic(outer=("target",), dynamics=lambda rate: farhox.Momentum(rate, math.sqrt(0.5)))
    with pytest.raises(ValueError, match="ratio of integers with a denominator of at most 10,000.*Near it is 0.707"):
        ReversibleHG().compute(*case[:3])


@pytest.mark.parametrize("bits", [9, 53, 40.0, True])
def test_fractional_bits_must_be_an_integer_in_range(bits):
    with pytest.raises(ValueError, match="fractional_bits must be an integer from 10 to 52"):
        ReversibleHG(fractional_bits=bits)

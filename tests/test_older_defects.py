"""Defects that older packages have, each with a test that would catch it here."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import assert_close, proximal_quadratic, scalar_quadratic, variable

import farhox
from farhox.linear_solvers import GMRES, Direct, FixedPoint, Neumann, NormalConjugateGradient, Nystrom

CHECKPOINTS = pytest.mark.parametrize("checkpoint_every", [None, 1, 2, "sqrt"])


@pytest.mark.one_case
@CHECKPOINTS
def test_replay_is_not_off_by_one_batch(checkpoint_every):
    """FAR-HO replays step k with batch k - 1: dE/drate is then -2.436 or -2.088."""
    case = scalar_quadratic(outer=("target", "rate"), steps=3, curvatures=[1.0, 2.0, 0.5])
    case.problem.outer_variables[1].assign(0.2)
    result = farhox.ReverseHG(checkpoint_every=checkpoint_every).compute(*case[:3])
    assert_close(result.gradients, [0.32944, -3.219], 1e-9)


@pytest.mark.slow
def test_online_mode_goes_back_to_the_state_it_started_from():
    """FAR-HO does not store that state and walks T - 1 steps back."""
    case = scalar_quadratic(outer=("target",), steps=4)
    first = farhox.ReverseHG().compute(case.problem, case.inner_batches[:1], case.outer_batch)
    second = farhox.ReverseHG().compute(case.problem, case.inner_batches[1:], case.outer_batch, state=first.state)
    end = float(second.state.variables[0])
    assert_close(second.gradients, [(end - 1.0) * (1 - 0.8 ** 3)], 1e-9)


@pytest.mark.one_case
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG()])
def test_adam_is_differentiated_as_the_adam_that_runs(method):
    """FAR-HO runs Adam with epsilon outside of the root and differentiates one with epsilon inside."""
    epsilon, target = 1e-2, 0.5
    case = scalar_quadratic(
        outer=("target", "rate"), dynamics=lambda rate: farhox.Adam(rate, beta_1=0.8, beta_2=0.9, epsilon=epsilon))
    w = keras.Variable(np.array(3.0), dtype="float64")
    adam = keras.optimizers.Adam(0.1, beta_1=0.8, beta_2=0.9, epsilon=epsilon)
    for _ in range(7):
        adam.apply_gradients([(2.0 * (w.value - target), w)])
    result = method.compute(*case[:3])
    np.testing.assert_allclose(result.state.variables[0], w.numpy(), rtol=1e-6)
    assert_close(result.gradients, unrolled.finite_differences(*case[:3]), 1e-8)


@pytest.mark.slow
def test_truncated_adjoint_is_not_multiplied_by_the_initial_dynamics():
    """FAR-HO treats the adjoint at step T - K as if it were that of step 0: an initial value gets (w_T - c) q^K."""
    case = scalar_quadratic(outer=("target", "initial"))
    with pytest.raises(ValueError, match="depends on 'w'"):
        farhox.ReverseHG(truncation=3).compute(*case[:3])
    case = proximal_quadratic(steps=6)
    case.problem.dynamics = farhox.GradientDescent(0.2)
    (gradient,) = farhox.ReverseHG(truncation=2).compute(*case[:3]).gradients
    end = float(farhox.ReverseHG().compute(*case[:3]).state.variables[0])
    # Of the last two steps: the proximal term pulls with factor 0.2 * 2, contraction 1 - 0.2 * 3.
    assert_close([gradient], [(end - 5.0) * 0.4 * (1 + 0.4)], 1e-9)


@pytest.mark.one_case
@pytest.mark.parametrize("solver", [
    farhox.ConjugateGradient(), NormalConjugateGradient(), Neumann(), FixedPoint(),
    GMRES(), Nystrom(), Direct()])
def test_implicit_gradient_of_a_diverged_training_is_not_silently_zero(solver):
    w, target = variable(3.0), variable(0.5)
    problem = farhox.BilevelProblem(
        lambda a: a / 4 * keras.ops.power(w - target, 4), lambda goal: keras.ops.square(w - goal) / 2,
        inner_variables=[w], outer_variables=[target], dynamics=farhox.GradientDescent(1.0))
    result = farhox.ImplicitHG(solver).compute(problem, tf.ones([30], tf.float64), tf.constant(1.0, tf.float64))
    assert not np.isfinite(result.gradients[0])
    assert not result.diagnostics["finite"]
    assert result.diagnostics["solver_failed"]


_ORDER = """
import keras, numpy as np, tensorflow as tf, farhox
ws = [keras.Variable(np.float64(i), dtype="float64", name=f"w{i}") for i in range(5)]
outer = [keras.Variable(np.float64(0.3 * i), dtype="float64", name=f"o{i}") for i in range(5)]
problem = farhox.BilevelProblem(
    lambda a: sum(a * (w - o) ** 2 for w, o in zip(ws, outer)), lambda a: sum(a * w ** 2 for w in ws), ws, outer)
result = farhox.ReverseHG().compute(problem, tf.ones([3], tf.float64), tf.constant(1.0, tf.float64))
print([variable.path for variable in problem.outer_variables], [float(g).hex() for g in result.gradients])
"""


@pytest.mark.slow
def test_order_and_bits_are_the_same_in_every_process(capsys):
    """FAR-HO orders inner problems by address."""
    exec(_ORDER, {})
    here = capsys.readouterr().out
    there = subprocess.run([sys.executable, "-c", _ORDER], capture_output=True, text=True, check=True).stdout
    assert here == there
    assert here.startswith("['o0', 'o1', 'o2', 'o3', 'o4']")


@pytest.mark.slow
def test_order_of_inner_variables_leaves_the_hypergradient_unchanged():
    gradients = []
    for order in ([0, 1, 2], [2, 0, 1]):
        ws = [variable(value, name=f"w{i}") for i, value in enumerate((1.0, 2.0, -1.0))]
        target = variable(0.5)
        problem = farhox.BilevelProblem(
            lambda a: sum(a * c * keras.ops.square(w - target) for c, w in zip((1.0, 0.3, 2.0), ws)),
            lambda goal: sum(keras.ops.square(w - goal) for w in ws),
            [ws[i] for i in order], [target], farhox.GradientDescent(0.1))
        data = tf.ones([4], tf.float64), tf.constant(1.0, tf.float64)
        gradients.append(farhox.ReverseHG().compute(problem, *data).gradients)
    assert_close(gradients[0], gradients[1], 1e-12)


def solve(solver, a, b, initial=None):
    a = tf.constant(a, tf.float64)
    return solver.solve(lambda v: tf.linalg.matvec(a, v), tf.constant(b, tf.float64), initial).vector


def test_conjugate_gradient_keeps_the_iterate_that_met_the_tolerance():
    """hypertorch returns the one before: zero for A = 2I, an error of 0.1 for diag(1, 2, 3)."""
    np.testing.assert_allclose(solve(farhox.ConjugateGradient(), 2 * np.eye(2), [1.0, 4.0]), [0.5, 2.0], rtol=1e-12)
    np.testing.assert_allclose(
        solve(farhox.ConjugateGradient(), np.diag([1.0, 2.0, 3.0]), np.ones(3)), [1.0, 0.5, 1 / 3], rtol=1e-12)


@pytest.mark.one_case
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_conjugate_gradient_solves_a_scaled_system(scale):
    """Betty scales A in the step size and not in the residual: an error of 12 for a scale of 0.5."""
    factor = np.random.default_rng(0).normal(size=(6, 6))
    a = factor @ factor.T + np.eye(6)
    b = np.ones(6)
    solution = solve(farhox.ConjugateGradient(12, tolerance=1e-14), scale * a, b)
    np.testing.assert_allclose(solution, np.linalg.solve(scale * a, b), rtol=1e-9)


@pytest.mark.slow
def test_conjugate_gradient_gains_beyond_the_third_step():
    """moskomule/hypergrad builds the direction from the old residual: the error grows from the third step on."""
    a, b = np.diag(np.arange(1.0, 7.0)), np.ones(6)
    errors = [np.linalg.norm(solve(farhox.ConjugateGradient(k, tolerance=0.0), a, b) - 1.0 / np.arange(1.0, 7.0))
              for k in range(1, 7)]
    assert all(later < earlier for earlier, later in zip(errors[2:], errors[3:]))
    assert errors[-1] < 1e-12


@pytest.mark.one_case
@CHECKPOINTS
def test_batches_of_a_data_set_are_not_drawn_again_on_the_way_back(checkpoint_every):
    """hypertorch calls next() on the data again when it replays a step."""
    drawn = []

    def generate():
        for curvature in (1.0, 2.0, 0.5, 7.0, 9.0, 11.0):
            drawn.append(curvature)
            yield curvature

    data = iter(tf.data.Dataset.from_generator(
        generate, output_signature=tf.TensorSpec([], tf.float64)).batch(3).as_numpy_iterator())
    case = scalar_quadratic(outer=("target", "rate"), steps=3, curvatures=[1.0, 2.0, 0.5])
    case.problem.outer_variables[1].assign(0.2)
    result = farhox.ReverseHG(checkpoint_every=checkpoint_every).compute(case.problem, next(data), case.outer_batch)
    assert_close(result.gradients, [0.32944, -3.219], 1e-9)


def test_proximal_strength_is_neither_scaled_nor_damped_in_secret():
    """imaml_dev solves with (1 + damp) v + H v / (λ + 10): its factor would be 0.48 and not 2/3."""
    case = proximal_quadratic()
    (gradient,) = farhox.ImplicitHG().compute(*case[:3]).gradients
    np.testing.assert_allclose(gradient / (5 / 3 - 5), 2 / 3, rtol=1e-9)


@pytest.mark.slow
def test_proximal_strength_may_be_learned():
    """imaml_dev takes every strength for a number."""
    strength = farhox.Hyperparameter(2.0, low=0.0, name="strength", dtype="float64")
    w, target = variable(1.0), variable(3.0)
    problem = farhox.BilevelProblem(
        lambda a: keras.ops.square(w - target) / 2 + 0.0 * a, lambda goal: keras.ops.square(w - goal) / 2,
        [w], [strength, target], farhox.GradientDescent(0.2), proximal=strength)
    data = tf.ones([80], tf.float64), tf.constant(5.0, tf.float64)
    expected = unrolled.finite_differences(problem, *data)
    assert_close(farhox.ReverseHG().compute(problem, *data).gradients, expected, 1e-8)
    assert_close(farhox.ImplicitHG().compute(problem, *data).gradients, expected, 1e-8)


def test_bounds_of_a_hyperparameter_are_the_same_when_it_is_set_and_read():
    """Self-tuning networks' code sets the cutout length with the range (0, 25) and reads it with (0, 24)."""
    length = farhox.Hyperparameter(12.0, low=0.0, high=25.0, dtype="float64")
    for value in (0.5, 12.0, 24.5):
        length.assign(value)
        np.testing.assert_allclose(length.numpy(), value, rtol=1e-12)


@pytest.mark.slow
def test_keras_schedule_of_an_inner_learning_rate_is_stepped():
    """Self-tuning networks' code builds a schedule and never steps it."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.01])
    case = scalar_quadratic("float64", ("target",), steps=4, dynamics=lambda rate: farhox.GradientDescent(schedule))
    w = 3.0
    for rate in (0.1, 0.1, 0.01, 0.01):
        w -= rate * 2.0 * (w - 0.5)
    np.testing.assert_allclose(farhox.ReverseHG().compute(*case[:3]).state.variables[0], w, rtol=1e-7)


def test_implicit_gradient_of_an_initial_value_is_an_error_and_not_zero():
    """Implicit differentiation does not see an initial value, which surprises users of other packages."""
    case = scalar_quadratic(outer=("initial",))
    with pytest.raises(ValueError, match=r"depends on 'w'.*initial value without a proximal term"):
        farhox.ImplicitHG().compute(*case[:3])

"""DartsHG against closed forms and the truncation that it approximates; T1-T2 from the parts there are."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    CURVATURE,
    GOAL,
    RATE,
    START,
    STEPS,
    TARGET,
    TOLERANCE,
    assert_close,
    heavy_ball,
    network_problem,
    scalar_quadratic,
    variable,
)

import farhox
from farhox.hypergradients import DartsHG
from farhox.linear_solvers import Neumann

dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
Q = 1 - RATE * CURVATURE
END = TARGET + Q ** STEPS * (START - TARGET)


@pytest.mark.one_case
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-3)])
def test_quadratic_has_its_published_value(dtype, tolerance):
    (gradient,) = DartsHG().compute(*scalar_quadratic(dtype, ("target",))[:3]).gradients
    assert_close([gradient], [(END - GOAL) * CURVATURE * RATE], tolerance)
    np.testing.assert_allclose(gradient, 0.0048576, rtol=tolerance)


@pytest.mark.one_case
@dtypes
def test_t1_t2_is_a_neumann_series_of_one_term(dtype):
    """T1-T2 of Luketina et al. (2016): the inverse Hessian replaced by the learning rate."""
    method = farhox.ImplicitHG(Neumann(1, step_size=RATE, tolerance=0.0))
    (gradient,) = method.compute(*scalar_quadratic(dtype, ("target",))[:3]).gradients
    np.testing.assert_allclose(gradient, 0.0048576, rtol=TOLERANCE[dtype])


@pytest.mark.slow
def test_settings_of_the_dynamics_have_the_gradient_of_the_last_step():
    case = heavy_ball()
    expected = farhox.ReverseHG(truncation=1).compute(*case[:3]).gradients
    assert_close(DartsHG().compute(*case[:3]).gradients, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("dynamics", ["adam", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("gradient_descent", "momentum", "nesterov"))])
def test_network_has_the_hypergradient_of_the_last_step(dynamics, float64):
    case = network_problem("Dense", dynamics)
    expected = farhox.ReverseHG(truncation=1).compute(*case[:3])
    errors = []
    for epsilon in (1e-1, 1e-2, 1e-3):
        result = DartsHG(epsilon).compute(*case[:3])
        errors.append(max(np.max(np.abs(a - b)) for a, b in zip(result.gradients, expected.gradients)))
    # Central differences: an error of second order.
    assert errors[1] < 0.02 * errors[0] and errors[2] < 0.02 * errors[1]
    assert_close(result.gradients, expected.gradients, 1e-5)
    assert_close([result.outer_loss, result.inner_losses], [expected.outer_loss, expected.inner_losses], 1e-12)
    assert_close(tf.nest.flatten(result.state), tf.nest.flatten(expected.state), 1e-12)
    assert result.diagnostics.keys() == expected.diagnostics.keys()
    assert int(result.diagnostics["inner_steps"]) == len(result.inner_losses) == 4


@pytest.mark.slow
def test_masks_and_statistics_are_those_of_the_last_step(float64):
    case = network_problem("Dense", extra=[keras.layers.Dropout(0.5)])
    expected = farhox.ReverseHG(truncation=1).compute(*case[:3]).gradients
    assert_close(DartsHG(1e-3).compute(*case[:3]).gradients, expected, 1e-5)


@pytest.mark.slow
def test_the_computation_under_xla_is_the_one_without(float64):
    case = network_problem("Dense", "momentum")
    compiled = tf.function(lambda: DartsHG().compute(*case[:3]), autograph=False, jit_compile=True)()
    assert_close(compiled.gradients, DartsHG().compute(*case[:3]).gradients, 1e-9)


@pytest.mark.slow
def test_first_order_dynamics_leave_the_explicit_parts():
    case = scalar_quadratic(outer=("rate",), dynamics=lambda rate: farhox.GradientDescent(rate, first_order=True))
    expected = farhox.ReverseHG(truncation=1).compute(*case[:3]).gradients
    assert_close(DartsHG().compute(*case[:3]).gradients, expected, 1e-12)


def test_vanishing_adjoint_gives_zero():
    case = scalar_quadratic(outer=("target",))
    end = DartsHG().compute(*case[:3]).state.variables[0]
    result = DartsHG().compute(case.problem, case.inner_batches, end)
    assert result.gradients[0] == 0


def test_initial_value_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="depends on 'w'. DartsHG sees .*use ReverseHG or ForwardHG"):
        DartsHG().compute(*scalar_quadratic(outer=("target", "initial"))[:3])


def test_explicit_dependence_of_the_outer_objective_is_exact():
    w, scale = variable(START), variable(2.0)
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w), lambda goal: scale * keras.ops.square(w - goal),
        inner_variables=[w], outer_variables=[scale], dynamics=farhox.GradientDescent(0.1))
    result = DartsHG().compute(problem, tf.constant([1.0], tf.float64), tf.constant(1.0, tf.float64))
    assert_close(result.gradients, [(result.state.variables[0] - 1.0) ** 2], 1e-12)


@pytest.mark.parametrize("epsilon", [0.0, -0.1, float("inf"), "small"])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon must be a positive finite number"):
        DartsHG(epsilon)

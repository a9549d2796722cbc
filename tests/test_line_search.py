"""BacktrackingGradientDescent: the Armijo condition, and its hypergradient."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import assert_close, network_problem, scalar_quadratic, variable

import farhox
from farhox.dynamics import BacktrackingGradientDescent


def search_problem(objective, start, rate=1.0, **settings):
    """One inner variable; the outer objective is its value."""
    w, shift = variable(start), variable(0.0)
    return farhox.BilevelProblem(
        lambda batch: objective(w) + shift * w, lambda batch: keras.ops.sum(w), [w], [shift],
        BacktrackingGradientDescent(rate, **settings))


def one_step(problem):
    return problem.step(problem.initial_state(), problem.outer_values(), tf.zeros([])).state


@pytest.mark.covering
@pytest.mark.parametrize("decrease, shrink", [(0.5, 0.5), (0.1, 0.5), (0.9, 0.8)])
@pytest.mark.parametrize("curvature", [0.3, 3.0, 700.0])
def test_step_is_the_first_that_decreases_enough(curvature, decrease, shrink):
    """On a quadratic curvature w^2 / 2 the step rate is accepted when rate <= 2 (1 - decrease) / curvature."""
    state = one_step(search_problem(
        lambda w: curvature / 2 * w ** 2, 3.0, decrease=decrease, shrink=shrink, max_backtracks=100))
    k = 0
    while shrink ** k > 2 * (1 - decrease) / curvature:
        k += 1
    assert int(state.slots[0]) == k
    np.testing.assert_allclose(state.variables[0], 3.0 * (1 - shrink ** k * curvature), rtol=1e-12)


def test_values_that_are_not_finite_are_refused():
    state = one_step(search_problem(lambda w: 5 * w - keras.ops.log(w) / 10, 0.5))
    # The gradient is 4.8: steps of 1, 1/2, 1/4 and 1/8 end at w < 0, where there is no logarithm.
    assert state.variables[0] > 0 and int(state.slots[0]) > 3


def test_search_gives_up_after_the_most_backtracks():
    problem = search_problem(lambda w: 1e6 * w ** 2, 1.0, max_backtracks=3)
    state = one_step(problem)
    assert int(state.slots[0]) == 3
    np.testing.assert_allclose(state.variables[0], 1.0 - 0.125 * 2e6, rtol=1e-12)


def test_step_at_a_minimum_stays_there():
    state = one_step(search_problem(lambda w: w ** 2, 0.0))
    assert state.variables[0] == 0 and int(state.slots[0]) == 0


def test_each_variable_has_its_own_first_try():
    v, w, target = variable([1.0, 2.0]), variable(3.0), variable(0.0)
    problem = farhox.BilevelProblem(
        lambda batch: keras.ops.sum(v ** 2) / 2 + (w - target) ** 2 / 2, lambda batch: w, [v, w], [target],
        BacktrackingGradientDescent([0.5, 0.25]))
    state = one_step(problem)
    assert_close(state.variables, [[0.5, 1.0], 2.25], 1e-12)


@pytest.mark.slow
def test_loss_never_rises_on_a_network(float64):
    case = searched_network(steps=20, rate=50.0)
    losses = case.problem.evaluate(*case[1:3]).inner_losses.numpy()
    assert np.all(np.diff(losses) < 0)
    descent = farhox.BilevelProblem(
        case.problem._inner_objective, case.problem._outer_objective, case.problem.inner_variables,
        case.problem.outer_variables, farhox.GradientDescent(50.0))
    assert not np.all(np.diff(descent.evaluate(*case[1:3]).inner_losses) < 0)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ReverseHG(checkpoint_every=2), farhox.ForwardHG()])
def test_hypergradient_equals_finite_differences(method, float64):
    case = searched_network(steps=4, rate=20.0)
    state = case.problem.evaluate(*case[1:3]).state
    assert int(state.slots[0]) > 0
    result = tf.function(lambda: method.compute(*case[:3]), autograph=False)()
    assert_close(result.gradients, unrolled.finite_differences(*case[:3], step=1e-5), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method, jit_compile", [(farhox.ReverseHG(), True), (farhox.ForwardHG(), False)])
def test_eager_computation_is_the_compiled_one(method, jit_compile, float64):
    case = searched_network(steps=2, rate=20.0)
    compiled = tf.function(lambda: method.compute(*case[:3]), autograph=False, jit_compile=jit_compile)()
    assert_close(method.compute(*case[:3]).gradients, compiled.gradients, 1e-9)


@pytest.mark.slow
def test_masks_of_a_step_are_the_same_in_all_of_its_tries(float64):
    """With another mask in every forward pass a long search would be needed; with the same one the loss decreases."""
    case = searched_network(steps=5, rate=1e-3, extra=[keras.layers.Dropout(0.5)])
    state = case.problem.initial_state()
    for t in range(5):
        batch = tf.nest.map_structure(lambda leaf: leaf[t], case.inner_batches)
        state = case.problem.step(state, case.problem.outer_values(), batch).state
        assert int(state.slots[0]) == 0


def test_other_dynamics_are_not_given_the_objective():
    case = scalar_quadratic(outer=("target", "rate"))
    assert not case.problem.dynamics.needs_objective
    assert_close(farhox.ReverseHG().compute(*case[:3]).gradients, case.expected, 1e-9)


@pytest.mark.parametrize("argument, value, rule", [
    ("decrease", 0.0, "decrease must be a number strictly between 0 and 1"),
    ("decrease", "half", "decrease must be a number strictly between 0 and 1"),
    ("shrink", 1.0, "shrink must be a number strictly between 0 and 1"),
    ("max_backtracks", -1, "max_backtracks must be a non-negative integer"),
    ("max_backtracks", 2.0, "max_backtracks must be a non-negative integer"),
])
def test_arguments_out_of_range_are_errors(argument, value, rule):
    with pytest.raises(ValueError, match=rule):
        BacktrackingGradientDescent(**{argument: value})


def test_learning_rate_must_be_a_setting():
    with pytest.raises(TypeError, match="learning_rate must be a float"):
        BacktrackingGradientDescent("large")


def searched_network(steps, rate, extra=()):
    """A network on one batch; the first try, L2 strength and weights of the examples are learned."""
    case = network_problem("Dense", steps=1, extra=extra)
    problem = case.problem
    batches = tf.nest.map_structure(lambda leaf: tf.repeat(leaf, steps, axis=0), case.inner_batches)
    first_try = farhox.Hyperparameter(rate, low=0.0, log=True, name="first_try", dtype="float64")
    return case._replace(inner_batches=batches, problem=farhox.BilevelProblem(
        problem._inner_objective, problem._outer_objective, problem.inner_variables,
        [first_try, *problem.outer_variables[1:]], BacktrackingGradientDescent(first_try),
        problem.state_variables))

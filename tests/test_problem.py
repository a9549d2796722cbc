"""The bilevel problem: what depends on what, what one step reads and writes, and the errors at its door."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import variable

import farhox
from farhox._core.inner_state import float_leaves, with_float_leaves


def make(inner_objective=None, outer_objective=None, inner=None, outer=None, **arguments):
    """A quadratic in one inner and one outer variable, any part of which may be replaced."""
    w, strength = variable([3.0, 1.0], name="w"), variable(0.5, name="strength")
    return farhox.BilevelProblem(
        inner_objective or (lambda batch: strength * tf.reduce_sum(tf.square(w - batch))),
        outer_objective or (lambda batch: tf.reduce_sum(tf.square(w - batch))),
        [w] if inner is None else inner, [strength] if outer is None else outer,
        **{"dynamics": farhox.GradientDescent(0.1), **arguments})


BATCH = tf.zeros([2], tf.float64)


def take_step(problem, batch=BATCH):
    return problem.step(problem.initial_state(), problem.outer_values(), batch)


def test_a_step_moves_the_state_and_no_variable():
    problem = make()
    result = take_step(problem)
    np.testing.assert_allclose(result.state.variables[0], [2.7, 0.9], rtol=1e-14)
    np.testing.assert_allclose(result.loss, 0.5 * 10.0, rtol=1e-14)
    np.testing.assert_allclose(result.gradient_norm, np.sqrt(10.0), rtol=1e-14)
    assert result.state.step.numpy() == 1 and result.state.step.dtype == tf.int64
    np.testing.assert_array_equal(problem.inner_variables[0].numpy(), [3.0, 1.0])


def test_outer_gradients_are_none_where_the_outer_objective_does_not_depend():
    problem = make(state_variables=[variable(1.0, name="statistic")])
    result = problem.outer_gradients(problem.initial_state(), problem.outer_values(), BATCH)
    np.testing.assert_allclose(result.loss, 10.0, rtol=1e-14)
    np.testing.assert_allclose(result.state[0], [6.0, 2.0], rtol=1e-14)
    assert result.state[1] is None and result.outer == [None]


def test_hyperparameters_stand_for_their_variables_in_the_order_given():
    rate, plain = farhox.Hyperparameter(0.1, low=0.0), variable(0.5, name="plain")
    weights = farhox.ExampleWeights(3)
    problem = make(outer=[rate, plain, weights])
    assert [id(v) for v in problem.outer_variables] == [id(rate.variable), id(plain), id(weights.variable)]
    assert problem.hyperparameters == [rate, weights]


def test_a_variable_that_is_inner_and_outer_is_learned_as_an_initial_value():
    w, fixed = variable([3.0, 1.0], name="w"), variable([1.0], name="fixed")
    problem = farhox.BilevelProblem(
        lambda batch: 0.5 * tf.reduce_sum(tf.square(w)) + tf.reduce_sum(tf.square(fixed)),
        lambda batch: tf.reduce_sum(tf.square(w)), [w, fixed], [w], dynamics=farhox.GradientDescent(0.1))
    assert problem.learns_initialization and not make().learns_initialization
    start = problem.initial_state([tf.constant([7.0, 8.0], tf.float64)])
    np.testing.assert_array_equal(start.variables[0], [7.0, 8.0])
    np.testing.assert_array_equal(start.variables[1], [1.0])
    # Of the two roles the objectives see the inner one: w_T = 0.9^T w_0, dE/dw_0 = 2 * 0.81^T w_0.
    result = farhox.ReverseHG().compute(problem, tf.zeros([3, 1]), tf.zeros([1]))
    np.testing.assert_allclose(result.gradients[0], 2 * 0.81 ** 3 * np.array([3.0, 1.0]), rtol=1e-13)


@pytest.mark.one_case
@pytest.mark.parametrize("as_hyperparameter", [False, True])
def test_proximal_term_pulls_towards_the_initial_value(as_hyperparameter):
    strength = farhox.Hyperparameter(2.0, low=0.0, dtype="float64")
    w = variable(3.0, name="w")
    problem = farhox.BilevelProblem(
        lambda batch: w * batch, lambda batch: 0.5 * w ** 2, [w], [strength, w] if as_hyperparameter else [w],
        dynamics=farhox.GradientDescent(0.1), proximal=strength if as_hyperparameter else 2.0)
    result = farhox.ReverseHG().compute(problem, tf.ones([2], tf.float64), tf.constant(0.0, tf.float64))
    # d_1 = -0.1 and d_2 = d_1 - 0.1 (1 + 2 d_1) with d = w - w_0, of which the loss counts strength/2 d^2.
    np.testing.assert_allclose(result.state.variables[0], 3.0 - 0.18, rtol=1e-13)
    np.testing.assert_allclose(result.inner_losses, [3.0, 2.9 + 0.01], rtol=1e-13)
    # The path moves along with w_0, so that dE/dw_0 = w_T; dE/dstrength = w_T * 0.01.
    np.testing.assert_allclose(result.gradients[-1], 2.82, rtol=1e-13)
    if as_hyperparameter:
        slope = 1 - np.exp(-2.0)  # Derivative of the softplus where it is 2.
        np.testing.assert_allclose(result.gradients[0], 2.82 * 0.01 * slope, rtol=1e-12)


def test_proximal_hyperparameter_that_is_not_learned_is_a_constant():
    strength = farhox.Hyperparameter(2.0, low=0.0, dtype="float64")
    with_constant = take_step(make(proximal=2.0))
    with_parameter = take_step(make(proximal=strength, fixed=[strength]))
    np.testing.assert_allclose(with_constant.loss, with_parameter.loss, rtol=1e-14)


def test_state_variables_go_on_from_step_to_step():
    w, mean, count = variable(2.0, name="w"), variable(0.0, name="mean"), variable(0, "int32", "count")

    def objective(batch):
        mean.assign(0.5 * mean + 0.5 * batch)
        count.assign_add(1)
        return w * mean

    problem = farhox.BilevelProblem(
        objective, lambda batch: w * mean, [w], [variable(1.0)], farhox.GradientDescent(1.0), [mean, count])
    state = problem.initial_state()
    for batch, expected in [(4.0, 2.0), (2.0, 2.0), (0.0, 1.0)]:
        result = problem.step(state, problem.outer_values(), tf.constant(batch, tf.float64))
        state = result.state
        np.testing.assert_allclose(state.state_variables[0], expected, rtol=1e-14)
    assert state.state_variables[1].numpy() == 3 and state.state_variables[1].dtype == tf.int32
    np.testing.assert_allclose(state.variables[0], 2.0 - (2.0 + 2.0 + 1.0), rtol=1e-14)
    assert mean.numpy() == 0.0 and count.numpy() == 0
    np.testing.assert_allclose(problem.outer_loss(state, problem.outer_values(), BATCH[0]), -3.0, rtol=1e-14)


def test_what_the_outer_objective_assigns_is_dropped():
    w, mean = variable(2.0, name="w"), variable(1.0, name="mean")

    def outer_objective(batch):
        mean.assign(100.0)
        return w * 1.0

    problem = farhox.BilevelProblem(lambda batch: w * mean, outer_objective, [w], [variable(1.0)],
                                    state_variables=[mean])
    assert problem.outer_loss(problem.initial_state(), problem.outer_values(), BATCH).numpy() == 2.0
    assert mean.numpy() == 1.0


def test_an_assignment_elsewhere_is_an_error_that_names_the_variable_and_the_way_out():
    w, stray = variable(2.0, name="w"), variable(0.0, name="stray")

    def objective(batch):
        stray.assign_add(1.0)
        return w * 1.0

    problem = make(objective, inner=[w])
    with pytest.raises(ValueError, match="may assign state variables only.*'stray'.*state_variables=model.non_train"):
        take_step(problem)
    assert stray.numpy() == 0.0


def test_an_inner_variable_without_effect_is_an_error_that_names_it():
    w, idle = variable(2.0, name="w"), variable(0.0, name="idle")
    with pytest.raises(ValueError, match="must depend on every inner variable. It does not depend on 'idle'"):
        take_step(make(lambda batch: w * 1.0, inner=[w, idle]))


@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG()], ids=["reverse", "forward"])
def test_an_outer_variable_without_effect_is_an_error_that_names_it(method):
    problem = make(outer=[farhox.Hyperparameter(0.3, name="idle", dtype="float64")])
    with pytest.raises(ValueError, match="'idle'"):
        method.compute(problem, tf.zeros([2, 2], tf.float64), BATCH)


@pytest.mark.parametrize("which", ["inner_objective", "outer_objective"])
@pytest.mark.parametrize("value, error, rule", [
    (lambda w: w, ValueError, r"must return a floating-point scalar. Received shape \(2,\)"),
    (lambda w: tf.constant(1), ValueError, "dtype int32"),
    (lambda w: None, TypeError, "must return a scalar tensor. Received: None"),
    (lambda w: "loss", ValueError, "dtype string"),
])
def test_objectives_must_return_a_scalar(which, value, error, rule):
    w = variable([3.0, 1.0], name="w")
    problem = make(inner=[w], **{which: lambda batch: value(w)})
    with pytest.raises(error, match=f"{which}.*{rule}"):
        if which == "inner_objective":
            take_step(problem)
        else:
            problem.outer_loss(problem.initial_state(), problem.outer_values(), BATCH)


@pytest.mark.parametrize("dtype, expected", [("float64", tf.float64), ("float32", tf.float32)])
def test_losses_have_the_type_of_the_widest_inner_variable(dtype, expected):
    w = variable(2.0, dtype, "w")
    problem = make(lambda batch: w * 1.0, inner=[w])
    assert problem.loss_dtype == take_step(problem).loss.dtype == expected


def test_state_leaves_go_out_and_come_back_in_order_without_the_integers():
    seed, mean = variable(7, "int64", "seed"), variable(1.5, name="mean")
    problem = make(dynamics=farhox.Adam(0.1), state_variables=[seed, mean])
    state = problem.initial_state()
    leaves = float_leaves(state)
    assert [leaf.shape.rank for leaf in leaves] == [1, 0, 1, 1]
    replaced = with_float_leaves(state, [leaf + 1.0 for leaf in leaves])
    np.testing.assert_array_equal(replaced.variables[0], [4.0, 2.0])
    assert replaced.state_variables[0].numpy() == 7 and replaced.state_variables[1].numpy() == 2.5
    assert replaced.step.numpy() == 0


def test_predictions_for_metrics_are_those_of_the_state():
    w = variable(2.0, name="w")
    problem = make(lambda batch: w * 1.0, inner=[w], outer_predictions=lambda batch: (batch, w * batch, None))
    state = take_step(problem).state
    targets, predictions, weights = problem.predict_outer(state, problem.outer_values(), BATCH + 1.0)
    np.testing.assert_allclose(predictions, 1.9 * targets.numpy(), rtol=1e-14)
    assert weights is None


@pytest.mark.parametrize("name", ["inner", "outer"])
@pytest.mark.parametrize("given, error, rule", [
    (None, TypeError, "must be a list"),
    (lambda: keras.Variable(1.0), TypeError, "must be a list"),
    (lambda: [], ValueError, "must not be empty"),
    (lambda: [tf.Variable(1.0)], TypeError, "must hold keras.Variables.*ResourceVariable"),
    (lambda: [tf.constant(1.0)], TypeError, "must hold keras.Variables"),
    (lambda: [0.1], TypeError, "must hold keras.Variables"),
    (lambda: [keras.Variable(1, dtype="int32", name="count")], ValueError, "must be floating-point. Received 'count'"),
    (lambda: [keras.Variable(1.0, name="twice")] * 2, ValueError, "name a variable twice. Received twice: 'twice'"),
])
def test_lists_of_variables_hold_distinct_floating_point_keras_variables(name, given, error, rule):
    w = variable(1.0, name="w")
    lists = {"inner": [w], "outer": [variable(1.0)], name: given() if given else None}
    with pytest.raises(error, match=f"{name}_variables.*{rule}"):
        farhox.BilevelProblem(lambda batch: w, lambda batch: w, lists["inner"], lists["outer"])


def test_a_hyperparameter_alone_is_not_a_list_of_outer_variables():
    with pytest.raises(TypeError, match="outer_variables must be a list"):
        make(outer=farhox.Hyperparameter(0.1))


def test_a_hyperparameter_and_its_variable_are_the_same_outer_variable():
    rate = farhox.Hyperparameter(0.1, name="rate")
    with pytest.raises(ValueError, match="Received twice: 'rate'"):
        make(outer=[rate, rate.variable])


def test_a_hyperparameter_is_not_an_inner_variable():
    with pytest.raises(TypeError, match="inner_variables must hold keras.Variables"):
        make(inner=[farhox.Hyperparameter(0.1)])


def test_a_state_variable_is_neither_inner_nor_outer():
    w, outer = variable(1.0, name="w"), variable(1.0, name="outer")
    for wrong in (w, outer):
        with pytest.raises(ValueError, match=f"must not be an inner or an outer variable. Received: '{wrong.name}'"):
            make(inner=[w], outer=[outer], state_variables=[wrong])


@pytest.mark.parametrize("arguments, error, rule", [
    ({"inner_objective": 1.0}, TypeError, "inner_objective must be a callable"),
    ({"outer_objective": "loss"}, TypeError, "outer_objective must be a callable"),
    ({"dynamics": "sgd"}, TypeError, "dynamics must be one of farhox' dynamics"),
    ({"dynamics": farhox.GradientDescent}, TypeError, "dynamics must be one of farhox' dynamics"),
    ({"proximal": "strong"}, TypeError, "proximal must be a float"),
    ({"proximal": True}, TypeError, "proximal must be a float"),
    ({"proximal": -1.0}, ValueError, "proximal must be finite and not negative"),
    ({"proximal": float("nan")}, ValueError, "proximal must be finite and not negative"),
    ({"state_variables": 1}, TypeError, "state_variables must be a list"),
    ({"state_variables": [tf.Variable(1.0)]}, TypeError, "state_variables must hold keras.Variables"),
])
def test_other_arguments_of_the_wrong_kind_are_refused(arguments, error, rule):
    with pytest.raises(error, match=rule):
        make(**arguments)

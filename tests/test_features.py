"""A representation that is computed once per inner training has the values and hypergradients of one computed anew."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable

import farhox
from farhox.hypergradients import EpisodesHG
from farhox.linear_solvers import Direct
from farhox.problem.inner_training import InnerTraining

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=[6, 3])
Y = np.array([0, 1, 2, 3, 1, 0])
OUTER = GENERATOR.normal(size=[5, 3]), np.array([3, 2, 1, 0, 1])


@keras.saving.register_keras_serializable(package="tests")
class Counting(keras.layers.Dense):
    """A dense layer that counts its calls."""

    calls = 0

    def call(self, inputs):
        Counting.calls += 1
        return super().call(inputs)


def make(share, body=None, features=4, **arguments):
    """A network with batch norm, regularised in body and head, whose hidden layer is the representation."""
    keras.utils.set_random_seed(0)
    body = body if body is not None else [
        Counting(features, activation="tanh", dtype="float64", kernel_regularizer=keras.regularizers.L2(0.1),
                 activity_regularizer=keras.regularizers.L2(0.2), name="hidden"),
        keras.layers.BatchNormalization(dtype="float64")]
    head = keras.layers.Dense(4, "softmax", dtype="float64", kernel_regularizer=keras.regularizers.L2(0.3), name="head")
    model = keras.Sequential([keras.Input([3], dtype="float64"), *body, head])
    rate = variable(0.3, name="rate")
    arguments.setdefault("dynamics", farhox.GradientDescent(rate))
    return farhox.supervised_problem(
        model, representation=body, share_representation=share, training_at_outer=True, outer_variables=[rate],
        **arguments)


METHODS = {
    "reverse": farhox.ReverseHG(), "sqrt": farhox.ReverseHG(checkpoint_every="sqrt"),
    "truncated": farhox.ReverseHG(truncation=2), "none": farhox.ReverseHG(truncation=0),
    "weighted": farhox.ReverseHG(step_weights=(0.1, 0.0, 0.2, 0.3, 0.4)), "forward": farhox.ForwardHG(),
    "episodes": EpisodesHG(farhox.ReverseHG())}


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("batches", ["repeated", "stacked"])
@pytest.mark.parametrize("name", list(METHODS))
def test_result_is_that_of_a_representation_computed_in_each_step(name, batches, compiled, float64):
    batch = (X, Y)
    if batches == "repeated":
        inner, outer = farhox.repeat(batch, 5), OUTER
        if name == "episodes":
            inner = farhox.repeat(tf.nest.map_structure(lambda leaf: np.stack([leaf, leaf[::-1]]), batch), 5)
    else:
        inner, outer = farhox.stack([(X + 0.1 * t, Y) for t in range(5)]), OUTER
        if name == "episodes":
            inner = tf.nest.map_structure(lambda leaf: tf.stack([leaf, leaf[:, ::-1]]), inner)
    if name == "episodes":
        outer = tf.nest.map_structure(lambda leaf: np.stack([leaf, leaf]), outer)
    results = []
    for share in (False, True):
        problem, method = make(share), METHODS[name]
        compute = tf.function(method.compute, autograph=False) if compiled else method.compute
        results.append(compute(problem, inner, outer))
    plain, shared = results
    assert_close(shared.gradients, plain.gradients, 1e-10)
    for one, other in zip(shared[1:3], plain[1:3]):
        assert_close([one], [other], 1e-12)
    assert_close(shared.state.variables, plain.state.variables, 1e-12)
    assert set(shared.diagnostics) == set(plain.diagnostics)
    np.testing.assert_allclose(
        shared.diagnostics["hypergradient_norm"], plain.diagnostics["hypergradient_norm"], rtol=1e-10)


@pytest.mark.slow
def test_implicit_hypergradient_is_that_of_a_representation_computed_in_each_step(float64):
    gradients = []
    for share in (False, True):
        keras.utils.set_random_seed(0)
        problem = make(share, dynamics=farhox.GradientDescent(0.5), proximal=0.5)
        problem = problem.with_outer(problem.outer_objective, problem.outer_variables[1:])
        method = farhox.ImplicitHG(Direct())
        gradients.append(method.compute(problem, farhox.repeat((X, Y), 200), OUTER).gradients)
    assert_close(gradients[1], gradients[0], 1e-9)


@pytest.mark.slow
def test_hypergradient_is_that_of_finite_differences(float64):
    check = farhox.check_hypergradient(make(True), farhox.repeat((X, Y), 5), OUTER, farhox.ReverseHG())
    assert check.maximum_error < 1e-6


@pytest.mark.one_case
@pytest.mark.parametrize("steps", [2, 9])
def test_a_shared_representation_is_computed_once_whatever_the_number_of_steps(steps, float64):
    problem = make(True)
    Counting.calls = 0
    farhox.ReverseHG().compute(problem, farhox.repeat((X, Y), steps), OUTER)
    # Of the inner and of the outer batch.
    assert Counting.calls == 2
    problem.evaluate(farhox.repeat((X, Y), steps), OUTER)
    assert Counting.calls == 4


def test_outer_variables_that_act_through_features_alone_have_a_hypergradient(float64):
    weight, factor = variable([0.5], name="weight"), variable(2.0, name="factor")
    problem = farhox.BilevelProblem(
        lambda scaled: keras.ops.sum((weight - scaled) ** 2) / 2,
        lambda batch: keras.ops.sum((weight - batch) ** 2) / 2, [weight], [factor], farhox.GradientDescent(0.1),
        features=lambda batch: factor * batch)
    result = farhox.ReverseHG().compute(problem, farhox.repeat(np.array([3.0]), 4), np.array([1.0]))
    left = 0.9 ** 4
    end = left * 0.5 + (1 - left) * 6.0
    np.testing.assert_allclose(result.gradients, [(end - 1.0) * (1 - left) * 3.0], rtol=1e-12)


def test_features_of_batches_that_change_are_not_shared():
    problem, plain = make(True), make(False)
    changing, same = farhox.stack([(X, Y), (X, Y)]), farhox.repeat((X, Y), 2)
    counts = [len(InnerTraining(case, batches).parameters) - len(case.outer_variables)
              for case, batches in ((problem, changing), (problem, same), (plain, same))]
    assert counts[0] == counts[2] == 0 < counts[1]


def test_features_must_not_read_inner_variables():
    weight, factor = variable([0.5], name="weight"), variable(2.0, name="factor")
    problem = farhox.BilevelProblem(
        lambda scaled: keras.ops.sum(weight * scaled), lambda batch: keras.ops.sum(weight * batch), [weight], [factor],
        features=lambda batch: factor * weight * batch)
    with pytest.raises(ValueError, match="must not depend on inner variables.*They read '"):
        farhox.ReverseHG().compute(problem, farhox.repeat(np.array([3.0]), 4), np.array([1.0]))
    with pytest.raises(TypeError, match="features must be a callable inner batch"):
        farhox.BilevelProblem(lambda b: weight, lambda b: weight, [weight], [factor], features=3)


@pytest.mark.one_case
@pytest.mark.parametrize("body", [
    lambda: [keras.layers.Dense(3, dtype="float64"), keras.layers.Dropout(0.5, dtype="float64")],
    lambda: [keras.layers.Dense(3, dtype="float64"), keras.layers.Masking(dtype="float64")]],
    ids=["dropout", "mask"])
def test_representations_that_change_from_step_to_step_cannot_be_shared(body):
    with pytest.raises(ValueError, match="without random numbers and masks. Received: Sequential"):
        make(True, body())
    make(False, body())


def test_the_representation_must_come_first_in_a_sequential_model():
    layers = [keras.layers.Dense(3), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input([3]), *layers])
    for chosen in ([layers[1]], []):
        with pytest.raises(ValueError, match="share_representation needs a keras.Sequential that begins with"):
            farhox.supervised_problem(model, "mean_squared_error", representation=chosen, share_representation=True)

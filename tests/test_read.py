"""Hyperparameters that are read and not named, outer_variables="all", outer objectives without a derivative."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.hypergradients import DartsHG

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=[12, 3]).astype("float32"), np.arange(12) % 3
DATA = farhox.repeat((X, Y), 2), (X, Y)
SPECS = (tf.TensorSpec([None, 3]), tf.TensorSpec([None], tf.int64))


def hyperparameters():
    return [farhox.Hyperparameter(0.1, low=0.0, log=True, name=name)
            for name in ("rate", "strength", "slope", "momentum", "pull", "smoothing")]


class Scaled(keras.layers.Layer):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def call(self, x):
        return x * self.slope()


def make(rate, strength, slope, momentum, pull, smoothing, subclassed=False, **arguments):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, kernel_regularizer=farhox.L1L2(l2=strength)), Scaled(slope),
              keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input([3]), *layers])

    def loss(y, p):
        return (1.0 + smoothing()) * keras.losses.sparse_categorical_crossentropy(y, p)

    return farhox.supervised_problem(model, loss, farhox.Momentum(rate, momentum), **{"proximal": pull, **arguments})


def names(entries):
    return [entry.name for entry in entries]


def test_each_hyperparameter_that_is_read_and_not_named_is_warned_of_once_by_name():
    entries = hyperparameters()
    problem = make(*entries, outer_variables=entries[:1])
    with pytest.warns(UserWarning) as caught:
        farhox.ReverseHG().compute(problem, *DATA)
    text = " ".join(str(entry.message) for entry in caught)
    for name in names(entries[1:]):
        assert text.count(repr(name)) == 1
    assert "'rate'" not in text and "outer_variables='all'" in text and "fixed=[...]" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.outer_gradients(problem.initial_state(), problem.outer_values(), DATA[1])


def test_named_and_fixed_hyperparameters_are_not_warned_of():
    entries = hyperparameters()
    problem = make(*entries, outer_variables=entries[:1], fixed=entries[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        farhox.ReverseHG().compute(problem, *DATA)
        named = make(*entries, outer_variables=entries)
        named.step(named.initial_state(), named.outer_values(), (X, Y))
        other = problem.with_outer(problem.outer_objective, [entries[2]])
        other.step(other.initial_state(), other.outer_values(), DATA[1])


def test_all_finds_what_layers_regularizers_losses_and_dynamics_read():
    entries = hyperparameters()
    given = (tf.TensorSpec([None, 3]), tf.TensorSpec([None], tf.int64))
    problem = make(*entries, outer_variables="all", example_batches=(given, given))
    assert sorted(names(problem.hyperparameters)) == sorted(names(entries))
    gradients = farhox.ReverseHG().compute(problem, *DATA).gradients
    assert np.all(np.abs(gradients) > 1e-7)


def test_all_leaves_out_what_is_fixed_and_keeps_representation_and_weights():
    rate, strength = hyperparameters()[:2]
    model = keras.Sequential([
        keras.Input([3]), keras.layers.Dense(4, name="body", kernel_regularizer=farhox.L1L2(l2=strength)),
        keras.layers.Dense(3, "softmax")])
    weights = farhox.ExampleWeights(12)
    problem = farhox.supervised_problem(
        model, dynamics=farhox.GradientDescent(rate), outer_variables="all", fixed=[rate],
        representation=[model.layers[0]], example_weights=weights)
    assert names(problem.hyperparameters) == ["example_weights", "strength"] and len(problem.outer_variables) == 4


@pytest.mark.slow
def test_all_needs_no_example_of_a_functional_model_with_several_inputs():
    rate = hyperparameters()[0]
    a, b = keras.Input([2], name="a"), keras.Input([1], name="b")
    model = keras.Model({"a": a, "b": b}, keras.layers.Dense(2)(keras.layers.Concatenate()([a, b])))
    problem = farhox.supervised_problem(model, "mse", farhox.GradientDescent(rate), "all")
    assert problem.hyperparameters == [rate]
    batch = {"a": X[:, :2], "b": X[:, 2:]}, X[:, :2]
    assert farhox.ReverseHG().compute(problem, farhox.repeat(batch, 2), batch).gradients[0] != 0.0


@pytest.mark.parametrize("arguments, rule", [
    ({"outer_variables": "all"}, r"needs example_batches=\(inner_batch, outer_batch\)"),
    ({"outer_variables": "every"}, "outer_variables must be a list or 'all'. Received: 'every'"),
    ({"outer_variables": "all", "example_batches": (SPECS, SPECS)}, "outer_variables must not be empty"),
])
def test_all_without_an_example_or_a_hyperparameter_is_refused(arguments, rule):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(ValueError, match=rule):
        farhox.BilevelProblem(lambda b: loss(b[1], model(b[0])), lambda b: loss(b[1], model(b[0])),
                              model.trainable_variables, **arguments)


def test_all_for_a_model_with_a_loss_for_each_output_needs_an_example():
    inputs = keras.Input([3])
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])
    with pytest.raises(ValueError, match="needs example_batches.*loss for each output"):
        farhox.supervised_problem(model, ["mse", "mae"], outer_variables="all")


# ---- an outer objective without a derivative

def counted(model):
    def accuracy(batch):
        return -keras.ops.mean(keras.metrics.sparse_categorical_accuracy(batch[1], model(batch[0])))
    return accuracy


def f1(model):
    def f1_score(batch):
        sure = keras.ops.cast(model(batch[0])[:, 0] > 0.5, "float32")
        return -2 * keras.ops.sum(sure) / (1.0 + keras.ops.sum(sure))
    return f1_score


def stopped(model):
    def stopped_loss(batch):
        return tf.stop_gradient(keras.ops.mean(model(batch[0])))
    return stopped_loss


@pytest.mark.one_case
@pytest.mark.parametrize("make_objective, name", [(counted, "accuracy"), (f1, "f1_score"), (stopped, "stopped_loss")])
@pytest.mark.parametrize("method", [
    farhox.ReverseHG(), farhox.ForwardHG(), farhox.ImplicitHG(), DartsHG()], ids=lambda m: type(m).__name__)
def test_an_outer_objective_without_a_derivative_is_an_error_that_names_it_and_offers_a_smooth_one(
        method, make_objective, name):
    rate, strength = hyperparameters()[:2]
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(3, kernel_regularizer=farhox.L1L2(l2=strength))])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    problem = farhox.BilevelProblem(
        lambda b: loss(b[1], model(b[0])) + sum(model.losses), make_objective(model), model.trainable_variables,
        [strength], farhox.GradientDescent(rate), fixed=[rate])
    with pytest.raises(ValueError, match=f"must have a derivative.*Received: .*{name}, .*farhox.losses"):
        tf.function(lambda: method.compute(problem, *DATA), autograph=False)()


def test_an_outer_objective_with_a_derivative_in_outer_variables_alone_that_reads_the_model_is_warned_of():
    strength = hyperparameters()[1]
    w = keras.Variable(2.0, name="w")
    problem = farhox.BilevelProblem(
        lambda b: strength() * w ** 2, lambda b: keras.ops.cast(w > 0.5, "float32") + strength(), [w], [strength])
    with pytest.warns(UserWarning, match="reads inner variables and has a derivative in none of them"):
        problem.outer_gradients(problem.initial_state(), problem.outer_values(), np.zeros(1))

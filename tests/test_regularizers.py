"""Learned L1 and L2 strengths: their values, hypergradients, and what a saved model keeps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from unrolled import finite_differences

import farhox

WEIGHTS = np.array([[1.0, -2.0, 0.0], [0.5, 0.25, -3.0]])
L1, L2 = np.sum(np.abs(WEIGHTS)), np.sum(WEIGHTS ** 2)


def learned(initial, **arguments):
    return farhox.Hyperparameter(initial, low=0.0, dtype="float64", **arguments)


@pytest.mark.covering
@pytest.mark.parametrize("make, expected", [
    (lambda: farhox.L1L2(), 0.0),
    (lambda: farhox.L1L2(l1=0.3), 0.3 * L1),
    (lambda: farhox.L1L2(l2=0.2), 0.2 * L2),
    (lambda: farhox.L1L2(0.3, learned(0.2)), 0.3 * L1 + 0.2 * L2),
    (lambda: farhox.L1L2(learned(0.3), 0.2), 0.3 * L1 + 0.2 * L2),
    (lambda: farhox.L1L2(l2=[[1.0], [2.0]]), np.sum([[1.0], [2.0]] * WEIGHTS ** 2)),
    (lambda: farhox.L1L2(l1=learned(np.abs(WEIGHTS) + 0.1)), np.sum((np.abs(WEIGHTS) + 0.1) * np.abs(WEIGHTS))),
])
@pytest.mark.parametrize("compiled", [False, True])
def test_penalty_is_that_of_its_strengths_for_numbers_and_hyperparameters(make, expected, compiled):
    regularizer = make()
    call = tf.function(regularizer.__call__, autograph=False) if compiled else regularizer
    np.testing.assert_allclose(call(tf.constant(WEIGHTS)), expected, rtol=1e-14)


def test_numbers_give_the_penalty_of_keras():
    ours, keras_own = farhox.L1L2(0.3, 0.2), keras.regularizers.L1L2(0.3, 0.2)
    weights = tf.constant(WEIGHTS, tf.float32)
    np.testing.assert_allclose(ours(weights), keras_own(weights), rtol=1e-6)


def test_derivative_of_the_absolute_value_is_zero_at_zero():
    weights = tf.constant([0.0, -2.0], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        value = farhox.L1L2(l1=0.3)(weights)
    np.testing.assert_allclose(tape.gradient(value, weights), [0.0, -0.3], rtol=1e-14)


@pytest.mark.filterwarnings("ignore:The l1 strength")
@pytest.mark.parametrize("method", [
    farhox.ReverseHG(), pytest.param(farhox.ForwardHG(), marks=pytest.mark.slow)], ids=["reverse", "forward"])
def test_a_strength_per_layer_and_one_per_weight_have_the_hypergradients_of_finite_differences(method, float64):
    l1, l2, per_weight = learned(0.02, name="l1"), learned(0.05, name="l2"), learned(np.full([4, 2], 0.1), name="each")
    model = keras.Sequential([
        keras.Input([3]),
        keras.layers.Dense(4, "tanh", kernel_regularizer=farhox.L1L2(l1, l2, subgradient=True),
                           bias_regularizer=farhox.L1L2(l2=l2)),
        keras.layers.Dense(2, kernel_regularizer=farhox.L1L2(l2=per_weight)),
    ])
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), farhox.Momentum(0.1, 0.5),
        outer_variables=[l1, l2, per_weight])
    random = np.random.default_rng(0)
    inner_batches = farhox.stack([(random.normal(size=[5, 3]), random.integers(0, 2, 5)) for _ in range(4)])
    outer_batch = random.normal(size=[6, 3]), random.integers(0, 2, 6)
    expected = finite_differences(problem, inner_batches, outer_batch)
    assert all(np.all(np.abs(values) > 1e-7) for values in expected)
    assert_close(method.compute(problem, inner_batches, outer_batch).gradients, expected, 1e-7)


@pytest.mark.slow
def test_the_regularizer_of_a_frozen_layer_does_not_count(float64):
    model = keras.Sequential([
        keras.Input([3]), keras.layers.Dense(3, kernel_regularizer=farhox.L1L2(l2=1.0)), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    problem = farhox.supervised_problem(model, "mse", outer_variables=[learned(0.1)])
    state, x = problem.initial_state(), np.ones([2, 3])
    loss, _ = problem.inner_loss(state.variables, state.state_variables, problem.outer_values(), (x, np.zeros([2, 1])))
    np.testing.assert_allclose(loss, np.mean(model(x).numpy() ** 2), rtol=1e-12)


def test_configuration_holds_numbers_and_hyperparameters_with_their_current_values():
    strength = learned(0.2, name="strength")
    regularizer = farhox.L1L2(0.1, strength)
    strength.assign(0.4)
    restored = keras.regularizers.deserialize(keras.regularizers.serialize(regularizer))
    assert restored.l1 == 0.1 and restored.l2.name == "strength" and restored.l2 is not strength
    np.testing.assert_allclose(restored.l2.numpy(), 0.4, rtol=1e-14)
    np.testing.assert_allclose(restored(tf.constant(WEIGHTS)), 0.1 * L1 + 0.4 * L2, rtol=1e-14)


@pytest.mark.one_case
@pytest.mark.parametrize("strength", [0.3, [[1.0], [2.0]]], ids=["number", "array"])
def test_a_saved_model_keeps_its_penalty(tmp_path, strength):
    model = keras.Sequential([
        keras.Input([2]), keras.layers.Dense(3, kernel_regularizer=farhox.L1L2(l2=learned(strength)))])
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(restored.losses[0], model.losses[0], rtol=1e-6)


@pytest.mark.parametrize("arguments, error, rule", [
    ({"l1": "strong"}, TypeError, "l1 must be a number, an array of numbers or a farhox.Hyperparameter"),
    ({"l2": None}, TypeError, "l2 must be a number"),
    ({"l2": True}, TypeError, "l2 must be a number"),
    ({"l1": -0.1}, ValueError, "l1 must be finite and not negative"),
    ({"l2": [0.1, float("inf")]}, ValueError, "l2 must be finite and not negative"),
    ({"l2": farhox.Hyperparameter(0.1)}, ValueError, "must not become negative: give the hyperparameter low=0.0"),
    ({"l1": farhox.Hyperparameter(0.1, low=-1.0)}, ValueError, "l1 must not .*with low=-1.0"),
])
def test_strengths_that_are_no_strengths_are_refused(arguments, error, rule):
    with pytest.raises(error, match=rule):
        farhox.L1L2(**arguments)


@pytest.mark.parametrize("strength", [[0.1, 0.2], np.ones([4, 2, 3])])
@pytest.mark.parametrize("kind", [np.array, learned], ids=["array", "hyperparameter"])
def test_a_strength_must_broadcast_to_the_shape_of_the_weights(kind, strength):
    with pytest.raises(ValueError, match=r"l2 must broadcast to the shape of the weights, \(2, 3\). Received shape"):
        farhox.L1L2(l2=kind(strength))(tf.constant(WEIGHTS))

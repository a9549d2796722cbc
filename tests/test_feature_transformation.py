"""FeatureWiseTransformation: what it draws, the derivative of its strengths, saving, and what it refuses."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import meta


def test_in_training_channels_have_scales_and_shifts_of_their_own_and_in_inference_nothing_happens(float64):
    scale, shift = np.array([0.0, 0.5, 2.0]), 0.25
    layer = meta.FeatureWiseTransformation(scale, shift, seed=3)
    draws = np.array(keras.random.normal([2, 3], dtype="float64", seed=keras.random.SeedGenerator(3)))
    x = np.random.default_rng(0).normal(size=(4, 5, 5, 3))
    expected = x * (1 + scale * draws[0]) + shift * draws[1]
    np.testing.assert_allclose(layer(x, training=True), expected, rtol=1e-12)
    assert np.max(np.abs(layer(x, training=True) - expected)) > 0.01  # New numbers each time.
    np.testing.assert_array_equal(layer(x), x)


def test_hypergradients_of_its_strengths_are_those_of_finite_differences(float64):
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    scale = farhox.Hyperparameter(np.full(4, 0.5), low=0.0, name="scale")
    shift = farhox.Hyperparameter(0.3, low=0.0, name="shift")
    model = keras.Sequential([
        keras.Input([3]), keras.layers.Dense(4, "tanh"), meta.FeatureWiseTransformation(scale, shift, seed=1),
        keras.layers.Dense(2, activation="softmax")])
    problem = farhox.supervised_problem(model, dynamics=farhox.GradientDescent(0.5), outer_variables=[scale, shift])
    x, y = random.normal(size=(20, 3)), random.integers(0, 2, 20)
    check = farhox.check_hypergradient(
        problem, farhox.repeat((x[:10], y[:10]), 2), (x[10:], y[10:]), farhox.ReverseHG())
    assert len(check.entries) == 5 and check.maximum_error < 1e-6, check


def test_a_saved_model_has_its_strengths(tmp_path):
    scale = farhox.Hyperparameter(np.array([0.5, 0.7]), low=0.0, name="scale")
    model = keras.Sequential([keras.Input([2]), meta.FeatureWiseTransformation(scale, [0.1, 0.2], seed=5)])
    scale.assign([0.25, 1.5])
    model.save(tmp_path / "model.keras")
    (layer,) = keras.models.load_model(tmp_path / "model.keras").layers
    np.testing.assert_allclose(layer.scale.numpy(), [0.25, 1.5], rtol=1e-6)
    assert layer.shift.tolist() == [0.1, 0.2] and layer.seed == 5
    assert model.compute_output_shape([None, 2]) == (None, 2)


@pytest.mark.parametrize("make, error, message", [
    (lambda: meta.FeatureWiseTransformation(scale=-0.1), ValueError, "scale must be finite and not negative"),
    (lambda: meta.FeatureWiseTransformation(shift=float("nan")), ValueError, "shift must be finite"),
    (lambda: meta.FeatureWiseTransformation(shift="0.1"), TypeError, "shift must be a number"),
    (lambda: meta.FeatureWiseTransformation(farhox.ExampleWeights(3)), TypeError, "scale must be a number"),
    (lambda: meta.FeatureWiseTransformation(farhox.Hyperparameter(0.1)), ValueError, "scale must not become negative"),
    (lambda: meta.FeatureWiseTransformation([0.1, 0.2])(tf.zeros([1, 3])), ValueError,
     "one entry for each of 3 channels. Received shape: \\(2,\\)"),
])
def test_what_is_no_strength_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()

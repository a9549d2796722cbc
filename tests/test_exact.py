"""Second derivatives that TensorFlow has wrong or not at all, and what farhox makes of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import assert_close, assert_identical, variable

import farhox
from farhox._core import autodiff, exact, functional

MODES = {"eager": lambda function: function, "graph": lambda function: tf.function(function, autograph=False)}
modes = pytest.mark.parametrize("mode", list(MODES))
methods = pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG()], ids=["reverse", "forward"])


def second_derivative(function, x, direction):
    """Hessian-vector product by nested tapes, and by finite differences of the gradient."""
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return tape.gradient(value, x)

    with tf.GradientTape() as tape:
        tape.watch(x)
        along = tf.reduce_sum(gradient(x) * direction)
    step = 1e-6
    return tape.gradient(along, x), (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)


def variance_objective(x):
    mean, variance = tf.nn.moments(x, [0])
    return tf.reduce_sum(tf.sin(x) * variance / (1.0 + mean ** 2))


X = tf.constant([[0.3, -1.2], [2.0, 0.7], [1.1, 0.4]], tf.float64)
V = tf.constant([[1.0, 0.5], [-0.3, 0.8], [0.2, -1.0]], tf.float64)


def test_moments_of_tensorflow_have_a_wrong_second_derivative():
    """Once this fails TensorFlow is right, and `exact._exact_moments` can go."""
    product, truth = second_derivative(variance_objective, X, V)
    assert np.max(np.abs(product - truth)) > 1e-2


def variance_slope(x):
    """The derivative of `variance_objective` along `V`."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = variance_objective(x)
    return tf.reduce_sum(tape.gradient(value, x) * V)


@pytest.mark.parametrize("function", [variance_objective, variance_slope], ids=["second", "third"])
@modes
def test_moments_inside_an_objective_have_the_right_derivatives(function, mode):
    with exact.exact_derivatives():
        product, truth = MODES[mode](lambda: second_derivative(function, X, V))()
    np.testing.assert_allclose(product, truth, rtol=1e-7, atol=1e-7)


def test_moments_inside_an_objective_have_the_right_derivative_in_forward_mode():
    with exact.exact_derivatives():
        _, (slope,) = autodiff.forward_product(lambda inputs: [variance_objective(inputs[0])], [X], [V])
        _, (curvature,) = autodiff.forward_product(lambda inputs: [variance_slope(inputs[0])], [X], [V])
        assert_close([slope], [variance_slope(X)], 1e-12)
        assert_close([curvature], [tf.reduce_sum(second_derivative(variance_objective, X, V)[0] * V)], 1e-12)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [[0], [1], [0, 1], [-1]])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_moments_keep_their_values_shapes_and_types(dtype, axes, keepdims):
    x = tf.cast(X, dtype)
    moments = exact._exact_moments(x, axes, keepdims=keepdims)
    for mine, theirs in zip(moments, tf.nn.moments(x, axes, keepdims=keepdims)):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def mixed_derivative(cross_entropy):
    logits, labels = tf.constant([[0.2, -1.0, 0.5]], tf.float64), tf.constant([[0.2, 0.5, 0.3]], tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(labels)
        with tf.GradientTape() as inner:
            inner.watch(logits)
            loss = cross_entropy(labels=labels, logits=logits)
        gradient = inner.gradient(loss, logits)
    return outer.jacobian(gradient, labels)


def test_cross_entropy_of_tensorflow_has_no_mixed_derivative_in_labels_and_logits():
    """Once this fails TensorFlow is right, and `exact._exact_softmax_cross_entropy_with_logits` can go."""
    derivative = mixed_derivative(tf.nn.softmax_cross_entropy_with_logits)
    assert derivative is None or not np.any(derivative)


def test_cross_entropy_inside_an_objective_has_its_mixed_derivative():
    logits = np.array([0.2, -1.0, 0.5])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    with exact.exact_derivatives():
        derivative = mixed_derivative(tf.nn.softmax_cross_entropy_with_logits)
    np.testing.assert_allclose(derivative[0, :, 0, :], probabilities[:, np.newaxis] - np.eye(3), rtol=1e-12)


def test_cross_entropy_keeps_its_values():
    random = np.random.default_rng(0)
    labels, logits = tf.constant(random.uniform(size=(4, 3))), tf.constant(30 * random.normal(size=(4, 3)))
    for axis in (-1, 0):
        np.testing.assert_allclose(
            exact._exact_softmax_cross_entropy_with_logits(labels, logits, axis),
            tf.nn.softmax_cross_entropy_with_logits(labels, logits, axis), rtol=1e-12)


@modes
@methods
@pytest.mark.parametrize("from_logits", [True, False])
def test_soft_labels_are_learned_exactly(from_logits, method, mode, float64):
    random = np.random.default_rng(0)
    labels = variable(random.dirichlet(np.ones(3), 2), name="labels")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, None if from_logits else "softmax")])
    loss = keras.losses.CategoricalCrossentropy(from_logits=from_logits, dtype="float64")
    problem = farhox.BilevelProblem(
        lambda x: loss(labels + 0.0, model(x)), lambda batch: loss(batch[1], model(batch[0])),
        model.trainable_variables, [labels], farhox.GradientDescent(0.5))
    data = random.normal(size=(2, 2, 2)), (random.normal(size=(5, 2)), np.eye(3)[random.integers(0, 3, 5)])
    gradients = MODES[mode](method.compute)(problem, *data).gradients
    assert_close(gradients, unrolled.finite_differences(problem, *data), 1e-7)
    assert np.min(np.abs(gradients[0])) > 1e-6


def image_problem(layer, before=True):
    """A small convolutional network with `layer` after its convolution, or on the data alone."""
    convolution = keras.layers.Conv2D(2, 2, activation="tanh")
    layers = [convolution, layer] if before else [layer, convolution]
    model = keras.Sequential([keras.Input((4, 4, 1)), *layers, keras.layers.Flatten(), keras.layers.Dense(2)])
    rate = farhox.Hyperparameter(0.1, low=0.0, name="rate", dtype="float64")
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64"),
        farhox.GradientDescent(rate), [rate])
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 3, 4, 4, 1)), np.array([[0, 1, 1], [1, 0, 1]])
    return problem, (x, y), (x[0], y[0])


@modes
@methods
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_features_are_an_error_that_names_the_layer(interpolation, method, mode, float64):
    problem, *data = image_problem(keras.layers.UpSampling2D(2, interpolation=interpolation, name="enlarge"))
    named = r"(?s)second derivative.*'\w+/enlarge'.*UpSampling2D\(interpolation='nearest'\)"
    with pytest.raises(ValueError, match=named):
        MODES[mode](method.compute)(problem, *data)


@modes
def test_resized_features_are_an_error_for_implicit_differentiation_too(mode, float64):
    supervised, *data = image_problem(keras.layers.UpSampling2D(2, interpolation="bilinear", name="enlarge"))
    strength = farhox.Hyperparameter(0.1, low=0.0, dtype="float64")
    problem = farhox.BilevelProblem(
        lambda batch: supervised._inner_objective(batch) * strength(), supervised._outer_objective,
        supervised.inner_variables, [strength])
    with pytest.raises(ValueError, match="second derivative"):
        MODES[mode](farhox.ImplicitHG().compute)(problem, *data)


@modes
@methods
@pytest.mark.parametrize("layer", [
    lambda: keras.layers.Resizing(6, 6, interpolation="bilinear"),
    lambda: keras.layers.UpSampling2D(2, interpolation="bicubic")], ids=["Resizing", "UpSampling2D"])
def test_resized_data_need_no_second_derivative(layer, method, mode, float64):
    problem, *data = image_problem(layer(), before=False)
    gradients = MODES[mode](method.compute)(problem, *data).gradients
    assert_close(gradients, unrolled.finite_differences(problem, *data), 1e-7)


@modes
@methods
def test_resized_features_are_no_error_for_first_order_dynamics(method, mode, float64):
    problem, *data = image_problem(keras.layers.UpSampling2D(2, interpolation="bilinear"))
    rate = problem.hyperparameters[0]
    first_order = farhox.BilevelProblem(
        problem._inner_objective, problem._outer_objective, problem.inner_variables, [rate],
        farhox.GradientDescent(rate, first_order=True))
    (gradient,) = MODES[mode](method.compute)(first_order, *data).gradients
    assert np.isfinite(gradient) and gradient != 0


@modes
@methods
def test_upsampling_by_nearest_neighbours_is_exact(method, mode, float64):
    problem, *data = image_problem(keras.layers.UpSampling2D(2, interpolation="nearest"))
    gradients = MODES[mode](method.compute)(problem, *data).gradients
    assert_close(gradients, unrolled.finite_differences(problem, *data), 1e-7)


def test_replacements_are_in_place_inside_an_objective_only():
    originals = [getattr(module, name) for module, name, *_ in exact.exact_derivatives._replacements]
    seen = []
    functional.call(lambda: seen.append(tf.nn.moments), bindings=[])
    assert seen == [exact._exact_moments]
    with pytest.raises(RuntimeError):
        with exact.exact_derivatives():
            raise RuntimeError("the objective failed")
    assert [getattr(module, name) for module, name, *_ in exact.exact_derivatives._replacements] == originals


def test_replacements_stay_until_the_last_of_several_threads_leaves():
    first, second = exact.exact_derivatives(), exact.exact_derivatives()
    original = tf.nn.moments
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tf.nn.moments is exact._exact_moments
    second.__exit__(None, None, None)
    assert tf.nn.moments is original


def test_plain_keras_training_outside_is_left_alone():
    keras.utils.set_random_seed(3)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    layer = keras.layers.LayerNormalization()
    before = layer(x)
    functional.call(layer, tf.constant(x), bindings=[])
    assert_identical(layer(x), before)

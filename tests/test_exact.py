"""Second derivatives that TensorFlow stops, has wrong or not at all, and what farhox makes of them in a graph."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import assert_close, assert_identical, variable

import farhox
from farhox._core import exact, functional
from farhox._core.step_graph import StepGraph

MODES = {"eager": lambda function: function, "graph": lambda function: tf.function(function, autograph=False)}
modes = pytest.mark.parametrize("mode", list(MODES))
methods = pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG()], ids=["reverse", "forward"])

X = tf.constant([[0.3, -1.2, 0.8], [2.0, 0.7, -0.4], [1.1, 0.4, 0.9], [-0.6, 1.5, 0.2]], tf.float64)
V = tf.constant([[1.0, 0.5, -0.2], [-0.3, 0.8, 0.1], [0.2, -1.0, 0.4], [0.6, 0.3, -0.7]], tf.float64)
W = tf.constant(np.random.default_rng(0).normal(size=(4, 3)))


def variance(x):
    mean, variance = tf.nn.moments(x, [0])
    return tf.sin(x) * variance / (1.0 + mean**2)


def variance_by_compatibility(x):
    return tf.sin(x) * tf.compat.v1.nn.moments(x, [0])[1]


def variance_by_hand(x):
    mean = tf.stop_gradient(tf.reduce_mean(x, 0))
    return tf.sin(x) * tf.reduce_mean((x - mean)**2, 0)


def self_distillation(x):
    return W * tf.square(tf.tanh(x) - tf.stop_gradient(tf.tanh(2.0 * x)))


def in_a_loop(x):
    return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * tf.stop_gradient(tf.sin(x)) + x * y),
                         [tf.constant(0), x], maximum_iterations=3)[1]


def in_a_branch(x):
    return tf.cond(tf.reduce_sum(x) > 0, lambda: tf.stop_gradient(x) * x**2, lambda: x)


def in_a_switch(x):
    return tf.switch_case(tf.constant(1), [lambda: x, lambda: tf.stop_gradient(x) * x**2, lambda: tf.exp(x)])


def soft_targets(x):
    losses = tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(x[:2]), x[2:] * x[:2])
    return losses * tf.constant([1.0, 2.0], X.dtype)


def resized(interpolation):
    return lambda x: tf.cast(tf.image.resize(x[tf.newaxis, ..., tf.newaxis], [7, 5], interpolation), x.dtype)**3


def pooled(padding):
    return lambda x: tf.nn.max_pool2d(x[tf.newaxis, ..., tf.newaxis], 2, [1, 1], padding)**3


FUNCTIONS = {
    "moments": variance, "moments of TensorFlow 1": variance_by_compatibility, "variance by hand": variance_by_hand,
    "self-distillation": self_distillation, "loop": in_a_loop, "branch": in_a_branch, "switch": in_a_switch,
    "soft targets": soft_targets,
    "softsign": lambda x: tf.nn.softsign(x) * W, "silu": lambda x: tf.nn.silu(x) * W,
    "bilinear": resized("bilinear"), "bicubic": resized("bicubic"), "nearest": resized("nearest"),
    "max pooling": pooled("VALID"), "padded max pooling": pooled("SAME"),
    "max pooling, padded by hand": pooled([[0, 0], [1, 0], [0, 1], [0, 0]]),
}


def gradient_of(function):
    """The gradient of the sum of a function's entries, weighted so that no part of it is symmetric."""
    def gradient(x):
        with exact.exact_derivatives():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
                value = tf.reduce_sum(tf.cast(tf.range(1, tf.size(y) + 1), y.dtype) * tf.reshape(y, [-1]))
            return tape.gradient(value, x)

    return gradient


def differences(gradient, step=1e-5):
    """The derivative of the gradient as a matrix, by central differences."""
    columns = []
    for i in range(12):
        shift = tf.reshape(tf.one_hot(i, 12, dtype=X.dtype), [4, 3]) * step
        columns.append(tf.reshape((gradient(X + shift) - gradient(X - shift)) / (2 * step), [-1]))
    return np.stack(columns, axis=1)


# XLA has no kernels for these, or none for float64.
NOT_UNDER_XLA = ("bilinear", "bicubic", "nearest", "max pooling, padded by hand")


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_second_derivatives_are_those_of_the_gradient_that_was_traced(name, mode):
    if mode == "xla" and name in NOT_UNDER_XLA:
        pytest.skip("no kernel")
    gradient = gradient_of(FUNCTIONS[name])
    in_float32 = name in ("bilinear", "bicubic")
    matrix = differences(tf.function(gradient, autograph=False), 3e-2 if in_float32 else 1e-5)
    tolerance = 1e-4 if in_float32 else 1e-7

    def products():
        graph = StepGraph(lambda inputs: [gradient(inputs[0])], [X])
        (cotangent,), (tangent,) = graph.placeholders(graph.outputs), graph.placeholders(graph.inputs)
        back = graph.pullback(graph.outputs, graph.inputs, [cotangent])
        forward = graph.pushforward(graph.outputs, graph.inputs, [tangent])
        return graph.run(back + forward, [(graph.inputs[0], X), (cotangent, V), (tangent, V)])

    run = products if mode == "eager" else tf.function(products, autograph=False, jit_compile=mode == "xla")
    back, along = run()
    v, scale = np.reshape(V, [-1]), np.max(np.abs(matrix))
    np.testing.assert_allclose(np.reshape(back, [-1]), v @ matrix, atol=tolerance * scale)
    np.testing.assert_allclose(np.reshape(along, [-1]), matrix @ v, atol=tolerance * scale)


@pytest.mark.one_case
@pytest.mark.parametrize("dimensions,padding", [(2, "SAME"), (3, "SAME"), (3, "VALID")])
def test_maxima_that_agree_in_bfloat16_are_told_apart_under_xla(dimensions, padding):
    random = np.random.default_rng(0)
    shape = [2, *[5] * dimensions, 2]
    x = tf.constant(1.0 + 1e-5 * random.permutation(np.prod(shape)).reshape(shape), tf.float32)
    tangent = tf.constant(random.normal(size=x.shape), tf.float32)
    pool = [tf.nn.max_pool2d, tf.nn.max_pool3d][dimensions - 2]
    gradient = gradient_of(lambda x: pool(x, 2, 2, padding)**2)

    def product():
        graph = StepGraph(lambda inputs: [gradient(inputs[0])], [x])
        (cotangent,) = graph.placeholders(graph.outputs)
        return graph.run(graph.pullback(graph.outputs, graph.inputs, [cotangent]), [
            (graph.inputs[0], x), (cotangent, tangent)])[0]

    np.testing.assert_allclose(tf.function(product, autograph=False, jit_compile=True)(),
                               tf.function(product, autograph=False)(), rtol=1e-5)


@pytest.mark.slow
def test_cumulative_logsumexp_is_exact_in_reverse_mode_and_no_number_in_forward_mode(float64):
    w, rate = variable(np.array([0.3, -0.2, 0.5])), variable(0.1)
    problem = farhox.BilevelProblem(
        lambda x: keras.ops.sum(tf.sin(tf.math.cumulative_logsumexp(w * x))), lambda x: keras.ops.sum(w * x),
        [w], [rate], farhox.GradientDescent(rate))
    data = farhox.repeat(np.array([1.0, 2.0, 0.5]), 2), np.array([0.5, 1.0, -1.0])
    reverse, forward = (method.compute(problem, *data) for method in (farhox.ReverseHG(), farhox.ForwardHG()))
    assert_close(reverse.gradients, unrolled.finite_differences(problem, *data), 1e-6)
    assert not forward.diagnostics["finite"]


@pytest.mark.one_case
@pytest.mark.parametrize("name", ["moments", "self-distillation", "soft targets"])
def test_a_tape_around_the_operations_does_not_know_the_rules(name):
    """Once this fails TensorFlow is right, and a rule of `farhox._core.exact` can go."""
    gradient = gradient_of(FUNCTIONS[name])
    with tf.GradientTape() as tape:
        tape.watch(X)
        along = tf.reduce_sum(gradient(X) * V)
    error = np.reshape(tape.gradient(along, X), [-1]) - np.reshape(V, [-1]) @ differences(gradient)
    assert np.max(np.abs(error)) > 1e-2


def test_without_passing_stops_what_is_stopped_is_a_constant():
    def gradient(x):
        with exact.exact_derivatives(stops=False), tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.stop_gradient(x) * x**2
        return tape.gradient(value, x)

    graph = StepGraph(lambda inputs: [gradient(inputs[0])], [tf.constant(3.0)])
    (one,) = graph.placeholders(graph.outputs)
    products = graph.pullback(graph.outputs, graph.inputs, [one])
    assert graph.run(products, [(graph.inputs[0], tf.constant(3.0)), (one, tf.constant(1.0))])[0] == 2 * 3.0


@pytest.mark.covering
@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize("function, x, derivative", [
    (tf.sqrt, 0.0, 0.0), (tf.sqrt, 4.0, 0.25), (tf.math.rsqrt, 0.0, 0.0), (tf.math.rsqrt, 4.0, -1 / 16),
    (lambda x: x**0.5, 0.0, 0.0), (lambda x: x**0.5, 4.0, 0.25), (lambda x: x**3.0, -2.0, 12.0),
    (lambda x: tf.pow(2.0, x), 3.0, 8 * np.log(2.0)), (lambda x: 3.0 / x, 0.0, 0.0), (lambda x: 3.0 / x, 2.0, -0.75),
    (lambda x: x / 4.0, 2.0, 0.25), (lambda x: tf.reduce_sum(x / tf.ones([3])), 2.0, 3.0)])
def test_roots_and_quotients_of_update_rules_have_finite_derivatives_at_zero(function, x, derivative, jit_compile):
    def update(inputs):
        with exact.finite_roots():
            return [function(inputs[0])]

    graph = StepGraph(update, [tf.constant(x)])
    (one,) = graph.placeholders(graph.outputs)
    products = graph.pullback(graph.outputs, graph.inputs, [one])
    run = tf.function(lambda: graph.run(products, [(graph.inputs[0], tf.constant(x)), (one, tf.constant(1.0))]),
                      autograph=False, jit_compile=jit_compile)
    np.testing.assert_allclose(run()[0], derivative, rtol=1e-6)


@pytest.mark.one_case
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


@pytest.mark.slow
@pytest.mark.one_case
@modes
@methods
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_features_are_exact(interpolation, method, mode, float64):
    problem, *data = image_problem(keras.layers.UpSampling2D(2, interpolation=interpolation, name="enlarge"))
    gradients = MODES[mode](method.compute)(problem, *data).gradients
    # TensorFlow interpolates in float32.
    assert_close(gradients, unrolled.finite_differences(problem, *data, step=1e-2), 1e-4)


@pytest.mark.covering
@modes
@methods
def test_an_operation_without_a_derivative_is_an_error_that_names_it_and_its_layer(method, mode, float64):
    layer = keras.layers.Lambda(
        lambda x: tf.cast(tf.nn.local_response_normalization(tf.cast(x, tf.float32)), x.dtype), name="normalise")
    problem, *data = image_problem(layer)
    named = r"(?s)needs the derivative of every operation.*none for the operation LRNGrad at '[^']*normalise"
    with pytest.raises(ValueError, match=named):
        MODES[mode](method.compute)(problem, *data)


@pytest.mark.slow
@pytest.mark.one_case
@modes
@methods
@pytest.mark.parametrize("layer", [
    lambda: keras.layers.Resizing(6, 6, interpolation="bilinear"),
    lambda: keras.layers.UpSampling2D(2, interpolation="bicubic")], ids=["Resizing", "UpSampling2D"])
def test_resized_data_need_no_second_derivative(layer, method, mode, float64):
    problem, *data = image_problem(layer(), before=False)
    gradients = MODES[mode](method.compute)(problem, *data).gradients
    assert_close(gradients, unrolled.finite_differences(problem, *data), 1e-7)


@pytest.mark.slow
@pytest.mark.one_case
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


@pytest.mark.slow
@pytest.mark.one_case
@modes
@methods
def test_upsampling_by_nearest_neighbours_is_exact(method, mode, float64):
    problem, *data = image_problem(keras.layers.UpSampling2D(2, interpolation="nearest"))
    gradients = MODES[mode](method.compute)(problem, *data).gradients
    assert_close(gradients, unrolled.finite_differences(problem, *data), 1e-7)


def test_plain_keras_training_outside_is_left_alone():
    keras.utils.set_random_seed(3)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    layer = keras.layers.LayerNormalization()
    before = layer(x)
    functional.call(layer, tf.constant(x), bindings=[])
    assert_identical(layer(x), before)

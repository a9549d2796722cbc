"""Problems whose hypergradient is known in closed form, and small Keras networks."""

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import farhox

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


class Case(NamedTuple):
    """A problem, its data and what is known of it.

    Attributes:
        problem: A `BilevelProblem`.
        inner_batches, outer_batch: Its data.
        expected: List of arrays aligned with `problem.outer_variables`, dE/dλ.
    """

    problem: Any
    inner_batches: Any
    outer_batch: Any
    expected: list


def variable(value, dtype="float64", name=None):
    """A `keras.Variable`, whose type is not taken from floatx."""
    return keras.Variable(np.asarray(value, dtype), dtype=dtype, name=name)


def assert_close(actual, expected, tolerance):
    """Lists of arrays agree up to `tolerance` relative to the largest entry of each array."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def assert_identical(first, second):
    """Nests of tensors agree bit for bit."""
    first, second = tf.nest.flatten(first), tf.nest.flatten(second)
    assert len(first) == len(second)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def complex_step(function, values):
    """Gradient of a NumPy function of floats and arrays, exact to rounding: Im f(x + ih) / h, h = 1e-200."""
    gradients = []
    for i, value in enumerate(values):
        value = np.asarray(value, complex)
        gradient = np.zeros(value.shape)
        for entry in range(value.size):
            moved = value.copy()
            moved.flat[entry] += 1e-200j
            gradient.flat[entry] = np.imag(function(*values[:i], moved, *values[i + 1:])) / 1e-200
        gradients.append(gradient)
    return gradients


# The scalar quadratic: inner a/2 (w - target)^2, outer (w - 1)^2 / 2, w_0 = 3.
CURVATURE, TARGET, RATE, STEPS, START, GOAL = 2.0, 0.5, 0.1, 7, 3.0, 1.0


def scalar_quadratic(dtype="float64", outer=("target",), steps=STEPS, dynamics=None, curvatures=None, initial=START,
                     **arguments):
    """Inner curvature/2 (w - target)^2, outer (w - goal)^2 / 2, gradient descent.

    Args:
        dtype: Type of all variables.
        outer: Names out of target, rate, schedule and initial.
        steps: T.
        dynamics: Other dynamics than gradient descent with `RATE`: a callable `rate variable -> dynamics`.
        curvatures: One curvature per step instead of `CURVATURE`.
        initial: w_0.
        **arguments: Further arguments of `BilevelProblem`.

    Returns:
        A `Case` with `expected` from the closed form of gradient descent.
    """
    w = variable(initial, dtype, "w")
    target = variable(TARGET, dtype, "target")
    rate = variable(RATE, dtype, "rate")
    schedule = variable([RATE] * steps, dtype, "schedule")
    setting = (lambda step: keras.ops.take(schedule, step)) if "schedule" in outer else rate
    curvatures = [CURVATURE] * steps if curvatures is None else curvatures
    named = {"target": target, "rate": rate, "schedule": schedule, "initial": w}
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - target),
        lambda goal: keras.ops.square(w - goal) / 2,
        inner_variables=[w], outer_variables=[named[name] for name in outer],
        dynamics=farhox.GradientDescent(setting) if dynamics is None else dynamics(rate), **arguments)
    values = {"target": TARGET, "rate": RATE, "schedule": [RATE] * steps, "initial": initial}
    expected = complex_step(lambda *moved: _quadratic_loss(curvatures, **{**values, **dict(zip(outer, moved))}),
                            [values[name] for name in outer])
    return Case(problem, tf.constant(curvatures, dtype), tf.constant(GOAL, dtype), expected)


def _quadratic_loss(curvatures, target, rate, schedule, initial):
    w = initial
    for t, a in enumerate(curvatures):
        # Of rate and schedule just one is moved: each is RATE where it is not learned.
        w = w - (rate + schedule[t] - RATE) * a * (w - target)
    return (w - GOAL) ** 2 / 2


def heavy_ball(dtype="float64", nesterov=False):
    """The scalar quadratic with momentum: target, rate and momentum are learned, T = 5."""
    w, target = variable(START, dtype, "w"), variable(TARGET, dtype, "target")
    rate, momentum = variable(RATE, dtype, "rate"), variable(0.5, dtype, "momentum")
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - target), lambda goal: keras.ops.square(w - goal) / 2,
        inner_variables=[w], outer_variables=[target, rate, momentum],
        dynamics=farhox.Momentum(rate, momentum, nesterov=nesterov))

    def loss(target, rate, momentum):
        w, m = START, 0.0
        for _ in range(5):
            gradient = CURVATURE * (w - target)
            m = momentum * m + gradient
            w = w - rate * (momentum * m + gradient if nesterov else m)
        return (w - GOAL) ** 2 / 2

    return Case(problem, tf.fill([5], tf.constant(CURVATURE, dtype)), tf.constant(GOAL, dtype),
                complex_step(loss, [np.float64(v) for v in (TARGET, RATE, 0.5)]))


def weighted_mean(dtype="float64", rate=1.0 / 3.0):
    """Inner sum_i s_i (w - y_i)^2 / 2, outer (w - 2)^2 / 2; the data weights s are learned, w_0 is the minimum."""
    weights = variable([1.0, 1.0, 1.0], dtype, "weights")
    w = variable(13.0 / 3.0, dtype, "w")
    problem = farhox.BilevelProblem(
        lambda y: keras.ops.sum(weights * keras.ops.square(w - y)) / 2,
        lambda goal: keras.ops.square(w - goal) / 2,
        inner_variables=[w], outer_variables=[weights], dynamics=farhox.GradientDescent(rate))
    y = np.array([1.0, 2.0, 10.0])
    expected = complex_step(lambda s: (np.sum(s * y) / np.sum(s) - 2.0) ** 2 / 2, [np.ones(3)])
    return Case(problem, tf.constant(y[np.newaxis], dtype), tf.constant(2.0, dtype), expected)


def ridge_representation(dtype="float64", steps=1, rate=0.1):
    """Inner ||XHw - Y||^2 / 2 + ||w||^2 / 4, outer mean((X_v H w - Y_v)^2) / 2; H is learned, w_0 is the minimum."""
    x, y = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([1.0, 2.0, 2.0])
    x_outer, y_outer = np.array([[1.0, -1.0], [2.0, 1.0]]), np.array([0.0, 3.0])

    def solution(h):
        return np.linalg.solve(h.T @ x.T @ x @ h + 0.5 * np.eye(2), h.T @ x.T @ y)

    h = np.array([[1.0, 0.5], [0.0, 1.0]])
    representation, w = variable(h, dtype, "representation"), variable(solution(h), dtype, "w")

    def predictions(x):
        return keras.ops.matmul(keras.ops.matmul(x, representation), w[:, tf.newaxis])[:, 0]

    problem = farhox.BilevelProblem(
        lambda batch: (keras.ops.sum(keras.ops.square(predictions(batch[0]) - batch[1])) / 2
                       + keras.ops.sum(keras.ops.square(w)) / 4),
        lambda batch: keras.ops.mean(keras.ops.square(predictions(batch[0]) - batch[1])) / 2,
        inner_variables=[w], outer_variables=[representation], dynamics=farhox.GradientDescent(rate))
    expected = complex_step(lambda h: np.mean((x_outer @ h @ solution(h) - y_outer) ** 2) / 2, [h])
    batch, outer_batch = [[tf.constant(part, dtype) for part in pair] for pair in ((x, y), (x_outer, y_outer))]
    return Case(problem, farhox.repeat(batch, steps), outer_batch, expected)


def proximal_quadratic(dtype="float64", steps=1, initial=None):
    """Inner (w - 3)^2 / 2 + (w - θ)^2, outer (w - 5)^2 / 2; the initial value θ = 1 is learned: φ* = (3 + 2θ) / 3."""
    theta = variable(1.0, dtype, "theta")
    problem = farhox.BilevelProblem(
        lambda goal: keras.ops.square(theta - goal) / 2, lambda goal: keras.ops.square(theta - goal) / 2,
        inner_variables=[theta], outer_variables=[theta], dynamics=farhox.GradientDescent(1.0 / 3.0), proximal=2.0)
    return Case(problem, tf.fill([steps], tf.constant(3.0, dtype)), tf.constant(5.0, dtype),
                [np.array((5.0 / 3.0 - 5.0) * 2.0 / 3.0)])


# Small networks: one layer family each, and the shape of an example. Integer inputs are given by their vocabulary.
_LAYERS = keras.layers
NETWORKS = {
    "Dense": ((4,), lambda: [_LAYERS.Dense(3, activation="tanh")]),
    "Activations": ((4,), lambda: [_LAYERS.Dense(4, activation=name) for name in ("gelu", "softplus", "elu", "relu")]),
    "Conv2D": ((4, 4, 1), lambda: [_LAYERS.Conv2D(2, 3, padding="same", activation="tanh"), _LAYERS.Flatten()]),
    "DepthwiseConv2D": ((4, 4, 2), lambda: [_LAYERS.DepthwiseConv2D(3, activation="tanh"), _LAYERS.Flatten()]),
    "BatchNormalization": ((4,), lambda: [
        _LAYERS.Dense(3, use_bias=False), _LAYERS.BatchNormalization(momentum=0.5), _LAYERS.Activation("tanh")]),
    "ConvBatchNormalization": ((3, 3, 1), lambda: [
        _LAYERS.Conv2D(2, 2, use_bias=False), _LAYERS.BatchNormalization(momentum=0.5), _LAYERS.Activation("tanh"),
        _LAYERS.Flatten()]),
    "LayerNormalization": ((4,), lambda: [_LAYERS.Dense(4), _LAYERS.LayerNormalization(), _LAYERS.Activation("tanh")]),
    "GroupNormalization": ((4,), lambda: [
        _LAYERS.Dense(6), _LAYERS.GroupNormalization(groups=2), _LAYERS.Activation("tanh")]),
    "Dropout": ((4,), lambda: [_LAYERS.Dense(6, activation="tanh"), _LAYERS.Dropout(0.4, seed=1)]),
    "MaxPooling2D": ((4, 4, 1), lambda: [
        _LAYERS.Conv2D(2, 3, padding="same", activation="tanh"), _LAYERS.MaxPooling2D(), _LAYERS.Flatten()]),
    "AveragePooling2D": ((4, 4, 1), lambda: [
        _LAYERS.Conv2D(2, 3, padding="same", activation="tanh"), _LAYERS.AveragePooling2D(2), _LAYERS.Flatten()]),
    "Embedding": (7, lambda: [_LAYERS.Embedding(7, 3), _LAYERS.Flatten(), _LAYERS.Dense(3, activation="tanh")]),
    "LSTM": ((3, 2), lambda: [_LAYERS.LSTM(2)]),
    "GRU": ((3, 2), lambda: [_LAYERS.GRU(2)]),
    "MultiHeadAttention": ((3, 2), lambda: [_SelfAttention(2, 2), _LAYERS.Flatten()]),
}


@keras.saving.register_keras_serializable("farhox_tests")
class _SelfAttention(keras.layers.Layer):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, heads, size):
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(heads, size)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x, training=None):
        return self.attention(x, x, training=training)


def model_and_data(name, examples=4, steps=4, extra=()):
    """A network that ends in two logits, and its batches.

    Returns:
        Model, inner batches (x, y) with a leading axis `steps`, outer batch (x, y).
    """
    shape, layers = NETWORKS[name]
    integer = isinstance(shape, int)
    entry = keras.Input((3,), dtype="int32") if integer else keras.Input(shape)
    model = keras.Sequential([entry, *layers(), *extra, keras.layers.Dense(2)])
    random = np.random.default_rng(0)

    def batch(*leading):
        if integer:
            x = random.integers(0, shape, (*leading, examples, 3)).astype("int32")
        else:
            x = random.normal(size=(*leading, examples, *shape)).astype(keras.config.floatx())
        return x, random.integers(0, 2, (*leading, examples)).astype("int32")

    return model, batch(steps), batch()


def dynamics_with_settings(name):
    """Dynamics by name and the hyperparameters that are their settings."""
    dtype = keras.config.floatx()
    rate = farhox.Hyperparameter(0.05 if name == "adam" else 0.3, low=0.0, log=True, name="rate", dtype=dtype)
    decay = farhox.Hyperparameter(0.6, low=0.0, high=1.0, name="decay", dtype=dtype)
    return {
        "gradient_descent": lambda: (farhox.GradientDescent(rate), [rate]),
        "momentum": lambda: (farhox.Momentum(rate, decay), [rate, decay]),
        "nesterov": lambda: (farhox.Momentum(rate, decay, nesterov=True), [rate, decay]),
        "adam": lambda: (farhox.Adam(rate, beta_1=decay), [rate, decay]),
    }[name]()


def network_problem(name, dynamics="gradient_descent", steps=4, extra=()):
    """A network whose dynamics' settings, L2 strength and weights of the examples are learned.

    The outer objective runs the model with training=False, so that batch norm's statistics count.

    Returns:
        A `Case` without `expected`.
    """
    model, inner_batches, outer_batch = model_and_data(name, steps=steps, extra=extra)
    dynamics, settings = dynamics_with_settings(dynamics)
    strength = farhox.Hyperparameter(0.02, low=0.0, log=True, name="strength", dtype=keras.config.floatx())
    weights = variable([0.7, 1.4], keras.config.floatx(), "weights")

    def losses(batch, training):
        x, y = batch
        return keras.losses.sparse_categorical_crossentropy(y, model(x, training=training), from_logits=True)

    def inner_objective(batch):
        penalty = sum(keras.ops.sum(keras.ops.square(w)) for w in model.trainable_variables)
        return keras.ops.mean(keras.ops.tile(weights, 2) * losses(batch, True)) + strength() * penalty

    problem = farhox.BilevelProblem(
        inner_objective, lambda batch: keras.ops.mean(losses(batch, False)),
        inner_variables=model.trainable_variables, outer_variables=[*settings, strength, weights],
        state_variables=model.non_trainable_variables, dynamics=dynamics)
    return Case(problem, inner_batches, outer_batch, [])

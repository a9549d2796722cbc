"""What tests of self-tuning networks share: every layer with an input, draws, and small networks."""

import keras
import numpy as np
import pytest

import farhox
from farhox import stn
from farhox._core import functional

IMAGES, STEPS, TOKENS, VIDEO = (6, 5, 4), (7, 3), (5,), (3, 4, 5, 2)

# Name: (make a layer for hyperparameters, shape of an example, units with a gate on kernels, biases, plain parameters).
LAYERS = {
    "dense": (lambda h, **k: stn.Dense(3, h, activation="tanh", **k), (4,)),
    "dense_on_steps": (lambda h, **k: stn.Dense(3, h, use_bias=False, **k), STEPS),
    "conv1d": (lambda h, **k: stn.Conv1D(4, 3, h, padding="causal", dilation_rate=2, **k), STEPS),
    "conv2d": (lambda h, **k: stn.Conv2D(4, 3, h, strides=2, padding="same", activation="relu", **k), IMAGES),
    "conv2d_groups": (lambda h, **k: stn.Conv2D(6, (2, 3), h, groups=2, **k), IMAGES),
    "conv3d": (lambda h, **k: stn.Conv3D(2, 2, h, **k), VIDEO),
    "transpose": (lambda h, **k: stn.Conv2DTranspose(3, 3, h, strides=2, activation="tanh", **k), IMAGES),
    "separable": (lambda h, **k: stn.SeparableConv2D(3, 2, h, depth_multiplier=2, **k), IMAGES),
    "einsum": (lambda h, **k: stn.EinsumDense("abc,cde->aebd", (5, 7, 2), h, bias_axes="ed", **k), STEPS),
    "einsum_shared": (lambda h, **k: stn.EinsumDense("abc,bcd->abd", (7, 2), h, bias_axes="d", **k), STEPS),
    "einsum_right": (lambda h, **k: stn.EinsumDense("...x,xy->...y", 6, h, bias_axes="y", **k), STEPS),
    "einsum_left": (lambda h, **k: stn.EinsumDense("ab...,bc->ac...", (5,), h, bias_axes="c", **k), STEPS),
    "depthwise": (lambda h, **k: stn.DepthwiseConv2D(3, h, depth_multiplier=2, **k), IMAGES),
    "embedding": (lambda h, **k: stn.Embedding(11, 4, h, mask_zero=True, **k), TOKENS),
    "lstm": (lambda h, **k: stn.LSTM(4, h, return_sequences=True, **k), STEPS),
    "gru": (lambda h, **k: stn.GRU(4, h, **k), STEPS),
    "gru_before": (lambda h, **k: stn.GRU(4, h, reset_after=False, **k), STEPS),
    "gru_no_bias": (lambda h, **k: stn.GRU(4, h, use_bias=False, **k), STEPS),
}
# Further settings of a class that is there already.
VARIANTS = {"dense_on_steps", "conv2d_groups", "einsum_shared", "einsum_right", "einsum_left", "gru_before",
            "gru_no_bias"}
every_layer = pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in LAYERS])
# One of each way to compute a response: a product, a convolution, rows that are read, a cell.
layers_of_each_kind = pytest.mark.parametrize("name", [
    name if name in ("dense", "conv2d", "embedding", "lstm") else pytest.param(name, marks=pytest.mark.slow)
    for name in LAYERS])
PLAIN = {"dense": keras.layers.Dense, "dense_on_steps": keras.layers.Dense, "conv1d": keras.layers.Conv1D,
         "conv3d": keras.layers.Conv3D, "transpose": keras.layers.Conv2DTranspose,
         "separable": keras.layers.SeparableConv2D,
         **dict.fromkeys(["einsum", "einsum_shared", "einsum_right", "einsum_left"], keras.layers.EinsumDense),
         "conv2d": keras.layers.Conv2D, "conv2d_groups": keras.layers.Conv2D, "depthwise": keras.layers.DepthwiseConv2D,
         "embedding": keras.layers.Embedding, "lstm": keras.layers.LSTM, "gru": keras.layers.GRU,
         "gru_before": keras.layers.GRU, "gru_no_bias": keras.layers.GRU}


def hyperparameters():
    """A scalar and an array: n = 3."""
    return [farhox.Hyperparameter(0.3, low=0.0, high=0.9, name="rate"),
            farhox.Hyperparameter([0.5, 2.0], low=0.0, name="strengths")]


def layer_and_input(name, batch=4, **arguments):
    """A built layer whose gates are not small, and a batch of inputs."""
    make, shape = LAYERS[name]
    arguments = {"gate_initializer": keras.initializers.RandomNormal(stddev=0.7, seed=1), **arguments}
    layer = make(hyperparameters(), **arguments)
    x = inputs(shape, batch)
    layer(x)
    return layer, x


def inputs(shape, batch=4, seed=0):
    random = np.random.default_rng(seed)
    if shape == TOKENS:
        return random.integers(0, 11, (batch, *shape))
    return random.normal(size=(batch, *shape)).astype(keras.config.floatx())


def gated(layer):
    """The layer with the gates: of a recurrent layer the cell."""
    return getattr(layer, "cell", layer)


def with_draws(layer, x, draws, training=False):
    """The outputs while gates see a row of `draws` per example."""
    return functional.call(lambda: layer(x, training=training), bindings=[],
                            draws=[(gated(layer).gate.input_of_gates.variable, draws)]).value

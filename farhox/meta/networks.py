"""The networks of few-shot image classification."""

from typing import Any

import keras

from farhox._core import checks
from farhox._core.types import Shape
from farhox.meta.episode_checks import check_model


def convolutional_body(input_shape: Shape = (28, 28, 1), filters: Any = 64, blocks: int = 4,
                       downsampling: str = "stride", normalize_features: bool = False,
                       name: str = "body") -> keras.Model:
    """Blocks of 3x3 convolution, batch normalisation and ReLU, each of which halves the image; then flattened.

    Args:
        input_shape: Tuple (height, width, channels).
        filters: Positive int, per block.
        blocks: Positive int.
        downsampling: "stride" (convolutions of stride 2, as in most code for Omniglot) or "pool" (2x2 max pooling).
        normalize_features: Bool. Features have length 1. Gradient descent on the cross entropy of a dense softmax layer
            is then stable for every learning rate below 2, whatever the body becomes.
        name: Name of the model.

    Returns:
        A `keras.Model`, images to features.

    Raises:
        ValueError: If `downsampling` is neither, or `input_shape` does not have three entries.

    Reference:
        [Vinyals et al., 2016](https://arxiv.org/abs/1606.04080), section 4.1.1.
    """
    if downsampling not in ("stride", "pool"):
        raise ValueError(f"downsampling must be 'stride' or 'pool'. Received: {downsampling!r}")
    _check_shape(input_shape)
    layers = [keras.Input(input_shape)]
    for _ in range(blocks):
        layers += [keras.layers.Conv2D(filters, 3, strides=2 if downsampling == "stride" else 1, padding="same"),
                   keras.layers.BatchNormalization(), keras.layers.ReLU()]
        layers += [keras.layers.MaxPooling2D(2, padding="same")] if downsampling == "pool" else []
    layers += [keras.layers.Flatten(), *([keras.layers.UnitNormalization()] if normalize_features else [])]
    return keras.Sequential(layers, name=name)


def residual_body(input_shape: Shape = (28, 28, 1), filters: Any = (32, 64, 128), features: int = 256,
                  name: str = "residual_body") -> keras.Model:
    """Residual blocks of three 3x3 convolutions with a 1x1 skip and pooling, then a mean over places and features.

    Args:
        input_shape: Tuple (height, width, channels).
        filters: Tuple of positive ints, one per block.
        features: Positive int, the size of the representation.
        name: Name of the model.

    Returns:
        A `keras.Model`, images to features.

    Raises:
        ValueError: If `input_shape` does not have three entries.

    Reference:
        After [Franceschi et al., 2018](https://arxiv.org/abs/1806.04910), appendix; smaller.
    """
    _check_shape(input_shape)
    inputs = x = keras.Input(input_shape)
    for count in filters:
        skip = keras.layers.Conv2D(count, 1, padding="same")(x)
        for index in range(3):
            x = keras.layers.Conv2D(count, 3, padding="same", use_bias=False)(x)
            x = keras.layers.BatchNormalization()(x)
            x = keras.layers.LeakyReLU(0.1)(x) if index < 2 else x
        x = keras.layers.LeakyReLU(0.1)(keras.layers.Add()([x, skip]))
        x = keras.layers.MaxPooling2D(2, padding="same")(x)
    x = keras.layers.Conv2D(features, 1)(keras.layers.LeakyReLU(0.1)(x))
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x), name=name)


def few_shot_classifier(ways: int = 5, body: Any = None) -> keras.Model:
    """A body and a dense softmax layer on its features.

    Args:
        ways: Positive int, classes.
        body: A `keras.Model`, images to features. Default: `convolutional_body()`.

    Returns:
        A `keras.Model`, images to class probabilities.

    Raises:
        TypeError: If `body` is not a Keras model.
        ValueError: If `ways` is not a positive integer, or the body does not say what its inputs are.
    """
    checks.positive_integer("ways", ways)
    body = convolutional_body() if body is None else body
    check_model("body", body)
    if not getattr(body, "inputs", None):
        raise ValueError(f"body must say what its inputs are: give it an Input. Received: {body.name!r}")
    layers = body.layers if isinstance(body, keras.Sequential) else [body]
    return keras.Sequential([keras.Input(body.input_shape[1:]), *layers,
                             keras.layers.Dense(ways, activation="softmax")])


def _check_shape(shape):
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels). Received: {shape!r}")

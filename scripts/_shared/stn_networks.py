"""Convolutional networks with a dropout rate per layer, for the experiments with self-tuning networks."""

import keras

from farhox import stn

# Filters, stride, and whether pooling follows.
_ALEXNET = ((64, 2, True), (192, 1, True), (384, 1, False), (256, 1, False), (256, 1, True))


def small(outputs, hyperparameters, width=1.0):
    """Two convolutions with strides of 2 and two dense layers, on images; returns logits of ten classes.

    Args:
        hyperparameters: Dictionary with "conv_dropout_1", "conv_dropout_2" (whole channels are dropped),
            "dense_dropout_1" and "dense_dropout_2", rates after the convolutions and before the dense layers.
        width: Positive float, the factor of filters and units.
    """
    for i, filters in enumerate((8, 16), start=1):
        outputs = keras.layers.Conv2D(_scaled(filters, width), 3, strides=2, padding="same", activation="relu")(outputs)
        outputs = _drop_channels(hyperparameters[f"conv_dropout_{i}"])(outputs)
    return _dense(keras.layers.Flatten()(outputs), hyperparameters, [_scaled(64, width)])


def alexnet(outputs, hyperparameters, width=1.0):
    """The AlexNet-like network of the paper, five convolutions and three dense layers; returns logits of ten classes.

    Args:
        hyperparameters: As for `small`, with "conv_dropout_1" to "conv_dropout_5".
        width: Positive float, the factor of filters and units.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), section 4.2.
    """
    for i, (filters, strides, pool) in enumerate(_ALEXNET, start=1):
        outputs = keras.layers.Conv2D(
            _scaled(filters, width), 3, strides=strides, padding="same", activation="relu")(outputs)
        if pool:
            outputs = keras.layers.MaxPooling2D(2)(outputs)
        outputs = _drop_channels(hyperparameters[f"conv_dropout_{i}"])(outputs)
    return _dense(keras.layers.Flatten()(outputs), hyperparameters, [_scaled(4096, width)] * 2)


def _dense(outputs, hyperparameters, units):
    for i, count in enumerate(units, start=1):
        outputs = stn.Dropout(hyperparameters[f"dense_dropout_{i}"])(outputs)
        outputs = keras.layers.Dense(count, activation="relu")(outputs)
    if len(units) == 1:
        outputs = stn.Dropout(hyperparameters["dense_dropout_2"])(outputs)
    return keras.layers.Dense(10)(outputs)


def _drop_channels(rate):
    return stn.Dropout(rate, noise_shape=(None, 1, 1, None))


def _scaled(count, width):
    return max(1, round(count * width))

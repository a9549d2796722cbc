"""Dropout and noise with a strength per example; on one strength for all they draw what Keras' layers draw."""

import math
from typing import Any

import keras
import tensorflow as tf

from farhox._core.types import Config, Shape, Tensor
from farhox.outer.outer_variable import Strength
from farhox.stn.perturbations import PerturbationLayer, checked_data_format
from farhox.stn.strengths import kept


@keras.saving.register_keras_serializable(package="farhox")
class Dropout(PerturbationLayer):
    """`keras.layers.Dropout` with a rate per example.

    Args:
        rate: `Hyperparameter` or float in [0, 1].
        noise_shape: Tuple as in Keras: 1 on the axes that share a mask. (None, 1, 1, None) drops whole channels of
            images, (None, 1, None) the same features at all steps of a sequence (variational dropout).
        seed: Int or None.

    Raises:
        ValueError: If `rate` may leave [0, 1], or `noise_shape` is no sequence of positive integers and None.
    """

    STRENGTHS = {"rate": (0.0, 1.0)}
    plain = keras.layers.Dropout
    differentiable = True

    def __init__(self, rate: Strength, noise_shape: Shape = None, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(seed=seed, rate=rate, **kwargs)
        self.noise_shape = _checked_noise_shape(noise_shape)

    def perturb(self, inputs: Tensor) -> Tensor:
        rate = self.strength("rate", inputs)
        keep = kept(self.uniform(self.mask_shape(inputs), inputs), rate)
        return inputs * tf.math.divide_no_nan(keep, 1.0 - rate)

    def mask_shape(self, inputs: Tensor) -> Any:
        """Sizes of the axes of a mask."""
        shape = tf.shape(inputs)
        if self.noise_shape is None:
            return shape
        return [shape[axis] if size is None else size for axis, size in enumerate(self.noise_shape)]

    def get_config(self) -> Config:
        return {**super().get_config(), "noise_shape": self.noise_shape}


class _SpatialDropout(Dropout):
    """What drops whole channels."""

    def __init__(self, rate: Strength, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(rate, seed=seed, **kwargs)

    def mask_shape(self, inputs: Tensor) -> Any:
        shape = tf.shape(inputs)
        channels = 1 if self._channels_first() else inputs.shape.rank - 1
        return [shape[axis] if axis in (0, channels) else 1 for axis in range(inputs.shape.rank)]

    def to_keras(self) -> Any:
        return self.plain(self.current("rate"), seed=self.seed, name=self.name, dtype=self.dtype_policy)

    def get_config(self) -> Config:
        config = super().get_config()
        config.pop("noise_shape")
        return config

    def _channels_first(self):
        return False


@keras.saving.register_keras_serializable(package="farhox")
class SpatialDropout1D(_SpatialDropout):
    """`keras.layers.SpatialDropout1D` with a rate per example.

    Args:
        rate: `Hyperparameter` or float in [0, 1].
        seed: Int or None.
    """

    plain = keras.layers.SpatialDropout1D


class _SpatialDropoutOfImages(_SpatialDropout):

    def __init__(self, rate: Strength, data_format: str | None = None, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(rate, seed=seed, **kwargs)
        self.data_format = checked_data_format(data_format, self.name)

    def to_keras(self) -> Any:
        return self.plain(self.current("rate"), data_format=self.data_format, seed=self.seed, name=self.name,
                          dtype=self.dtype_policy)

    def get_config(self) -> Config:
        return {**super().get_config(), "data_format": self.data_format}

    def _channels_first(self):
        return self.data_format == "channels_first"


@keras.saving.register_keras_serializable(package="farhox")
class SpatialDropout2D(_SpatialDropoutOfImages):
    """`keras.layers.SpatialDropout2D` with a rate per example.

    Args:
        rate: `Hyperparameter` or float in [0, 1].
        data_format: As in Keras.
        seed: Int or None.
    """

    plain = keras.layers.SpatialDropout2D


@keras.saving.register_keras_serializable(package="farhox")
class SpatialDropout3D(_SpatialDropoutOfImages):
    """`keras.layers.SpatialDropout3D` with a rate per example.

    Args:
        rate: `Hyperparameter` or float in [0, 1].
        data_format: As in Keras.
        seed: Int or None.
    """

    plain = keras.layers.SpatialDropout3D


@keras.saving.register_keras_serializable(package="farhox")
class GaussianNoise(PerturbationLayer):
    """`keras.layers.GaussianNoise` with a standard deviation per example.

    Args:
        stddev: `Hyperparameter` or float, at least 0.
        seed: Int or None.
    """

    STRENGTHS = {"stddev": (0.0, math.inf)}
    plain = keras.layers.GaussianNoise
    differentiable = True

    def __init__(self, stddev: Strength, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(seed=seed, stddev=stddev, **kwargs)

    def perturb(self, inputs: Tensor) -> Tensor:
        return inputs + self.strength("stddev", inputs) * self.normal(inputs)


@keras.saving.register_keras_serializable(package="farhox")
class GaussianDropout(PerturbationLayer):
    """`keras.layers.GaussianDropout` with a rate per example: factors of mean 1 and deviation sqrt(rate / (1 - rate)).

    Args:
        rate: `Hyperparameter` or float in [0, 1].
        seed: Int or None.
    """

    STRENGTHS = {"rate": (0.0, 1.0)}
    plain = keras.layers.GaussianDropout
    differentiable = True

    def __init__(self, rate: Strength, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(seed=seed, rate=rate, **kwargs)

    def perturb(self, inputs: Tensor) -> Tensor:
        rate = self.strength("rate", inputs)
        return inputs * (1.0 + tf.sqrt(tf.math.divide_no_nan(rate, 1.0 - rate)) * self.normal(inputs))


@keras.saving.register_keras_serializable(package="farhox")
class AlphaDropout(Dropout):
    """`keras.layers.AlphaDropout` with a rate per example: what is dropped is set so that mean and variance stay.

    Args:
        rate: `Hyperparameter` or float in [0, 1].
        noise_shape: Tuple as in Keras: 1 on the axes that share a mask.
        seed: Int or None.

    Reference:
        [Klambauer et al., 2017](https://arxiv.org/abs/1706.02515).
    """

    plain = keras.layers.AlphaDropout

    # alpha and scale of SELU: a unit far below zero has the value -alpha * scale.
    _LEAST = -1.6732632423543772848170429916717 * 1.0507009873554804934193349852946

    def perturb(self, inputs: Tensor) -> Tensor:
        rate = self.strength("rate", inputs)
        keep = kept(self.uniform(self.mask_shape(inputs), inputs), rate)
        variance = (1.0 - rate) * (1.0 + rate * self._LEAST ** 2)
        scale = tf.math.divide_no_nan(tf.ones_like(variance), tf.sqrt(variance))
        return scale * (inputs * keep + self._LEAST * (1.0 - keep)) - scale * self._LEAST * rate


def _checked_noise_shape(shape):
    """None, or a tuple of positive integers and None. Older versions of Keras take anything."""
    sizes = shape if shape is None or isinstance(shape, (tuple, list)) else [0]
    if sizes is not None and not all(size is None or (type(size) is int and size > 0) for size in sizes):
        raise ValueError(f"noise_shape must be None or a tuple of positive integers and None. Received: {shape!r}")
    return None if sizes is None else tuple(sizes)

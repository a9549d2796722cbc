"""Layers that perturb what passes through them in training, each example with a strength of its own.

A strength is a `farhox.Hyperparameter` or a number. While a `SelfTuningModel` takes a training step, every example has
its own draw of the hyperparameter; otherwise, and in plain Keras training, all have the current value. To a draw no
derivative goes back: the gates of other layers learn the response to it. To the current value there is one, for
hypergradients along the path of training, where the layer is `differentiable`.
"""

import abc
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Config, DType, Shape, Tensor
from farhox.outer.outer_variable import OuterVariable, Strength, value_of
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.strengths import checked_strength


class PerturbationLayer(keras.layers.Layer, abc.ABC):
    """A layer that perturbs its inputs in training and leaves them alone otherwise.

    Subclasses name their strengths in `STRENGTHS`, with the least and the greatest value allowed, and define `perturb`.
    One that does what a Keras layer does names that layer in `plain`, and takes its settings: `stn.convert` can then
    put it in the place of that layer. `differentiable` says whether what it computes has a derivative with respect to
    its strengths, or, of masks, to their mean.

    Args:
        seed: Int or None, of the random numbers.
        **strengths: By name.
    """

    STRENGTHS = {}
    plain: Any = None
    differentiable = False

    def __init__(self, seed: int | None = None, name: str | None = None, dtype: DType | None = None,
                 trainable: bool = True, **strengths: Strength) -> None:
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.supports_masking = True
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        for key, (least, greatest) in self.STRENGTHS.items():
            setattr(self, key, checked_strength(strengths[key], f"{key} of {self.name!r}", least, greatest))

    @abc.abstractmethod
    def perturb(self, inputs: Tensor) -> Tensor:
        """The inputs, perturbed."""

    @classmethod
    def from_plain(cls, layer: keras.Layer, strengths: Mapping[str, Any]) -> Any:
        """A layer that does what a Keras layer does, with some of its strengths in the place of its numbers."""
        return cls.from_config({**layer.get_config(), **strengths})

    def to_keras(self) -> Any:
        """A Keras layer with the current strengths that does the same in training and nothing otherwise, or None."""
        if self.plain is None:
            return None
        config = {**self.get_config(), **{name: self.current(name) for name in self.STRENGTHS}}
        return self.plain.from_config(config)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self.perturb(tf.convert_to_tensor(inputs)) if training else inputs

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def strength(self, name: str, inputs: Tensor) -> Tensor:
        """A strength in a shape that broadcasts to the inputs: one value, or one per example."""
        value = tf.cast(value_of(getattr(self, name)), inputs.dtype)
        return tf.reshape(value, [-1] + [1] * (inputs.shape.rank - 1)) if value.shape.rank else value

    def uniform(self, shape: Any, inputs: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        return keras.random.uniform(shape, low, high, dtype=inputs.dtype.name, seed=self.seed_generator)

    def normal(self, inputs: Tensor) -> Tensor:
        return keras.random.normal(tf.shape(inputs), dtype=inputs.dtype.name, seed=self.seed_generator)

    def current(self, name: str) -> float:
        """The current strength as a float."""
        return float(value_of(getattr(self, name)))

    def get_config(self) -> Config:
        strengths = {name: getattr(self, name) for name in self.STRENGTHS}
        return {**super().get_config(), "seed": self.seed, **{
            name: serialized(value) for name, value in strengths.items()}}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**deserialized(config, *cls.STRENGTHS))


def checked_data_format(data_format: str | None, name: str) -> str:
    """Keras' default for None."""
    if data_format not in (None, "channels_last", "channels_first"):
        raise ValueError(f'data_format of {name!r} must be "channels_last", "channels_first" or None. '
                         f"Received: {data_format!r}")
    return data_format or keras.backend.image_data_format()


@keras.saving.register_keras_serializable(package="farhox")
class RandomScale(PerturbationLayer):
    """Multiplies each example by a factor, uniform between 1 / (1 + scale) and 1 + scale.

    Args:
        scale: `Hyperparameter` or float, at least 0.
        seed: Int or None.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), section 4.2 (noise on the scale of the input).
    """

    STRENGTHS = {"scale": (0.0, math.inf)}
    differentiable = True

    def __init__(self, scale: Strength, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(seed=seed, scale=scale, **kwargs)

    def perturb(self, inputs: Tensor) -> Tensor:
        greatest = 1.0 + self.strength("scale", inputs)
        uniform = self.uniform([tf.shape(inputs)[0]] + [1] * (inputs.shape.rank - 1), inputs)
        return inputs * (1.0 / greatest + uniform * (greatest - 1.0 / greatest))


@keras.saving.register_keras_serializable(package="farhox")
class ActivityRegularization(PerturbationLayer):
    """Adds mean(l1 |x|) + mean(l2 x^2) + mean(temporal (x_t+1 - x_t)^2) to the training loss, strengths per example.

    The mean goes over examples and entries. Like the other layers here it acts in training alone.

    Args:
        l1, l2: `Hyperparameter` or float, at least 0.
        temporal: The same, for inputs [batch, steps, ...].
    """

    STRENGTHS = {"l1": (0.0, math.inf), "l2": (0.0, math.inf), "temporal": (0.0, math.inf)}
    differentiable = True

    def __init__(self, l1: Strength = 0.0, l2: Strength = 0.0, temporal: float = 0.0, **kwargs: Any) -> None:
        super().__init__(l1=l1, l2=l2, temporal=temporal, **kwargs)

    def perturb(self, inputs: Tensor) -> Tensor:
        values = tf.cast(inputs, self.variable_dtype)
        if self._acts("l1"):
            self._add("l1", tf.abs(values))
        if self._acts("l2"):
            self._add("l2", tf.square(values))
        if self._acts("temporal"):
            self._add("temporal", tf.square(values[:, 1:] - values[:, :-1]))
        return inputs

    def _acts(self, name):
        strength = getattr(self, name)
        return isinstance(strength, OuterVariable) or strength > 0

    def _add(self, name, magnitudes):
        self.add_loss(tf.reduce_mean(self.strength(name, magnitudes) * magnitudes))


@keras.saving.register_keras_serializable(package="farhox")
class Cutout(PerturbationLayer):
    """Sets squares of an image to zero, at places of their own in every example; they may stick out over the border.

    Args:
        length: `Hyperparameter` (discrete) or int, the side of a square in pixels.
        holes: `Hyperparameter` (discrete, with a high bound) or int, the number of squares.
        seed: Int or None.
        data_format: As in Keras.

    Raises:
        ValueError: If a hyperparameter is not discrete, or the number of holes has no bound.

    Reference:
        [DeVries and Taylor, 2017](https://arxiv.org/abs/1708.04552).
    """

    STRENGTHS = {"length": (0.0, math.inf), "holes": (0.0, math.inf)}

    def __init__(self, length: Strength, holes: Strength = 1, seed: int | None = None, data_format: str | None = None,
                 **kwargs: Any) -> None:
        super().__init__(seed=seed, length=length, holes=holes, **kwargs)
        for name in self.STRENGTHS:
            value = getattr(self, name)
            if isinstance(value, OuterVariable) and not value.discrete:
                raise ValueError(f"{name} of {self.name!r} counts, and needs a hyperparameter with discrete=True. "
                                 f"Received: {value!r}")
        most = holes.high if isinstance(holes, OuterVariable) else holes
        if most is None:
            raise ValueError(f"holes of {self.name!r} needs a hyperparameter with a high bound. Received: {holes!r}")
        self._most_holes = math.ceil(most)
        self.data_format = checked_data_format(data_format, self.name)

    def perturb(self, inputs: Tensor) -> Tensor:
        rows, columns = (2, 3) if self.data_format == "channels_first" else (1, 2)
        length, holes = self.strength("length", inputs), self.strength("holes", inputs)
        keep = tf.ones_like(inputs[:1, :1, :1, :1])
        for hole in range(self._most_holes):
            inside = tf.cast(hole < holes, inputs.dtype)
            for axis in (rows, columns):
                inside *= self._band(inputs, axis, length)
            keep = keep * (1.0 - inside)
        return inputs * keep

    def _band(self, inputs, axis, length):
        """1 on the pixels of an axis that a square at a random place covers, in a shape that broadcasts to images."""
        size = tf.shape(inputs)[axis]
        centre = tf.floor(self.uniform([tf.shape(inputs)[0], 1, 1, 1], inputs) * tf.cast(size, inputs.dtype))
        place = tf.reshape(tf.range(size), np.where(np.arange(4) == axis, -1, 1))
        from_start = tf.cast(place, inputs.dtype) - (centre - tf.floor(length / 2))
        return tf.cast((from_start >= 0) & (from_start < length), inputs.dtype)

    def get_config(self) -> Config:
        return {**super().get_config(), "data_format": self.data_format}

"""Augmentation of images with a strength per example: by the augmentation layers of Keras, whose bounds are a tensor.

Keras draws a transformation per image between bounds, and applies it. Here the bounds are those of each example.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from farhox._core.types import Config, DType, Shape, Tensor
from farhox.outer.outer_variable import Strength
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.perturbations import PerturbationLayer, checked_data_format
from farhox.stn.strengths import checked_strength


@dataclasses.dataclass(frozen=True)
class _Factor:
    """An argument of a Keras layer that bounds what it draws.

    Attributes:
        bounds: The names of its attributes for the lower and the upper bound, or of one attribute for both.
        rank: Int, the rank of what is drawn.
        greatest: Float, the greatest strength that Keras takes.
        direction: Tuple (lower, upper), the bounds at strength 1 of a layer that does nothing.
        differentiable: Whether images have a derivative with respect to it.
    """

    bounds: tuple
    rank: int
    greatest: float
    direction: tuple = (-1.0, 1.0)
    differentiable: bool = False


_SIZES = {f"{axis}_factor": _Factor((f"{axis}_lower", f"{axis}_upper"), 2, 1.0, differentiable=True)
          for axis in ("height", "width")}
_FACTORS = {
    keras.layers.RandomRotation: {"factor": _Factor(("factor",), 1, 1.0, differentiable=True)},
    keras.layers.RandomTranslation: _SIZES,
    keras.layers.RandomZoom: {name: dataclasses.replace(factor, greatest=0.99) for name, factor in _SIZES.items()},
    keras.layers.RandomContrast: {"factor": _Factor(("factor",), 4, 1.0, (0.0, 1.0), True)},
    keras.layers.RandomBrightness: {"factor": _Factor(("factor",), 4, 1.0, differentiable=True)},
}
if "RandomErasing" in dir(keras.layers):  # Keras 3.8 has none.
    _FACTORS[keras.layers.RandomErasing] = {"factor": _Factor(("factor",), 1, 1.0, (0.0, 1.0))}


def augmentation_strengths(layer: keras.Layer) -> Any:
    """Dictionary from the factors of a Keras augmentation layer that have a value to (value, greatest value)."""
    found = {}
    for name, factor in _FACTORS.get(type(layer), {}).items():
        bounds = _bounds(layer, name, factor)
        if bounds is not None:
            found[name] = max(map(abs, bounds)), factor.greatest
    return found


def has_differentiable_factors(layer: keras.Layer) -> bool:
    """Whether what a Keras augmentation layer computes has a derivative with respect to its factors.

    Where pixels are moved, farhox' hypergradients have it, and a tape has none; to the nearest pixel there is none.
    """
    factors = _FACTORS.get(type(layer), {}).values()
    nearest = getattr(layer, "interpolation", "bilinear") != "bilinear"
    return bool(factors) and not nearest and all(factor.differentiable for factor in factors)


@keras.saving.register_keras_serializable(package="farhox")
class Augmentation(PerturbationLayer):
    """A Keras augmentation layer with strengths per example.

    A strength is the greater of the two bounds, without its sign, and the other keeps its proportion to it: with
    `RandomRotation((-0.1, 0.2))` and the strength h angles are between -h / 2 and h.

    Args:
        layer: A `keras.layers.RandomRotation`, `RandomTranslation`, `RandomZoom`, `RandomContrast`, `RandomBrightness`
            or `RandomErasing`.
        **strengths: `Hyperparameter` or float for some of its factors, by name; the others stay.

    Raises:
        TypeError: If the layer is another one, or a strength is no number and no hyperparameter.
        ValueError: If it has no such factor, or a strength can leave its range.
    """

    def __init__(self, layer: keras.Layer, name: str | None = None, dtype: DType | None = None, trainable: bool = True,
                 **strengths: Strength) -> None:
        factors = _FACTORS.get(type(layer))
        if factors is None:
            raise TypeError(f"layer must be one of {', '.join(kind.__name__ for kind in _FACTORS)} of Keras. "
                            f"Received: {layer!r}")
        valued = augmentation_strengths(layer)
        unknown = [key for key in strengths if key not in valued]
        if unknown or not strengths:
            raise ValueError(f"The strengths of a {type(layer).__name__} must be among {list(valued)}. "
                             f"Received: {list(strengths)}")
        super().__init__(name=name or layer.name, dtype=dtype or layer.dtype_policy, trainable=trainable)
        self.layer = layer
        self.differentiable = has_differentiable_factors(layer)
        self._factors = {}
        for key, strength in strengths.items():
            factor = factors[key]
            setattr(self, key, checked_strength(strength, f"{key} of {self.name!r}", 0.0, factor.greatest))
            largest = valued[key][0]
            given: Any = _bounds(layer, key, factor)
            direction = [bound / largest for bound in given] if largest else factor.direction
            self._factors[key] = dataclasses.replace(factor, direction=tuple(direction))

    @classmethod
    def from_plain(cls, layer: keras.Layer, strengths: Mapping[str, Any]) -> Any:
        return cls(type(layer).from_config(layer.get_config()), **strengths)

    def build(self, input_shape: Shape) -> None:
        self.layer.build(input_shape)
        self.built = True

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        # As Keras' augmentation layers, on integers too.
        return super().call(tf.cast(tf.convert_to_tensor(inputs), self.compute_dtype), training=training)

    def perturb(self, inputs: Tensor) -> Tensor:
        # A stand-in that shares everything but the bounds with the layer, which keeps its own.
        bounded = object.__new__(type(self.layer))
        vars(bounded).update(vars(self.layer))
        for name, factor in self._factors.items():
            strength = self.strength(name, inputs)
            if strength.shape.rank:
                strength = tf.reshape(strength, [-1] + [1] * (factor.rank - 1))
            bounds = tuple(bound * strength for bound in factor.direction)
            vars(bounded).update(zip(factor.bounds, bounds if len(factor.bounds) == 2 else [bounds]))
        transformation = bounded.get_random_transformation(inputs, training=True)
        return tf.cast(bounded.transform_images(inputs, transformation, training=True), inputs.dtype)

    def to_keras(self) -> Any:
        config = self.layer.get_config()
        for name, factor in self._factors.items():
            bounds = tuple(bound * self.current(name) for bound in factor.direction)
            config[name] = bounds if isinstance(config[name], (tuple, list)) else bounds[1]
        return type(self.layer).from_config(config)

    def get_config(self) -> Config:
        config = super().get_config()
        config.pop("seed")  # The layer has its own.
        return {**config, "layer": keras.saving.serialize_keras_object(self.layer),
                **{name: serialized(getattr(self, name)) for name in self._factors}}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**deserialized(config, *config))


class _Named(Augmentation):
    """An augmentation by one strength that is made from numbers, and not from a Keras layer."""

    _settings = ()

    def to_keras(self) -> Any:
        # A network that was written with this layer does nothing where it is not told that this is training; Keras'
        # augmentation layers do.
        return None

    def get_config(self) -> Config:
        config = PerturbationLayer.get_config(self)
        return {**config, "seed": self.layer.seed, "factor": serialized(self.factor),
                **{name: getattr(self.layer, name) for name in self._settings}}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**deserialized(config, "factor"))


@keras.saving.register_keras_serializable(package="farhox")
class RandomBrightness(_Named):
    """Adds an amount that is uniform between -factor and factor times the value range, then clips.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
    """

    _settings = ("value_range",)

    def __init__(self, factor: Strength, value_range: tuple[float, float] = (0, 255), seed: int | None = None,
                 **kwargs: Any) -> None:
        layer = keras.layers.RandomBrightness(0.0, value_range=_range(value_range), seed=seed, **_dtype(kwargs))
        super().__init__(layer, factor=factor, **kwargs)


@keras.saving.register_keras_serializable(package="farhox")
class RandomContrast(_Named):
    """Scales the distance from the mean of each channel by a number between 1 - factor and 1 + factor, then clips.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
        data_format: As in Keras.
    """

    _settings = ("value_range", "data_format")

    def __init__(self, factor: Strength, value_range: tuple[float, float] = (0, 255), seed: int | None = None,
                 data_format: str | None = None, **kwargs: Any) -> None:
        layer = keras.layers.RandomContrast(
            (1.0, 1.0), value_range=_range(value_range), seed=seed, data_format=data_format, **_dtype(kwargs))
        super().__init__(layer, factor=factor, **kwargs)


@keras.saving.register_keras_serializable(package="farhox")
class RandomTranslation(_Named):
    """Moves images up or down and left or right by a share of their size between -factor and factor.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        fill_mode, interpolation, data_format: As in `keras.layers.RandomTranslation`.
        seed: Int or None.
    """

    _settings = ("fill_mode", "interpolation", "data_format")

    def __init__(self, factor: Strength, fill_mode: str = "constant", interpolation: str = "bilinear",
                 seed: int | None = None, data_format: str | None = None, **kwargs: Any) -> None:
        layer = keras.layers.RandomTranslation(
            0.0, 0.0, fill_mode=fill_mode, interpolation=interpolation, seed=seed, data_format=data_format,
            **_dtype(kwargs))
        super().__init__(layer, height_factor=factor, width_factor=factor, **kwargs)

    @property
    def factor(self) -> Strength:
        return self.height_factor


@keras.saving.register_keras_serializable(package="farhox")
class RandomRotation(_Named):
    """Turns images around their centre by an angle between -factor and factor, in full turns.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        fill_mode, interpolation, data_format: As in `keras.layers.RandomRotation`.
        seed: Int or None.
    """

    _settings = ("fill_mode", "interpolation", "data_format")

    def __init__(self, factor: Strength, fill_mode: str = "constant", interpolation: str = "bilinear",
                 seed: int | None = None, data_format: str | None = None, **kwargs: Any) -> None:
        layer = keras.layers.RandomRotation(
            0.0, fill_mode=fill_mode, interpolation=interpolation, seed=seed, data_format=data_format, **_dtype(kwargs))
        super().__init__(layer, factor=factor, **kwargs)


class _Colour(PerturbationLayer):
    """A change of colours by a Keras layer that computes on values between 0 and 1."""

    def __init__(self, factor: Strength, value_range: tuple[float, float] = (0, 255), seed: int | None = None,
                 data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(seed=seed, factor=factor, **kwargs)
        self.value_range = _range(value_range)
        self.data_format = checked_data_format(data_format, self.name)
        self._full = self._keras((0.0, 1.0), value_range=(0, 1), seed=seed, data_format=self.data_format,
                                 dtype=self.dtype_policy)

    def build(self, input_shape: Shape) -> None:
        self._full.build(input_shape)
        self.built = True

    def perturb(self, inputs: Tensor) -> Tensor:
        low, high = self.value_range
        factor = self.strength("factor", inputs)
        factor = tf.reshape(factor, [-1]) if factor.shape.rank else factor
        changed = self._full.transform_images(
            (inputs - low) / (high - low), {"factor": self._drawn(inputs, factor)}, training=True)
        return low + (high - low) * tf.cast(changed, inputs.dtype)

    def get_config(self) -> Config:
        return {**super().get_config(), "data_format": self.data_format, "value_range": self.value_range}


@keras.saving.register_keras_serializable(package="farhox")
class RandomSaturation(_Colour):
    """Multiplies the saturation by a number between 1 - factor and 1 + factor.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
        data_format: As in Keras.
    """

    STRENGTHS = {"factor": (0.0, 1.0)}
    _keras = keras.layers.RandomSaturation

    def _drawn(self, inputs, factor):
        return 1.0 + self.uniform([tf.shape(inputs)[0]], inputs, -1.0, 1.0) * factor


@keras.saving.register_keras_serializable(package="farhox")
class RandomHue(_Colour):
    """Shifts the hue by an angle between -factor and factor, in turns of the colour circle.

    Args:
        factor: `Hyperparameter` or float in [0, 0.5].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
        data_format: As in Keras.
    """

    STRENGTHS = {"factor": (0.0, 0.5)}
    _keras = keras.layers.RandomHue

    def _drawn(self, inputs, factor):
        # Keras' full strength is half a turn to either side.
        drawn = self._full.get_random_transformation(inputs, training=True)["factor"]
        return tf.cast(drawn, inputs.dtype) * 2.0 * factor


def _bounds(layer, name, factor):
    """(lower, upper) of a factor of a Keras layer, or None if the layer goes without it."""
    if getattr(layer, name) is None:
        return None
    values = [getattr(layer, bound) for bound in factor.bounds]
    return tuple(values) if len(values) == 2 else tuple(values[0])


def _range(value_range):
    """(least, greatest) as numbers, of which the first is less."""
    pair = tuple(value_range) if isinstance(value_range, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(end, (int, float)) and math.isfinite(end) for end in pair) or (
            pair[0] >= pair[1]):
        raise ValueError("value_range must be two finite numbers, the least and the greatest value of a pixel. "
                         f"Received: {value_range!r}")
    return pair


def _dtype(kwargs):
    return {"dtype": kwargs["dtype"]} if kwargs.get("dtype") is not None else {}

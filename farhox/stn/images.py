"""Augmentation of images with a strength per example, on the transformations of Keras' preprocessing layers.

Keras draws a transformation per image and applies it. Here it is drawn at full strength, made smaller example by
example, and applied by Keras.
"""

import abc
import math

import keras
import tensorflow as tf

from farhox.stn.perturbations import PerturbationLayer


class _Augmentation(PerturbationLayer):
    """An augmentation by a Keras layer at full strength, made by `_full_strength` and drawn by `_transformation`."""

    STRENGTHS = {"factor": (0.0, math.inf)}

    def __init__(self, factor, seed=None, data_format=None, **kwargs):
        super().__init__(seed=seed, factor=factor, **kwargs)
        self.data_format = keras.backend.image_data_format() if data_format is None else data_format
        self._full = self._full_strength()

    @abc.abstractmethod
    def _full_strength(self):
        """A Keras preprocessing layer, or None if its transformation leaves no place for a strength."""

    @abc.abstractmethod
    def _transformation(self, inputs):
        """A transformation of that layer with strengths per example."""

    def build(self, input_shape):
        if self._full is not None:
            self._full.build(input_shape)
        self.built = True

    def perturb(self, inputs):
        return tf.cast(self._full.transform_images(inputs, self._transformation(inputs), training=True), inputs.dtype)

    def _drawn(self, inputs):
        return self._full.get_random_transformation(inputs, training=True)

    def _factor(self, inputs, rank):
        factor = self.strength("factor", inputs)
        return tf.reshape(factor, [-1] + [1] * (rank - 1)) if factor.shape.rank else factor

    def get_config(self):
        return {**super().get_config(), "data_format": self.data_format}


class _Color(_Augmentation):
    """A change of colours; Keras computes on values between 0 and 1."""

    def __init__(self, factor, value_range=(0, 255), seed=None, data_format=None, **kwargs):
        self.value_range = tuple(value_range)
        super().__init__(factor, seed=seed, data_format=data_format, **kwargs)

    def perturb(self, inputs):
        low, high = self.value_range
        return low + (high - low) * super().perturb((inputs - low) / (high - low))

    def get_config(self):
        return {**super().get_config(), "value_range": self.value_range}


@keras.saving.register_keras_serializable(package="farhox")
class RandomBrightness(_Color):
    """Adds an amount that is uniform between -factor and factor times the value range, then clips.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
    """

    STRENGTHS = {"factor": (0.0, 1.0)}

    def _full_strength(self):
        return keras.layers.RandomBrightness((-1.0, 1.0), value_range=(0, 1), seed=self.seed)

    def _transformation(self, inputs):
        drawn = self._drawn(inputs)["rgb_delta"]
        return {"rgb_delta": tf.cast(drawn, inputs.dtype) * self._factor(inputs, 4)}


@keras.saving.register_keras_serializable(package="farhox")
class RandomContrast(_Color):
    """Scales the distance from the mean of each channel by a number between 1 - factor and 1 + factor, then clips.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
    """

    STRENGTHS = {"factor": (0.0, 1.0)}

    def _full_strength(self):
        return keras.layers.RandomContrast(
            (1.0, 1.0), value_range=(0, 1), seed=self.seed, data_format=self.data_format, dtype=self.dtype_policy)

    def _transformation(self, inputs):
        drawn = tf.cast(self._drawn(inputs)["contrast_factor"], inputs.dtype)
        return {"contrast_factor": 1.0 + (drawn - 1.0) * self._factor(inputs, 4)}


@keras.saving.register_keras_serializable(package="farhox")
class RandomSaturation(_Color):
    """Multiplies the saturation by a number between 1 - factor and 1 + factor.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
    """

    STRENGTHS = {"factor": (0.0, 1.0)}

    def _full_strength(self):
        return keras.layers.RandomSaturation(
            (0.0, 1.0), value_range=(0, 1), seed=self.seed, data_format=self.data_format, dtype=self.dtype_policy)

    def _transformation(self, inputs):
        drawn = self.uniform([tf.shape(inputs)[0]], inputs, -1.0, 1.0)
        return {"factor": 1.0 + drawn * self._factor(inputs, 1)}


@keras.saving.register_keras_serializable(package="farhox")
class RandomHue(_Color):
    """Shifts the hue by an angle between -factor and factor, in turns of the colour circle.

    Args:
        factor: `Hyperparameter` or float in [0, 0.5].
        value_range: Tuple, the least and greatest value of a pixel.
        seed: Int or None.
    """

    STRENGTHS = {"factor": (0.0, 0.5)}

    def _full_strength(self):
        return keras.layers.RandomHue(
            (0.0, 1.0), value_range=(0, 1), seed=self.seed, data_format=self.data_format, dtype=self.dtype_policy)

    def _transformation(self, inputs):
        # Keras' full strength is half a turn to either side.
        return {"factor": tf.cast(self._drawn(inputs)["factor"], inputs.dtype) * 2.0 * self._factor(inputs, 1)}


class _Move(_Augmentation):
    """A movement of the pixels."""

    STRENGTHS = {"factor": (0.0, 1.0)}

    def __init__(self, factor, fill_mode="constant", interpolation="bilinear", seed=None, data_format=None, **kwargs):
        self.fill_mode, self.interpolation = fill_mode, interpolation
        super().__init__(factor, seed=seed, data_format=data_format, **kwargs)

    @property
    def _settings(self):
        return {"fill_mode": self.fill_mode, "interpolation": self.interpolation, "data_format": self.data_format}

    def get_config(self):
        return {**super().get_config(), "fill_mode": self.fill_mode, "interpolation": self.interpolation}


@keras.saving.register_keras_serializable(package="farhox")
class RandomTranslation(_Move):
    """Moves images up or down and left or right by a share of their size between -factor and factor.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        fill_mode, interpolation: As in `keras.layers.RandomTranslation`.
        seed: Int or None.
    """

    def _full_strength(self):
        return keras.layers.RandomTranslation(1.0, 1.0, seed=self.seed, **self._settings)

    def _transformation(self, inputs):
        drawn = self._drawn(inputs)
        return {**drawn, "translations": drawn["translations"] * tf.cast(self._factor(inputs, 2), tf.float32)}


@keras.saving.register_keras_serializable(package="farhox")
class RandomRotation(_Move):
    """Turns images around their centre by an angle between -factor and factor, in full turns.

    Args:
        factor: `Hyperparameter` or float in [0, 1].
        fill_mode, interpolation: As in `keras.layers.RandomRotation`.
        seed: Int or None.
    """

    def _full_strength(self):
        return None

    def _transformation(self, inputs):
        """The map from places in the output to places in the input, as 8 numbers per image."""
        rows, columns = (2, 3) if self.data_format == "channels_first" else (1, 2)
        angle = 2.0 * math.pi * tf.cast(self._factor(inputs, 1), tf.float32)
        angle *= tf.cast(self.uniform([tf.shape(inputs)[0]], inputs, -1.0, 1.0), tf.float32)
        y, x = ((tf.cast(tf.shape(inputs)[axis], tf.float32) - 1.0) / 2.0 for axis in (rows, columns))
        cosine, sine, zero = tf.cos(angle), tf.sin(angle), tf.zeros_like(angle)
        return tf.stack([cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y, zero, zero],
                        axis=-1)

    def perturb(self, inputs):
        # Keras' layer keeps the matrix that belongs to its angle, so that no strength can be put in afterwards.
        moved = keras.ops.image.affine_transform(
            inputs, self._transformation(inputs), interpolation=self.interpolation, fill_mode=self.fill_mode,
            data_format=self.data_format)
        return tf.cast(moved, inputs.dtype)

"""FeatureWiseTransformation: random scales and shifts of channels in training, of learned strength."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Config, Shape, Tensor
from farhox.outer.outer_variable import OuterVariable, Strength, value_of
from farhox.outer.serialization import deserialized, serialized
from farhox.outer.strengths import checked_strength


@keras.saving.register_keras_serializable(package="farhox")
class FeatureWiseTransformation(keras.layers.Layer):
    """Scales and shifts each channel by random numbers in training, as if the images came from another domain.

    In training h becomes (1 + scale z_1) h + shift z_2 with normal numbers z_1, z_2, one of each for a channel and all
    examples of the batch; in inference nothing happens. It stands behind batch normalisation. The strengths have a
    derivative: as outer variables they are learned so that what was trained on some domains does well on another one.

    ```python
    scale = farhox.Hyperparameter(np.full(16, 0.8), low=0.0, name="scale")  # One number for each of 16 channels.
    layer = farhox.meta.FeatureWiseTransformation(scale, shift=0.5)
    ```

    Args:
        scale, shift: Number, array [channels], or `Hyperparameter` of one of these shapes; not negative.
        seed: Int or None, of the random numbers.
        **kwargs: Of `keras.layers.Layer`.

    Raises:
        TypeError: If a strength is not a number, an array of numbers or an outer variable.
        ValueError: If a strength is negative or not finite, a hyperparameter could become negative, or, when built, its
            shape is not that of the channels.

    Reference:
        [Tseng et al., 2020](https://arxiv.org/abs/2001.08735), section 3.2.
    """

    def __init__(self, scale: Strength = 0.0, shift: Strength = 0.0, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.scale = checked_strength("scale", scale)
        self.shift = checked_strength("shift", shift)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Shape) -> None:
        channels = input_shape[-1]
        for name in ("scale", "shift"):
            strength = getattr(self, name)
            shape = tuple(strength.variable.shape if isinstance(strength, OuterVariable) else np.shape(strength))
            if shape not in ((), (channels,)):
                raise ValueError(f"{name} must be a scalar or have one entry for each of {channels} channels. "
                                 f"Received shape: {shape}")
        super().build(input_shape)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if not training:
            return inputs
        inputs = tf.convert_to_tensor(inputs)
        draws = keras.random.normal([2, inputs.shape[-1]], dtype=inputs.dtype.name, seed=self.seed_generator)
        scale, shift = (value_of(strength, dtype=inputs.dtype) for strength in (self.scale, self.shift))
        return (1.0 + scale * draws[0]) * inputs + shift * draws[1]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        strengths = {name: serialized(strength) if isinstance(strength, OuterVariable) else strength.tolist()
                     for name, strength in (("scale", self.scale), ("shift", self.shift))}
        return {**super().get_config(), **strengths, "seed": self.seed}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        config = dict(config)
        strengths = {name: config.pop(name) for name in ("scale", "shift")}
        return cls(**config, **deserialized(strengths, "scale", "shift"))

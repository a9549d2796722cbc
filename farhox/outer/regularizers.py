"""Weight regularisation whose strengths can be learned, as Keras regularizers."""

import keras
import numpy as np
import tensorflow as tf

from farhox.outer.hyperparameters import Hyperparameter
from farhox.outer.serialization import deserialized, serialized


@keras.saving.register_keras_serializable(package="farhox")
class L1L2(keras.regularizers.Regularizer):
    """Adds sum(l1 |w| + l2 w^2) to the inner objective, with strengths that may be hyperparameters.

    One regularizer per layer gives one strength per layer. A strength of the shape of the weights, or one that
    broadcasts to it, gives one per weight.

    ```python
    strength = farhox.Hyperparameter(1e-3, low=0.0, log=True, name="dense_l2")
    layer = keras.layers.Dense(10, kernel_regularizer=farhox.L1L2(l2=strength))
    ```

    Name the hyperparameters in the problem's `outer_variables` too. A saved model keeps them with their current values.

    Args:
        l1: Number, array or `Hyperparameter`, not negative. |w| has the derivative 0 at w = 0.
        l2: Number, array or `Hyperparameter`, not negative.

    Raises:
        TypeError: If a strength is not a number, an array of numbers or a `Hyperparameter`.
        ValueError: If a strength is negative or not finite, a hyperparameter could become negative, or, when called,
            the shape does not broadcast to that of the weights.
    """

    def __init__(self, l1=0.0, l2=0.0):
        self.l1 = _strength("l1", l1)
        self.l2 = _strength("l2", l2)

    def __call__(self, x):
        weights = tf.convert_to_tensor(x)
        return _penalty("l1", self.l1, tf.abs(weights)) + _penalty("l2", self.l2, tf.square(weights))

    def get_config(self):
        return {name: serialized(strength) if isinstance(strength, Hyperparameter) else strength.tolist()
                for name, strength in (("l1", self.l1), ("l2", self.l2))}

    @classmethod
    def from_config(cls, config):
        return cls(**deserialized(config, "l1", "l2"))


def _strength(name, strength):
    if isinstance(strength, Hyperparameter):
        if strength.low is None or strength.low < 0:
            raise ValueError("A regularisation strength must not become negative: give the hyperparameter low=0.0. "
                             f"Received: {name}={strength!r} with low={strength.low}")
        return strength
    numbers = np.asarray(strength)
    if numbers.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be a number, an array of numbers or a farhox.Hyperparameter. "
                        f"Received: {strength!r} of type {type(strength).__name__}")
    if not np.all(np.isfinite(numbers)) or np.any(numbers < 0):
        raise ValueError(f"{name} must be finite and not negative. Received: {name}={strength}")
    return numbers.astype("float64")


def _penalty(name, strength, magnitudes):
    if isinstance(strength, Hyperparameter):
        strength = strength()
    elif not np.any(strength):
        return tf.zeros([], magnitudes.dtype)
    shape, target = tuple(strength.shape), tuple(magnitudes.shape)
    if len(shape) > len(target) or any(
            size not in (1, entries) for size, entries in zip(reversed(shape), reversed(target))):
        raise ValueError(f"{name} must broadcast to the shape of the weights, {target}. Received shape: {shape}")
    return tf.reduce_sum(tf.cast(strength, magnitudes.dtype) * magnitudes)

"""Weight regularisation whose strengths can be learned, as Keras regularizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import functional
from farhox._core.types import Array, Config, Tensor, Variables
from farhox.outer.outer_variable import OuterVariable, Strength, value_of
from farhox.outer.serialization import deserialized, serialized
from farhox.outer.strengths import checked_strength

if TYPE_CHECKING:
    from farhox.dynamics.base import InnerDynamics


_ADVICE = (
    "Make it the regularizer of a layer under farhox.dynamics.ProximalGradient, which sets weights to zero exactly, or "
    "give that penalty=farhox.dynamics.L1(strength). L1L2(..., subgradient=True) takes the subgradient all the same.")


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

    Under `ProximalGradient` the regularizer of a layer's weights gives the l1 part to the proximal step: here it has
    its value then, and no gradient. Under all other dynamics it acts by its subgradient, 0 at w = 0: weights jump about
    zero and never settle, and a hypergradient of the strength is anything between zero and the truth. A learned l1 is
    an error there, unless `subgradient=True` says that this is what is wanted: over few steps, say, or far from zero.

    Args:
        l1: Number, array, `Hyperparameter` or another `OuterVariable`, not negative.
        l2: The same.
        subgradient: Bool, whether an l1 that is an outer variable may act by its subgradient.

    Raises:
        TypeError: If a strength is not a number, an array of numbers or an outer variable.
        ValueError: If a strength is negative or not finite, a hyperparameter could become negative, or, when called,
            the shape does not broadcast to that of the weights; if an l1 that is an outer variable would act by its
            subgradient in an inner objective without being asked to.
    """

    def __init__(self, l1: Strength = 0.0, l2: Strength = 0.0, *, subgradient: bool = False) -> None:
        self.l1 = checked_strength("l1", l1)
        self.l2 = checked_strength("l2", l2)
        self.subgradient = bool(subgradient)

    @property
    def has_l1(self) -> bool:
        """Whether there is an l1 part: its strength is an outer variable or not zero."""
        return isinstance(self.l1, OuterVariable) or bool(np.any(self.l1))

    @property
    def _needs_a_proximal_step(self):
        return isinstance(self.l1, OuterVariable) and not self.subgradient

    def __call__(self, x: Array) -> Tensor:
        weights = tf.convert_to_tensor(x)
        # Proximal dynamics that have taken over the l1 part do what its subgradient would do.
        taken_over = self.has_l1 and functional.is_taken_over(x)
        kinked = tf.stop_gradient(weights) if taken_over else weights
        if self._needs_a_proximal_step and not taken_over and functional.is_training_step():
            strength: Any = self.l1
            raise ValueError(
                f"A learned l1 strength needs a proximal step. {strength.name!r} acts by a subgradient here, whose "
                f"steps never settle at zero: its hypergradient would say little. {_ADVICE}")
        return _penalty("l1", self.l1, tf.abs(kinked)) + _penalty("l2", self.l2, tf.square(weights))

    def get_config(self) -> Config:
        strengths = {name: serialized(strength) if isinstance(strength, OuterVariable) else strength.tolist()
                     for name, strength in (("l1", self.l1), ("l2", self.l2))}
        return {**strengths, "subgradient": self.subgradient}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**deserialized(config, "l1", "l2"))


def check_no_subgradients(variables: Variables, dynamics: InnerDynamics) -> None:
    """Refuses learned l1 strengths that dynamics without a proximal step would apply by their subgradient.

    Args:
        variables: List of `keras.Variable`, the inner variables.
        dynamics: An `InnerDynamics`.

    Raises:
        ValueError: If there is one whose regularizer does not ask for that; the variables are named.
    """
    paths = [variable.path for variable in variables
             if isinstance(variable.regularizer, L1L2) and variable.regularizer._needs_a_proximal_step]
    if paths:
        raise ValueError(
            f"A learned l1 strength needs a proximal step. That of {', '.join(map(repr, paths))} is an outer variable "
            f"under {type(dynamics).__name__}, whose subgradient steps never settle at zero: its hypergradient would "
            f"say little. {_ADVICE}")


def _penalty(name, strength, magnitudes):
    if isinstance(strength, OuterVariable):
        strength = value_of(strength)
    elif not np.any(strength):
        return tf.zeros([], magnitudes.dtype)
    shape, target = tuple(strength.shape), tuple(magnitudes.shape)
    if len(shape) > len(target) or any(
            size not in (1, entries) for size, entries in zip(reversed(shape), reversed(target))):
        raise ValueError(f"{name} must broadcast to the shape of the weights, {target}. Received shape: {shape}")
    return tf.reduce_sum(tf.cast(strength, magnitudes.dtype) * magnitudes)

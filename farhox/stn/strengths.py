"""Strengths of perturbations: a hyperparameter or a number; the mask of what dropout keeps, with its derivative."""

import math
import numbers
from typing import Any

import tensorflow as tf

from farhox._core.types import Tensor
from farhox.outer.outer_variable import OuterVariable


def kept(uniform: Tensor, rate: Tensor) -> Tensor:
    """The mask of what dropout keeps: 1 where a uniform number in [0, 1) is not below the rate, 0 elsewhere.

    A mask has no derivative, but its mean has. With respect to one rate for all, an entry that is kept changes by
    -1 / (2 (1 - rate)) and one that is dropped by -1 / (2 rate). Averaged over masks, that is the derivative of the
    mean of a function that is quadratic in each entry, and for others the trapezoidal rule between dropped and kept.
    A rate per example is a draw, a constant.

    Args:
        uniform: Floating-point tensor.
        rate: Tensor of the same type in a shape that broadcasts to it.

    Reference:
        [Liu et al., 2023](https://arxiv.org/abs/2304.08612) (Heun's method for the derivative of a draw).
    """
    if rate.shape.rank:
        return tf.cast(uniform >= rate, uniform.dtype)

    @tf.custom_gradient
    def mask(rate):
        keeps = uniform >= rate

        def gradient(upstream):
            slopes = tf.where(keeps, 0.5 / (rate - 1.0), -0.5 / rate)  # Where all are kept or dropped, one is infinite.
            dtype = tf.float64 if upstream.dtype == tf.float64 else tf.float32  # Sums in half precision are coarse.
            return tf.cast(tf.reduce_sum(tf.cast(upstream, dtype) * tf.cast(slopes, dtype)), rate.dtype)

        return tf.cast(keeps, uniform.dtype), gradient

    return mask(rate)


def checked_strength(strength: Any, name: str, least: float, greatest: float) -> Any:
    """The strength, if it is a scalar that stays within its range."""
    if isinstance(strength, OuterVariable):
        low, high, shape = strength.low, strength.high, tuple(strength.variable.shape)
        if shape:
            raise ValueError(f"{name} must be a scalar hyperparameter. Received: {strength!r}")
    elif isinstance(strength, numbers.Real) and not isinstance(strength, bool):
        low, high = float(strength), float(strength)
    else:
        raise TypeError(f"{name} must be a number or a farhox.Hyperparameter. Received: {strength!r}")
    inside = low is not None and low >= least and (high is None or high < math.inf) and (
        greatest == math.inf or (high is not None and high <= greatest))
    if not inside:
        raise ValueError(f"{name} must stay between {least} and {greatest}: give a hyperparameter bounds. "
                         f"Received: {strength!r} between {low} and {high}")
    return strength

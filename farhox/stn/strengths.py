"""Strengths of perturbations: a hyperparameter, of which no derivative is taken, or a number."""

import math
import numbers
from typing import Any

import tensorflow as tf

from farhox._core.types import Tensor
from farhox.outer.outer_variable import OuterVariable, Strength, value_of


def strength_value(strength: Strength) -> Tensor:
    """A hyperparameter's value without derivative, or the number."""
    return tf.stop_gradient(value_of(strength))


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

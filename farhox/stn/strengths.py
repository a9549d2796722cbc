"""Strengths of perturbations: a hyperparameter, of which no derivative is taken, or a number."""

import math

import tensorflow as tf

from farhox._core import checks
from farhox.outer.hyperparameters import Hyperparameter


def strength_value(strength):
    """A hyperparameter's value without derivative, or the number."""
    return tf.stop_gradient(strength()) if isinstance(strength, Hyperparameter) else tf.constant(float(strength))


def checked_strength(strength, name, least, greatest):
    """The strength, if it is a scalar that stays within its range."""
    if isinstance(strength, Hyperparameter):
        low, high, shape = strength.low, strength.high, tuple(strength.variable.shape)
        if shape:
            raise ValueError(f"{name} must be a scalar hyperparameter. Received: {strength!r}")
    elif checks.is_number(strength):
        low, high = strength, strength
    else:
        raise TypeError(f"{name} must be a number or a farhox.Hyperparameter. Received: {strength!r}")
    if low is None or low < least or (math.isfinite(greatest) and (high is None or high > greatest)):
        raise ValueError(f"{name} must stay between {least} and {greatest}: give a hyperparameter bounds. "
                         f"Received: {strength!r} between {low} and {high}")
    return strength

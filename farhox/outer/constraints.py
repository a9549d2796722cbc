"""Constraints that outer optimizers enforce by projection after each update, as Keras constraints.

Each one is the Euclidean projection on a convex set: the nearest point that obeys the rule. To use one, set it on the
variable (`variable.constraint = farhox.constraints.Simplex()`), since the constructor of `keras.Variable` ignores the
argument.
"""

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Array, Config, Tensor


@keras.saving.register_keras_serializable(package="farhox")
class Box(keras.constraints.Constraint):
    """Euclidean projection on {low <= w <= high}: clip(w, low, high).

    Args:
        low: Float or None, the least value of an entry.
        high: Float or None, the greatest value of an entry.

    Raises:
        ValueError: If no bound is given, a bound is not a finite number, or low is not less than high.
    """

    def __init__(self, low: float | None = None, high: float | None = None) -> None:
        for name, bound in (("low", low), ("high", high)):
            if bound is not None and not checks.is_number(bound):
                raise ValueError(f"{name} must be a finite number or None. Received: {name}={bound!r}")
        if low is None and high is None:
            raise ValueError("A box needs a bound. Received: low=None, high=None")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"low must be less than high. Received: low={low}, high={high}")
        self.low = None if low is None else float(low)
        self.high = None if high is None else float(high)

    def __call__(self, w: Array) -> Tensor:
        values = tf.convert_to_tensor(w)
        if self.low is not None:
            values = tf.maximum(values, self.low)
        if self.high is not None:
            values = tf.minimum(values, self.high)
        return values

    def get_config(self) -> Config:
        return {"low": self.low, "high": self.high}


@keras.saving.register_keras_serializable(package="farhox")
class Simplex(keras.constraints.Constraint):
    """Euclidean projection on {w >= 0, sum(w) = total}, or with `at_most` on {w >= 0, sum(w) <= total}.

    The sum goes over all entries. The projection is max(w - shift, 0) with the shift that makes the sum right; it
    depends on the shift piecewise linearly, so that sorting gives the exact answer.

    Args:
        total: Positive float, the sum.
        at_most: Bool. The sum may be less than the total: entries are set off against each other only when their
            positive parts exceed it.

    Raises:
        ValueError: If the total is not a positive finite number.
    """

    def __init__(self, total: float = 1.0, at_most: bool = False) -> None:
        self.total = checks.positive_number("total", total)
        self.at_most = bool(at_most)

    def __call__(self, w: Array) -> Tensor:
        values = tf.convert_to_tensor(w)
        flat = tf.cast(tf.reshape(values, [-1]), tf.float64)
        shift = _shift_to_sum(flat, self.total)
        if self.at_most:
            shift = tf.where(tf.reduce_sum(tf.nn.relu(flat)) <= self.total, tf.zeros_like(shift), shift)
        return tf.reshape(tf.cast(tf.nn.relu(flat - shift), values.dtype), tf.shape(values))

    def get_config(self) -> Config:
        return {"total": self.total, "at_most": self.at_most}


@keras.saving.register_keras_serializable(package="farhox")
class CappedSimplex(keras.constraints.Constraint):
    """Euclidean projection on {0 <= w <= 1, sum(w) <= budget}.

    The sum goes over all entries. The projection is clip(w - shift, 0, 1) with the smallest shift >= 0 that keeps the
    budget; it depends on the shift piecewise linearly, so that sorting gives the exact answer.

    Args:
        budget: Positive float, the largest sum.

    Raises:
        ValueError: If the budget is not a positive finite number.

    Reference:
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785), section 5.1 (data hyper-cleaning).
    """

    def __init__(self, budget: float) -> None:
        self.budget = checks.positive_number("budget", budget)

    def __call__(self, w: Array) -> Tensor:
        values = tf.convert_to_tensor(w)
        flat = tf.cast(tf.reshape(values, [-1]), tf.float64)
        within = tf.reduce_sum(tf.clip_by_value(flat, 0.0, 1.0)) <= self.budget
        shift = tf.where(within, tf.zeros([], flat.dtype), _shift_to_sum(flat, self.budget, capped=True))
        return tf.reshape(tf.cast(tf.clip_by_value(flat - shift, 0.0, 1.0), values.dtype), tf.shape(values))

    def get_config(self) -> Config:
        return {"budget": self.budget}


def _shift_to_sum(flat, total, capped=False):
    """The shift at which sum(max(flat - shift, 0)), or `capped` sum(clip(flat - shift, 0, 1)), is `total`.

    Going down from the largest entry, an entry w is 0 until the shift reaches w, rises with slope 1 and, capped, is 1
    from w - 1 on. The sum is piecewise linear between these breakpoints, and the shift is solved for in its piece. In
    double precision whatever the variable's type, because rounding of the running sum grows with the number of entries.
    """
    breakpoints, bends = -flat, tf.ones_like(flat)
    if capped:
        breakpoints = tf.concat([breakpoints, 1.0 - flat], axis=0)
        bends = tf.concat([bends, -bends], axis=0)
    order = tf.argsort(breakpoints)
    falls = tf.gather(breakpoints, order)
    slopes = tf.cumsum(tf.gather(bends, order))
    sums = tf.concat([tf.zeros([1], flat.dtype), tf.cumsum(slopes[:-1] * (falls[1:] - falls[:-1]))], axis=0)
    piece = tf.searchsorted(sums, tf.constant([total], flat.dtype), side="left")[0] - 1
    return -(falls[piece] + tf.math.divide_no_nan(total - sums[piece], slopes[piece]))

"""Constraints that outer optimizers enforce by projection after each update, as Keras constraints."""

import keras
import tensorflow as tf


class CappedSimplex(keras.constraints.Constraint):
    """Euclidean projection on {0 <= w <= 1, sum(w) <= budget}.

    The projection is clip(w - shift, 0, 1) with the smallest shift >= 0 that keeps the budget. The sum is piecewise
    linear and decreasing in the shift; its breakpoints are sorted and the shift is solved for in the right piece, so
    the result is exact to rounding.

    Args:
        budget: Positive float, the largest sum.

    Raises:
        ValueError: If the budget is not positive.

    Reference:
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785), section 5.1 (data hyper-cleaning).
    """

    def __init__(self, budget):
        if not budget > 0:
            raise ValueError(f"budget must be positive. Received: budget={budget}")
        self.budget = float(budget)

    def __call__(self, w):
        values = tf.convert_to_tensor(w)
        flat = tf.reshape(values, [-1])
        budget = tf.cast(self.budget, flat.dtype)
        # Going through the shifts in rising order, an entry w is 1 up to w - 1, falls with slope -1 and is 0 from w on.
        breakpoints = tf.concat([flat - 1.0, flat], axis=0)
        bends = tf.concat([-tf.ones_like(flat), tf.ones_like(flat)], axis=0)
        order = tf.argsort(breakpoints)
        shifts = tf.gather(breakpoints, order)
        slopes = tf.cumsum(tf.gather(bends, order))
        # Sum of the clipped entries at each breakpoint: it starts at the number of entries.
        drops = slopes[:-1] * (shifts[1:] - shifts[:-1])
        sums = tf.cast(tf.size(flat), flat.dtype) + tf.concat([tf.zeros([1], flat.dtype), tf.cumsum(drops)], axis=0)
        last = tf.maximum(tf.reduce_sum(tf.cast(sums >= budget, tf.int32)) - 1, 0)
        slope = slopes[last]
        step = tf.where(slope < 0, (budget - sums[last]) / tf.where(slope < 0, slope, -tf.ones_like(slope)),
                        tf.zeros_like(slope))
        shift = tf.maximum(shifts[last] + step, 0.0)
        shift = tf.where(tf.reduce_sum(tf.clip_by_value(flat, 0.0, 1.0)) <= budget, tf.zeros_like(shift), shift)
        return tf.reshape(tf.clip_by_value(flat - shift, 0.0, 1.0), tf.shape(values))

    def get_config(self):
        return {"budget": self.budget}

"""The learning rate of a tuned run: the sweep that finds it, and the annealing that ends it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Tensor


class Rate:
    """A learning rate as a function of the step: rising in the sweep, annealed along a cosine in training.

    In training rate(t) = value * schedule(t) * annealing(t), with annealing(t) = (1 + cos(pi x)) / 2 where x goes from
    0 to 1 over the last part of the steps. In the sweep rate(t) = exp(first + t * slope).

    Args:
        hyperparameter: The `Hyperparameter` of the value.
        schedule: The optimizer's own `LearningRateSchedule`, or None.
    """

    def __init__(self, hyperparameter: Any, schedule: Any) -> None:
        self._hyperparameter, self._schedule = hyperparameter, schedule
        # Whether it sweeps, first, slope; steps in all, share of them that is annealed.
        self._sweep = keras.Variable(np.zeros(3), trainable=False, dtype="float32")
        self._annealing = keras.Variable([1.0, 0.0], trainable=False, dtype="float32")

    def __call__(self, step: Tensor) -> Tensor:
        step = tf.cast(step, tf.float32)
        sweeps, first, slope = tf.unstack(tf.convert_to_tensor(self._sweep))
        return tf.where(sweeps > 0, tf.exp(first + slope * step), self._of_training(step))

    def sweep(self, low: float, high: float, steps: int) -> None:
        """Lets the rate rise from `low` to `high` over the steps."""
        self._sweep.assign([1.0, math.log(low), math.log(high / low) / max(1, steps - 1)])

    def train(self, steps: Any, annealed: float) -> None:
        """Lets the rate be that of a training of so many steps, of which the share `annealed` ends in a cosine."""
        self._sweep.assign([0.0, 0.0, 0.0])
        self._annealing.assign([float(steps), float(annealed)])

    def state(self) -> list[Any]:
        """What `sweep` and `train` have set, a list of arrays."""
        return [self._sweep.numpy(), self._annealing.numpy()]

    def restore(self, state: list[Any]) -> None:
        """Takes back what `state` returned."""
        for variable, value in zip((self._sweep, self._annealing), state):
            variable.assign(value)

    def at(self, steps: Any) -> np.ndarray:
        """The values at an array of steps in training, as float64."""
        return np.asarray(self._of_training(tf.constant(steps, tf.float32)), "float64")

    def mean_of_schedule(self, steps: int) -> float:
        """The mean of the optimizer's own schedule over so many steps, 1 without one."""
        if self._schedule is None:
            return 1.0
        return float(tf.reduce_mean(tf.map_fn(self._schedule, tf.range(steps, dtype=tf.float32))))

    def _of_training(self, step):
        total, annealed = tf.unstack(tf.convert_to_tensor(self._annealing))
        progress = 1.0 - (total - step) / tf.maximum(annealed * total, 1.0)
        factor = 0.5 * (1.0 + tf.cos(math.pi * tf.clip_by_value(progress, 0.0, 1.0)))
        if self._schedule is not None:
            shape = tf.map_fn(self._schedule, step) if step.shape.rank else self._schedule(step)
            factor *= tf.cast(shape, tf.float32)
        return tf.cast(self._hyperparameter(), tf.float32) * factor


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep of the learning rate.

    Attributes:
        rates, losses: Arrays, the rate and the training loss of each step.
        stop: The rate at which the smoothed loss exceeded `tolerance` times its minimum, or the last one.
        stopped: Whether it did.
        least: The least smoothed loss.
    """

    rates: np.ndarray
    losses: np.ndarray
    stop: float
    stopped: bool
    least: float


def read_sweep(rates: np.ndarray, losses: np.ndarray, tolerance: float = 1.5, smoothing: float = 0.8) -> Sweep:
    """Where a sweep stops: at the first smoothed loss above `tolerance` times the smallest so far, or not a number.

    Args:
        rates, losses: Arrays of the steps so far.
        tolerance: Float greater than 1.
        smoothing: Float in [0, 1), of an exponential average without bias.

    Returns:
        A `Sweep`.

    Reference:
        [Smith, 2015](https://arxiv.org/abs/1506.01186), the range test.
    """
    average, weight, least = 0.0, 0.0, math.inf
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            return Sweep(rates[:index + 1], losses[:index + 1], float(rates[index]), True, least)
        average = smoothing * average + (1.0 - smoothing) * loss
        weight = smoothing * weight + (1.0 - smoothing)
        smoothed = average / weight
        least = min(least, smoothed)
        if index >= 3 and smoothed > least + (tolerance - 1.0) * max(abs(least), 1e-3 * abs(losses[0])):
            return Sweep(rates[:index + 1], losses[:index + 1], float(rates[index]), True, least)
    return Sweep(rates, losses, float(rates[-1]), False, least)

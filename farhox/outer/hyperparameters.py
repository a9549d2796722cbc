"""Outer variables that a person reads and sets in natural units: hyperparameters, example weights, schedules."""

from __future__ import annotations

import math

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Array, Config, DType, Tensor
from farhox.outer.constraints import CappedSimplex
from farhox.outer.outer_variable import OuterVariable


@keras.saving.register_keras_serializable(package="farhox")
class Hyperparameter(OuterVariable):
    """A scalar or array that is kept within its bounds by a smooth map.

    With u the unconstrained variable the value is low + (high - low) sigmoid(u) for two bounds, low + softplus(u) or
    high - softplus(u) for one, u for none, and exp(u) for `log=True`.

    ```python
    learning_rate = farhox.Hyperparameter(0.1, low=0.0, log=True, name="learning_rate")
    ```

    Args:
        initial: Float or array, the initial value, strictly inside the bounds.
        low: Float or None, the greatest lower bound.
        high: Float or None, the least upper bound.
        log: Bool. Use exp(u), so that an outer step multiplies the value. Needs `low=0.0` and no `high`.
        discrete: Bool. Floor the value where it is used. It then has no derivative: for self-tuning networks only.
        name: Name in logs and errors.
        dtype: Floating-point type of the variable; default: `keras.config.floatx()`.

    Raises:
        ValueError: If the bounds are the wrong way round, the initial value is not strictly inside them, or `log` is
            given with other bounds than `low=0.0`, or the dtype is not floating-point, or cannot hold a bound, or the
            initial value strictly inside the bounds.
        TypeError: If the initial value is not a number or an array of numbers, or the name not a string.
    """

    def __init__(self, initial: Array, low: float | None = None, high: float | None = None, log: bool = False,
                 discrete: bool = False, name: str = "hyperparameter", dtype: DType | None = None) -> None:
        self.low, self.high = _bound("low", low, name), _bound("high", high, name)
        self.log = bool(log)
        self.discrete = bool(discrete)
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be less than high. Received for {name!r}: low={low}, high={high}")
        if self.log and (self.low != 0.0 or self.high is not None):
            raise ValueError(
                f"log=True needs low=0.0 and no high bound. Received for {name!r}: low={low}, high={high}")
        unconstrained = self._unconstrained(_number_array(initial, name), name)
        super().__init__(unconstrained, name, dtype, low=self.low, high=self.high)
        self._check_held(unconstrained)

    def __call__(self) -> Tensor:
        """The value as a differentiable tensor; floored, without derivative, for a discrete hyperparameter."""
        value = self.natural_value()
        return tf.floor(value) if self.discrete else value

    def value(self, step: Tensor | None = None) -> Tensor:
        """The value as a setting: that of a call."""
        del step
        return self()

    def natural_value(self) -> Tensor:
        return self._natural(tf.convert_to_tensor(self.variable))

    def _natural(self, u):
        if self.log:
            return tf.exp(u)
        if self.low is not None and self.high is not None:
            return self.low + (self.high - self.low) * tf.sigmoid(u)
        if self.low is not None:
            return self.low + tf.nn.softplus(u)
        if self.high is not None:
            return self.high - tf.nn.softplus(u)
        return tf.identity(u)

    def assign(self, value: Array) -> None:
        """Sets the value in natural units.

        Raises:
            ValueError: If it is outside the bounds, the type cannot hold it, or it has another shape.
        """
        value = _number_array(value, self.name)
        if value.shape != tuple(self.variable.shape):
            raise ValueError(f"A value for {self.name!r} must have shape {tuple(self.variable.shape)}. "
                             f"Received shape: {value.shape}")
        unconstrained = self._unconstrained(value, self.name)
        self._check_held(unconstrained)
        self.variable.assign(unconstrained)

    def _check_held(self, unconstrained):
        with tf.init_scope():  # Values, also while a graph is traced.
            self._check_representable(self._natural(tf.constant(unconstrained, self.variable.dtype)))

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self(), dtype, name=name)

    def get_config(self) -> Config:
        """Settings and the current unconstrained value, for layers that hold a hyperparameter and are saved."""
        unconstrained = keras.ops.convert_to_numpy(self.variable).tolist()
        return {"unconstrained": unconstrained, "low": self.low, "high": self.high, "log": self.log,
                "discrete": self.discrete, "name": self.name, "dtype": self.variable.dtype}

    @classmethod
    def from_config(cls, config: Config) -> Hyperparameter:
        settings = {key: value for key, value in config.items() if key != "unconstrained"}
        low, high = settings["low"], settings["high"]
        inside = 0.5 * (low + high) if low is not None and high is not None else (
            low + max(1.0, abs(low)) if low is not None else high - max(1.0, abs(high)) if high is not None else 0.0)
        unconstrained = _number_array(config["unconstrained"], settings["name"])
        if not np.all(np.isfinite(unconstrained)):
            raise ValueError(f"The unconstrained value of {settings['name']!r} must be finite. "
                             f"Received: {config['unconstrained']}")
        hyperparameter = cls(np.full(unconstrained.shape, inside), **settings)
        # The natural value may have been rounded to a bound, which the constructor refuses.
        hyperparameter.variable.assign(unconstrained)
        return hyperparameter

    def _unconstrained(self, value, name):
        too_low = self.low is not None and np.any(value <= self.low)
        too_high = self.high is not None and np.any(value >= self.high)
        if too_low or too_high or not np.all(np.isfinite(value)):
            raise ValueError(f"The value of {name!r} must be finite and strictly between its bounds "
                             f"low={self.low} and high={self.high}. Received: {value}")
        if self.log:
            return np.log(value)
        if self.low is not None and self.high is not None:
            fraction = (value - self.low) / (self.high - self.low)
            return np.log(fraction) - np.log1p(-fraction)
        if self.low is not None:
            return _inverse_softplus(value - self.low)
        if self.high is not None:
            return _inverse_softplus(self.high - value)
        return value


class ExampleWeights(OuterVariable):
    """One weight for every training example, each in (0, 1), or in [0, 1] within a budget.

    Without a budget the weight is the sigmoid of an unconstrained number. With one the variable holds the weights
    themselves, and the outer optimizer projects them on {0 <= w <= 1, sum(w) <= budget} after each update, so that
    weights of useless examples become exactly zero.

    Args:
        num_examples: Positive int.
        initial: Float, the initial weight of every example. Default: 0.5, or budget / num_examples.
        budget: Positive float or None.
        name: Name in logs and errors.
        dtype: Floating-point type of the variable; default: `keras.config.floatx()`.

    Raises:
        ValueError: If an argument is out of range, or the dtype cannot hold the initial weight.

    Reference:
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785), section 5.1 (data hyper-cleaning).
    """

    def __init__(self, num_examples: int, initial: float | None = None, budget: float | None = None,
                 name: str = "example_weights", dtype: DType | None = None) -> None:
        self.num_examples = checks.positive_integer("num_examples", num_examples)
        if initial is not None:
            checks.finite_number("initial", initial)
        if budget is not None:
            checks.positive_number("budget", budget)
        if initial is None:
            initial = 0.5 if budget is None else min(1.0, budget / num_examples)
        if budget is None and not 0.0 < initial < 1.0:
            raise ValueError(f"The initial weight must be strictly between 0 and 1. Received: initial={initial}")
        if budget is not None and not (0.0 <= initial <= 1.0 and initial * num_examples <= budget * (1 + 1e-6)):
            raise ValueError("The initial weight must be in [0, 1] and its sum over all examples within the budget. "
                             f"Received: initial={initial}, num_examples={num_examples}, budget={budget}")
        self.budget = budget
        start = math.log(initial) - math.log1p(-initial) if budget is None else initial
        super().__init__(np.full([num_examples], start), name, dtype, low=0.0, high=1.0)
        if budget is None:
            with tf.init_scope():
                self._check_representable(tf.sigmoid(tf.constant(start, self.variable.dtype)))
        else:
            # A constraint given to the constructor of keras.Variable is ignored.
            self.variable.constraint = CappedSimplex(budget)

    def __call__(self, indices: Array) -> Tensor:
        """Weights of the examples `indices`: an integer tensor of shape [batch] to a tensor of shape [batch].

        Raises:
            TypeError: If the indices are not integers.
        """
        if indices is None:
            raise TypeError(f"indices of {self.name!r} must be integers. Received: None")
        indices = tf.convert_to_tensor(indices)
        if not indices.dtype.is_integer:
            raise TypeError(f"indices of {self.name!r} must be integers. Received dtype: {indices.dtype.name}")
        if tf.executing_eagerly() and not tf.reduce_all((indices >= 0) & (indices < self.num_examples)):
            raise ValueError(f"indices of {self.name!r} must be from 0 to {self.num_examples - 1}. "
                             f"Received: {indices.numpy()}")
        chosen = tf.gather(tf.convert_to_tensor(self.variable), indices)
        # XLA drops the check of `gather` and clamps: what was asked for is then not a number.
        inside = (indices >= 0) & (indices < self.num_examples)
        chosen = tf.where(inside, chosen, tf.constant(float("nan"), chosen.dtype))
        return tf.sigmoid(chosen) if self.budget is None else chosen

    def natural_value(self) -> Tensor:
        value = tf.convert_to_tensor(self.variable)
        return tf.sigmoid(value) if self.budget is None else tf.identity(value)

    def value(self, step: Tensor | None = None) -> Tensor:
        """Weights belong to examples: they are no setting.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"Weights of examples are no setting: they are asked for by their index, {self.name}(indices). "
                        f"Received: {self!r} in the place of one.")


class LearnedSchedule(OuterVariable):
    """One positive value for each inner step, a learning rate for example; the last one holds beyond the end.

    Args:
        steps: Positive int, the number of inner steps.
        initial: Positive float, or array of shape [steps].
        name: Name in logs and errors.
        dtype: Floating-point type of the variable; default: `keras.config.floatx()`.

    Raises:
        ValueError: If an argument is out of range, or the dtype cannot hold a value.
        TypeError: If the initial value is not a number or an array of numbers.
    """

    log = True
    changes_with_step = True

    def __init__(self, steps: int, initial: Array = 0.1, name: str = "schedule", dtype: DType | None = None) -> None:
        self.steps = checks.positive_integer("steps", steps)
        values = _number_array(initial, name)
        if values.shape not in ((), (steps,)) or not np.all(np.isfinite(values)) or np.any(values <= 0):
            raise ValueError("The initial value of a schedule must be positive, a number or one per step. "
                             f"Received for {name!r}: {initial}")
        start = np.log(np.broadcast_to(values, [self.steps]))
        super().__init__(start, name, dtype, low=0.0)
        with tf.init_scope():
            self._check_representable(tf.exp(tf.constant(start, self.variable.dtype)))

    def __call__(self, step: Tensor | int) -> Tensor:
        """The value at the inner step `step`, a scalar integer tensor."""
        return tf.exp(tf.gather(tf.convert_to_tensor(self.variable), tf.clip_by_value(step, 0, self.steps - 1)))

    def natural_value(self) -> Tensor:
        return tf.exp(tf.convert_to_tensor(self.variable))

    def value(self, step: Tensor | None = None) -> Tensor:
        """The value at an inner step.

        Raises:
            ValueError: If there is none: outside of inner training a schedule has no one value.
        """
        if step is None:
            raise ValueError(f"A schedule has a value at each inner step, and no step is known here. "
                             f"Received: {self!r} in the place of a setting that does not change.")
        return self(step)

    def to_keras(self) -> keras.optimizers.schedules.LearningRateSchedule:
        """The current values as a schedule of Keras, for training that goes on without farhox.

        Steps with the same value as the one before share a piece. Keras goes through all pieces in every step: a
        thousand of them cost some seconds when training starts and some milliseconds per step.

        Returns:
            A `keras.optimizers.schedules.PiecewiseConstantDecay` with the value of step t at `optimizer.iterations` t,
            in Keras' default floating-point type.
        """
        values = self.numpy().tolist()
        # Keras takes values[i] up to and including boundaries[i].
        boundaries = [step for step in range(self.steps - 1) if values[step] != values[step + 1]]
        pieces = [values[step] for step in boundaries] + [values[-1]]
        # A single piece needs a boundary too.
        return keras.optimizers.schedules.PiecewiseConstantDecay(
            boundaries or [0], pieces if boundaries else pieces * 2)


def _number_array(value, name):
    try:
        array = np.asarray(value)
    except ValueError:  # A ragged list.
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"The value of {name!r} must be a number or an array of numbers. "
                        f"Received: {value!r} of type {type(value).__name__}")
    if array.size == 0:
        raise ValueError(f"The value of {name!r} must have at least one entry. Received shape: {array.shape}")
    return array.astype("float64")


def _bound(kind, bound, name):
    if bound is None:
        return None
    if not checks.is_number(bound):
        raise ValueError(f"{kind} must be a finite number or None. Received for {name!r}: {kind}={bound!r}")
    return float(bound)


def _inverse_softplus(value):
    # log(exp(value) - 1) without overflow.
    return value + np.log(-np.expm1(-value))

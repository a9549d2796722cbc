"""What is learned, in natural units: the protocol of outer variables, and what a setting is worth at an inner step."""

from __future__ import annotations

import abc
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Array, Config, DType, Tensor


class OuterVariable(abc.ABC):
    """A quantity in natural units that is a function of one unconstrained Keras variable.

    A subclass says how: `natural_value` is the whole of it, and `value` what it is worth at an inner step. It can then
    be named in `outer_variables` and stand wherever farhox takes a `Hyperparameter` as a setting: a learning rate or
    another setting of the dynamics, a proximal strength, the strength of a regularizer, weights of classes.

    ```python
    class Decaying(farhox.OuterVariable):
        def __init__(self, initial):
            super().__init__(np.log(initial), "decaying", low=0.0)

        def natural_value(self):
            return keras.ops.exp(self.variable)

        def value(self, step=None):
            return self.natural_value() if step is None else self.natural_value() * 0.9 ** tf.cast(step, "float32")
    ```

    `float(h)`, `format(h, ".3f")` and `numpy()` give the current value in natural units, and arithmetic, comparisons
    and TensorFlow operations take it as a differentiable tensor, as with a `keras.Variable`. Two outer variables are
    equal where they are the same object: they can be in sets and keys of dictionaries.

    What else a subclass can say: `assign`, so that plots and `Tuner` can set it; `get_config` (and `from_config`), with
    `keras.saving.register_keras_serializable`, so that layers that hold it can be saved to a file.

    Args:
        unconstrained: Number or array, the initial value of the variable.
        name: Name in logs and errors.
        dtype: Floating-point type of the variable; default: `keras.config.floatx()`.
        low: Float or None, no value is below it.
        high: Float or None, no value is above it.

    Attributes:
        variable: The `keras.Variable` that outer optimizers update.
        name, low, high: As given.
        log: Bool, whether the value is an exponential of the variable: a step multiplies it, and 0 has lost it.
        discrete: Bool, whether `value` is floored and has no derivative.
        changes_with_step: Bool, whether `value` is a schedule, another one at each inner step. Keras optimizers that
            ask whether their learning rate is one (Adafactor) are told so.

    Raises:
        ValueError: If the dtype is not floating-point, or cannot hold the value or a bound.
        TypeError: If the name is not a string.
    """

    log = False
    discrete = False
    changes_with_step = False
    # NumPy's numbers leave arithmetic to the methods below.
    __array_ufunc__ = None

    def __init__(self, unconstrained: Array, name: str, dtype: DType | None = None, low: float | None = None,
                 high: float | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string. Received: {name!r}")
        dtype = keras.backend.standardize_dtype(dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(f"The dtype of {name!r} must be floating-point. Received: {dtype}")
        self.name, self.low, self.high = name, low, high
        for kind, bound in (("low", low), ("high", high)):
            if bound is not None and not _holds(dtype, bound):
                raise ValueError(f"The dtype of {name!r}, {dtype}, must be able to hold its bounds. "
                                 f"Received: {kind}={bound}")
        if low is not None and high is not None and not _rounded(dtype, low) < _rounded(dtype, high):
            raise ValueError(f"The dtype of {name!r}, {dtype}, must be able to tell its bounds apart. "
                             f"Received: low={low}, high={high}")
        unconstrained = np.asarray(unconstrained)
        if not np.all(np.isfinite(_rounded(dtype, unconstrained))):
            raise ValueError(f"The dtype of {name!r}, {dtype}, must be able to hold its value. "
                             f"Received the unconstrained value: {unconstrained}")
        self.variable = OwnedVariable(self, unconstrained, dtype)

    @abc.abstractmethod
    def natural_value(self) -> Tensor:
        """The whole value in natural units as a differentiable tensor of the variable's shape."""

    def value(self, step: Tensor | None = None) -> Tensor:
        """The value where it is used as a setting, a differentiable tensor.

        Args:
            step: Scalar integer tensor, the inner step; None outside of inner training.
        """
        del step
        return self.natural_value()

    def assign(self, value: Array) -> None:
        """Sets the value in natural units.

        Raises:
            NotImplementedError: If the subclass does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method assign(value) to be set in natural units. "
                                  f"Received for {self.name!r}: {value!r}")

    def get_config(self) -> Config:
        """What `from_config` makes the outer variable of, for saved files.

        Raises:
            NotImplementedError: If the subclass does not say.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must have get_config and be registered with "
            f"keras.saving.register_keras_serializable to be saved. Received: {self!r}")

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**config)

    def numpy(self) -> np.ndarray:
        """The current value in natural units as a NumPy array."""
        return keras.ops.convert_to_numpy(self.natural_value())

    def __repr__(self):
        shape = tuple(self.variable.shape)
        # In a graph, where errors are written too, there is no value.
        value = f"value={self.numpy():.6g}" if not shape and tf.executing_eagerly() else f"shape={shape}"
        return f"<{type(self).__name__} {self.name!r}, {value}>"

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self.natural_value(), dtype, name=name)

    def __float__(self):
        if tuple(self.variable.shape):
            raise TypeError(f"Only a scalar can become a float. Received {self.name!r} of shape "
                            f"{tuple(self.variable.shape)}")
        return float(self.numpy())

    def __format__(self, specification):
        return format(float(self), specification) if specification else str(self)

    def __int__(self):
        return int(float(self))

    def __bool__(self):
        raise TypeError(f"An outer variable is not a boolean: compare its value with a number. Received: {self!r}")

    def __round__(self, digits=None):
        return keras.ops.round(tf.convert_to_tensor(self), digits or 0)

    def __eq__(self, other):
        # As keys of dictionaries and of traces, two outer variables are what they are and not what they are worth.
        if isinstance(other, OuterVariable) or not _is_operand(other):
            return NotImplemented
        return keras.ops.equal(*_operands(self, other))

    def __ne__(self, other):
        if isinstance(other, OuterVariable) or not _is_operand(other):
            return NotImplemented
        return keras.ops.not_equal(*_operands(self, other))

    __hash__ = object.__hash__

    def __lt__(self, other):
        return keras.ops.less(*_operands(self, other))

    def __le__(self, other):
        return keras.ops.less_equal(*_operands(self, other))

    def __gt__(self, other):
        return keras.ops.greater(*_operands(self, other))

    def __ge__(self, other):
        return keras.ops.greater_equal(*_operands(self, other))

    def __pos__(self):
        return tf.convert_to_tensor(self)

    def __neg__(self):
        return keras.ops.negative(tf.convert_to_tensor(self))

    def __abs__(self):
        return keras.ops.absolute(tf.convert_to_tensor(self))

    def __add__(self, other):
        return keras.ops.add(*_operands(self, other))

    def __radd__(self, other):
        return keras.ops.add(*_operands(other, self))

    def __sub__(self, other):
        return keras.ops.subtract(*_operands(self, other))

    def __rsub__(self, other):
        return keras.ops.subtract(*_operands(other, self))

    def __mul__(self, other):
        return keras.ops.multiply(*_operands(self, other))

    def __rmul__(self, other):
        return keras.ops.multiply(*_operands(other, self))

    def __truediv__(self, other):
        return keras.ops.true_divide(*_operands(self, other))

    def __rtruediv__(self, other):
        return keras.ops.true_divide(*_operands(other, self))

    def __floordiv__(self, other):
        return keras.ops.floor_divide(*_operands(self, other))

    def __rfloordiv__(self, other):
        return keras.ops.floor_divide(*_operands(other, self))

    def __mod__(self, other):
        return keras.ops.mod(*_operands(self, other))

    def __rmod__(self, other):
        return keras.ops.mod(*_operands(other, self))

    def __matmul__(self, other):
        return keras.ops.matmul(*_operands(self, other))

    def __rmatmul__(self, other):
        return keras.ops.matmul(*_operands(other, self))

    def __pow__(self, other):
        return keras.ops.power(*_operands(self, other))

    def __rpow__(self, other):
        return keras.ops.power(*_operands(other, self))

    def _check_representable(self, value):
        """Raises a ValueError if the variable's type cannot hold a natural value strictly between the bounds.

        Args:
            value: What `natural_value` gives, as an array.
        """
        dtype = self.variable.dtype
        value = np.asarray(value)
        low = self.low is not None and np.any(value <= _rounded(dtype, self.low))
        high = self.high is not None and np.any(value >= _rounded(dtype, self.high))
        if low or high or not np.all(np.isfinite(value)):
            raise ValueError(
                f"The dtype of {self.name!r}, {dtype}, must be able to hold its value strictly between its bounds "
                f"low={self.low} and high={self.high}. Received a value that becomes: {value}")


# What dynamics take as a learning rate or another setting, and what regularizers and layers take as a strength.
Setting: TypeAlias = float | keras.Variable | OuterVariable | Callable[[tf.Tensor], Any]
Strength: TypeAlias = float | np.ndarray | OuterVariable


class OwnedVariable(keras.Variable):
    """The variable of an `OuterVariable`, which it knows: who reads the variable can tell its name and its kind.

    Attributes:
        owner: The `OuterVariable`.
    """

    def __init__(self, owner: OuterVariable, unconstrained: Array, dtype: DType) -> None:
        super().__init__(unconstrained, dtype=dtype, name=owner.name, trainable=True)
        self.owner = owner


def owners(variables: Iterable[Any]) -> list[OuterVariable]:
    """The outer variables behind Keras variables, each once, in order; other variables are left out."""
    found = {id(v.owner): v.owner for v in variables if isinstance(v, OwnedVariable)}
    return list(found.values())


def value_of(setting: Setting, step: Tensor | None = None, dtype: DType | None = None) -> Tensor:
    """What a setting is worth at an inner step, a differentiable tensor.

    Args:
        setting: A number or array, a `keras.Variable`, an `OuterVariable`, or (with a step) a Keras
            `LearningRateSchedule` or another callable `step -> tensor`.
        step: Scalar integer tensor, the inner step; None outside of inner training.
        dtype: Type of the result; default: that of the value.
    """
    if isinstance(setting, OuterVariable):
        setting = setting.value(step)
    elif callable(setting) and not isinstance(setting, keras.Variable):
        setting = setting(step)
    if isinstance(setting, numbers.Real):
        return tf.constant(float(setting), dtype or keras.config.floatx())
    tensor = tf.convert_to_tensor(setting)
    return tensor if dtype is None else tf.cast(tensor, dtype)


def _is_operand(other):
    return isinstance(other, (numbers.Real, np.ndarray, tf.Tensor, keras.Variable, tf.Variable))


def _operands(*operands):
    return [tf.convert_to_tensor(operand) if isinstance(operand, OuterVariable) else operand for operand in operands]


def _rounded(dtype, value):
    """Numbers as the type holds them, in float64."""
    with np.errstate(over="ignore"):
        return np.asarray(value, "float64").astype(tf.as_dtype(dtype).as_numpy_dtype).astype("float64")


def _holds(dtype, bound):
    rounded = _rounded(dtype, bound)
    return np.isfinite(rounded) and (rounded != 0.0) == (bound != 0.0)

"""Settings of inner dynamics: what may be one, within which range, and what it is worth at a step.

A setting (a learning rate, a momentum) is a float, a `keras.Variable`, a `Hyperparameter`, a `LearnedSchedule` or
another `OuterVariable`, a Keras `LearningRateSchedule` or any callable `step -> tensor`; a learning rate may also be a
list with one of these per inner variable.
"""

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import DType, Tensor, Tensors, Variables
from farhox.outer.hyperparameters import ExampleWeights
from farhox.outer.outer_variable import OuterVariable, value_of


def check_setting(name: str, setting: Any, low: float | None = None, high: float | None = None,
                  above: float | None = None, below: float | None = None, per_variable: bool = False) -> None:
    """Raises an error unless `setting` is a setting, and what is known of its value is finite and in its range.

    Known are numbers, the current values of variables, and the start of a schedule of Keras' own.

    Args:
        name: Name in errors.
        setting: What came.
        low, high: The least and the greatest value, or None.
        above, below: What every value is greater and less than, or None.
        per_variable: Bool, whether a list of settings will do.

    Raises:
        TypeError: If it is no setting.
        ValueError: If a value is out of range.
    """
    if per_variable and isinstance(setting, (list, tuple)):
        if not setting:
            raise ValueError(f"{name} must have one entry per inner variable. Received: an empty list")
        for entry in setting:
            check_setting(name, entry, low, high, above, below)
        return
    if isinstance(setting, (bool, np.bool_, ExampleWeights)) or not (
            isinstance(setting, (numbers.Real, keras.Variable, OuterVariable)) or _takes_a_step(setting)):
        raise TypeError(
            f"{name} must be a float, a keras.Variable, a farhox.Hyperparameter, a Keras LearningRateSchedule or a "
            f"function of the step, step -> tensor{', or a list of these' if per_variable else ''}. "
            f"Received: {setting!r} of type {type(setting).__name__}")
    value = _known_value(setting)
    rules = {"finite": np.isfinite, f"at least {low}": lambda x: low is None or x >= low,
             f"at most {high}": lambda x: high is None or x <= high,
             f"greater than {above}": lambda x: above is None or x > above,
             f"less than {below}": lambda x: below is None or x < below}
    if value is not None and not all(np.all(holds(value)) for holds in rules.values()):
        raise ValueError(f"{name} must be {' and '.join(rule for rule in rules if not rule.endswith('None'))}. "
                         f"Received: {name}={setting!r}")


def check_decays(settings: Mapping[str, Any], variables: Variables, owner: str) -> None:
    """Raises a ValueError if a decay is rounded to 1 in the type of an inner variable, as 0.999 is in bfloat16.

    A bias correction of 1 - decay^t is zero then: no variable ever moves, or all become NaN.

    Args:
        settings: Dictionary of settings by name.
        variables: List of `keras.Variable`.
        owner: Name of what has the settings, in the error.
    """
    for name, setting in settings.items():
        value = _known_value(setting)
        for dtype in {variable.dtype for variable in variables} if value is not None else ():
            if np.any(np.asarray(value).astype(tf.as_dtype(dtype).as_numpy_dtype) >= 1.0):
                raise ValueError(
                    f"{name} must stay less than 1 in the type of the inner variables: {owner} with {name}={value} "
                    f"never moves a variable of type {dtype}, where that number is 1. Train with a mixed policy "
                    "(mixed_bfloat16), whose variables are float32, or take a smaller one, for example 0.98.")


def setting_value(setting: Any, step: Tensor, dtype: DType) -> Tensor:
    """The value of a setting at the inner step `step` as a tensor of type `dtype`.

    Raises:
        TypeError: If a callable returns something else than a number or a tensor.
    """
    if not _is_function(setting):
        return value_of(setting, step, dtype)
    value = setting(step)
    if isinstance(value, numbers.Real):
        return tf.constant(float(value), dtype)
    try:
        tensor = value_of(value, step)
    except (TypeError, ValueError) as error:
        raise _no_number(setting, value) from error
    if not tensor.dtype.is_floating and not tensor.dtype.is_integer:
        raise _no_number(setting, value)
    return tf.cast(tensor, dtype)


def _no_number(setting, value):
    return TypeError("A function of the step must return a number or a tensor of numbers. "
                     f"Received: {setting!r}, which returned {value!r}")


def setting_per_variable(setting: Any, variables: list[Any], step: Tensor) -> Tensors:
    """One value of a setting for each of the inner variables.

    Raises:
        ValueError: If the setting is a list of another length.
    """
    if isinstance(setting, (list, tuple)):
        check_length(setting, variables)
        return [setting_value(entry, step, w.dtype) for entry, w in zip(setting, variables)]
    return [setting_value(setting, step, w.dtype) for w in variables]


def check_length(setting: Any, variables: Variables) -> None:
    """Raises a ValueError if a list of settings does not fit the inner variables."""
    if isinstance(setting, (list, tuple)) and len(setting) != len(variables):
        raise ValueError("A list of settings, as of learning rates, must have one entry per inner variable. "
                         f"Received {len(setting)} entries for {len(variables)} inner variables.")


def _is_function(setting):
    return callable(setting) and not isinstance(setting, (keras.Variable, OuterVariable))


def _takes_a_step(setting):
    """Whether a callable can be called with the step alone."""
    if not callable(setting) or isinstance(setting, (type, keras.Layer, keras.optimizers.Optimizer)):
        return False
    try:
        inspect.signature(setting).bind(None)
    except TypeError:
        return False
    except ValueError:  # Some functions in C do not say.
        return True
    return True


def _known_value(setting):
    """The value as an array; None where it is known only later."""
    if isinstance(setting, numbers.Real):
        return np.asarray(setting, "float64")
    if not tf.executing_eagerly():
        return None
    if isinstance(setting, OuterVariable):
        return setting.numpy()
    if isinstance(setting, keras.Variable):
        return keras.ops.convert_to_numpy(setting)
    if type(setting).__module__.startswith("keras."):
        return keras.ops.convert_to_numpy(setting(0))
    return None

"""Checks of numbers where they come in: each returns the number as a Python int or float, or raises a ValueError.

A bool is no number here, and neither is a string or a tensor.
"""

import math
import numbers
from typing import Any, TypeGuard


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite real number of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def integer(name: str, value: Any) -> int:
    """The value as an int.

    Raises:
        ValueError: If it is no integer.
    """
    return _checked(name, value, is_integer(value), "an integer", int)


def integer_in_range(name: str, value: Any, low: float, high: float) -> int:
    """The value as an int, from `low` to `high`.

    Raises:
        ValueError: If it is no integer or out of range.
    """
    return _checked(name, value, is_integer(value) and low <= value <= high, f"an integer from {low} to {high}", int)


def integer_of_at_least(name: str, value: Any, least: int) -> int:
    """The value as an int, `least` or greater.

    Raises:
        ValueError: If it is no integer or less.
    """
    return _checked(name, value, is_integer(value) and value >= least, f"an integer of at least {least}", int)


def positive_integer(name: str, value: Any) -> int:
    """The value as an int, 1 or greater.

    Raises:
        ValueError: If it is no integer or less.
    """
    return _checked(name, value, is_integer(value) and value >= 1, "a positive integer", int)


def non_negative_integer(name: str, value: Any) -> int:
    """The value as an int, 0 or greater.

    Raises:
        ValueError: If it is no integer or less.
    """
    return _checked(name, value, is_integer(value) and value >= 0, "a non-negative integer", int)


def finite_number(name: str, value: Any) -> float:
    """The value as a float.

    Raises:
        ValueError: If it is no finite number.
    """
    return _checked(name, value, is_number(value), "a finite number", float)


def positive_number(name: str, value: Any) -> float:
    """The value as a float, finite and greater than 0.

    Raises:
        ValueError: If it is not.
    """
    return _checked(name, value, is_number(value) and value > 0, "a positive finite number", float)


def non_negative_number(name: str, value: Any) -> float:
    """The value as a float, finite and 0 or greater.

    Raises:
        ValueError: If it is not.
    """
    return _checked(name, value, is_number(value) and value >= 0, "a non-negative finite number", float)


def number_between(name: str, value: Any, low: float, high: float) -> float:
    """The value as a float, strictly between `low` and `high`.

    Raises:
        ValueError: If it is not.
    """
    return _checked(name, value, is_number(value) and low < value < high,
                    f"a number strictly between {low} and {high}", float)


def number_in_range(name: str, value: Any, low: float, high: float) -> float:
    """The value as a float, from `low` to `high`, both included.

    Raises:
        ValueError: If it is not.
    """
    return _checked(name, value, is_number(value) and low <= value <= high, f"a number from {low} to {high}", float)


def _checked(name, value, accepted, rule, kind):
    if not accepted:
        raise ValueError(f"{name} must be {rule}. Received: {value!r}")
    return kind(value)

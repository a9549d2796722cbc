"""A strength of something, such as a penalty or noise: numbers that are not negative, or what is learned."""

from __future__ import annotations

from typing import Any

import numpy as np

from farhox.outer.hyperparameters import ExampleWeights
from farhox.outer.outer_variable import OuterVariable


def checked_strength(name: str, strength: Any) -> np.ndarray | OuterVariable:
    """The argument of this name if it is an `OuterVariable` that cannot become negative, or numbers as float64.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is negative, or can become so, or is not finite.
    """
    if isinstance(strength, OuterVariable) and not isinstance(strength, ExampleWeights):
        if strength.low is None or strength.low < 0:
            raise ValueError(f"{name} must not become negative: give the hyperparameter low=0.0. "
                             f"Received: {strength!r} with low={strength.low}")
        return strength
    numbers = np.asarray(strength)
    if numbers.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be a number, an array of numbers or a farhox.Hyperparameter. "
                        f"Received: {strength!r} of type {type(strength).__name__}")
    if not np.all(np.isfinite(numbers)) or np.any(numbers < 0):
        raise ValueError(f"{name} must be finite and not negative. Received: {strength}")
    return numbers.astype("float64")

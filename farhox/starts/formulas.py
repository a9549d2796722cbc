"""Formulas over properties of data sets: values, text, and what of them is constant.

A formula is a float, the name of a property, or a tuple of an operator and its arguments, which are formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

OPERATORS = {"+": 2, "-": 2, "*": 2, "/": 2, "**": 2, "max": 2, "min": 2, "expit": 1, "neg": 1, "if_greater": 4}
INVALID = 2.0 ** 100  # Values of such a size are none.
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "**": 4}
_ATOM = 5


def evaluate(formula: Any, properties: Mapping[str, Any]) -> Any:
    """The value of a formula; NaN where it is complex or not defined.

    Args:
        formula: A formula.
        properties: Dictionary from names to numbers, or to arrays of the same shape.
    """
    with np.errstate(all="ignore"):
        return _value(formula, properties)


def is_valid(values: Any) -> Any:
    """Where values can be those of a hyperparameter: finite, of less than 2^100."""
    return np.isfinite(values) & (np.abs(values) < INVALID)


def size(formula: Any) -> int:
    """The number of operators."""
    return 1 + sum(map(size, formula[1:])) if isinstance(formula, tuple) else 0


def simplified(formula: Any) -> Any:
    """The formula with its constant parts computed, to six digits, and what changes nothing left out."""
    if not isinstance(formula, tuple):
        return float(f"{formula:.6g}") if isinstance(formula, float) else formula
    operator, *arguments = formula[0], *map(simplified, formula[1:])
    if all(isinstance(argument, float) for argument in arguments):
        value = float(evaluate((operator, *arguments), {}))
        return float(f"{value:.6g}") if np.isfinite(value) else (operator, *arguments)
    if operator == "neg" and arguments[0][0] == "neg" and isinstance(arguments[0], tuple):
        return arguments[0][1]
    if operator in ("max", "min") and arguments[0] == arguments[1]:
        return arguments[0]
    first, last = arguments[0], arguments[-1]
    if (operator, last) in (("+", 0.0), ("-", 0.0), ("*", 1.0), ("/", 1.0), ("**", 1.0)):
        return first
    if (operator, first) in (("+", 0.0), ("*", 1.0)):
        return last
    for constant, other in ((first, last), (last, first)):
        if operator == "*" and isinstance(constant, float) and (merged := _times(other, constant)) is not None:
            return merged
    if operator == "/" and isinstance(last, float) and last and (merged := _times(first, 1.0 / last)) is not None:
        return merged
    return (operator, *arguments)


def _times(formula, factor):
    """A product or quotient with a constant in it times a factor; None where there is no constant to take it."""
    if isinstance(formula, float):
        return float(f"{formula * factor:.6g}")
    if not isinstance(formula, tuple) or formula[0] not in ("*", "/"):
        return None
    operator, first, last = formula
    if (merged := _times(first, factor)) is not None:
        return last if operator == "*" and merged == 1.0 else (operator, merged, last)
    if operator == "*" and (merged := _times(last, factor)) is not None:
        return first if merged == 1.0 else (operator, first, merged)
    return None


def text(formula: Any) -> str:
    """The formula as a person writes it, and Python reads it: `expit` and `if_greater(a, b, c, d)` are functions."""
    return _text(formula)[0]


def _value(formula, properties):
    if isinstance(formula, float):
        return np.float64(formula)
    if isinstance(formula, str):
        return np.asarray(properties[formula], "float64")
    operator, *arguments = formula[0], *(_value(argument, properties) for argument in formula[1:])
    if operator == "expit":
        return 1.0 / (1.0 + np.exp(-arguments[0]))
    if operator == "neg":
        return -arguments[0]
    if operator == "if_greater":
        # A comparison with what is not defined has no answer.
        undefined = np.isnan(arguments[0]) | np.isnan(arguments[1])
        return np.where(undefined, np.nan, np.where(arguments[0] > arguments[1], arguments[2], arguments[3]))
    return _BINARY[operator](*arguments)


_BINARY = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "**": np.power, "max": np.maximum,
           "min": np.minimum}


def _text(formula):
    """The text of a formula and how strongly it holds together."""
    if isinstance(formula, float):
        whole = formula == round(formula) and abs(formula) < 1e6
        return (str(int(formula)) if whole else f"{formula:.6g}"), (_ATOM if formula >= 0 else _STRENGTH["neg"])
    if isinstance(formula, str):
        return formula, _ATOM
    operator, *arguments = formula
    parts = [_text(argument) for argument in arguments]
    if operator not in _STRENGTH:
        return f"{operator}({', '.join(part for part, _ in parts)})", _ATOM
    strength = _STRENGTH[operator]
    if operator == "neg":
        part, inner = parts[0]
        return (f"-{part}" if inner >= strength else f"-({part})"), strength
    # Of equals on the right side, those of + and * can be read in any order; ** takes none on either side.
    left = strength + (operator == "**")
    right = strength + (operator in ("-", "/", "**"))
    sides = [part if inner >= least else f"({part})" for (part, inner), least in zip(parts, (left, right))]
    return f"{sides[0]} {operator} {sides[1]}", strength

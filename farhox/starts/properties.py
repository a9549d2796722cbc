"""Simple properties of a data set, which rules and neighbours read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from farhox._core import checks
from farhox._core.types import Array

_LEAST_PAIRS, _MOST_PAIRS = 100, 10_000
_CHUNK = 1 << 22  # Numbers that are held at once.


def dataset_properties(x: Array, y: Array, categorical: Sequence[int] = (), seed: int = 0) -> dict[str, float]:
    """Properties of a classification data set that formulas of hyperparameters can depend on.

    - `n`: examples; `p`: features; `m`: classes;
    - `p_encoded`: features when each categorical one is as many columns as it has values;
    - `majority_share`: share of the largest class; `categorical_share`: share of categorical features;
    - `variance`: variance of all entries of x, `categorical` features by the numbers of their values in sorted order;
    - `median_kernel_distance`: inverse of the median of the squared distances that are not zero, between pairs of rows
      of x with standardised features: a width for radial kernels. It is 0 where all rows are the same. The paper draws
      n/2 pairs with replacement; here they are 100 at least and 10,000 at most.

    Args:
        x: Array [n, ...] of finite numbers; further axes are made one. Features that are no numbers are categorical.
        y: Array [n] or [n, 1] of classes, integers or strings; or one-hot [n, m].
        categorical: Indices of categorical features.
        seed: Int, of the pairs.

    Returns:
        Dictionary from names to floats.

    Raises:
        TypeError: If x or y is no array of numbers or classes.
        ValueError: If they are empty, lengths differ, an entry is not finite, or y has no classes.

    Reference:
        [Gijsbers et al., 2021](https://arxiv.org/abs/2106.05767), table of properties.
    """
    seed = checks.integer_of_at_least("seed", seed, 0)
    columns, levels = _columns(x, categorical)
    classes = class_numbers(y)
    if len(classes) != len(columns):
        raise ValueError(f"x and y must have the same number of examples. Received: {len(columns)} and {len(classes)}")
    n, p = columns.shape
    counts = np.bincount(classes)
    with np.errstate(over="ignore"):
        variance = np.var(columns)
    if not np.isfinite(variance):
        raise ValueError("x must be numbers whose squares are finite. Received: entries up to "
                         f"{np.max(np.abs(columns)):g}")
    return {
        "n": float(n), "p": float(p), "m": float(len(counts)),
        "p_encoded": float(p - len(levels) + sum(levels.values())),
        "majority_share": float(counts.max() / n), "categorical_share": len(levels) / p, "variance": float(variance),
        "median_kernel_distance": _inverse_median_distance(columns, seed)}


def class_numbers(y: Any) -> np.ndarray:
    """Classes as integers [n] from 0 on, in the sorted order of those that there are.

    Raises:
        TypeError: If y is no array of classes.
        ValueError: If it is empty, has the wrong shape or holds fractions.
    """
    array = np.asarray(y)
    if array.dtype.kind not in "biufUSO":
        raise TypeError(f"y must be an array of classes, integers or strings. Received: dtype {array.dtype}")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and array.dtype.kind in "biuf" and array.size:
        if not (np.all((array == 0) | (array == 1)) and np.all(np.sum(array, axis=1) == 1)):
            raise ValueError("y with two axes must be one-hot: one 1 in each row, 0 beside it. Received: shape "
                             f"{array.shape} with other values")
        array = np.argmax(array, axis=1)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"y must be of shape [n], [n, 1] or one-hot [n, m] with n > 0. Received: shape {array.shape}")
    if array.dtype.kind == "f" and not np.all(array == np.round(array)):
        raise ValueError("y must hold classes, so that its numbers are whole. Received: fractions, or values that are "
                         "not finite")
    if array.dtype.kind == "O":
        if not all(isinstance(entry, str) or checks.is_integer(entry) for entry in array):
            raise TypeError("y must be an array of classes, integers or strings. Received: an array of objects, among "
                            f"them {type(array[0]).__name__}")
        array = np.array([str(entry) for entry in array])
    return np.unique(array, return_inverse=True)[1]


def flat_features(x: Any) -> np.ndarray:
    """x as float64 [n, p], features that are no numbers as the numbers of their values.

    Raises:
        TypeError: If x is no array.
        ValueError: If it is empty or an entry is not finite.
    """
    return _columns(x, ())[0]


def _columns(x, categorical):
    """Features as float64 [n, p], and the number of values of each categorical one by its index."""
    array = np.asarray(x)
    if array.dtype.kind not in "biufUSO":
        raise TypeError(f"x must be an array of numbers. Received: dtype {array.dtype}")
    if array.ndim < 1 or not array.size:
        raise ValueError(f"x must be of shape [n, ...] with at least one number. Received: shape {array.shape}")
    array = array.reshape(len(array), -1)
    if not isinstance(categorical, (list, tuple, range)):
        raise TypeError(f"categorical must be a list of indices of features. Received: {categorical!r}")
    for index in categorical:
        checks.integer_in_range("An index of a categorical feature", index, 0, array.shape[1] - 1)
    columns, levels = np.zeros(array.shape), {}
    if array.dtype.kind in "biuf":
        columns = array.astype("float64")
        named = set(categorical)
    else:
        named = {index for index, column in enumerate(array.T) if index in categorical or not _is_numeric(column)}
        for index in set(range(array.shape[1])) - named:
            columns[:, index] = array[:, index].astype("float64")
    for index in sorted(named):
        column = array[:, index]
        values, numbers = np.unique(column.astype(str) if column.dtype.kind == "O" else column, return_inverse=True)
        columns[:, index], levels[index] = numbers, len(values)
    if not np.all(np.isfinite(columns)) or array.dtype.kind == "f" and not np.all(np.isfinite(array)):
        raise ValueError("x must be finite: fill in missing values first. Received: "
                         f"{int(np.sum(~np.isfinite(columns)))} entries that are NaN or infinite")
    return columns, levels


def _is_numeric(column):
    try:
        column.astype("float64")
    except (TypeError, ValueError):
        return False
    return True


def _inverse_median_distance(columns, seed):
    scale = np.std(columns, axis=0)
    kept = columns[:, scale > 0] / scale[scale > 0]
    count = min(max(len(columns) // 2, _LEAST_PAIRS), _MOST_PAIRS)
    first, second = np.random.default_rng(seed).integers(len(columns), size=[2, count])
    step = max(1, _CHUNK // max(1, kept.shape[1]))
    squares = np.concatenate([np.sum((kept[first[i:i + step]] - kept[second[i:i + step]]) ** 2, axis=1)
                              for i in range(0, count, step)])
    squares = squares[squares > 0]
    return float(1.0 / np.median(squares)) if len(squares) else 0.0

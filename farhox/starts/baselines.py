"""What every learned start stands beside: the best configuration on average, a portfolio, those of neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from farhox._core import checks
from farhox.starts.evaluations import PriorEvaluations, checked_properties, checked_table

_NEIGHBOURS = 10


def best_on_average(table: PriorEvaluations) -> dict[str, Any]:
    """The configuration with the highest mean of the scaled scores over all data sets.

    A data set that did not evaluate a configuration counts with the mean of those it did.

    Args:
        table: A `PriorEvaluations`.

    Returns:
        Dictionary from names to values.

    Raises:
        TypeError: If `table` is none.
    """
    return average_order(table, 1)[0]


def portfolio(table: PriorEvaluations, size: int = 5) -> list[dict[str, Any]]:
    """Configurations to be tried one after the other, that together have a good one for every data set.

    Greedy: each is the one that raises the mean over data sets of the best scaled score so far the most; where none
    raises it, the one with the highest mean.

    Args:
        table: A `PriorEvaluations`.
        size: Positive int, at most the number of configurations.

    Returns:
        List of `size` different rows of the table, dictionaries from names to values.

    Raises:
        TypeError: If `table` is none.
        ValueError: If `size` is out of range.
    """
    scores = checked_table(table).filled_scores()
    size = checks.integer_in_range("size", size, 1, scores.shape[1])
    reached, chosen, means = np.full(len(scores), -np.inf), [], np.mean(scores, axis=0)
    free = np.ones(scores.shape[1], bool)
    for _ in range(size):
        together = np.mean(np.maximum(scores, reached[:, np.newaxis]), axis=0)
        # Means of the same numbers differ by their rounding, which is no gain.
        best = np.flatnonzero(free & (together >= np.max(together[free]) - 1e-12))
        index = int(best[np.argmax(means[best])])
        chosen.append(index)
        free[index] = False
        reached = np.maximum(reached, scores[:, index])
    return [dict(table.configurations[index]) for index in chosen]


def average_order(table: PriorEvaluations, count: int) -> list[dict[str, Any]]:
    """The `count` configurations with the highest means, the best first."""
    return _ordered(table, np.mean(checked_table(table).filled_scores(), axis=0), count)


def neighbour_order(table: PriorEvaluations, nearest: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The best configuration of each data set, by the order of their indices, without repetition."""
    found: list[dict[str, Any]] = []
    for index in nearest:
        best = table.best(int(index))
        if best not in found:
            found.append(best)
    return (found + [entry for entry in average_order(table, len(table.configurations))
                     if entry not in found][:count])[:count] if len(found) < count else found[:count]


def neighbour_mean_order(table: PriorEvaluations, nearest: np.ndarray, count: int,
                         neighbours: int = _NEIGHBOURS) -> list[dict[str, Any]]:
    """The configurations with the highest mean score over the nearest data sets."""
    return _ordered(table, np.mean(table.filled_scores()[nearest[:neighbours]], axis=0), count)


def nearest_by_properties(table: PriorEvaluations, properties: Mapping[str, float]) -> np.ndarray:
    """Indices of the data sets of the table, the nearest first.

    The distance is Euclidean; each property is measured by its rank among those of the table, so that the many orders
    of magnitude between sizes of data sets do not count more than shares do.
    """
    names = list(table.properties[0])
    values = checked_properties("properties", properties, names)
    known = np.array([[entry[name] for name in names] for entry in table.properties])
    ranks = _ranks(known, known)
    distances = np.linalg.norm(ranks - _ranks(known, np.array([[values[name] for name in names]])), axis=1)
    return np.argsort(distances, kind="stable")


def _ranks(known, values):
    """The share of known values below each value, and half of those that are equal."""
    below = known[np.newaxis] < values[:, np.newaxis]
    equal = known[np.newaxis] == values[:, np.newaxis]
    return np.mean(below, axis=1) + 0.5 * np.mean(equal, axis=1)


def _ordered(table, means, count):
    order = np.argsort(-means, kind="stable")[:count]
    return [dict(table.configurations[index]) for index in order]

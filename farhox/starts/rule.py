"""StartRule: what proposes where to begin on a new data set."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from farhox._core.types import Array
from farhox.starts.evaluations import PriorEvaluations, checked_properties
from farhox.starts.properties import dataset_properties


class StartRule(abc.ABC):
    """A rule that learns from evaluations on earlier data sets where to begin on a new one.

    `farhox.Tuner(start=)` and `compare_starts` take any: one of your own defines the three methods and the space.
    """

    @property
    @abc.abstractmethod
    def space(self) -> dict[str, tuple[float, float]]:
        """Dictionary from names of hyperparameters to pairs (low, high), in which suggestions lie."""

    @abc.abstractmethod
    def fit(self, table: PriorEvaluations) -> Any:
        """Learns from a table, anew. Returns the rule itself."""

    @abc.abstractmethod
    def suggest(self, dataset: Any, count: int = 1) -> list[dict[str, Any]]:
        """Up to `count` different configurations for a pair (x, y) or a dictionary of properties, the best first."""

    @abc.abstractmethod
    def unfitted(self) -> Any:
        """A rule of the same settings that has learned nothing."""

    def start(self, x: Array, y: Array) -> dict[str, Any]:
        """The first suggestion for a data set.

        Args:
            x: Array [n, ...] of finite numbers.
            y: Array [n] or [n, 1] of classes, or one-hot [n, m].

        Returns:
            Dictionary from names of hyperparameters to values.
        """
        return self.suggest((x, y))[0]


def properties_of(dataset: Any, names: list[str]) -> dict[str, float]:
    """The properties of these names of a pair (x, y), or of a dictionary of them.

    Raises:
        TypeError: If the data set is neither.
        ValueError: If a property is missing or no finite number.
    """
    if not isinstance(dataset, Mapping):
        dataset = dataset_properties(*checked_pair(dataset))
    return checked_properties("properties", dataset, names)


def checked_pair(dataset: Any) -> tuple[Any, Any]:
    """The argument, if it is a pair (x, y).

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
        raise TypeError("A data set must be a pair (x, y) or a dictionary of properties. Received: "
                        f"{type(dataset).__name__}")
    return dataset[0], dataset[1]


def check_fitted(name: str, fitted: bool) -> None:
    """Raises a ValueError if the rule has learned nothing."""
    if not fitted:
        raise ValueError(f"The {name} must have learned from a table: call fit() first.")

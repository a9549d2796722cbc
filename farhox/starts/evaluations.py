"""PriorEvaluations: what configurations of hyperparameters reached on earlier data sets."""

from __future__ import annotations

import json
import math
import numbers
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from farhox._core import checks
from farhox._core.types import Array
from farhox.starts.properties import dataset_properties

_LOG_FROM = 10.0  # A positive range whose ends differ by such a factor is measured on a logarithmic scale.


class PriorEvaluations:
    """A table of scores: data sets × configurations, with the space of the hyperparameters.

    Distances and the middle of a range are taken on a logarithmic scale where the range is positive and its ends differ
    by a factor of ten or more. A hyperparameter whose values are all Python or NumPy integers is one: what is proposed
    for it is rounded.

    Args:
        space: Dictionary from names of hyperparameters to pairs (low, high) of finite numbers.
        datasets: List with an entry for each data set: a dictionary of properties, finite numbers under the same names
            in all of them; or a pair (x, y), whose `dataset_properties` are taken. Pairs are kept.
        configurations: List of dictionaries from the names of the space to numbers in it.
        scores: Array [data sets, configurations]: higher is better, NaN where a configuration was not evaluated.
        names: List of a name for each data set. Default: "0", "1", ...

    Attributes:
        space, configurations, names: As given.
        properties: List of a dictionary for each data set.
        data: List of pairs (x, y), or None if data sets were given by their properties.
        scores: float64 [data sets, configurations].

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no data set or configuration, names or shapes do not fit, a value is not in the space,
            a score is infinite, or a data set has no score at all.
    """

    def __init__(self, space: Mapping[str, Any], datasets: Sequence[Any], configurations: Sequence[Mapping[str, Any]],
                 scores: Array, names: Sequence[str] | None = None) -> None:
        self.space = _checked_space(space)
        datasets = _checked_list("datasets", datasets)
        self.configurations = [self._checked_configuration(index, entry) for index, entry in enumerate(
            _checked_list("configurations", configurations))]
        self.names = _checked_names(names, len(datasets))
        self.properties, self.data = _properties_and_data(datasets, self.names)
        self.scores = _checked_scores(scores, self.names, len(self.configurations))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def integers(self) -> frozenset[str]:
        """Names of the hyperparameters whose values are integers."""
        return frozenset(name for name in self.space if all(
            isinstance(configuration[name], numbers.Integral) for configuration in self.configurations))

    def scaled_scores(self) -> np.ndarray:
        """Scores [data sets, configurations] from 0, the worst of a data set, to 1, its best; NaN stays.

        Where all scores of a data set are the same, each of them is its best: 1.
        """
        low = np.nanmin(self.scores, axis=1, keepdims=True)
        high = np.nanmax(self.scores, axis=1, keepdims=True)
        # Halves, so that the difference of two great numbers is no overflow.
        spread = high / 2 - low / 2
        scaled = (self.scores / 2 - low / 2) / np.where(spread > 0, spread, 1.0)
        return np.where(np.isnan(self.scores), np.nan, np.where(spread > 0, scaled, 1.0))

    def filled_scores(self) -> np.ndarray:
        """`scaled_scores` with the mean of a data set where it was not evaluated.

        A configuration that was tried once, on an easy data set, is so no better than one that was tried on all.
        """
        scaled = self.scaled_scores()
        return np.where(np.isnan(scaled), np.nanmean(scaled, axis=1, keepdims=True), scaled)

    def units(self, configurations: Sequence[Mapping[str, Any]] | None = None) -> np.ndarray:
        """Configurations (default: those of the table) as float64 [count, hyperparameters], the range from 0 to 1."""
        chosen = self.configurations if configurations is None else configurations
        return to_units(self.space, np.array([[float(entry[name]) for name in self.space] for entry in chosen]))

    def middle(self) -> dict[str, Any]:
        """The middle of all ranges, the geometric one where the scale is logarithmic."""
        return self.rounded(middle(self.space))

    def rounded(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with integers where hyperparameters are integers."""
        integers = self.integers
        return {name: int(round(value)) if name in integers else value for name, value in configuration.items()}

    def best(self, dataset: int) -> dict[str, Any]:
        """The best configuration of the data set of this index."""
        return dict(self.configurations[int(np.nanargmax(self.scores[dataset]))])

    def subset(self, indices: Sequence[int]) -> PriorEvaluations:
        """The table of the data sets of these indices.

        Raises:
            ValueError: If there are none, or an index is out of range.
        """
        indices = [checks.integer_in_range("An index of a data set", index, 0, len(self) - 1) for index in indices]
        datasets = self.properties if self.data is None else self.data
        part = PriorEvaluations(self.space, [self.properties[index] for index in indices], self.configurations,
                                self.scores[indices], [self.names[index] for index in indices])
        part.data = None if self.data is None else [datasets[index] for index in indices]
        return part

    def to_json(self) -> str:
        """The table as JSON: all but the pairs (x, y)."""
        scores = [[None if math.isnan(score) else score for score in row] for row in self.scores.tolist()]
        return json.dumps({"space": self.space, "names": self.names, "properties": self.properties,
                           "configurations": self.configurations, "scores": scores})

    @classmethod
    def from_json(cls, text: str) -> PriorEvaluations:
        """The table of what `to_json` returned.

        Raises:
            ValueError: If the text holds no such table.
        """
        try:
            value = json.loads(text)
            scores = np.array([[math.nan if score is None else score for score in row] for row in value["scores"]])
            parts = value["space"], value["properties"], value["configurations"], scores, value["names"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError("A table as JSON must be what PriorEvaluations wrote. Received: "
                             f"{type(error).__name__}: {error}") from error
        return cls(*parts)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file of JSON: all but the pairs (x, y)."""
        pathlib.Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PriorEvaluations:
        """The table of a file that `save` wrote.

        Raises:
            ValueError: If the file holds no such table.
        """
        return cls.from_json(pathlib.Path(path).read_text(encoding="utf-8"))

    def _checked_configuration(self, index, configuration):
        if not isinstance(configuration, Mapping):
            raise TypeError("A configuration must be a dictionary from names to values. Received: "
                            f"configurations[{index}]={configuration!r}")
        if set(configuration) != set(self.space):
            raise ValueError(f"A configuration must have the names of the space: {', '.join(self.space)}. Received: "
                             f"configurations[{index}] with {', '.join(map(str, configuration)) or 'none'}")
        for name, (low, high) in self.space.items():
            value = configuration[name]
            if not checks.is_number(value) or not low <= value <= high:
                raise ValueError(f"The value of {name!r} must be a number in its range from {low:g} to {high:g}. "
                                 f"Received: configurations[{index}][{name!r}]={value!r}")
        return {name: int(configuration[name]) if isinstance(configuration[name], numbers.Integral)
                else float(configuration[name]) for name in self.space}


def checked_table(table: Any) -> PriorEvaluations:
    """The argument, if it is a table.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(table, PriorEvaluations):
        raise TypeError(f"table must be a PriorEvaluations. Received: {type(table).__name__}")
    return table


def is_log(space: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """Whether each hyperparameter is on a logarithmic scale."""
    return np.array([low > 0 and high / low >= _LOG_FROM for low, high in space.values()])


def middle(space: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The middle of each range, the geometric one where the scale is logarithmic."""
    low, high = np.array(list(space.values())).reshape(-1, 2).T
    values = np.where(is_log(space), np.sqrt(np.abs(low)) * np.sqrt(np.abs(high)), low / 2 + high / 2)
    return dict(zip(space, map(float, values)))


def to_units(space: Mapping[str, tuple[float, float]], values: np.ndarray) -> np.ndarray:
    """Values [..., hyperparameters] in the space as numbers from 0 to 1, by their logarithms where scales are such."""
    low, high = np.array(list(space.values())).T
    log = is_log(space)
    positive = np.where(log, np.maximum(values, np.where(log, low, 1.0)), 1.0)
    safe_low, safe_high = np.where(log, low, 1.0), np.where(log, high, math.e)
    logarithmic = np.log(positive / safe_low) / np.log(safe_high / safe_low)
    return np.where(log, logarithmic, (values / 2 - low / 2) / (high / 2 - low / 2))


def checked_properties(name: str, properties: Any, known: Sequence[str] | None = None) -> dict[str, float]:
    """A dictionary of properties as floats; with `known` those of these names.

    Raises:
        TypeError: If it is no dictionary.
        ValueError: If it is empty, a name is missing or no string, or a value is no finite number.
    """
    if not isinstance(properties, Mapping):
        raise TypeError(f"{name} must be a dictionary from names to numbers. Received: {properties!r}")
    missing = [key for key in known or () if key not in properties]
    if missing:
        raise ValueError(f"{name} must have what the table has: {', '.join(known or ())}. Received: none of the name "
                         f"{', '.join(missing)}")
    if not properties:
        raise ValueError(f"{name} must have at least one property. Received: {properties!r}")
    for key in known if known is not None else properties:
        value = properties[key]
        if not isinstance(key, str) or not checks.is_number(value):
            raise ValueError(f"{name} must be finite numbers under names. Received: {key!r}: {value!r}")
    return {key: float(properties[key]) for key in (known if known is not None else properties)}


def _checked_space(space):
    if not isinstance(space, Mapping):
        raise TypeError(f"space must be a dictionary from names to pairs (low, high). Received: {space!r}")
    if not space:
        raise ValueError("space must have at least one hyperparameter. Received: {}")
    for name, pair in space.items():
        if not isinstance(name, str):
            raise TypeError(f"Names of hyperparameters must be strings. Received: {name!r}")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(checks.is_number, pair)) or not (
                pair[0] < pair[1]):
            raise ValueError("A range must be a pair (low, high) of finite numbers with low < high. Received: "
                             f"{name}={pair!r}")
    return {name: (float(low), float(high)) for name, (low, high) in space.items()}


def _checked_list(name, value):
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list. Received: {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must have at least one entry. Received: an empty list")
    return value


def _checked_names(names, count):
    if names is None:
        return [str(index) for index in range(count)]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a list of strings. Received: {names!r}")
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"names must be one for each of the {count} data sets, all different. Received: {names!r}")
    return list(names)


def _properties_and_data(datasets, names):
    if all(isinstance(entry, Mapping) for entry in datasets):
        first = list(datasets[0])
        properties = [checked_properties(f"The properties of data set {name!r}", entry)
                      for name, entry in zip(names, datasets)]
        for name, entry in zip(names, properties):
            if set(entry) != set(first):
                raise ValueError(f"All data sets must have the same properties: {', '.join(first)}. Received: data set "
                                 f"{name!r} with {', '.join(entry)}")
        return [{key: entry[key] for key in first} for entry in properties], None
    for name, entry in zip(names, datasets):
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise TypeError("datasets must be dictionaries of properties, or pairs (x, y), all alike. Received: data "
                            f"set {name!r} is of type {type(entry).__name__}")
    data = [(np.asarray(x), np.asarray(y)) for x, y in datasets]
    return [dataset_properties(x, y) for x, y in data], data


def _checked_scores(scores, names, count):
    try:
        array = np.array(scores, "float64")
    except (TypeError, ValueError) as error:
        raise TypeError("scores must be an array of numbers [data sets, configurations]. Received: "
                        f"{type(scores).__name__}") from error
    if array.shape != (len(names), count):
        raise ValueError(f"scores must be of shape [data sets, configurations], here ({len(names)}, {count}). "
                         f"Received: {array.shape}")
    if np.any(np.isinf(array)):
        row, column = np.argwhere(np.isinf(array))[0]
        raise ValueError("A score must be finite, or NaN where a configuration was not evaluated. Received: "
                         f"{array[row, column]} for data set {names[row]!r} and configuration {column}")
    empty = [name for name, row in zip(names, array) if np.all(np.isnan(row))]
    if empty:
        raise ValueError(f"Each data set must have at least one score. Received: NaN only for {', '.join(empty)}")
    array.flags.writeable = False
    return array

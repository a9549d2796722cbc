"""SymbolicDefaults: a formula over properties of the data set for each hyperparameter."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from farhox._core import checks
from farhox.starts.baselines import portfolio
from farhox.starts.evaluations import PriorEvaluations, checked_properties, checked_table, to_units
from farhox.starts.evolution import evolve
from farhox.starts.forests import Forests
from farhox.starts.formulas import OPERATORS, evaluate, is_valid, simplified, text
from farhox.starts.rule import StartRule, check_fitted, properties_of

_WORST = -1.0  # Below the score of any value.
_OUTSIDE = 1e-6  # So that of formulas that reach the same, one whose values need no clipping is better.
_MOST_FOLLOWERS = 10
_FIELDS = ("space", "properties", "trees", "fallback", "integers", "followers", "history")


class SymbolicDefaults(StartRule):
    """Defaults as formulas of the data set, bred by genetic programming on a table of earlier evaluations.

    An individual has one tree for each hyperparameter, of +, -, *, /, **, max, min, expit, neg and if_greater(a, b, c,
    d), which is c where a > b and d elsewhere, over properties, fractions 2^U(-10, 0) and whole numbers round(2^U(0,
    10)). Its values are clipped to the space; a random forest for each data set predicts their scaled score; NSGA-II
    selects on the mean score and the number of operators. An individual one of whose values is complex, infinite, not
    a number or 2^100 and more on a data set ranks below all others.

    It needs the packages deap, whose licence is the LGPL, and scikit-learn, which are in the extra `starts`. A
    rule that is fitted needs neither.

    Args:
        population: Positive int, offspring of a generation.
        generations: Non-negative int, in all.
        seed: Non-negative int: the same seed on the same table gives the same formulas.
        parents: Int of at least 2, individuals that are kept.
        patience: Positive int, generations without gain after which it begins anew with random trees.
        trees: Positive int, of each forest.

    Attributes:
        formulas: Dictionary from names of hyperparameters to formulas, as text that Python reads as well.
        history: List of the best mean predicted score after each generation.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Gijsbers et al., 2021](https://arxiv.org/abs/2106.05767). Deviations, which find a planted formula more often:
        it begins anew where the paper ends; the first generation is five times as large; of individuals with the same
        score and size one is kept; half of the changes of a constant are by its order of magnitude, and a share of
        the changed trees are multiplied so that they come to the best values; crossover that swaps no whole tree swaps
        parts of one. Trees of a forest are grown on 1,000 configurations at most; the score
        of invalid values is -1 in the place of 1e-6, so that it is below that of every valid one.
    """

    def __init__(self, population: int = 100, generations: int = 300, seed: int = 0, parents: int = 20,
                 patience: int = 20, trees: int = 100) -> None:
        self._settings = {
            "population": checks.integer_of_at_least("population", population, 2),
            "generations": checks.non_negative_integer("generations", generations),
            "seed": checks.non_negative_integer("seed", seed),
            "parents": checks.integer_of_at_least("parents", parents, 2),
            "patience": checks.positive_integer("patience", patience),
            "trees": checks.positive_integer("trees", trees)}
        self._fitted: dict[str, Any] | None = None

    def fit(self, table: PriorEvaluations) -> SymbolicDefaults:
        """Breeds formulas.

        Args:
            table: A `PriorEvaluations`.

        Returns:
            The rule itself.

        Raises:
            TypeError: If `table` is no `PriorEvaluations`.
            ImportError: If deap or scikit-learn is not installed.
        """
        table, settings = checked_table(table), self._settings
        score = _Score(table, Forests(table, settings["trees"], settings["seed"]))
        trees, history = evolve(score.names, len(table.space), score, settings["parents"], settings["population"],
                                settings["generations"], settings["patience"], settings["seed"], score.factor)
        followers = portfolio(table, min(_MOST_FOLLOWERS, len(table.configurations)))
        self._fitted = {
            "space": table.space, "properties": score.names, "trees": dict(zip(table.space, map(simplified, trees))),
            "fallback": followers[0], "integers": sorted(table.integers), "followers": followers, "history": history}
        return self

    @property
    def space(self) -> dict[str, tuple[float, float]]:
        """Dictionary from names of hyperparameters to pairs (low, high)."""
        return self._part("space")

    @property
    def formulas(self) -> dict[str, str]:
        """Dictionary from names of hyperparameters to formulas."""
        return {name: text(tree) for name, tree in self._part("trees").items()}

    @property
    def history(self) -> list[float]:
        """The best mean predicted score after each generation, that of random formulas first."""
        return list(self._part("history"))

    def predict(self, properties: Mapping[str, float]) -> dict[str, Any]:
        """The values for a data set. A warning names those that were clipped to the space, or had no valid value.

        Where a formula has no valid value the value is that of the best configuration on average.

        Args:
            properties: Dictionary with the properties of the table, as of `dataset_properties`; others are not read.

        Returns:
            Dictionary from names of hyperparameters to values: floats, or ints where the table has ints.

        Raises:
            TypeError: If `properties` is no dictionary.
            ValueError: If the rule is not fitted, or a property is missing or no finite number.
        """
        known = checked_properties("properties", properties, self._part("properties"))
        values, changed = {}, []
        for name, tree in self._part("trees").items():
            low, high = self.space[name]
            value = float(evaluate(tree, known))
            if not is_valid(value):
                changed.append(f"{name} = {text(tree)} is no finite number here; it is that of the best configuration "
                               f"on average, {self._part('fallback')[name]:g}")
                value = self._part("fallback")[name]
            elif not low <= value <= high:
                changed.append(f"{name} = {text(tree)} is {value:g} and was clipped to its range from {low:g} to "
                               f"{high:g}")
            value = min(max(value, low), high)
            values[name] = min(max(int(round(value)), int(np.ceil(low))), int(np.floor(high))) if (
                name in self._part("integers")) else value
        if changed:
            warnings.warn("; ".join(changed), stacklevel=2)
        return values

    def suggest(self, dataset: Any, count: int = 1) -> list[dict[str, Any]]:
        """The values of the formulas, and then the portfolio of the table.

        Args:
            dataset: A pair (x, y) or a dictionary of properties.
            count: Positive int.

        Returns:
            List of at most `count` different dictionaries from names to values.
        """
        count = checks.positive_integer("count", count)
        first = self.predict(properties_of(dataset, self._part("properties")))
        return [first, *(dict(entry) for entry in self._part("followers") if entry != first)][:count]

    def unfitted(self) -> SymbolicDefaults:
        """A rule of the same settings that has learned nothing."""
        return SymbolicDefaults(**self._settings)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the rule to a file of JSON."""
        check_fitted("rule", self._fitted is not None)
        pathlib.Path(path).write_text(
            json.dumps({"settings": self._settings, "fitted": self._fitted}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> SymbolicDefaults:
        """The rule of a file that `save` wrote.

        Raises:
            ValueError: If the file holds no such rule.
        """
        try:
            value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            rule, fitted = cls(**value["settings"]), {name: value["fitted"][name] for name in _FIELDS}
            fitted["space"] = {name: (float(low), float(high)) for name, (low, high) in fitted["space"].items()}
            fitted["trees"] = {name: _as_formula(tree, fitted["properties"]) for name, tree in fitted["trees"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("path must be a file that SymbolicDefaults.save wrote. Received: "
                             f"{os.fspath(path)!r}, {type(error).__name__}: {error}") from error
        rule._fitted = fitted
        return rule

    def _part(self, name):
        fitted = self._fitted or {}
        check_fitted("rule", bool(fitted))
        return fitted[name]


class _Score:
    """Mean predicted score of formulas on the data sets of a table, the worst where a value is invalid."""

    def __init__(self, table: PriorEvaluations, forests: Forests) -> None:
        self.names = list(table.properties[0])
        self._known = {name: np.array([entry[name] for entry in table.properties]) for name in self.names}
        self._space, self._forests, self._count = table.space, forests, len(table)
        best = [table.best(index) for index in range(len(table))]
        self._best = np.array([[float(entry[name]) for entry in best] for name in table.space])

    def factor(self, index: int, formula: Any) -> float | None:
        """The median over data sets of the best value over that of a formula; None where there is none."""
        values = np.broadcast_to(evaluate(formula, self._known), self._count)
        with np.errstate(all="ignore"):
            ratios = self._best[index] / values
        ratios = ratios[is_valid(ratios) & (ratios > 0)]
        return float(np.median(ratios)) if len(ratios) else None

    def __call__(self, individuals: list[list[Any]]) -> list[float]:
        """Scores of individuals, each a formula for every hyperparameter."""
        values = np.array([[np.broadcast_to(evaluate(formula, self._known), self._count) for formula in formulas]
                           for formulas in individuals])  # [individuals, hyperparameters, data sets]
        valid = np.all(is_valid(values), axis=(1, 2))
        low, high = np.array(list(self._space.values())).T
        inside = np.clip(np.where(is_valid(values), values, low[:, np.newaxis]), low[:, np.newaxis],
                         high[:, np.newaxis])
        scores = np.mean(self._forests.predict(to_units(self._space, inside.transpose(2, 0, 1))), axis=0)
        outside = np.mean(values != inside, axis=(1, 2))
        return np.where(valid, scores - _OUTSIDE * outside, _WORST).tolist()


def _as_formula(value, properties):
    """A formula of JSON, whose tuples are lists."""
    if isinstance(value, list):
        operator, *arguments = value
        if OPERATORS.get(operator) != len(arguments):
            raise ValueError(f"no operator {operator!r} of {len(arguments)} arguments")
        return (operator, *(_as_formula(argument, properties) for argument in arguments))
    if isinstance(value, str) and value not in properties:
        raise ValueError(f"no property {value!r}")
    return value if isinstance(value, str) else float(value)

"""compare_starts: what a start is worth on a data set that it has not seen, beside all baselines."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from farhox._core import checks
from farhox.starts.baselines import (
    average_order,
    nearest_by_properties,
    neighbour_mean_order,
    neighbour_order,
    portfolio,
)
from farhox.starts.evaluations import PriorEvaluations, checked_table
from farhox.starts.rule import StartRule, properties_of

RANDOM = "random"
_EVALUATIONS = (1, 3, 5)


@dataclasses.dataclass(frozen=True)
class StartComparison:
    """Regrets of several starts on data sets that were held out.

    Attributes:
        evaluations: Tuple of numbers of evaluations.
        names: List of the names of the data sets.
        regrets: Dictionary from methods to arrays [data sets, numbers of evaluations]: 1 minus the best scaled score
            among the first evaluations. NaN where a method has fewer suggestions.
    """

    evaluations: tuple[int, ...]
    names: list[str]
    regrets: dict[str, np.ndarray]

    def means(self) -> dict[str, list[float]]:
        """Dictionary from methods to the mean regrets over data sets, a list in the order of `evaluations`."""
        return {name: [float(value) for value in np.mean(regrets, axis=0)] for name, regrets in self.regrets.items()}

    def table(self) -> str:
        """Mean regrets and their standard errors as a table in Markdown."""
        count = len(self.names)
        lines = ["| start | " + " | ".join(f"regret after {number}" for number in self.evaluations) + " |",
                 "| --- |" + " --- |" * len(self.evaluations)]
        for name, regrets in self.regrets.items():
            errors = np.std(regrets, axis=0) / np.sqrt(max(1, count - 1))
            cells = ["-" if np.isnan(mean) else f"{mean:.3f} ± {error:.3f}" for mean, error in zip(
                np.mean(regrets, axis=0), errors)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Writes a picture of the mean regrets over the number of evaluations.

        Args:
            path: Path of a picture file, in a format that matplotlib writes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs the package matplotlib, which is not installed: "
                              "pip install 'farhox[starts]'") from error
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for index, (name, means) in enumerate(self.means().items()):
            axes.plot(self.evaluations, means, marker="os^Dv*PX"[index % 8], label=name,
                      linestyle=("-", "--", "-.", ":")[index % 4])
        axes.set(xlabel="evaluations on the new data set", ylabel="mean regret", xticks=self.evaluations)
        axes.set_ylim(bottom=0.0)
        axes.grid(True, alpha=0.3)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=150)


def compare_starts(table: PriorEvaluations, methods: Any = None, folds: int | None = None,
                   evaluations: Sequence[int] | None = None, seed: int = 0) -> StartComparison:
    """Regrets of starts on data sets that are held out, beside those of all baselines.

    Every method learns from the data sets that are not held out. Its suggestions for one that is are taken to the
    nearest configurations that were evaluated there, none twice. The regret is 1 minus the best scaled score so far.

    Baselines are `random` (the expectation over all orders), `middle of the ranges`, `best on average`, `portfolio`,
    `nearest, best of each` (hand-made: the best configuration of each of the nearest data sets by ranks of properties)
    and `nearest, mean of ten` (the best by the mean score over the ten nearest). They may be all there is to say: where
    data sets are few or alike, hardly anything beats them.

    Args:
        table: A `PriorEvaluations` of at least two data sets.
        methods: A `StartRule`, a list of them, or a dictionary from names to them or to functions (table, data set,
            count) -> list of at most `count` configurations, where a data set is a pair (x, y) if the table has them,
            and else a dictionary of properties. Rules are copied, and stay as they are. Default: baselines only.
        folds: Int from 2 to the number of data sets: parts that are held out one after the other. Default: each data
            set alone.
        evaluations: Numbers of evaluations, positive ints that increase. Default: 1, 3 and 5, as far as the table has
            so many configurations.
        seed: Non-negative int, of the parts.

    Returns:
        A `StartComparison`.

    Raises:
        TypeError: If `table` or a method is none.
        ValueError: If there are fewer than two data sets, a method has the name of a baseline or gives nothing, or an
            argument is out of range.
    """
    if len(checked_table(table)) < 2:
        raise ValueError(f"A comparison holds data sets out, so there must be two at least. Received: {len(table)}")
    functions = {**_BASELINES, **_functions(methods)}
    folds = checks.integer_in_range("folds", len(table) if folds is None else folds, 2, len(table))
    numbers = _checked_evaluations(evaluations, len(table.configurations))
    order = np.random.default_rng(checks.non_negative_integer("seed", seed)).permutation(len(table))
    if folds == len(table):
        order = np.arange(len(table))
    units, scaled = table.units(), table.scaled_scores()
    regrets = {name: np.full([len(table), len(numbers)], np.nan) for name in (RANDOM, *functions)}
    for held_out in np.array_split(order, folds):
        rest = table.subset([index for index in range(len(table)) if index not in held_out])
        for name, function in functions.items():
            suggest = function(rest)
            for index in held_out:
                dataset = table.properties[index] if table.data is None else table.data[index]
                suggestions = _configurations(name, suggest(dataset, numbers[-1]), table)
                regrets[name][index] = _regrets(table.units(suggestions), units, scaled[index], numbers)
    for index, row in enumerate(scaled):
        regrets[RANDOM][index] = _expected_regrets(row, numbers)
    return StartComparison(tuple(numbers), list(table.names), regrets)


def _functions(methods):
    """Name of each method to a function from a table to a function (data set, count) -> configurations."""
    if methods is None:
        return {}
    if isinstance(methods, StartRule):
        methods = [methods]
    if isinstance(methods, (list, tuple)):
        methods = {type(method).__name__: method for method in methods}
    if not isinstance(methods, Mapping):
        raise TypeError("methods must be a StartRule, a list of them, or a dictionary from names to them. Received: "
                        f"{methods!r}")
    for name, method in methods.items():
        if name == RANDOM or name in _BASELINES:
            raise ValueError(f"A method must have another name than the baselines. Received: {name!r}")
        if not isinstance(method, StartRule) and not callable(method):
            raise TypeError("A method must be a StartRule or a function (table, data set, count) -> configurations. "
                            f"Received: {name!r}: {method!r}")
    return {str(name): _learned(method) for name, method in methods.items()}


def _learned(method) -> Callable[[PriorEvaluations], Any]:
    if not isinstance(method, StartRule):
        return lambda table: lambda dataset, count: method(table, dataset, count)

    def learn(table):
        rule = method.unfitted()
        rule.fit(table)

        def suggest(dataset, count):
            with warnings.catch_warnings():
                # Values are taken to configurations of the table in any case, so that clipping changes nothing.
                warnings.filterwarnings("ignore", message=".*clipped to its range|.*is no finite number here")
                return rule.suggest(dataset, count)

        return suggest

    return learn


def _by_neighbours(order):
    def learn(table):
        names = list(table.properties[0])
        return lambda dataset, count: order(
            table, nearest_by_properties(table, properties_of(dataset, names)), count)

    return learn


_BASELINES: dict[str, Callable[[PriorEvaluations], Any]] = {
    "middle of the ranges": lambda table: lambda dataset, count: [table.middle()],
    "best on average": lambda table: lambda dataset, count: average_order(table, count),
    "portfolio": lambda table: lambda dataset, count: portfolio(table, min(count, len(table.configurations))),
    "nearest, best of each": _by_neighbours(neighbour_order),
    "nearest, mean of ten": _by_neighbours(neighbour_mean_order),
}


def _configurations(name, suggestions, table):
    """What a method suggests, if all of it is configurations with finite values, taken into the space."""
    if not isinstance(suggestions, (list, tuple)) or not suggestions or not all(
            isinstance(entry, Mapping) and set(entry) == set(table.space) and all(
                checks.is_number(value) for value in entry.values()) for entry in suggestions):
        raise ValueError(f"A method must suggest a list of configurations with numbers for {', '.join(table.space)}. "
                         f"Received: {suggestions!r} of {name!r}")
    return [{key: min(max(float(entry[key]), low), high) for key, (low, high) in table.space.items()}
            for entry in suggestions]


def _regrets(suggested, units, scores, numbers):
    """Regrets after so many evaluations of points of the space, each at the nearest configuration not yet tried."""
    free, reached, regrets = np.isfinite(scores), [], []
    for point in suggested[:numbers[-1]]:
        if not np.any(free):
            break
        distances = np.where(free, np.sum((units - point) ** 2, axis=1), np.inf)
        index = int(np.argmin(distances))
        free[index] = False
        reached.append(scores[index])
    for number in numbers:
        enough = len(reached) >= number or not np.any(free)
        regrets.append(1.0 - max(reached[:number]) if enough else np.nan)
    return regrets


def _expected_regrets(scores, numbers):
    """The expected regret of so many configurations drawn without repetition: a sum over the rank of the best."""
    ordered = np.sort(scores[np.isfinite(scores)])
    count, regrets = len(ordered), []
    for number in numbers:
        number = min(number, count)
        # P(best is of rank i) = C(i, number - 1) / C(count, number), by logarithms of factorials.
        ranks = np.arange(number - 1, count)
        logs = (_log_choose(ranks, number - 1) - _log_choose(np.array([count]), number))
        regrets.append(1.0 - float(np.sum(np.exp(logs) * ordered[ranks])))
    return regrets


def _log_choose(n, k):
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(np.max(n)) + 1)))])
    return factorials[n] - factorials[k] - factorials[n - k]


def _checked_evaluations(evaluations, count):
    if evaluations is None:
        return [number for number in _EVALUATIONS if number <= count]
    if not isinstance(evaluations, (list, tuple)) or not evaluations or not all(
            map(checks.is_integer, evaluations)) or list(evaluations) != sorted(set(evaluations)) or not (
                1 <= evaluations[0] and evaluations[-1] <= count):
        raise ValueError("evaluations must be positive integers that increase, up to the number of configurations, "
                         f"{count}. Received: {evaluations!r}")
    return [int(number) for number in evaluations]

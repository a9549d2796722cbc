"""check_hypergradient: a hypergradient against finite differences of the whole inner training, at several steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.sums import sums_as_written
from farhox._core.types import Batch, InnerBatches
from farhox.data.batches import as_inner_batches, batch_at
from farhox.hypergradients.base import HyperGradient
from farhox.insight.tables import table
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.inner_training import InnerTraining

# Steps of the differences over the cube root of the rounding unit, in the order in which they are tried.
_STEPS = (1.0, 0.125, 8.0, 0.015625, 64.0)
# Two steps agree well enough to look no further, and at all.
_AGREES, _CHAOTIC = 1e-4, 0.1
# Rounding units of the outer loss by which a difference can be off without meaning anything.
_ROUNDING = 8.0
# A relative error that asks for causes.
_LARGE = 1e-2


@dataclasses.dataclass(frozen=True)
class CheckedEntry:
    """One entry of the hypergradient beside its finite difference.

    Attributes:
        name: Path of the outer variable.
        index: Index of the entry, a tuple.
        hypergradient: Float.
        finite_difference: Float, (E(λ + h) - E(λ - h)) / 2h.
        error: Float, |difference| over the largest magnitude of the two over all checked entries of the variable; 0
            where rounding explains it; not a number where no two steps agree.
        step_size: Float, h.
        chaotic: Bool: no two steps agree, so that there is no finite difference to compare with.
    """

    name: str
    index: tuple[int, ...]
    hypergradient: float
    finite_difference: float
    error: float
    step_size: float = math.nan
    chaotic: bool = False


@dataclasses.dataclass(frozen=True)
class HypergradientCheck:
    """What `check_hypergradient` found; `print` shows it as a table.

    Attributes:
        entries: List of `CheckedEntry`.
        maximum_error: Float, the largest relative error of the entries at which steps agree; not a number if there are
            none.
        remarks: List of sentences: what may be the cause of a large error, and entries that are chaotic.
    """

    entries: list[CheckedEntry]
    maximum_error: float
    remarks: list[str] = dataclasses.field(default_factory=list)

    def __str__(self):
        rows = [["outer variable", "entry", "hypergradient", "finite difference", "relative error"]]
        for entry in self.entries:
            error = "chaotic: no step agrees" if entry.chaotic else f"{entry.error:.1e}"
            rows.append([entry.name, str(list(entry.index)) if entry.index else "", f"{entry.hypergradient:.8g}",
                         f"{entry.finite_difference:.8g}", error])
        return "\n".join([table(rows), f"largest relative error: {self.maximum_error:.1e}", *self.remarks])


@sums_as_written()
def check_hypergradient(problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch,
                        hypergradient: HyperGradient, max_entries: int = 10,
                        step_size: float | Sequence[float] | None = None, seed: int = 0) -> HypergradientCheck:
    """Compares a hypergradient with central finite differences of the whole inner training.

    ```python
    print(farhox.check_hypergradient(problem, inner_batches, outer_batch, farhox.ReverseHG()))
    ```

    The differences are taken at two steps or more, until two of them agree. Where none do, the training is chaotic in
    that variable: a derivative says nothing there, and no error is reported. A difference that rounding explains is no
    error, so that a derivative of zero is not one of 100 %.

    Use float64 (`keras.config.set_floatx("float64")` before the model is made) to see more than about three digits.
    A truncated or implicit hypergradient is an approximation: its error here is that of the approximation.

    Args:
        problem: A `BilevelProblem`.
        inner_batches: T inner batches.
        outer_batch: The outer batch.
        hypergradient: A `HyperGradient`.
        max_entries: Positive int, entries checked of each outer variable, drawn at random from larger ones.
        step_size: Positive float h in the unconstrained variable, the only step then. Default: it is chosen.
        seed: Int, draws the entries.

    Returns:
        A `HypergradientCheck`.

    Raises:
        ValueError: If `max_entries` or `step_size` is not positive.
        TypeError: If `hypergradient` is not a method.
    """
    checks.positive_integer("max_entries", max_entries)
    if step_size is not None:
        checks.positive_number("step_size", step_size)
    if not isinstance(hypergradient, HyperGradient):
        raise TypeError("A method must be one of farhox' hypergradients, for example farhox.ReverseHG(). "
                        f"Received: {hypergradient!r}")
    inner_batches = as_inner_batches(inner_batches)
    gradients = tf.function(
        lambda: hypergradient.compute(problem, inner_batches, outer_batch).gradients, autograph=False)()

    @tf.function(autograph=False)
    def loss(outer):
        run = InnerTraining(problem, inner_batches, outer=outer).run()
        return problem.outer_loss(run.state, outer, outer_batch)

    values = [np.asarray(value) for value in problem.outer_values()]
    at_values = [float(loss([tf.constant(value) for value in values])) for _ in range(2)]
    generator = np.random.default_rng(seed)
    entries = []
    for position, (variable, value, gradient) in enumerate(zip(problem.outer_variables, values, gradients)):
        unit = float(np.finfo(value.dtype).eps)
        found = []
        for flat_index in sorted(generator.permutation(value.size)[:max_entries]):
            index = tuple(int(i) for i in np.unravel_index(flat_index, value.shape))

            def difference(h):
                ends = []
                for sign in (1.0, -1.0):
                    moved = value.copy()
                    moved[index] += sign * h
                    ends.append((float(loss([tf.constant(moved if i == position else other)
                                             for i, other in enumerate(values)])), float(moved[index])))
                # The distance as it was rounded, not as it was meant.
                return (ends[0][0] - ends[1][0]) / (ends[0][1] - ends[1][1])

            steps = [step_size] if step_size else [unit ** (1 / 3) * factor for factor in _STEPS]
            found.append((index, float(np.asarray(gradient)[index]), *_chosen(difference, steps, unit, at_values[0])))
        entries += _entries(variable.path, found)
    errors = [entry.error for entry in entries if not entry.chaotic]
    maximum = math.nan if not errors or any(math.isnan(error) for error in errors) else max(errors)
    return HypergradientCheck(entries, maximum, _remarks(
        problem, inner_batches, outer_batch, entries, maximum, draws=at_values[0] != at_values[1]))


def _chosen(difference, steps, unit, loss):
    """The finite difference at which two steps agree best: its value, step, resolution, and whether none agree."""
    taken = []
    best = None
    for h in steps:
        value, noise = difference(h), _ROUNDING * unit * abs(loss) / h
        for other, other_h, other_noise in taken:
            apart, size = abs(value - other), max(abs(value), abs(other))
            doubt = max(apart, min(noise, other_noise))
            relative = 0.0 if apart <= noise + other_noise else apart / size
            # Of two that agree the one with less rounding, that of the longer step, counts.
            longer = (value, h, noise) if h > other_h else (other, other_h, other_noise)
            if math.isfinite(apart) and (best is None or (relative, doubt) < best[:2]):
                best = relative, doubt, longer
        taken.append((value, h, noise))
        if best is not None and best[0] <= _AGREES:
            break
    if len(steps) == 1:
        value, h, noise = taken[0]
        return value, h, noise, False
    if best is None or best[0] > _CHAOTIC:
        value, h, noise = taken[0]
        return value, h, noise, True
    value, h, noise = best[2]
    return value, h, noise, False


def _entries(name, found):
    scale = max((max(abs(gradient), abs(value)) for _, gradient, value, _, _, chaotic in found if not chaotic),
                default=0.0)
    entries = []
    for index, gradient, value, h, noise, chaotic in found:
        error = abs(gradient - value)
        error = math.nan if chaotic or math.isnan(error) else max(0.0, error - noise) / (scale or 1.0)
        entries.append(CheckedEntry(name, index, gradient, value, error, h, chaotic))
    return entries


def _remarks(problem, inner_batches, outer_batch, entries, maximum, draws):
    remarks = []
    chaotic = sum(entry.chaotic for entry in entries)
    if chaotic:
        remarks.append(f"{chaotic} of {len(entries)} entries are chaotic: finite differences at no two steps agree, so "
                       "that the derivative says nothing of what a change does. Use fewer inner steps or a smaller "
                       "inner learning rate.")
    if draws:
        remarks.append("Likely cause: the objectives draw random numbers, which differ from call to call. Use Keras' "
                       "layers or a keras.random.SeedGenerator among the state variables, whose draws are repeated.")
    if not maximum <= _LARGE:
        stops = _stopped_gradients(problem, inner_batches, outer_batch)
        if stops:
            remarks.append(f"Likely cause: tf.stop_gradient in the {' and in the '.join(stops)} objective. What it "
                           "stops changes the training, which differences see, and derivatives do not.")
    return remarks


def _stopped_gradients(problem, inner_batches, outer_batch):
    """Which objectives hold a `tf.stop_gradient`, that of a layer or loss of Keras included."""
    outer = problem.outer_values()
    state = problem.initial_state(outer)
    objectives = {
        "inner": lambda: problem.inner_loss(
            state.variables, state.state_variables, outer, batch_at(inner_batches, 0))[0],
        "outer": lambda: problem.outer_loss(state, outer, outer_batch)}
    found = []
    for name, objective in objectives.items():
        graph = tf.function(objective, autograph=False).get_concrete_function().graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        if any(node.op == "StopGradient" for node in nodes):
            found.append(name)
    return found

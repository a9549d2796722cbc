"""health: what a person should know before trusting a hypergradient."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from farhox._core import tree
from farhox._core.inner_state import float_leaves
from farhox._core.sums import sums_as_written
from farhox._core.types import Batch, InnerBatches
from farhox.data.batches import as_inner_batches, batch_at
from farhox.hypergradients.base import HyperGradient, HyperGradientResult
from farhox.hypergradients.episodes import EpisodesHG
from farhox.hypergradients.forward import ForwardHG
from farhox.hypergradients.implicit import ImplicitHG
from farhox.hypergradients.reverse import ReverseHG
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.inner_training import InnerTraining

_CONVERGED = 1e-3
_RESIDUAL = 1e-2
_BIAS = 0.1


@dataclasses.dataclass(frozen=True)
class GradientHealth:
    """The hypergradient of one outer variable.

    Attributes:
        name: Path of the variable.
        norm: Float, Euclidean norm.
        remark: Why it is zero or not finite; empty otherwise.
    """

    name: str
    norm: float
    remark: str


@dataclasses.dataclass(frozen=True)
class HealthReport:
    """What `health` found; `print` shows it as text.

    Attributes:
        method: Name of the method.
        steps: Int, T.
        first_loss, last_loss: Floats, the inner objective before the first and the last step.
        first_gradient_norm, last_gradient_norm: Floats, norms of the inner gradient at s_0 and at s_T, on the first and
            the last inner batch.
        converged: Bool, the inner gradient fell below a thousandth of the first one.
        contraction: Float, estimate of the largest factor by which one step at s_T stretches an adjoint; None if it
            could not be found. Below 1 the dynamics contract.
        truncation_bias: Float, estimate of the relative part of the hypergradient that truncation leaves out,
            contraction^K; None without truncation.
        solver_residual: Float, relative residual of the linear system; None without one.
        gradients: List of `GradientHealth`.
        advice: List of sentences.
    """

    method: str
    steps: int
    first_loss: float
    last_loss: float
    first_gradient_norm: float
    last_gradient_norm: float
    converged: bool
    contraction: float | None
    truncation_bias: float | None
    solver_residual: float | None
    gradients: list[GradientHealth]
    advice: list[str]

    def __str__(self):
        lines = [
            f"{self.method}, T={self.steps}",
            f"inner loss           {self.first_loss:.6g} -> {self.last_loss:.6g}",
            f"inner gradient norm  {self.first_gradient_norm:.3g} -> {self.last_gradient_norm:.3g}"
            f" ({'converged' if self.converged else 'not converged'})"]
        for label, value in (("contraction", self.contraction), ("truncation bias", self.truncation_bias),
                             ("solver residual", self.solver_residual)):
            if value is not None:
                lines.append(f"{label:<20} {value:.3g}")
        lines += [f"hypergradient        {gradient.name}: norm {gradient.norm:.3g}"
                  f"{', ' + gradient.remark if gradient.remark else ''}" for gradient in self.gradients]
        return "\n".join(lines + [f"advice: {sentence}" for sentence in self.advice])


@sums_as_written()
def health(problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch, hypergradient: HyperGradient,
           result: HyperGradientResult | None = None, power_steps: int = 20) -> HealthReport:
    """A report on one computation of a hypergradient: convergence, contraction, bias, residual, zeros, advice.

    The contraction estimate is that of a power iteration with the transposed Jacobian A' of the last inner step at s_T:
    truncation after K steps leaves out a part of the order of contraction^K, and implicit differentiation needs it
    below 1.

    ```python
    print(farhox.insight.health(problem, inner_batches, outer_batch, farhox.ReverseHG(truncation=10)))
    ```

    Args:
        problem: A `BilevelProblem`.
        inner_batches: T inner batches of the computation.
        outer_batch: Its outer batch.
        hypergradient: The `HyperGradient` that computes or computed it; not an `EpisodesHG`.
        result: Its `HyperGradientResult`, started from the initial state; default: it is computed here.
        power_steps: Positive int, products of the power iteration.

    Returns:
        A `HealthReport`.

    Raises:
        TypeError: If `hypergradient` is not a method for one inner problem.
        ValueError: As `hypergradient.compute`.
    """
    if not isinstance(hypergradient, HyperGradient) or isinstance(hypergradient, EpisodesHG):
        raise TypeError("hypergradient must be a method for one inner problem, for example farhox.ReverseHG(). "
                        f"Received: {hypergradient!r}")
    inner_batches = as_inner_batches(inner_batches)
    found: HyperGradientResult = result if result is not None else tf.function(
        lambda: hypergradient.compute(problem, inner_batches, outer_batch), autograph=False)()
    return report_on(problem, hypergradient, found, inner_convergence(problem, inner_batches, found, power_steps))


class InnerConvergence(NamedTuple):
    """What all methods share: the end of the inner training. Fields as in `HealthReport`."""

    steps: int
    first_gradient_norm: float
    last_gradient_norm: float
    contraction: float | None


@sums_as_written()
def inner_convergence(problem: BilevelProblem, inner_batches: InnerBatches, result: HyperGradientResult,
                      power_steps: int = 20) -> InnerConvergence:
    """Gradient norms at both ends of the inner training and the contraction at its end."""
    steps = int(result.diagnostics["inner_steps"])
    last = batch_at(inner_batches, steps - 1)
    return InnerConvergence(
        steps=steps,
        first_gradient_norm=_gradient_norm(problem, problem.initial_state(), batch_at(inner_batches, 0)),
        last_gradient_norm=_gradient_norm(problem, result.state, last),
        contraction=_contraction(problem, result.state, last, power_steps))


def report_on(problem: BilevelProblem, hypergradient: HyperGradient, result: HyperGradientResult,
              inner: InnerConvergence) -> HealthReport:
    """The `HealthReport` of a result whose inner training ended as `inner` says."""
    losses = np.asarray(result.inner_losses)
    truncation = hypergradient.truncation if isinstance(hypergradient, ReverseHG) else None
    bias = None
    if truncation is not None and truncation < inner.steps and inner.contraction is not None:
        bias = min(1.0, inner.contraction ** truncation)
    residual = result.diagnostics.get("solver_residual")
    residual = None if residual is None else float(residual)
    finite_run = bool(np.all(np.isfinite(losses))) and math.isfinite(float(result.outer_loss))
    report = HealthReport(
        method=type(hypergradient).__name__, first_loss=float(losses[0]), last_loss=float(losses[-1]),
        converged=bool(inner.last_gradient_norm <= _CONVERGED * inner.first_gradient_norm), truncation_bias=bias,
        solver_residual=residual, **inner._asdict(),
        gradients=[_gradient_health(variable, np.asarray(gradient), finite_run, truncation)
                   for variable, gradient in zip(problem.outer_variables, result.gradients)],
        advice=[])
    return dataclasses.replace(report, advice=_advice(report, hypergradient, finite_run, problem))


def _gradient_norm(problem, state, batch):
    gradients = problem.inner_gradients(state.variables, state.state_variables, problem.outer_values(), batch)[2]
    return float(tree.norm([gradient for gradient in gradients if gradient is not None]))


def _contraction(problem, state, batch, power_steps):
    """Growth factor of a power iteration with A' of one step at `state`; None where it is not finite."""
    leaves = float_leaves(state)

    @tf.function(autograph=False)
    def iterate():
        training = InnerTraining(problem, tf.nest.map_structure(lambda leaf: tf.convert_to_tensor(leaf)[None], batch))
        system = training.step_system(state, 0)
        start = [tf.cast(tf.random.stateless_normal(tf.shape(leaf), [i, 1]), leaf.dtype)
                 for i, leaf in enumerate(leaves)]

        def body(k, vector, growth):
            length = tree.norm(vector)
            vector = [leaf / tf.cast(tf.where(length > 0, length, tf.ones_like(length)), leaf.dtype)
                      for leaf in vector]
            product = system.input_product(vector)
            return k + 1, product, tf.cast(tree.norm(product), tf.float64)

        return tf.while_loop(lambda k, *_: k < power_steps, body,
                             [tf.constant(0), start, tf.constant(0.0, tf.float64)], parallel_iterations=1)[2]

    value = float(iterate())
    return value if math.isfinite(value) else None


def _gradient_health(variable, gradient, finite_run, truncation):
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    remark = ""
    if not np.all(np.isfinite(gradient)):
        remark = ("not finite: the derivatives overflowed on the way through the inner steps" if finite_run
                  else "not finite: the inner or the outer objective is not finite")
    elif norm == 0:
        remark = (
            "zero: with truncation=0 only the explicit dependence of the outer objective counts" if truncation == 0 else
            "zero: the value has an effect, but its derivative vanishes here (an outer objective that is flat, as "
            "signs and counts are, a saturated bound, a dead unit, or examples that were in no batch)")
    elif 0 < np.count_nonzero(gradient) < gradient.size:
        remark = f"{gradient.size - np.count_nonzero(gradient)} of {gradient.size} entries are zero"
    return GradientHealth(variable.path, norm, remark)


def _advice(report, hypergradient, finite_run, problem):
    advice = []
    expands = report.contraction is not None and report.contraction > 1
    if not finite_run:
        advice.append("The inner training diverged: use a smaller inner learning rate, or fewer steps.")
    elif report.last_loss > report.first_loss:
        advice.append("The inner loss grew: use a smaller inner learning rate.")
    if expands:
        advice.append(
            f"One inner step stretches an adjoint by {report.contraction:.3g}: hypergradients grow with T. Use a "
            "smaller inner learning rate, fewer steps or ReverseHG(truncation=...).")
    if isinstance(hypergradient, ImplicitHG):
        if not report.converged:
            advice.append("ImplicitHG assumes a converged inner problem: use more inner steps, or ReverseHG.")
        if report.solver_residual is not None and not report.solver_residual <= _RESIDUAL:
            advice.append("The linear system is not solved: give the solver more steps, add damping, or use Nystrom.")
    if isinstance(hypergradient, ReverseHG) and report.truncation_bias is not None and report.truncation_bias > _BIAS:
        if report.contraction is not None and 0 < report.contraction < 1:
            needed = math.ceil(math.log(_BIAS) / math.log(report.contraction))
            advice.append(f"Truncation leaves out much of the hypergradient: truncation={needed} would bring the "
                          f"estimated bias to {_BIAS:.0%}.")
        else:
            advice.append(
                "The dynamics do not contract, so truncation leaves out an unknown part: use the full ReverseHG.")
    directions = sum(int(np.prod(variable.shape)) for variable in problem.outer_variables)
    if isinstance(hypergradient, ForwardHG) and directions > 10:
        advice.append(f"ForwardHG carries {directions} directions: ReverseHG costs the same for any number of them.")
    if report.converged and isinstance(hypergradient, ReverseHG) and hypergradient.truncation is None and not expands:
        advice.append("The inner problem converged: ImplicitHG or a truncation needs less memory and time, for outer "
                      "variables that the objectives depend on.")
    return advice

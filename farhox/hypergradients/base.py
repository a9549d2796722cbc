"""What every hypergradient method shares: the interface and the result."""

from __future__ import annotations

import abc
import re
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core.inner_state import InnerState
from farhox._core.types import Batch, Carry, InnerBatches, Tensor, Tensors
from farhox.data.batches import as_inner_batches, as_tensors
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.inner_training import InnerRun, InnerTraining


class HyperGradientResult(NamedTuple):
    """What one computation of a hypergradient returns.

    Attributes:
        gradients: List of tensors aligned with `problem.outer_variables`, dE/dλ.
        outer_loss: Scalar, E(s_T, λ).
        inner_losses: Tensor [T], the inner objective before each step; when the training stopped early, the last one
            fills the rest.
        state: The inner state s_T; pass it back to go on from there.
        carry: The method's own memory; pass it back together with the state.
        diagnostics: Dictionary of scalar tensors. Always there: "finite" (bool), "inner_gradient_norm" (before the last
            step), "inner_steps" (int, the steps taken), "hypergradient_norm". Implicit methods add the residual and the
            steps of their linear solver.
    """

    gradients: Tensors
    outer_loss: Tensor
    inner_losses: Tensor
    state: InnerState
    carry: Carry
    diagnostics: dict[str, Tensor]


class Evaluation(NamedTuple):
    """The inner training and the outer objective without derivatives.

    Attributes:
        outer_loss: Scalar, E(s_T, λ).
        inner_losses: Tensor [T], the inner objective before each step.
        state: The inner state s_T.
    """

    outer_loss: Tensor
    inner_losses: Tensor
    state: InnerState


class HyperGradient(abc.ABC):
    """A method that computes dE/dλ. Subclasses are frozen settings."""

    def compute(self, problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch,
                state: InnerState | None = None, carry: Carry = None) -> HyperGradientResult:
        """Runs T inner steps and computes the hypergradient. Pure TensorFlow: no variable changes.

        Called eagerly it runs a compiled function, which is traced once for each structure and shape of the arguments
        and kept with the problem; after `tf.config.run_functions_eagerly(True)` the objectives run step by step.

        Args:
            problem: A `BilevelProblem`.
            inner_batches: T inner batches: `repeat`, `gather`, or a nest with a leading axis T.
            outer_batch: The batch of the outer objective.
            state: Inner state to start from; default: the initial state Φ_0(λ).
            carry: The method's memory from an earlier result; default: none.

        Returns:
            A `HyperGradientResult`.

        Raises:
            TypeError: If `problem` is not a `BilevelProblem`.
            ValueError: If there is no inner step, or nothing depends on an outer variable; it is named.
        """
        if not isinstance(problem, BilevelProblem):
            raise TypeError(f"problem must be a farhox.BilevelProblem. Received: {problem!r}")
        problem.raise_if_model_changed()
        inner_batches = as_inner_batches(inner_batches)
        outer_batch = as_tensors("outer_batch", outer_batch)
        if tf.executing_eagerly() and not tf.config.functions_run_eagerly():
            return _called(problem.compiled(self, HyperGradient.compute), inner_batches, outer_batch, state, carry)
        return self._compute(problem, inner_batches, outer_batch, state, carry)

    @abc.abstractmethod
    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        """`compute` on checked tensors."""

    def evaluate(self, problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch) -> Evaluation:
        """T inner steps from the initial state and the outer objective: an `Evaluation`, no derivative."""
        if tf.executing_eagerly() and not tf.config.functions_run_eagerly():
            return _called(problem.compiled(self, HyperGradient.evaluate), as_inner_batches(inner_batches), outer_batch)
        training = InnerTraining(problem, inner_batches)
        run = training.run()
        outer_loss = problem.outer_loss(run.state, training.outer, outer_batch)
        return Evaluation(outer_loss, training.losses(run), run.state)

    def predict(self, problem: BilevelProblem, state: InnerState, outer_batch: Batch) -> Any:
        """Targets, predictions and sample weights (or None) of the outer batch at the state `state`, for metrics."""
        return problem.predict_outer(state, problem.outer_values(), outer_batch)

    # Whether the carry is of use when the inner state starts anew.
    carry_outlives_state = False
    # Whether batches have a leading axis of episodes, over which the method averages by itself.
    averages_episodes = False

    def initial_carry(self, problem: BilevelProblem) -> Carry:
        """The memory before the first computation, of the structure of `result.carry`: a nest of tensors."""
        del problem
        return []


class SingleHyperGradient(HyperGradient):
    """A method that looks at one inner training at a time: what most methods are.

    ```python
    @dataclasses.dataclass(frozen=True)
    class Explicit(farhox.hypergradients.SingleHyperGradient):
        def differentiate(self, training, outer_batch, carry):
            run = training.run()
            at_end = training.outer_gradients(run.state, outer_batch)
            gradients = training.gradients(at_end.outer, sees="Explicit sees the outer objective alone.")
            return farhox.hypergradients.result(training, gradients, at_end.loss, run)
    ```
    """

    # Whether features of the batch that all steps share may be computed once.
    shares_features = True

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        training = InnerTraining(problem, inner_batches, state, share_features=self.shares_features)
        return self.differentiate(training, outer_batch, carry)

    @abc.abstractmethod
    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        """The hypergradient of one training.

        Args:
            training: An `InnerTraining`.
            outer_batch: The batch of the outer objective, a nest of tensors.
            carry: The method's memory, or None.

        Returns:
            A `HyperGradientResult`; `result` makes one.
        """


def result(training: InnerTraining, gradients: Tensors, outer_loss: Tensor, run: InnerRun, carry: Carry = (),
           **diagnostics: Any) -> HyperGradientResult:
    """The `HyperGradientResult` of a run of the inner training.

    Args:
        training: An `InnerTraining`.
        gradients: List of tensors aligned with the outer variables.
        outer_loss: Scalar.
        run: The `InnerRun` of all steps.
        carry: The method's memory.
        **diagnostics: Further scalar tensors.
    """
    return HyperGradientResult(
        gradients, outer_loss, training.losses(run), run.state, list(carry),
        {**training.diagnostics(gradients, outer_loss, run), **diagnostics})


def _called(function, *arguments):
    """The compiled function's result; of an assertion that fails, the words alone, as a ValueError."""
    try:
        return function(*arguments)
    except tf.errors.InvalidArgumentError as error:
        found = re.search(r"assertion failed: (\[.*\])", str(error))
        if found is None:
            raise
        raise ValueError(" ".join(re.findall(r"\[([^\]]*)\]", found.group(1)))) from error

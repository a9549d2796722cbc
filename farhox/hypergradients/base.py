"""What every hypergradient method shares: the interface and the result."""

from __future__ import annotations

import abc
import enum
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core import tree
from farhox._core.autodiff import not_differentiable
from farhox._core.inner_state import InnerState
from farhox._core.types import Batch, Carry, InnerBatches, Tensor, Tensors
from farhox.data.batches import as_inner_batches, as_tensors
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.episodes import map_episodes
from farhox.problem.evaluation import with_words_alone
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


class Memory(enum.Enum):
    """What a method has to remember from one hyper-iteration to the next, in `result.carry`.

    Attributes:
        NONE: Nothing.
        WITH_STATE: What belongs to an inner state that goes on, and is of no use where it starts anew.
        ALWAYS: What is of use in any case.
    """

    NONE = "none"
    WITH_STATE = "with state"
    ALWAYS = "always"


class HyperGradient(abc.ABC):
    """A method that computes dE/dλ. Subclasses are frozen settings.

    Attributes:
        remembers: A `Memory`. Methods that remember something have an `initial_carry`.
        needs_online: Bool, whether the method makes sense only where the inner state goes on, `online=True`.
        takes_episodes: Bool, whether the method looks at all episodes of a batch at once; others are given one by one.
    """

    remembers = Memory.NONE
    needs_online = False
    takes_episodes = False

    def compute(self, problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch,
                state: InnerState | None = None, carry: Carry = None,
                iteration: int | Tensor = 0) -> HyperGradientResult:
        """Runs T inner steps and computes the hypergradient. Pure TensorFlow: no variable changes.

        Tapes do not go through the result: `gradients` is what there is to know.

        Called eagerly it runs a compiled function, which is traced once for each structure and shape of the arguments
        and kept with the problem, and traced again where a Python value that the objectives read has changed; after
        `tf.config.run_functions_eagerly(True)` the objectives run step by step.

        Args:
            problem: A `BilevelProblem`; one `over_episodes` has batches and results with one more axis.
            inner_batches: T inner batches: `repeat`, `gather`, or a nest with a leading axis T.
            outer_batch: The batch of the outer objective.
            state: Inner state to start from; default: the initial state Φ_0(λ).
            carry: The method's memory from an earlier result; default: none.
            iteration: Int or scalar integer tensor, the number of the hyper-iteration: what random draws and schedules
                of a method follow.

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
        iteration = tf.cast(iteration, tf.int64)
        if tf.executing_eagerly() and not tf.config.functions_run_eagerly():
            return not_differentiable(with_words_alone(
                problem.compiled(self, HyperGradient.compute), inner_batches, outer_batch, state, carry, iteration),
                problem.outer_values())
        if problem.has_episodes and not self.takes_episodes:
            return _over_episodes(self, problem, inner_batches, outer_batch, state, carry, iteration)
        return not_differentiable(
            self._compute(problem, inner_batches, outer_batch, state, carry, iteration), problem.outer_values())

    @abc.abstractmethod
    def _compute(self, problem, inner_batches, outer_batch, state, carry, iteration) -> HyperGradientResult:
        """`compute` on checked tensors."""

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

    def _compute(self, problem, inner_batches, outer_batch, state, carry, iteration):
        training = InnerTraining(
            problem, inner_batches, state, share_features=self.shares_features, iteration=iteration)
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


def _over_episodes(method, problem, inner_batches, outer_batch, state, carry, iteration):
    """The results of a method for each episode of a problem `over_episodes`, aggregated."""
    def one(inner_batches, outer_batch, kept):
        return method.compute(problem.one_episode, inner_batches, outer_batch, *(kept or (None, None)), iteration)

    episodes = map_episodes(one, inner_batches, outer_batch, None if state is None else (state, carry or []),
                            problem.parallel_iterations)
    return episodes._replace(
        gradients=[problem.aggregated(gradient) for gradient in episodes.gradients],
        outer_loss=problem.aggregated(episodes.outer_loss),
        diagnostics=tree.map(_of_all, episodes.diagnostics))


def _of_all(value):
    """One diagnostic of all episodes: true if it is of all, or the mean, of integers too."""
    if value.dtype == tf.bool:
        return tf.reduce_all(value)
    return tf.reduce_mean(tf.cast(value, tf.float32) if value.dtype.is_integer else value, axis=0)

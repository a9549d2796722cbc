"""ReverseHG: the adjoint of the inner training, walked back from its end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from farhox._core import checks
from farhox._core.cut import kept_bytes
from farhox._core.linearized import zeros_for_none
from farhox._core.types import Batch, Carry
from farhox.hypergradients.base import SingleHyperGradient, result
from farhox.hypergradients.checkpoints import segment_lengths, stored_bytes
from farhox.hypergradients.walk import Walk
from farhox.problem.back_step import BackStep
from farhox.problem.inner_training import InnerTraining

if TYPE_CHECKING:
    from farhox.hypergradients.base import HyperGradientResult


@dataclasses.dataclass(frozen=True)
class ReverseHG(SingleHyperGradient):
    """Hypergradient by reverse-mode differentiation of the inner dynamics.

    Walks back from s_T: gradients += B_t' adjoint, adjoint = A_t' adjoint with A_t = ∂Φ_t/∂s and B_t = ∂Φ_t/∂λ, each
    step recomputed from the stored states before and after it, with the batch, seeds and statistics it had. Costs two
    to three times the inner training whatever the number of outer variables; memory grows by one stored state per step,
    and by intermediate results of the steps, which are kept as long as that saves more than it costs and those of all
    stored steps take no more than `memory`. What is kept changes the result by rounding alone. Up to three steps are
    written out without a loop, where all that the way back needs of them takes no more.

    Args:
        truncation: Non-negative int or None. Differentiate only the last `truncation` steps; 0 keeps dE/dλ alone.
        checkpoint_every: Positive int, "sqrt", "memory" or None. Store one state in this many and recompute the others,
            at the price of running the inner training once more. "sqrt" stores about the square root of T. "memory"
            stores as many as fit: all states if they do, else one in so many, else checkpoints between checkpoints,
            each level of which runs the inner training once more. None: store all.
        step_weights: Tuple of T non-negative numbers that sum to one, or a callable without arguments that returns
            them as a tensor [T]. The hypergradient is then that of Σ_t weight_t E(s_t, λ) over the states after step
            1, ..., T instead of E(s_T, λ) alone, at the price of up to T outer gradients; `outer_loss` stays E(s_T, λ).

        memory: Non-negative int or None, the bytes that intermediate results of all stored steps may take beside the
            states. 0 keeps states alone; None sets no limit. See `BilevelProblem.memory_plan`. With
            `checkpoint_every="memory"` the bytes of everything that is stored at a time, states included; of problems
            over episodes those of one episode.

    Raises:
        ValueError: If an argument is out of range, or `step_weights` come with a truncation, or
            `checkpoint_every="memory"` without a limit. When called: if the number of weights is not T, or the problem
            has a stop tolerance; with `checkpoint_every="memory"`, if T is not known in advance or nothing fits.

    Reference:
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785), Algorithm 1;
        [Shaban et al., 2019](https://arxiv.org/abs/1810.10667) (truncation);
        [Antoniou et al., 2019](https://arxiv.org/abs/1810.09502), section 4 (weights of steps).
    """

    truncation: int | None = None
    checkpoint_every: int | str | None = None
    step_weights: Sequence[float] | Callable[..., Any] | None = None
    memory: float | None = 128 * 2**20

    def __post_init__(self):
        if self.truncation is not None and not (checks.is_integer(self.truncation) and self.truncation >= 0):
            raise ValueError(f"truncation must be a non-negative integer or None. Received: {self.truncation!r}")
        if self.checkpoint_every not in (None, "sqrt", "memory") and (
                not checks.is_integer(self.checkpoint_every) or self.checkpoint_every < 1):
            raise ValueError("checkpoint_every must be a positive integer, 'sqrt', 'memory' or None. "
                             f"Received: {self.checkpoint_every!r}")
        if self.memory is not None and not (checks.is_integer(self.memory) and self.memory >= 0):
            raise ValueError("memory must be a non-negative integer, a number of bytes, or None. "
                             f"Received: {self.memory!r}")
        if self.checkpoint_every == "memory" and not self.memory:
            raise ValueError("checkpoint_every='memory' needs a positive number of bytes. "
                             f"Received: memory={self.memory!r}")
        if self.step_weights is None:
            return
        if self.truncation is not None:
            raise ValueError("step_weights are over all inner steps and cannot come with a truncation. "
                             f"Received: truncation={self.truncation}")
        if not callable(self.step_weights) and not _is_distribution(self.step_weights):
            raise ValueError("step_weights must be a tuple of non-negative numbers that sum to one, a callable that "
                             f"returns them, or None. Received: {self.step_weights!r}")

    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        problem = training.problem
        weights = self._weights_at_states(problem, training.steps)
        steps = training.steps
        # Differentiated steps at most: what is stored has this size, which XLA must know.
        most = steps - self._first_differentiated_step(steps)
        outer = training.outer_graph(outer_batch)
        sources = tuple(i for i, depends in enumerate(outer.depends) if depends)
        # Of a single step back, which has no use for the adjoint before it, no second derivatives are traced.
        single = (isinstance(steps, int) and most == 1 and problem.stop_tolerance is None
                  and (steps > 1 or not training.learns_initial_state))
        back_step = training.once(("step back", sources, single), lambda: BackStep(
            training, list(sources), of_state=not single))
        walk = Walk(training, outer, back_step, weights, most, *self._stored(training, back_step, most))
        if problem.stop_tolerance is not None and self.truncation is not None:
            # Which steps are the last ones shows only at the end: the inner training runs once more.
            steps = training.run().steps
        first = self._first_differentiated_step(steps)

        run, records = training.once(
            ("way there", walk.left_out, tuple(tensor.name for tensor in walk.kept), walk.lengths, walk.writes_out,
             walk.has_its_own_last_step(first, steps)),
            lambda: walk.forward(first, steps))
        if problem.stop_tolerance is not None:
            steps = run.steps
        at_end = walk.outer(run.state)
        sees = "ReverseHG sees what the inner steps, the outer objective and the initial state depend on."
        if not training.from_initial_state:
            sees = sees[:-1] + "; a state that is passed in does not depend on initial values."
        if self.truncation == 0:  # What the user asked for: the explicit dependence alone.
            gradients = zeros_for_none(at_end.outer, training.outer)
        else:
            adjoint, parts = walk.back(records, first, steps, at_end)
            if not training.learns_initial_state or isinstance(first, int) and first > 0:
                adjoint = None
            elif not isinstance(first, int):
                adjoint = [tf.where(first > 0, tf.zeros_like(part), part) for part in adjoint]
            gradients = training.gradients(parts, adjoint=adjoint, sees=sees)
        return result(training, gradients, at_end.loss, run)

    def _first_differentiated_step(self, steps):
        if self.truncation is None:
            return 0
        return max(steps - self.truncation, 0) if isinstance(steps, int) else tf.maximum(steps - self.truncation, 0)

    def _weights_at_states(self, problem, steps):
        """The weights of the states s_0, ..., s_T, the first of which is zero, as a tensor [T + 1]; or None."""
        if self.step_weights is None:
            return None
        if problem.stop_tolerance is not None:
            raise ValueError("step_weights need the number of inner steps in advance. Received a problem with "
                             f"stop_tolerance={problem.stop_tolerance}")
        if callable(self.step_weights):
            weights = tf.cast(self.step_weights(), problem.loss_dtype)
        else:
            weights = tf.constant(self.step_weights, problem.loss_dtype)
        if weights.shape.rank != 1 or not isinstance(steps, int) or weights.shape[0] != steps:
            raise ValueError("step_weights must have one entry per inner step, of which the number must be known. "
                             f"Received: shape {weights.shape} for T={steps}")
        return tf.pad(weights, [[1, 0]])

    def _stored(self, training, back_step, count):
        """The steps between stored states, a list with the length of each level, and the bytes left for other results.

        Args:
            count: Differentiated steps at most.
        """
        memory = math.inf if self.memory is None else self.memory
        if self.checkpoint_every is None or self.step_weights is None and back_step.passes_on:
            return [], memory
        if self.checkpoint_every == "memory":
            if not isinstance(count, int):
                raise ValueError("checkpoint_every='memory' needs the number of inner steps in advance. Received: "
                                 "inner batches of which it is not known when the computation is traced")
            count, state_bytes = max(count, 1), kept_bytes(tf.nest.flatten(training.start))
            lengths = segment_lengths(count, state_bytes, kept_bytes(back_step.kept(math.inf, 1)), memory)
            return lengths, memory - stored_bytes(count, lengths, state_bytes, 0)
        if self.checkpoint_every != "sqrt":
            return [self.checkpoint_every], memory
        if isinstance(count, int):
            return [max(1, math.isqrt(max(count - 1, 0)) + 1)], memory
        return [tf.cast(tf.math.ceil(tf.sqrt(tf.cast(tf.maximum(count, 1), tf.float32))), tf.int32)], memory


def _is_distribution(weights):
    numbers_alone = isinstance(weights, tuple) and all(checks.is_number(weight) for weight in weights)
    return numbers_alone and min(weights, default=-1) >= 0 and abs(sum(weights) - 1) < 1e-5

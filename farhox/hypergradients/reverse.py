"""ReverseHG: the adjoint of the inner training, walked back from its end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from farhox._core import checks
from farhox._core.cut import kept_bytes
from farhox._core.inner_state import OuterGradients, float_leaves
from farhox._core.linearized import zeros_for_none
from farhox._core.types import Batch, Carry
from farhox.hypergradients.base import SingleHyperGradient, result
from farhox.hypergradients.checkpoints import segment_lengths, stored_bytes
from farhox.problem.back_step import BackStep
from farhox.problem.inner_training import InnerRun, InnerTraining
from farhox.problem.record import Record

if TYPE_CHECKING:
    from farhox.hypergradients.base import HyperGradientResult


@dataclasses.dataclass(frozen=True)
class ReverseHG(SingleHyperGradient):
    """Hypergradient by reverse-mode differentiation of the inner dynamics.

    Walks back from s_T: gradients += B_t' adjoint, adjoint = A_t' adjoint with A_t = ∂Φ_t/∂s and B_t = ∂Φ_t/∂λ, each
    step recomputed from the stored states before and after it, with the batch, seeds and statistics it had. Costs two
    to three times the inner training whatever the number of outer variables; memory grows by one stored state per step,
    and by intermediate results of the steps, which are kept as long as that saves more than it costs and those of all
    stored steps take no more than `memory`. What is kept changes the result by rounding alone.

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
        walk = _Walk(training, outer, back_step, weights, most, *self._stored(training, back_step, most))
        if problem.stop_tolerance is not None and self.truncation is not None:
            # Which steps are the last ones shows only at the end: the inner training runs once more.
            steps = training.run().steps
        first = self._first_differentiated_step(steps)

        run, records = training.once(
            ("way there", walk.left_out, tuple(tensor.name for tensor in walk.kept), walk.lengths),
            lambda: walk.forward(training.run(0, first), first, steps))
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


class _Walk:
    """The differentiated part of an inner training, and the way back through it.

    Args:
        training: An `InnerTraining`.
        outer: The outer objective with its derivatives, `training.outer_graph(...)`.
        back_step: The `BackStep` for the leaves that the outer objective reads.
        weights: Tensor [T + 1], the weight of the outer objective at each state, or None for the last state alone.
        most: Differentiated steps at most.
        segments: List, the steps between stored states of each level of checkpoints, the outermost first; empty for a
            single segment all of whose states are stored.
        memory: Bytes for the tensors that are kept beside the states.
    """

    def __init__(self, training: InnerTraining, outer: Any, back_step: BackStep, weights: Any, most: Any, segments: Any,
                 memory: Any) -> None:
        self.training = training
        self.outer = outer
        self.weights = weights
        self.segments = segments
        # Of a number of steps that is not known in advance None: a training has one such tensor.
        self.lengths = tuple(length if isinstance(length, int) else None for length in segments)
        self.most = most
        self.back_step = back_step
        # Whether steps back leave the adjoint and the gradients as they are, or are none: nothing is stored or walked.
        self.left_out = weights is None and (self.back_step.passes_on or isinstance(most, int) and most == 0)
        self.kept = [] if self.left_out else self.back_step.kept(memory, self._stored_steps())

    def _stored_steps(self):
        return [self.most, *self.segments][-1]

    def _record(self):
        return Record(self.training.start, self.kept, self._stored_steps())

    def _num_segments(self, first, steps, level=0):
        length = self.segments[level]
        return (steps - first + length - 1) // length

    def _bounds(self, index, first, steps, level=0):
        start = first + index * self.segments[level]
        return start, tf.minimum(start + self.segments[level], steps)

    def forward(self, run: InnerRun, first: Any, steps: Any) -> Any:
        """The run from step `first` on, and the record of its steps or the first state of each segment."""
        if self.left_out:
            return self.training.run(first, steps, run), None
        return self._recorded(run, first, steps)

    def _recorded(self, run, first, steps, level=0, replay=False):
        """The run over steps whose first states are stored on a level, and what is stored."""
        training = self.training
        if level == len(self.segments):
            run = training.run(first, steps, run, self._record(), replay)
            return run, run.record
        count = self._num_segments(first, steps, level)
        most = self._num_segments(0, [self.most, *self.segments][level], level)
        leaves = tf.nest.flatten(run.state)
        arrays = [tf.TensorArray(leaf.dtype, most, element_shape=leaf.shape, clear_after_read=False) for leaf in leaves]

        def body(index, state, losses, norm, taken, arrays):
            arrays = [array.write(index, leaf) for array, leaf in zip(arrays, tf.nest.flatten(state))]
            run = training.run(*self._bounds(index, first, steps, level), InnerRun(state, losses, norm, taken),
                               replay=replay)
            return index + 1, run.state, run.losses, run.gradient_norm, run.steps, arrays

        _, *ended, arrays = tf.while_loop(
            lambda index, state, losses, norm, taken, arrays: index < count if replay else training.goes_on(
                index, count, norm), body, [tf.constant(0), *run[:4], arrays], parallel_iterations=1)
        return InnerRun(*ended), arrays

    def back(self, records: Any, first: Any, steps: Any, at_end: OuterGradients) -> Any:
        """The adjoint at step `first`, and the gradients with the contribution of each step from there on."""
        training = self.training
        leaves = float_leaves(training.start)
        parts = list(at_end.outer) + [None] * (len(training.parameters) - len(training.outer))
        adjoint = at_end.state
        if self.weights is not None:
            weight = self.weights[steps]
            adjoint, parts = _weighted(weight, adjoint), _weighted(weight, parts)
        if self.left_out:
            return zeros_for_none(adjoint, leaves), parts
        # Loops carry tensors: what nothing depends on is None again afterwards.
        reached = [part is not None or product is not None
                   for part, product in zip(parts, self.back_step.parameter_products)]
        parts = zeros_for_none(parts, training.parameters)
        active = self.back_step.active
        adjoint = [part for part in zeros_for_none([adjoint[i] for i in active], [leaves[i] for i in active])]

        first_apart = self._has_its_own_first_step(first, steps)
        lowest = first + 1 if first_apart else first
        unread = [at_end.state[i] is None and leaves[i].shape.is_fully_defined() for i in active]
        # What the outer objective does not read has an adjoint of zero until the last step is walked back.
        last_apart = any(unread) and self._has_its_own_last_step(lowest, steps)

        def step_apart(record, start, stop, adjoint, parts):
            """The last step, of which `record` holds the states from step `start` on."""
            known = [None if zero else part for zero, part in zip(unread, adjoint)]
            return self._step_back(record, start, tf.convert_to_tensor(stop - 1, tf.int32), known, parts)

        def loop_back(count, body, adjoint, parts):
            _, adjoint, parts = tf.while_loop(
                lambda index, *_: index >= 0, lambda index, *carried: (index - 1, *body(index, *carried)),
                [tf.convert_to_tensor(count - 1, tf.int32), adjoint, parts], parallel_iterations=1)
            return adjoint, parts

        def segments_back(records, first, steps, lowest, level, adjoint, parts, to_end):
            """Steps steps - 1 down to `lowest`, of which the first states are stored from step `first` on.

            A single segment takes the same loops as many do: with other loops around it TensorFlow's graph optimizer
            adds up the terms of a step in another order, and the last bit of the result would depend on the
            checkpoints.
            """
            def segment_back(index, adjoint, parts, to_end=False):
                if not self.segments:
                    start, stop, record = first, steps, records
                else:
                    start, stop = self._bounds(index, first, steps, level)
                    record = self._recomputed(records, index, start, stop, level + 1)
                begin = tf.maximum(start, lowest)
                if level + 1 < len(self.segments):
                    return segments_back(record, start, stop, begin, level + 1, adjoint, parts, to_end)
                if not to_end:
                    return self._steps_back(record, start, begin, stop, adjoint, parts)
                adjoint, parts = step_apart(record, start, stop, adjoint, parts)
                return loop_back(1, lambda _, adjoint, parts: self._steps_back(
                    record, start, begin, stop - 1, adjoint, parts), adjoint, parts)

            count = self._num_segments(first, steps, level) if self.segments else 1
            if to_end:
                adjoint, parts = segment_back(tf.convert_to_tensor(count - 1, tf.int32), adjoint, parts, to_end=True)
                count -= 1
            return loop_back(count, segment_back, adjoint, parts) if self.segments or not to_end else (adjoint, parts)

        if not first_apart or self.most > 1:
            adjoint, parts = segments_back(records, first, steps, lowest, 0, adjoint, parts, last_apart)
        if first_apart:
            record = records
            if self.segments:
                record = self._recomputed(records, 0, first, lowest, len(self.segments))
            parts = self._without_adjoint(first, record, adjoint, parts)
        everything = [tf.zeros_like(leaf) for leaf in leaves]
        for i, part in zip(active, adjoint):
            everything[i] = part
        return everything, [part if ok else None for part, ok in zip(parts, reached)]

    def _has_its_own_first_step(self, first, steps):
        """Whether the last step back, which is the first of those differentiated, is taken apart from the others.

        It has no use for the adjoint before it, unless the initial state is learned.
        """
        if not (isinstance(first, int) and isinstance(steps, int)) or self.training.problem.stop_tolerance is not None:
            return False  # There may be no such step.
        return steps > first and (first > 0 or not self.training.learns_initial_state)

    def _has_its_own_last_step(self, lowest, steps):
        """Whether the first step back, which is the last one of the training, is taken apart from the others."""
        if not (isinstance(lowest, int) and isinstance(steps, int)) or self.training.problem.stop_tolerance is not None:
            return False  # There may be no such step.
        return steps > lowest

    def _recomputed(self, arrays, index, start, stop, level):
        """What is stored of the steps `start` to `stop`, run again from the stored state of this index."""
        training = self.training
        state = tf.nest.pack_sequence_as(training.start, [array.read(index) for array in arrays])
        run = training.before_first_step()._replace(state=state)
        return self._recorded(run, start, stop, level, replay=True)[1]

    def _without_adjoint(self, t, record, adjoint, parts):
        """Step t, the first of the record, as the last one back: the gradients with its contribution."""
        _, products = self.back_step.run(
            t, record.state(0), record.state(1), zip(self.kept, record.kept_values(0)), adjoint, of_state=False)
        return [part if product is None else part + product for part, product in zip(parts, products)]

    def _steps_back(self, record, first, start, stop, adjoint, parts):
        """Steps stop - 1 down to `start`; `record` holds states and kept tensors from step `first` on."""
        def body(t, adjoint, parts):
            return t - 1, *self._step_back(record, first, t, adjoint, parts)

        _, adjoint, parts = tf.while_loop(
            lambda t, *_: t >= start, body, [tf.convert_to_tensor(stop - 1, tf.int32), adjoint, parts],
            parallel_iterations=1)
        return adjoint, parts

    def _step_back(self, record, first, t, adjoint, parts):
        """Step t; `record` holds states and kept tensors from step `first` on."""
        state = record.state(t - first)
        adjoint, products = self.back_step.run(
            t, state, record.state(t - first + 1), zip(self.kept, record.kept_values(t - first)), adjoint)
        parts = [part if product is None else part + product for part, product in zip(parts, products)]
        return self._with_outer(t, state, adjoint, parts)

    def _with_outer(self, t, state, adjoint, parts):
        """Adds weight_t dE/ds and weight_t dE/dλ at the state before step t."""
        if self.weights is None:
            return adjoint, parts

        def added():
            at_state = self.outer(state)
            of_state = [at_state.state[i] for i in self.back_step.active]
            return [[total if part is None else total + part for total, part in zip(
                totals, _weighted(self.weights[t], more) + [None] * len(totals))]
                for totals, more in ((adjoint, of_state), (parts, at_state.outer))]

        return tf.cond(self.weights[t] > 0, added, lambda: [adjoint, parts])


def _weighted(weight, tensors):
    return [None if tensor is None else tf.cast(weight, tensor.dtype) * tensor for tensor in tensors]


def _is_distribution(weights):
    numbers_alone = isinstance(weights, tuple) and all(checks.is_number(weight) for weight in weights)
    return numbers_alone and min(weights, default=-1) >= 0 and abs(sum(weights) - 1) < 1e-5

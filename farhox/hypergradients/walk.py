"""The way back through the differentiated part of an inner training, and what the way there stores for it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from farhox._core.few import is_few
from farhox._core.inner_state import OuterGradients, float_leaves
from farhox._core.linearized import zeros_for_none
from farhox.problem.back_step import BackStep
from farhox.problem.inner_training import InnerRun, InnerTraining
from farhox.problem.record import Record


class Walk:
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
        # A few steps are written out, there and back, where all that the way back needs of them may be stored.
        of_few = None
        leaves = float_leaves(training.start)
        # What the outer objective does not read has an adjoint of zero until the last step is walked back.
        self._unread = [not outer.depends[i] and leaves[i].shape.is_fully_defined() for i in back_step.active]
        if not self.left_out and training.problem.stop_tolerance is None and is_few(most) and (
                most == 1 or not segments and weights is None):
            of_few = self.back_step.kept_of_few(memory, most)
        self.writes_out = of_few is not None
        self.kept: Any = of_few
        if of_few is None:
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

    def forward(self, first: Any, steps: Any) -> Any:
        """The run, and what is stored of its steps from `first` on, for `back`."""
        training = self.training
        if self.left_out:
            return training.run(first, steps, training.run(0, first)), None
        if self.writes_out:
            before = None if isinstance(first, int) and first == 0 else training.run(0, first)
            run = training.run(first, steps, before, Record(training.start, self.kept, few=True))
            return run, run.record
        if not self.has_its_own_last_step(first, steps):
            return self._recorded(training.run(0, first), first, steps)
        run, records = self._recorded(training.run(0, first), first, steps - 1)
        run = training.run(steps - 1, steps, run, Record(training.start, self.kept, few=True))
        return run, (records, run.record)

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
        if self.writes_out:
            return self._back_written_out(records, first, steps, adjoint, parts)
        # Loops carry tensors: what nothing depends on is None again afterwards.
        reached = [part is not None or product is not None
                   for part, product in zip(parts, self.back_step.parameter_products)]
        parts = zeros_for_none(parts, training.parameters)
        active = self.back_step.active
        adjoint = [part for part in zeros_for_none([adjoint[i] for i in active], [leaves[i] for i in active])]

        if self.has_its_own_last_step(first, steps):
            records, last = records
            known = [None if zero else part for zero, part in zip(self._unread, adjoint)]
            steps -= 1
            adjoint, parts = self._step_back(last, steps, steps, known, parts)
        first_apart = self._has_its_own_first_step(first, steps)
        lowest = first + 1 if first_apart else first

        def segments_back(records, first, steps, lowest, level, adjoint, parts):
            """Steps steps - 1 down to `lowest`, of which the first states are stored from step `first` on.

            A single segment takes the same loops as many do: with other loops around it TensorFlow's graph optimizer
            adds up the terms of a step in another order, and the last bit of the result would depend on the
            checkpoints.
            """
            def segment_back(index, adjoint, parts):
                if not self.segments:
                    start, stop, record = first, steps, records
                else:
                    start, stop = self._bounds(index, first, steps, level)
                    record = self._recomputed(records, index, start, stop, level + 1)
                begin = tf.maximum(start, lowest)
                if level + 1 < len(self.segments):
                    return segments_back(record, start, stop, begin, level + 1, adjoint, parts)
                return self._steps_back(record, start, begin, stop, adjoint, parts)

            count = self._num_segments(first, steps, level) if self.segments else 1
            _, adjoint, parts = tf.while_loop(
                lambda index, *_: index >= 0, lambda index, *carried: (index - 1, *segment_back(index, *carried)),
                [tf.convert_to_tensor(count - 1, tf.int32), adjoint, parts], parallel_iterations=1)
            return adjoint, parts

        if not (isinstance(steps, int) and isinstance(lowest, int)) or steps > lowest:
            adjoint, parts = segments_back(records, first, steps, lowest, 0, adjoint, parts)
        if first_apart:
            record = records
            if self.segments:
                record = self._recomputed(records, 0, first, lowest, len(self.segments))
            parts = self._without_adjoint(first, record, adjoint, parts)
        everything = [tf.zeros_like(leaf) for leaf in leaves]
        for i, part in zip(active, adjoint):
            everything[i] = part
        return everything, [part if ok else None for part, ok in zip(parts, reached)]

    def _back_written_out(self, record, first, steps, adjoint, parts):
        """`back` without a loop: what is known to be zero or independent is None all the way."""
        active, leaves = self.back_step.active, float_leaves(self.training.start)
        # Zeros are left out where their shape is known.
        adjoint = [tf.zeros_like(leaves[i]) if adjoint[i] is None and not leaves[i].shape.is_fully_defined()
                   else adjoint[i] for i in active]
        lowest = first + 1 if self._has_its_own_first_step(first, steps) else first
        for t in reversed(range(first, steps)):
            adjoint, products = self.back_step.run(
                t, record.state(t - first), record.state(t - first + 1),
                zip(self.kept, record.kept_values(t - first)), adjoint, of_state=t >= lowest)
            parts = [product if part is None else part if product is None else part + product
                     for part, product in zip(parts, products)]
        everything = [None] * len(leaves)
        for i, part in zip(active, adjoint):
            everything[i] = part
        return zeros_for_none(everything, leaves), parts

    def _has_its_own_first_step(self, first, steps):
        """Whether the last step back, which is the first of those differentiated, is taken apart from the others.

        It has no use for the adjoint before it, unless the initial state is learned.
        """
        if not (isinstance(first, int) and isinstance(steps, int)) or self.training.problem.stop_tolerance is not None:
            return False  # There may be no such step.
        return steps > first and (first > 0 or not self.training.learns_initial_state)

    def has_its_own_last_step(self, first, steps):
        """Whether the first step back, which is the last one of the training, is taken apart from the others.

        It knows which adjoints are zero. A single step that is the first one too is apart as that.
        """
        if not (isinstance(first, int) and isinstance(steps, int)) or self.training.problem.stop_tolerance is not None:
            return False  # There may be no such step.
        return any(self._unread) and steps > first + self._has_its_own_first_step(first, steps)

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

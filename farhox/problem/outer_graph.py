"""The outer objective and its derivatives, traced once into a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from farhox._core.inner_state import InnerState, OuterGradients
from farhox._core.refusals import check_operations
from farhox._core.step_graph import StepGraph
from farhox._core.types import Batch

if TYPE_CHECKING:
    from farhox.problem.inner_training import InnerTraining


class OuterGraph:
    """A callable state -> `OuterGradients` on the graph of the outer objective.

    Args:
        training: An `InnerTraining`.
        outer_batch: The batch of the outer objective.

    Attributes:
        depends: List of bools, whether the objective reads each leaf of the state.
    """

    def __init__(self, training: InnerTraining, outer_batch: Batch) -> None:
        problem, start, outer = training.problem, training.start, training.outer
        flat = tf.nest.flatten(outer_batch)
        counts = [len(tf.nest.flatten(start)), len(outer)]

        def gradients(inputs):
            state = tf.nest.pack_sequence_as(start, inputs[:counts[0]])
            return problem.outer_gradients(state, inputs[counts[0]:sum(counts)],
                                           tf.nest.pack_sequence_as(outer_batch, inputs[sum(counts):]))

        self._graph = StepGraph(gradients, tf.nest.flatten(start) + outer + flat)
        check_operations(self._graph, self._graph.outputs, outer=True)
        self._rest = outer + flat
        self.depends = [part is not None for part in self._graph.outputs.state]

    def __call__(self, state: InnerState) -> OuterGradients:
        return self._graph.nest(self._graph.outputs, tf.nest.flatten(state) + self._rest, checks=True)

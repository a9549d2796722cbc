"""What is stored of consecutive inner steps."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from farhox._core.few import FewTensors
from farhox._core.types import Nest, Tensors


class Record:
    """States of consecutive steps, and tensors of each step's graph, by index, inside loops of a graph too.

    Args:
        like: An inner state.
        kept: List of tensors of the step's graph.
        size: Steps at most, int or scalar tensor.
        arrays: For internal use.
        few: Bool. All indices are ints, and nothing is in a loop: the tensors themselves are the record.
    """

    def __init__(self, like: Nest, kept: Any, size: Any = None, arrays: Any = None, few: bool = False) -> None:
        self.like = like
        self.kept = kept
        self.arrays = arrays
        if arrays is None and few:
            self.arrays = [FewTensors() for _ in [*tf.nest.flatten(like), *kept]]
        elif arrays is None:
            self.arrays = [
                tf.TensorArray(leaf.dtype, size=count, element_shape=leaf.shape, clear_after_read=False)
                for leaves, count in ((tf.nest.flatten(like), size + 1), (kept, size)) for leaf in leaves]

    def with_arrays(self, arrays: Any) -> Record:
        """The same record with the arrays that came out of a loop."""
        return Record(self.like, self.kept, arrays=arrays)

    def written_first(self, state: Nest) -> Record:
        """The record with the state before the first step."""
        return self._written([0] * len(tf.nest.flatten(state)), tf.nest.flatten(state))

    def written(self, index: Any, state: Nest, kept: Any) -> Record:
        """The record with the state after step `index`, and the kept tensors of that step."""
        leaves = tf.nest.flatten(state)
        return self._written([index + 1] * len(leaves) + [index] * len(kept), leaves + kept)

    def _written(self, indices, leaves):
        written = [array.write(index, leaf) for array, index, leaf in zip(self.arrays, indices, leaves)]
        return self.with_arrays(written + self.arrays[len(written):])

    def state(self, index: Any) -> Nest:
        """The state before step `index`."""
        count = len(tf.nest.flatten(self.like))
        return tf.nest.pack_sequence_as(self.like, [array.read(index) for array in self.arrays[:count]])

    def kept_values(self, index: Any) -> Tensors:
        """The kept tensors of step `index`."""
        count = len(tf.nest.flatten(self.like))
        return [array.read(index) for array in self.arrays[count:]]

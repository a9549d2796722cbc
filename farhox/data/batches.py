"""T inner batches that can be read again, in any order, on the way back through the inner training.

Inner batches are one of three things, all of them nests of tensors, so that they can be elements of a `tf.data.Dataset`
and arguments of a `tf.function`: what `repeat` returns (one batch, T times), what `gather` returns (arrays, and the
indices of each batch), or any other nest, whose leaves then have a leading axis T.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from farhox._core import checks, tree
from farhox._core.large_constants import LARGE
from farhox._core.types import Array, Batch, Data, InnerBatches, Nest, Tensor


class RepeatedBatch(NamedTuple):
    """One batch used in each of T inner steps. Made by `repeat`.

    Attributes:
        batch: Nest of tensors.
        steps: Integer tensor [T]; its length carries T, so that T stays static in data sets.
    """

    batch: Batch
    steps: Tensor


class GatheredBatches(NamedTuple):
    """Batches given by indices into arrays. Made by `gather`.

    Attributes:
        data: Nest of tensors with a common leading axis of examples.
        indices: Integer tensor [T, batch].
    """

    data: Nest
    indices: Tensor


def repeat(batch: Batch, steps: int | Tensor) -> RepeatedBatch:
    """The same batch in each of `steps` inner steps: full-batch training.

    Args:
        batch: Nest of arrays or tensors.
        steps: Positive int, T.

    Returns:
        Inner batches.

    Raises:
        ValueError: If `steps` is not a positive integer.
    """
    checks.positive_integer("The number of inner steps", steps)
    return RepeatedBatch(as_tensors("A batch", batch), tf.range(steps))


def stack(batches: Data) -> Nest:
    """A list of T batches of equal shapes as one nest with a leading axis T.

    Args:
        batches: Iterable of nests of arrays or tensors.

    Returns:
        Inner batches.

    Raises:
        ValueError: If there is no batch or no end of them, or they differ in structure or shape.
        TypeError: If it is nothing to go through.
    """
    if isinstance(batches, tf.data.Dataset) and batches.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("batches must be finite. Received a tf.data.Dataset that repeats without end: take(T) cuts it")
    try:
        batches = list(batches)
    except TypeError as error:
        raise TypeError(f"batches must be a list of batches. Received: {batches!r}") from error
    if not batches:
        raise ValueError("stack needs at least one batch. Received an empty list.")
    for batch in batches[1:]:
        try:
            tf.nest.assert_same_structure(batches[0], batch)
        except (TypeError, ValueError) as error:
            raise ValueError(f"All batches must have the same structure. Received: {error}") from error
        shapes = [[tuple(np.shape(leaf)) for leaf in tf.nest.flatten(b)] for b in (batches[0], batch)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"All batches must have the same shapes. Received: {shapes[0]} and {shapes[1]}")
    return tf.nest.map_structure(lambda *leaves: tf.stack(leaves), *batches)


def gather(data: Nest, indices: Array) -> GatheredBatches:
    """Batches by their indices into arrays, which stay where they are.

    Args:
        data: Nest of arrays or tensors with a common leading axis of examples.
        indices: Integers of shape [T, batch].

    Returns:
        Inner batches.

    Raises:
        ValueError: If the indices do not have two axes, the arrays differ in length or have none, or, in eager mode,
            an index is out of range.
        TypeError: If the indices are not integers.
    """
    data = as_tensors("data", data)
    indices = as_tensors("indices", np.asarray(indices) if isinstance(indices, (list, tuple)) else indices)
    if not indices.dtype.is_integer:
        raise TypeError(f"indices must be integers. Received dtype: {indices.dtype.name}")
    if indices.shape.rank is not None and (indices.shape.rank != 2 or indices.shape[1] == 0):
        raise ValueError(f"indices must have shape [T, batch]. Received shape: {tuple(indices.shape)}")
    leaves = tf.nest.flatten(data)
    if not leaves or any(leaf.shape.rank == 0 for leaf in leaves):
        raise ValueError("gather needs arrays with a leading axis of examples. "
                         f"Received {'a scalar' if leaves else 'no array'}.")
    lengths = {leaf.shape[0] for leaf in leaves if leaf.shape.rank and leaf.shape[0] is not None}
    if len(lengths) > 1:
        raise ValueError(f"All arrays must have the same number of examples. Received lengths: {sorted(lengths)}")
    # On a GPU an index out of range would silently read zeros. Inside a graph the values are not known.
    if lengths and tf.executing_eagerly() and tf.size(indices) > 0:
        low, high, length = int(tf.reduce_min(indices)), int(tf.reduce_max(indices)), lengths.pop()
        if low < 0 or high >= length:
            raise ValueError(f"indices must be from 0 to the number of examples - 1 ({length - 1}). "
                             f"Received indices from {low} to {high}")
    return GatheredBatches(data, indices)


def as_tensors(name: str, nest: Nest) -> Nest:
    """The nest with tensors for arrays and tuples for lists, which `tf.data` would pack.

    Raises:
        TypeError: If a leaf is no dense array: None, a generator, a data set, a ragged or sparse tensor.
    """
    def converted(leaf):
        if not isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
            try:
                if isinstance(leaf, np.ndarray) and leaf.nbytes >= LARGE:
                    with tf.init_scope():  # In a graph it would be a constant, of which there are copies then.
                        return tf.convert_to_tensor(leaf)
                return tf.convert_to_tensor(leaf)
            except (TypeError, ValueError):
                pass
        raise TypeError(f"{name} must be a nest of arrays such as (x, y). Received: {type(leaf).__name__}")

    return tf.nest.map_structure(converted, tree.lists_to_tuples(nest))


def as_inner_batches(inner_batches: InnerBatches) -> InnerBatches:
    """Checks inner batches and turns their leaves into tensors.

    Raises:
        ValueError: If there is no tensor, T is zero, or the leading axes differ.
    """
    inner_batches = as_tensors("inner_batches", inner_batches)
    leaves = _leaves_with_steps(inner_batches)
    if not leaves:
        raise ValueError("inner_batches must hold at least one tensor. Received an empty nest.")
    if any(leaf.shape.rank == 0 for leaf in leaves):
        raise ValueError("Inner batches must have a leading axis T, one entry per inner step: use farhox.repeat(batch, "
                         "steps) for the same batch in every step. Received a scalar.")
    counts = {leaf.shape[0] for leaf in leaves if leaf.shape.rank}
    if 0 in counts:
        raise ValueError("There must be at least one inner step. Received inner batches with T=0.")
    if len(counts - {None}) > 1:
        raise ValueError("All tensors of the inner batches must have the same leading axis T. Received leading axes: "
                         f"{sorted(count for count in counts if count is not None)}. Use farhox.repeat(batch, steps) "
                         "for the same batch in every step.")
    return inner_batches


def num_steps(inner_batches: InnerBatches) -> int | Tensor:
    """T: a Python int where it is static, else a scalar int32 tensor."""
    leaf = _leaves_with_steps(inner_batches)[0]
    return leaf.shape[0] if leaf.shape[0] is not None else tf.shape(leaf)[0]


def batch_at(inner_batches: InnerBatches, step: Tensor) -> Batch:
    """The batch of the inner step `step`, a scalar integer tensor."""
    if isinstance(inner_batches, RepeatedBatch):
        return inner_batches.batch
    if isinstance(inner_batches, GatheredBatches):
        indices = inner_batches.indices[step]
        return tf.nest.map_structure(lambda leaf: tf.gather(leaf, indices), inner_batches.data)
    return tf.nest.map_structure(lambda leaf: leaf[step], inner_batches)


def _leaves_with_steps(inner_batches):
    """The tensors whose leading axis is T."""
    if isinstance(inner_batches, RepeatedBatch):
        return [inner_batches.steps]
    if isinstance(inner_batches, GatheredBatches):
        return [inner_batches.indices]
    return tf.nest.flatten(inner_batches)


def examples_of(inner_batches: InnerBatches) -> Nest:
    """The tensors that inner batches take their examples from: a batch, or one with further leading axes."""
    if isinstance(inner_batches, RepeatedBatch):
        return inner_batches.batch
    if isinstance(inner_batches, GatheredBatches):
        return inner_batches.data
    return inner_batches

"""Streams of batches for inner training: `tf.data` pipelines and `keras.utils.PyDataset` as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Data
from farhox.data.batches import GatheredBatches, RepeatedBatch


class HyperIterations(tf.data.Dataset):
    """A data set of hyper-iterations that knows how to skip epochs. What `bilevel_dataset` returns.

    Args:
        dataset: `tf.data.Dataset`, one iteration of which is one epoch.
        advance: Callable that goes on by one epoch without giving its elements out.
    """

    def __init__(self, dataset: Data, advance: Callable[..., Any]) -> None:
        self._dataset = dataset
        self._advance = advance
        super().__init__(dataset._variant_tensor)

    def _inputs(self):
        return [self._dataset]

    @property
    def element_spec(self) -> Any:
        return self._dataset.element_spec

    def skip_epochs(self, epochs: int) -> None:
        """Leaves out the next epochs: for a run that goes on after an interruption, with the data it would have had.

        Order and draws of random augmentation go on as if the epochs had been read. Arrays skip at once. A stream reads
        what it skips, because only its own operations know what they would have drawn.

        Args:
            epochs: Non-negative int.

        Raises:
            ValueError: If it is something else.
        """
        for _ in range(checks.non_negative_integer("epochs", epochs)):
            self._advance()


def is_stream(data: Data) -> bool:
    """Whether data are read as they come, rather than held as arrays."""
    return isinstance(data, (tf.data.Dataset, keras.utils.PyDataset))


def inner_stream(data: Data, inner_steps: int, batch_size: int | None, seed: int | None) -> Any:
    """An endless data set of inner batches, T steps each, from a stream of training data.

    Returns:
        The data set, and the hyper-iterations that go once through the data, or None if that is not known.

    Raises:
        ValueError: See `bilevel_dataset`.
    """
    batches, size, count = _batches("train", data, "batch_size", batch_size, seed)
    if size is None:  # Full batches, read anew for each hyper-iteration.
        steps = tf.range(inner_steps)
        return _map(batches, lambda batch: RepeatedBatch(batch, steps)), 1
    indices = np.arange(inner_steps * size).reshape(inner_steps, size)
    # A last batch that is smaller is filled up from the next pass: all steps have batches of one size.
    flat = batches.rebatch(inner_steps * size, drop_remainder=True)
    return (_map(flat, lambda examples: GatheredBatches(examples, tf.constant(indices))),
            None if count is None else max(1, count // inner_steps))


def outer_stream(data: Data, batch_size: int | None, seed: int | None) -> Any:
    """An endless data set of outer batches from a stream of validation data."""
    return _batches("validation", data, "outer_batch_size", batch_size, seed)[0]


def continued(elements: Data, epoch: int) -> HyperIterations:
    """`HyperIterations` of which each iteration goes on where the last one ended, `epoch` elements long.

    One iterator reads the elements, whoever asks: a pipeline that starts anew in each epoch would repeat the draws of
    `tf.random` operations that are seeded.
    """
    # One element ahead: each holds the batches of T steps.
    iterator = iter(elements.prefetch(1))
    dataset = tf.data.Dataset.counter().map(lambda _: iterator.get_next()).take(epoch)

    def advance():
        for _ in range(epoch):
            iterator.get_next()

    return HyperIterations(dataset, advance)


def _batches(name, data, size_name, batch_size, seed):
    """Endless batches, the size of a full one (None for full-batch training), and their number in a pass if known."""
    if isinstance(data, keras.utils.PyDataset):
        if batch_size is not None:
            raise ValueError(f"A keras.utils.PyDataset makes its own batches. Received: {size_name}={batch_size}")
        data, count = _from_py_dataset(name, data, seed)
    else:
        count = int(data.cardinality())
        count = None if count < 0 else count
    _check_dense(name, data.element_spec)
    whole = False
    if batch_size is not None:
        leading = [spec.shape[0] if spec.shape.rank else 0 for spec in tf.nest.flatten(data.element_spec)]
        if leading and all(length is None for length in leading):
            raise ValueError(f"{size_name} is for a {name} data set of single examples. Received: {size_name}="
                             f"{batch_size} with batches, whose specification is {data.element_spec}")
        data = data.batch(batch_size)
        count = None if count is None else count // batch_size
    elif not is_batched(data.element_spec):
        if data.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError(f"{name} must be finite for full batches. Received a tf.data.Dataset of single examples "
                             f"that repeats without end: give {size_name}, or batch(n)")
        whole = True
        # Counting reads an unknown number of examples once.
        total = int(data.reduce(np.int64(0), lambda total, *_: total + 1)) if count is None else count
        data = data.batch(max(total, 1), drop_remainder=True)
    # Endless before anything is read, so that one iterator with one state of random operations reads all passes.
    iterator = iter(data.repeat())
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(f"{name} must hold at least one example. Received an empty {type(data).__name__}.") from None
    size = int(tf.nest.flatten(first)[0].shape[0])
    if batch_size is not None and size < batch_size:
        kind = "training" if name == "train" else name
        raise ValueError(f"{size_name} must not exceed the number of {kind} examples. "
                         f"Received: {size_name}={batch_size} for {size} examples")
    rest = tf.data.Dataset.counter().map(lambda _: iterator.get_next())
    return tf.data.Dataset.from_tensors(first).concatenate(rest), None if whole else size, count


def _from_py_dataset(name, data, seed):
    """The batches of a `PyDataset` as one pass of a `tf.data.Dataset`, in the shuffled order that `fit` uses too."""
    count = data.num_batches
    if count == 0:
        raise ValueError(f"{name} must hold at least one example. Received a keras.utils.PyDataset of length 0.")
    passes = iter(range(2**62))

    def batch(index):
        element = data[index]
        return tf.nest.map_structure(np.asarray, tuple(element) if isinstance(element, list) else element)

    def one_pass():
        if count is None:
            yield from (batch(index) for index in passes)
            return
        data.on_epoch_begin()
        yield from (batch(int(index)) for index in np.random.default_rng([seed, next(passes)]).permutation(count))
        data.on_epoch_end()

    spec = tf.nest.map_structure(
        lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], tf.as_dtype(leaf.dtype)), batch(0))
    return tf.data.Dataset.from_generator(one_pass, output_signature=spec), count


def _check_dense(name, spec):
    """Raises a TypeError unless all parts of an element are dense tensors."""
    for part in tf.nest.flatten(spec):
        if not isinstance(part, tf.TensorSpec):
            raise TypeError(f"The parts of {name} must be dense tensors. Received: {part}")


def is_batched(spec: Any) -> bool:
    """Whether elements are batches: all parts have a leading axis, and one length as far as lengths are known."""
    shapes = [part.shape for part in tf.nest.flatten(spec)]
    if any(shape.rank == 0 for shape in shapes):
        return False
    return len({shape[0] for shape in shapes if shape.rank} - {None}) <= 1


def _map(dataset, function):
    """`dataset.map`, the function given the element as it is."""
    if isinstance(dataset.element_spec, tuple):
        return dataset.map(lambda *parts: function(parts))
    return dataset.map(function)

"""Training and validation batches in turn, as one data set for `fit`."""

import numbers
from typing import Any

import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Batch, Data


def training_data(x: Data, y: Data, sample_weight: Data) -> Data:
    """The data set that `x` is, or the arrays as one.

    Raises:
        ValueError: If there are targets or sample weights besides a data set.
    """
    if not isinstance(x, tf.data.Dataset):
        return (x, y) if sample_weight is None else (x, y, sample_weight)
    if y is not None or sample_weight is not None:
        raise ValueError("A tf.data.Dataset must hold targets and sample weights itself. Received: y or sample_weight "
                         "besides a data set")
    return x


def as_dataset(data: Data, batch_size: int | None, shuffle: bool, name: str, steps: int | None = None) -> Data:
    """Batches (x, y) or (x, y, sample_weight) from arrays, or a `tf.data.Dataset` as it is.

    Raises:
        ValueError: If there is no data, it is not made of examples with targets, or has no end and no number of steps.
    """
    if isinstance(data, tf.data.Dataset):
        _check_batch(data.element_spec, name)
        cardinality = data.cardinality().numpy()
        if cardinality == 0:
            raise ValueError(f"{name} must have a batch. Received an empty data set")
        if cardinality == tf.data.INFINITE_CARDINALITY and steps is None:
            raise ValueError(f"{name} must end, or have a number of steps: steps_per_epoch, validation_steps. Received "
                             "an infinite data set")
        return data
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3) or any(part is None for part in data[:2]):
        raise ValueError(f"{name} must be a tf.data.Dataset of batches, or arrays (x, y) or (x, y, sample_weight). "
                         f"Received: {type(data).__name__}")
    data = tuple(part for part in data if part is not None)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in tf.nest.flatten(data)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"The arrays of {name} must have one entry per example each. Received lengths: {sizes}")
    if sizes == {0}:
        raise ValueError(f"{name} must have an example. Received arrays of length 0")
    batch_size = 32 if batch_size is None else checks.positive_integer("batch_size", batch_size)
    dataset = tf.data.Dataset.from_tensor_slices(data)
    if shuffle:
        dataset = dataset.shuffle(sizes.pop(), reshuffle_each_iteration=True)
    return dataset.batch(batch_size)


def alternate(train: Data, validation: Data, training_steps: int, validation_steps: int) -> tf.data.Dataset:
    """Batches of `train` once and of `validation` again and again, in turn.

    Returns:
        `tf.data.Dataset` of (flag, batch), the flag True for a validation batch. After every `training_steps` batches
        of `train` come `validation_steps` batches of `validation`.

    Raises:
        ValueError: If the batches of both are not of one structure and type.
    """
    try:
        # A data set joined to none of the other has a shape that fits both.
        both = train.concatenate(validation.take(0)), validation.concatenate(train.take(0)).repeat()
    except (TypeError, ValueError) as error:
        raise ValueError("Training and validation batches must have the same structure and types. Received: "
                         f"{train.element_spec} and {validation.element_spec}") from error
    flagged = [part.map(lambda *batch, flag=flag: (flag, batch)) for flag, part in zip((False, True), both)]
    turns = tf.data.Dataset.from_tensor_slices([0] * training_steps + [1] * validation_steps)
    alternating = tf.data.Dataset.choose_from_datasets(
        flagged, turns.map(lambda turn: tf.cast(turn, tf.int64)).repeat(), stop_on_empty_dataset=True)
    steps = train.cardinality().numpy()
    if steps >= 0:
        alternating = alternating.apply(tf.data.experimental.assert_cardinality(
            steps + steps // training_steps * validation_steps))
    return alternating.prefetch(tf.data.AUTOTUNE)


def unpack(batch: Batch, name: str = "A batch") -> Any:
    """(x, y, sample_weight or None) of a batch, and its number of examples.

    Raises:
        ValueError: If it is something else, or its parts have no common number of examples.
    """
    if isinstance(batch, tuple) and len(batch) == 3 and batch[2] is None:
        batch = batch[:2]  # So Keras passes arrays without sample weights.
    _check_batch(batch, name)
    batch = tf.nest.map_structure(tf.convert_to_tensor, tuple(batch))
    x, y, weight = batch if len(batch) == 3 else (*batch, None)
    return x, y, weight, tf.shape(tf.nest.flatten(x)[0])[0]


def _check_batch(batch, name):
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(f"{name} must be a tuple (x, y) or (x, y, sample_weight). Received: {type(batch).__name__}"
                         f"{f' of length {len(batch)}' if isinstance(batch, (tuple, list)) else ''}")
    shapes = [tf.TensorShape(() if isinstance(leaf, (numbers.Number, str)) else leaf.shape)
              for leaf in tf.nest.flatten(batch)]
    sizes = {shape[0] for shape in shapes if shape.rank}
    if any(shape.rank == 0 for shape in shapes) or len(sizes - {None}) > 1:
        raise ValueError(f"{name} cannot be split into examples, each with a draw of the hyperparameters: all parts "
                         f"must have one leading axis of examples. Received shapes: {[str(s) for s in shapes]}")

"""The data of a tuned training: rounds of about twenty steps, an outer batch each, and batches to evaluate on."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Data
from farhox.data import bilevel_dataset
from farhox.data.streams import is_batched, is_stream

_ROUND = 20  # Steps from one update of the hyperparameters to the next, about.
_OUTER_BATCHES = 5  # An outer batch has the examples of so many training batches.
_MOST_EVALUATED = 256


def rounds_of(train: Data, validation: Data, batch_size: int | None, steps_per_epoch: int | None,
              seed: int) -> Any:
    """Data as rounds of steps.

    Args:
        train, validation, batch_size, steps_per_epoch: As of `Tuner.fit`.
        seed: Int.

    Returns:
        Hyper-iterations, their number in an epoch, their inner steps, and batches to evaluate on.

    Raises:
        ValueError: See `Tuner.fit`.
    """
    if is_stream(train):
        if batch_size is not None:
            raise ValueError("Batches of a data set have a size already. Received: "
                             f"batch_size={batch_size} with a {type(train).__name__}")
        _check_batched("The training data", train)
        count = train.num_batches if isinstance(train, keras.utils.PyDataset) else int(train.cardinality())
        count = None if count is None or count < 0 else count
    else:
        shapes = [np.shape(part) for part in tf.nest.flatten(train)]
        if not isinstance(train, (tuple, list)) or not shapes or not all(shapes):
            raise ValueError("The training data must be arrays x and y, a tf.data.Dataset of batches or a "
                             f"keras.utils.PyDataset. Received: {type(train).__name__} with shapes {shapes}")
        examples = shapes[0][0]
        batch_size = checks.positive_integer("batch_size", min(32, examples) if batch_size is None else batch_size)
        batch_size = max(1, min(batch_size, examples))
        count = examples // batch_size
    if steps_per_epoch is not None:
        count = checks.positive_integer("steps_per_epoch", steps_per_epoch)
    if count is None:
        raise ValueError("The number of batches in an epoch must be known. Received a data set of unknown length: "
                         "give steps_per_epoch")
    rounds = max(1, math.ceil(count / _ROUND))
    inner_steps = max(1, math.ceil(count / rounds))
    outer, evaluated, outer_size = _validation(validation, batch_size)
    data = bilevel_dataset(train, outer, inner_steps, batch_size=batch_size, outer_batch_size=outer_size,
                           hyper_iterations=rounds, seed=seed)
    return data, rounds, inner_steps, evaluated


def _validation(data, batch_size):
    """Outer data, batches to evaluate on, and the size of outer batches of arrays."""
    if isinstance(data, keras.utils.PyDataset):
        return data, _PyBatches(data), None
    if isinstance(data, tf.data.Dataset):
        _check_batched("validation_data", data)
        first = next(iter(data), None)
        if first is None:
            raise ValueError("validation_data must hold at least one batch. Received an empty tf.data.Dataset.")
        size = int(tf.nest.flatten(first)[0].shape[0])
        return data.rebatch(_OUTER_BATCHES * (batch_size or size)), data, None
    data = tuple(data) if isinstance(data, list) else data
    shapes = [np.shape(part) for part in tf.nest.flatten(data)]
    if not isinstance(data, tuple) or not all(shapes) or len({shape[0] for shape in shapes}) > 1 or not shapes[0][0]:
        raise ValueError("validation_data must be a pair of arrays (x, y) with at least one example, a tf.data.Dataset "
                         f"or a keras.utils.PyDataset. Received: {type(data).__name__} with shapes {shapes}")
    count = shapes[0][0]
    size = min(count, _OUTER_BATCHES * (batch_size or 32))
    return data, tf.data.Dataset.from_tensor_slices(data).batch(max(size, min(count, _MOST_EVALUATED))), size


def _check_batched(name, data):
    if isinstance(data, tf.data.Dataset) and not is_batched(data.element_spec):
        raise ValueError(f"{name} must be batches of examples: apply .batch(32). Received a tf.data.Dataset of single "
                         f"examples, whose specification is {data.element_spec}")


class _PyBatches:
    """The batches of a `PyDataset` in their order."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __iter__(self):
        return (self._data[index] for index in range(self._data.num_batches))

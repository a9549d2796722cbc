"""The start of a tuned training where it is learned: examples of the training data, and values for the rows."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Data
from farhox.data.streams import is_stream
from farhox.tuner import report

_MOST_EXAMPLES = 100_000


def examples_of(train: Data, steps_per_epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of the training data; of a data set of batches the first 100,000 of an epoch.

    Args:
        train, steps_per_epoch: As of `Tuner.fit`.

    Raises:
        TypeError: If there are several inputs or targets.
    """
    batches = [train]
    if isinstance(train, keras.utils.PyDataset):
        count = train.num_batches if steps_per_epoch is None else steps_per_epoch
        batches = (train[index] for index in range(count or 0))
    elif is_stream(train):
        batches = train if steps_per_epoch is None else train.take(steps_per_epoch)
    inputs, targets, read = [], [], 0
    for batch in batches:
        x, y = _pair(batch)
        inputs.append(x)
        targets.append(y)
        read += len(x)
        if read >= _MOST_EXAMPLES:
            break
    if not inputs:
        raise ValueError("A learned start reads the training data, so that there must be some. Received: none")
    return np.concatenate(inputs), np.concatenate(targets)


def assign(rows: list[Any], values: dict[str, Any]) -> str:
    """Gives the hyperparameters of rows their values, within their ranges. Returns a line that says which.

    Args:
        rows: List of `Tunable`.
        values: Dictionary from names of hyperparameters, or kinds, to numbers.
    """
    given = []
    for row in rows:
        value = values.get(row.name, values.get(row.kind.name))
        if value is None or row.hyperparameter is None:
            continue
        room = 0.0 if row.kind.log or not np.isfinite(row.high - row.low) else 1e-3 * (row.high - row.low)
        row.hyperparameter.assign(float(np.clip(value, row.low + room, row.high - room)))
        given.append(f"{row.name} {report.number(row.value())}")
    return f"start, learned from earlier data sets: {', '.join(given)}"


def _pair(batch):
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or any(
            isinstance(part, (tuple, list, dict)) for part in batch[:2]):
        raise TypeError("A learned start reads training data of one input and one target, as arrays. Received: "
                        f"{tf.nest.map_structure(lambda part: type(part).__name__, batch)}")
    return np.asarray(batch[0]), np.asarray(batch[1])

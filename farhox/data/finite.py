"""Where data hold a value that is not finite: one such value in one example spoils all that is computed of it."""

from typing import Any

import tensorflow as tf

from farhox._core import tree
from farhox._core.types import Nest


def first_not_finite(nest: Nest) -> Any:
    """The place of the first value in a nest of tensors that is not finite, in TensorFlow operations.

    Returns:
        Integer tensor [3]: the number of the tensor in the nest, from 1 on, or 0 where everything is finite; and the
        first two indices of the value, -1 where the tensor has fewer axes.
    """
    place = tf.zeros([3], tf.int64)
    for number, leaf in reversed(list(enumerate(tf.nest.flatten(nest), start=1))):
        if not leaf.dtype.is_floating:
            continue
        rank = leaf.shape.rank or 1  # An unknown number of axes counts as one.
        columns = tf.shape(leaf, out_type=tf.int64)[1] if rank > 1 else tf.constant(1, tf.int64)
        table = tf.logical_not(tf.math.is_finite(leaf))
        if rank > 2:
            table = tf.reduce_any(table, axis=list(range(2, rank)))
        # One more entry, which is true, so that there is a first one in empty tensors too.
        bad = tf.concat([tf.reshape(table, [-1]), [True]], axis=0)
        first = tf.argmax(tf.cast(bad, tf.int32), output_type=tf.int64)
        found = first < tf.size(table, out_type=tf.int64)
        columns = tf.maximum(columns, 1)
        row, column = first // columns if leaf.shape.rank != 0 else -1, first % columns if rank > 1 else -1
        place = tf.where(found, tf.stack([tf.cast(part, tf.int64) for part in (number, row, column)]), place)
    return place


def raise_if_not_finite(name: str, nest: Nest) -> None:
    """Raises a ValueError that says where data hold NaN or infinity; inside a graph values are not known."""
    if not tf.executing_eagerly() or tree.is_finite(nest):
        return
    raise ValueError(f"{name} must hold finite numbers. Received NaN or infinity in "
                     f"{place_in_words(first_not_finite(nest).numpy())}")


def place_in_words(place: Any) -> str:
    """A place found by `first_not_finite`, as a person reads it."""
    number, *index = (int(part) for part in place)
    return f"array {number} at index {[part for part in index if part >= 0]}"

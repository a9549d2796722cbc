"""Sample weights of episodes: an example of weight zero is not there, so that tasks of different size fit one shape."""

from typing import Any

import keras
import tensorflow as tf

from farhox._core.types import Batch, Metrics, Tensor


def with_both_weights(support: Batch, query: Batch) -> Any:
    """Support and query as tuples, with sample weights both if one of them has any."""
    if len(support) == len(query) == 2:
        return tuple(support), tuple(query)
    return with_weights(support), with_weights(query)


def with_weights(part: Any) -> Any:
    """(x, y, weights) of (x, y) or (x, y, weights) with a leading axis of episodes: ones by default, floating point."""
    if len(part) == 2:
        return *part, tf.ones(tf.shape(tf.nest.flatten(part[1])[0])[:2], keras.config.floatx())
    weights = tf.convert_to_tensor(part[2])
    return *part[:2], weights if weights.dtype.is_floating else tf.cast(weights, keras.config.floatx())


def joined(metrics: Any, weighted_metrics: Any) -> Metrics | None:
    """The metrics that a learner is compiled with, for Keras: all of them count a query by its sample weight."""
    parts = [part if isinstance(part, (list, tuple)) else [part] for part in (metrics, weighted_metrics) if part]
    return [metric for part in parts for metric in part] or None


def scaled(weights: Tensor, loss: Any) -> Any:
    """Sample weights for a Keras loss, which divides by the number of examples, those of weight zero among them.

    With them the loss of an episode is sum_i weight_i loss_i / (number of examples whose weight is not zero), as that
    of a Keras model whose masked examples are left out.

    Args:
        weights: Tensor [episodes, examples, ...].
        loss: The loss, as for `supervised_problem`.

    Returns:
        Tensor of the same shape.
    """
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    if isinstance(loss, keras.losses.Loss) and loss.reduction == "sum":
        return weights
    axes = list(range(1, weights.shape.rank))
    number = tf.reduce_sum(tf.ones_like(weights), axes, keepdims=True)
    present = tf.reduce_sum(tf.cast(weights != 0, weights.dtype), axes, keepdims=True)
    return weights * tf.math.divide_no_nan(number, present)


def is_present(weights: Tensor) -> Tensor | None:
    """Which examples have any weight: bools [examples] of weights [examples, ...]; None of None."""
    if weights is None:
        return None
    return tf.reduce_any(weights != 0, axis=list(range(1, weights.shape.rank)))


def order_of_present(weights: Tensor, steps: int, batch_size: int, seed: Tensor) -> Tensor:
    """Examples in random order, again and again without replacement, those of weight zero left out.

    The order of an episode does not depend on how many examples of weight zero come after the others.

    Args:
        weights: Tensor [episodes, examples, ...].
        steps: Int, the number of batches.
        batch_size: Int.
        seed: Int64 tensor [2].

    Returns:
        Int tensor [episodes, steps * batch_size] of places; all of one example where there is none of any weight.
    """
    taken, examples = steps * batch_size, tf.shape(weights)[1]
    present = tf.reduce_any(weights != 0, axis=list(range(2, weights.shape.rank)))
    # As many passes as a single example needs. The keys of an example are the same whatever comes after it.
    keys = tf.transpose(tf.random.stateless_uniform([examples, taken], seed))
    order = tf.argsort(tf.where(present[:, None], keys, 2.0), axis=-1, stable=True)
    number = tf.maximum(tf.reduce_sum(tf.cast(present, tf.int32), axis=1, keepdims=True), 1)
    place = tf.range(taken)[None]
    places = place // number * examples + place % number
    return tf.gather(tf.reshape(order, [tf.shape(order)[0], taken * examples]), places, batch_dims=1)


def weighted_mean(values: Tensor, weights: Tensor | None, axis: int = 0) -> Tensor:
    """sum(weights * values) / sum(weights) over the examples of an episode; without weights the mean; NaN of none.

    Args:
        values: Tensor [..., examples, ...].
        weights: Tensor of the same shape or with fewer axes at the end, or None.
        axis: Int, the axis of examples; the mean is taken over it and all behind.
    """
    if weights is None:
        return tf.reduce_mean(values, axis=list(range(axis, values.shape.rank)))
    counts = tf.cast(weights, values.dtype)
    if counts.shape.rank > values.shape.rank:
        counts = tf.squeeze(counts, -1)
    if values.shape.rank > counts.shape.rank:
        values = tf.reduce_mean(values, axis=list(range(counts.shape.rank, values.shape.rank)))
    axes = list(range(axis, values.shape.rank))
    return tf.reduce_sum(counts * values, axes) / tf.reduce_sum(counts, axes)

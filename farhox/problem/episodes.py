"""Batches with a leading axis of episodes: several inner problems that share the outer variables."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core.types import Batch, InnerBatches, Nest, Tensor
from farhox.data.batches import GatheredBatches, RepeatedBatch


def num_episodes(inner_batches: InnerBatches) -> int | Tensor:
    """The number of episodes of inner batches that have a leading axis of them: an int where it is static."""
    leaf = tf.nest.flatten(_sliced_and_shared(inner_batches)[0])[0]
    return leaf.shape[0] if leaf.shape[0] is not None else tf.shape(leaf)[0]


def episode_at(inner_batches: InnerBatches, index: Tensor) -> Any:
    """The inner batches of one episode."""
    sliced, shared = _sliced_and_shared(inner_batches)
    return _rejoined(inner_batches, tf.nest.map_structure(lambda leaf: leaf[index], sliced), shared)


def map_episodes(function: Callable[..., Any], inner_batches: InnerBatches, outer_batch: Batch,
                 kept: Nest = None, parallel_iterations: int = 1) -> Any:
    """`function(inner_batches, outer_batch, kept)` of each episode, its results stacked; None stays None.

    The function is traced once, into a graph function that the loop over episodes calls, for `parallel_iterations` of
    them at a time.
    """
    sliced, shared = _sliced_and_shared(inner_batches)
    elements = (sliced, outer_batch, kept)
    leaves = [leaf for leaf in tf.nest.flatten(elements) if leaf is not None]

    def one(*episode):
        episode = iter(episode)
        sliced, outer_batch, kept = tf.nest.map_structure(
            lambda leaf: None if leaf is None else next(episode), elements)
        return function(_rejoined(inner_batches, sliced, shared), outer_batch, kept)

    traced = tf.function(one, autograph=False).get_concrete_function(
        *[tf.TensorSpec(leaf.shape[1:], leaf.dtype) for leaf in leaves])
    outputs = tf.nest.flatten(traced.structured_outputs)
    signature = [tf.TensorSpec(output.shape, output.dtype) for output in outputs if output is not None]
    stacked = iter(tf.map_fn(
        lambda episode: [output for output in tf.nest.flatten(traced(*episode)) if output is not None],
        leaves, fn_output_signature=signature, parallel_iterations=parallel_iterations))
    return tf.nest.map_structure(lambda output: None if output is None else next(stacked), traced.structured_outputs)


def _sliced_and_shared(inner_batches):
    """The part of the inner batches that has an axis of episodes, and the part that all episodes share."""
    if isinstance(inner_batches, GatheredBatches):
        return inner_batches.indices, inner_batches.data
    if isinstance(inner_batches, RepeatedBatch):
        if inner_batches.steps.shape.rank == 1:
            return inner_batches.batch, inner_batches.steps
        return inner_batches, None
    return inner_batches, None


def _rejoined(like, sliced, shared):
    if isinstance(like, GatheredBatches):
        return GatheredBatches(shared, sliced)
    if isinstance(like, RepeatedBatch) and shared is not None:
        return RepeatedBatch(sliced, shared)
    return sliced

"""EpisodesHG: several inner problems that share the outer variables, one after another in one hyper-iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from farhox._core import tree
from farhox._core.inner_state import InnerState
from farhox._core.types import Batch, Carry, InnerBatches, Nest, Tensor
from farhox.data.batches import GatheredBatches, RepeatedBatch
from farhox.hypergradients.base import HyperGradient, HyperGradientResult
from farhox.problem.bilevel import BilevelProblem

if TYPE_CHECKING:
    from farhox.hypergradients.base import Evaluation


@dataclasses.dataclass(frozen=True)
class EpisodesHG(HyperGradient):
    """Hypergradients of several episodes, aggregated: meta-batches, folds of a cross-validation.

    Every tensor of the inner batches and of the outer batch has an additional leading axis of episodes (for `gather`
    the indices have, and the arrays are shared: [episodes, T, batch]). Each episode starts from the same Φ_0(λ) and is
    trained on its own; memory is that of one episode.

    In the result `outer_loss` is the aggregated scalar, `inner_losses` is [episodes, T], the tensors of `state` and
    `carry` have the leading axis of episodes, and diagnostics are means over episodes ("finite": of all).

    Args:
        hypergradient: A `HyperGradient` for one episode.
        aggregation: Callable, tensor [episodes, ...] to tensor [...], for hypergradients and the outer loss.
            Default: the mean.

    Raises:
        TypeError: If `hypergradient` is not a method or `aggregation` not callable.

    Reference:
        [Franceschi et al., 2018](https://arxiv.org/abs/1806.04910), equation 3.
    """

    hypergradient: HyperGradient
    aggregation: Any = None

    averages_episodes = True

    def __post_init__(self):
        if isinstance(self.hypergradient, HyperGradient) and self.hypergradient.averages_episodes:
            raise TypeError("hypergradient must be a method for one episode, for example farhox.ReverseHG(). "
                            f"{type(self.hypergradient).__name__} averages over episodes itself: use it as it is. "
                            f"Received: {self.hypergradient!r}")
        if not isinstance(self.hypergradient, HyperGradient):
            raise TypeError("hypergradient must be a method for one episode, for example farhox.ReverseHG(). "
                            f"Received: {self.hypergradient!r}")
        if self.aggregation is not None and not callable(self.aggregation):
            raise TypeError(f"aggregation must be a callable [episodes, ...] -> [...]. Received: {self.aggregation!r}")

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        def one(inner_batches, outer_batch, kept):
            return self.hypergradient.compute(problem, inner_batches, outer_batch, *(kept or (None, None)))

        episodes = map_episodes(one, inner_batches, outer_batch, None if state is None else (state, carry or []))
        return HyperGradientResult(
            gradients=[self._aggregated(gradient) for gradient in episodes.gradients],
            outer_loss=self._aggregated(episodes.outer_loss),
            inner_losses=episodes.inner_losses,
            state=episodes.state,
            carry=episodes.carry,
            diagnostics=tree.map(_over_episodes, episodes.diagnostics))

    def evaluate(self, problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch) -> Evaluation:
        def one(inner_batches, outer_batch, _):
            return self.hypergradient.evaluate(problem, inner_batches, outer_batch)

        episodes = map_episodes(one, inner_batches, outer_batch)
        return episodes._replace(outer_loss=self._aggregated(episodes.outer_loss))

    def predict(self, problem: BilevelProblem, state: InnerState, outer_batch: Batch) -> Any:
        def one(_, outer_batch, state):
            return self.hypergradient.predict(problem, state, outer_batch)

        parts = map_episodes(one, (), outer_batch, state)
        return tf.nest.map_structure(
            lambda part: None if part is None else tf.reshape(part, tf.concat([[-1], tf.shape(part)[2:]], axis=0)),
            parts)

    def initial_carry(self, problem: BilevelProblem) -> Carry:
        raise ValueError("Episodes start anew in every hyper-iteration: EpisodesHG cannot be used with online=True.")

    def _aggregated(self, values):
        return tf.reduce_mean(values, axis=0) if self.aggregation is None else self.aggregation(values)


def num_episodes(inner_batches: InnerBatches) -> int | Tensor:
    """The number of episodes of inner batches that have a leading axis of them: an int where it is static."""
    leaf = tf.nest.flatten(_sliced_and_shared(inner_batches)[0])[0]
    return leaf.shape[0] if leaf.shape[0] is not None else tf.shape(leaf)[0]


def episode_at(inner_batches: InnerBatches, index: Tensor) -> Any:
    """The inner batches of one episode."""
    sliced, shared = _sliced_and_shared(inner_batches)
    return _rejoined(inner_batches, tf.nest.map_structure(lambda leaf: leaf[index], sliced), shared)


def _over_episodes(value):
    """One diagnostic of all episodes: true if it is of all, or the mean, of integers too."""
    if value.dtype == tf.bool:
        return tf.reduce_all(value)
    return tf.reduce_mean(tf.cast(value, tf.float32) if value.dtype.is_integer else value, axis=0)


def map_episodes(function: Callable[..., Any], inner_batches: InnerBatches, outer_batch: Batch,
                 kept: Any = None) -> Nest:
    """`function(inner_batches, outer_batch, kept)` of each episode, its results stacked; None stays None.

    The function is traced once, into a graph function that the loop over episodes calls.
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
        leaves, fn_output_signature=signature, parallel_iterations=1))
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

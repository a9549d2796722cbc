"""The inner training and the outer objective without derivatives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from farhox._core.autodiff import not_differentiable
from farhox._core.inner_state import InnerState
from farhox._core.types import Batch, InnerBatches, Nest, Tensor
from farhox.data.batches import as_inner_batches, as_tensors
from farhox.problem.episodes import map_episodes
from farhox.problem.inner_training import InnerTraining

if TYPE_CHECKING:
    from farhox.problem.bilevel import BilevelProblem


class Evaluation(NamedTuple):
    """The inner training and the outer objective without derivatives.

    Attributes:
        outer_loss: Scalar, E(s_T, λ).
        inner_losses: Tensor [T], the inner objective before each step; of a problem over episodes [episodes, T].
        state: The inner state s_T; of a problem over episodes with a leading axis of them.
        predictions: (targets, predictions, sample weights or None) of the outer batch, over episodes one after the
            other; None where the problem has no `outer_predictions`.
    """

    outer_loss: Tensor
    inner_losses: Tensor
    state: InnerState
    predictions: Any = None


def evaluate(problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch,
             state: InnerState | None = None, iteration: int | Tensor = 0) -> Evaluation:
    """See `BilevelProblem.evaluate`."""
    inner_batches = as_inner_batches(inner_batches)
    outer_batch = as_tensors("outer_batch", outer_batch)
    iteration = tf.cast(iteration, tf.int64)
    if tf.executing_eagerly() and not tf.config.functions_run_eagerly():
        return not_differentiable(with_words_alone(
            problem.compiled(None, _evaluated), inner_batches, outer_batch, state, iteration),
            problem.outer_values())
    return not_differentiable(
        _evaluated(None, problem, inner_batches, outer_batch, state, iteration), problem.outer_values())


def _evaluated(_, problem, inner_batches, outer_batch, state, iteration):
    if problem.has_episodes:
        episodes = map_episodes(
            lambda inner, outer, state: evaluate(problem.one_episode, inner, outer, state, iteration),
            inner_batches, outer_batch, state, problem.parallel_iterations)
        return episodes._replace(outer_loss=problem.aggregated(episodes.outer_loss),
                                 predictions=one_after_the_other(episodes.predictions))
    training = InnerTraining(problem, inner_batches, state, iteration=iteration)
    run = training.run()
    loss, predictions = problem.judged(run.state, training.outer, outer_batch)
    return Evaluation(loss, training.losses(run), run.state, predictions)


def predictions_of(problem: BilevelProblem, state: InnerState, outer_batch: Batch) -> Any:
    """See `BilevelProblem.predictions`."""
    if not problem.has_episodes:
        return problem.predict_outer(state, problem.outer_values(), outer_batch)
    return one_after_the_other(map_episodes(
        lambda _, outer_batch, state: predictions_of(problem.one_episode, state, outer_batch), (), outer_batch, state,
        problem.parallel_iterations))


def one_after_the_other(nest: Nest) -> Nest:
    """Tensors [episodes, examples, ...] as [episodes * examples, ...]; None stays None."""
    return tf.nest.map_structure(
        lambda part: None if part is None else tf.reshape(part, tf.concat([[-1], tf.shape(part)[2:]], axis=0)), nest)


def with_words_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """A compiled function's result; of an assertion that fails, the words alone, as a ValueError."""
    try:
        return function(*arguments)
    except tf.errors.InvalidArgumentError as error:
        found = re.search(r"assertion failed: (\[.*\])", str(error))
        if found is None:
            raise
        raise ValueError(" ".join(re.findall(r"\[([^\]]*)\]", found.group(1)))) from error

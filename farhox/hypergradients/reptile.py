"""ReptileHG: the displacement of the inner training as the direction in which initial values are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from farhox._core import checks, tree
from farhox._core.inner_state import float_leaves
from farhox._core.types import Carry
from farhox.hypergradients.base import HyperGradient, HyperGradientResult, Memory
from farhox.hypergradients.each_step import each_step
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.episodes import episode_at, num_episodes
from farhox.problem.inner_training import InnerTraining, gradient_diagnostics


@dataclasses.dataclass(frozen=True)
class ReptileHG(HyperGradient):
    """φ - φ_T in the place of a hypergradient of learned initial values φ, averaged over episodes.

    With gradient descent of rate ε as the outer optimizer this is Reptile: φ <- φ + ε mean(φ_T - φ). The inner training
    needs no derivative, and memory does not grow with T. Batches have a leading axis of episodes, whether the problem
    is one `over_episodes` or not; episodes are trained one after the other, and the slots and the step count of the
    inner dynamics go on from one to the next and, in the carry, from one hyper-iteration to the next.

    Args:
        step_weights: Tuple of T numbers, or None for ones: the direction is Σ_t weight_t (φ_t - φ_{t+1}). With
            (0, ..., 0, 1) it is that of the last step alone, which is FOMAML's when that step's batch is the query set.

    Raises:
        TypeError: If `step_weights` is not a tuple of numbers.
        ValueError: When called: if their number is not T, or an outer variable is not a learned initial value.

    Reference:
        [Nichol et al., 2018](https://arxiv.org/abs/1803.02999), Algorithms 1 and 2.
    """

    step_weights: Sequence[float] | None = None

    remembers = Memory.ALWAYS
    takes_episodes = True

    def __post_init__(self):
        if self.step_weights is not None and (not isinstance(self.step_weights, tuple) or not all(
                checks.is_number(weight) for weight in self.step_weights)):
            raise TypeError(f"step_weights must be a tuple of numbers or None. Received: {self.step_weights!r}")

    def _compute(self, problem, inner_batches, outer_batch, state, carry, iteration):
        problem = problem.one_episode
        first = InnerTraining(problem, episode_at(inner_batches, 0), share_features=False)
        start, steps = first.start, first.steps
        weights = None
        if self.step_weights is not None:
            if steps != len(self.step_weights):
                raise ValueError("step_weights must have one entry per inner step. "
                                 f"Received: {len(self.step_weights)} entries for T={steps}")
            weights = tf.constant(self.step_weights, problem.loss_dtype)
        count = num_episodes(inner_batches)
        kept = carry if carry else self.initial_carry(problem)

        def episode(index, kept, direction, losses, outer_losses, ends, norms, taken):
            slots, step = kept
            training = InnerTraining(problem, episode_at(inner_batches, index), start._replace(slots=slots, step=step),
                                     share_features=False, iteration=iteration)
            run, direction = _train(training, weights, direction)
            loss = problem.outer_loss(
                run.state, training.outer, tf.nest.map_structure(lambda leaf: leaf[index], outer_batch))
            ends = [array.write(index, leaf) for array, leaf in zip(ends, tf.nest.flatten(run.state))]
            return (index + 1, [run.state.slots, run.state.step], direction,
                    losses.write(index, training.losses(run)),
                    outer_losses.write(index, tf.cast(loss, problem.loss_dtype)), ends, norms + run.gradient_norm,
                    taken + run.steps)

        losses = tf.TensorArray(problem.loss_dtype, count, element_shape=[steps])
        outer_losses = tf.TensorArray(problem.loss_dtype, count, element_shape=[])
        ends = [tf.TensorArray(leaf.dtype, count, element_shape=leaf.shape) for leaf in tf.nest.flatten(start)]
        zeros = [tf.zeros_like(variable) for variable in start.variables]
        _, kept, direction, losses, outer_losses, ends, norms, taken = tf.while_loop(
            lambda index, *_: index < count, episode,
            [tf.constant(0), kept, zeros, losses, outer_losses, ends, tf.zeros([], problem.loss_dtype), tf.constant(0)],
            parallel_iterations=1)
        adjoint = [tf.zeros_like(leaf) for leaf in float_leaves(start)]
        adjoint[:len(direction)] = [part / tf.cast(count, part.dtype) for part in direction]
        gradients = first.gradients([None] * len(first.outer), adjoint=adjoint,
                                    sees="ReptileHG learns initial values alone: name the inner variables as outer "
                                         "variables too, and nothing else.")
        outer_loss = tf.reduce_mean(outer_losses.stack())
        # Over episodes, as those of other methods.
        diagnostics = {
            "inner_gradient_norm": norms / tf.cast(count, norms.dtype),
            "inner_steps": tf.cast(taken, tf.float32) / tf.cast(count, tf.float32),
            **gradient_diagnostics(gradients, outer_loss)}
        states = tf.nest.pack_sequence_as(start, [array.stack() for array in ends])
        return HyperGradientResult(gradients, outer_loss, losses.stack(), states, kept, diagnostics)

    def initial_carry(self, problem: BilevelProblem) -> Carry:
        initial = problem.initial_state()
        return [initial.slots, initial.step]


def _train(training, weights, direction):
    """The run of one episode, and the direction with its share added: Σ_t weight_t (φ_t - φ_{t+1})."""
    def body(t, state, direction):
        after, loss, norm, _ = training.step(state, t)
        moved = tree.subtract(state.variables, after.variables)
        if weights is not None:
            moved = [tf.cast(weights[t], part.dtype) * part for part in moved]
        return after, loss, norm, [a + b for a, b in zip(direction, moved)]

    return each_step(training, body, direction, training.writes_out(0, training.steps))

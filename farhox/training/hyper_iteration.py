"""One hyper-iteration: the hypergradient, its update under the guard, over replicas too, and what is kept of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from farhox._core import tree
from farhox._core.types import Batch, InnerBatches, Metrics, Optimizer, Tensor, Variables
from farhox.dynamics.base import check_keras_optimizer, check_unscaled
from farhox.hypergradients import EpisodesHG, HyperGradient, ReverseHG
from farhox.hypergradients.base import HyperGradientResult, Memory
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.inner_training import InnerTraining
from farhox.training.flat_updates import FlatUpdates
from farhox.training.kept import Kept
from farhox.training.updates import GuardedUpdate, restored
from farhox.training.watch import Watch


def checked_settings(problem: BilevelProblem, hypergradient: HyperGradient | None, online: bool,
                     outer_first: bool) -> tuple[BilevelProblem, HyperGradient]:
    """A problem and a method that can be iterated: both over episodes where one of them is; `ReverseHG` for None.

    Raises:
        TypeError: If one of them has the wrong type.
        ValueError: If they do not go with `online` or `outer_first`.
    """
    hypergradient = ReverseHG() if hypergradient is None else hypergradient
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"problem must be a farhox.BilevelProblem. Received: {problem!r}")
    if not isinstance(hypergradient, HyperGradient):
        raise TypeError("hypergradient must be one of farhox' methods, for example farhox.ReverseHG(). "
                        f"Received: {hypergradient!r}")
    if isinstance(hypergradient, EpisodesHG):
        problem, hypergradient = problem.over_episodes(hypergradient.aggregation), hypergradient.hypergradient
    if hypergradient.takes_episodes and not problem.has_episodes:
        problem = problem.over_episodes()
    if online and problem.has_episodes:
        raise ValueError("Episodes start anew in every hyper-iteration: a problem over episodes cannot be used "
                         "with online=True.")
    if hypergradient.needs_online and not online:
        raise ValueError(f"{type(hypergradient).__name__} makes sense where the inner state goes on from one "
                         "hyper-iteration to the next. Use online=True.")
    if online and (problem.learns_initialization or problem.proximal is not None):
        raise ValueError("online=True goes on from the last inner state, so the initial state must not matter. "
                         "Received a problem with "
                         f"{'a proximal term' if problem.proximal is not None else 'learned initial values'}.")
    if outer_first and not online:
        raise ValueError("outer_first=True is an order of online training. Received: outer_first=True, online=False")
    if outer_first and hypergradient.remembers is Memory.WITH_STATE and hypergradient.initial_carry(problem):
        raise ValueError("With outer_first=True the inner state that goes on is not the one that the method ended at, "
                         f"so that what it remembers of it is of no use. Received: {hypergradient!r}")
    return problem, hypergradient


def problem_to_compile(problem: BilevelProblem, optimizer: Optimizer, losses: list[Any], metrics: Metrics | None,
                       parallel_iterations: int | None) -> BilevelProblem:
    """The problem with what is said when a `HyperOptimizer` is compiled.

    Args:
        problem: A `BilevelProblem`.
        optimizer: The outer optimizer.
        losses: What was given as losses, which must all be None.
        metrics: The metrics, weighted ones included.
        parallel_iterations: Int or None, episodes that are computed at the same time.

    Raises:
        TypeError: If the optimizer is none of Keras'.
        ValueError: If a loss is given, metrics cannot be computed, or `parallel_iterations` does not fit.
    """
    if any(loss is not None for loss in losses):
        raise ValueError("A HyperOptimizer takes no loss: the inner and outer objective are part of the problem.")
    if metrics and problem.outer_predictions is None:
        raise ValueError("Metrics need predictions: give BilevelProblem(outer_predictions=batch -> (targets, "
                         "predictions, sample_weight)), or make the problem with farhox.supervised_problem.")
    if parallel_iterations is not None:
        if not problem.has_episodes:
            raise ValueError("parallel_iterations is for a problem over_episodes, which has several trainings in a "
                             f"hyper-iteration. Received: parallel_iterations={parallel_iterations!r}")
        problem = problem.in_parallel(parallel_iterations)
    check_keras_optimizer("optimizer", optimizer)
    check_unscaled("optimizer", optimizer)
    return problem


@dataclasses.dataclass(frozen=True, eq=False)
class HyperIteration:
    """What a `HyperOptimizer` does with one element of its data set.

    Args:
        outer: List of the outer variables.
        hypergradient: A `HyperGradient`.
        online: Bool, whether the inner state goes on.
        outer_first: Bool, whether the outer variables are updated before the inner steps that are kept.
        kept: `Kept`, where the inner state and the memory are between hyper-iterations.
        guarded_update: `GuardedUpdate`, which takes an update back that a value does not survive.
        watch: `Watch`, which counts what was skipped.
        last_outer_loss: `keras.Variable` that is given the outer loss, over all replicas, where the mean over an epoch
            says too little.
    """

    outer: Variables
    hypergradient: HyperGradient
    online: bool
    outer_first: bool
    kept: Kept
    guarded_update: GuardedUpdate
    watch: Watch
    last_outer_loss: keras.Variable

    @classmethod
    def of(cls, problem: BilevelProblem, hypergradient: HyperGradient, online: bool, outer_first: bool,
           max_skipped_updates: int) -> HyperIteration:
        """One with parts of its own; see `HyperOptimizer` for the arguments."""
        outer, guarded_update = list(problem.outer_variables), GuardedUpdate(problem)
        watch = Watch(outer, hypergradient, guarded_update, max_skipped_updates)
        last_outer_loss = keras.Variable(float("nan"), dtype="float32", trainable=False, name="last_outer_loss",
                                         aggregation="only_first_replica")
        return cls(outer, hypergradient, online, outer_first, Kept(problem, hypergradient, online), guarded_update,
                   watch, last_outer_loss)

    def run(self, problem: BilevelProblem, updates: FlatUpdates, iteration: Tensor, inner_batches: InnerBatches,
            outer_batch: Batch) -> HyperGradientResult:
        """Computes the hypergradient, applies it with the outer optimizer's `updates`, and keeps what goes on.

        Raises:
            ValueError: If an inner state is kept and there are several replicas.
        """
        start = self.kept.state_now()
        result = self.hypergradient.compute(
            problem, inner_batches, outer_batch, state=start, carry=self.kept.carry_now(), iteration=iteration)
        if self.outer_first:
            return self._outer_first(problem, updates, iteration, inner_batches, outer_batch, start, result)
        new_state, new_carry = self.kept.of(result)
        # A diverged inner loss with a finite hypergradient is a diverged run all the same.
        parts = [result.inner_losses, result.outer_loss, [*new_state, *new_carry], *result.gradients]
        outer_loss = tf.cast(result.outer_loss, tf.float32)
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:
            self._over_replicas(updates, context, parts, outer_loss, inner_batches, outer_batch)
            return result

        finite = self.kept.keep(result.inner_losses, new_state, new_carry, start) & tree.is_finite(
            [result.outer_loss, result.gradients])
        # What is not finite does not reach the optimizer: its update is taken back.
        gradients = [tf.where(finite, gradient, tf.zeros_like(gradient)) for gradient in result.gradients]
        self.guarded_update.apply_fast(
            updates, lambda: updates.apply(gradients), finite, self.watch.note,
            lambda: self.watch.record(tf.constant(False), _flags(parts), inner_batches, outer_batch),
            self.watch.has_noted)
        self.last_outer_loss.assign(outer_loss)
        return result

    def _over_replicas(self, updates, context, parts, outer_loss, inner_batches, outer_batch):
        """The update by what all replicas found, and what there is to keep and to say."""
        if self.online:
            raise ValueError("online=True keeps one inner state and needs one replica. Received a strategy with "
                             f"{context.num_replicas_in_sync} replicas.")
        *flags, outer_loss = tf.unstack(context.all_reduce(
            tf.distribute.ReduceOp.SUM, tf.concat([tf.cast(_flags(parts), tf.float32), [outer_loss]], 0)))
        flags = tf.cast(tf.stack(flags), tf.int32)
        inner_losses, _, memory, *gradients = parts
        stands = self._update(updates, tf.reduce_all(flags == 0), gradients, context)
        self.kept.keep(inner_losses, [], memory, None)
        self.last_outer_loss.assign(outer_loss / context.num_replicas_in_sync)
        self.watch.record(stands, flags, inner_batches, outer_batch)

    def _outer_first(self, problem, updates, iteration, inner_batches, outer_batch, start, result):
        """The update, then the inner steps with the new values; their end is kept, and is that of the result.

        An update under which they are not finite is taken back.
        """
        _, new_carry = self.kept.of(result)
        flags = [_not_finite(part) for part in [[], result.outer_loss, new_carry, *result.gradients]]
        variables = [*self.outer, *updates.variables]
        before = [tf.convert_to_tensor(variable) for variable in variables]
        stands = self._update(updates, tf.reduce_all(tf.stack(flags) == 0), result.gradients,
                              tf.distribute.get_replica_context())
        training = InnerTraining(problem, inner_batches, start, iteration=iteration)
        run = training.run()
        result = result._replace(state=run.state, inner_losses=training.losses(run), diagnostics={
            **result.diagnostics, "inner_gradient_norm": run.gradient_norm, "inner_steps": run.steps})
        new_state, _ = self.kept.of(result)
        flags[0], flags[2] = _not_finite(result.inner_losses), flags[2] + _not_finite(new_state)
        survives = tf.logical_and(flags[0] == 0, tree.is_finite(new_state))
        tf.cond(survives, tf.no_op, lambda: restored(zip(variables, before)))
        self.kept.keep(result.inner_losses, new_state, new_carry, start)
        self.last_outer_loss.assign(tf.cast(result.outer_loss, tf.float32))
        self.watch.record(tf.logical_and(stands, survives), tf.stack(flags), inner_batches, outer_batch)
        return result

    def _update(self, updates, finite, gradients, context):
        """Applies the hypergradients if they are finite; returns whether an update stands.

        Over replicas the optimizer adds them up: hence the mean. What became of the values, the same on all of them, is
        looked at once.
        """
        replicas = context.num_replicas_in_sync
        if replicas == 1:
            return self._guarded(updates, finite, lambda: updates.apply(gradients))
        gradients = [gradient / replicas for gradient in gradients]

        def across_replicas(strategy, finite, gradients):
            # A condition may not hold a call that merges replicas, so the merge comes first and splits again inside.
            return self._guarded(
                updates, strategy.experimental_local_results(finite)[0],
                lambda: strategy.extended.call_for_each_replica(updates.apply, args=(gradients,)))

        return context.merge_call(across_replicas, args=(finite, gradients))

    def _guarded(self, updates, finite, update):
        return tf.cond(finite, lambda: self.guarded_update.apply(updates, update), self._no_update)

    def _no_update(self):
        self.guarded_update.forget()
        return tf.constant(False)


def _flags(parts):
    """Whether something in each of the nests is not finite, as an int32 tensor."""
    return tf.stack([_not_finite(part) for part in parts])


def _not_finite(part):
    """1 if something in a nest of tensors is not finite, else 0."""
    return tf.cast(tf.logical_not(tree.is_finite(part)), tf.int32)

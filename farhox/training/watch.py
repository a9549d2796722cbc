"""What happened in hyper-iterations: updates that were skipped and why, and what a person should be warned of."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Batch, InnerBatches, Logs, Tensor, Variables
from farhox.data.finite import first_not_finite, place_in_words
from farhox.hypergradients import ImplicitHG, ObjectivesHG
from farhox.hypergradients.base import HyperGradient
from farhox.problem.maps import variable_names

if TYPE_CHECKING:
    from farhox.training.updates import GuardedUpdate

GAP = "stationarity_gap"
# A stationarity gap that is warned of.
_FAR = 0.05
ADVICE = (
    "Try a smaller inner learning rate or tighter bounds on it, fewer inner steps, a smaller outer learning rate or "
    "clipnorm on the outer optimizer; with an inner rate that is learned, an upper bound (high=...) keeps it stable.")


class Watch:
    """Counts and causes of skipped updates, kept in Keras variables, and warnings given once each.

    Args:
        outer_variables: List of `keras.Variable`.
        hypergradient: The `HyperGradient`.
        update: The `GuardedUpdate` of the outer variables.
        max_skipped_updates: Int, updates skipped in a row that are too many.

    Attributes:
        skipped: int32 `keras.Variable`, updates skipped since the beginning.
        variables: List of all variables, for the owner to track.
    """

    def __init__(self, outer_variables: Variables, hypergradient: HyperGradient, update: GuardedUpdate,
                 max_skipped_updates: int) -> None:
        self._outer = outer_variables
        self._update = update
        self._solver = _solver_name(hypergradient)
        self._max = max_skipped_updates
        self.skipped = counter(0, "skipped_updates")
        # -1 where the last update stands, and a value was held at it: something is noted, nothing is skipped.
        self._in_a_row = counter(0, "skipped_in_a_row")
        # Which of the inner loss, the outer loss, the memory kept and each hypergradient was not finite at the last
        # skip.
        self._not_finite = counter(np.zeros(3 + len(outer_variables)), "not_finite")
        # Where the inner batches and the outer batch of that hyper-iteration were not finite themselves.
        self._not_finite_data = counter(np.zeros([2, 3]), "not_finite_data")
        self.variables = [self.skipped, self._in_a_row, self._not_finite, self._not_finite_data,
                          update.lost, update.held]
        self._warned = set()

    @property
    def has_noted(self) -> Tensor:
        """Whether something is noted of the last hyper-iteration: a scalar bool tensor."""
        return tf.not_equal(tf.convert_to_tensor(self._in_a_row), 0)

    def note(self, stands: Tensor, is_held: Tensor) -> None:
        """Takes down an update of which all data and results were finite; needless where all is well, as before it.

        Args:
            stands: Scalar bool tensor, whether it was not taken back.
            is_held: Scalar bool tensor, whether a value is held at a bound.
        """
        self._count(stands, is_held)
        self._not_finite.assign(tf.zeros_like(tf.convert_to_tensor(self._not_finite)))
        self._not_finite_data.assign(tf.zeros([2, 3], tf.int32))

    def _count(self, stands, is_held):
        self.skipped.assign(tf.convert_to_tensor(self.skipped) + tf.cast(tf.logical_not(stands), tf.int32))
        self._in_a_row.assign(tf.where(
            stands, -tf.cast(is_held, tf.int32), tf.maximum(tf.convert_to_tensor(self._in_a_row), 0) + 1))

    def record(self, stands: Tensor, flags: Any, inner_batches: InnerBatches, outer_batch: Batch) -> None:
        """Takes down one hyper-iteration, in TensorFlow operations.

        Args:
            stands: Scalar bool tensor, whether there was an update.
            flags: int32 tensor: how often the inner losses, the outer loss, the memory and each hypergradient were not
                finite.
            inner_batches, outer_batch: The data.
        """
        self._count(stands, tf.constant(False))
        self._not_finite.assign(tf.cast(flags > 0, tf.int32))
        self._not_finite_data.assign(tf.cond(
            tf.reduce_all(flags == 0), lambda: tf.zeros([2, 3], tf.int32),
            lambda: tf.cast(tf.stack([first_not_finite(inner_batches), first_not_finite(outer_batch)]), tf.int32)))

    def places_not_finite(self) -> np.ndarray:
        """Where the inner batches and the outer batch of the last hyper-iteration skipped were not finite themselves:
        an array [2, 3] of array number (0 where all was finite), entry and example."""
        return self._not_finite_data.numpy()

    def start_counting(self) -> None:
        """Starts the count of updates skipped in a row anew."""
        self._in_a_row.assign(min(int(self._in_a_row.numpy()), 0))

    def raise_if_diverged(self) -> None:
        """Raises a RuntimeError that says what happened if too many updates in a row were skipped."""
        in_a_row = int(self._in_a_row.numpy())
        if in_a_row < self._max:
            return
        inner, outer, memory, *gradients = (bool(flag) for flag in self._not_finite.numpy())
        bad, lost = (variable_names([v for v, flag in zip(self._outer, flags) if flag])
                     for flags in (gradients, self._update.lost.numpy()))
        causes = ["the inner objective"] * inner + ["the outer objective"] * outer
        causes += ["the inner state that is carried on"] * memory
        if bad:
            solved = f" (whose linear system {self._solver} solved)" if self._solver and not (inner or outer) else ""
            causes.append(f"the hypergradients of {bad}{solved}")
        if lost:
            causes.append(f"what the outer optimizer made of {lost}, whose last good value is kept")
        places = [f"{place_in_words(place)} of the {which}" for which, place in zip(
            ("inner batches", "outer batch"), self.places_not_finite()) if place[0]]
        advice = f"The data hold NaN or infinity, in {' and in '.join(places)}: mend them." if places else ADVICE
        raise RuntimeError(
            f"Training stopped: {in_a_row} updates in a row were skipped because a value was not finite. At the last "
            f"one: {', '.join(causes)}. {advice}")

    def warn_once(self, stationarity_gap: float) -> None:
        """Warns, once each, of implicit hypergradients far from a stationary point and of values held at a bound.

        Args:
            stationarity_gap: Float, the diagnostic of `ImplicitHG`; 0 for other methods.
        """
        if stationarity_gap > _FAR and GAP not in self._warned:
            self._warned.add(GAP)
            warnings.warn(
                "Implicit hypergradients were taken far from a stationary point of the inner training, so they are "
                f"biased: the way that is left is {stationarity_gap:.0%} of the weights' norm ({GAP} in the "
                "diagnostics). Use more inner steps, or ReverseHG.", RuntimeWarning, stacklevel=3)
        for variable, count in zip(self._outer, self._update.held.numpy()):
            if count and id(variable) not in self._warned:
                self._warned.add(id(variable))
                warnings.warn(
                    f"The outer optimizer took {variable.path!r} to its bound ({count} of {math.prod(variable.shape)} "
                    "entries). It is held just before it, where it can come back: the best value may lie beyond the "
                    "bound, or the outer learning rate is too large.", RuntimeWarning, stacklevel=3)


class SkipGuard(keras.callbacks.Callback):
    """Ends `fit` with an error when updates keep being skipped, and warns after an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._skipped: Any = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self.model.start_counting_skips()
        self._skipped = None

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        # Reading a variable takes longer than a small hyper-iteration, and the logs have been read.
        skipped = (logs or {}).get("skipped_updates")
        if skipped is None or skipped != self._skipped:
            self.model.raise_if_diverged()
        self._skipped = skipped

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self.model.warn_once()


def counter(value: Any, name: str) -> keras.Variable:
    """An int32 `keras.Variable` that is not trained."""
    return keras.Variable(value, dtype="int32", trainable=False, name=name, aggregation="only_first_replica")


def _solver_name(hypergradient):
    if isinstance(hypergradient, ObjectivesHG):
        return _solver_name(hypergradient.hypergradient)
    return type(hypergradient.linear_solver).__name__ if isinstance(hypergradient, ImplicitHG) else None

"""One update of the outer variables that cannot lose a value: what became of them is checked, and mended."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import functional, rarely, tree
from farhox._core.types import Tensor
from farhox.problem.bilevel import BilevelProblem
from farhox.training.flat_updates import FlatUpdates

# Halvings in the search for the point at which a value is held: beyond them float64 tells no points apart.
_HALVINGS = 52


class GuardedUpdate:
    """Runs an update of the outer variables and looks at what became of the values.

    After an update every outer value is finite, inside its bounds, and one that its type can tell from them:

    - An update after which a value is not finite, or one that is multiplied (`log=True`, schedules) has become 0, is
      taken back as a whole, the optimizer's own state included: `lost` says of which variables.
    - A value that a smooth map would round to its bound is held before it, at a small part of the distance that it had,
      where it still has a derivative and can come back: `held` counts the entries of each variable.

    Args:
        problem: A `BilevelProblem`.

    Attributes:
        lost: int32 `keras.Variable` [outer variables], 1 where the last update was taken back because of the variable.
        held: int32 `keras.Variable` [outer variables], entries held at a bound at the last update.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self._variables = list(problem.outer_variables)
        entries = {id(entry.variable): entry for entry in problem.hyperparameters}
        self._entries = [entries.get(id(variable)) for variable in self._variables]
        self.lost = _flags(len(self._variables), "lost_values")
        self.held = _flags(len(self._variables), "held_values")

    def apply(self, updates: FlatUpdates, update: Callable[[], Any]) -> Tensor:
        """Runs an update. Returns whether it stands, a scalar bool tensor.

        Args:
            updates: Those of the outer optimizer, whose state is part of what is taken back.
            update: Callable that applies the hypergradients with it.
        """
        before = self._values(updates)
        update()
        return self._mended(before)[0]

    def apply_fast(self, updates: FlatUpdates, update: Callable[[], Any], accepted: Tensor,
                   note: Callable[[Tensor, Tensor], Any], note_not_accepted: Callable[[], Any], noted: Tensor) -> None:
        """Runs an update that is nearly always accepted, and looks closer where something is the matter.

        Args:
            updates, update: As for `apply`.
            accepted: Scalar bool tensor, whether the update may stand. Otherwise it is taken back as a whole.
            note: Callable that is given whether an accepted update stands and whether a value is held.
            note_not_accepted: Callable, called where an update was not accepted.
            noted: Scalar bool tensor, whether something is noted of the update before. Where nothing is and all is
                well, nothing is written down.
        """
        before = self._values(updates)
        update()

        def looked_at():
            note(*self._mended(before))
            return tf.constant(True)

        def taken_back():
            restored(before)
            self.forget()
            note_not_accepted()
            return tf.constant(True)

        values, marks = self._looks()
        all_is_well = accepted & tree.is_finite(values) & tf.logical_not(tf.reduce_any(tf.stack([noted, *marks])))
        rarely.cond(all_is_well, lambda: tf.cond(accepted, looked_at, taken_back), lambda: tf.constant(True))

    def _values(self, updates):
        """Pairs of each outer variable and each of the optimizer's with its value, the outer ones first."""
        return [(variable, tf.convert_to_tensor(variable)) for variable in [*self._variables, *updates.variables]]

    def _looks(self):
        """What must be finite, a list of tensors, and whether something is at a bound that it must not reach."""
        values, at_bounds = [], []
        for variable, entry in zip(self._variables, self._entries):
            new = tf.convert_to_tensor(variable)
            natural, at_bound = self._judged(entry, variable, new)
            values += [new] if entry is None else [new, natural]
            if entry is not None and variable.constraint is None and not (entry.low is None and entry.high is None):
                at_bounds.append(at_bound)
        scalars = [part for part in at_bounds if part.shape.rank == 0]
        others = [part for part in at_bounds if part.shape.rank != 0]
        return values, scalars + [tf.reduce_any(part) for part in tree.joined(others)]

    def _mended(self, before):
        """Takes an update back or holds values, and says so; whether it stands, and whether a value is held."""
        lost, held = [], []
        for (variable, old), entry in zip(before, self._entries):
            new = tf.convert_to_tensor(variable)
            natural, at_bound = self._judged(entry, variable, new)
            bad = tf.logical_not(tf.reduce_all(tf.math.is_finite(new) & tf.math.is_finite(natural)))
            saturated = tf.reduce_any(at_bound)
            if _is_multiplied(entry):
                bad, saturated = bad | saturated, tf.constant(False)
            lost.append(bad)
            held.append(tf.where(saturated & tf.logical_not(bad), tf.math.count_nonzero(at_bound, dtype=tf.int32), 0))
            if entry is not None and variable.constraint is None and not _is_multiplied(entry):
                tf.cond(saturated & tf.logical_not(bad), lambda: self._hold(entry, variable, old, new, at_bound),
                        lambda: tf.no_op())
        stands = tf.logical_not(tf.reduce_any(lost))
        tf.cond(stands, lambda: tf.no_op(), lambda: restored(before))
        self.lost.assign(tf.cast(tf.stack(lost), tf.int32))
        held = tf.where(stands, tf.stack(held), 0)
        self.held.assign(held)
        return stands, tf.reduce_any(held > 0)

    def forget(self) -> None:
        """Sets what is said of the last update to nothing, for a hyper-iteration without one."""
        self.lost.assign(tf.zeros_like(self.lost))
        self.held.assign(tf.zeros_like(self.held))

    def _judged(self, entry, variable, unconstrained):
        """The natural value, and where it has arrived at a bound that it must not reach."""
        if entry is None:
            return unconstrained, tf.zeros_like(unconstrained, tf.bool)
        natural = functional.call(entry.natural_value, bindings=[(variable, unconstrained)]).value
        at_bound = tf.zeros_like(natural, tf.bool)
        if variable.constraint is not None:  # A projection may end on the border.
            return natural, at_bound
        if entry.low is not None:
            # Below the smallest normal number processors round to zero.
            least = entry.low if entry.low != 0 else natural.dtype.as_numpy_dtype(np.finfo(
                natural.dtype.as_numpy_dtype).tiny)
            at_bound |= natural <= tf.cast(least, natural.dtype)
        if entry.high is not None:
            at_bound |= natural >= tf.cast(entry.high, natural.dtype)
        return natural, at_bound

    def _hold(self, entry, variable, old, new, at_bound):
        """Moves saturated entries to where the distance to the bound is a small part of what it was."""
        part = np.sqrt(np.finfo(new.dtype.as_numpy_dtype).eps)
        before = functional.call(entry.natural_value, bindings=[(variable, old)]).value

        def least(distance):
            # Between two bounds a part of the range, so that being held again and again does not lead to the bound.
            if entry.low is None or entry.high is None:
                return part * distance
            return tf.minimum(part * (entry.high - entry.low), distance)

        def far_enough(moved):
            natural, beyond = self._judged(entry, variable, moved)
            good = tf.logical_not(beyond)
            if entry.low is not None:
                good &= natural - entry.low >= least(before - entry.low)
            if entry.high is not None:
                good &= entry.high - natural >= least(entry.high - before)
            return good

        def body(k, near, far):
            middle = 0.5 * (near + far)
            good = far_enough(old + middle * (new - old))
            return k + 1, tf.where(good, middle, near), tf.where(good, far, middle)

        _, near, _ = tf.while_loop(
            lambda k, *_: k < _HALVINGS, body, (tf.constant(0), tf.zeros_like(old), tf.ones_like(old)),
            maximum_iterations=_HALVINGS, parallel_iterations=1)
        variable.assign(tf.where(at_bound, old + near * (new - old), new))
        return tf.no_op()


def _is_multiplied(entry):
    """Whether a step of the optimizer multiplies the value: at a bound it is lost."""
    return entry is not None and entry.log


def restored(pairs: Iterable[tuple[Any, Tensor]]) -> Any:
    """Gives variables the values beside them back; an operation, for a branch of `tf.cond`."""
    for variable, value in pairs:
        variable.assign(value)
    return tf.no_op()


def _flags(count, name):
    return keras.Variable(
        np.zeros(count), dtype="int32", trainable=False, name=name, aggregation="only_first_replica")

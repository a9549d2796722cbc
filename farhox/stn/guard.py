"""Updates that would leave values which are not finite: not made, counted, and an error when they go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from farhox._core import tree
from farhox._core.types import Logs
from farhox.data.finite import first_not_finite, place_in_words

_ADVICE = "Try a smaller learning rate, clipnorm on the optimizer, or tighter bounds on the hyperparameters."


class UpdateGuard(keras.layers.Layer):
    """Counts updates of several kinds that were skipped, and remembers what was not finite at the last one of a kind.

    Args:
        kinds: Dictionary from kinds of updates to lists of what of one can be not finite, as an error names it.
        max_skipped_updates: Positive int, updates of a kind skipped in a row after which `raise_if_diverged` does.

    Attributes:
        skipped: Integer variable, the updates skipped, of all kinds.
    """

    def __init__(self, kinds: Any, max_skipped_updates: int) -> None:
        super().__init__(name="update_guard", trainable=False)
        self._kinds = {kind: list(parts) for kind, parts in kinds.items()}
        self._most = max_skipped_updates
        self.skipped = self._counter("skipped_updates", ())
        self._in_a_row = {kind: self._counter(f"{kind}_in_a_row", ()) for kind in kinds}
        self._not_finite = {kind: self._counter(f"{kind}_not_finite", (len(parts),)) for kind, parts in kinds.items()}
        self._place = {kind: self._counter(f"{kind}_place", (3,)) for kind in kinds}
        self.built = True

    def update(self, kind: str, batch: Any, parts: Any, apply: Callable[..., Any], variables: Any,
               values: Any = dict) -> Any:
        """Calls `apply` if all parts are finite, and takes back what it did if a variable is not finite afterwards.

        Args:
            kind: The kind of the update.
            batch: Tuple of nests of tensors or None, the data that it is made from.
            parts: Dictionary from names of parts to nests of tensors, each finite or not.
            apply: Function without arguments that changes the variables.
            variables: Dictionary from names of parts to lists of the variables that it changes, slots included.
            values: Function without arguments, a dictionary from names of parts to nests of tensors that must be finite
                after the update too.

        Returns:
            Scalar bool tensor, whether the update was made.
        """
        bad = {name: tf.logical_not(tree.is_finite(part)) for name, part in parts.items()}
        finite = tf.logical_not(tf.reduce_any(list(bad.values())))

        def made():
            # Reading takes no copy: an assignment gives a variable a new buffer while the old one is in use.
            before = [(v, tf.convert_to_tensor(v)) for changed in variables.values() for v in changed]
            apply()
            after = values()
            lost = {name: tf.logical_not(tree.is_finite([[tf.convert_to_tensor(v) for v in changed],
                                                         after.get(name, [])])) for name, changed in variables.items()}

            def take_back():
                for variable, value in before:
                    variable.assign(value)
                return tf.no_op()

            tf.cond(tf.reduce_any(list(lost.values())), take_back, tf.no_op)
            return self._flags(kind, lost)

        flags = tf.cond(finite, made, lambda: self._flags(kind, bad))
        done = tf.reduce_all(flags == 0)
        skipped, in_a_row = tf.cast(tf.logical_not(done), tf.int32), self._in_a_row[kind]
        self.skipped.assign(tf.convert_to_tensor(self.skipped) + skipped)
        in_a_row.assign((tf.convert_to_tensor(in_a_row) + skipped) * skipped)
        self._not_finite[kind].assign(flags)
        self._place[kind].assign(tf.cond(
            done, lambda: tf.zeros([3], tf.int32),
            lambda: tf.cast(first_not_finite([part for part in batch if part is not None]), tf.int32)))
        return done

    def start_counting(self) -> None:
        """Starts the count of updates skipped in a row anew, so that a run goes on after a cause was removed."""
        for in_a_row in self._in_a_row.values():
            in_a_row.assign(0)

    def raise_if_diverged(self) -> None:
        """Raises a RuntimeError that names what is not finite if too many updates of a kind in a row were skipped."""
        for kind, parts in self._kinds.items():
            in_a_row = int(keras.ops.convert_to_numpy(self._in_a_row[kind]))
            if in_a_row >= self._most:
                flags = keras.ops.convert_to_numpy(self._not_finite[kind])
                causes = [part for part, bad in zip(parts, flags) if bad]
                place = keras.ops.convert_to_numpy(self._place[kind])
                advice = (f"The data hold NaN or infinity, in {place_in_words(place)} of the {kind} batch: mend them."
                          if place[0] else _ADVICE)
                raise RuntimeError(
                    f"Training stopped: {in_a_row} {kind} steps in a row were skipped because a value was not finite. "
                    f"At the last one: {', '.join(causes)}. {advice}")

    def _flags(self, kind, bad):
        return tf.stack([tf.cast(bad[part], tf.int32) if part in bad else 0 for part in self._kinds[kind]])

    def _counter(self, name, shape):
        return self.add_weight(shape=shape, dtype="int32", initializer="zeros", trainable=False, name=name)


class StopWhenDiverged(keras.callbacks.Callback):
    """Ends `fit` with an error when updates keep being skipped.

    Args:
        guard: `UpdateGuard`.
    """

    def __init__(self, guard: UpdateGuard) -> None:
        super().__init__()
        self._guard = guard

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._guard.start_counting()

    def on_train_batch_end(self, batch: Any, logs: Logs | None = None) -> None:
        self._guard.raise_if_diverged()

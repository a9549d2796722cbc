"""A few steps written out: a loop costs more than a small step in it, and an array of tensors more than the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import tensorflow as tf

from farhox._core.types import Tensor

# Steps that are written out at most. Of more of them tracing would take longer, and later calls would gain little.
FEW = 3


def is_few(count: Any) -> TypeGuard[int]:
    """Whether so many steps are written out: never where the number is not known in advance."""
    return isinstance(count, int) and count <= FEW


class FewTensors:
    """What a `tf.TensorArray` is where all indices are ints: a row of tensors, without an operation of its own.

    Args:
        entries: The tensors from the first one on.
    """

    def __init__(self, entries: Sequence[Tensor] = ()) -> None:
        self._entries = tuple(entries)

    def write(self, index: int, value: Tensor) -> FewTensors:
        """The row with this tensor at `index`, which is in it or comes next."""
        return FewTensors([*self._entries[:index], value, *self._entries[index + 1:]])

    def read(self, index: int) -> Tensor:
        """The tensor at `index`."""
        return self._entries[index]

    def stack(self) -> Tensor:
        """All of them as one tensor."""
        return tf.stack(self._entries)


def loop_while(condition: Callable[..., Any], body: Callable[..., Any], variables: Any, most: int) -> Any:
    """A `tf.while_loop` of at most so many steps, written out where they are few: each is taken where it should be.

    Args:
        condition: Callable, the variables to a scalar bool tensor, without the count of steps.
        body: Callable, the variables to the next ones.
        variables: List of tensors.
        most: Int, steps at most.

    Returns:
        The steps taken, a scalar int32 tensor, and the variables after them.
    """
    if not is_few(most):
        return tf.while_loop(
            lambda k, *variables: (k < most) & condition(*variables), lambda k, *variables: (k + 1, *body(*variables)),
            [tf.constant(0), *variables], parallel_iterations=1)
    goes_on, steps = tf.constant(True), tf.constant(0)
    for _ in range(most):
        goes_on = goes_on & condition(*variables)
        variables = [tf.where(goes_on, new, old) for new, old in zip(body(*variables), variables)]
        steps += tf.cast(goes_on, tf.int32)
    return steps, *variables

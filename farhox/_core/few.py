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


def loop(condition: Callable[..., Any], body: Callable[..., Any], variables: Any, count: Any = None) -> Any:
    """A `tf.while_loop` whose first variable is an index, or `body` written out where the number of steps is small.

    Args:
        condition, body: As for `tf.while_loop`.
        variables: List of the loop's variables, the first of which is 0.
        count: Int, the steps there are where `condition` says so of the index alone. None, or anything else: not known.

    Returns:
        The variables after the loop.
    """
    if not is_few(count):
        return tf.while_loop(condition, body, [tf.constant(0), *variables[1:]], parallel_iterations=1)
    variables = [0, *variables[1:]]
    for _ in range(count):
        variables = body(*variables)
    return [tf.constant(count), *variables[1:]]


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

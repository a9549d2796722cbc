"""A branch that is hardly ever taken, and costs next to nothing where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core.types import Tensor


def cond(usual: Tensor, otherwise: Callable[[], Any], then: Callable[[], Any]) -> Any:
    """`tf.cond(usual, then, otherwise)`, where `otherwise` is a call in the graph.

    Of a branch that TensorFlow writes into the graph every operation is passed by, one by one, each time that the
    branch is not taken.

    Args:
        usual: Scalar bool tensor.
        otherwise: Callable, the branch that is rarely taken.
        then: Callable, the other branch.
    """
    if tf.executing_eagerly():
        return tf.cond(usual, then, otherwise)
    call = tf.function(otherwise, autograph=False, experimental_attributes={"_noinline": True})
    return tf.cond(usual, then, lambda: call())

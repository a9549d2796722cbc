"""Checks of data that XLA leaves out of a compiled hyper-iteration, made beside it."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core.types import Data
from farhox.problem.bilevel import BilevelProblem


def with_checks(data: Data, problem: BilevelProblem, examples: Callable[..., Any]) -> Data:
    """A data set whose elements are checked when they are read, if the problem has checks.

    Args:
        data: What `fit` reads; what is no `tf.data.Dataset` comes back as it is.
        problem: A `BilevelProblem`.
        examples: Callable, an element -> the examples of training and of validation, as `problem.data_checks` takes
            them.
    """
    if not problem.has_data_checks or not isinstance(data, tf.data.Dataset):
        return data

    @tf.autograph.experimental.do_not_convert
    def checked(*element):
        (element,) = element if len(element) == 1 else (element,)  # A plain tuple comes in parts, an episode whole.
        with tf.control_dependencies(problem.data_checks(*examples(element))):
            return tf.nest.map_structure(tf.identity, element)

    return data.map(checked, num_parallel_calls=1)

"""Errors of compiled hyper-iterations, said as they would be outside of a graph."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from farhox._core.sums import sums_as_written
from farhox.problem.losses import LABEL_RULE
from farhox.problem.supervised import INDEX_RULE


class DivergedError(RuntimeError):
    """Inner training by itself that ended in values that are not finite.

    Attributes:
        losses: Array [T], the inner objective before each step.
    """

    def __init__(self, message: str, losses: Any) -> None:
        super().__init__(message)
        self.losses = losses


@contextlib.contextmanager
def graph_calls() -> Iterator[None]:
    """What holds where compiled hyper-iterations are called.

    Assertions on data inside a graph become the ValueErrors that they would be outside, and sums stay as they are
    written.
    """
    try:
        with sums_as_written():
            yield
    except tf.errors.InvalidArgumentError as error:
        message = str(error)
        for rule in (LABEL_RULE, INDEX_RULE):
            if rule in message:
                raise ValueError(_in_one_line(message[message.index(rule):])) from error
        raise


def _in_one_line(message):
    """The text and the numbers of an assertion, which TensorFlow writes in lines or in brackets of their own."""
    parts = [part.strip("[]{}b'\" ") for part in message.replace("] [", "\n").split("\n")]
    text = []
    for part in parts:
        if text and not (part == "to" or part.lstrip("-").replace(".", "", 1).isdigit()):
            break
        text.append(part.replace("\\'", "'"))
    return " ".join(text)

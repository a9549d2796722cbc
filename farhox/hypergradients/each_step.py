"""An inner training with something that is carried along from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core.types import Nest
from farhox.problem.inner_training import InnerRun, InnerTraining


def each_step(training: InnerTraining, body: Callable[..., Any], carried: Nest,
              writes_out: bool) -> tuple[InnerRun, Nest]:
    """Takes all steps of a training, in a loop or written out.

    Args:
        training: An `InnerTraining`.
        body: Callable, the step's number (an int where steps are written out), the state before it and what is carried,
            to the next state, the loss and the gradient norm before the step, and what is carried on.
        carried: Nest of tensors or arrays of tensors.
        writes_out: Bool, whether no loop is made; only where `training.writes_out` all steps.

    Returns:
        The `InnerRun`, and what was carried to its end.
    """
    before = training.before_first_step(in_row=writes_out)
    if writes_out:
        state, losses, norm = before.state, before.losses, before.gradient_norm
        for t in range(training.steps):
            state, loss, norm, carried = body(t, state, carried)
            losses = losses.write(t, loss)
        return InnerRun(state, losses, norm, tf.constant(training.steps)), carried

    def step(t, state, carried, losses, norm):
        del norm
        state, loss, norm, carried = body(t, state, carried)
        return t + 1, state, carried, losses.write(t, loss), norm

    steps, state, carried, losses, norm = tf.while_loop(
        lambda t, state, carried, losses, norm: training.goes_on(t, training.steps, norm), step,
        [tf.constant(0), before.state, carried, before.losses, before.gradient_norm], parallel_iterations=1)
    return InnerRun(state, losses, norm, steps), carried

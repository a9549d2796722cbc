"""DartsHG: the last inner step differentiated, with a finite difference in the place of second derivatives."""

import dataclasses

import tensorflow as tf

from farhox._core import autodiff, checks, tree
from farhox._core.inner_state import InnerState
from farhox.data.batches import batch_at, num_steps
from farhox.hypergradients.base import (
    HyperGradient,
    HyperGradientResult,
    InnerRun,
    common_diagnostics,
    gradients_or_error,
    new_losses,
    run_inner,
    stacked_losses,
    zeros_for_none,
)

_SEES = ("DartsHG sees what the objectives and the last inner step depend on. An initial value without a proximal term "
         "acts through all steps: use ReverseHG or ForwardHG for it.")


@dataclasses.dataclass(frozen=True)
class DartsHG(HyperGradient):
    """Hypergradient of the last inner step alone, by first derivatives.

    With u the adjoint of the inner gradient g at s_{T-1} (for gradient descent -learning_rate dE/dw) and
    h = epsilon / ||u||,

        u' ∂g/∂λ ≈ (∂L(w + h u, λ)/∂λ - ∂L(w - h u, λ)/∂λ) / 2h,

    to which the explicit dependence of the outer objective and of the step (a learning rate) are added exactly. The
    approximation of `ReverseHG(truncation=1)`, and equal to it where L is quadratic in w: two inner gradients instead
    of second derivatives, any dynamics. Its bias is that of truncation; with T = 1 it is one-step DARTS.

    Args:
        epsilon: Positive float, the length of the displacement of the inner variables. In float32 a small one loses
            digits to rounding, a large one is further from the derivative.

    Raises:
        ValueError: If epsilon is not positive.

    Reference:
        [Liu et al., 2018](https://arxiv.org/abs/1806.09055), equations 7 and 8.
    """

    epsilon: float = 0.01

    def __post_init__(self):
        checks.positive_number("epsilon", self.epsilon)

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        outer = problem.outer_values()
        steps = num_steps(inner_batches)
        state = problem.initial_state(outer) if state is None else state
        losses = new_losses(problem, steps)
        if problem.stop_tolerance is not None:
            # Which step is the last one shows only at the end: the inner training runs once more.
            steps = run_inner(problem, state, outer, inner_batches, 0, steps, new_losses(problem, steps)).steps
        run = run_inner(problem, state, outer, inner_batches, 0, steps - 1, losses, replay=True)
        before, batch = run.state, batch_at(inner_batches, steps - 1)

        loss, state_variables, inner_gradients = problem.step_gradients(before, outer, batch)
        variables, slots = problem.updated(inner_gradients, before, outer, batch)
        after = InnerState(variables, state_variables, slots, before.step + 1)
        at_end = problem.outer_gradients(after, outer, outer_batch)

        count = len(variables)
        adjoint = zeros_for_none(at_end.state[:count], variables)
        products = autodiff.transposed_product(
            lambda inputs: problem.updated(inputs[:count], before, inputs[count:], batch)[0],
            inner_gradients + outer, adjoint)
        parts = [at_end.outer, products[count:]]
        if not problem.dynamics.first_order:
            parts.append(self._mixed_product(
                problem, before, outer, batch, zeros_for_none(products[:count], variables)))
        reached = [any(part is not None for part in column) for column in zip(*parts)]
        gradients = [sum((part for part in column if part is not None), tf.zeros_like(value))
                     for value, column in zip(outer, zip(*parts))]
        gradients = gradients_or_error(problem, gradients, reached, _SEES)

        run = InnerRun(after, run.losses.write(steps - 1, tf.cast(loss, problem.loss_dtype)),
                       tf.cast(tree.norm(inner_gradients), problem.loss_dtype), run.steps + 1, None)
        return HyperGradientResult(
            gradients, at_end.loss, stacked_losses(problem, run), after, [],
            common_diagnostics(gradients, at_end.loss, run))

    def _mixed_product(self, problem, state, outer, batch, direction):
        """(∂g/∂λ)' direction by a central difference; None where the inner objective does not depend."""
        length = tree.norm(direction)
        distance = self.epsilon / tf.where(length > 0, length, tf.ones_like(length))

        def gradients(sign):
            moved = [w + tf.cast(sign * distance, w.dtype) * d for w, d in zip(state.variables, direction)]
            return autodiff.gradients(
                lambda outer: problem.inner_loss(moved, state.state_variables, outer, batch), outer)[2]

        return [None if plus is None else (plus - minus) / tf.cast(2.0 * distance, plus.dtype)
                for plus, minus in zip(gradients(1.0), gradients(-1.0))]

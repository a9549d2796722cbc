"""InitialHG: the gradient of the outer objective before any inner training."""

import dataclasses

import tensorflow as tf

from farhox._core.inner_state import float_leaves
from farhox.hypergradients.base import (
    HyperGradient,
    HyperGradientResult,
    add_initial_dynamics,
    gradient_diagnostics,
    gradients_or_error,
    zeros_for_none,
)


@dataclasses.dataclass(frozen=True)
class InitialHG(HyperGradient):
    """dE(Φ_0(λ), λ)/dλ: ordinary training of learned initial values, the baseline that knows of no inner training.

    The inner batches are not used, except by `evaluate`, which does train. `inner_losses` are zeros.
    """

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        outer = problem.outer_values()
        state = problem.initial_state(outer) if state is None else state
        at_start = problem.outer_gradients(state, outer, outer_batch)
        adjoint = zeros_for_none(at_start.state, float_leaves(state))
        gradients = zeros_for_none(at_start.outer, outer)
        reached = [gradient is not None for gradient in at_start.outer]
        gradients = add_initial_dynamics(problem, outer, adjoint, gradients, reached)
        gradients_or_error(problem, gradients, reached, "InitialHG sees initial values and the outer objective alone: "
                                                        "use farhox.ReverseHG() for what acts in the inner training.")
        zero = tf.zeros([], problem.loss_dtype)
        diagnostics = {"inner_gradient_norm": zero, "inner_steps": tf.constant(0),
                       **gradient_diagnostics(gradients, at_start.loss)}
        return HyperGradientResult(gradients, at_start.loss, tf.zeros([1], problem.loss_dtype), state, [], diagnostics)

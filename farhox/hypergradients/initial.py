"""InitialHG: the gradient of the outer objective before any inner training."""

import dataclasses

import tensorflow as tf

from farhox._core.inner_state import float_leaves
from farhox._core.linearized import zeros_for_none
from farhox._core.types import Batch, Carry
from farhox.hypergradients.base import HyperGradientResult, SingleHyperGradient
from farhox.problem.inner_training import InnerTraining, gradient_diagnostics


@dataclasses.dataclass(frozen=True)
class InitialHG(SingleHyperGradient):
    """dE(Φ_0(λ), λ)/dλ: ordinary training of learned initial values, the baseline that knows of no inner training.

    The inner batches are not used, except by `evaluate`, which does train. `inner_losses` are zeros.
    """

    shares_features = False

    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        at_start = training.outer_gradients(training.start, outer_batch)
        gradients = training.gradients(
            at_start.outer, adjoint=zeros_for_none(at_start.state, float_leaves(training.start)),
            sees="InitialHG sees initial values and the outer objective alone: use farhox.ReverseHG() for what acts in "
                 "the inner training.")
        zero = tf.zeros([], training.problem.loss_dtype)
        diagnostics = {"inner_gradient_norm": zero, "inner_steps": tf.constant(0),
                       **gradient_diagnostics(gradients, at_start.loss)}
        return HyperGradientResult(gradients, at_start.loss, zero[None], training.start, [], diagnostics)

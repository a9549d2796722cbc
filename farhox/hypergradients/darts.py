"""DartsHG: the last inner step differentiated, with a finite difference in the place of second derivatives."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import tensorflow as tf

from farhox._core import checks, tree
from farhox._core.linearized import zeros_for_none
from farhox._core.types import Batch, Carry
from farhox.hypergradients.base import SingleHyperGradient, result
from farhox.problem.inner_training import InnerTraining

if TYPE_CHECKING:
    from farhox.hypergradients.base import HyperGradientResult

_SEES = ("DartsHG sees what the objectives and the last inner step depend on. An initial value without a proximal term "
         "acts through all steps: use ReverseHG or ForwardHG for it.")


@dataclasses.dataclass(frozen=True)
class DartsHG(SingleHyperGradient):
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

    shares_features = False

    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        last = training.steps - 1
        if training.problem.stop_tolerance is not None:
            # Which step is the last one shows only at the end: the inner training runs once more.
            last = training.run().steps - 1
        before = training.run(0, last, replay=True)
        run = training.run(last, last + 1, before, replay=True)
        at_end = training.outer_gradients(run.state, outer_batch)

        variables = before.state.variables
        adjoint = zeros_for_none(at_end.state[:len(variables)], variables)
        update = training.update_system(before.state, last)
        parts = [at_end.outer, update.parameter_product(adjoint)]
        if not training.problem.dynamics.first_order:
            direction = update.input_product(adjoint)
            length = tree.norm(direction)
            distance = self.epsilon / tf.where(length > 0, length, tf.ones_like(length))
            parts.append(training.mixed_difference(before.state, last, direction, distance))
        gradients = training.gradients(*parts, sees=_SEES)
        return result(training, gradients, at_end.loss, run)

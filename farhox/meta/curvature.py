"""Meta-Curvature: gradient descent whose gradient is multiplied by learned matrices, one for each axis of a weight."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Loss, Nest, Tensor, Tensors, Variables
from farhox.dynamics.base import InnerDynamics
from farhox.dynamics.settings import check_setting, setting_per_variable
from farhox.meta.episode_checks import check_model
from farhox.meta.learners import MAML
from farhox.meta.problem import LOSS
from farhox.outer.outer_variable import OuterVariable


@dataclasses.dataclass(frozen=True, eq=False)
class PreconditionedDescent(InnerDynamics):
    """w <- w - learning_rate (g ×₁ M_1 ×₂ M_2 ...), with a matrix for each axis of a weight: Kronecker-factored.

    Axes in front of the last two count as one, as the height and width of a convolution.

    Args:
        learning_rate: A setting, not negative, or a list with one per inner variable.
        factors: List, for each inner variable, of a list of square `keras.Variable`s, one per axis.
            `identity_factors` makes them.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If the learning rate is not a setting.
        ValueError: If it is out of range; in a problem, if the factors do not fit the inner variables.

    Reference:
        [Park and Oliva, 2019](https://arxiv.org/abs/1902.03356), section 3.
    """

    learning_rate: Any
    factors: Any
    first_order: bool = False

    def __post_init__(self) -> None:
        check_setting("learning_rate", self.learning_rate, low=0.0, per_variable=True)

    def bound_to(self, variables: Variables) -> InnerDynamics:
        sizes = [[factor.shape[0] for factor in factors] for factors in self.factors]
        needed = [_merged(variable.shape) for variable in variables]
        if sizes != needed:
            raise ValueError("factors must have a square matrix for each axis of each inner variable, axes in front of "
                             f"the last two as one: sizes {needed}. Received sizes: {sizes}")
        return super().bound_to(variables)

    def initial_slots(self, variables: Tensors) -> Nest:
        return []

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        rates = setting_per_variable(self.learning_rate, variables, step)
        return [w - rate * _multiplied(g, factors) for w, rate, g, factors in zip(
            variables, rates, gradients, self.factors)], slots


class MetaCurvature(MAML):
    """MAML whose inner gradient is multiplied by learned matrices, which start as the identity.

    Args:
        model: As for `MAML`.
        inner_learning_rate: A setting of gradient descent.
        inner_steps, first_order, loss, transductive, evaluation_steps, step_weights: As for `MAML`.
        allow_unused, name, support_loss, outer_variables, condition: As for `MAML`.

    Attributes:
        factors: List of the matrices of each trainable weight of the model.

    Raises:
        TypeError, ValueError: As `MAML`.

    Reference:
        [Park and Oliva, 2019](https://arxiv.org/abs/1902.03356).
    """

    def __init__(self, model: keras.Model, inner_learning_rate: Any = 0.1, inner_steps: int = 5,
                 first_order: bool = False, loss: Loss = LOSS, transductive: bool = True,
                 evaluation_steps: int | None = None, step_weights: Any = None, allow_unused: bool = False,
                 name: str = "meta_curvature", support_loss: Loss | None = None,
                 outer_variables: Sequence[keras.Variable | OuterVariable] = (), condition: Any = None) -> None:
        check_model("model", model)
        factors = identity_factors(model.trainable_variables)
        learned = [factor for each in factors for factor in each]
        super().__init__(
            model, inner_steps=inner_steps, loss=loss, transductive=transductive, evaluation_steps=evaluation_steps,
            step_weights=step_weights, allow_unused=allow_unused, name=name, support_loss=support_loss,
            dynamics=PreconditionedDescent(inner_learning_rate, factors, first_order),
            outer_variables=[*learned, *outer_variables], condition=condition)
        self.factors = factors


def identity_factors(variables: Sequence[keras.Variable]) -> list[list[keras.Variable]]:
    """For each variable a list of identity matrices as `keras.Variable`s, one per axis."""
    return [[keras.Variable(np.eye(size), dtype=variable.dtype, name=f"factor_{variable.name}_{axis}")
             for axis, size in enumerate(_merged(variable.shape))] for variable in variables]


def _merged(shape):
    """Sizes of the axes, those in front of the last two as one."""
    shape = [int(size) for size in shape]
    return [int(np.prod(shape[:-2])), *shape[-2:]] if len(shape) > 2 else shape


def _multiplied(gradient, factors):
    merged = tf.reshape(gradient, [factor.shape[0] for factor in factors])
    for factor in factors:
        # Each turns the first axis and puts it last, so that all are in place again after the last one.
        merged = tf.tensordot(merged, tf.cast(tf.convert_to_tensor(factor), merged.dtype), [[0], [1]])
    return tf.reshape(merged, gradient.shape)

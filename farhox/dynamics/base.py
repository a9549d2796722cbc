"""Differentiable inner optimizers: one step of inner training as a pure function of tensors.

Settings are those of `farhox.dynamics.settings`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import keras
import tensorflow as tf

from farhox._core import tree
from farhox._core.types import Nest, Tensor, Tensors, Variables
from farhox.dynamics.settings import check_decays, check_setting, setting_per_variable, setting_value
from farhox.outer.outer_variable import Setting
from farhox.outer.regularizers import check_no_subgradients


class InnerDynamics(abc.ABC):
    """The update rule of inner training. Subclasses are frozen settings; the state is passed in and out.

    Attributes:
        first_order: Bool, whether the inner gradient is a constant for the derivative of the step.
        needs_objective: Bool, whether `update` takes a fifth argument, the inner objective of the step: a callable
            `list of tensors -> scalar` of the inner variables, on the step's batch, proximal term included. For rules
            that look at other points, as a line search does.
        applies_constraints: Bool, whether `update` applies the Keras constraints of the inner variables itself. Of
            other dynamics the problem does, after each step.
        zero_gradient_is_stationary: Bool, whether the inner variables rest where the inner gradient is zero, which is
            what implicit differentiation of the inner objective takes for granted.
        rests_at_minimum: Bool, whether `residuals` are zero where the inner variables come to rest.
        taken_over: Tuple of the inner variables, as `keras.Variable`s, of which `update` applies the penalty without a
            gradient that their Keras regularizer holds: in the inner objective it has a value and no gradient.
    """

    first_order = False
    needs_objective = False
    applies_constraints = False
    zero_gradient_is_stationary = True
    taken_over = ()

    @property
    def rests_at_minimum(self) -> bool:
        return self.zero_gradient_is_stationary

    @abc.abstractmethod
    def initial_slots(self, variables: Tensors) -> Nest:
        """The optimizer's own part of the inner state before the first step.

        Args:
            variables: List of tensors, the initial inner variables.

        Returns:
            Nest of tensors.
        """

    @abc.abstractmethod
    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        """One step.

        Args:
            gradients: List of tensors, the inner gradient at `variables`.
            variables: List of tensors.
            slots: Nest of tensors as `initial_slots` returns it.
            step: Scalar int64 tensor, the number of steps taken so far.

        Returns:
            New variables, new slots.
        """

    def residuals(self, gradients: Tensors, variables: Tensors, new_variables: Tensors, step: Tensor) -> Tensors:
        """What is zero where the inner variables are at a minimum: the inner gradient.

        Args:
            gradients, variables, step: As for `update`.
            new_variables: List of tensors, what `update` made of them.

        Returns:
            List of tensors.
        """
        del variables, new_variables, step
        return gradients

    def at_learning_rate(self, learning_rate: float) -> InnerDynamics:
        """The same dynamics with another learning rate, where one scales the whole step and moves no fixed point.

        Args:
            learning_rate: Float.

        Returns:
            An `InnerDynamics`; itself where there is no such setting.
        """
        del learning_rate
        return self

    def finished(self, variables: Tensors, slots: Nest) -> Tensors:
        """The inner variables as training leaves them when it ends: what a Keras optimizer does at the end of `fit`.

        Args:
            variables: List of tensors.
            slots: Nest of tensors as `initial_slots` returns it.

        Returns:
            List of tensors.
        """
        del slots
        return variables

    def bound_to(self, variables: Variables) -> InnerDynamics:
        """The dynamics of one problem, which asks once for it. Dynamics that need more than tensors override this.

        Args:
            variables: List of `keras.Variable`, the inner variables of the problem.

        Returns:
            An `InnerDynamics` of the same class.
        """
        check_no_subgradients(variables, self)
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class GradientDescent(InnerDynamics):
    """Gradient descent: w <- w - learning_rate g.

    Args:
        learning_rate: A setting, not negative, or a list with one per inner variable.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If the learning rate is not a setting.
        ValueError: If it is negative or not finite.
    """

    learning_rate: Setting | list[Setting] = 0.01
    first_order: bool = False

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, low=0.0, per_variable=True)

    def initial_slots(self, variables: Tensors) -> Nest:
        return []

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        rates = setting_per_variable(self.learning_rate, variables, step)
        return [w - rate * g for w, rate, g in zip(variables, rates, gradients)], slots


@dataclasses.dataclass(frozen=True, eq=False)
class Momentum(InnerDynamics):
    """Gradient descent with momentum: m <- momentum m + g; w <- w - learning_rate m.

    With `nesterov` the step is w <- w - learning_rate (momentum m + g) with the new m. Keras' SGD keeps
    velocity = -learning_rate m instead, which is the same path for a constant learning rate.

    Args:
        learning_rate: A setting, not negative, or a list with one per inner variable.
        momentum: A setting, from 0 to 1, or a list with one per inner variable.
        nesterov: Bool.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If a setting is not one.
        ValueError: If a setting is out of range.
    """

    learning_rate: Setting | list[Setting] = 0.01
    momentum: Setting | list[Setting] = 0.9
    nesterov: bool = False
    first_order: bool = False

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, low=0.0, per_variable=True)
        check_setting("momentum", self.momentum, low=0.0, high=1.0, per_variable=True)

    def initial_slots(self, variables: Tensors) -> Nest:
        return tree.zeros_like(variables)

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        rates = setting_per_variable(self.learning_rate, variables, step)
        decays = setting_per_variable(self.momentum, variables, step)
        slots = [decay * m + g for decay, m, g in zip(decays, slots, gradients)]
        directions = slots
        if self.nesterov:
            directions = [decay * m + g for decay, m, g in zip(decays, slots, gradients)]
        return [w - rate * d for w, rate, d in zip(variables, rates, directions)], slots


@dataclasses.dataclass(frozen=True, eq=False)
class Adam(InnerDynamics):
    """Adam with the values of Keras' Adam, and finite derivatives where a second moment is zero.

    m <- m + (1 - beta_1)(g - m); v <- v + (1 - beta_2)(g^2 - v);
    w <- w - learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t) m / (sqrt(v) + epsilon), t = 1, 2, ...

    The square root has an infinite derivative at v = 0, where m = 0 as well: their product is taken to be zero, which
    is its limit.

    Args:
        learning_rate: A setting, not negative, or a list with one per inner variable.
        beta_1: A setting, at least 0 and less than 1.
        beta_2: The same.
        epsilon: A setting, not negative.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If a setting is not one.
        ValueError: If a setting is out of range; in a problem, if a beta is 1 in the type of an inner variable.

    Reference:
        [Kingma and Ba, 2014](https://arxiv.org/abs/1412.6980), Algorithm 1 and the last remark of section 2.
    """

    learning_rate: Setting | list[Setting] = 0.001
    beta_1: Setting = 0.9
    beta_2: Setting = 0.999
    epsilon: Setting = 1e-7
    first_order: bool = False

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, low=0.0, per_variable=True)
        for name in ("beta_1", "beta_2"):
            check_setting(name, getattr(self, name), low=0.0, below=1.0)
        check_setting("epsilon", self.epsilon, low=0.0)

    def bound_to(self, variables: Variables) -> InnerDynamics:
        check_decays({"beta_1": self.beta_1, "beta_2": self.beta_2}, variables, "Adam")
        return super().bound_to(variables)

    def initial_slots(self, variables: Tensors) -> Nest:
        return [tree.zeros_like(variables), tree.zeros_like(variables)]

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        rates = setting_per_variable(self.learning_rate, variables, step)
        new_variables, first_moments, second_moments = [], [], []
        for w, g, m, v, rate in zip(variables, gradients, *slots, rates):
            beta_1, beta_2, epsilon = (
                setting_value(setting, step, w.dtype) for setting in (self.beta_1, self.beta_2, self.epsilon))
            count = tf.cast(step + 1, w.dtype)
            correction = tf.sqrt(1.0 - tf.pow(beta_2, count)) / (1.0 - tf.pow(beta_1, count))
            m = m + (1.0 - beta_1) * (g - m)
            v = v + (1.0 - beta_2) * (tf.square(g) - v)
            new_variables.append(w - rate * correction * m / (_root(v) + epsilon))
            first_moments.append(m)
            second_moments.append(v)
        return new_variables, [first_moments, second_moments]


# What to write where an optimizer of Keras is asked for.
_COUNTERPARTS = {"Adam": "keras.optimizers.Adam", "Momentum": "keras.optimizers.SGD",
                 "GradientDescent": "keras.optimizers.SGD"}


def check_keras_optimizer(name: str, optimizer: Any) -> None:
    """Raises a TypeError that says what to write if inner dynamics come where a Keras optimizer is asked for.

    Args:
        name: Name in the error.
        optimizer: What came; anything else than inner dynamics is left to Keras.
    """
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if issubclass(kind, InnerDynamics):
        counterpart = _COUNTERPARTS.get(kind.__name__, "keras.optimizers.Adam")
        raise TypeError(f"{name} must be an optimizer of Keras: write {counterpart}(...). {kind.__name__} is inner "
                        f"dynamics of farhox, a differentiable step of inner training. Received: {optimizer!r}")


def unscales(optimizer: Any) -> bool:
    """Whether a Keras optimizer divides gradients by a scale that the loss is taken to have."""
    return isinstance(optimizer, keras.optimizers.Optimizer) and (
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor is not None)


def check_unscaled(name: str, optimizer: Any) -> None:
    """Raises a ValueError if a Keras optimizer would unscale hypergradients, which are not scaled.

    Args:
        name: Name in the error.
        optimizer: A Keras optimizer; anything else is left to Keras.
    """
    if unscales(optimizer):
        raise ValueError(
            f"{name} must take gradients as they are: hypergradients are not scaled, so one that unscales them makes "
            f"next to no step. Received: {type(optimizer).__name__} with loss_scale_factor="
            f"{optimizer.loss_scale_factor}. Give a LossScaleOptimizer's inner_optimizer, or make it without.")


def _root(v):
    """Square root with derivative zero at zero."""
    positive = v > 0
    return tf.where(positive, tf.sqrt(tf.where(positive, v, tf.ones_like(v))), tf.zeros_like(v))

"""Differentiable inner optimizers: one step of inner training as a pure function.

A setting of the dynamics (a learning rate, a momentum) is a float, a `keras.Variable`, a `Hyperparameter`, a
`LearnedSchedule` or another `OuterVariable`, a Keras `LearningRateSchedule` or any callable `step -> tensor`; a learning rate may also be a list
with one of these per inner variable.
"""

import abc
import dataclasses
import numbers
from typing import Any

import keras
import tensorflow as tf

from farhox._core import tree
from farhox.outer.hyperparameters import ExampleWeights
from farhox.outer.outer_variable import OuterVariable, value_of


class InnerDynamics(abc.ABC):
    """The update rule of inner training. Subclasses are frozen settings; the state is passed in and out.

    Attributes:
        first_order: Bool, whether the inner gradient is a constant for the derivative of the step.
        needs_objective: Bool, whether `update` takes a fifth argument, the inner objective of the step: a callable
            `list of tensors -> scalar` of the inner variables, on the step's batch, proximal term included. For rules
            that look at other points, as a line search does.
        applies_constraints: Bool, whether `update` applies the Keras constraints of the inner variables itself. Of
            other dynamics the problem does, after each step.
    """

    first_order = False
    needs_objective = False
    applies_constraints = False

    @abc.abstractmethod
    def initial_slots(self, variables):
        """The optimizer's own part of the inner state before the first step.

        Args:
            variables: List of tensors, the initial inner variables.

        Returns:
            Nest of tensors.
        """

    @abc.abstractmethod
    def update(self, gradients, variables, slots, step):
        """One step.

        Args:
            gradients: List of tensors, the inner gradient at `variables`.
            variables: List of tensors.
            slots: Nest of tensors as `initial_slots` returns it.
            step: Scalar int64 tensor, the number of steps taken so far.

        Returns:
            New variables, new slots.
        """

    def bound_to(self, variables):
        """The dynamics of one problem, which asks once for it. Dynamics that need more than tensors override this.

        Args:
            variables: List of `keras.Variable`, the inner variables of the problem.

        Returns:
            An `InnerDynamics` of the same class.
        """
        del variables
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class GradientDescent(InnerDynamics):
    """Gradient descent: w <- w - learning_rate g.

    Args:
        learning_rate: A setting, or a list with one per inner variable.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If the learning rate is not a setting.
    """

    learning_rate: Any = 0.01
    first_order: bool = False

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, per_variable=True)

    def initial_slots(self, variables):
        return []

    def update(self, gradients, variables, slots, step):
        rates = setting_per_variable(self.learning_rate, variables, step)
        return [w - rate * g for w, rate, g in zip(variables, rates, gradients)], slots


@dataclasses.dataclass(frozen=True, eq=False)
class Momentum(InnerDynamics):
    """Gradient descent with momentum: m <- momentum m + g; w <- w - learning_rate m.

    With `nesterov` the step is w <- w - learning_rate (momentum m + g) with the new m. Keras' SGD keeps
    velocity = -learning_rate m instead, which is the same path for a constant learning rate.

    Args:
        learning_rate: A setting, or a list with one per inner variable.
        momentum: A setting.
        nesterov: Bool.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If a setting is not one.
    """

    learning_rate: Any = 0.01
    momentum: Any = 0.9
    nesterov: bool = False
    first_order: bool = False

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, per_variable=True)
        check_setting("momentum", self.momentum)

    def initial_slots(self, variables):
        return tree.zeros_like(variables)

    def update(self, gradients, variables, slots, step):
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
        learning_rate: A setting, or a list with one per inner variable.
        beta_1: A setting.
        beta_2: A setting.
        epsilon: A setting.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If a setting is not one.

    Reference:
        [Kingma and Ba, 2014](https://arxiv.org/abs/1412.6980), Algorithm 1 and the last remark of section 2.
    """

    learning_rate: Any = 0.001
    beta_1: Any = 0.9
    beta_2: Any = 0.999
    epsilon: Any = 1e-7
    first_order: bool = False

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, per_variable=True)
        for name in ("beta_1", "beta_2", "epsilon"):
            check_setting(name, getattr(self, name))

    def initial_slots(self, variables):
        return [tree.zeros_like(variables), tree.zeros_like(variables)]

    def update(self, gradients, variables, slots, step):
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


def check_setting(name, setting, per_variable=False):
    """Raises a TypeError unless `setting` is one (see the module's first lines)."""
    if per_variable and isinstance(setting, (list, tuple)):
        for entry in setting:
            check_setting(name, entry)
    elif isinstance(setting, (bool, ExampleWeights)) or not (
            isinstance(setting, (numbers.Real, keras.Variable, OuterVariable)) or callable(setting)):
        raise TypeError(
            f"{name} must be a float, a keras.Variable, a farhox.Hyperparameter, a Keras LearningRateSchedule or a "
            f"callable step -> tensor{', or a list of these' if per_variable else ''}. "
            f"Received: {setting!r} of type {type(setting).__name__}")


def setting_value(setting, step, dtype):
    """The value of a setting at the inner step `step` as a tensor of type `dtype`."""
    return value_of(setting, step, dtype)


def setting_per_variable(setting, variables, step):
    """One value of a setting for each of the inner variables.

    Raises:
        ValueError: If the setting is a list of another length.
    """
    if isinstance(setting, (list, tuple)):
        if len(setting) != len(variables):
            raise ValueError("A list of learning rates must have one entry per inner variable. "
                             f"Received {len(setting)} entries for {len(variables)} inner variables.")
        return [setting_value(entry, step, w.dtype) for entry, w in zip(setting, variables)]
    return [setting_value(setting, step, w.dtype) for w in variables]


def _root(v):
    """Square root with derivative zero at zero."""
    positive = v > 0
    return tf.where(positive, tf.sqrt(tf.where(positive, v, tf.ones_like(v))), tf.zeros_like(v))

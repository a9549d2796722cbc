"""What a `HyperOptimizer` keeps from one hyper-iteration to the next: the inner state, online, and the memory."""

from typing import Any

import keras
import tensorflow as tf

from farhox._core import tree
from farhox._core.inner_state import InnerState
from farhox._core.types import Carry, Tensor, Tensors
from farhox.hypergradients.base import HyperGradient, Memory
from farhox.problem.bilevel import BilevelProblem


class Kept:
    """The inner state and the memory of a method in Keras variables.

    Args:
        problem: A `BilevelProblem`.
        hypergradient: A `HyperGradient`.
        online: Bool, whether the inner state goes on. Its variables are then those of the problem.

    Attributes:
        slots, carry: Lists of `keras.Variable`, for the owner to track; empty where nothing is kept.
    """

    def __init__(self, problem: BilevelProblem, hypergradient: HyperGradient, online: bool) -> None:
        self._problem, self._hypergradient, self._online = problem, hypergradient, online
        self._inner = list(problem.inner_variables) + list(problem.state_variables)
        initial = problem.initial_state()
        self._slot_structure = [initial.slots, initial.step]
        self.slots = [_variable(leaf) for leaf in tf.nest.flatten(self._slot_structure)] if online else []
        one_by_one = problem.has_episodes and not hypergradient.takes_episodes  # Episodes start anew.
        self._has_carry = not one_by_one and (hypergradient.remembers is Memory.ALWAYS or (
            online and hypergradient.remembers is Memory.WITH_STATE))
        self._carry_structure = hypergradient.initial_carry(problem) if self._has_carry else []
        self.carry = [_variable(leaf) for leaf in tf.nest.flatten(self._carry_structure)]

    def state_now(self) -> InnerState | None:
        """The `InnerState` to go on from, or None where each hyper-iteration starts anew."""
        if not self._online:
            return None
        count = len(self._problem.inner_variables)
        values = [tf.convert_to_tensor(variable) for variable in self._inner]
        slots, step = tf.nest.pack_sequence_as(
            self._slot_structure, [tf.convert_to_tensor(variable) for variable in self.slots])
        return InnerState(values[:count], values[count:], slots, step)

    def carry_now(self) -> Carry:
        """The memory to go on from, or None where there is none."""
        if not self._has_carry:
            return None
        return tf.nest.pack_sequence_as(
            self._carry_structure, [tf.convert_to_tensor(variable) for variable in self.carry])

    def of(self, result: Any) -> Any:
        """What is to be kept of a result: two lists of tensors, of the state and of the memory."""
        return (_leaves(result.state) if self._online else [],
                tf.nest.flatten(result.carry) if self._has_carry else [])

    def keep(self, inner_losses: Tensor, state: Tensors, carry: Tensors, start: InnerState | None) -> Tensor:
        """Keeps what is finite of the state and of the memory, whatever became of the hypergradient.

        Args:
            inner_losses: Tensor.
            state, carry: What `of` returned.
            start: `state_now()` as it was before the hyper-iteration, which stays where the state is lost.

        Returns:
            Scalar bool tensor, whether the inner losses, the state and the memory were all finite.
        """
        good_state = tree.is_finite([inner_losses, *state])
        for variable, value, old in zip(self._inner + self.slots, state, [] if start is None else _leaves(start)):
            variable.assign(tf.where(good_state, value, old))
        if not carry:
            return good_state
        good_carry = tree.is_finite(carry)
        # The memory belongs to the state. Where that goes on and the memory is lost, it starts anew.
        goes_on = good_state if self._online else tf.constant(True)
        fresh = tf.nest.flatten(self._hypergradient.initial_carry(self._problem)) if self._online else [
            tf.convert_to_tensor(variable) for variable in self.carry]
        for variable, value, first in zip(self.carry, carry, fresh):
            value = tf.where(good_carry, value, first)
            variable.assign(tf.where(goes_on, value, tf.convert_to_tensor(variable)))
        return good_state & good_carry

    def train_to(self, state: InnerState) -> None:
        """Makes a trained inner state the model's, and online the one to go on from."""
        finished = self._problem.dynamics.finished(state.variables, state.slots)
        for variable, value in zip(self._inner + self.slots, _leaves(state._replace(variables=finished))):
            variable.assign(value)

    def reset(self) -> None:
        """Starts the optimizer's slots, the step count and the memory anew."""
        initial = self._problem.initial_state()
        fresh = tf.nest.flatten([initial.slots, initial.step]) if self._online else []
        if self._has_carry:
            fresh = fresh + tf.nest.flatten(self._hypergradient.initial_carry(self._problem))
        for variable, value in zip(self.slots + self.carry, fresh):
            variable.assign(value)


def _leaves(state):
    return tf.nest.flatten([state.variables, state.state_variables, state.slots, state.step])


def _variable(value):
    return keras.Variable(value, dtype=value.dtype.name, trainable=False, aggregation="only_first_replica")

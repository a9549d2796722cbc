"""ReversibleHG: momentum gradient descent that is undone exactly instead of being stored."""

from __future__ import annotations

import dataclasses
import fractions
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from farhox._core import checks, functional, tree
from farhox._core.inner_state import InnerState, float_leaves
from farhox._core.linearized import zeros_for_none
from farhox._core.types import Batch, Carry, Nest, Tensor, Tensors
from farhox.dynamics.base import Momentum
from farhox.dynamics.settings import setting_per_variable
from farhox.hypergradients.base import SingleHyperGradient, result
from farhox.problem.inner_training import InnerRun, InnerTraining
from farhox.problem.maps import variable_names

if TYPE_CHECKING:
    from farhox.hypergradients.base import HyperGradientResult

_LARGEST_DENOMINATOR = 10 ** 4
_WORD = 2 ** 63
_MOST_STEPS_PER_WORD = 2 ** 16


@dataclasses.dataclass(frozen=True)
class ReversibleHG(SingleHyperGradient):
    """Hypergradient of momentum gradient descent, each step undone in integer arithmetic on the way back.

    Variables and momenta are fixed-point numbers, 64-bit integers W and M in units of 2^-fractional_bits. With the
    momentum the ratio n/d of two integers, a step is

        (M, buffer) <- M n/d without loss;  M <- M + [g];  W <- W - [learning_rate M],

    [.] rounding to an integer. All three can be undone exactly: what the division by d loses goes into an information
    buffer, and the multiplication by n takes digits out of it. The adjoint is that of `ReverseHG`, at the states as
    they reappear. The path differs from that of `farhox.Momentum` by rounding alone: in each step by up to
    2^-fractional_bits in a variable and d times that in a momentum, 1e-12 and 1e-11 with the default and momentum 0.9.

    Instead of T states only the buffer is kept. It grows by log2(1 / momentum) bits per inner variable's entry and
    step, 0.15 bits for momentum 0.9 and 0.014 for 0.99, where `ReverseHG` stores 64 (float32) or 128 bits. State
    variables (batch-norm statistics, seeds) are stored at each step: they are few. Time is that of `ReverseHG`, one
    inner gradient more per step and the integer arithmetic: two to three times as much for a small network.

    The diagnostics hold "reversed_exactly", whether the way back ended at the very integers the training started from,
    and "stored_bytes". Gradients that TensorFlow does not compute to the same bits twice (some operations on GPUs,
    unless `tf.config.experimental.enable_op_determinism()` is on) cannot be undone: the hypergradient is then not a
    number. So is everything once a value leaves the range of +-2^(62 - fractional_bits).

    The dynamics must be `farhox.Momentum` without nesterov, with a float of up to four decimals for momentum; the
    learning rate can be any setting and can be learned. To learn the momentum, or for other dynamics, use
    `ReverseHG(checkpoint_every="sqrt")`.

    Args:
        fractional_bits: Int from 10 to 52.

    Raises:
        ValueError: If `fractional_bits` is out of range. When computing: if the dynamics are others, or an inner
            variable has a constraint.

    Reference:
        [Maclaurin et al., 2015](https://arxiv.org/abs/1502.03492), Algorithms 2 and 3.
    """

    fractional_bits: int = 40

    def __post_init__(self):
        checks.integer_in_range("fractional_bits", self.fractional_bits, 10, 52)

    shares_features = False

    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        problem = training.problem
        ratio = _momentum_ratio(problem.dynamics)
        if problem.constrained_variables:
            raise ValueError("ReversibleHG cannot undo constraints of the inner variables. Received: constraints on "
                             f"{variable_names(problem.constrained_variables)}")
        def way_there():
            reversible = _ReversibleTraining(training, ratio, self.fractional_bits)
            begin = reversible.begin()
            return reversible, begin, *reversible.forward(begin, training.steps)

        reversible, begin, run, end, memory = training.once("way there and back", way_there)

        at_end = training.outer_gradients(run.state, outer_batch)
        adjoint = zeros_for_none(at_end.state, float_leaves(run.state))
        back, adjoint, along = reversible.backward(end, memory, run.steps, adjoint)
        sees = "ReversibleHG sees what the inner steps, the outer objective and the initial state depend on."
        if not training.from_initial_state:
            sees = sees[:-1] + "; a state that is passed in does not depend on initial values."
        gradients = training.gradients(at_end.outer, along, adjoint=adjoint, sees=sees)

        exact = tf.reduce_all([tf.reduce_all(a == b) for a, b in zip(tf.nest.flatten(back), tf.nest.flatten(begin))])
        # A hypergradient along another path is none.
        gradients = [tf.where(exact, gradient, tf.constant(np.nan, gradient.dtype)) for gradient in gradients]
        return result(training, gradients, at_end.loss, run, reversed_exactly=exact,
                      stored_bytes=reversible.stored_bytes(run.steps))


class _Fixed:
    """What the integers hold: a tuple (W, M, digits) of lists of int64 tensors, aligned with the inner variables.

    Digits are the current word of the information buffer: 0 <= digits < 2^63.
    """

    def __init__(self, ratio: tuple[int, int], bits: int) -> None:
        self.numerator, self.denominator = ratio
        self.scale = 2.0 ** bits
        self.limit = 2.0 ** (62 - bits)

    def encode(self, values: Any) -> Any:
        """Integers of floating-point tensors, and whether all are in range."""
        values = [tf.cast(value, tf.float64) for value in values]
        valid = [tf.abs(value) < self.limit for value in values]
        # The integer of a number out of range is undefined.
        integers = [tf.cast(tf.round(tf.where(ok, value, tf.zeros_like(value)) * self.scale), tf.int64)
                    for value, ok in zip(values, valid)]
        return integers, tf.reduce_all([tf.reduce_all(ok) for ok in valid])

    def decode(self, integers: Any, like: Nest) -> Tensors:
        """Floating-point tensors of the types of `like`."""
        return [tf.cast(tf.cast(integer, tf.float64) / self.scale, leaf.dtype)
                for integer, leaf in zip(integers, like)]

    def multiply(self, values: Any, digits: Any) -> Any:
        """values n/d: the remainder by d goes into the digits, and digits in base n come out as the last places."""
        return self._exchange(values, digits, self.denominator, self.numerator)

    def divide(self, values: Any, digits: Any) -> Any:
        """Undoes `multiply`."""
        return self._exchange(values, digits, self.numerator, self.denominator)

    def _exchange(self, values, digits, divisor, factor):
        quotients = [tf.math.floordiv(c, divisor) for c in values]
        digits = [i * divisor + (c - q * divisor) for c, q, i in zip(values, quotients, digits)]
        rest = [tf.math.floordiv(i, factor) for i in digits]
        return [q * factor + (i - j * factor) for q, i, j in zip(quotients, digits, rest)], rest

    def steps_per_word(self) -> int:
        """Multiplications after which the digits might no longer fit: the same for all entries and all data."""
        bound, steps = 1, 0
        while bound * self.denominator < _WORD and steps < _MOST_STEPS_PER_WORD:
            bound = -(-bound * self.denominator // self.numerator)
            steps += 1
        return steps


class _ReversibleTraining:
    """The loops there and back. A position is a tuple (W, M, digits) of lists of int64 tensors."""

    def __init__(self, training: InnerTraining, ratio: tuple[int, int], bits: int) -> None:
        self.training = training
        self.start = training.start
        self.fixed = _Fixed(ratio, bits)
        self.steps_per_word = self.fixed.steps_per_word()
        # Both ways must see the same bits. A function that is not inlined is compiled once, for both loops.
        self._gradients = _not_inlined(
            self._gradients, [*self.start.variables, *self.start.state_variables, tf.constant(0)])
        self._rates = _not_inlined(self._rates, [tf.constant(0)])

    def begin(self) -> Any:
        """The position of the state that the training starts from."""
        variables, _ = self.fixed.encode(self.start.variables)
        momenta, _ = self.fixed.encode(self.start.slots)
        return variables, momenta, tree.zeros_like(variables)

    def forward(self, begin: Nest, steps: Any) -> Any:
        """The inner training.

        Returns:
            An `InnerRun`, the position at its end, and the memory: the words of the buffer and the state variables.
        """
        words = _Store(begin[2], -(-steps // self.steps_per_word))
        extras = _Store(self.start.state_variables, steps)
        before = self.training.before_first_step()

        def body(t, position, state_variables, losses, norm, valid, words_arrays, extras_arrays):
            variables, momenta, digits = position
            extras_arrays = extras.with_arrays(extras_arrays).write(t, state_variables).arrays
            state = self._state(position, state_variables, t, valid)
            loss, norm, gradients, state_variables = self._inner_gradients(state, t)
            gradients, gradients_valid = self.fixed.encode(gradients)
            fresh = tf.equal(t % self.steps_per_word, 0)
            digits = [tf.where(fresh, tf.zeros_like(i), i) for i in digits]
            momenta, digits = self.fixed.multiply(momenta, digits)
            momenta = tree.add(momenta, gradients)
            moves, moves_valid = self._moves(momenta, t)
            variables = tree.subtract(variables, moves)
            # Each step writes the current word anew; only the last version of it is read.
            words_arrays = words.with_arrays(words_arrays).write(t // self.steps_per_word, digits).arrays
            valid = tf.reduce_all([valid, gradients_valid, moves_valid, self._in_range(variables + momenta)])
            return (t + 1, (variables, momenta, digits), state_variables, losses.write(t, loss), norm, valid,
                    words_arrays, extras_arrays)

        valid = tf.logical_and(self.fixed.encode(self.start.variables)[1], self.fixed.encode(self.start.slots)[1])
        t, end, state_variables, losses, norm, valid, words_arrays, extras_arrays = tf.while_loop(
            lambda t, position, state_variables, losses, norm, *_: self.training.goes_on(t, steps, norm), body,
            [tf.constant(0), begin, self.start.state_variables, before.losses, before.gradient_norm, valid,
             words.arrays, extras.arrays],
            parallel_iterations=1)
        state = self._state(end, state_variables, t, valid)
        memory = words.with_arrays(words_arrays), extras.with_arrays(extras_arrays)
        return InnerRun(state, losses, norm, t), end, memory

    def backward(self, end: Nest, memory: Carry, steps: Any, adjoint: Any) -> Any:
        """Undoes the training from its end, and adds up the hypergradient on the way.

        Returns:
            The position it arrives at, the adjoint there, and the sum of the steps' products with the parameters, None
            where no step depends.
        """
        words, extras = memory
        parameters = self.training.parameters
        gradients = [tf.zeros_like(value) for value in parameters]

        def body(t, position, adjoint, gradients):
            variables, momenta, digits = position
            state_variables = extras.read(t)
            variables = tree.add(variables, self._moves(momenta, t)[0])
            state = self._state((variables, momenta, digits), state_variables, t)
            _, _, inner_gradients, _ = self._inner_gradients(state, t)
            momenta = tree.subtract(momenta, self.fixed.encode(inner_gradients)[0])
            momenta, digits = self.fixed.divide(momenta, digits)
            state = self._state((variables, momenta, digits), state_variables, t)
            adjoint, gradients = self._step_back(state, t, adjoint, gradients)
            # All digits of this word are used up: they are zero. The word before holds the next ones.
            earlier = words.read(tf.maximum(t // self.steps_per_word - 1, 0))
            used_up = tf.logical_and(tf.equal(t % self.steps_per_word, 0), t > 0)
            digits = [tf.where(used_up, i + word, i) for i, word in zip(digits, earlier)]
            return t - 1, (variables, momenta, digits), adjoint, gradients

        _, position, adjoint, gradients = tf.while_loop(
            lambda t, *_: t >= 0, body, [steps - 1, end, adjoint, gradients], parallel_iterations=1)
        depends = self.training.step_system(self.start, tf.constant(0)).depends_on()
        return position, adjoint, [part if ok else None for part, ok in zip(gradients, depends)]

    def stored_bytes(self, steps: Any) -> int:
        """Bytes of the buffer and of the stored state variables after this many steps, a scalar int64 tensor."""
        entries = sum(w.shape.num_elements() for w in self.start.variables)
        extras = sum(v.shape.num_elements() * v.dtype.size for v in self.start.state_variables)
        steps = tf.cast(steps, tf.int64)
        return 8 * entries * (-(-steps // self.steps_per_word)) + extras * steps

    def _state(self, position, state_variables, t, valid=True):
        """The inner state before step t; without numbers once one was out of range."""
        variables, momenta, _ = position
        decoded = [[tf.where(valid, value, tf.constant(np.nan, value.dtype)) for value in self.fixed.decode(part, like)]
                   for part, like in ((variables, self.start.variables), (momenta, self.start.slots))]
        return InnerState(decoded[0], state_variables, decoded[1], self.start.step + tf.cast(t, tf.int64))

    def _inner_gradients(self, state, t):
        """Loss, gradient norm, inner gradients and next state variables of step t."""
        loss, norm, *rest = self._gradients(*state.variables, *state.state_variables, t)
        count = len(state.variables)
        return loss, norm, rest[:count], rest[count:]

    def _gradients(self, *arguments):
        count = len(self.start.variables)
        variables, state_variables, t = list(arguments[:count]), list(arguments[count:-1]), arguments[-1]
        state = InnerState(variables, state_variables, self.start.slots, self.start.step + tf.cast(t, tf.int64))
        return self.training.inner_gradients(state, t)

    def _moves(self, momenta, t):
        """The integers [learning_rate M], and whether all are in range."""
        return self.fixed.encode([
            tf.cast(rate, tf.float64) * (tf.cast(m, tf.float64) / self.fixed.scale)
            for rate, m in zip(self._rates(t), momenta)])

    def _rates(self, t):
        momentum: Any = self.training.problem.dynamics
        return functional.call(
            setting_per_variable, momentum.learning_rate, self.start.variables,
            self.start.step + tf.cast(t, tf.int64),
            bindings=zip(self.training.problem.outer_variables, self.training.outer)).value

    def _in_range(self, integers):
        limit = int(self.fixed.limit * self.fixed.scale)
        return tf.reduce_all([tf.reduce_all(tf.abs(integer) < limit) for integer in integers])

    def _step_back(self, state, t, adjoint, gradients):
        """One step of the adjoint, as in `ReverseHG`."""
        system = self.training.step_system(state, t)
        gradients = [total if product is None else total + product
                     for total, product in zip(gradients, system.parameter_product(adjoint))]
        return system.input_product(adjoint), gradients


class _Store:
    """Nests of tensors of one structure by their index, inside loops of a graph."""

    def __init__(self, like: Nest, size: Any = None, arrays: Any = None) -> None:
        self.like = like
        self.arrays = arrays if arrays is not None else [
            tf.TensorArray(leaf.dtype, size=size, element_shape=leaf.shape, clear_after_read=False)
            for leaf in tf.nest.flatten(like)]

    def write(self, index: Tensor, nest: Nest) -> _Store:
        """The store with the nest at `index`."""
        return self.with_arrays([array.write(index, leaf) for array, leaf in zip(self.arrays, tf.nest.flatten(nest))])

    def read(self, index: Tensor) -> Nest:
        """The nest at `index`."""
        return tf.nest.pack_sequence_as(self.like, [array.read(index) for array in self.arrays])

    def with_arrays(self, arrays: Any) -> _Store:
        """The same store with the arrays that came out of a loop."""
        return _Store(self.like, arrays=arrays)


def _not_inlined(function, arguments):
    """The function as one node of a graph, which TensorFlow optimizes apart from what is around it."""
    if tf.executing_eagerly():
        return function
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True}).get_concrete_function(
        *[tf.TensorSpec(argument.shape, argument.dtype) for argument in arguments])


def _momentum_ratio(dynamics):
    """(n, d) of dynamics that can be undone.

    Raises:
        ValueError: If they cannot.
    """
    if not isinstance(dynamics, Momentum) or dynamics.nesterov:
        raise ValueError("ReversibleHG undoes farhox.Momentum without nesterov. Received: "
                         f"{dynamics!r}. For other dynamics use ReverseHG(checkpoint_every='sqrt').")
    momentum = dynamics.momentum
    if not checks.is_number(momentum) or not 0 < momentum < 1:
        # Keras 3.8 cannot show a variable inside a graph.
        received = repr(getattr(momentum, "path", momentum))
        raise ValueError("ReversibleHG needs a float strictly between 0 and 1 for the momentum, because it multiplies "
                         f"by a fixed ratio of integers. Received: momentum={received}. To learn the momentum, or "
                         "without any, use ReverseHG(checkpoint_every='sqrt').")
    ratio = fractions.Fraction(float(momentum)).limit_denominator(_LARGEST_DENOMINATOR)
    if abs(float(ratio) - momentum) > 1e-9:
        raise ValueError(f"The momentum must be a ratio of integers with a denominator of at most "
                         f"{_LARGEST_DENOMINATOR:,}, as decimals of up to four digits are. "
                         f"Received: momentum={momentum!r}. Near it is {float(ratio)}.")
    return ratio.numerator, ratio.denominator

"""Series: the truncated Neumann series and the iteration to a fixed point, x <- x + step_size (b - A x)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core import checks, few
from farhox._core.types import Matvec, Tensor
from farhox.linear_solvers.base import (
    LinearSolution,
    LinearSolver,
    check_steps_and_tolerance,
    normalised,
    not_a_number,
    relative,
    setting_name,
    start,
    value_at,
)

# Products that bring the estimate of the largest eigenvalue up to date once there is one.
_REFRESH = 1


@dataclasses.dataclass(frozen=True)
class Neumann(LinearSolver):
    """Truncated Neumann series: x = step_size sum_{k < max_steps} (I - step_size A)^k b.

    From a zero start `max_steps` steps sum as many terms. Converges for 0 < step_size < 2 / (largest eigenvalue of A).
    When the residual has grown the series diverges: `failed` is set, and the sum is returned as it is.

    Without a step size its memory is the vector of the power iteration: `power_steps` products are spent on the first
    system and after a failure, one on each of the others.

    Args:
        max_steps: Positive int, the number of terms.
        step_size: Positive float, or a callable `hyper-iteration -> float`; None for the inverse of the largest
            eigenvalue, found by power iteration.
        power_steps: Positive int, products with A spent on the power iteration.
        tolerance: As for `ConjugateGradient`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Lorraine et al., 2020](https://arxiv.org/abs/1911.02590), Algorithm 3.
    """

    max_steps: int = 20
    step_size: float | Callable[[Tensor], Tensor] | None = None
    power_steps: int = 20
    tolerance: float | Callable[[Tensor], Tensor] = 1e-6

    def __post_init__(self):
        check_steps_and_tolerance(self)
        checks.positive_integer(setting_name(self, "power_steps"), self.power_steps)
        size = self.step_size
        if size is not None and not callable(size) and not (checks.is_number(size) and size > 0):
            raise ValueError(f"{setting_name(self, 'step_size')} must be positive or None, or a callable "
                             f"hyper-iteration -> number. Received: {size!r}")

    def initial_memory(self, like: Tensor) -> Any:
        return () if self.step_size is not None else [_first_direction(like), tf.constant(False)]

    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        if self.step_size is None:
            direction, known = memory if memory else self.initial_memory(rhs)
            spent = tf.where(known, _REFRESH, self.power_steps)
            largest, direction = _largest_eigenvalue(matvec, direction, spent)
            step_size = tf.where(largest > 0, 1.0 / largest, tf.ones_like(largest))
        else:
            step_size, spent = value_at(self.step_size, iteration, rhs.dtype), 0
        solution = _richardson(
            matvec, rhs, initial, step_size, self.max_steps, value_at(self.tolerance, iteration, rhs.dtype))
        if self.step_size is None:
            good = tf.logical_not(solution.failed) & tf.reduce_all(tf.math.is_finite(direction))
            memory = [tf.where(good, direction, _first_direction(rhs)), good]
        return solution._replace(steps=solution.steps + spent, memory=memory)


@dataclasses.dataclass(frozen=True)
class FixedPoint(LinearSolver):
    """Iterates v <- v + (b - A v), which on the system of the dynamics, A = I - A_t', is v <- A_t' v + b.

    The fixed point of the reverse-mode recursion at the last state: no Hessian and no symmetry is needed, only dynamics
    that contract. `ImplicitHG` gives it that system where none is asked for. Diverging iterations are reported as for
    `Neumann`.

    Args:
        max_steps: Positive int.
        tolerance: As for `ConjugateGradient`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Grazzi et al., 2020](https://arxiv.org/abs/2006.16218), section 2.2.
    """

    max_steps: int = 50
    tolerance: float | Callable[[Tensor], Tensor] = 1e-6

    def __post_init__(self):
        check_steps_and_tolerance(self)

    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        return _richardson(matvec, rhs, initial, tf.ones([], rhs.dtype), self.max_steps,
                           value_at(self.tolerance, iteration, rhs.dtype))


def _richardson(matvec, rhs, initial, step_size, max_steps, tolerance):
    x, residual, products = start(matvec, rhs, initial)
    first = tf.norm(residual)

    def body(x, residual):
        x += step_size * residual
        return x, rhs - matvec(x)

    steps, x, residual = few.loop_while(
        lambda x, residual: tf.norm(residual) > tolerance * tf.norm(rhs), body, [x, residual], max_steps)
    length = tf.norm(residual)
    # A right-hand side that is not finite passes the loop by: it must not come out as a zero solution.
    finite = tf.math.is_finite(length)
    return LinearSolution(tf.where(finite, x, not_a_number(x)), relative(residual, rhs), steps + products,
                          (length > first) | tf.math.is_nan(length))


def _first_direction(like):
    return normalised(tf.cast(tf.random.stateless_normal([like.shape[0]], [0, 1]), like.dtype))


def _largest_eigenvalue(matvec, direction, steps):
    """The size of the largest eigenvalue, and the direction that the power iteration ended at."""
    def body(k, vector, value):
        product = matvec(vector)
        return k + 1, normalised(product), tf.norm(product)

    _, direction, value = tf.while_loop(
        lambda k, *_: k < steps, body, [tf.constant(0), direction, tf.zeros([], direction.dtype)],
        parallel_iterations=1)
    return value, direction

"""Krylov methods: conjugate gradients, conjugate gradients on the normal equations, GMRES."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core import few, tree
from farhox._core.types import Matvec, Tensor
from farhox.linear_solvers.base import (
    LinearSolution,
    LinearSolver,
    as_operator,
    check_steps_and_tolerance,
    normalised,
    not_a_number,
    relative,
    start,
    value_at,
)

# Relative differences of Ab and A'b beyond rounding, and residuals that count as a solution.
_UNSYMMETRIC = 1e-2
_INEXACT = 1e-3


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients for symmetric positive definite A: exact after n steps.

    A direction p with p'Ap <= 0 ends the iteration with `failed`: A is not positive definite, and the vector is the
    iterate before that direction. Where A is not symmetric (as with values under `tf.stop_gradient`), a residual above
    1e-3 that more steps would not take away is a failure too: `GMRES` or `NormalConjugateGradient` suit it.

    Args:
        max_steps: Positive int.
        tolerance: Float, relative residual to stop at, or a callable `hyper-iteration -> float`, for example a Keras
            `ExponentialDecay`: the tightening tolerance of HOAG.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Hestenes and Stiefel, 1952; [Pedregosa, 2016](https://arxiv.org/abs/1602.02355) (tightening tolerance).
    """

    max_steps: int = 20
    tolerance: float | Callable[[Tensor], Tensor] = 1e-6

    def __post_init__(self):
        check_steps_and_tolerance(self)

    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        operator = as_operator(matvec)
        tolerance = value_at(self.tolerance, iteration, rhs.dtype)
        solution = _conjugate_gradient(operator, rhs, initial, self.max_steps, tolerance)
        if operator.symmetric:
            return solution
        # Whether A is what the iteration takes it for shows at one vector.
        product = operator(rhs)
        unsymmetric = tf.norm(product - operator.transposed(rhs)) > _UNSYMMETRIC * tf.norm(product)
        bound = tf.maximum(tolerance, tf.cast(_INEXACT, rhs.dtype))
        failed = solution.failed | (unsymmetric & tree.not_less(solution.residual, bound)) | tree.not_less(
            solution.residual, tf.ones([], rhs.dtype))
        return solution._replace(failed=failed, steps=solution.steps + 2)


@dataclasses.dataclass(frozen=True)
class NormalConjugateGradient(LinearSolver):
    """Conjugate gradients on the normal equations A'A x = A'b: for any regular A.

    Takes two products per step, with A and A'; the condition number is squared.

    Args:
        max_steps: Positive int.
        tolerance: As for `ConjugateGradient`, but measured on the normal equations.

    Raises:
        ValueError: If an argument is out of range.
    """

    max_steps: int = 20
    tolerance: float | Callable[[Tensor], Tensor] = 1e-6

    uses_transposed = True

    def __post_init__(self):
        check_steps_and_tolerance(self)

    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        operator = as_operator(matvec)
        solution = _conjugate_gradient(
            lambda v: operator.transposed(operator(v)), operator.transposed(rhs), initial, self.max_steps,
            value_at(self.tolerance, iteration, rhs.dtype))
        # A'b and the residual of the system itself cost one product each.
        return solution._replace(
            residual=relative(rhs - operator(solution.vector), rhs), steps=2 * solution.steps + 2)


@dataclasses.dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals: the best x in a Krylov space, for any A. Keeps `max_steps` vectors.

    Args:
        max_steps: Positive int, dimension of the Krylov space.
        tolerance: As for `ConjugateGradient`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Saad and Schultz, 1986.
    """

    max_steps: int = 20
    tolerance: float | Callable[[Tensor], Tensor] = 1e-6

    def __post_init__(self):
        check_steps_and_tolerance(self)

    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        tolerance = value_at(self.tolerance, iteration, rhs.dtype)
        origin, residual, products = start(matvec, rhs, initial)
        length = tf.norm(residual)
        count, dimension = self.max_steps, rhs.shape[0]
        basis = tf.concat([normalised(residual)[tf.newaxis], tf.zeros([count, dimension], rhs.dtype)], axis=0)
        target = tf.concat([length[tf.newaxis], tf.zeros([count], rhs.dtype)], axis=0)
        tiny = 10.0 * rhs.dtype.as_numpy_dtype(1.2e-7 if rhs.dtype == tf.float32 else 2.3e-16)

        def coefficients(hessenberg):
            return tf.linalg.matvec(tf.linalg.pinv(hessenberg), target)

        def body(k, basis, hessenberg, error):
            w = matvec(basis[k])
            scale = tf.norm(w)
            h = tf.linalg.matvec(basis, w)
            w -= tf.linalg.matvec(basis, h, transpose_a=True)
            # A second pass keeps the basis orthogonal to rounding.
            again = tf.linalg.matvec(basis, w)
            w -= tf.linalg.matvec(basis, again, transpose_a=True)
            left = tf.norm(w)
            left = tf.where(left > tiny * scale, left, tf.zeros_like(left))
            w = tf.where(left > 0, w / tf.where(left > 0, left, tf.ones_like(left)), tf.zeros_like(w))
            column = h + again + left * tf.one_hot(k + 1, count + 1, dtype=rhs.dtype)
            hessenberg += column[:, tf.newaxis] * tf.one_hot(k, count, dtype=rhs.dtype)[tf.newaxis, :]
            basis = tf.tensor_scatter_nd_update(basis, [[k + 1]], [w])
            error = tf.norm(target - tf.linalg.matvec(hessenberg, coefficients(hessenberg)))
            return k + 1, basis, hessenberg, tf.where(left > 0, error, tf.zeros_like(error))

        steps, basis, hessenberg, _ = tf.while_loop(
            lambda k, basis, hessenberg, error: (k < count) & (error > tolerance * tf.norm(rhs)), body,
            [tf.constant(0), basis, tf.zeros([count + 1, count], rhs.dtype), length], parallel_iterations=1)
        vector = origin + tf.linalg.matvec(basis[:count], coefficients(hessenberg), transpose_a=True)
        residual = relative(rhs - matvec(vector), rhs)
        return LinearSolution(
            vector, residual, steps + products + 1, tf.logical_not(tf.math.is_finite(residual)))


def _conjugate_gradient(matvec, rhs, initial, max_steps, tolerance):
    x, residual, products = start(matvec, rhs, initial)
    square = tf.reduce_sum(residual * residual)
    stop = tf.square(tolerance) * tf.reduce_sum(rhs * rhs)

    def body(x, residual, direction, square, failed):
        del failed
        product = matvec(direction)
        curvature = tf.reduce_sum(direction * product)
        # Not written as not (curvature > 0): graphs turn that into curvature <= 0, which not-a-number is not.
        failed = (curvature <= 0) | tf.math.is_nan(curvature)
        length = tf.where(failed, tf.zeros_like(square), square / tf.where(failed, tf.ones_like(square), curvature))
        # The new iterate is kept before any test: stopping must not return the one before.
        x += length * direction
        residual -= length * product
        new_square = tf.reduce_sum(residual * residual)
        direction = residual + (new_square / square) * direction
        return x, residual, direction, new_square, failed

    steps, x, residual, _, square, failed = few.loop_while(
        lambda x, residual, direction, square, failed: (square > stop) & tf.logical_not(failed),
        body, [x, residual, residual, square, tf.constant(False)], max_steps)
    # A right-hand side that is not finite passes the loop by: it must not come out as a zero solution.
    finite = tf.math.is_finite(square)
    return LinearSolution(tf.where(finite, x, not_a_number(x)), relative(residual, rhs), steps + products,
                          failed | tf.logical_not(finite))

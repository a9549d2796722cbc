"""Solvers of A x = b where A is known by its products with vectors: frozen settings with a pure `solve`.

A is symmetric except for `FixedPoint` and `GMRES`; vectors are flat tensors. All loops are `tf.while_loop`s.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core import checks


class LinearSolution(NamedTuple):
    """What a solver found.

    Attributes:
        vector: Tensor [n], x.
        residual: Scalar, ||b - A x|| / ||b|| (0 for b = 0).
        steps: Scalar int32 tensor, products with A that were taken.
        failed: Scalar bool tensor: the iteration diverged or met a direction of negative curvature.
    """

    vector: Any
    residual: Any
    steps: Any
    failed: Any


class LinearSolver(abc.ABC):
    """Settings of a solver of A x = b.

    Attributes:
        on_dynamics: Whether implicit differentiation gives it the system of the dynamics' fixed point, (I - A_t') x = b
            over the whole inner state, instead of the Hessian of the inner objective.
    """

    on_dynamics = False

    @abc.abstractmethod
    def solve(self, matvec, rhs, initial=None, iteration=0):
        """Solves A x = b.

        Args:
            matvec: Callable, tensor [n] to tensor [n], the product with A.
            rhs: Tensor [n], b.
            initial: Tensor [n] to start from; default: zero.
            iteration: Scalar integer tensor, the hyper-iteration, for a tolerance that tightens.

        Returns:
            A `LinearSolution`.
        """


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    """Conjugate gradients for symmetric positive definite A: exact after n steps.

    A direction p with p'Ap <= 0 ends the iteration with `failed`: A is not positive definite there.

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
    tolerance: Any = 1e-6

    def __post_init__(self):
        _check_steps_and_tolerance(self)

    def solve(self, matvec, rhs, initial=None, iteration=0):
        return _conjugate_gradient(
            matvec, rhs, initial, self.max_steps, _tolerance(self.tolerance, iteration, rhs.dtype))


@dataclasses.dataclass(frozen=True)
class NormalConjugateGradient(LinearSolver):
    """Conjugate gradients on the normal equations A'A x = A'b: for symmetric A that is not positive definite.

    Takes two products with A per step; the condition number is squared.

    Args:
        max_steps: Positive int.
        tolerance: As for `ConjugateGradient`, but measured on the normal equations.

    Raises:
        ValueError: If an argument is out of range.
    """

    max_steps: int = 20
    tolerance: Any = 1e-6

    def __post_init__(self):
        _check_steps_and_tolerance(self)

    def solve(self, matvec, rhs, initial=None, iteration=0):
        solution = _conjugate_gradient(
            lambda v: matvec(matvec(v)), matvec(rhs), initial, self.max_steps,
            _tolerance(self.tolerance, iteration, rhs.dtype))
        return solution._replace(
            residual=_relative(rhs - matvec(solution.vector), rhs), steps=2 * solution.steps + 2)


@dataclasses.dataclass(frozen=True)
class Neumann(LinearSolver):
    """Truncated Neumann series: x = step_size sum_{k < max_steps} (I - step_size A)^k b.

    From a zero start `max_steps` steps sum as many terms. Converges for 0 < step_size < 2 / (largest eigenvalue of A).
    When the residual has grown the series diverges: the solution is then not a number and `failed` is set.

    Args:
        max_steps: Positive int, the number of terms.
        step_size: Positive float, or None for the inverse of the largest eigenvalue, found by power iteration.
        power_steps: Positive int, products with A spent on the power iteration.
        tolerance: As for `ConjugateGradient`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Lorraine et al., 2020](https://arxiv.org/abs/1911.02590), Algorithm 3.
    """

    max_steps: int = 20
    step_size: Any = None
    power_steps: int = 20
    tolerance: Any = 1e-6

    def __post_init__(self):
        _check_steps_and_tolerance(self)
        checks.positive_integer("power_steps", self.power_steps)
        if self.step_size is not None and not (checks.is_number(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size must be positive or None. Received: {self.step_size!r}")

    def solve(self, matvec, rhs, initial=None, iteration=0):
        extra_steps = 0
        if self.step_size is None:
            largest = _largest_eigenvalue(matvec, rhs, self.power_steps)
            step_size = tf.where(largest > 0, 1.0 / largest, tf.ones_like(largest))
            extra_steps = self.power_steps
        else:
            step_size = tf.constant(self.step_size, rhs.dtype)
        solution = _richardson(
            matvec, rhs, initial, step_size, self.max_steps, _tolerance(self.tolerance, iteration, rhs.dtype))
        return solution._replace(steps=solution.steps + extra_steps)


@dataclasses.dataclass(frozen=True)
class FixedPoint(LinearSolver):
    """Iterates v <- A_t' v + b on the adjoint of the inner dynamics itself, whatever these are.

    The fixed point of the reverse-mode recursion at the last state: no Hessian and no symmetry is needed, only dynamics
    that contract. Diverging iterations are reported as for `Neumann`.

    Args:
        max_steps: Positive int.
        tolerance: As for `ConjugateGradient`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Grazzi et al., 2020](https://arxiv.org/abs/2006.16218), section 2.2.
    """

    max_steps: int = 50
    tolerance: Any = 1e-6

    on_dynamics = True

    def __post_init__(self):
        _check_steps_and_tolerance(self)

    def solve(self, matvec, rhs, initial=None, iteration=0):
        return _richardson(matvec, rhs, initial, tf.ones([], rhs.dtype), self.max_steps,
                           _tolerance(self.tolerance, iteration, rhs.dtype))


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
    tolerance: Any = 1e-6

    def __post_init__(self):
        _check_steps_and_tolerance(self)

    def solve(self, matvec, rhs, initial=None, iteration=0):
        tolerance = _tolerance(self.tolerance, iteration, rhs.dtype)
        start, residual = _start(matvec, rhs, initial)
        length = tf.norm(residual)
        count, dimension = self.max_steps, rhs.shape[0]
        basis = tf.concat([_normalised(residual)[tf.newaxis], tf.zeros([count, dimension], rhs.dtype)], axis=0)
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
        vector = start + tf.linalg.matvec(basis[:count], coefficients(hessenberg), transpose_a=True)
        residual = _relative(rhs - matvec(vector), rhs)
        return LinearSolution(vector, residual, steps + 1, tf.logical_not(tf.math.is_finite(residual)))


@dataclasses.dataclass(frozen=True)
class Nystrom(LinearSolver):
    """Solves (A' + rho I) x = b where A' is the Nyström approximation of A from `rank` of its columns.

    With C the sampled columns, W their rows and C = QR: A' = Q (R W^+ R') Q'. Takes `rank` products with A whatever the
    conditioning, and no iteration.

    Args:
        rank: Positive int, the number of columns.
        rho: Positive float, the damping; needed, since A' is singular.
        seed: Int, chooses the columns.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Hataya and Yamada, 2023](https://arxiv.org/abs/2302.09726).
    """

    rank: int = 10
    rho: float = 1e-2
    seed: int = 0

    def __post_init__(self):
        checks.positive_integer("rank", self.rank)
        checks.positive_number("rho", self.rho)
        checks.integer("seed", self.seed)

    def solve(self, matvec, rhs, initial=None, iteration=0):
        dimension = rhs.shape[0]
        rank = min(self.rank, dimension)
        order = tf.argsort(tf.random.stateless_uniform([dimension], [self.seed, 0]))[:rank]
        rho = tf.constant(self.rho, rhs.dtype)
        columns = tf.transpose(_products_with_unit_vectors(matvec, order, dimension, rhs.dtype))
        q, r = tf.linalg.qr(columns)
        core = r @ tf.linalg.pinv(tf.gather(columns, order)) @ tf.transpose(r)
        inside = tf.linalg.matvec(q, rhs, transpose_a=True)
        solved = _solve_square(core + rho * tf.eye(rank, dtype=rhs.dtype), inside)
        outside = rhs - tf.linalg.matvec(q, inside)
        # A second projection: what rounding left inside the columns' space must not be divided by a small rho.
        outside -= tf.linalg.matvec(q, tf.linalg.matvec(q, outside, transpose_a=True))
        vector = tf.linalg.matvec(q, solved) + outside / rho
        residual = _relative(rhs - matvec(vector), rhs)
        return LinearSolution(vector, residual, tf.constant(rank + 1), tf.logical_not(tf.math.is_finite(residual)))


@dataclasses.dataclass(frozen=True)
class Dense(LinearSolver):
    """Builds A from n products and solves by QR decomposition: exact, for up to a few thousand inner variables.

    The solution is not a number and `failed` is set where A is singular or not finite.

    Args:
        max_dimension: Positive int; larger systems are an error, since A would need n^2 numbers.

    Raises:
        ValueError: If `max_dimension` is out of range, or the system is larger.
    """

    max_dimension: int = 5000

    def __post_init__(self):
        checks.positive_integer("max_dimension", self.max_dimension)

    def solve(self, matvec, rhs, initial=None, iteration=0):
        dimension = rhs.shape[0]
        if dimension > self.max_dimension:
            raise ValueError(f"Dense builds an n x n matrix and takes at most n={self.max_dimension} (max_dimension). "
                             f"Received: n={dimension}. Use ConjugateGradient or Nystrom.")
        # Row i is (A e_i)': the matrix comes out transposed.
        rows = _products_with_unit_vectors(matvec, tf.range(dimension), dimension, rhs.dtype)
        vector = _solve_square(tf.transpose(rows), rhs)
        residual = _relative(rhs - matvec(vector), rhs)
        return LinearSolution(
            vector, residual, tf.constant(dimension + 1), tf.logical_not(tf.math.is_finite(residual)))


def _conjugate_gradient(matvec, rhs, initial, max_steps, tolerance):
    x, residual = _start(matvec, rhs, initial)
    square = tf.reduce_sum(residual * residual)
    stop = tf.square(tolerance) * tf.reduce_sum(rhs * rhs)

    def body(k, x, residual, direction, square, failed):
        product = matvec(direction)
        curvature = tf.reduce_sum(direction * product)
        failed = tf.logical_not(curvature > 0)
        length = tf.where(failed, tf.zeros_like(square), square / tf.where(failed, tf.ones_like(square), curvature))
        # The new iterate is kept before any test: stopping must not return the one before.
        x += length * direction
        residual -= length * product
        new_square = tf.reduce_sum(residual * residual)
        direction = residual + (new_square / square) * direction
        return k + 1, x, residual, direction, new_square, failed

    steps, x, residual, _, square, failed = tf.while_loop(
        lambda k, x, residual, direction, square, failed: (k < max_steps) & (square > stop) & tf.logical_not(failed),
        body, [tf.constant(0), x, residual, residual, square, tf.constant(False)], parallel_iterations=1)
    # A right-hand side that is not finite passes the loop by: it must not come out as a zero solution.
    failed |= tf.logical_not(tf.math.is_finite(square))
    x = tf.where(tf.math.is_finite(square), x, tf.fill(tf.shape(x), tf.constant(float("nan"), x.dtype)))
    return LinearSolution(x, _relative(residual, rhs), steps, failed)


def _richardson(matvec, rhs, initial, step_size, max_steps, tolerance):
    """x <- x + step_size (b - A x)."""
    x, residual = _start(matvec, rhs, initial)
    first = tf.norm(residual)

    def body(k, x, residual):
        x += step_size * residual
        return k + 1, x, rhs - matvec(x)

    steps, x, residual = tf.while_loop(
        lambda k, x, residual: (k < max_steps) & (tf.norm(residual) > tolerance * tf.norm(rhs)), body,
        [tf.constant(0), x, residual], parallel_iterations=1)
    failed = tf.logical_not(tf.norm(residual) <= first)
    x = tf.where(failed, tf.fill(tf.shape(x), tf.constant(float("nan"), x.dtype)), x)
    return LinearSolution(x, _relative(residual, rhs), steps, failed)


def _start(matvec, rhs, initial):
    """The start and its residual; a zero start costs no product."""
    return (tf.zeros_like(rhs), rhs) if initial is None else (initial, rhs - matvec(initial))


def _largest_eigenvalue(matvec, like, steps):
    vector = tf.cast(tf.random.stateless_normal([like.shape[0]], [0, 1]), like.dtype)

    def body(k, vector, value):
        product = matvec(vector)
        return k + 1, _normalised(product), tf.norm(product)

    return tf.while_loop(lambda k, *_: k < steps, body, [tf.constant(0), _normalised(vector), tf.zeros([], like.dtype)],
                         parallel_iterations=1)[2]


def _products_with_unit_vectors(matvec, indices, dimension, dtype):
    """A e_i for each index, as the rows of a matrix."""
    product = tf.autograph.experimental.do_not_convert(lambda i: matvec(tf.one_hot(i, dimension, dtype=dtype)))
    return tf.map_fn(product, indices, fn_output_signature=dtype, parallel_iterations=1)


def _solve_square(matrix, vector):
    """Not a number where the matrix is singular or not finite: TensorFlow's solve would stop the whole graph there."""
    finite = tf.reduce_all(tf.math.is_finite(matrix))
    identity = tf.eye(matrix.shape[0], dtype=matrix.dtype)
    q, r = tf.linalg.qr(tf.where(finite, matrix, identity))
    regular = finite & tf.reduce_all(tf.not_equal(tf.linalg.diag_part(r), 0))
    inside = tf.linalg.matvec(q, vector, transpose_a=True)
    solution = tf.linalg.triangular_solve(tf.where(regular, r, identity), inside[:, tf.newaxis], lower=False)[:, 0]
    return tf.where(regular, solution, tf.fill(tf.shape(solution), tf.constant(float("nan"), solution.dtype)))


def _normalised(vector):
    length = tf.norm(vector)
    return vector / tf.where(length > 0, length, tf.ones_like(length))


def _relative(residual, rhs):
    length = tf.norm(rhs)
    return tf.norm(residual) / tf.where(length > 0, length, tf.ones_like(length))


def _tolerance(tolerance, iteration, dtype):
    return tf.cast(tolerance(iteration) if callable(tolerance) else tolerance, dtype)


def _check_steps_and_tolerance(settings):
    checks.positive_integer("max_steps", settings.max_steps)
    tolerance = settings.tolerance
    if not callable(tolerance) and not (checks.is_number(tolerance) and tolerance >= 0):
        raise ValueError("tolerance must be a non-negative number or a callable hyper-iteration -> number. "
                         f"Received: {tolerance!r}")

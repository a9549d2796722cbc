"""Solvers without iteration: from the whole matrix, and from some of its columns."""

import dataclasses
from typing import Any

import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Matvec, Tensor
from farhox.linear_solvers.base import (
    LinearSolution,
    LinearSolver,
    as_operator,
    not_a_number,
    relative,
    setting_name,
)


@dataclasses.dataclass(frozen=True)
class Direct(LinearSolver):
    """Builds A from n products and solves by QR decomposition: exact, for up to a few thousand inner variables.

    The solution is not a number and `failed` is set where A is singular or not finite.

    Args:
        max_dimension: Positive int; larger systems are an error, since A would need n^2 numbers.

    Raises:
        ValueError: If `max_dimension` is out of range, or the system is larger.
    """

    max_dimension: int = 5000

    def __post_init__(self):
        checks.positive_integer(setting_name(self, "max_dimension"), self.max_dimension)

    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        dimension = rhs.shape[0]
        if dimension > self.max_dimension:
            raise ValueError(f"Direct builds an n x n matrix and takes at most n={self.max_dimension} (max_dimension). "
                             f"Received: n={dimension}. Use ConjugateGradient or Nystrom.")
        # Row i is (A e_i)': the matrix comes out transposed.
        rows = _products_with_unit_vectors(matvec, tf.range(dimension), dimension, rhs.dtype)
        vector = _solve_square(tf.transpose(rows), rhs)
        residual = relative(rhs - matvec(vector), rhs)
        return LinearSolution(
            vector, residual, tf.constant(dimension + 1), tf.logical_not(tf.math.is_finite(residual)))


@dataclasses.dataclass(frozen=True)
class Nystrom(LinearSolver):
    """Solves (A' + rho I) x = b where A' is the Nyström approximation of A from `rank` of its columns and rows.

    With C the sampled columns, R the rows of the same indices, W where they cross and C = QS: A' = Q (S W^+ R). Takes
    `rank` products with A whatever the conditioning (and as many with its transpose, where it is not symmetric), and
    no iteration.

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

    uses_transposed = True

    def __post_init__(self):
        checks.positive_integer(setting_name(self, "rank"), self.rank)
        checks.positive_number(setting_name(self, "rho"), self.rho)
        checks.integer(setting_name(self, "seed"), self.seed)

    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        operator = as_operator(matvec)
        dimension = rhs.shape[0]
        rank = min(self.rank, dimension)
        order = tf.argsort(tf.random.stateless_uniform([dimension], [self.seed, 0]))[:rank]
        rho = tf.constant(self.rho, rhs.dtype)
        columns = tf.transpose(_products_with_unit_vectors(operator, order, dimension, rhs.dtype))
        rows = tf.transpose(columns) if operator.symmetric else _products_with_unit_vectors(
            operator.transposed, order, dimension, rhs.dtype)
        q, s = tf.linalg.qr(columns)
        factor = s @ tf.linalg.pinv(tf.gather(columns, order))
        inside = tf.linalg.matvec(q, rhs, transpose_a=True)
        outside = rhs - tf.linalg.matvec(q, inside)
        # A second projection: what rounding left inside the columns' space must not be divided by a small rho.
        outside -= tf.linalg.matvec(q, tf.linalg.matvec(q, outside, transpose_a=True))
        outside /= rho
        if operator.symmetric:
            # The rows are the columns: they take nothing from outside of their space.
            core = factor @ tf.transpose(s)
        else:
            core = factor @ rows @ q
            inside -= tf.linalg.matvec(factor, tf.linalg.matvec(rows, outside))
        solved = _solve_square(core + rho * tf.eye(rank, dtype=rhs.dtype), inside)
        vector = tf.linalg.matvec(q, solved) + outside
        residual = relative(rhs - operator(vector), rhs)
        steps = rank + 1 if operator.symmetric else 2 * rank + 1
        return LinearSolution(vector, residual, tf.constant(steps), tf.logical_not(tf.math.is_finite(residual)))


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
    return tf.where(regular, solution, not_a_number(solution))

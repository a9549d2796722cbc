"""What all linear solvers share: the interface, the solution, the operator, tolerances that tighten."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Carry, DType, Matvec, Tensor


class LinearSolution(NamedTuple):
    """What a solver found.

    Attributes:
        vector: Tensor [n], x.
        residual: Scalar, ||b - A x|| / ||b|| (0 for b = 0).
        steps: Scalar int32 tensor, products with A that were taken, those for the residual of a start included.
        failed: Scalar bool tensor: the iteration diverged or met a direction of negative curvature, or the solution is
            not finite. The vector is what was reached by then.
        memory: Nest of tensors, what the solver can use for the next system; see `LinearSolver.initial_memory`.
    """

    vector: Tensor
    residual: Tensor
    steps: Tensor
    failed: Tensor
    memory: Carry = ()


class LinearOperator:
    """A square matrix given by its products with vectors; calling it is the product.

    Solvers take any callable. One that is not symmetric must come as a `LinearOperator` with its transpose, for
    those solvers that need it.

    Args:
        product: Callable, tensor [n] to tensor [n], A v.
        transposed: The same for A'v, or None where A is symmetric.
    """

    def __init__(self, product: Matvec, transposed: Matvec | None = None) -> None:
        self._product = product
        self.symmetric = transposed is None
        self.transposed = product if transposed is None else transposed

    def __call__(self, vector: Tensor) -> Tensor:
        return self._product(vector)


class LinearSolver(abc.ABC):
    """Settings of a solver of A x = b.

    Attributes:
        uses_transposed: Whether `solve` takes products with A', which for a symmetric A are those with A.
    """

    uses_transposed = False

    @abc.abstractmethod
    def solve(self, matvec: Matvec, rhs: Tensor, initial: Tensor | None = None, iteration: Any = 0,
              memory: Any = ()) -> LinearSolution:
        """Solves A x = b.

        Args:
            matvec: Callable, tensor [n] to tensor [n], the product with A; a `LinearOperator` if A is not symmetric.
            rhs: Tensor [n], b.
            initial: Tensor [n] to start from; default: zero. A start with a larger residual than zero is not used.
            iteration: Scalar integer tensor, the hyper-iteration, for settings that are schedules.
            memory: The memory of the solution before, or nothing.

        Returns:
            A `LinearSolution`.
        """

    def initial_memory(self, like: Tensor) -> Any:
        """What `solve` returns as memory, before the first system: a nest of tensors, empty for most solvers.

        Args:
            like: Tensor [n], of the shape and type of b.
        """
        del like
        return ()


def as_operator(matvec: Matvec) -> LinearOperator:
    """A callable as a `LinearOperator`; a bare one is symmetric."""
    return matvec if isinstance(matvec, LinearOperator) else LinearOperator(matvec)


def start(matvec: Matvec, rhs: Tensor, initial: Tensor) -> Any:
    """The start, its residual and the products that it cost: none for zero, which is taken where it is better."""
    if initial is None:
        return tf.zeros_like(rhs), rhs, 0
    residual = rhs - matvec(initial)
    # Where the comparison is with a number that is none, the start is not used either.
    better = tf.norm(residual) <= tf.norm(rhs)
    return tf.where(better, initial, tf.zeros_like(rhs)), tf.where(better, residual, rhs), 1


def normalised(vector: Tensor) -> Tensor:
    """The vector at length one; zero stays zero."""
    length = tf.norm(vector)
    return vector / tf.where(length > 0, length, tf.ones_like(length))


def relative(residual: Tensor, rhs: Tensor) -> Tensor:
    """||residual|| / ||b||, and ||residual|| for b = 0."""
    length = tf.norm(rhs)
    return tf.norm(residual) / tf.where(length > 0, length, tf.ones_like(length))


def not_a_number(like: Tensor) -> Tensor:
    """A tensor like another one, of which no entry is a number."""
    return tf.fill(tf.shape(like), tf.constant(float("nan"), like.dtype))


def value_at(setting: Any, iteration: Any, dtype: DType) -> Tensor:
    """The value of a setting, a number or a callable of the hyper-iteration, as a tensor."""
    value = setting(iteration) if callable(setting) else setting
    # A number of Python must not be rounded to float32 on its way to another type.
    return tf.constant(value, dtype) if checks.is_number(value) else tf.cast(value, dtype)


def setting_name(settings: Any, name: str) -> str:
    """A setting as errors name it."""
    return f"{type(settings).__name__}: {name}"


def check_steps_and_tolerance(settings: Any) -> None:
    """The checks of the settings `max_steps` and `tolerance` of an iteration."""
    checks.positive_integer(setting_name(settings, "max_steps"), settings.max_steps)
    tolerance = settings.tolerance
    if not callable(tolerance) and not (checks.is_number(tolerance) and tolerance >= 0):
        raise ValueError(f"{setting_name(settings, 'tolerance')} must be a non-negative number or a callable "
                         f"hyper-iteration -> number. Received: {tolerance!r}")

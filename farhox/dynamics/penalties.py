"""Penalties without a gradient somewhere, by their proximal maps: what proximal dynamics apply after a gradient step.

The proximal map of a penalty P with step size t sends v to argmin_x 1/2 ||x - v||^2 + t P(x). It is piecewise smooth
for those here; on the border between two pieces the derivative is that of the piece where an entry is zero.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Tensor
from farhox.dynamics.settings import check_setting, setting_value
from farhox.outer.outer_variable import Setting


class Penalty(abc.ABC):
    """A convex penalty on one inner variable. Subclasses are frozen settings.

    Attributes:
        elementwise: Bool, whether entries do not act on each other, so that each may have a step size of its own.
    """

    elementwise = False

    @abc.abstractmethod
    def value(self, w: Tensor, step: Any = 0) -> Tensor:
        """P(w), a scalar tensor; `step` is the inner step."""

    @abc.abstractmethod
    def proximal(self, v: Tensor, step_size: Tensor, step: Any = 0) -> Tensor:
        """argmin_x 1/2 ||x - v||^2 + step_size P(x).

        Args:
            v: Tensor.
            step_size: Scalar tensor, or one that broadcasts to `v` if the penalty is elementwise.
            step: Scalar integer tensor, the inner step.

        Returns:
            Tensor like `v`.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class L1(Penalty):
    """P(w) = sum(strength |w|): entries of w become exactly zero (lasso). The proximal map is the soft threshold.

    Args:
        strength: A setting, or an array; not negative. A scalar, or one that broadcasts to w.

    Raises:
        TypeError: If the strength is no setting.
        ValueError: If it is negative or not finite, or, when used, does not broadcast to w.
    """

    strength: Setting

    elementwise = True

    def __post_init__(self):
        _check_strength(self.strength)

    def value(self, w: Tensor, step: Any = 0) -> Tensor:
        return tf.reduce_sum(_strength_of(self.strength, step, w.dtype, w.shape) * tf.abs(w))

    def proximal(self, v: Tensor, step_size: Tensor, step: Any = 0) -> Tensor:
        threshold = step_size * _strength_of(self.strength, step, v.dtype, v.shape)
        # Without a threshold the map is the identity, at zero too.
        kept = tf.logical_or(tf.abs(v) > threshold, tf.equal(threshold, 0))
        return tf.where(kept, v - threshold * tf.sign(v), tf.zeros_like(v))


@dataclasses.dataclass(frozen=True, eq=False)
class GroupLasso(Penalty):
    """P(w) = sum over groups of strength ||w_group||: whole groups of entries become exactly zero (L2,1 norm).

    The proximal map shortens each group by the threshold: w_group max(0, 1 - step_size strength / ||w_group||).

    Args:
        strength: A setting, or an array; not negative. A scalar, or one per group with the axes of a group of size 1.
        axis: Int or tuple of ints, the axes that run through a group. Of a kernel [inputs, outputs], -1 makes a group
            of all that leaves an input, and 0 one of all that reaches an output.

    Raises:
        TypeError: If the strength is no setting or the axis no integer.
        ValueError: If the strength is negative or not finite, or, when used, does not broadcast to the groups.
    """

    strength: Setting
    axis: int | Sequence[int] = -1

    def __post_init__(self):
        _check_strength(self.strength)
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if not axes or any(isinstance(axis, bool) or not isinstance(axis, (int, np.integer)) for axis in axes):
            raise TypeError(f"axis must be an integer or a tuple of integers. Received: {self.axis!r}")

    def value(self, w: Tensor, step: Any = 0) -> Tensor:
        lengths = self._lengths(w)
        return tf.reduce_sum(_strength_of(self.strength, step, w.dtype, lengths.shape) * lengths)

    def proximal(self, v: Tensor, step_size: Tensor, step: Any = 0) -> Tensor:
        lengths = self._lengths(v)
        threshold = step_size * _strength_of(self.strength, step, v.dtype, lengths.shape)
        kept = tf.logical_or(lengths > threshold, tf.equal(threshold, 0))
        divisors = tf.where(lengths > 0, lengths, tf.ones_like(lengths))
        return tf.where(kept, v * (1 - threshold / divisors), tf.zeros_like(v))

    def _lengths(self, w):
        squares = tf.reduce_sum(tf.square(w), self.axis, keepdims=True)
        positive = squares > 0
        return tf.where(positive, tf.sqrt(tf.where(positive, squares, tf.ones_like(squares))), tf.zeros_like(squares))


@dataclasses.dataclass(frozen=True, eq=False)
class NuclearNorm(Penalty):
    """P(w) = strength times the sum of the singular values of a matrix w: its rank becomes small.

    The proximal map is the soft threshold of the singular values. Its derivative is written in divided differences of
    the threshold, which exist where singular values are equal or zero; that of the decomposition alone does not.

    Args:
        strength: A scalar setting, not negative.

    Raises:
        TypeError: If the strength is no setting.
        ValueError: If it is negative or not finite, or, when used, not a scalar, or w not a matrix.

    Reference:
        [Lewis and Sendov, 2001](https://doi.org/10.1137/S089547980036838X) (derivatives of functions of eigenvalues).
    """

    strength: Setting

    def __post_init__(self):
        _check_strength(self.strength)

    def value(self, w: Tensor, step: Any = 0) -> Tensor:
        return _strength_of(self.strength, step, w.dtype, ()) * tf.reduce_sum(tf.linalg.svd(w, compute_uv=False))

    def proximal(self, v: Tensor, step_size: Tensor, step: Any = 0) -> Tensor:
        if v.shape.rank != 2:
            raise ValueError(f"The nuclear norm is that of a matrix. Received a variable of shape {tuple(v.shape)}")
        return _shrunk_singular_values(v, step_size * _strength_of(self.strength, step, v.dtype, ()))


@dataclasses.dataclass(frozen=True, eq=False)
class Projection(Penalty):
    """P is 0 on a convex set and infinite elsewhere; the proximal map is the Euclidean projection on the set.

    Args:
        constraint: A Keras constraint that projects: `Simplex`, `CappedSimplex` or `Box` of
            `farhox.constraints`, `keras.constraints.NonNeg`.

    Raises:
        TypeError: If it is no Keras constraint.
    """

    constraint: keras.constraints.Constraint

    elementwise = True  # A step size does not matter.

    def __post_init__(self):
        if not isinstance(self.constraint, keras.constraints.Constraint):
            raise TypeError("constraint must be a keras.constraints.Constraint that projects, for example "
                            f"farhox.constraints.Simplex(). Received: {self.constraint!r}")

    def value(self, w: Tensor, step: Any = 0) -> Tensor:
        return tf.zeros([], w.dtype)

    def proximal(self, v: Tensor, step_size: Tensor, step: Any = 0) -> Tensor:
        return tf.convert_to_tensor(self.constraint(v))


def _check_strength(strength):
    if isinstance(strength, (np.ndarray, list, tuple)):
        values = np.asarray(strength)
        if values.dtype.kind not in "iuf":
            raise TypeError(f"strength must be a setting or an array of numbers. Received: {strength!r}")
        if not np.all(np.isfinite(values)) or np.any(values < 0):
            raise ValueError(f"strength must be finite and at least 0.0. Received: strength={strength!r}")
    else:
        check_setting("strength", strength, low=0.0)


def _strength_of(strength, step, dtype, shape):
    if isinstance(strength, (np.ndarray, list, tuple)):
        value = tf.constant(np.asarray(strength, "float64"), dtype)
    else:
        value = setting_value(strength, step, dtype)
    given, target = tuple(value.shape), tuple(shape)
    if len(given) > len(target) or any(
            size not in (1, entries) for size, entries in zip(reversed(given), reversed(target))):
        raise ValueError(f"strength must broadcast to the shape {target}. Received shape: {given}")
    return value


def _shrunk_singular_values(w, threshold):
    """U max(S - threshold, 0) V' of w = U S V'."""
    @tf.custom_gradient
    def shrink(w, threshold):
        s, u, v = tf.linalg.svd(w)
        shrunk = tf.nn.relu(s - threshold)
        everything = tf.equal(threshold, 0)  # Without a threshold the map is the identity, at zero too.
        above = tf.logical_or(s > threshold, everything)
        kept = tf.cast(above, w.dtype)

        def slopes(numerators, denominators, otherwise):
            zero = tf.equal(denominators, 0)
            return tf.where(zero, otherwise, numerators / tf.where(zero, tf.ones_like(denominators), denominators))

        def gradient(cotangent):
            # The derivative of a proximal map is symmetric: the transposed product is the product.
            inside = tf.matmul(u, tf.matmul(cotangent, v), transpose_a=True)
            symmetric, skew = (inside + tf.transpose(inside)) / 2, (inside - tf.transpose(inside)) / 2
            # Divided differences: 1 or 0 on one side of the threshold, whatever rounding makes of equal values.
            differences = tf.where(tf.equal(above[:, None], above), tf.minimum(kept[:, None], kept),
                                   slopes(shrunk[:, None] - shrunk, s[:, None] - s, tf.zeros_like(kept)))
            at_zero = tf.cast(everything, w.dtype)
            sums = slopes(shrunk[:, None] + shrunk, s[:, None] + s, at_zero)
            product = tf.matmul(u, tf.matmul(differences * symmetric + sums * skew, v, transpose_b=True))
            ratios = slopes(shrunk, s, at_zero)
            if w.shape[0] != w.shape[1]:  # What leaves the space of the singular vectors.
                after = tf.matmul(cotangent, v)
                before = tf.matmul(u, cotangent, transpose_a=True)
                product += tf.matmul((after - tf.matmul(u, inside)) * ratios, v, transpose_b=True)
                product += tf.matmul(u, ratios[:, None] * (before - tf.matmul(inside, v, transpose_b=True)))
            return product, -tf.reduce_sum(kept * tf.linalg.diag_part(inside))

        return tf.matmul(u * shrunk, v, transpose_b=True), gradient

    return shrink(w, threshold)

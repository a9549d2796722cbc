"""Arithmetic on nests of tensors: lists, tuples and dictionaries as one vector.

Every function takes nests of the same structure and works leaf by leaf. Only the module's functions know how a nest is
walked; callers speak of vectors.
"""

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from farhox._core.types import DType, Nest, Tensor, Tensors

# Entries of a tensor that are copied sooner than looked at by an operation of their own.
_SMALL = 4096


def map(function: Callable[..., Any], *nests: Nest) -> Nest:
    """Applies `function` to the corresponding leaves of `nests`."""
    return tf.nest.map_structure(function, *nests)


def lists_to_tuples(nest: Nest) -> Nest:
    """The nest with tuples for lists, which `tf.data` would pack into one tensor each."""
    if isinstance(nest, dict):
        return type(nest)((key, lists_to_tuples(entry)) for key, entry in nest.items())
    if isinstance(nest, tuple) and type(nest) is not tuple:  # A named tuple.
        return type(nest)(*(lists_to_tuples(entry) for entry in nest))
    return tuple(lists_to_tuples(entry) for entry in nest) if isinstance(nest, (list, tuple)) else nest


def zeros_like(nest: Nest) -> Nest:
    """The zero vector of the same structure."""
    return map(tf.zeros_like, nest)


def add(first: Nest, second: Nest) -> Nest:
    """first + second."""
    return map(tf.add, first, second)


def subtract(first: Nest, second: Nest) -> Nest:
    """first - second."""
    return map(tf.subtract, first, second)


def dot(first: Nest, second: Nest) -> Tensor:
    """Inner product over all leaves, a scalar of the widest leaf type (float32 for an empty nest)."""
    return _total([tf.reduce_sum(a * b) for a, b in zip(tf.nest.flatten(first), tf.nest.flatten(second))])


def norm(nest: Nest) -> Tensor:
    """Euclidean norm over all leaves, with derivative zero at zero."""
    halves = [tf.nn.l2_loss(leaf) for leaf in tf.nest.flatten(nest)]  # One operation each, unlike `dot`.
    square = 2.0 * _total(halves)
    zero = tf.equal(square, 0)
    return tf.where(zero, tf.zeros_like(square), tf.sqrt(tf.where(zero, tf.ones_like(square), square)))


def _total(scalars):
    """The sum of a list of scalars, of their widest type (float32 for an empty list)."""
    if not scalars:
        return tf.constant(0.0)
    dtype = max((scalar.dtype for scalar in scalars), key=lambda dtype: dtype.size)
    return tf.add_n([tf.cast(scalar, dtype) for scalar in scalars])


def is_finite(nest: Nest) -> Tensor:
    """Scalar bool tensor: no entry of a floating-point leaf is infinite or not a number."""
    leaves = [leaf for leaf in tf.nest.flatten(nest) if leaf.dtype.is_floating]
    if not leaves:
        return tf.constant(True)
    checks = [tf.reduce_all(tf.math.is_finite(vector)) for vector in joined(leaves)]
    return checks[0] if len(checks) == 1 else tf.reduce_all(checks)


def joined(leaves: Iterable[Tensor]) -> Tensors:
    """The entries of tensors in fewer of them, for what is asked of all entries: small ones of a type become one."""
    alone, by_type = [], {}
    for leaf in leaves:
        size = leaf.shape.num_elements()
        if size is None or size > _SMALL:
            alone.append(leaf)
        else:
            by_type.setdefault(leaf.dtype, []).append(leaf)
    return alone + [_joined(group) for group in by_type.values()]


def _joined(leaves):
    scalars = [leaf for leaf in leaves if leaf.shape.rank == 0]
    vectors = [leaf if leaf.shape.rank == 1 else tf.reshape(leaf, [-1]) for leaf in leaves if leaf.shape.rank != 0]
    vectors += [tf.stack(scalars)] if scalars else []
    return vectors[0] if len(vectors) == 1 else tf.concat(vectors, axis=0)


def select(condition: Tensor, first: Nest, second: Nest) -> Nest:
    """`first` where the scalar `condition` holds, else `second`."""
    return map(lambda a, b: tf.where(condition, a, b), first, second)


def ravel(nest: Nest, dtype: DType | None = None) -> Tensor:
    """One flat vector, leaf after leaf in the order of `tf.nest.flatten`."""
    leaves = tf.nest.flatten(nest)
    dtype = dtype or max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.size)
    return tf.concat([tf.cast(tf.reshape(leaf, [-1]), dtype) for leaf in leaves], axis=0)


def unravel(vector: Tensor, like: Nest) -> Nest:
    """The inverse of `ravel` for the structure, shapes and types of `like`."""
    leaves = tf.nest.flatten(like)
    sizes = [tf.size(leaf) if leaf.shape.num_elements() is None else leaf.shape.num_elements() for leaf in leaves]
    pieces = tf.split(vector, sizes)
    shapes = [leaf.shape if leaf.shape.is_fully_defined() else tf.shape(leaf) for leaf in leaves]
    shaped = [tf.cast(tf.reshape(piece, shape), leaf.dtype) for piece, shape, leaf in zip(pieces, shapes, leaves)]
    return tf.nest.pack_sequence_as(like, shaped)


def not_less(first: Tensor, second: Tensor) -> Tensor:
    """Whether first < second does not hold, also where one of them is not a number.

    TensorFlow's graph optimizer turns `logical_not(a < b)` into `a >= b`, which does not hold there either.
    """
    return tf.logical_or(first >= second, tf.logical_or(tf.math.is_nan(first), tf.math.is_nan(second)))

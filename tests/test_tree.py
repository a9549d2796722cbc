"""Nests of tensors as one vector."""

import numpy as np
import pytest
import tensorflow as tf

from farhox._core import tree

FIRST = {"a": np.array([[1.0, -2.0], [0.5, 3.0]]), "b": (np.array(2.0), [np.array([4.0])])}
SECOND = {"a": np.array([[0.5, 1.0], [-1.0, 2.0]]), "b": (np.array(-3.0), [np.array([0.25])])}


def nest(values):
    return tf.nest.map_structure(tf.constant, values)


def flat(values):
    return np.concatenate([np.ravel(leaf) for leaf in tf.nest.flatten(values)])


def test_arithmetic_on_nests_is_that_of_their_flat_vectors():
    first, second = nest(FIRST), nest(SECOND)
    np.testing.assert_array_equal(flat(tree.add(first, second)), flat(FIRST) + flat(SECOND))
    np.testing.assert_array_equal(flat(tree.subtract(first, second)), flat(FIRST) - flat(SECOND))
    np.testing.assert_array_equal(flat(tree.zeros_like(first)), np.zeros(6))
    np.testing.assert_allclose(tree.dot(first, second), flat(FIRST) @ flat(SECOND), rtol=1e-15)
    np.testing.assert_allclose(tree.norm(first), np.linalg.norm(flat(FIRST)), rtol=1e-15)
    tf.nest.assert_same_structure(tree.add(first, second), first)


def test_select_takes_the_whole_nest_by_a_scalar_condition():
    first, second = nest(FIRST), nest(SECOND)
    np.testing.assert_array_equal(flat(tree.select(tf.constant(True), first, second)), flat(FIRST))
    np.testing.assert_array_equal(flat(tree.select(tf.constant(False), first, second)), flat(SECOND))


def test_dot_and_ravel_take_the_widest_type():
    mixed = [tf.constant([1.0], tf.float32), tf.constant([1e-12], tf.float64)]
    assert tree.dot(mixed, mixed).dtype == tf.float64
    assert tree.ravel(mixed).dtype == tf.float64
    assert tree.ravel(mixed, tf.float32).dtype == tf.float32
    assert tree.dot([], []).numpy() == 0.0


def test_norm_has_the_derivative_zero_at_zero():
    point = tf.zeros([3], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = tree.norm([point])
    np.testing.assert_array_equal(tape.gradient(value, point), np.zeros(3))


def test_norm_has_the_derivative_of_the_euclidean_norm_elsewhere():
    point = tf.constant([3.0, -4.0], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = tree.norm([point])
    np.testing.assert_allclose(tape.gradient(value, point), [0.6, -0.8], rtol=1e-15)


@pytest.mark.parametrize("entry, finite", [(1.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)])
def test_one_entry_that_is_not_finite_makes_the_nest_not_finite(entry, finite):
    assert bool(tree.is_finite({"a": tf.constant([1.0, entry]), "seed": tf.constant([1, 2])})) is finite


@pytest.mark.parametrize("bad", [None, 0, 1, 2, 3, 4, 5])
def test_many_tensors_are_finite_if_each_is(bad):
    leaves = [np.ones([], "float32"), np.ones([], "float32"), np.ones([3], "float32"), np.ones([2, 2], "float64"),
              np.ones([5000], "float32"), np.ones([0], "float32"), np.ones([2, 3], "float32")]
    if bad is not None:
        leaf = leaves[bad if bad < 5 else 6]
        leaf[(-1,) * leaf.ndim] = np.inf
    assert bool(tree.is_finite([tf.constant(leaf) for leaf in leaves])) is (bad is None)
    shapes = [tf.TensorSpec(None if index == 2 else leaf.shape, leaf.dtype) for index, leaf in enumerate(leaves)]
    assert bool(tf.function(lambda *leaves: tree.is_finite(list(leaves)), input_signature=shapes)(*leaves)) is (
        bad is None)


def test_integers_are_finite():
    assert bool(tree.is_finite([tf.constant([1, 2])]))


def test_unravel_undoes_ravel_with_shapes_and_types():
    like = {"a": tf.constant([[1.0, 2.0]], tf.float32), "b": [tf.constant(3.0, tf.float64), tf.zeros([0, 2])]}
    back = tree.unravel(tree.ravel(like), like)
    tf.nest.map_structure(np.testing.assert_array_equal, back, like)
    assert [leaf.dtype for leaf in tf.nest.flatten(back)] == [leaf.dtype for leaf in tf.nest.flatten(like)]


def test_unravel_works_with_shapes_that_are_unknown_while_tracing():
    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float64)])
    def there_and_back(x):
        return tree.unravel(tree.ravel([x, 2.0 * x]), [x, x])

    back = there_and_back(np.ones([3, 2]))
    np.testing.assert_array_equal(back[1], 2.0 * np.ones([3, 2]))


@pytest.mark.optimized
def test_what_is_not_a_number_is_not_less_in_any_mode():
    nan, one, two = (tf.constant(value) for value in (float("nan"), 1.0, 2.0))
    pairs = [(nan, one), (one, nan), (one, one), (two, one), (one, two)]
    for options in ({}, {"jit_compile": True}):
        graph = tf.function(lambda: [tree.not_less(a, b) for a, b in pairs], autograph=False, **options)
        assert [bool(value) for value in graph()] == [True, True, True, True, False]


@pytest.mark.optimized
def test_graphs_of_tensorflow_turn_a_negated_comparison_around():
    """Once this fails TensorFlow is right, and `tree.not_less` can go."""
    compare = tf.function(lambda x: tf.logical_not(x < 1.0), autograph=False)
    assert not compare(tf.constant(float("nan"))) and bool(tf.logical_not(tf.constant(float("nan")) < 1.0))

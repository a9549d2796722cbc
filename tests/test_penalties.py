"""Proximal maps: nearest points, closed forms, and derivatives also where singular values are equal or zero."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.constraints import Box, CappedSimplex, Simplex
from farhox.dynamics import L1, GroupLasso, NuclearNorm, Projection

RANDOM = np.random.default_rng(0)
STEP_SIZE = 0.8
ORTHOGONAL = np.linalg.qr(RANDOM.normal(size=(4, 4)))[0]
CASES = {
    "L1": (L1(0.7), RANDOM.normal(size=(4, 3))),
    "L1 with a strength per row": (L1(np.array([[0.1], [0.5], [0.0], [2.0]])), RANDOM.normal(size=(4, 3))),
    "groups of rows": (GroupLasso(0.9), RANDOM.normal(size=(4, 3)) * [[1.0], [0.1], [2.0], [0.0]]),
    "groups of columns": (GroupLasso(0.9, axis=0), RANDOM.normal(size=(4, 3))),
    "groups of a convolution": (GroupLasso(0.9, axis=(0, 1, 2)), RANDOM.normal(size=(2, 2, 2, 3)) * [0.1, 1.0, 2.0]),
    "tall matrix": (NuclearNorm(0.9), RANDOM.normal(size=(4, 3))),
    "wide matrix": (NuclearNorm(0.9), RANDOM.normal(size=(3, 5))),
    "square matrix": (NuclearNorm(0.9), RANDOM.normal(size=(3, 3))),
    "equal and zero singular values": (NuclearNorm(0.9), np.diag([2.0, 2.0, 1.5, 0.1, 0.0])[:, :4]),
    "singular values equal up to rounding": (NuclearNorm(0.9), 2 * ORTHOGONAL),
    "the zero matrix": (NuclearNorm(0.9), np.zeros((3, 2))),
    "no nuclear norm": (NuclearNorm(0.0), np.diag([2.0, 2.0, 0.0])),
    "simplex": (Projection(Simplex()), RANDOM.normal(size=6)),
    "at most the simplex": (Projection(Simplex(3.0, at_most=True)), RANDOM.normal(size=6)),
    "budget": (Projection(CappedSimplex(2.0)), RANDOM.normal(size=6)),
    "box": (Projection(Box(-0.5, 0.5)), RANDOM.normal(size=6)),
}


def differences(function, value, step=1e-6):
    """The Jacobian [outputs, entries] by central differences."""
    value, columns = np.array(value), []
    for entry in range(value.size):
        moved = np.zeros(value.size)
        moved[entry] = step
        moved = moved.reshape(value.shape)
        columns.append((function(value + moved) - function(value - moved)).ravel() / (2 * step))
    return np.stack(columns, -1)


def jacobian(function, value):
    value = tf.constant(value)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(value)
        outputs = tf.unstack(tf.reshape(function(value), [-1]))
    return np.stack([tf.reshape(tape.gradient(output, value), [-1]) for output in outputs])


@pytest.mark.one_case
@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_proximal_maps_are_those_of_differences_and_symmetric(case):
    penalty, v = CASES[case]
    actual = jacobian(lambda v: penalty.proximal(v, tf.constant(STEP_SIZE, v.dtype)), v)
    expected = differences(lambda v: penalty.proximal(tf.constant(v), tf.constant(STEP_SIZE, tf.float64)).numpy(), v)
    np.testing.assert_allclose(actual, expected, atol=1e-7)
    np.testing.assert_allclose(actual, actual.T, atol=1e-14)
    if not isinstance(penalty, Projection):
        actual = jacobian(lambda size: penalty.proximal(tf.constant(v), size), np.array(STEP_SIZE))
        expected = differences(lambda size: penalty.proximal(tf.constant(v), tf.constant(size)).numpy(), STEP_SIZE)
        np.testing.assert_allclose(actual, expected, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_no_point_near_the_proximal_one_has_a_lower_value(case):
    penalty, v = CASES[case]
    nearest = penalty.proximal(tf.constant(v), tf.constant(STEP_SIZE, tf.float64))

    def value(x):
        return 0.5 * np.sum((x - v) ** 2) + STEP_SIZE * float(penalty.value(tf.constant(x)))

    best = value(nearest.numpy())
    for size in (1e-3, 0.1, 1.0):
        for _ in range(4):
            other = nearest + size * RANDOM.normal(size=v.shape)
            if isinstance(penalty, Projection):
                other = tf.convert_to_tensor(penalty.constraint(other))
            assert value(other.numpy()) >= best - 1e-12


@pytest.mark.parametrize("penalty, v, expected", [
    (L1(0.5), [3.0, -1.0, 0.5, 0.2], [2.5, -0.5, 0.0, 0.0]),
    (GroupLasso(1.0), [[3.0, 4.0], [0.3, 0.4]], [[2.4, 3.2], [0.0, 0.0]]),
    (NuclearNorm(1.0), [[3.0, 0.0], [0.0, 0.5]], [[2.0, 0.0], [0.0, 0.0]]),
    (Projection(Simplex()), [1.0, 0.5, -1.0], [0.75, 0.25, 0.0])])
def test_closed_forms_and_values(penalty, v, expected):
    result = penalty.proximal(tf.constant(v, tf.float64), tf.constant(1.0, tf.float64))
    np.testing.assert_allclose(result, expected, atol=1e-15)
    assert np.all((result.numpy() == 0.0) == (np.array(expected) == 0.0))
    value = penalty.value(tf.constant([[3.0, 0.0], [0.0, -4.0]], tf.float64))
    expected_value = {L1: 3.5, GroupLasso: 7.0, NuclearNorm: 7.0, Projection: 0.0}[type(penalty)]
    np.testing.assert_allclose(value, expected_value, rtol=1e-14)


def test_a_strength_that_is_zero_changes_nothing_and_has_the_derivative_of_the_identity_at_zero():
    for penalty in (L1(0.0), GroupLasso(0.0)):
        v = np.array([[0.0, -1.0]])
        np.testing.assert_array_equal(jacobian(lambda v: penalty.proximal(v, tf.constant(1.0, v.dtype)), v), np.eye(2))


@pytest.mark.parametrize("make, error, words", [
    (lambda: L1("strong"), TypeError, "strength must be a float"),
    (lambda: L1(["a"]), TypeError, "an array of numbers"),
    (lambda: L1(-0.1), ValueError, "strength must be finite and at least 0.0"),
    (lambda: L1(np.array([0.1, -0.1])), ValueError, "strength must be finite and at least 0.0"),
    (lambda: L1(float("nan")), ValueError, "finite"),
    (lambda: L1(farhox.Hyperparameter(-0.1)), ValueError, "at least 0.0"),
    (lambda: L1([0.1, 0.2]).proximal(tf.zeros([3]), 1.0), ValueError, r"broadcast to the shape \(3,\)"),
    (lambda: GroupLasso(0.1, axis=0.5), TypeError, "axis must be an integer"),
    (lambda: GroupLasso(0.1, axis=()), TypeError, "axis must be an integer"),
    (lambda: GroupLasso(np.ones([4])).proximal(tf.zeros([2, 3]), 1.0), ValueError, r"shape \(2, 1\)"),
    (lambda: NuclearNorm(0.1).proximal(tf.zeros([3]), 1.0), ValueError, "that of a matrix"),
    (lambda: NuclearNorm([0.1, 0.2]).proximal(tf.zeros([3, 2]), 1.0), ValueError, r"shape \(\)"),
    (lambda: Projection(farhox.L1L2()), TypeError, "must be a keras.constraints.Constraint"),
    (lambda: Projection(keras.constraints.NonNeg), TypeError, "must be a keras.constraints.Constraint"),
])
def test_penalties_refuse_what_they_cannot_use(make, error, words):
    with pytest.raises(error, match=words):
        make()

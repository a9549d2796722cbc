"""Projections against a bisection and a quadratic program, and the constraints as citizens of Keras."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

from farhox.constraints import Box, CappedSimplex, Simplex

CONSTRAINTS = [
    Box(low=-0.5, high=0.25), Box(low=0.0), Box(high=1.0),
    Simplex(), Simplex(2.5), Simplex(1.0, at_most=True), CappedSimplex(1.5),
]
entries = hypothesis.extra.numpy.arrays(
    np.float64, st.integers(1, 40), elements=st.one_of(
        st.floats(-3.0, 3.0, allow_subnormal=False), st.sampled_from([-1.0, 0.0, 0.5, 1.0])))
totals = st.floats(1e-3, 60.0, allow_subnormal=False)


def projected_by_bisection(values, total, cap, exact_sum):
    """Clip(values - shift, 0, cap) with the shift found by halving an interval until it has no inner float."""
    def clipped(shift):
        return np.clip(values - shift, 0.0, cap)

    if not exact_sum and clipped(0.0).sum() <= total:
        return clipped(0.0)
    low, high = values.min() - total - 1.0, values.max()
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return clipped(middle)
        low, high = (middle, high) if clipped(middle).sum() > total else (low, middle)


def projected_by_quadratic_program(values, total, cap, exact_sum):
    """argmin ||w - values||^2 over the set, by a general-purpose solver that knows nothing of projections."""
    slack = {"type": "eq" if exact_sum else "ineq", "fun": lambda w: total - w.sum(), "jac": lambda w: -np.ones(w.size)}
    start = np.clip(values, 0.0, cap)
    start = start * min(1.0, total / start.sum()) if start.sum() > 0 else start
    result = scipy.optimize.minimize(
        lambda w: 0.5 * np.sum((w - values) ** 2), start, jac=lambda w: w - values, method="SLSQP",
        bounds=[(0.0, None if np.isinf(cap) else cap)] * values.size, constraints=[slack],
        options={"ftol": 1e-16, "maxiter": 1000})
    return result.x


def kind_of(name, total):
    return {
        "capped": (lambda: CappedSimplex(total), 1.0, False),
        "simplex": (lambda: Simplex(total), np.inf, True),
        "at_most": (lambda: Simplex(total, at_most=True), np.inf, False),
    }[name]


@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["capped", "simplex", "at_most"])
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(values=entries, total=totals)
def test_projection_equals_bisection_on_random_cases(kind, values, total):
    constraint, cap, exact_sum = kind_of(kind, total)
    np.testing.assert_allclose(
        constraint()(values).numpy(), projected_by_bisection(values, total, cap, exact_sum), rtol=0, atol=1e-8)


@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["capped", "simplex", "at_most"])
def test_projection_equals_a_quadratic_program(kind):
    generator = np.random.default_rng(0)
    for _ in range(40):
        values = generator.normal(scale=1.5, size=generator.integers(2, 9))
        constraint, cap, exact_sum = kind_of(kind, float(generator.uniform(0.2, 3.0)))
        expected = projected_by_quadratic_program(values, getattr(
            constraint(), "budget" if kind == "capped" else "total"), cap, exact_sum)
        np.testing.assert_allclose(constraint()(values).numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("constraint", [
    Simplex(1.0, at_most=True), Simplex(1.0), CappedSimplex(1.0)],
    ids=["at_most", "equal", "capped"])
def test_projection_of_the_simplex_oracle(constraint):
    # Every entry of the answer is below 1, so the cap of the capped simplex does not bind, and its sum is 1.
    projected = constraint(np.array([0.9, 0.5, 0.3, -0.2])).numpy()
    np.testing.assert_allclose(projected, [2 / 3, 4 / 15, 1 / 15, 0.0], rtol=1e-15, atol=1e-16)
    assert projected[3] == 0.0


def test_simplex_with_at_most_keeps_a_small_sum_that_the_equality_raises():
    small = np.array([0.1, 0.2, -1.0])
    np.testing.assert_array_equal(Simplex(1.0, at_most=True)(small).numpy(), [0.1, 0.2, 0.0])
    np.testing.assert_allclose(Simplex(1.0)(small).numpy(), [0.45, 0.55, 0.0], rtol=1e-15)


def test_capped_simplex_caps_where_the_simplex_does_not():
    values = np.array([3.0, 0.2])
    np.testing.assert_allclose(CappedSimplex(1.2)(values).numpy(), [1.0, 0.2], rtol=1e-15)
    np.testing.assert_allclose(Simplex(1.2, at_most=True)(values).numpy(), [1.2, 0.0], rtol=1e-15)


def test_box_clips_at_the_bounds_that_it_has():
    values = np.array([-2.0, 0.1, 2.0])
    np.testing.assert_array_equal(Box(-0.3, 0.7)(values).numpy(), [-0.3, 0.1, 0.7])
    np.testing.assert_array_equal(Box(low=0.5)(values).numpy(), [0.5, 0.5, 2.0])
    np.testing.assert_array_equal(Box(high=0.0)(values).numpy(), [-2.0, 0.0, 0.0])


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: type(constraint).__name__)
def test_projecting_twice_changes_nothing_more(constraint):
    values = np.random.default_rng(1).normal(scale=2.0, size=[3, 5])
    once = constraint(values)
    assert once.shape == (3, 5)
    np.testing.assert_allclose(constraint(once).numpy(), once.numpy(), rtol=0, atol=1e-15)


@pytest.mark.one_case
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: type(constraint).__name__)
def test_constraints_give_the_same_in_a_compiled_function(constraint, jit_compile):
    values = tf.constant(np.random.default_rng(2).normal(scale=2.0, size=[17]))
    compiled = tf.function(constraint.__call__, autograph=False, jit_compile=jit_compile)
    np.testing.assert_allclose(compiled(values).numpy(), constraint(values).numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: type(constraint).__name__)
def test_constraints_come_back_from_their_configuration(constraint):
    restored = keras.constraints.deserialize(keras.constraints.serialize(constraint))
    assert type(restored) is type(constraint)
    assert restored.get_config() == constraint.get_config()


@pytest.mark.one_case
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: type(constraint).__name__)
def test_keras_optimizers_enforce_constraints_after_an_update(constraint):
    variable = keras.Variable(np.random.default_rng(3).normal(size=[6]), dtype="float32")
    variable.constraint = constraint
    gradient = np.random.default_rng(4).normal(size=[6]).astype("float32")
    expected = constraint(variable.numpy() - 0.5 * gradient)
    keras.optimizers.SGD(0.5).apply([tf.constant(gradient)], [variable])
    assert variable.dtype == "float32"
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_budget_over_many_float32_entries_holds_to_rounding():
    values = np.random.default_rng(5).uniform(0.0, 1.0, 50000).astype("float32")
    projected = CappedSimplex(1000.0)(values).numpy().astype("float64")
    np.testing.assert_allclose(projected.sum(), 1000.0, rtol=1e-6)


@pytest.mark.parametrize("arguments, rule", [
    ({}, "needs a bound"),
    ({"low": 1.0, "high": 0.0}, "less than high"),
    ({"low": 1.0, "high": 1.0}, "less than high"),
    ({"low": float("nan")}, "finite number"),
    ({"high": "1"}, "finite number"),
])
def test_box_refuses_bounds_that_bound_nothing(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        Box(**arguments)


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan"), float("inf"), "1", True, None])
@pytest.mark.parametrize("constraint", [Simplex, CappedSimplex])
def test_simplices_refuse_a_sum_that_is_not_positive(constraint, total):
    with pytest.raises(ValueError, match="must be a positive finite number"):
        constraint(total)

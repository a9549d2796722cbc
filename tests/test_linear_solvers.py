"""The linear solvers on systems whose solution is known."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.linear_solvers import GMRES, Direct, FixedPoint, LinearOperator, Neumann, NormalConjugateGradient, Nystrom

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))
ITERATIVE = [farhox.ConjugateGradient, NormalConjugateGradient, Neumann, FixedPoint, GMRES]


def positive_definite(n, condition=10.0, seed=0):
    random = np.random.default_rng(seed)
    q = np.linalg.qr(random.normal(size=(n, n)))[0]
    return q @ np.diag(np.geomspace(1.0, condition, n)) @ q.T, random.normal(size=n)


def solve(solver, a, b, initial=None, iteration=0, dtype="float64"):
    a, b = tf.constant(a, dtype), tf.constant(b, dtype)
    initial = None if initial is None else tf.constant(initial, dtype)
    return solver.solve(lambda v: tf.linalg.matvec(a, v), b, initial, iteration)


SOLVERS = {
    "conjugate_gradient": farhox.ConjugateGradient(60, tolerance=1e-13),
    "normal_conjugate_gradient": NormalConjugateGradient(100, tolerance=1e-13),
    "neumann": Neumann(600, tolerance=1e-13, power_steps=100),
    "gmres": GMRES(12, tolerance=1e-13),
    "nystrom": Nystrom(rank=12, rho=1e-12),
    "dense": Direct(),
    "fixed_point": FixedPoint(600, tolerance=1e-13),
}


@pytest.mark.covering
@dtypes
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_solution_is_that_of_numpy(name, dtype, compiled):
    a, b = positive_definite(12)
    if name == "fixed_point":
        a /= 11.0  # I - a must contract.
    solver = SOLVERS[name]
    if dtype == "float32" and name == "nystrom":
        solver = Nystrom(rank=12, rho=1e-6)

    def call():
        return solve(solver, a, b, dtype=dtype)

    solution = tf.function(call, autograph=False)() if compiled else call()
    expected = np.linalg.solve(a, b)
    np.testing.assert_allclose(solution.vector, expected, rtol=0, atol=TOLERANCE[dtype] * np.max(np.abs(expected)))
    residual = np.linalg.norm(b - a @ solution.vector.numpy()) / np.linalg.norm(b)
    np.testing.assert_allclose(solution.residual, residual, rtol=0, atol=TOLERANCE[dtype])
    assert solution.steps.dtype == tf.int32 and not solution.failed


@pytest.mark.one_case
@pytest.mark.parametrize("name", list(SOLVERS))
def test_solver_compiled_by_xla_gives_the_same_solution(name):
    a, b = positive_definite(4)
    a /= 11.0
    solver = Nystrom(rank=4, rho=1e-6) if name == "nystrom" else SOLVERS[name]
    compiled = tf.function(lambda: solve(solver, a, b, dtype="float32"), autograph=False, jit_compile=True)()
    np.testing.assert_allclose(compiled.vector, np.linalg.solve(a, b), rtol=1e-3)


@dtypes
def test_conjugate_gradient_is_exact_after_n_steps(dtype):
    a, b = positive_definite(8)
    exact = {"float64": 1e-12, "float32": 1e-4}[dtype]
    solution = solve(farhox.ConjugateGradient(8, tolerance=0.0), a, b, dtype=dtype)
    np.testing.assert_allclose(solution.vector, np.linalg.solve(a, b), rtol=0, atol=exact * 10)
    warm = solve(farhox.ConjugateGradient(8, tolerance=0.0), a, b, initial=np.linspace(-1, 1, 8), dtype=dtype)
    np.testing.assert_allclose(warm.vector, np.linalg.solve(a, b), rtol=0, atol=exact * 10)


@pytest.mark.parametrize("solver", [farhox.ConjugateGradient(), NormalConjugateGradient(), GMRES(),
                                    Neumann(step_size=0.5)])
def test_convergence_in_the_first_step_returns_that_step(solver):
    solution = solve(solver, 2.0 * np.eye(3), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(solution.vector, [0.5, 1.0, 1.5], rtol=1e-12)


def test_conjugate_gradient_returns_the_iterate_that_met_the_tolerance():
    solution = solve(farhox.ConjugateGradient(3, tolerance=1e-10), np.diag([1.0, 2.0, 3.0]), np.ones(3))
    np.testing.assert_allclose(solution.vector, [1.0, 0.5, 1 / 3], rtol=1e-12)


def test_conjugate_gradient_improves_in_every_step():
    """The search direction is built from the new residual: in the norm of A the error falls monotonically."""
    a, b = positive_definite(20, condition=100.0)
    exact = np.linalg.solve(a, b)
    errors = []
    for steps in range(1, 21):
        error = solve(farhox.ConjugateGradient(steps, tolerance=0.0), a, b).vector.numpy() - exact
        errors.append(error @ a @ error)
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))
    assert errors[-1] < 1e-6 * errors[0]


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 10.0])
def test_conjugate_gradient_does_not_depend_on_the_scale_of_the_matrix(scale):
    a, b = positive_definite(6)
    solution = solve(farhox.ConjugateGradient(6, tolerance=0.0), scale * a, b)
    np.testing.assert_allclose(solution.vector, np.linalg.solve(scale * a, b), rtol=1e-10)


@pytest.mark.parametrize("name", ["conjugate_gradient", "normal_conjugate_gradient", "neumann", "gmres", "fixed_point"])
def test_start_at_the_solution_stays_there(name):
    a, b = positive_definite(6)
    a /= 11.0
    solution = solve(SOLVERS[name], a, b, initial=np.linalg.solve(a, b))
    np.testing.assert_allclose(solution.vector, np.linalg.solve(a, b), rtol=1e-12)
    assert not solution.failed


@pytest.mark.parametrize("name", list(SOLVERS))
def test_right_hand_side_of_zero_has_the_solution_zero(name):
    a, _ = positive_definite(4)
    solution = solve(SOLVERS[name], a / 11.0, np.zeros(4))
    np.testing.assert_array_equal(solution.vector, np.zeros(4))
    assert solution.residual == 0.0 and not solution.failed


@pytest.mark.parametrize("name", list(SOLVERS))
def test_right_hand_side_that_is_not_finite_does_not_come_out_as_a_number(name):
    a, _ = positive_definite(3)
    solution = solve(SOLVERS[name], a / 11.0, [1.0, np.nan, 0.0])
    assert solution.failed
    assert not np.all(np.isfinite(solution.vector))


@pytest.mark.covering
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("matrix", [np.diag([1.0, 0.0]), np.diag([1.0, np.nan]), np.diag([np.inf, 1.0])])
@pytest.mark.parametrize("solver", [Direct(), Nystrom(rank=2, rho=0.1), GMRES()])
def test_singular_or_infinite_matrix_does_not_stop_the_graph(solver, matrix, compiled):
    def call():
        return solve(solver, matrix, [1.0, 1.0])

    solution = tf.function(call, autograph=False)() if compiled else call()
    finite = np.all(np.isfinite(matrix))
    if isinstance(solver, Direct) or not finite:
        assert solution.failed and not np.all(np.isfinite(solution.vector))
    elif isinstance(solver, Nystrom):
        np.testing.assert_allclose(solution.vector, [1 / 1.1, 1 / 0.1], rtol=1e-9)


@pytest.mark.parametrize("matrix, right", [(np.diag([1.0, -2.0]), [0.0, 1.0]), (np.diag([1.0, -1.0]), [1.0, 1.0])])
def test_conjugate_gradient_reports_negative_curvature(matrix, right):
    solution = solve(farhox.ConjugateGradient(), matrix, right)
    assert solution.failed
    np.testing.assert_array_equal(solution.vector, np.zeros(2))


@pytest.mark.parametrize("steps", [3, 5, 10, 20])
def test_conjugate_gradient_never_takes_an_indefinite_matrix_for_a_definite_one(steps):
    """Truncated anywhere, it is either flagged, or the best point of a space on which the matrix is definite."""
    random = np.random.default_rng(0)
    flagged = 0
    for _ in range(10):
        a = random.normal(size=(20, 20))
        a, b = a + a.T, random.normal(size=20)
        solution = solve(farhox.ConjugateGradient(steps, tolerance=0.0), a, b)
        flagged += bool(solution.failed)
        assert np.all(np.isfinite(solution.vector))
        if not solution.failed:
            x = solution.vector.numpy()
            assert x @ a @ x > 0 and 0.5 * x @ a @ x - b @ x < 0
    assert flagged == 10 or steps == 3 and flagged >= 8


def test_conjugate_gradient_reports_what_it_made_worse_where_the_matrix_is_not_symmetric():
    a = np.array([[0.1, 3.0], [-3.0, 0.1]])
    operator = farhox.linear_solvers.LinearOperator(
        lambda v: tf.linalg.matvec(tf.constant(a), v), lambda v: tf.linalg.matvec(tf.constant(a.T), v))
    solution = farhox.ConjugateGradient(2).solve(operator, tf.constant([1.0, 1.0], tf.float64))
    assert solution.failed and solution.residual > 1


@pytest.mark.covering
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("solver", [
    NormalConjugateGradient(60, tolerance=1e-13), Nystrom(rank=5, rho=1e-12)])
def test_solvers_with_transposed_products_solve_an_unsymmetric_system(solver, compiled):
    a, b = np.eye(5) + np.random.default_rng(0).normal(size=(5, 5)) / 2, np.arange(5.0)
    operator = farhox.linear_solvers.LinearOperator(
        lambda v: tf.linalg.matvec(tf.constant(a), v), lambda v: tf.linalg.matvec(tf.constant(a.T), v))

    def call():
        return solver.solve(operator, tf.constant(b))

    solution = tf.function(call, autograph=False)() if compiled else call()
    np.testing.assert_allclose(solution.vector, np.linalg.solve(a, b), rtol=1e-7)


def test_nystrom_of_an_unsymmetric_matrix_of_its_rank_is_exact():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(10, 3)) @ random.normal(size=(3, 10)), random.normal(size=10)
    operator = farhox.linear_solvers.LinearOperator(
        lambda v: tf.linalg.matvec(tf.constant(a), v), lambda v: tf.linalg.matvec(tf.constant(a.T), v))
    solution = Nystrom(rank=3, rho=0.1).solve(operator, tf.constant(b))
    np.testing.assert_allclose(solution.vector, np.linalg.solve(a + 0.1 * np.eye(10), b), rtol=1e-8)
    assert int(solution.steps) == 7


@pytest.mark.parametrize("name", ["normal_conjugate_gradient", "gmres", "dense"])
def test_indefinite_system_is_solved(name):
    a, b = positive_definite(6)
    a -= 3.0 * np.eye(6)
    solution = solve(SOLVERS[name], a, b)
    np.testing.assert_allclose(solution.vector, np.linalg.solve(a, b), rtol=1e-8)


@pytest.mark.parametrize("name", ["gmres", "dense", "fixed_point"])
def test_unsymmetric_system_is_solved(name):
    a = np.eye(5) - 0.3 * np.random.default_rng(0).uniform(size=(5, 5))
    b = np.arange(5.0)
    np.testing.assert_allclose(solve(SOLVERS[name], a, b).vector, np.linalg.solve(a, b), rtol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_neumann_series_sums_as_many_terms_as_steps(steps):
    a, b = positive_definite(4)
    solution = solve(Neumann(steps, step_size=0.05, tolerance=0.0), a, b)
    terms = [np.linalg.matrix_power(np.eye(4) - 0.05 * a, k) @ b for k in range(steps)]
    np.testing.assert_allclose(solution.vector, 0.05 * np.sum(terms, axis=0), rtol=1e-12)
    assert int(solution.steps) == steps


def test_neumann_series_finds_its_step_size_by_power_iteration():
    a, b = positive_definite(6)
    found = solve(Neumann(7, power_steps=300, tolerance=0.0), 1000 * a, b)
    given = solve(Neumann(7, step_size=1e-4, tolerance=0.0), 1000 * a, b)
    np.testing.assert_allclose(found.vector, given.vector, rtol=1e-6)
    assert int(found.steps) == 307


@pytest.mark.parametrize("solver", [Neumann(5, step_size=1.0), FixedPoint(5)])
def test_a_series_that_diverges_is_returned_as_it_is_and_reported(solver):
    solution = solve(solver, np.diag([3.0, 1.0]), [1.0, 1.0])
    assert solution.failed
    np.testing.assert_allclose(solution.vector, [np.sum((-2.0) ** np.arange(5)), 1.0], rtol=1e-12)
    np.testing.assert_allclose(solution.residual, 32 / np.sqrt(2), rtol=1e-12)


@pytest.mark.one_case
@pytest.mark.parametrize("solver", [Neumann(150, step_size=1.0), FixedPoint(150)])
def test_a_series_that_overflows_is_not_a_number(solver):
    solution = solve(solver, np.diag([300.0, 1.0]), [1.0, 1.0])
    assert solution.failed and not np.all(np.isfinite(solution.vector))


@pytest.mark.slow
def test_estimate_for_the_step_of_a_neumann_series_is_kept_in_its_memory():
    """The first system costs `power_steps` products, later ones a single product; a failure starts anew."""
    a, b = positive_definite(6)
    solver = Neumann(7, power_steps=300, tolerance=0.0)

    def solved(matrix, memory=()):
        return solver.solve(lambda v: tf.linalg.matvec(tf.constant(matrix), v), tf.constant(b), memory=memory)

    first = solved(a)
    again = solved(2 * a, first.memory)
    assert int(first.steps) == 307 and int(again.steps) == 8
    np.testing.assert_allclose(again.vector, solved(2 * a).vector, rtol=1e-6)
    # A matrix that no step size suits; the next one is estimated from the beginning.
    failed = solved(-a, again.memory)
    assert failed.failed and int(solved(a, failed.memory).steps) == 307
    tf.nest.assert_same_structure(first.memory, solver.initial_memory(tf.constant(b)))
    assert Neumann(step_size=0.1).initial_memory(tf.constant(b)) == ()


def test_step_size_of_a_neumann_series_follows_a_schedule():
    a, b = positive_definite(4)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    for iteration in (0, 3):
        scheduled = solve(Neumann(4, step_size=schedule, tolerance=0.0), a, b, iteration=iteration)
        fixed = solve(Neumann(4, step_size=0.1 * 0.5 ** iteration, tolerance=0.0), a, b)
        np.testing.assert_allclose(scheduled.vector, fixed.vector, rtol=1e-6)


@pytest.mark.parametrize("name", ["conjugate_gradient", "normal_conjugate_gradient", "neumann", "gmres", "fixed_point"])
def test_steps_are_the_products_that_were_taken(name):
    """Those for the residual of a start, of the right-hand side and of the result included."""
    solver = {"conjugate_gradient": farhox.ConjugateGradient(3, tolerance=0.0),
              "normal_conjugate_gradient": NormalConjugateGradient(3, tolerance=0.0),
              "neumann": Neumann(3, step_size=0.05, tolerance=0.0), "gmres": GMRES(3, tolerance=0.0),
              "fixed_point": FixedPoint(3, tolerance=0.0)}[name]
    a, b = (tf.constant(part) for part in positive_definite(6))
    for initial in (None, tf.constant(np.linspace(-0.01, 0.01, 6))):
        taken = []

        def matvec(vector):
            taken.append(vector)
            return tf.linalg.matvec(a / 11.0, vector)

        solution = solver.solve(matvec, b, initial)
        assert int(solution.steps) == len(taken)


@pytest.mark.parametrize("name", ["conjugate_gradient", "neumann", "gmres", "fixed_point"])
def test_a_start_that_is_worse_than_zero_is_not_used(name):
    a, b = positive_definite(4)
    a /= 11.0
    solver = {"conjugate_gradient": farhox.ConjugateGradient(2), "neumann": Neumann(2, step_size=0.5),
              "gmres": GMRES(2), "fixed_point": FixedPoint(2)}[name]
    far, cold = solve(solver, a, b, initial=np.full(4, 1e6)), solve(solver, a, b)
    np.testing.assert_array_equal(far.vector, cold.vector)
    unknown = solve(solver, a, b, initial=np.full(4, np.nan))
    np.testing.assert_array_equal(unknown.vector, cold.vector)


def test_gmres_is_the_best_of_its_krylov_space():
    a = np.random.default_rng(3).normal(size=(8, 8)) + 3 * np.eye(8)
    b = np.random.default_rng(4).normal(size=8)
    solution = solve(GMRES(4, tolerance=0.0), a, b)
    krylov = np.stack([np.linalg.matrix_power(a, k) @ b for k in range(4)], axis=1)
    best = krylov @ np.linalg.lstsq(a @ krylov, b, rcond=None)[0]
    np.testing.assert_allclose(solution.vector, best, rtol=1e-8)


@pytest.mark.one_case
@dtypes
@pytest.mark.parametrize("rho", [1e-2, 1e-4])
def test_nystrom_of_full_rank_equals_the_exact_damped_solve(dtype, rho):
    a, b = positive_definite(9)
    solution = solve(Nystrom(rank=9, rho=rho), a, b, dtype=dtype)
    expected = np.linalg.solve(a + rho * np.eye(9), b)
    np.testing.assert_allclose(solution.vector, expected, rtol=0, atol=TOLERANCE[dtype] * np.max(np.abs(expected)))


def test_nystrom_is_exact_for_a_matrix_of_its_rank():
    factor = np.random.default_rng(0).normal(size=(10, 3))
    b = np.random.default_rng(1).normal(size=10)
    solution = solve(Nystrom(rank=3, rho=0.1), factor @ factor.T, b)
    np.testing.assert_allclose(solution.vector, np.linalg.solve(factor @ factor.T + 0.1 * np.eye(10), b), rtol=1e-8)
    assert int(solution.steps) == 4


@pytest.mark.parametrize("solver", ITERATIVE)
def test_tolerance_that_tightens_takes_more_steps_later(solver):
    a, b = positive_definite(12, condition=4.0)
    a /= 5.0
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.01)
    early = solve(solver(max_steps=100, tolerance=schedule), a, b, iteration=0)
    late = solve(solver(max_steps=100, tolerance=schedule), a, b, iteration=2)
    assert early.steps < late.steps
    if solver is not NormalConjugateGradient:  # Its tolerance is measured on the normal equations.
        assert early.residual <= 0.5
        assert late.residual <= 0.5e-4


def test_tolerance_of_a_constant_is_met():
    a, b = positive_definite(30, condition=100.0)
    solution = solve(farhox.ConjugateGradient(100, tolerance=1e-3), a, b)
    assert 1e-6 < solution.residual <= 1e-3


@pytest.mark.parametrize("make", [
    lambda: farhox.ConjugateGradient(0), lambda: GMRES(tolerance=-1.0), lambda: Neumann(step_size=-1.0),
    lambda: Nystrom(rank=0), lambda: Direct(0)])
def test_errors_name_the_solver(make):
    with pytest.raises(ValueError, match="^(ConjugateGradient|GMRES|Neumann|Nystrom|Direct): "):
        make()


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("max_steps", [0, -1, 2.5, True, None])
def test_max_steps_must_be_a_positive_integer(solver, max_steps):
    with pytest.raises(ValueError, match="max_steps must be a positive integer"):
        solver(max_steps=max_steps)


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("tolerance", [-1e-3, "tight", None])
def test_tolerance_must_be_a_non_negative_number_or_callable(solver, tolerance):
    with pytest.raises(ValueError, match="tolerance must be a non-negative number or a callable"):
        solver(tolerance=tolerance)


@pytest.mark.parametrize("solver, argument", [
    (Neumann, "power_steps"), (Nystrom, "rank"), (Direct, "max_dimension")])
@pytest.mark.parametrize("value", [0, 1.5])
def test_counts_must_be_positive_integers(solver, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer. Received: {value}"):
        solver(**{argument: value})


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("nan")])
def test_step_size_must_be_positive(step_size):
    with pytest.raises(ValueError, match="step_size must be positive or None"):
        Neumann(step_size=step_size)


@pytest.mark.parametrize("rho", [0.0, -1.0])
def test_damping_of_nystrom_must_be_positive(rho):
    with pytest.raises(ValueError, match="rho must be a positive"):
        Nystrom(rho=rho)


def test_dense_refuses_a_system_that_is_too_large():
    with pytest.raises(ValueError, match="takes at most n=3.*Received: n=4. Use ConjugateGradient or Nystrom"):
        solve(Direct(max_dimension=3), np.eye(4), np.ones(4))


@pytest.mark.parametrize("solver", [*ITERATIVE, Nystrom, Direct])
def test_settings_are_frozen(solver):
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver().max_steps = 3


def test_conjugate_gradients_say_that_a_matrix_is_not_symmetric(float64):
    """A stop in the inner objective makes it so; where it happens to be symmetric all the same, nothing fails."""
    symmetric = tf.constant([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], tf.float64)
    skewed = symmetric + tf.constant([[0.0, 0.9, -0.4], [-0.9, 0.0, 0.8], [0.4, -0.8, 0.0]], tf.float64)
    rhs = tf.constant([1.0, -2.0, 0.5], tf.float64)

    def solved(matrix):
        operator = LinearOperator(lambda v: tf.linalg.matvec(matrix, v),
                                  lambda v: tf.linalg.matvec(matrix, v, transpose_a=True))
        return farhox.ConjugateGradient().solve(operator, rhs)

    good, bad = solved(symmetric), solved(skewed)
    assert not good.failed and good.residual < 1e-6
    assert bad.failed and bad.residual > 1e-3
    exact = GMRES().solve(
        LinearOperator(lambda v: tf.linalg.matvec(skewed, v),
                       lambda v: tf.linalg.matvec(skewed, v, transpose_a=True)), rhs)
    np.testing.assert_allclose(exact.vector, np.linalg.solve(skewed, rhs), rtol=1e-9)

"""ImplicitHG against closed forms, its solvers, its warm start and what it cannot see."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import (
    CURVATURE,
    GOAL,
    RATE,
    START,
    STEPS,
    TARGET,
    TOLERANCE,
    assert_close,
    network_problem,
    proximal_quadratic,
    ridge_representation,
    scalar_quadratic,
    variable,
    weighted_mean,
)

import farhox
from farhox.linear_solvers import GMRES, Direct, FixedPoint, Neumann, NormalConjugateGradient, Nystrom

dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
EXACT_SOLVERS = {
    "cg": farhox.ConjugateGradient(tolerance=0.0),
    "normal_cg": NormalConjugateGradient(tolerance=0.0),
    "gmres": GMRES(),
    "dense": Direct(),
    "neumann": Neumann(max_steps=300, tolerance=1e-14),
    "nystrom": Nystrom(rank=10, rho=1e-11),
    "fixed_point": FixedPoint(max_steps=300, tolerance=1e-14),
}
# All of them are held against NumPy in test_linear_solvers.
solvers = pytest.mark.parametrize("solver", [
    name if name in ("cg", "dense", "fixed_point") else pytest.param(name, marks=pytest.mark.slow)
    for name in EXACT_SOLVERS])
Q = 1 - RATE * CURVATURE
END = 1.024288


def solver_for(name, dtype):
    if dtype == "float32":
        # Tolerances and dampings that single precision can express.
        return {"nystrom": Nystrom(rank=10, rho=1e-6),
                "fixed_point": FixedPoint(max_steps=300)}.get(name, EXACT_SOLVERS[name])
    return EXACT_SOLVERS[name]


@pytest.mark.covering
@dtypes
@solvers
def test_scalar_quadratic_has_the_gradient_of_its_minimum(dtype, solver):
    case = scalar_quadratic(dtype, ("target",))
    result = farhox.ImplicitHG(solver_for(solver, dtype)).compute(*case[:3])
    assert_close(result.gradients, [END - GOAL], TOLERANCE[dtype])
    assert result.diagnostics["solver_residual"] < TOLERANCE[dtype]
    assert not result.diagnostics["solver_failed"]


@pytest.mark.slow
@pytest.mark.one_case
@dtypes
@pytest.mark.parametrize("terms, published", [(1, 0.0048576), (3, 0.011852544), (10, 0.0216800959), (25, None)])
def test_neumann_series_and_fixed_point_equal_truncation_on_a_quadratic(dtype, terms, published):
    case = scalar_quadratic(dtype, ("target",), steps=STEPS)
    expected = (END - GOAL) * (1 - Q ** terms)
    for solver in (Neumann(terms, step_size=RATE, tolerance=0.0), FixedPoint(terms, tolerance=0.0)):
        result = farhox.ImplicitHG(solver).compute(*case[:3])
        assert_close(result.gradients, [expected], TOLERANCE[dtype])
        assert int(result.diagnostics["solver_steps"]) == terms
        if published:
            np.testing.assert_allclose(result.gradients[0], published, rtol=max(TOLERANCE[dtype], 2e-9))


@pytest.mark.one_case
@dtypes
@solvers
def test_data_weights_have_their_closed_form(dtype, solver):
    case = weighted_mean(dtype)
    gradients = farhox.ImplicitHG(solver_for(solver, dtype)).compute(*case[:3]).gradients
    assert_close(gradients, case.expected, TOLERANCE[dtype])
    np.testing.assert_allclose(gradients[0], [-2.5925925926, -1.8148148148, 4.4074074074], rtol=TOLERANCE[dtype])


@pytest.mark.one_case
@dtypes
@solvers
def test_representation_under_a_ridge_head_has_its_closed_form(dtype, solver):
    case = ridge_representation(dtype)
    result = farhox.ImplicitHG(solver_for(solver, dtype)).compute(*case[:3])
    assert_close(result.gradients, case.expected, TOLERANCE[dtype])
    np.testing.assert_allclose(result.outer_loss, 0.0591362847, rtol=max(TOLERANCE[dtype], 1e-8))
    np.testing.assert_allclose(
        result.gradients[0], [[-0.0379050926, -0.1366464120], [-0.1176938657, 0.2269784433]],
        rtol=max(TOLERANCE[dtype], 1e-8), atol=TOLERANCE[dtype] * 0.2)


@pytest.mark.slow
def test_long_reverse_mode_reaches_the_implicit_gradient():
    case = ridge_representation(steps=300, rate=0.2)
    assert_close(farhox.ReverseHG().compute(*case[:3]).gradients, case.expected, 1e-9)


@pytest.mark.one_case
@dtypes
@pytest.mark.parametrize("solver", [name for name in EXACT_SOLVERS if name != "fixed_point"])
def test_proximal_meta_gradient_has_its_closed_form(dtype, solver):
    case = proximal_quadratic(dtype)
    gradients = farhox.ImplicitHG(solver_for(solver, dtype)).compute(*case[:3]).gradients
    assert_close(gradients, case.expected, TOLERANCE[dtype])
    np.testing.assert_allclose(gradients[0] / (5 / 3 - 5), 2 / 3, rtol=TOLERANCE[dtype])


@pytest.mark.slow
def test_implicit_gradient_equals_finite_differences_of_a_trained_network(float64):
    case = network_problem("Dense", steps=1)
    problem = case.problem
    batches = farhox.repeat(tf.nest.map_structure(lambda leaf: leaf[0], case.inner_batches), 1500)
    problem.outer_variables[1].assign(np.log(0.1))  # Strong regularisation: these steps converge.
    problem = farhox.BilevelProblem(
        problem._inner_objective, problem._outer_objective, problem.inner_variables, problem.outer_variables[1:],
        farhox.GradientDescent(0.3))
    trained = tf.function(
        lambda: farhox.ImplicitHG(Direct()).compute(problem, batches, case.outer_batch), autograph=False)()
    assert trained.diagnostics["inner_gradient_norm"] < 1e-9
    assert_close(trained.gradients, unrolled.finite_differences(problem, batches, case.outer_batch, step=1e-3), 1e-6)


@pytest.mark.slow
def test_implicit_gradient_with_random_layers_is_that_of_the_last_step(float64):
    """The statistics of batch norm and the mask of the last state count as constants."""
    case = network_problem("BatchNormalization", steps=2, extra=[keras.layers.Dropout(0.5)])
    rate, *rest = case.problem.outer_variables
    problem = farhox.BilevelProblem(
        case.problem._inner_objective, case.problem._outer_objective, case.problem.inner_variables, rest,
        farhox.GradientDescent(0.1), case.problem.state_variables)
    method = farhox.ImplicitHG(NormalConjugateGradient(100, tolerance=1e-13), damping=1.0)
    result = method.compute(problem, *case[1:3])

    # By hand: (H + I) v = dE/dw, dE/dλ - (d²L/dλdw) v, from finite differences of the gradient.
    state, batch = result.state, tf.nest.map_structure(lambda leaf: leaf[1], case.inner_batches)
    outer = problem.outer_values()
    sizes = [v.shape.num_elements() for v in state.variables]
    shapes = [v.shape for v in state.variables]

    @tf.function(autograph=False, reduce_retracing=True)
    def gradient(flat, outer):
        variables = [tf.reshape(part, shape) for part, shape in zip(tf.split(flat, sizes), shapes)]
        gradients = problem.inner_gradients(variables, state.state_variables, outer, batch)[2]
        return tf.concat([tf.reshape(g, [-1]) for g in gradients], axis=0)

    flat = np.concatenate([np.ravel(v) for v in state.variables])
    at_end = problem.outer_gradients(state, outer, tf.nest.map_structure(tf.convert_to_tensor, case.outer_batch))
    rhs = np.concatenate([np.ravel(g) for g in at_end.state[:len(sizes)]])
    step = 1e-6
    hessian = np.stack([(gradient(flat + e, outer) - gradient(flat - e, outer)).numpy() / (2 * step)
                        for e in step * np.eye(flat.size)])
    mixed = (gradient(flat, [outer[0] + step, *outer[1:]]) - gradient(flat, [outer[0] - step, *outer[1:]])).numpy()
    mixed = mixed / (2 * step)
    solution = np.linalg.solve(hessian + np.eye(flat.size), rhs)
    np.testing.assert_allclose(result.gradients[0], -mixed @ solution, rtol=1e-6)


def test_damping_is_added_to_the_diagonal():
    case = scalar_quadratic(outer=("target",))
    for solver in (farhox.ConjugateGradient(), Direct()):
        gradients = farhox.ImplicitHG(solver, damping=0.5).compute(*case[:3]).gradients
        assert_close(gradients, [(END - GOAL) * CURVATURE / (CURVATURE + 0.5)], 1e-9)


def test_warm_start_begins_at_the_carried_solution():
    case = ridge_representation()
    method = farhox.ImplicitHG(farhox.ConjugateGradient(tolerance=1e-10))
    first = method.compute(*case[:3])
    second = method.compute(*case[:3], carry=first.carry)
    assert int(first.diagnostics["solver_steps"]) == 2
    assert int(second.diagnostics["solver_steps"]) == 1  # The product that shows that there is nothing left to do.
    assert_close(second.gradients, case.expected, 1e-9)
    cold = farhox.ImplicitHG(farhox.ConjugateGradient(tolerance=1e-10), warm_start=False)
    assert int(cold.compute(*case[:3], carry=first.carry).diagnostics["solver_steps"]) == 2


@pytest.mark.slow
def test_tolerance_tightens_with_the_hyper_iteration():
    case = ridge_representation()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.9, 1, 0.1)
    method = farhox.ImplicitHG(Neumann(500, step_size=0.1, tolerance=schedule), warm_start=False)
    carry, residuals, steps = None, [], []
    for _ in range(4):
        result = method.compute(*case[:3], carry=carry, iteration=len(steps))
        carry = result.carry
        residuals.append(float(result.diagnostics["solver_residual"]))
        steps.append(int(result.diagnostics["solver_steps"]))
    assert all(residual <= 0.9 * 0.1 ** k for k, residual in enumerate(residuals))
    assert steps == sorted(steps) and steps[0] < steps[-1]


@pytest.mark.one_case
@pytest.mark.parametrize("solver", ["cg", "fixed_point"])
def test_initial_carry_has_the_structure_of_the_carry(solver):
    case = scalar_quadratic(outer=("target",), dynamics=farhox.Momentum)
    method = farhox.ImplicitHG(EXACT_SOLVERS[solver])
    initial, carry = method.initial_carry(case.problem), method.compute(*case[:3]).carry
    tf.nest.assert_same_structure(initial, carry)
    assert [(leaf.shape, leaf.dtype) for leaf in initial] == [(leaf.shape, leaf.dtype) for leaf in carry]
    assert_close(method.compute(*case[:3], carry=initial).gradients, method.compute(*case[:3]).gradients, 1e-12)


def test_fixed_point_sees_what_acts_on_the_fixed_point_of_other_dynamics():
    """Momentum has the fixed point of gradient descent: the whole state (w, m) is solved for."""
    case = scalar_quadratic(outer=("target",), steps=200, dynamics=lambda rate: farhox.Momentum(rate, 0.5))
    gradients = farhox.ImplicitHG(FixedPoint(500, tolerance=1e-14)).compute(*case[:3]).gradients
    assert_close(gradients, [TARGET - GOAL], 1e-9)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("solver", list(EXACT_SOLVERS))
def test_every_solver_solves_the_system_of_the_dynamics_and_that_of_the_objective(solver):
    """Gradient descent and momentum at a minimum: both systems have the gradient of the minimum."""
    case = ridge_representation()
    method = EXACT_SOLVERS[solver]
    if solver == "nystrom":
        method = Nystrom(rank=10, rho=1e-13)
    for system in ("objective", "dynamics"):
        if solver == "fixed_point" and system == "objective":
            continue  # The iteration has no step size of its own: it does not contract there.
        result = farhox.ImplicitHG(method, system=system).compute(*case[:3])
        assert_close(result.gradients, case.expected, 1e-8)
        assert result.diagnostics["stationarity_gap"] < 1e-12
    case = scalar_quadratic(outer=("target",), steps=200, dynamics=lambda rate: farhox.Momentum(rate, 0.5))
    if solver != "cg":  # Momentum's system is not symmetric.
        gradients = farhox.ImplicitHG(method, system="dynamics").compute(*case[:3]).gradients
        assert_close(gradients, [TARGET - GOAL], 1e-8)


def decayed_regression(decay, dynamics):
    """Least squares under a decoupled weight decay, and its hypergradient from the normal equations."""
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 4))
    y = x @ random.normal(size=4) + random.normal(size=40)
    w, strength = variable(np.zeros(4), name="w"), variable(decay, name="decay")

    def objective(batch):
        return 0.5 * tf.reduce_mean((tf.linalg.matvec(batch[0], w) - batch[1]) ** 2)

    problem = farhox.BilevelProblem(objective, objective, [w], [strength], dynamics=dynamics(strength))
    matrix = x.T @ x / 40 + decay * np.eye(4)
    solution = np.linalg.solve(matrix, x.T @ y / 40)
    outer = (x + 0.3, y)
    at_outer = outer[0].T @ (outer[0] @ solution - y) / 40
    return problem, farhox.repeat((x, y), 600), outer, -at_outer @ np.linalg.solve(matrix, solution)


@pytest.mark.one_case
@pytest.mark.parametrize("method", [
    farhox.ImplicitHG(FixedPoint(3000, tolerance=1e-13)),
    farhox.ImplicitHG(GMRES(tolerance=1e-13), system="dynamics"),
    farhox.ImplicitHG(NormalConjugateGradient(tolerance=1e-13), system="dynamics")],
    ids=["fixed point", "gmres", "normal cg"])
def test_decoupled_weight_decay_is_seen_in_the_dynamics(method):
    *case, expected = decayed_regression(
        0.5, lambda decay: farhox.KerasDynamics(keras.optimizers.SGD(0.1, weight_decay=0.5), weight_decay=decay))
    np.testing.assert_allclose(expected, 0.0698454234530291, rtol=1e-12)
    np.testing.assert_allclose(method.compute(*case).gradients, [expected], rtol=1e-9)


@pytest.mark.slow
def test_weight_decay_of_adamw_has_the_implicit_gradient_of_its_own_fixed_point(float64):
    """g / (|g| + epsilon) = -decay w: not the minimum of a penalised objective."""
    *case, _ = decayed_regression(1.0, lambda decay: farhox.KerasDynamics(
        keras.optimizers.AdamW(0.05, weight_decay=1.0, epsilon=0.5, beta_1=0.5, beta_2=0.9),
        weight_decay=decay))
    method = farhox.ImplicitHG(GMRES(tolerance=1e-12), system="dynamics")
    implicit = tf.function(lambda: method.compute(*case), autograph=False)()
    unrolled = tf.function(lambda: farhox.ReverseHG().compute(*case), autograph=False)()
    assert implicit.diagnostics["stationarity_gap"] < 1e-8
    np.testing.assert_allclose(implicit.gradients, unrolled.gradients, rtol=1e-6)


def test_decoupled_weight_decay_is_refused_in_the_objective_with_advice():
    *case, _ = decayed_regression(
        0.5, lambda decay: farhox.KerasDynamics(keras.optimizers.SGD(0.1, weight_decay=0.5), weight_decay=decay))
    with pytest.raises(ValueError, match='penalty or a weight decay.*Use ImplicitHG\\(system="dynamics"\\)'):
        farhox.ImplicitHG().compute(*case)


@pytest.mark.one_case
@pytest.mark.parametrize("dynamics", [
    lambda rate: farhox.dynamics.ProximalGradient(rate, farhox.dynamics.L1(0.1)),
    lambda rate: farhox.KerasDynamics(keras.optimizers.SGD(weight_decay=0.1), learning_rate=rate),
    lambda rate: farhox.KerasDynamics(keras.optimizers.AdamW(weight_decay=0.1), learning_rate=rate)],
    ids=["proximal", "decay", "AdamW"])
def test_a_rate_that_scales_penalty_and_gradient_alike_is_not_seen(dynamics):
    """It moves the variables where the inner gradient is zero, but no fixed point: its hypergradient would be zero."""
    *case, _ = decayed_regression(0.1, dynamics)  # The outer variable is the rate here.
    with pytest.raises(ValueError, match="(?s)depends on 'decay'.*as a learning rate.*use ReverseHG"):
        farhox.ImplicitHG(FixedPoint()).compute(*case)


def constrained_mean():
    """w* = max(theta, 0) at theta = -1: w stays at the border whatever theta does."""
    w, theta = variable([0.0], name="w"), variable([-1.0], name="theta")
    w.constraint = keras.constraints.NonNeg()
    problem = farhox.BilevelProblem(
        lambda _: tf.reduce_sum((w - theta) ** 2), lambda _: tf.reduce_sum(w + 0.0), [w], [theta],
        dynamics=farhox.GradientDescent(0.1))
    return problem, farhox.repeat(np.zeros(1), 50), np.zeros(1)


@pytest.mark.slow
def test_the_fixed_point_of_the_dynamics_includes_constraints():
    for solver in (FixedPoint(), GMRES(), Direct()):
        method = farhox.ImplicitHG(solver, system="dynamics")
        assert_close(method.compute(*constrained_mean()).gradients, [np.zeros(1)], 1e-12)


def test_constraints_of_inner_variables_are_refused_with_the_system_of_the_objective():
    with pytest.raises(ValueError, match="without constraints.*system=\"dynamics\".*constraints on 'w'"):
        farhox.ImplicitHG().compute(*constrained_mean())


def indefinite(goal):
    """L = w'Hw/2 - w'theta/100 with an eigenvalue of H below zero, at a step that moves nothing."""
    w, theta = variable([0.0, 0.0], name="w"), variable([1.0, 1.0], name="theta")
    curvature = tf.constant([1.0, -0.05], tf.float64)
    problem = farhox.BilevelProblem(
        lambda _: 0.5 * tf.reduce_sum(curvature * w ** 2) - 0.01 * tf.reduce_sum(w * theta),
        lambda _: tf.reduce_sum(w * tf.constant(goal, tf.float64)), [w], [theta], dynamics=farhox.GradientDescent(1e-6))
    return problem, farhox.repeat(np.zeros(1), 1), np.zeros(1)


@pytest.mark.one_case
@pytest.mark.parametrize("goal", [[1.0, 1.0], [0.1, 1.0]])
def test_a_truncated_series_on_an_indefinite_hessian_is_returned_and_reported_where_it_diverges(goal):
    result = farhox.ImplicitHG(Neumann(20, step_size=0.1, tolerance=0.0)).compute(*indefinite(goal))
    terms = np.arange(20)
    expected = [0.01 * goal[0] * 0.1 * np.sum(0.9 ** terms), 0.01 * goal[1] * 0.1 * np.sum(1.005 ** terms)]
    assert_close(result.gradients, [np.array(expected)], 1e-9)
    # The first right-hand side lies mostly along the part that shrinks.
    assert bool(result.diagnostics["solver_failed"]) == (goal[0] < 1.0)


@pytest.mark.one_case
@pytest.mark.parametrize("solver", [farhox.ConjugateGradient(), Neumann(20, step_size=0.1, tolerance=0.0)])
def test_a_solution_that_failed_is_not_carried_on(solver):
    result = farhox.ImplicitHG(solver).compute(*indefinite([0.1, 1.0]))
    assert result.diagnostics["solver_failed"]
    np.testing.assert_array_equal(result.carry[0], np.zeros(2))


@pytest.mark.slow
def test_the_estimate_of_a_neumann_series_is_carried_on():
    case = ridge_representation()
    method = farhox.ImplicitHG(Neumann(5, tolerance=0.0), warm_start=False)
    first = method.compute(*case[:3])
    second = method.compute(*case[:3], carry=first.carry)
    assert [int(r.diagnostics["solver_steps"]) for r in (first, second)] == [25, 6]
    tf.nest.assert_same_structure(method.initial_carry(case.problem), first.carry)
    assert_close(second.gradients, first.gradients, 1e-2)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("system", ["objective", "dynamics"])
def test_stationarity_gap_is_the_way_that_is_left_relative_to_the_weights(system):
    """One weight: (w_T - target) / max(|w_0|, |w_T|), whatever the scale of either objective."""
    for steps in (1, 7, 30):
        case = scalar_quadratic(outer=("target",), steps=steps)
        result = farhox.ImplicitHG(GMRES(), system=system).compute(*case[:3])
        left = (START - TARGET) * Q ** steps
        np.testing.assert_allclose(result.diagnostics["stationarity_gap"], left / START, rtol=1e-6)


@pytest.mark.covering
@pytest.mark.parametrize("solver", ["cg", "fixed_point", "dense"])
@pytest.mark.parametrize("outer, name", [(("target", "rate"), "rate"), (("schedule",), "schedule"),
                                         (("target", "initial"), "w")])
def test_outer_variable_that_acts_through_the_path_alone_is_an_error_that_names_it(solver, outer, name):
    case = scalar_quadratic(outer=outer)
    with pytest.raises(ValueError, match=f"depends on '{name}'. ImplicitHG sees.*use ReverseHG or ForwardHG"):
        farhox.ImplicitHG(EXACT_SOLVERS[solver]).compute(*case[:3])


def test_outer_variable_in_the_outer_objective_alone_is_seen():
    w, target, scale = variable(0.5), variable(0.5), variable(2.0)
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - target), lambda goal: scale * keras.ops.square(w - goal),
        inner_variables=[w], outer_variables=[target, scale], dynamics=farhox.GradientDescent(0.1))
    result = farhox.ImplicitHG().compute(problem, tf.ones([1], tf.float64), tf.constant(1.0, tf.float64))
    assert_close(result.gradients, [2 * 2.0 * (0.5 - 1.0), 0.25], 1e-9)


@pytest.mark.parametrize("solver", [None, "cg", farhox.ConjugateGradient])
def test_linear_solver_must_be_one(solver):
    with pytest.raises(TypeError, match="linear_solver must be one of farhox' solvers"):
        farhox.ImplicitHG(solver)


@pytest.mark.parametrize("system", ["hessian", 1])
def test_system_must_be_known(system):
    with pytest.raises(ValueError, match='system must be "objective", "dynamics" or None'):
        farhox.ImplicitHG(system=system)


@pytest.mark.parametrize("damping", [-1.0, "1", None])
def test_damping_must_be_a_non_negative_number(damping):
    with pytest.raises(ValueError, match="damping must be a non-negative finite number"):
        farhox.ImplicitHG(damping=damping)

"""Proximal gradient descent: the lasso of scikit-learn, hypergradients on the support, regularizers taken over."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable
from sklearn.linear_model import Lasso
from unrolled import finite_differences, unrolled_hypergradient

import farhox
from farhox.constraints import Simplex
from farhox.dynamics import L1, GroupLasso, NuclearNorm, ProximalGradient
from farhox.hypergradients import DartsHG
from farhox.linear_solvers import GMRES, Direct, FixedPoint

RANDOM = np.random.default_rng(0)
X, X_OUTER = RANDOM.normal(size=(60, 12)), RANDOM.normal(size=(40, 12))
COEFFICIENTS = np.array([2.0, -1.0, 0.5] + [0.0] * 9)
Y, Y_OUTER = X @ COEFFICIENTS + 0.5 * RANDOM.normal(size=60), X_OUTER @ COEFFICIENTS + 0.5 * RANDOM.normal(size=40)
ALPHA = 0.15


def scikit_learn(alpha):
    """The lasso's coefficients and its mean square error on the outer data."""
    w = Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=10 ** 5).fit(X, Y).coef_
    return w, np.mean((X_OUTER @ w - Y_OUTER) ** 2)


def hypergradient_of_scikit_learn(alpha):
    """dE/d log(alpha) by central differences."""
    step = 1e-4
    return (scikit_learn(alpha * np.exp(step))[1] - scikit_learn(alpha * np.exp(-step))[1]) / (2 * step)


def closed_form(alpha):
    """dE/d log(alpha) on the support: w_S(alpha) = (X_S' X_S / n)^-1 (X_S' y / n - alpha sign)."""
    w = scikit_learn(alpha)[0]
    support = w != 0
    x = X[:, support]
    slope = -np.linalg.solve(x.T @ x / len(x), np.sign(w[support]))
    return alpha * 2 / 40 * (X_OUTER @ w - Y_OUTER) @ X_OUTER[:, support] @ slope


def mean_square_error(w):
    return lambda batch: keras.ops.mean((keras.ops.matmul(batch[0], w[:, None])[:, 0] - batch[1]) ** 2)


def lasso(alpha=ALPHA, rate=0.3, **arguments):
    strength = farhox.Hyperparameter(alpha, low=0.0, log=True, name="alpha", dtype="float64")
    w = variable(np.zeros(12), name="w")
    loss = mean_square_error(w)
    return farhox.BilevelProblem(lambda batch: 0.5 * loss(batch), loss, [w], [strength], ProximalGradient(
        rate, penalty=L1(strength), **arguments))


def data(steps):
    return farhox.repeat((X, Y), steps), (X_OUTER, Y_OUTER)


@pytest.mark.one_case
@pytest.mark.parametrize("alpha", [0.02, 0.15, 0.6, 3.0])
def test_the_path_of_the_lasso_is_that_of_scikit_learn(alpha, float64):
    result = lasso(alpha).evaluate(*data(300))
    w, loss = scikit_learn(alpha)
    np.testing.assert_allclose(result.state.variables[0], w, atol=1e-10)
    np.testing.assert_array_equal(result.state.variables[0] == 0, w == 0)
    np.testing.assert_allclose(result.outer_loss, loss, rtol=1e-10)


@pytest.mark.one_case
@pytest.mark.parametrize("method", [
    farhox.ReverseHG(), farhox.ReverseHG(truncation=100), farhox.ForwardHG(),
    farhox.ImplicitHG(FixedPoint(500, tolerance=1e-14)),
    farhox.ImplicitHG(GMRES(12, tolerance=1e-14), system="dynamics"),
    farhox.ImplicitHG(Direct(), system="dynamics")],
    ids=["reverse", "truncated", "forward", "fixed point", "GMRES", "direct"])
def test_the_hypergradient_of_the_lasso_is_that_of_scikit_learns_solution(method, float64):
    result = tf.function(method.compute, autograph=False)(lasso(), *data(250))
    np.testing.assert_allclose(result.gradients[0], closed_form(ALPHA), rtol=1e-8)
    np.testing.assert_allclose(result.gradients[0], hypergradient_of_scikit_learn(ALPHA), rtol=1e-6)


def test_implicit_differentiation_of_the_objective_alone_is_refused(float64):
    with pytest.raises(ValueError, match="rest where the inner gradient is zero. ProximalGradient does not"):
        farhox.ImplicitHG().compute(lasso(), *data(2))
    w, rate = variable(1.0, name="w"), farhox.Hyperparameter(0.1)
    for optimizer in (keras.optimizers.AdamW(), keras.optimizers.SGD(weight_decay=0.1)):
        problem = farhox.BilevelProblem(
            lambda batch: rate() * w ** 2, lambda batch: w ** 2, [w], [rate], farhox.KerasDynamics(optimizer))
        with pytest.raises(ValueError, match="KerasDynamics does not here, because of a penalty or a weight decay"):
            farhox.ImplicitHG().compute(problem, farhox.repeat(np.zeros(1), 2), np.zeros(1))


def regularized(penalty_of_dynamics, l1, l2, **arguments):
    """A network with l1 and l2 strengths, as regularizers or with the l1 part as a penalty of the dynamics."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input([12]),
        keras.layers.Dense(3, "tanh", kernel_regularizer=farhox.L1L2(0.0 if penalty_of_dynamics else l1, l2)),
        keras.layers.Dense(1, kernel_regularizer=farhox.L1L2(l2=0.01))])
    dynamics = ProximalGradient(0.1, penalty=[L1(l1), None, None, None] if penalty_of_dynamics else None)
    return model, farhox.supervised_problem(model, "mse", dynamics, outer_variables=[l1, l2], **arguments)


def learned(initial, name):
    return farhox.Hyperparameter(initial, low=0.0, log=True, name=name, dtype="float64")


@pytest.mark.slow
def test_the_l1_part_of_a_regularizer_is_the_penalty_of_the_proximal_step(float64):
    l1, l2 = learned(0.2, "l1"), learned(0.05, "l2")
    inner_batches, outer_batch = farhox.repeat((X, Y[:, None]), 12), (X_OUTER, Y_OUTER[:, None])
    results = []
    for penalty_of_dynamics in (False, True):
        model, problem = regularized(penalty_of_dynamics, l1, l2)
        results.append(farhox.ReverseHG().compute(problem, inner_batches, outer_batch))
    by_regularizer, by_penalty = results
    assert_close(by_regularizer.state.variables, by_penalty.state.variables, 1e-13)
    assert_close(by_regularizer.gradients, by_penalty.gradients, 1e-12)
    assert np.sum(by_regularizer.state.variables[0] == 0) >= 4
    darts, truncated = (method.compute(problem, inner_batches, outer_batch).gradients for problem, method in (
        (regularized(False, l1, l2)[1], DartsHG(1e-4)), (problem, farhox.ReverseHG(truncation=1))))
    assert_close(darts, truncated, 1e-6)
    model, problem = regularized(False, l1, l2)
    assert_close(by_regularizer.gradients, finite_differences(problem, inner_batches, outer_batch), 1e-7)
    assert_close(by_regularizer.gradients, unrolled_hypergradient(problem, inner_batches, outer_batch), 1e-12)
    # The reported inner loss is that of `fit`: the penalty's value is in it.
    kernel = model.layers[0].kernel.numpy()
    np.testing.assert_allclose(by_regularizer.inner_losses[0] - by_penalty.inner_losses[0],
                               0.2 * np.sum(np.abs(kernel)), rtol=1e-12)


@pytest.mark.slow
def test_a_first_order_proximal_step_keeps_the_derivative_of_its_threshold(float64):
    problem = lasso(first_order=True)
    inner_batches, outer_batch = data(6)
    expected = unrolled_hypergradient(problem, inner_batches, outer_batch)
    assert abs(expected[0]) > 1e-3
    for method in (farhox.ReverseHG(), farhox.ForwardHG()):
        actual = tf.function(method.compute, autograph=False)(problem, inner_batches, outer_batch).gradients
        assert_close(actual, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("kind", [GroupLasso, NuclearNorm])
def test_groups_and_ranks_settle_at_the_closed_form_with_its_hypergradient(kind, float64):
    # With x'x = n the minimum is the proximal map of the least squares solution.
    x = np.linalg.qr(RANDOM.normal(size=(20, 5)))[0] * np.sqrt(20)
    solution = RANDOM.normal(size=(5, 1)) @ RANDOM.normal(size=(1, 3)) + 0.1 * RANDOM.normal(size=(5, 3))
    target = RANDOM.normal(size=(5, 3))
    strength = farhox.Hyperparameter(0.4, low=0.0, log=True, dtype="float64")
    w = variable(np.zeros((5, 3)))
    problem = farhox.BilevelProblem(
        lambda batch: 0.5 * keras.ops.sum((batch[0] @ w - batch[1]) ** 2) / 20,
        lambda batch: keras.ops.sum((w - batch) ** 2), [w], [strength],
        ProximalGradient(0.5, penalty=kind(strength)))
    batches = farhox.repeat((x, x @ solution), 60)

    def closed(value):
        return kind(float(value)).proximal(tf.constant(solution), tf.constant(1.0, tf.float64)).numpy()

    expected = 0.4 * 2 * np.sum((closed(0.4) - target) * (closed(0.4 + 1e-6) - closed(0.4 - 1e-6)) / 2e-6)
    for method in (farhox.ReverseHG(), farhox.ImplicitHG(FixedPoint(200, tolerance=1e-13))):
        result = tf.function(method.compute, autograph=False)(problem, batches, target)
        np.testing.assert_allclose(result.state.variables[0], closed(0.4), atol=1e-12)
        np.testing.assert_allclose(result.gradients[0], expected, rtol=1e-6)


@pytest.mark.slow
def test_a_constraint_as_penalty_is_the_constraint_of_the_variable(float64):
    paths = []
    for as_penalty in (True, False):
        w, rate = variable(np.full(4, 0.25)), farhox.Hyperparameter(0.5, dtype="float64")
        w.constraint = None if as_penalty else Simplex()
        dynamics = ProximalGradient(rate, Simplex()) if as_penalty else farhox.GradientDescent(rate)
        problem = farhox.BilevelProblem(
            lambda batch: keras.ops.sum((w - batch) ** 2), lambda batch: keras.ops.sum(w * batch), [w], [rate],
            dynamics)
        batch = np.array([0.9, 0.3, -0.2, 0.1])
        result = farhox.ReverseHG().compute(problem, farhox.repeat(batch, 3), batch)
        paths.append([*result.state.variables, *result.gradients])
        np.testing.assert_allclose(tf.reduce_sum(result.state.variables[0]), 1.0, rtol=1e-12)
    assert_close(paths[0], paths[1], 1e-14)


@pytest.mark.slow
def test_l1_goes_with_a_lower_bound_of_zero_as_in_the_positive_lasso(float64):
    problem = lasso()
    problem.inner_variables[0].constraint = keras.constraints.NonNeg()
    problem = farhox.BilevelProblem(problem._inner_objective, problem.outer_objective, problem.inner_variables,
                                    problem.outer_variables, ProximalGradient(0.3, penalty=L1(ALPHA)))
    result = problem.evaluate(*data(300))
    expected = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-14, max_iter=10 ** 5, positive=True).fit(X, Y).coef_
    np.testing.assert_allclose(result.state.variables[0], expected, atol=1e-9)


def test_a_learned_l1_strength_under_other_dynamics_is_refused_unless_it_is_asked_for():
    w, strength = keras.Variable([1.0], name="w"), farhox.Hyperparameter(0.1, low=0.0)
    for dynamics in (farhox.GradientDescent(), farhox.KerasDynamics(keras.optimizers.SGD())):
        w.regularizer = farhox.L1L2(l1=strength)
        with pytest.raises(ValueError, match=f"That of 'w' is .*{type(dynamics).__name__}.*ProximalGradient"):
            dynamics.bound_to([w])
        w.regularizer = farhox.L1L2(l1=strength, subgradient=True)
        dynamics.bound_to([w])


@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG(), farhox.ImplicitHG()],
                         ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_learned_l1_strength_that_an_inner_objective_calls_by_itself_is_refused(method, mode):
    strength, w = farhox.Hyperparameter(0.1, low=0.0, name="alpha"), variable(np.ones(2), name="w")

    def problem(penalty):
        def objective(batch):
            return keras.ops.sum((w - batch) ** 2)

        return farhox.BilevelProblem(
            lambda batch: objective(batch) + penalty(w), objective, [w], [strength], farhox.GradientDescent(0.1))

    def compute(penalty):
        zeros = tf.zeros([2], "float64")

        def function():
            return method.compute(problem(penalty), farhox.repeat(zeros, 2), zeros).gradients

        return (function if mode == "eager" else tf.function(function, autograph=False))()

    with pytest.raises(ValueError, match="'alpha' acts by a subgradient.*penalty=farhox.dynamics.L1"):
        compute(farhox.L1L2(l1=strength))
    assert np.all(np.isfinite(compute(farhox.L1L2(l1=strength, subgradient=True))))


def test_an_outer_objective_may_hold_a_learned_l1_strength(float64):
    strength, w = farhox.Hyperparameter(0.1, low=0.0, name="alpha"), variable([2.0, -3.0], name="w")
    penalty = farhox.L1L2(l1=strength)
    problem = farhox.BilevelProblem(lambda _: 0.5 * keras.ops.sum(w ** 2), lambda _: penalty(w), [w], [strength],
                                    farhox.GradientDescent(0.1))
    result = farhox.ReverseHG().compute(problem, farhox.repeat(tf.zeros(1), 1), tf.zeros(1))
    # dE/dstrength = sum |w|; what is learned is z with strength = softplus(z), of derivative 1 - exp(-strength).
    np.testing.assert_allclose(result.gradients[0], 0.9 * 5.0 * (1 - np.exp(-0.1)), rtol=1e-6)


def with_regularizer(regularizer, constraint=None):
    w = variable(np.ones(2), name="w")
    w.regularizer, w.constraint = regularizer, constraint
    return [w]


@pytest.mark.parametrize("make, error, words", [
    (lambda: ProximalGradient(-0.1), ValueError, "learning_rate must be finite and at least 0.0"),
    (lambda: ProximalGradient(0.1, "l1"), TypeError, "penalty must be one of farhox.dynamics' penalties"),
    (lambda: ProximalGradient(0.1, [L1(0.1), 0.1]), TypeError, "penalty must be one of"),
    (lambda: ProximalGradient(0.1, farhox.L1L2(l1=0.1)), TypeError, "penalty must be one of"),
    (lambda: ProximalGradient(0.1).bound_to(with_regularizer(None)), ValueError, "needs a penalty"),
    (lambda: ProximalGradient(0.1).bound_to(with_regularizer(farhox.L1L2(l2=0.1))), ValueError,
     "needs a penalty"),
    (lambda: ProximalGradient(0.1, [L1(0.1)] * 3).bound_to(with_regularizer(None)), ValueError,
     "one entry per inner variable. Received 3 entries for 1"),
    (lambda: ProximalGradient(0.1, L1(0.1)).bound_to(with_regularizer(farhox.L1L2(l1=0.1))), ValueError,
     "one penalty. Received two for 'w'"),
    (lambda: ProximalGradient(0.1).bound_to(with_regularizer(keras.regularizers.L1(0.1))), ValueError,
     "use farhox.L1L2"),
    (lambda: ProximalGradient(0.1, GroupLasso(0.1)).bound_to(
        with_regularizer(None, keras.constraints.NonNeg())), ValueError, "not applied together with a constraint"),
    (lambda: ProximalGradient(0.1, L1(0.1)).bound_to(
        with_regularizer(None, keras.constraints.MaxNorm())), ValueError, "not applied together with a constraint"),
    (lambda: ProximalGradient(farhox.Hyperparameter(np.ones(2)), GroupLasso(0.1)).update(
        [tf.ones(2)], [tf.ones(2)], [], tf.constant(0)), ValueError, "GroupLasso needs one learning rate"),
])
def test_proximal_dynamics_refuse_what_they_cannot_do(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_an_inner_objective_without_the_regularizer_that_is_taken_over_is_refused(float64):
    w, strength = with_regularizer(farhox.L1L2(l1=(l1 := learned(0.1, "l1"))))[0], l1
    problem = farhox.BilevelProblem(lambda batch: keras.ops.sum(w ** 2), lambda batch: keras.ops.sum(w ** 2), [w],
                                    [strength], ProximalGradient(0.1))
    with pytest.raises(ValueError, match=r"must add the regularizer: sum.model.losses.. It does not for 'w'"):
        problem.step(problem.initial_state(), problem.outer_values(), tf.zeros(1))

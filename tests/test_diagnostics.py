"""check_hypergradient and compare_hypergradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox


@pytest.fixture
def quadratic():
    """L = (w - lam)^2 by gradient descent, E = (w - 1)^2 / 2: every method's result is known."""
    w, lam, rate = (keras.Variable(np.float64(value), dtype="float64", name=name)
                    for name, value in (("w", 3.0), ("lam", 0.5), ("rate", 0.1)))
    return farhox.BilevelProblem(lambda _: (w - lam) ** 2, lambda _: 0.5 * (w - 1) ** 2, [w], [lam, rate],
                                 dynamics=farhox.GradientDescent(rate))


BATCHES, OUTER = farhox.repeat(tf.zeros([1]), 7), tf.zeros([1])


class WrongHG(farhox.ReverseHG):
    """A method with an error of 10 %."""

    def _compute(self, *args):
        result = super()._compute(*args)
        return result._replace(gradients=[1.1 * gradient for gradient in result.gradients])


def test_check_confirms_an_exact_hypergradient(quadratic):
    check = farhox.check_hypergradient(quadratic, BATCHES, OUTER, farhox.ReverseHG())
    assert check.maximum_error < 1e-6
    assert [entry.name for entry in check.entries] == ["lam", "rate"]
    assert check.entries[0].hypergradient == pytest.approx(0.0191944372224, rel=1e-9)
    assert "rate" in str(check) and "largest relative error" in str(check)


def test_check_exposes_a_wrong_hypergradient(quadratic):
    check = farhox.check_hypergradient(quadratic, BATCHES, OUTER, WrongHG())
    assert check.maximum_error == pytest.approx(0.1 / 1.1, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_derivative_of_zero_is_no_error_of_100_percent(dtype):
    """A shift of all logits changes no probability: both derivatives are rounding."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(30, 4)).astype(dtype), np.arange(30) % 3
    scale, shift, w = (keras.Variable(np.asarray(value, dtype), dtype=dtype, name=name) for name, value in (
        ("scale", 1.0), ("shift", 0.1), ("w", random.normal(size=(4, 3)))))

    def loss(batch):
        logits = scale * keras.ops.matmul(batch[0], w) + shift
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(batch[1], logits, from_logits=True))

    problem = farhox.BilevelProblem(loss, loss, [w], [scale, shift], farhox.GradientDescent(0.1))
    check = farhox.check_hypergradient(problem, farhox.repeat((x, y), 5), (x, y), farhox.ReverseHG())
    assert check.maximum_error < {"float64": 1e-6, "float32": 1e-2}[dtype]
    assert check.entries[1].error == 0.0 and not check.entries[1].chaotic and not check.remarks


@pytest.mark.slow
def test_a_training_in_which_no_step_agrees_is_called_chaotic():
    """The logistic map: a change of 1e-10 is of the order of one after 60 steps."""
    w, rate = (keras.Variable(np.float64(value), dtype="float64", name=name)
               for name, value in (("w", 0.3), ("r", 3.9)))

    def to_next(_):  # One step of size one leads from w to r w (1 - w).
        return w ** 2 / 2 - rate * (w ** 2 / 2 - w ** 3 / 3)

    problem = farhox.BilevelProblem(to_next, lambda _: w * 1.0, [w], [rate], farhox.GradientDescent(1.0))
    check = farhox.check_hypergradient(problem, farhox.repeat(tf.zeros([1]), 120), OUTER, farhox.ReverseHG())
    assert check.entries[0].chaotic and np.isnan(check.maximum_error)
    assert "chaotic: no step agrees" in str(check) and "1 of 1 entries are chaotic" in str(check)
    short = farhox.check_hypergradient(problem, farhox.repeat(tf.zeros([1]), 6), OUTER, farhox.ReverseHG())
    assert not short.entries[0].chaotic and short.maximum_error < 1e-6


def test_check_names_draws_in_an_objective_as_a_likely_cause():
    w, lam = (keras.Variable(np.float64(value), dtype="float64", name=name)
              for name, value in (("w", 1.0), ("lam", 0.5)))
    problem = farhox.BilevelProblem(
        lambda _: (w - lam) ** 2, lambda _: (w - tf.random.uniform([], dtype=tf.float64)) ** 2, [w], [lam])
    check = farhox.check_hypergradient(problem, BATCHES, OUTER, farhox.ReverseHG())
    assert any("draw random numbers" in remark for remark in check.remarks)


@pytest.mark.slow
def test_check_names_stopped_gradients_as_a_likely_cause_of_an_error():
    w, lam = (keras.Variable(np.float64(value), dtype="float64", name=name)
              for name, value in (("w", 1.0), ("lam", 0.5)))
    problem = farhox.BilevelProblem(
        lambda _: (w - lam) ** 2, lambda _: w ** 2 + 3.0 * tf.stop_gradient(w * 1.0), [w], [lam],
        stop_gradient="tensorflow")
    check = farhox.check_hypergradient(problem, BATCHES, OUTER, farhox.ReverseHG())
    assert check.maximum_error > 0.1 and any("tf.stop_gradient in the outer objective" in r for r in check.remarks)
    assert "Likely cause" in str(check)


def test_a_step_that_is_given_is_the_only_one(quadratic):
    check = farhox.check_hypergradient(quadratic, BATCHES, OUTER, farhox.ReverseHG(), step_size=1e-3)
    assert [entry.step_size for entry in check.entries] == [1e-3, 1e-3] and 1e-4 < check.maximum_error < 1e-2


def test_check_changes_no_variable(quadratic):
    before = [variable.numpy() for variable in quadratic.inner_variables + quadratic.outer_variables]
    farhox.check_hypergradient(quadratic, BATCHES, OUTER, farhox.ReverseHG())
    assert before == [variable.numpy() for variable in quadratic.inner_variables + quadratic.outer_variables]


@pytest.mark.slow
def test_check_draws_entries_of_large_variables():
    w = keras.Variable(np.zeros(3), dtype="float64", name="w")
    targets = keras.Variable(np.arange(3.0), dtype="float64", name="targets")
    problem = farhox.BilevelProblem(
        lambda _: keras.ops.sum((w - targets) ** 2), lambda _: keras.ops.sum(w ** 3), [w], [targets],
        dynamics=farhox.GradientDescent(0.1))
    check = farhox.check_hypergradient(problem, BATCHES, OUTER, farhox.ReverseHG(), max_entries=2, seed=1)
    assert len(check.entries) == 2 and check.maximum_error < 1e-6


def test_compare_reports_agreement_cost_and_blind_spots(quadratic):
    comparison = farhox.compare_hypergradients(
        quadratic, BATCHES, OUTER,
        [farhox.ReverseHG(), farhox.ReverseHG(truncation=1), farhox.ForwardHG(), farhox.ImplicitHG()])
    exact, truncated, forward, implicit = comparison.reports
    assert exact.name == "ReverseHG()" and truncated.name == "ReverseHG(truncation=1)"
    assert exact.cosine == pytest.approx(1) and exact.relative_difference == 0
    assert forward.relative_difference < 1e-12
    assert truncated.relative_difference > 0.1
    assert exact.seconds > 0 and exact.diagnostics["finite"] == 1
    assert "'rate'" in implicit.error
    assert "ImplicitHG()" in str(comparison) and "nan" not in str(comparison)


def test_compare_takes_names(quadratic):
    comparison = farhox.compare_hypergradients(quadratic, BATCHES, OUTER, {"exact": farhox.ReverseHG()}, repeats=1)
    assert [report.name for report in comparison.reports] == ["exact"]


@pytest.mark.parametrize("arguments, error, message", [
    ({"max_entries": 0}, ValueError, "max_entries must be a positive integer"),
    ({"step_size": -1.0}, ValueError, "step_size must be a positive"),
    ({"hypergradient": "reverse"}, TypeError, "must be one of farhox' hypergradients"),
])
def test_check_refuses_bad_input(quadratic, arguments, error, message):
    arguments = {"hypergradient": farhox.ReverseHG(), **arguments}
    with pytest.raises(error, match=message):
        farhox.check_hypergradient(quadratic, BATCHES, OUTER, **arguments)


@pytest.mark.parametrize("methods, repeats, error, message", [
    ([], 3, ValueError, "at least one method"),
    ([farhox.ReverseHG()], 0, ValueError, "repeats must be a positive integer"),
    ({"x": 3}, 1, TypeError, "must be one of farhox' hypergradients"),
])
def test_compare_refuses_bad_input(quadratic, methods, repeats, error, message):
    with pytest.raises(error, match=message):
        farhox.compare_hypergradients(quadratic, BATCHES, OUTER, methods, repeats=repeats)

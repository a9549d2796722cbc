"""health: convergence, contraction, truncation bias, zeros and advice on problems where they are known."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.hypergradients import EpisodesHG
from farhox.insight import health

OUTER = tf.zeros([1])


def quadratic(rate=0.1, outer_of=None):
    """L = (w - lam)^2: one step contracts by 1 - 2 rate."""
    w, lam = (keras.Variable(np.float64(value), dtype="float64", name=name)
              for name, value in (("w", 3.0), ("lam", 0.5)))
    return farhox.BilevelProblem(lambda _: (w - lam) ** 2, lambda _: outer_of(w) if outer_of else 0.5 * (w - 1) ** 2,
                                 [w], [lam], dynamics=farhox.GradientDescent(rate))


def report(method, steps=7, **settings):
    return health(quadratic(**settings), farhox.repeat(tf.zeros([1]), steps), OUTER, method)


def test_contraction_and_truncation_bias_are_those_of_the_quadratic():
    found = report(farhox.ReverseHG(truncation=3))
    assert found.contraction == pytest.approx(0.8, rel=1e-9)
    assert found.truncation_bias == pytest.approx(0.8 ** 3, rel=1e-9)
    assert found.first_gradient_norm == pytest.approx(5.0) and found.first_loss == pytest.approx(6.25)
    assert found.last_gradient_norm == pytest.approx(5.0 * 0.8 ** 7)
    assert any("truncation=11" in sentence for sentence in found.advice)  # 0.8^11 < 0.1 < 0.8^10


@pytest.mark.slow
def test_convergence_decides_what_is_said_of_implicit_and_reverse():
    assert any("assumes a converged" in sentence for sentence in report(farhox.ImplicitHG()).advice)
    converged = report(farhox.ImplicitHG(), steps=100)
    assert converged.converged and converged.solver_residual < 1e-6 and not converged.advice
    assert any("ImplicitHG or a truncation" in sentence for sentence in report(farhox.ReverseHG(), steps=100).advice)


@pytest.mark.slow
def test_divergence_is_reported_not_hidden():
    found = report(farhox.ReverseHG(), steps=2000, rate=2.0)
    assert "not finite" in found.gradients[0].remark and not found.converged
    assert found.contraction == pytest.approx(3.0)
    assert "diverged" in found.advice[0] and "stretches an adjoint by 3" in found.advice[1]


@pytest.mark.slow
def test_a_growing_inner_loss_asks_for_a_smaller_rate():
    found = report(farhox.ReverseHG(), rate=1.1)
    assert any("inner loss grew" in sentence for sentence in found.advice)


def test_a_zero_hypergradient_says_why():
    found = report(farhox.ReverseHG(), outer_of=lambda w: 0.0 * w)
    assert found.gradients[0].norm == 0 and "its derivative vanishes" in found.gradients[0].remark
    explicit = report(farhox.ReverseHG(truncation=0))
    assert "only the explicit dependence" in explicit.gradients[0].remark


@pytest.mark.parametrize("count", [
    lambda w: -keras.ops.mean(keras.metrics.binary_accuracy(tf.ones([1, 1]), w * tf.ones([1, 1], tf.float64))),
    lambda w: tf.constant(0.0, tf.float64)], ids=["accuracy", "constant"])
def test_an_outer_objective_without_a_derivative_is_named_as_that(count):
    for compute in (lambda: report(farhox.ReverseHG(), outer_of=count),
                    lambda: report(farhox.ImplicitHG(), outer_of=count),
                    lambda: report(farhox.ForwardHG(), outer_of=count)):
        with pytest.raises(ValueError, match="derivative"):
            compute()


def test_entries_that_no_batch_reached_are_counted():
    weights = farhox.ExampleWeights(4, dtype="float64")
    w = keras.Variable(1.0, dtype="float64", name="w")
    problem = farhox.BilevelProblem(
        lambda index: tf.reduce_sum(weights(index) * (w - 2.0) ** 2), lambda _: (w - 1.0) ** 2, [w], [weights],
        dynamics=farhox.GradientDescent(0.1))
    found = health(problem, farhox.repeat(tf.constant([0, 2]), 3), OUTER, farhox.ReverseHG())
    assert found.gradients[0].remark == "2 of 4 entries are zero"


@pytest.mark.slow
def test_many_directions_advise_reverse_mode():
    lam = keras.Variable(np.ones(11), dtype="float64", name="lam")
    w = keras.Variable(np.zeros(11), dtype="float64", name="w")
    problem = farhox.BilevelProblem(
        lambda _: tf.reduce_sum((w - lam) ** 2), lambda _: tf.reduce_sum(w ** 2), [w], [lam])
    found = health(problem, farhox.repeat(OUTER, 2), OUTER, farhox.ForwardHG())
    assert any("carries 11 directions" in sentence for sentence in found.advice)


def test_an_unsolved_linear_system_is_reported():
    lam, w = (keras.Variable(np.ones(6), dtype="float64", name=name) for name in ("lam", "w"))
    scales = tf.constant([1e-4, 1e-2, 0.1, 1.0, 3.0, 9.0], tf.float64)
    problem = farhox.BilevelProblem(
        lambda _: tf.reduce_sum(scales * (w - 2 * lam) ** 2), lambda _: tf.reduce_sum(w), [w], [lam])
    found = health(problem, farhox.repeat(OUTER, 2), OUTER, farhox.ImplicitHG(farhox.ConjugateGradient(2)))
    assert any("linear system is not solved" in sentence for sentence in found.advice)


@pytest.mark.slow
def test_the_report_reads_as_text_and_compare_prints_it_per_method():
    text = str(report(farhox.ReverseHG(truncation=3)))
    assert "inner gradient norm  5 -> 1.05 (not converged)" in text and "truncation bias" in text
    comparison = farhox.compare_hypergradients(
        quadratic(), farhox.repeat(tf.zeros([1]), 7), OUTER, [farhox.ReverseHG(), farhox.ImplicitHG()], repeats=1)
    assert str(comparison).count("inner gradient norm") == 2 and "solver residual" in str(comparison)
    assert comparison.reports[1].health.contraction == pytest.approx(0.8)


def test_a_result_that_is_there_is_not_computed_again():
    problem, batches = quadratic(), farhox.repeat(tf.zeros([1]), 7)
    result = farhox.ReverseHG().compute(problem, batches, OUTER)
    doubled = result._replace(gradients=[2 * gradient for gradient in result.gradients])
    found = health(problem, batches, OUTER, farhox.ReverseHG(), result=doubled)
    assert found.gradients[0].norm == pytest.approx(2 * float(result.gradients[0]))


@pytest.mark.parametrize("method", ["reverse", EpisodesHG(farhox.ReverseHG())], ids=["string", "episodes"])
def test_health_refuses_what_is_no_method_for_one_problem(method):
    with pytest.raises(TypeError, match="for one inner problem"):
        health(quadratic(), farhox.repeat(OUTER, 2), OUTER, method)

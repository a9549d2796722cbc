"""EvoGradHG against a draw worked out by hand, its average, its draws and what it cannot see."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    CURVATURE,
    GOAL,
    TOLERANCE,
    assert_close,
    assert_identical,
    model_and_data,
    network_problem,
    scalar_quadratic,
    variable,
)

import farhox
from farhox.hypergradients import EvoGradHG

dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
NO_BATCH = (tf.zeros([1]), tf.zeros([]))


def resting_quadratic(dtype="float64", **other):
    """Inner (w - λ)^2 / 2, outer (w - 1)^2 / 2 at w = 0, which does not move; λ = 1/2."""
    w, target = variable(0.0, dtype, "w"), variable(0.5, dtype, "target")
    return farhox.BilevelProblem(
        lambda batch: keras.ops.square(w - target) / 2,
        lambda batch: keras.ops.square(w - 1.0) / 2,
        inner_variables=[w], outer_variables=[target], dynamics=farhox.GradientDescent(0.0), **other)


@pytest.mark.one_case
@dtypes
def test_two_opposite_signs_have_the_value_worked_out_by_hand(dtype):
    result = EvoGradHG(perturbations=2, sigma=0.1, temperature=0.05, seed=0).compute(
        resting_quadratic(dtype), *NO_BATCH)
    weight = 1 / (1 + np.exp(-2.0))
    mixture = 0.1 * (2 * weight - 1)
    expected = (mixture - 1) * weight * (1 - weight) * 0.2 ** 2 / 0.05
    np.testing.assert_allclose(expected, -0.0775978682, rtol=1e-9)
    assert_close(result.gradients, [expected], TOLERANCE[dtype])
    assert_close([result.diagnostics["mixture_loss"]], [(mixture - 1) ** 2 / 2], TOLERANCE[dtype])
    assert_close([result.outer_loss], [0.5], TOLERANCE[dtype])


def test_at_the_start_the_copies_are_those_of_the_state_and_the_batch_before_the_first_step():
    w, target = variable(0.0, "float64", "w"), variable(0.5, "float64", "target")
    problem = farhox.BilevelProblem(
        lambda batch: batch * keras.ops.square(w - target) / 2, lambda batch: keras.ops.square(w - 1.0) / 2,
        inner_variables=[w], outer_variables=[target], dynamics=farhox.GradientDescent(0.1))
    method = EvoGradHG(sigma=0.1, seed=0, at_start=True)
    result = method.compute(problem, tf.constant([1.0, 3.0], "float64"), tf.zeros([]))
    at_rest = EvoGradHG(sigma=0.1, seed=0).compute(resting_quadratic(), *NO_BATCH)
    assert_close(result.gradients, at_rest.gradients, 1e-12)
    assert_close([result.outer_loss], [0.5], 1e-12)
    # The run is that of both steps: the distance 1/2 is shortened by the factors 0.9 and 0.7.
    assert_close(result.state.variables, [0.5 - 0.5 * 0.9 * 0.7], 1e-12)


@pytest.mark.one_case
@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("perturbations", [2, 5])
def test_mean_over_draws_is_that_of_one_differentiated_step(perturbations, sign):
    """One gradient step of size sigma^2 (1 - 1/K) / temperature, for small sigma."""
    sigma, temperature = 1e-3, 0.05
    method = EvoGradHG(perturbations, sigma, temperature, sign=sign)
    problem = resting_quadratic()
    compute = tf.function(lambda draw: method.compute(problem, *NO_BATCH, iteration=draw).gradients[0], autograph=False)
    draws = [float(compute(tf.constant(draw))) for draw in range(400)]
    expected = -sigma ** 2 * (1 - 1 / perturbations) / temperature
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - expected) < 4 * error
    assert error < 0.1 * abs(expected)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("strength", [0.1, 0.5, 2.0])
def test_direction_is_that_of_the_hypergradient(strength):
    """Inner (w - 1)^2 + λ w^2, outer (w - 1/2)^2, whose hypergradient at the minimum is (λ - 1) / (λ + 1)^3."""
    w, penalty = variable(1 / (1 + strength)), variable(strength)
    problem = farhox.BilevelProblem(
        lambda batch: keras.ops.square(w - 1) + penalty * keras.ops.square(w),
        lambda batch: keras.ops.square(w - 0.5),
        inner_variables=[w], outer_variables=[penalty], dynamics=farhox.GradientDescent(0.1))
    method = EvoGradHG(perturbations=100, sigma=0.3, temperature=0.5, sign=False)
    compute = tf.function(lambda draw: method.compute(problem, *NO_BATCH, iteration=draw).gradients[0], autograph=False)
    mean = np.mean([float(compute(tf.constant(draw))) for draw in range(100)])
    assert np.sign(mean) == np.sign((strength - 1) / (strength + 1) ** 3)


@pytest.mark.slow
def test_gradient_is_that_of_the_mixture_of_a_network(float64):
    """Finite differences in λ of the outer loss at the mixture, with w_T held fixed: the same draws are made again."""
    case = trained_network(rate=0.0)
    problem = case.problem
    method = EvoGradHG(perturbations=3, sigma=0.05, temperature=0.05, seed=4)
    compute = tf.function(
        lambda state: method.compute(problem, case.inner_batches, case.outer_batch, state=state),
        autograph=False)
    state = problem.initial_state()
    result = compute(state)
    for v, gradient in zip(problem.outer_variables, result.gradients):
        value, entry = np.array(v), (0,) * len(v.shape)
        losses = []
        for distance in (1e-5, -1e-5):
            moved = value.copy()
            moved[entry] += distance
            v.assign(moved)
            losses.append(float(compute(state).diagnostics["mixture_loss"]))
        v.assign(value)
        np.testing.assert_allclose((losses[0] - losses[1]) / 2e-5, np.array(gradient)[entry], rtol=1e-6)


@pytest.mark.slow
def test_run_is_that_of_the_inner_training(float64):
    case = trained_network()
    result = EvoGradHG().compute(case.problem, case.inner_batches, case.outer_batch)
    evaluation = case.problem.evaluate(case.inner_batches, case.outer_batch)
    assert_close([result.outer_loss, result.inner_losses], [evaluation.outer_loss, evaluation.inner_losses], 1e-12)
    assert_close(result.state.variables, evaluation.state.variables, 1e-12)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.skipif(
    tf.__version__.startswith("2.18."), reason="XLA of TensorFlow 2.18 cannot compile the gradient of tf.map_fn"))])
def test_compiled_computation_is_the_eager_one(jit_compile, float64):
    case = trained_network("Dense")  # Keras' dropout draws other masks under XLA.
    method = EvoGradHG(sigma=0.05)
    compiled = tf.function(lambda: method.compute(*case[:3]), autograph=False, jit_compile=jit_compile)()
    assert_close(compiled.gradients, method.compute(*case[:3]).gradients, 1e-9)


@pytest.mark.slow
def test_draws_follow_from_the_seed_and_the_number_of_the_hyper_iteration(float64):
    case = trained_network("Dense")
    method = EvoGradHG(sigma=0.1)
    first = method.compute(*case[:3])
    second = method.compute(*case[:3], iteration=1)
    assert second.gradients[0] != first.gradients[0]
    assert_identical(method.compute(*case[:3], iteration=0), first)
    assert_identical(method.compute(*case[:3], iteration=tf.constant(1)), second)
    assert EvoGradHG(sigma=0.1, seed=3).compute(*case[:3]).gradients[0] != first.gradients[0]


@pytest.mark.slow
def test_hyper_optimizer_draws_anew_in_each_iteration_and_goes_on_after_a_restart(tmp_path):
    model, inner_batches, outer_batch = model_and_data("Dense")
    strength = farhox.Hyperparameter(0.1, low=0.0, log=True, name="strength")

    def optimizer():
        keras.utils.set_random_seed(1)
        model.set_weights(weights)
        strength.assign(0.1)
        problem = farhox.BilevelProblem(
            lambda batch: loss(batch) + strength() * sum(keras.ops.sum(w ** 2) for w in model.trainable_variables),
            loss, model.trainable_variables, [strength], farhox.GradientDescent(0.1))
        result = farhox.HyperOptimizer(problem, EvoGradHG(sigma=0.05))
        result.compile(keras.optimizers.Adam(0.1))
        return result

    def loss(batch):
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(
            batch[1], model(batch[0], training=False), from_logits=True))

    weights = model.get_weights()
    whole = optimizer()
    gradients = [whole.step(inner_batches, outer_batch).gradients[0].numpy() for _ in range(4)]
    assert len(set(gradients)) == 4
    half = optimizer()
    for _ in range(2):
        half.step(inner_batches, outer_batch)
    half.save_weights(tmp_path / "half.weights.h5")
    resumed = optimizer()
    resumed.load_weights(tmp_path / "half.weights.h5")
    assert [resumed.step(inner_batches, outer_batch).gradients[0].numpy() for _ in range(2)] == gradients[2:]


@pytest.mark.one_case
@pytest.mark.parametrize("outer, name", [(("target", "rate"), "rate"), (("target", "initial"), "w")])
def test_what_acts_through_the_path_is_an_error_that_names_it(outer, name):
    with pytest.raises(ValueError, match=f"depends on '{name}'. EvoGradHG sees .*use ReverseHG or ForwardHG"):
        EvoGradHG().compute(*scalar_quadratic(outer=outer)[:3])


def test_explicit_dependence_of_the_outer_objective_counts():
    w, scale = variable(3.0), variable(2.0)
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w), lambda goal: scale * keras.ops.square(w - goal),
        inner_variables=[w], outer_variables=[scale], dynamics=farhox.GradientDescent(0.1))
    result = EvoGradHG().compute(problem, tf.constant([CURVATURE], tf.float64), tf.constant(GOAL, tf.float64))
    assert_close(result.gradients, [result.diagnostics["mixture_loss"] / 2.0], 1e-12)


@pytest.mark.parametrize("argument, value, rule", [
    ("perturbations", 1, "perturbations must be an integer of at least 2"),
    ("perturbations", 2.0, "perturbations must be an integer of at least 2"),
    ("sigma", 0.0, "sigma must be a positive finite number"),
    ("sigma", "small", "sigma must be a positive finite number"),
    ("temperature", -1.0, "temperature must be a positive finite number"),
    ("temperature", float("inf"), "temperature must be a positive finite number"),
    ("seed", 0.5, "seed must be an integer"),
])
def test_arguments_out_of_range_are_errors(argument, value, rule):
    with pytest.raises(ValueError, match=rule):
        EvoGradHG(**{argument: value})


def trained_network(name="BatchNormalization", rate=0.3):
    """A network with dropout and batch norm unless named; L2 strength and weights of the examples are learned."""
    case = network_problem(name, extra=[keras.layers.Dropout(0.5)] if name == "BatchNormalization" else [])
    problem = case.problem
    return case._replace(problem=farhox.BilevelProblem(
        problem._inner_objective, problem._outer_objective, problem.inner_variables, problem.outer_variables[1:],
        farhox.GradientDescent(rate), problem.state_variables))

"""Inner optimizers: the path of Keras' own, settings of every kind, derivatives where roots have none."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from unrolled import finite_differences

import farhox

RATE = 2.0 ** -6  # Exact in float32, the type in which a Keras optimizer keeps its learning rate.


def convolutional_problem(dynamics):
    """A small float64 network on random images, its batches, and the problem; the outer variable plays no part."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input([6, 6, 1]), keras.layers.Conv2D(3, 3, activation="tanh", dtype="float64"),
        keras.layers.Flatten(dtype="float64"), keras.layers.Dense(4, dtype="float64")])
    generator = np.random.default_rng(1)
    batches = [(generator.normal(size=[8, 6, 6, 1]), generator.integers(0, 4, size=[8])) for _ in range(12)]

    def loss(batch):
        logits = model(batch[0], training=True)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits))

    problem = farhox.BilevelProblem(
        loss, loss, model.trainable_variables, [farhox.Hyperparameter(0.1)], dynamics=dynamics)
    return problem, batches, loss


# Keras rounds a setting to float32 before it widens it to the variable's type, so that these are powers of two.
@pytest.mark.parametrize("dynamics, keras_optimizer", [
    (lambda: farhox.GradientDescent(RATE), lambda: keras.optimizers.SGD(RATE)),
    (lambda: farhox.Momentum(RATE, 0.875), lambda: keras.optimizers.SGD(RATE, momentum=0.875)),
    (lambda: farhox.Momentum(RATE, 0.75, nesterov=True),
     lambda: keras.optimizers.SGD(RATE, momentum=0.75, nesterov=True)),
    (lambda: farhox.Adam(RATE, beta_1=0.875, beta_2=0.984375, epsilon=2.0 ** -23),
     lambda: keras.optimizers.Adam(RATE, beta_1=0.875, beta_2=0.984375, epsilon=2.0 ** -23)),
    pytest.param(lambda: farhox.Adam(RATE, beta_1=0.75, beta_2=0.9375, epsilon=2.0 ** -10),
                 lambda: keras.optimizers.Adam(RATE, beta_1=0.75, beta_2=0.9375, epsilon=2.0 ** -10),
                 marks=pytest.mark.slow),
], ids=["sgd", "momentum", "nesterov", "adam", "adam with other settings"])
def test_every_step_equals_that_of_the_keras_optimizer(dynamics, keras_optimizer):
    problem, batches, loss = convolutional_problem(dynamics())
    optimizer = keras_optimizer()
    state, outer = problem.initial_state(), problem.outer_values()
    for batch in batches:
        state = problem.step(state, outer, batch).state
        with tf.GradientTape() as tape:
            value = loss(batch)
        gradients = tape.gradient(value, [variable.value for variable in problem.inner_variables])
        optimizer.apply(gradients, problem.inner_variables)
        for tensor, variable in zip(state.variables, problem.inner_variables):
            np.testing.assert_allclose(tensor, variable.numpy(), rtol=1e-12, atol=1e-12)
    assert state.step.numpy() == len(batches)


@pytest.mark.parametrize("dynamics, keras_optimizer", [
    (farhox.GradientDescent, keras.optimizers.SGD), (farhox.Adam, keras.optimizers.Adam)])
def test_default_settings_are_those_of_keras(dynamics, keras_optimizer):
    config = keras_optimizer().get_config()
    for field in dataclasses.fields(dynamics):
        if field.name != "first_order":
            np.testing.assert_allclose(getattr(dynamics(), field.name), config[field.name], rtol=1e-7)


def settings():
    """Settings by kind, with the values that they must have in the steps 0, 1 and 2."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.5, 0.25, 0.125])
    strength = farhox.Hyperparameter(0.25, low=0.0, dtype="float64")
    return {
        "float": (0.3, [0.3] * 3),
        "integer": (1, [1.0] * 3),
        "numpy": (np.float32(0.5), [0.5] * 3),
        "keras.Variable": (keras.Variable(0.25, dtype="float32"), [0.25] * 3),
        "Hyperparameter": (strength, [0.25] * 3),
        "LearnedSchedule": (farhox.LearnedSchedule(3, [0.3, 0.2, 0.1], dtype="float64"), [0.3, 0.2, 0.1]),
        "LearningRateSchedule": (schedule, [0.5, 0.25, 0.125]),
        "callable to a tensor": (lambda step: strength() / tf.cast(step + 1, tf.float64), [0.25, 0.125, 0.25 / 3]),
        "callable to a float": (lambda step: 0.7, [0.7] * 3),
    }


@pytest.mark.covering
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", list(settings()))
def test_settings_of_every_kind_have_their_value_at_each_step(kind, compiled):
    setting, expected = settings()[kind]
    update = farhox.GradientDescent(setting).update
    update = tf.function(update, autograph=False) if compiled else update
    for step, rate in enumerate(expected):
        variables, _ = update([tf.constant([2.0], tf.float64)], [tf.constant([1.0], tf.float64)], [],
                              tf.constant(step, tf.int64))
        np.testing.assert_allclose(variables[0], [1.0 - 2.0 * rate], rtol=1e-14)


def test_a_list_of_learning_rates_gives_each_inner_variable_its_own():
    kinds = settings()
    w = [tf.constant(1.0, tf.float64)] * len(kinds)
    g = [tf.constant(2.0, tf.float64)] * len(kinds)
    rates = [setting for setting, _ in kinds.values()]
    step = tf.constant(1, tf.int64)
    expected = [1.0 - 2.0 * values[1] for _, values in kinds.values()]
    for dynamics in (farhox.GradientDescent(rates), farhox.Momentum(rates, 0.0)):
        variables, _ = dynamics.update(g, w, dynamics.initial_slots(w), step)
        np.testing.assert_allclose(variables, expected, rtol=1e-14)
    # Adam's first step goes by the learning rate in the direction of the gradient's sign.
    adam = farhox.Adam(rates, epsilon=0.0)
    variables, _ = adam.update(g, w, adam.initial_slots(w), tf.constant(0, tf.int64))
    np.testing.assert_allclose(variables, [1.0 - values[0] for _, values in kinds.values()], rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_list_of_momenta_gives_each_inner_variable_its_own(nesterov):
    kinds = settings()
    w, g = [tf.constant(1.0, tf.float64)] * len(kinds), [tf.constant(2.0, tf.float64)] * len(kinds)
    dynamics = farhox.Momentum(0.1, [setting for setting, _ in kinds.values()], nesterov)
    variables, slots = dynamics.update(g, w, [tf.constant(3.0, tf.float64)] * len(kinds), tf.constant(1, tf.int64))
    expected = np.array([values[1] * 3.0 + 2.0 for _, values in kinds.values()])
    np.testing.assert_allclose(slots, expected, rtol=1e-14)
    if nesterov:
        expected = np.array([values[1] for _, values in kinds.values()]) * expected + 2.0
    np.testing.assert_allclose(variables, 1.0 - 0.1 * expected, rtol=1e-14)


def quadratic(make_dynamics, outer_variables, size=1):
    """L = 1/2 |(1, 2, ...) (w - 0.5)|^2, E = 1/2 |w - 1|^2, w_0 = 3 in float64; scalars for size 1."""
    w = keras.Variable(np.full([size], 3.0), dtype="float64", name="w")
    scale = tf.range(1.0, size + 1.0, dtype=tf.float64)
    return farhox.BilevelProblem(
        lambda batch: 0.5 * tf.reduce_sum(tf.square(scale * (w - 0.5))) * batch[0],
        lambda batch: 0.5 * tf.reduce_sum(tf.square(w - 1.0)),
        [w], outer_variables, dynamics=make_dynamics)


DATA = tf.ones([5, 1], tf.float64), tf.zeros([1], tf.float64)


def compute(problem):
    return farhox.ReverseHG().compute(problem, *DATA)


def learned(initial, **bounds):
    return farhox.Hyperparameter(initial, dtype="float64", **bounds)


def learned_dynamics(kind):
    """Dynamics with learned settings of every kind, and the outer variables."""
    rate = learned(0.1, low=0.0)
    if kind == "momentum":
        momentum = learned(0.5, low=0.0, high=1.0)
        return farhox.Momentum(rate, momentum), [rate, momentum]
    if kind == "nesterov":
        momentum = learned(0.5, low=0.0, high=1.0)
        return farhox.Momentum(rate, momentum, nesterov=True), [rate, momentum]
    if kind == "adam":
        others = [learned(0.8, low=0.0, high=1.0), learned(0.9, low=0.0, high=1.0), learned(1e-2, low=0.0)]
        return farhox.Adam(rate, *others), [rate, *others]
    if kind == "schedule":
        rate = farhox.LearnedSchedule(5, [0.1, 0.2, 0.05, 0.1, 0.02], dtype="float64")
    elif kind == "variable":
        rate = keras.Variable(0.1, dtype="float64")
    elif kind == "per entry":
        rate = learned([0.1, 0.2], low=0.0)
    elif kind == "callable":
        return farhox.GradientDescent(lambda step: rate() / tf.cast(step + 1, tf.float64)), [rate]
    return farhox.GradientDescent([rate] if kind == "list" else rate), [rate]


@pytest.mark.parametrize("kind", ["adam", "schedule", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (
    "momentum", "list", "nesterov", "variable", "per entry", "callable"))])
def test_hypergradients_of_settings_equal_finite_differences(kind):
    dynamics, outer_variables = learned_dynamics(kind)
    problem = quadratic(dynamics, outer_variables, size=2)
    expected = finite_differences(problem, *DATA)
    assert all(np.all(np.abs(values) > 1e-6) for values in expected)
    assert_close(compute(problem).gradients, expected, 1e-8)


def test_first_order_stops_the_gradient_through_the_inner_gradient():
    # w_T = w_0 - rate * (sum of the inner gradients), which count as constants.
    rate = keras.Variable(0.1, dtype="float64")
    problem = quadratic(farhox.GradientDescent(rate, first_order=True), [rate])
    gradients, w = [], 3.0
    for _ in range(5):
        gradients.append(w - 0.5)
        w -= 0.1 * gradients[-1]
    np.testing.assert_allclose(compute(problem).gradients[0], -(w - 1.0) * sum(gradients), rtol=1e-12)


@pytest.mark.one_case
@pytest.mark.parametrize("make", [farhox.GradientDescent, farhox.Momentum, farhox.Adam])
def test_first_order_changes_the_hypergradient_and_not_the_path(make):
    rate = keras.Variable(0.1, dtype="float64")
    full, first = (compute(quadratic(make(rate, first_order=flag), [rate])) for flag in (False, True))
    assert full.outer_loss.numpy() == first.outer_loss.numpy()
    assert abs(full.gradients[0].numpy() - first.gradients[0].numpy()) > 1e-3


def test_adam_has_the_right_derivatives_at_a_gradient_of_zero():
    adam = farhox.Adam(0.1, beta_1=0.9, beta_2=0.99, epsilon=1e-3)
    zero = tf.zeros([1], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(zero)
        variables, _ = adam.update([zero], [tf.ones([1], tf.float64)], adam.initial_slots([zero]), tf.constant(0))
    # m = 0.1 g and v of second order in g: the step is rate * correction * m / epsilon.
    expected = -0.1 * np.sqrt(1 - 0.99) / (1 - 0.9) * 0.1 / 1e-3
    np.testing.assert_allclose(tape.gradient(variables[0], zero), [expected], rtol=1e-12)


def test_adam_gives_finite_hypergradients_where_an_inner_gradient_is_zero():
    rate = learned(0.1, low=0.0)
    settings = [rate, learned(0.8, low=0.0, high=1.0), learned(0.9, low=0.0, high=1.0), learned(1e-2, low=0.0)]
    w = keras.Variable([3.0, 1.0, -2.0], dtype="float64")
    live = tf.constant([1.0, 0.0, 2.0], tf.float64)

    def inner_objective(batch):
        return 0.5 * tf.reduce_sum(tf.square(live * (w - batch[0])))

    problem = farhox.BilevelProblem(
        inner_objective, lambda batch: 0.5 * tf.reduce_sum(tf.square(w - 1.5)), [w], settings + [w],
        dynamics=farhox.Adam(*settings))
    gradients = [gradient.numpy() for gradient in compute(problem).gradients]
    assert_close(gradients, finite_differences(problem, *DATA), 1e-8)
    # The entry that is never trained stays what it was, so that dE/dw_0 = w_0 - 1.5.
    np.testing.assert_allclose(gradients[-1][1], -0.5, rtol=1e-12)


@pytest.mark.parametrize("make", [
    lambda bad: farhox.GradientDescent(bad), lambda bad: farhox.GradientDescent([0.1, bad]),
    lambda bad: farhox.Momentum(bad), lambda bad: farhox.Momentum(momentum=bad), lambda bad: farhox.Adam(bad),
    lambda bad: farhox.Adam(beta_1=bad), lambda bad: farhox.Adam(beta_2=bad), lambda bad: farhox.Adam(epsilon=bad)])
@pytest.mark.parametrize("bad", ["0.1", None, True, object()])
def test_what_is_not_a_setting_is_refused_by_name(make, bad):
    with pytest.raises(TypeError, match="(learning_rate|momentum|beta_1|beta_2|epsilon) must be a float"):
        make(bad)


def test_decays_of_adam_may_not_be_lists():
    with pytest.raises(TypeError, match="must be a float"):
        farhox.Adam(beta_1=[0.9])


@pytest.mark.parametrize("make", [
    farhox.GradientDescent, farhox.Momentum, farhox.Adam, lambda momenta: farhox.Momentum(0.1, momenta)])
def test_a_list_of_settings_must_have_one_entry_per_inner_variable(make):
    with pytest.raises(ValueError, match="Received 2 entries for 1 inner variables"):
        compute(quadratic(make([0.1, 0.2]), [keras.Variable(0.1)]))


def test_dynamics_are_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        farhox.Adam().learning_rate = 0.1

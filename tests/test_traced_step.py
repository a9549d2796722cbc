"""One traced step: user code of every kind is the same training in all directions, or is refused by name."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import assert_close, variable

import farhox
from farhox._core import functional
from farhox.hypergradients import DartsHG, EvoGradHG

METHODS = {"reverse": farhox.ReverseHG(), "forward": farhox.ForwardHG(), "checkpoints": farhox.ReverseHG(
    checkpoint_every=2)}
methods = pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 3))
    return (x, x.sum(axis=1, keepdims=True)), (random.normal(size=(5, 3)), random.normal(size=(5, 1)))


class FunctionCall(keras.Model):
    """A model whose `call` is a `tf.function`."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(2, activation="tanh")
        self.last = keras.layers.Dense(1)
        # A trace that builds the layers keeps their initial weights, in Keras alone too.
        self.hidden.build([None, 3])
        self.last.build([None, 2])

    @tf.function
    def call(self, x):
        return self.last(self.hidden(x))


@pytest.mark.one_case
@methods
def test_a_loss_and_a_call_under_tf_function_are_part_of_the_step(method, float64):
    train, validation = data()
    rate, scale = variable(0.1, name="rate"), variable(1.5, name="scale")

    @tf.function
    def loss(y, predictions):
        return scale * tf.reduce_mean(tf.square(y - predictions), axis=-1)

    model = FunctionCall()
    model(train[0])  # Traced before, outside of any problem.
    problem = farhox.supervised_problem(
        model, loss=loss, outer_loss="mean_squared_error", dynamics=farhox.GradientDescent(rate),
        outer_variables=[rate, scale])
    batches = farhox.repeat(train, 3)
    gradients = method.compute(problem, batches, validation).gradients
    assert_close(gradients, unrolled.finite_differences(problem, batches, validation), 1e-7)
    assert np.all(np.abs(gradients) > 1e-6)
    before = float(tf.reduce_sum(model(train[0])))
    model.last.kernel.assign(0.0 * model.last.kernel)
    model.last.bias.assign(0.0 * model.last.bias)
    assert before != 0 and float(tf.reduce_sum(model(train[0]))) == 0


@pytest.mark.one_case
@pytest.mark.parametrize("mode", ["eager", "graph", "graph of functions as they are"])
def test_branches_and_loops_over_tensors_in_a_tf_function_are_part_of_the_step(mode, float64):
    w, scale = variable([1.5, -0.5], name="w"), variable(0.7, name="scale")

    class Penalty:
        @tf.function
        def __call__(self, value):
            total = scale * 0.0
            for i in tf.range(2):
                if value[i] > 0:
                    total += scale * value[i] ** 2
                else:
                    total += scale ** 2 * value[i] ** 4
            return total

    penalty = Penalty()
    problem = farhox.BilevelProblem(
        lambda _: penalty(w.value) + 0.5 * tf.reduce_sum(tf.square(w - [2.0, -1.0])),
        lambda _: tf.reduce_sum(tf.square(w)), [w], [scale], farhox.GradientDescent(0.1))
    batches = farhox.repeat(tf.zeros([1]), 3)

    def compute():
        return farhox.ReverseHG().compute(problem, batches, tf.zeros([1])).gradients

    function = compute if mode == "eager" else tf.function(compute, autograph=mode == "graph")
    assert_close(function(), unrolled.finite_differences(problem, batches, tf.zeros([1])), 1e-7)


class InBranch(keras.layers.Layer):
    """A layer that calls another one, or adds a loss, where a condition over tensors holds."""

    def __init__(self, layer=None):
        super().__init__()
        self.inner = layer

    @tf.function
    def call(self, x, training=None):
        if tf.reduce_mean(x) > -100.0:
            if self.inner is None:
                self.add_loss(tf.reduce_mean(x ** 2))
            else:
                x = self.inner(x, training=training)
        return x


@pytest.mark.parametrize("layer, words", [
    (lambda: keras.layers.Dropout(0.5, seed=1), "assigns '[^']*seed[^']*' there"),
    (lambda: keras.layers.BatchNormalization(), "assigns '[^']*moving_[^']*' there"),
    (lambda: None, "adds a loss there")], ids=["dropout", "batch normalisation", "loss"])
def test_what_is_assigned_inside_of_a_branch_over_tensors_is_refused_with_what_to_do(layer, words):
    train, validation = data()
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4), InBranch(layer()), keras.layers.Dense(1)])
    rate = variable(0.1)
    problem = farhox.supervised_problem(model, "mse", farhox.GradientDescent(rate), outer_variables=[rate])
    with pytest.raises(ValueError, match=rf"(?s)must not be inside of a branch.*{words}.*tf.where\(condition, layer"):
        farhox.ReverseHG().compute(problem, farhox.repeat(train, 2), validation)


def test_a_tf_function_of_a_user_does_not_rewrite_this_package():
    files = []

    def inner(_):
        files.extend(frame.filename for frame in inspect.stack())
        return 0.5 * tf.square(w)

    w, rate = keras.Variable(0.5), keras.Variable(0.1)
    problem = farhox.BilevelProblem(inner, lambda _: 0.5 * tf.square(w), [w], [rate], farhox.GradientDescent(rate))

    @tf.function
    def step():
        if tf.constant(True):  # A branch over a tensor: the user's function is rewritten.
            return farhox.ReverseHG().compute(problem, farhox.repeat(tf.zeros([]), 1), tf.zeros([])).gradients[0]
        return 0.0

    # (1 - rate)^2 w^2 / 2 after a step.
    np.testing.assert_allclose(step(), -0.9 * 0.25, rtol=1e-6)
    rewritten = [file for file in files if "__autograph_generated_file" in file]
    assert len(rewritten) in range(1, 5) and any(file.endswith("inner_training.py") for file in files)


@pytest.mark.one_case
@methods
def test_what_python_draws_is_one_constant_for_all_directions(method):
    random, w, c = np.random.default_rng(3), keras.Variable(0.0), keras.Variable(2.0)
    problem = farhox.BilevelProblem(
        lambda _: 0.5 * (w - c * float(random.normal())) ** 2, lambda _: 0.5 * tf.square(w), [w], [c],
        farhox.GradientDescent(1.0))
    # w = c n after one step of rate 1, so E = (c n)^2 / 2 and dE/dc = 2 E / c = E.
    result = method.compute(problem, farhox.repeat(tf.zeros([]), 1), tf.zeros([]))
    assert float(result.outer_loss) > 0
    np.testing.assert_allclose(result.gradients[0], result.outer_loss, rtol=1e-6)


@pytest.mark.slow
def test_seeded_draws_differ_under_xla_and_the_hypergradient_is_that_of_the_training_with_them(float64):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(8, "tanh"), keras.layers.Dropout(0.5, seed=1),
                              keras.layers.Dense(1)])
    rate = variable(0.1)
    problem = farhox.supervised_problem(
        model, "mean_squared_error", farhox.GradientDescent(rate), outer_variables=[rate])
    inner, outer = data()
    batches = farhox.repeat(inner, 3)

    functions = [tf.function(lambda: farhox.ReverseHG().compute(problem, batches, outer)[:2], autograph=False,
                             jit_compile=compiled) for compiled in (False, True)]

    def at(value):
        rate.assign(value)
        return [function() for function in functions]

    results, above, below = at(0.1), at(0.1 + 1e-5), at(0.1 - 1e-5)
    # TensorFlow chooses the generator by the device: this fails once XLA draws the numbers of a graph.
    assert abs(results[0][1] - results[1][1]) > 1e-3
    for (gradients, _), (_, more), (_, less) in zip(results, above, below):
        assert_close(gradients, [(more - less) / 2e-5], 1e-6)


def normal():
    return tf.random.normal([])


@pytest.mark.parametrize("method, draw, operation", [
    (farhox.ReverseHG(), normal, "RandomStandardNormal"),
    *(pytest.param(method, normal, "RandomStandardNormal", marks=pytest.mark.slow) for method in (
        *list(METHODS.values())[1:], DartsHG(), farhox.ImplicitHG(), EvoGradHG())),
    (farhox.ReverseHG(), lambda: tf.random.uniform([]), "RandomUniform"),
    (farhox.ReverseHG(), lambda: tf.ensure_shape(tf.py_function(lambda: 1.0, [], tf.float32), []), "EagerPyFunc"),
    (farhox.ReverseHG(), lambda: tf.cond(tf.constant(1.0) > tf.zeros([]), normal, lambda: 0.0),
     "RandomStandardNormal")])
def test_draws_without_a_seed_and_calls_of_python_are_refused_by_name(method, draw, operation):
    w, c = keras.Variable(0.5), keras.Variable(2.0)
    problem = farhox.BilevelProblem(lambda _: 0.5 * (w - c * draw()) ** 2, lambda _: 0.5 * tf.square(w), [w], [c],
                                    farhox.GradientDescent(0.1))
    with pytest.raises(ValueError, match=f"The operation {operation} at '"):
        method.compute(problem, farhox.repeat(tf.zeros([]), 1), tf.zeros([]))


def test_an_assignment_to_a_variable_of_tensorflow_is_refused():
    w, counter = keras.Variable(0.5), tf.Variable(0.0)

    def inner(_):
        counter.assign_add(1.0)
        return 0.5 * tf.square(w)

    problem = farhox.BilevelProblem(inner, lambda _: 0.5 * tf.square(w), [w], [w], farhox.GradientDescent(0.1))
    with pytest.raises(ValueError, match="AssignAddVariableOp at '.*Make it a keras.Variable"):
        farhox.ReverseHG().compute(problem, farhox.repeat(tf.zeros([]), 1), tf.zeros([]))


def test_the_outer_objective_may_draw():
    w = keras.Variable(0.5)
    problem = farhox.BilevelProblem(lambda _: 0.5 * tf.square(w), lambda _: w * tf.random.uniform([], 1.0, 2.0), [w],
                                    [w], farhox.GradientDescent(0.1))
    assert 0.9 <= float(farhox.ReverseHG().compute(problem, farhox.repeat(0.0, 1), 0.0).gradients[0]) <= 1.8


@pytest.mark.slow
def test_functions_run_eagerly_for_debugging_with_the_same_numbers(float64):
    train, validation = data()
    rate = variable(0.1)
    seen = []

    def loss(y, predictions):
        seen.append(tf.executing_eagerly())
        return tf.reduce_mean(tf.square(y - predictions), axis=-1)

    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2, "tanh"), keras.layers.BatchNormalization(),
                              keras.layers.Dense(1)])
    problem = farhox.supervised_problem(model, loss=loss, dynamics=farhox.GradientDescent(rate), outer_variables=[rate])
    arguments = problem, farhox.repeat(train, 3), validation
    compiled = farhox.ReverseHG().compute(*arguments)
    assert not any(seen)
    seen.clear()
    tf.config.run_functions_eagerly(True)
    try:
        eager = farhox.ReverseHG(memory=0).compute(*arguments)
    finally:
        tf.config.run_functions_eagerly(False)
    assert any(seen)
    assert_close(eager.gradients, compiled.gradients, 1e-10)


@pytest.mark.parametrize("what", ["outer_loss of compute", "gradients of compute", "outer_loss of evaluate"])
def test_a_tape_does_not_go_through_results(what):
    w, rate, factor = keras.Variable(0.5), keras.Variable(0.1), tf.Variable(2.0)
    problem = farhox.BilevelProblem(lambda _: 0.5 * tf.square(w), lambda _: 0.5 * tf.square(w), [w], [rate],
                                    farhox.GradientDescent(rate))
    arguments = farhox.repeat(tf.zeros([]), 2), tf.zeros([])

    def value():
        if what == "outer_loss of evaluate":
            return problem.evaluate(*arguments).outer_loss
        result = farhox.ReverseHG().compute(problem, *arguments)
        return result.gradients[0] if what == "gradients of compute" else result.outer_loss

    with tf.GradientTape() as tape:
        product = factor * value()
    with pytest.raises(ValueError, match="The hypergradient is result.gradients.*tf.stop_gradient"):
        tape.gradient(product, rate.value)
    with tf.GradientTape() as tape:
        product = factor * tf.stop_gradient(value())
    np.testing.assert_allclose(tape.gradient(product, factor), value())
    # In a graph a gradient may be built that nobody asked for: there is none.
    for function in (tf.function(value), value):
        @tf.function
        def of_rate(function=function):
            with tf.GradientTape() as tape:
                result = function()
            return tape.gradient(result, rate.value, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        assert float(of_rate()) == 0
    with tf.GradientTape() as tape:
        result = tf.function(value)()
    assert tape.gradient(result, rate.value) is None


def test_settings_of_tensorflow_and_keras_are_as_before_after_user_code():
    from keras.src.losses import loss as keras_loss
    before = keras_loss.scale_loss_for_distribution
    with pytest.raises(RuntimeError):
        functional.call(_raise, bindings=[])
    assert keras_loss.scale_loss_for_distribution is before and not tf.config.functions_run_eagerly()
    first, second = functional.user_code(), functional.user_code()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tf.config.functions_run_eagerly()
    second.__exit__(None, None, None)
    assert keras_loss.scale_loss_for_distribution is before and not tf.config.functions_run_eagerly()


def _raise():
    raise RuntimeError("the objective failed")


def test_a_method_of_ones_own_is_a_few_lines():
    class Explicit(farhox.hypergradients.SingleHyperGradient):
        def differentiate(self, training, outer_batch, carry):
            run = training.run()
            at_end = training.outer_gradients(run.state, outer_batch)
            gradients = training.gradients(at_end.outer, sees="Explicit sees the outer objective alone.")
            return farhox.hypergradients.result(training, gradients, at_end.loss, run)

    w, c = keras.Variable(2.0), keras.Variable(3.0)
    problem = farhox.BilevelProblem(lambda _: 0.5 * tf.square(w), lambda _: w * c, [w], [c],
                                    farhox.GradientDescent(0.5))
    result = Explicit().compute(problem, farhox.repeat(0.0, 2), 0.0)
    np.testing.assert_allclose([result.gradients[0], result.outer_loss], [0.5, 1.5])

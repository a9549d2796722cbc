"""Python values that change between eager calls: objectives see them, and what only counts its traces is not traced
again."""

import functools
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_identical, variable

import farhox
from farhox._core.retraced import Retraced, Watched

COEFFICIENT = 1.0
RULE = "one"


class Scaled:
    """A loss of one's own with a number in an attribute."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, w):
        return self.factor * keras.ops.square(w)

    def of(self, w):
        return self(w)


def scaled(w, factor):
    return factor * keras.ops.square(w)


def by_closure():
    factor = 1.0

    def change():
        nonlocal factor
        factor = 2.0

    return lambda w: factor * keras.ops.square(w), change


def by_global():
    def change():
        global COEFFICIENT
        COEFFICIENT = 2.0

    return lambda w: COEFFICIENT * keras.ops.square(w), change


def by_function_in_a_closure():
    inner, change = by_closure()
    return tf.function(lambda w: inner(w)), change


def by_attribute():
    loss = Scaled(1.0)
    return loss, lambda: setattr(loss, "factor", 2.0)


def by_method():
    loss = Scaled(1.0)
    return loss.of, lambda: setattr(loss, "factor", 2.0)


def by_partial():
    settings = {"factor": 1.0}
    loss = functools.partial(scaled, **settings)
    return loss, lambda: loss.keywords.update(factor=2.0)


def by_dictionary():
    settings = {"factor": 1.0}
    return lambda w: scaled(w, **settings), lambda: settings.update(factor=2.0)


def by_namespace():
    settings = types.SimpleNamespace(nested=types.SimpleNamespace(factor=1.0))
    return lambda w: scaled(w, settings.nested.factor), lambda: setattr(settings.nested, "factor", 2.0)


def by_another_function():
    loss = Scaled(1.0)
    box = types.SimpleNamespace(loss=loss.of)
    return lambda w: box.loss(w), lambda: setattr(box, "loss", Scaled(2.0).of)


@pytest.mark.parametrize("make", [
    by_closure, by_global, by_function_in_a_closure, by_attribute, by_method, by_partial, by_dictionary, by_namespace,
    by_another_function], ids=lambda make: make.__name__)
def test_an_eager_call_sees_a_python_number_that_was_changed(make, monkeypatch):
    monkeypatch.setattr(f"{__name__}.COEFFICIENT", 1.0)
    penalty, change = make()
    w, rate = variable(1.0), variable(0.1)
    problem = farhox.BilevelProblem(lambda _: penalty(w.value), lambda _: tf.square(w), [w], [rate],
                                    farhox.GradientDescent(rate))
    method, arguments = farhox.ReverseHG(), (farhox.repeat(tf.zeros([]), 1), tf.zeros([]))
    # E = (1 - 2 c rate)^2, dE/drate = -4 c (1 - 2 c rate).
    for coefficient in (1.0, 2.0):
        for _ in range(2):
            end = 1 - 2 * coefficient * 0.1
            np.testing.assert_allclose(method.compute(problem, *arguments).gradients[0], -4 * coefficient * end)
            np.testing.assert_allclose(problem.evaluate(*arguments).outer_loss, end ** 2)
        change()


@pytest.mark.slow
def test_an_eager_call_sees_what_was_changed_in_a_layer(float64):
    x = np.random.default_rng(0).normal(size=(6, 3))
    model = keras.Sequential([
        keras.Input([3]), keras.Sequential([keras.layers.Dense(4), keras.layers.LeakyReLU(0.1)]),
        keras.layers.Dense(1)])

    def problem():
        rate = variable(0.1)
        return farhox.supervised_problem(model, "mse", farhox.GradientDescent(rate), outer_variables=[rate])

    def gradient(of):
        return method.compute(of, farhox.repeat((x, x[:, :1]), 2), (x, x[:, :1])).gradients

    method, kept = farhox.ReverseHG(), problem()
    before = gradient(kept)
    for change in (lambda: setattr(model.layers[0].layers[1], "negative_slope", 0.9),
                   lambda: setattr(model.layers[0].layers[0], "activation", keras.activations.tanh)):
        change()
        after = gradient(kept)
        assert np.abs(after[0] - before[0]) > 1e-4
        assert_identical(after, gradient(problem()))
        before = after


def test_what_changes_while_it_is_traced_or_is_not_read_is_no_reason_to_trace_again():
    count, state = 0, None

    def inner(batch):
        nonlocal count
        count += 1
        return 0.5 * tf.square(w - batch) + 0.0 * len(RULE)

    w, rate = keras.Variable(0.5), keras.Variable(0.1)
    problem = farhox.BilevelProblem(inner, lambda _: 0.5 * tf.square(w), [w], [rate], farhox.GradientDescent(rate))
    method = farhox.ReverseHG()
    for _ in range(3):
        state = method.compute(problem, farhox.repeat(tf.zeros([]), 1), tf.zeros([]), state=state).state
        traces = count
    state = method.compute(problem, farhox.repeat(tf.zeros([]), 1), tf.zeros([]), state=state).state
    assert count == traces


def test_a_value_that_is_another_one_at_each_call_is_warned_of_by_name():
    settings = types.SimpleNamespace(step=0)
    function = Retraced(lambda x: settings.step * x, [lambda: settings.step])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings.step in range(5):
            assert float(function(tf.constant(2.0))) == 2.0 * settings.step
    settings.step = 5
    with pytest.warns(UserWarning, match="traced 5 times again.*because 'step'.*was another value at each call"):
        assert float(function(tf.constant(2.0))) == 10.0


def test_an_error_in_a_trace_leaves_nothing_behind():
    settings = types.SimpleNamespace(fails=True)

    def checked(x):
        if settings.fails:
            raise ValueError("not yet")
        return 2.0 * x

    function = Retraced(checked, [checked])
    with pytest.raises(ValueError, match="not yet"):
        function(tf.constant(1.0))
    settings.fails = False
    assert float(function(tf.constant(1.0))) == 2.0


def test_numbers_that_are_none_and_names_without_a_value_are_watched():
    def later():
        return value, number

    number = float("nan")
    watched = Watched([later])
    assert watched.changed() is None
    value = 3
    assert watched.changed() == "value" and later()[0] == value

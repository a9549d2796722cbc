"""Bad inputs of inner dynamics, penalties, regularizers and projections, and the error that each gives."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.constraints import Box, CappedSimplex, Simplex
from farhox.dynamics import L1, BacktrackingGradientDescent, GroupLasso, NuclearNorm, Projection, ProximalGradient

OPTIMIZERS = keras.optimizers
NAN, INFINITY = float("nan"), float("inf")
RATE = "learning_rate must be"


def negative():
    return farhox.Hyperparameter(-0.1, name="negative")


def of(optimizer, **settings):
    return farhox.KerasDynamics(optimizer, **settings)


def sgd(**arguments):
    return OPTIMIZERS.SGD(**{"learning_rate": 0.1, **arguments})


def bound(dynamics, dtype="bfloat16"):
    return dynamics.bound_to([keras.Variable(np.ones(2), dtype=dtype)])


def one_step(dynamics, w=1.0):
    value = [tf.constant(w)]
    return dynamics.update(value, value, dynamics.initial_slots(value), tf.constant(0, tf.int64))


# Entry, what is wrong with the argument, the error, words of its message.
ROWS = [
    ("GradientDescent", "example weights", lambda: farhox.GradientDescent(farhox.ExampleWeights(4)), TypeError, RATE),
    ("GradientDescent", "a string", lambda: farhox.GradientDescent("0.1"), TypeError, RATE),
    ("GradientDescent", "None", lambda: farhox.GradientDescent(None), TypeError, RATE),
    ("GradientDescent", "a bool", lambda: farhox.GradientDescent(True), TypeError, RATE),
    ("GradientDescent", "a class", lambda: farhox.GradientDescent(farhox.Hyperparameter), TypeError, RATE),
    ("GradientDescent", "the class float", lambda: farhox.GradientDescent(float), TypeError, RATE),
    ("GradientDescent", "a function of nothing", lambda: farhox.GradientDescent(lambda: 0.1), TypeError,
     "function of the step, step -> tensor"),
    ("GradientDescent", "a function of two", lambda: farhox.GradientDescent(lambda step, w: 0.1), TypeError,
     "function of the step"),
    ("GradientDescent", "a layer", lambda: farhox.GradientDescent(keras.layers.Dense(1)), TypeError, RATE),
    ("GradientDescent", "a tensor", lambda: farhox.GradientDescent(tf.constant(0.1)), TypeError, RATE),
    ("GradientDescent", "negative", lambda: farhox.GradientDescent(-0.1), ValueError, "finite and at least 0.0"),
    ("GradientDescent", "NaN", lambda: farhox.GradientDescent(NAN), ValueError, "finite and at least 0.0"),
    ("GradientDescent", "infinite", lambda: farhox.GradientDescent(INFINITY), ValueError, "finite and at least 0.0"),
    ("GradientDescent", "a negative hyperparameter", lambda: farhox.GradientDescent(negative()), ValueError,
     "at least 0.0. Received: learning_rate=.*negative"),
    ("GradientDescent", "a negative variable", lambda: farhox.GradientDescent(keras.Variable(-1.0)), ValueError, RATE),
    ("GradientDescent", "a schedule that starts below zero", lambda: farhox.GradientDescent(
        OPTIMIZERS.schedules.ExponentialDecay(-0.1, 10, 0.5)), ValueError, RATE),
    ("GradientDescent", "an empty list", lambda: farhox.GradientDescent([]), ValueError,
     "one entry per inner variable"),
    ("GradientDescent", "a list with a string", lambda: farhox.GradientDescent([0.1, "0.1"]), TypeError,
     RATE),
    ("GradientDescent", "a list with a negative one", lambda: farhox.GradientDescent([0.1, -0.1]), ValueError, RATE),
    ("GradientDescent", "a list of another length", lambda: one_step(farhox.GradientDescent([0.1, 0.2])), ValueError,
     "one entry per inner variable. Received 2 entries for 1"),
    ("GradientDescent", "a function that returns text", lambda: one_step(farhox.GradientDescent(lambda step: "a")),
     TypeError, "must return a number or a tensor of numbers. Received: .*which returned 'a'"),
    ("GradientDescent", "a function that returns nothing", lambda: one_step(farhox.GradientDescent(lambda step: None)),
     TypeError, "which returned None"),
    ("Momentum", "a list with a string", lambda: farhox.Momentum(0.1, ["0.9"]), TypeError, "momentum must be a float"),
    ("Momentum", "a list of another length", lambda: one_step(farhox.Momentum(0.1, [0.9, 0.8])), ValueError,
     "one entry per inner variable. Received 2 entries for 1"),
    ("Momentum", "above one", lambda: farhox.Momentum(0.1, 1.5), ValueError, "at least 0.0 and at most 1.0"),
    ("Momentum", "negative", lambda: farhox.Momentum(0.1, -0.5), ValueError, "momentum must be finite and at least"),
    ("Adam", "beta_1 of one", lambda: farhox.Adam(beta_1=1.0), ValueError, "beta_1 must be .* less than 1.0"),
    ("Adam", "beta_2 above one", lambda: farhox.Adam(beta_2=1.5), ValueError, "beta_2 must be .* less than 1.0"),
    ("Adam", "negative epsilon", lambda: farhox.Adam(epsilon=-1e-7), ValueError, "epsilon must be finite and at least"),
    ("Adam", "bfloat16", lambda: bound(farhox.Adam()), ValueError, "never moves a variable of type bfloat16"),
    ("BacktrackingGradientDescent", "NaN", lambda: BacktrackingGradientDescent(NAN), ValueError, RATE),
    ("BacktrackingGradientDescent", "decrease", lambda: BacktrackingGradientDescent(decrease=NAN), ValueError,
     "decrease must be a number strictly between 0 and 1"),
    ("BacktrackingGradientDescent", "a bool", lambda: BacktrackingGradientDescent(max_backtracks=True),
     ValueError, "max_backtracks must be a non-negative integer"),
    ("ProximalGradient", "negative", lambda: ProximalGradient(-0.1), ValueError, RATE),
    ("ProximalGradient", "a number", lambda: ProximalGradient(0.1, 0.1), TypeError, "penalty must be one of"),
    ("ProximalGradient", "no penalty", lambda: bound(ProximalGradient(0.1), "float32"), ValueError,
     "needs a penalty"),
    ("L1", "negative", lambda: L1(-1.0), ValueError, "strength must be finite and at least 0.0"),
    ("L1", "NaN in an array", lambda: L1(np.array([0.1, NAN])), ValueError, "strength must be finite"),
    ("L1", "example weights", lambda: L1(farhox.ExampleWeights(4)), TypeError, "strength must be a float"),
    ("GroupLasso", "an axis by name", lambda: GroupLasso(0.1, "rows"), TypeError, "axis must be an integer"),
    ("GroupLasso", "a strength by name", lambda: GroupLasso("strong"), TypeError, "strength must be a float"),
    ("NuclearNorm", "infinite", lambda: NuclearNorm(INFINITY), ValueError, "strength must be finite"),
    ("Projection", "no constraint", lambda: Projection(0.1), TypeError, "must be a keras.constraints.Constraint"),
    ("KerasDynamics", "a name", lambda: of("sgd"), TypeError, "must be an instance of a subclass of"),
    ("KerasDynamics", "a class", lambda: of(OPTIMIZERS.Adam), TypeError, "must be an instance of a subclass of"),
    ("KerasDynamics", "dynamics", lambda: of(farhox.GradientDescent()), TypeError, "must be an optimizer of Keras"),
    ("KerasDynamics", "an unknown setting", lambda: of(sgd(), beta_1=0.9), ValueError, "Received: beta_1"),
    ("KerasDynamics", "a negative rate", lambda: of(sgd(), learning_rate=-0.1), ValueError, RATE),
    ("KerasDynamics", "a negative rate of the optimizer", lambda: of(sgd(learning_rate=-0.1)), ValueError,
     "learning_rate of SGD must be"),
    ("KerasDynamics", "a NaN decay", lambda: of(sgd(), weight_decay=NAN), ValueError, "weight_decay must be finite"),
    ("KerasDynamics", "a negative decay of the optimizer", lambda: of(sgd(weight_decay=-0.1)), ValueError,
     "weight_decay of SGD must be"),
    ("KerasDynamics", "a clipping that clips nothing", lambda: of(sgd(), clipnorm=0.0), ValueError,
     "clipnorm must be finite and greater than 0.0"),
    ("KerasDynamics", "one of the optimizer", lambda: of(sgd(clipvalue=-1.0)), ValueError, "clipvalue of SGD must be"),
    ("KerasDynamics", "beta_2 of one", lambda: of(OPTIMIZERS.Adam(beta_2=1.0)), ValueError, "beta_2 of Adam must be"),
    ("KerasDynamics", "a momentum above one", lambda: of(sgd(), momentum=negative()), ValueError, "momentum must be"),
    ("KerasDynamics", "a function of nothing", lambda: of(sgd(), momentum=lambda: 0.5), TypeError,
     "function of the step"),
    ("KerasDynamics", "a list for a momentum", lambda: of(sgd(), momentum=[0.5]), TypeError,
     "momentum must be a float"),
    ("KerasDynamics", "rates of another length", lambda: bound(of(sgd(), learning_rate=[0.1, 0.2]), "float32"),
     ValueError, "Received 2 entries for 1"),
    ("KerasDynamics", "bfloat16", lambda: bound(of(OPTIMIZERS.Adam())), ValueError, "never moves a variable of type"),
    ("L1L2", "negative", lambda: farhox.L1L2(-0.1), ValueError, "l1 must be finite and not negative"),
    ("L1L2", "example weights", lambda: farhox.L1L2(l2=farhox.ExampleWeights(4)), TypeError, "l2 must be a number"),
    ("L1L2.from_config", "negative", lambda: farhox.L1L2.from_config({"l1": 0.0, "l2": -0.1}), ValueError,
     "l2 must be finite and not negative"),
    ("L1L2.from_config", "text", lambda: farhox.L1L2.from_config({"l1": "strong", "l2": 0.0}), TypeError,
     "l1 must be a number"),
    ("Box", "no bound", Box, ValueError, "A box needs a bound"),
    ("Box.from_config", "infinite", lambda: Box.from_config({"low": -INFINITY, "high": 1.0}), ValueError,
     "low must be a finite number"),
    ("Simplex", "zero", lambda: Simplex(0.0), ValueError, "total must be a positive finite number"),
    ("CappedSimplex.from_config", "NaN", lambda: CappedSimplex.from_config({"budget": NAN}), ValueError,
     "budget must be a positive finite number"),
]


@pytest.mark.parametrize("call, error, words", [
    pytest.param(*row[2:], id=f"{row[0]}: {row[1]}") for row in ROWS])
def test_a_bad_input_gives_the_error_with_the_rule(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("setting", [
    0, 0.1, np.float32(0.1), functools.partial(lambda scale, step: scale, 0.1), np.sqrt,
    OPTIMIZERS.schedules.ExponentialDecay(0.1, 10, 0.5), keras.Variable(0.1), farhox.Hyperparameter(0.1),
    farhox.LearnedSchedule(3)], ids=lambda setting: type(setting).__name__)
def test_what_is_a_setting_passes(setting):
    farhox.GradientDescent(setting)

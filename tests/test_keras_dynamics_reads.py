"""Hyperparameters that a Keras optimizer's own code reads: schedules, constraints, update steps, callables."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable
from unrolled import finite_differences

import farhox

OPTIMIZERS = keras.optimizers


def learned(initial=0.3):
    return farhox.Hyperparameter(initial, low=0.0, log=True, name="strength", dtype="float64")


class Falling(OPTIMIZERS.schedules.LearningRateSchedule):
    """A schedule with a hyperparameter of its own."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start() * 0.9 ** keras.ops.cast(step, "float64")

    def get_config(self):
        return {"start": self.start}


class Short(keras.constraints.Constraint):
    """A norm of at most twice the hyperparameter."""

    def __init__(self, size):
        self.size = size

    def __call__(self, w):
        return w * keras.ops.minimum(1.0, 2 * self.size() / keras.ops.norm(w))


@keras.saving.register_keras_serializable("farhox_tests")
class Pulling(OPTIMIZERS.SGD):
    """Gradient descent that pulls the variables to zero with a strength that it reads itself."""

    def __init__(self, strength=None, serialize=False, **kwargs):
        super().__init__(**kwargs)
        self.strength = strength
        self.serialize = serialize

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient + self.strength() * variable, variable, learning_rate)

    def get_config(self):
        strength = self.strength
        if self.serialize:
            strength = type(strength).from_config(strength.get_config())
        return {**super().get_config(), "strength": strength, "serialize": self.serialize}


CASES = {
    "schedule": lambda h: farhox.KerasDynamics(OPTIMIZERS.SGD(Falling(h))),
    "schedule with accumulation": lambda h: farhox.KerasDynamics(
        OPTIMIZERS.SGD(Falling(h), gradient_accumulation_steps=2)),
    "schedule as a setting": lambda h: farhox.KerasDynamics(OPTIMIZERS.SGD(), learning_rate=Falling(h)),
    "schedule of Adam with weight decay": lambda h: farhox.KerasDynamics(
        OPTIMIZERS.AdamW(Falling(h), weight_decay=0.1, epsilon=0.1)),
    "the hyperparameter as rate": lambda h: farhox.KerasDynamics(OPTIMIZERS.SGD(h, momentum=0.5)),
    "a callable rate": lambda h: farhox.KerasDynamics(OPTIMIZERS.SGD(lambda: 0.5 * h())),
    "update_step": lambda h: farhox.KerasDynamics(Pulling(h, learning_rate=0.1)),
    "constraint": lambda h: farhox.KerasDynamics(OPTIMIZERS.SGD(0.1)),
    "constraint under GradientDescent": lambda h: farhox.GradientDescent(0.1),
    "constraint under Momentum": lambda h: farhox.Momentum(0.1, 0.5),
}


def problem_of(case, h):
    random = np.random.default_rng(0)
    w = variable(random.normal(size=[3, 1]) * 2, name="w")
    if case.startswith("constraint"):
        w.constraint = Short(h)
    x, y, x_outer, y_outer = (random.normal(size=[8, size]) for size in (3, 1, 3, 1))

    def loss(batch):
        return keras.ops.mean((keras.ops.matmul(batch[0], w) - batch[1]) ** 2)

    problem = farhox.BilevelProblem(loss, loss, [w], [h], CASES[case](h))
    return problem, farhox.repeat((x, y), 4), (tf.constant(x_outer), tf.constant(y_outer))


@pytest.mark.one_case
@pytest.mark.parametrize("case", CASES)
def test_what_an_optimizer_reads_by_itself_has_its_hypergradient(case, float64):
    problem, inner_batches, outer_batch = problem_of(case, learned())
    expected = finite_differences(problem, inner_batches, outer_batch)
    assert abs(expected[0]) > 1e-4
    for compute in (farhox.ReverseHG().compute, tf.function(farhox.ForwardHG().compute, autograph=False)):
        assert_close(compute(problem, inner_batches, outer_batch).gradients, expected, 1e-7)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("case", ["schedule with accumulation", "update_step"])
def test_it_does_so_in_a_graph(case, float64):
    problem, inner_batches, outer_batch = problem_of(case, learned())
    eager = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    graph = tf.function(lambda: farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients,
                        autograph=False)()
    assert_close(graph, eager, 1e-12)


def test_an_optimizer_whose_copy_would_read_a_copy_of_the_hyperparameter_is_refused():
    with pytest.raises(ValueError, match="does not return the objects that hold the variables 'strength', but copies"):
        farhox.KerasDynamics(Pulling(learned(), serialize=True))


@pytest.mark.parametrize("kind, name", [("AdamW", "weight_decay"), ("Adam", "beta_1"), ("SGD", "clipnorm")])
def test_a_hyperparameter_as_another_setting_of_the_optimizer_is_referred_to_the_dynamics(kind, name):
    with pytest.raises(ValueError, match=f"{kind} with {name}=.*KerasDynamics.{kind}.*{name}="):
        farhox.KerasDynamics(getattr(OPTIMIZERS, kind)(**{name: learned()}))

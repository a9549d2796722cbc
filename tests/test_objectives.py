"""ObjectivesHG and OptimizerGroups: several outer objectives, several outer optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.hypergradients import ObjectivesHG
from farhox.training import OptimizerGroups

BATCHES, OUTER = farhox.repeat(tf.zeros([1]), 7), tf.zeros([1])


class Quadratic:
    """L = (w - lam)^2 with a learned rate; E = (w - 1)^2 / 2, and another objective (w - 2)^2."""

    def __init__(self):
        self.w, self.lam = (keras.Variable(np.float64(value), dtype="float64", name=name)
                            for name, value in (("w", 3.0), ("lam", 0.5)))
        self.rate = farhox.Hyperparameter(0.1, low=0.0, name="rate", dtype="float64")
        self.own = lambda _: 0.5 * (self.w - 1) ** 2
        self.other = lambda _: (self.w - 2) ** 2
        self.problem = self.make(self.own, [self.lam, self.rate])

    def make(self, objective, variables):
        return farhox.BilevelProblem(lambda _: (self.w - self.lam) ** 2, objective, [self.w], variables,
                                     dynamics=farhox.Momentum(self.rate, 0.5),
                                     fixed=[] if self.rate in variables else [self.rate])


@pytest.mark.parametrize("reads_all_first", [True, False])
def test_objectives_that_read_different_variables_have_their_own_hypergradients(reads_all_first):
    first, second, lam, mu = (keras.Variable(np.float64(value), dtype="float64") for value in (3.0, 2.0, 0.5, 0.7))

    def make(objective, variables):
        return farhox.BilevelProblem(
            lambda _: (first - lam) ** 2 + (first - mu * second) ** 2, objective, [first, second], variables,
            dynamics=farhox.GradientDescent(0.1), fixed=[v for v in (lam, mu) if all(v is not w for w in variables)])

    objectives = [lambda _: (first - 1) ** 2 + (second - 2) ** 2, lambda _: (first - 2) ** 2]
    other, own = objectives if reads_all_first else objectives[::-1]
    method = farhox.ReverseHG()
    result = tf.function(lambda: ObjectivesHG(method, [(other, [mu])]).compute(make(own, [lam, mu]), BATCHES, OUTER),
                         autograph=False)()
    expected = [method.compute(make(objective, [variable]), BATCHES, OUTER).gradients[0]
                for objective, variable in ((own, lam), (other, mu))]
    np.testing.assert_allclose(result.gradients, expected, rtol=1e-13)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG()], ids=["reverse", "forward"])
def test_each_variable_follows_its_own_objective(method):
    case = Quadratic()
    result = ObjectivesHG(method, [(case.other, [case.rate])]).compute(case.problem, BATCHES, OUTER)
    expected = [method.compute(case.make(objective, [variable]), BATCHES, OUTER).gradients[0]
                for objective, variable in ((case.own, case.lam), (case.other, case.rate))]
    np.testing.assert_allclose(result.gradients, expected, rtol=1e-13)
    np.testing.assert_allclose(result.outer_loss, 0.5 * (result.state.variables[0] - 1) ** 2, rtol=1e-13)
    np.testing.assert_allclose(result.diagnostics["hypergradient_norm"], np.linalg.norm(expected), rtol=1e-13)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.hypergradients.ForwardHG(), farhox.ImplicitHG()],
                         ids=["reverse", "forward", "implicit"])
def test_all_objectives_share_one_inner_training(method):
    """The step is traced once, and one loop of T steps goes there for three objectives."""
    lam, mu, w = (keras.Variable(np.float64(value), dtype="float64", name=name)
                  for name, value in (("lam", 0.5), ("mu", 0.2), ("w", 3.0)))
    traced = []

    def inner(_):
        traced.append(1)
        return 0.5 * (w - lam - mu) ** 2

    objectives = [lambda _, goal=goal: 0.5 * (w - goal) ** 2 for goal in (1.0, 2.0, 5.0)]
    problem = farhox.BilevelProblem(inner, objectives[0], [w], [lam, mu], dynamics=farhox.GradientDescent(0.5))
    both = ObjectivesHG(method, [(objectives[1], [lam]), (objectives[2], [mu])])
    function = tf.function(lambda: both.compute(problem, farhox.repeat(tf.zeros([1]), 3), OUTER), autograph=False)
    result = function()
    assert len(traced) == 1
    # w_3 = w_0 / 8 + (lam + mu) 7 / 8, or the minimum lam + mu for implicit differentiation.
    end, slope = 3 / 8 + 0.7 * 7 / 8, 1.0 if method == farhox.ImplicitHG() else 7 / 8
    np.testing.assert_allclose(result.gradients, [slope * (end - 2), slope * (end - 5)], rtol=1e-12)
    np.testing.assert_allclose(result.outer_loss, 0.5 * (end - 1) ** 2, rtol=1e-12)


def test_the_problems_own_loss_is_reported_when_no_variable_follows_it():
    case = Quadratic()
    method = ObjectivesHG(farhox.ReverseHG(), [(case.other, [case.rate, case.lam])])
    result = method.compute(case.problem, BATCHES, OUTER)
    np.testing.assert_allclose(result.outer_loss, 0.5 * (result.state.variables[0] - 1) ** 2, rtol=1e-13)


@pytest.mark.slow
def test_online_training_carries_the_memory_of_each_objective():
    case = Quadratic()
    method = ObjectivesHG(farhox.ForwardHG(), [(case.other, [case.rate])])
    whole = method.compute(case.problem, farhox.repeat(tf.zeros([1]), 14), OUTER)
    optimizer = farhox.HyperOptimizer(case.problem, method, online=True)
    optimizer.compile(keras.optimizers.SGD(0.0))
    optimizer.step(BATCHES, OUTER)
    np.testing.assert_allclose(optimizer.step(BATCHES, OUTER).gradients, whole.gradients, rtol=1e-12)


@pytest.mark.slow
def test_groups_apply_their_own_optimizer_and_save_its_slots(tmp_path):
    case, other = Quadratic(), Quadratic()

    def trained(case, steps, load=None):
        groups = OptimizerGroups(keras.optimizers.SGD(0.1), [(keras.optimizers.Adam(0.05), [case.rate])])
        optimizer = farhox.HyperOptimizer(case.problem)
        optimizer.compile(groups)
        if load:
            optimizer.load_weights(load)
        for _ in range(steps):
            optimizer.step(BATCHES, OUTER)
        return optimizer

    start = case.lam.numpy(), case.rate.variable.numpy()
    gradients = farhox.ReverseHG().compute(case.problem, BATCHES, OUTER).gradients
    optimizer = trained(case, 1)
    np.testing.assert_allclose(case.lam.numpy(), start[0] - 0.1 * gradients[0], rtol=1e-6)
    np.testing.assert_allclose(case.rate.variable.numpy(), start[1] - 0.05 * np.sign(gradients[1]), rtol=1e-4)
    assert float(optimizer.optimizer.learning_rate) == pytest.approx(0.1)
    optimizer.optimizer.learning_rate = 0.2
    assert float(optimizer.optimizer.optimizers[0].learning_rate) == pytest.approx(0.2)
    optimizer.optimizer.learning_rate = 0.1

    optimizer.save_weights(tmp_path / "part.weights.h5")
    for _ in range(2):
        optimizer.step(BATCHES, OUTER)
    trained(other, 2, load=tmp_path / "part.weights.h5")
    np.testing.assert_array_equal(other.rate.numpy(), case.rate.numpy())
    np.testing.assert_array_equal(other.lam.numpy(), case.lam.numpy())


def test_objectives_refuse_bad_input():
    case = Quadratic()
    with pytest.raises(TypeError, match="hypergradient must be a method for one inner training"):
        ObjectivesHG("reverse", [(case.other, [case.rate])])
    for objectives in (case.other, [], [case.other], [(case.other, case.rate)]):
        with pytest.raises(TypeError, match="list of pairs"):
            ObjectivesHG(farhox.ReverseHG(), objectives)
    stranger = keras.Variable(1.0, name="stranger")
    with pytest.raises(ValueError, match="outer variables of the problem only.*stranger"):
        ObjectivesHG(farhox.ReverseHG(), [(case.other, [stranger])]).compute(case.problem, BATCHES, OUTER)
    with pytest.raises(ValueError, match="one objective. Received twice: 'lam'"):
        ObjectivesHG(farhox.ReverseHG(), [(case.other, [case.lam]), (case.own, [case.lam])]).compute(
            case.problem, BATCHES, OUTER)


def test_groups_refuse_bad_input():
    case, adam = Quadratic(), keras.optimizers.Adam()
    with pytest.raises(TypeError, match="list of pairs"):
        OptimizerGroups(adam, [adam])
    with pytest.raises(TypeError, match="must be a keras.optimizers.Optimizer"):
        OptimizerGroups("adam", [])
    with pytest.raises(ValueError, match="optimizer of its own"):
        OptimizerGroups(adam, [(adam, [case.lam])])
    with pytest.raises(ValueError, match="in one group"):
        OptimizerGroups(adam, [(keras.optimizers.SGD(), [case.lam]), (keras.optimizers.SGD(), [case.lam])])
    with pytest.raises(ValueError, match="optimised variables only.*'w'"):
        OptimizerGroups(adam, [(keras.optimizers.SGD(), [case.w])]).build([case.lam])

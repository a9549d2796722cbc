"""Reverse mode, forward mode, the unrolled tape and finite differences agree on every family of Keras layers."""

import pytest
import tensorflow as tf
import unrolled
from problems import NETWORKS, assert_close, assert_identical, network_problem

import farhox

# Adam's update has a large third derivative where a gradient is small: a shorter difference suits it.
STEP = {"adam": 1e-5}


def check_reverse(name):
    """Reverse mode alone against finite differences: two traces, where `check` makes six."""
    case = network_problem(name, steps=2)
    variables = case.problem.inner_variables + case.problem.state_variables
    before = [variable.numpy() for variable in variables]
    expected = unrolled.finite_differences(*case[:3])
    assert_close(farhox.ReverseHG().compute(*case[:3]).gradients, expected, 1e-6)
    assert_identical([variable.numpy() for variable in variables], before)


def check(name, dynamics, steps):
    case = network_problem(name, dynamics, steps=steps)
    variables = case.problem.inner_variables + case.problem.state_variables
    before = [variable.numpy() for variable in variables]
    expected = unrolled.finite_differences(*case[:3], step=STEP.get(dynamics, 1e-4))
    assert_close(unrolled.unrolled_hypergradient(*case[:3]), expected, 1e-6)
    for method in (farhox.ReverseHG(), farhox.ForwardHG()):
        assert_close(method.compute(*case[:3]).gradients, expected, 1e-6)
    assert_identical([variable.numpy() for variable in variables], before)


# Statistics; those of all layers of Keras are in test_layer_zoo.
BASIC = ("ConvBatchNormalization",)


@pytest.mark.parametrize("name", [
    name if name in BASIC else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_reverse_mode_and_finite_differences_agree_on_every_layer(name, float64):
    check_reverse(name)


@pytest.mark.slow
def test_reverse_forward_unrolled_tape_and_finite_differences_agree(float64):
    """The slow tests below have every pair of layers and dynamics."""
    check("Dropout", "nesterov", steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("dynamics", ["gradient_descent", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_all_ways_agree_on_every_layer_for_all_dynamics(name, dynamics, float64):
    check(name, dynamics, steps=4)


@pytest.mark.slow
def test_average_pooling_compiles_under_xla(float64):
    case = network_problem("AveragePooling2D", steps=2)
    compiled = tf.function(farhox.ReverseHG().compute, autograph=False, jit_compile=True)
    assert_close(compiled(*case[:3]).gradients, farhox.ReverseHG().compute(*case[:3]).gradients, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG()], ids=["reverse", "forward"])
def test_max_pooling_compiles_under_xla(method, float64):
    case = network_problem("MaxPooling2D", steps=2)
    compiled = tf.function(method.compute, autograph=False, jit_compile=True)
    assert_close(compiled(*case[:3]).gradients, method.compute(*case[:3]).gradients, 1e-9)

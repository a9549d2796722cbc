"""Hypergradients under Keras' dtype policies: those of float32 within the precision of the policy."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import meta
from farhox.data.batches import RepeatedBatch
from farhox.hypergradients import EpisodesHG

# Relative to the length of the float32 hypergradient; more for Adam, whose update is steep where gradients are small.
TOLERANCE = {"mixed_float16": 0.01, "mixed_bfloat16": 0.03, "bfloat16": 0.05}
TOLERANCE_OF_ADAM = {"mixed_float16": 0.03, "mixed_bfloat16": 0.06, "bfloat16": 0.3}
STEPS = 3


def network(kind, policy, penalised=True):
    """A network under a policy, with the weights that it has in float32, and the shape of its inputs."""
    keras.config.set_dtype_policy(policy)
    try:
        layers, l2 = keras.layers, farhox.Hyperparameter(0.2, low=0.0, log=True, name="l2", dtype="float32")
        penalty = {"kernel_regularizer": farhox.L1L2(l2=l2)} if penalised else {}
        if kind == "dense":
            shape, body = [6], [layers.Dense(8, "tanh", **penalty), layers.Dense(3, **penalty)]
        else:  # Without a bias before the normalisation, whose derivative is rounding alone, which Adam makes large.
            shape, body = [8, 8, 1], [layers.Conv2D(4, 3, 2, use_bias=False, **penalty), layers.BatchNormalization(),
                                      layers.Activation("tanh"), layers.Flatten(), layers.Dense(3, **penalty)]
        model = keras.Sequential([keras.Input(shape), *body])
    finally:
        keras.config.set_dtype_policy("float32")
    draws = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            variable.assign(draws.normal(size=variable.shape) / np.prod(variable.shape[:-1]) ** 0.5)
    return model, l2, shape


@functools.cache
def hypergradient(policy, kind, dynamics, method):
    """The hypergradient of a penalty's strength and, where the method sees it, of the learning rate."""
    model, l2, shape = network(kind, policy)
    rate = farhox.Hyperparameter(0.02 if dynamics == "adam" else 0.2, low=0.0, log=True, name="rate", dtype="float32")
    # 0.999 is 1 in bfloat16.
    made = {"sgd": lambda: farhox.GradientDescent(rate), "momentum": lambda: farhox.Momentum(rate, 0.5),
            "adam": lambda: farhox.Adam(rate, beta_2=0.98)}[dynamics]()
    implicit = method == "implicit"
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), made, [l2] if implicit else [l2, rate],
        fixed=[rate] if implicit else None)
    draws = np.random.default_rng(1)
    x = draws.normal(size=[STEPS + 1, 16, *shape]).astype("float32")
    y = draws.integers(0, 3, [STEPS + 1, 16])
    batches = farhox.repeat((x[0], y[0]), STEPS) if implicit else (x[:-1], y[:-1])
    solver = farhox.linear_solvers.Neumann(max_steps=5, step_size=0.1)
    computed = {"reverse": farhox.ReverseHG(), "forward": farhox.ForwardHG(),
                "implicit": farhox.ImplicitHG(linear_solver=solver)}[method].compute(problem, batches, (x[-1], y[-1]))
    assert all(gradient.dtype == tf.float32 for gradient in computed.gradients)
    assert {leaf.dtype.name for leaf in computed.state.variables} == {"bfloat16" if policy == "bfloat16" else "float32"}
    return np.array([float(gradient) for gradient in computed.gradients])


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["reverse", "forward", "implicit"])
@pytest.mark.parametrize("dynamics", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("kind", ["dense", "convolutions"])
@pytest.mark.parametrize("policy", list(TOLERANCE))
def test_hypergradients_are_those_of_float32_within_the_precision_of_the_policy(policy, kind, dynamics, method):
    expected = hypergradient("float32", kind, dynamics, method)
    found = hypergradient(policy, kind, dynamics, method)
    tolerance = (TOLERANCE_OF_ADAM if dynamics == "adam" else TOLERANCE)[policy]
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def meta_gradient(policy):
    model, _, shape = network("dense", policy, penalised=False)
    learner = meta.MAML(model, 0.2, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    draws = np.random.default_rng(2)
    x, y = draws.normal(size=[2, 2, 9, *shape]).astype("float32"), draws.integers(0, 3, [2, 2, 9])
    support, query = (x[0], y[0]), (x[1], y[1])
    batches = RepeatedBatch(tf.nest.map_structure(tf.constant, support), tf.range(STEPS))
    computed = EpisodesHG(farhox.ReverseHG()).compute(learner.problem, batches, ((support[0], query[0]), query[1]))
    return np.concatenate([np.ravel(tf.cast(gradient, tf.float32)) for gradient in computed.gradients])


@pytest.mark.slow
@pytest.mark.parametrize("policy", list(TOLERANCE))
def test_meta_gradients_are_those_of_float32_within_the_precision_of_the_policy(policy):
    expected, found = meta_gradient("float32"), meta_gradient(policy)
    assert np.linalg.norm(found - expected) <= TOLERANCE[policy] * np.linalg.norm(expected)

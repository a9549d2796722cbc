"""Updates of many small variables as one of a vector."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from farhox.training import OptimizerGroups
from farhox.training.flat_updates import FlatUpdates

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.1),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5)),
    "amsgrad": lambda: keras.optimizers.Adam(0.1, amsgrad=True, clipvalue=0.5),
    "adamw": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.0),
    "adamax": lambda: keras.optimizers.Adamax(0.1),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adadelta": lambda: keras.optimizers.Adadelta(0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.1),
    "rmsprop_centred": lambda: keras.optimizers.RMSprop(0.1, momentum=0.5, centered=True),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
    "lion": lambda: keras.optimizers.Lion(0.1),
}
SHAPES = ([], [], [3], [2, 2], [], [2000], [1])  # The last two are updated alone.
DTYPES = (*["float32"] * 6, "float64")


def alone(optimizer, variables):
    """The optimizer's own updates, as a function of gradients."""
    return lambda gradients: optimizer.apply(gradients, variables)


def together(optimizer, variables):
    return FlatUpdates(optimizer, variables).apply


def trained(make_optimizer, updates, shapes=SHAPES, dtypes=DTYPES, steps=4):
    """Values of variables and of an optimizer's state after some updates in a graph, and the operations of it."""
    draws = np.random.default_rng(0)
    variables = [keras.Variable(draws.normal(size=shape), dtype=dtype) for shape, dtype in zip(shapes, dtypes)]
    optimizer = make_optimizer()
    optimizer.build(variables)
    apply = updates(optimizer, variables)
    step = tf.function(lambda *gradients: apply(gradients), autograph=False)
    for _ in range(steps):
        gradients = [tf.constant(draws.normal(size=shape), dtype) for shape, dtype in zip(shapes, dtypes)]
        step(*gradients)
    operations = step.get_concrete_function(*gradients).graph.as_graph_def().node
    return [np.asarray(variable) for variable in [*variables, *optimizer.variables]], operations


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_optimizer(name):
    found, _ = trained(OPTIMIZERS[name], together)
    expected, _ = trained(OPTIMIZERS[name], alone)
    assert len(found) == len(expected)
    for value, right in zip(found, expected):
        assert value.dtype == right.dtype
        np.testing.assert_allclose(value, right, rtol=1e-6 if value.dtype == np.float32 else 1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scalars_take_the_operations_of_one_vector(name):
    def count(number, updates):
        _, operations = trained(OPTIMIZERS[name], updates, [[]] * number, ["float32"] * number, steps=1)
        return len(operations)

    assert count(20, together) - count(10, together) < 0.7 * (count(20, alone) - count(10, alone))


@pytest.mark.parametrize("make_optimizer", [
    lambda: keras.optimizers.Adam(0.1, clipnorm=0.1),
    lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.1),
    lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    lambda: keras.optimizers.Adam(0.1, use_ema=True, ema_overwrite_frequency=2),
    lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
    lambda: keras.optimizers.SGD(0.1),
    lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    lambda: keras.optimizers.Lamb(0.1),
    lambda: keras.optimizers.Nadam(0.1),
])
def test_other_updates_are_the_optimizers_own(make_optimizer):
    of_one_type = SHAPES, ["float32"] * len(SHAPES)
    found, _ = trained(make_optimizer, together, *of_one_type)
    expected, _ = trained(make_optimizer, alone, *of_one_type)
    for value, right in zip(found, expected):
        np.testing.assert_array_equal(value, right)


def test_constraints_of_a_variable_hold():
    variables = [keras.Variable([0.5, 0.5]), *(keras.Variable(float(i)) for i in range(4))]
    variables[0].constraint = keras.constraints.NonNeg()
    optimizer = keras.optimizers.Adam(1.0)
    optimizer.build(variables)
    together(optimizer, variables)([tf.constant([1.0, -1.0]), *[tf.constant(1.0)] * 4])
    np.testing.assert_allclose(variables[0], [0.0, 1.5], atol=1e-5)
    np.testing.assert_allclose([float(variable) for variable in variables[1:]], [-1.0, 0.0, 1.0, 2.0], atol=1e-5)
    assert int(optimizer.iterations) == 1


def test_a_rate_that_is_changed_between_updates_counts_in_every_group():
    variables = [keras.Variable(0.0) for _ in range(9)]
    groups = OptimizerGroups(keras.optimizers.Adam(1.0), [(keras.optimizers.Adam(0.1), variables[4:8])])
    groups.build(variables)
    update = tf.function(lambda: groups.apply([tf.constant(-1.0)] * 9, variables))
    update()
    groups.learning_rate = 0.5
    update()
    # Of gradients that are all alike Adam makes steps of the rate.
    np.testing.assert_allclose([float(v) for v in variables], [1.5] * 4 + [0.2] * 4 + [1.5], rtol=1e-4)
    assert [int(optimizer.iterations) for optimizer in groups.optimizers] == [2, 2]


def test_settings_that_are_changed_before_the_first_update_count():
    variables = [keras.Variable(0.0) for _ in range(4)]
    optimizer = keras.optimizers.Adam(1.0)
    optimizer.build(variables)
    update = together(optimizer, variables)
    optimizer.beta_1, optimizer.clipvalue = 0.0, 1e-7  # Clipped to as much as Adam's epsilon.
    update([tf.constant(3.0)] * 4)
    root = np.sqrt(1.0 - 0.999)
    np.testing.assert_allclose([float(variable) for variable in variables], [-root / (root + 1.0)] * 4, rtol=1e-4)


def test_an_optimizer_of_other_variables_says_so():
    optimizer = keras.optimizers.Adam(1.0)
    optimizer.build([keras.Variable(0.0) for _ in range(4)])
    update = together(optimizer, [keras.Variable(0.0) for _ in range(4)])
    with pytest.raises(ValueError, match="Unknown variable"):
        update([tf.constant(1.0)] * 4)


def test_variables_of_groups_may_come_in_another_order():
    variables = [keras.Variable(0.0) for _ in range(5)]
    groups = OptimizerGroups(keras.optimizers.Adam(1.0), [(keras.optimizers.Adam(0.1), variables[4:])])
    groups.build(variables)
    groups.apply([tf.constant(float(i) - 2.5) for i in reversed(range(5))], variables[::-1])
    np.testing.assert_allclose([float(v) for v in variables], [1.0, 1.0, 1.0, -1.0, -0.1], rtol=1e-4)

"""Keras code as pure functions: nothing outside changes, and everything that was put in can be differentiated."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from farhox._core import functional


@pytest.fixture
def variable():
    return keras.Variable([1.0, 2.0], dtype="float64", name="w")


def test_bound_variables_read_as_their_tensors_and_others_as_themselves(variable):
    other = keras.Variable(10.0, dtype="float64")
    result = functional.call(lambda factor: factor * variable + other, 2.0, bindings=[
        (variable, tf.constant([3.0, 4.0], tf.float64))])
    np.testing.assert_array_equal(result.value, [16.0, 18.0])


def test_assignments_stay_inside_and_are_handed_back(variable):
    other = keras.Variable(10.0, dtype="float64")

    def closure():
        variable.assign(variable + 1.0)
        other.assign_add(5.0)
        return variable * 2.0

    result = functional.call(closure, bindings=[(variable, tf.constant([3.0, 4.0], tf.float64))])
    np.testing.assert_array_equal(result.value, [8.0, 10.0])
    np.testing.assert_array_equal(result.values[0], [4.0, 5.0])
    assert [id(v) for v in result.assigned] == [id(variable), id(other)]
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])
    assert other.numpy() == 10.0


def test_values_of_untouched_bindings_come_back_in_order(variable):
    other = keras.Variable(10.0, dtype="float64")
    bindings = [(other, tf.constant(1.0, tf.float64)), (variable, tf.constant([3.0, 4.0], tf.float64))]
    result = functional.call(lambda: tf.constant(0.0), bindings=bindings)
    for value, (_, tensor) in zip(result.values, bindings):
        np.testing.assert_array_equal(value, tensor)
    assert result.assigned == []


def test_the_later_of_two_bindings_of_a_variable_counts(variable):
    first, second = tf.constant([3.0, 3.0], tf.float64), tf.constant([4.0, 4.0], tf.float64)
    result = functional.call(
        lambda: tf.identity(variable), bindings=iter([(variable, first), (variable, second)]))
    np.testing.assert_array_equal(result.value, second)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_inside_a_call_sees_what_is_bound_around_it_and_its_derivative(variable, compiled):
    inner = keras.Variable(0.0, dtype="float64")

    def nested():
        variable.assign(2.0 * variable)
        return functional.call(
            lambda: inner * keras.ops.sum(variable ** 2), bindings=[(inner, tf.constant(3.0, tf.float64))]).value

    def derivative(tensor):
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            value = functional.call(nested, bindings=[(variable, tensor)]).value
        return value, tape.gradient(value, tensor)

    value, slope = (tf.function(derivative) if compiled else derivative)(tf.constant([3.0, 4.0], tf.float64))
    np.testing.assert_allclose(value, 300.0)
    np.testing.assert_allclose(slope, [72.0, 96.0])


def test_a_variable_that_is_returned_becomes_its_bound_tensor(variable):
    tensor = tf.constant([3.0, 4.0], tf.float64)
    result = functional.call(lambda: {"value": variable, "nothing": None}, bindings=[(variable, tensor)])
    assert tf.is_tensor(result.value["value"]) and result.value["nothing"] is None
    np.testing.assert_array_equal(result.value["value"], tensor)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_result_is_differentiable_in_what_was_put_in(variable, compiled):
    def derivative(tensor):
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            value = functional.call(lambda: keras.ops.sum(variable ** 3), bindings=[(variable, tensor)]).value
        return tape.gradient(value, tensor)

    derivative = tf.function(derivative) if compiled else derivative
    np.testing.assert_allclose(derivative(tf.constant([3.0, 4.0], tf.float64)), [27.0, 48.0])


def test_losses_of_layers_are_collected_inside_and_leave_no_trace():
    layer = keras.layers.Dense(2, activity_regularizer="l2", kernel_regularizer="l2", dtype="float64")
    layer.build([None, 3])

    def objective(x):
        layer(x)
        return sum(layer.losses)

    kernel = tf.ones([3, 2], tf.float64)
    value = functional.call(objective, np.ones([1, 3]), bindings=[(layer.kernel, kernel)]).value
    # Keras' "l2" has the strength 0.01; the outputs are 3, the activity loss is divided by the batch size.
    np.testing.assert_allclose(value, 0.01 * 6 + 0.01 * 18, rtol=1e-6)
    assert len(layer.losses) == 1


def test_an_error_in_the_closure_leaves_the_scope(variable):
    def closure():
        variable.assign([9.0, 9.0])
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        functional.call(closure, bindings=[])
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])
    variable.assign([5.0, 6.0])
    np.testing.assert_array_equal(variable.numpy(), [5.0, 6.0])


def test_a_variable_assigned_to_another_one_is_assigned_its_bound_tensor(variable):
    other = keras.Variable(0.0 * variable.numpy())
    result = functional.call(lambda: other.assign(variable), bindings=[
        (variable, tf.convert_to_tensor(variable) + 1.0), (other, tf.convert_to_tensor(other))])
    np.testing.assert_array_equal(result.values[1], variable.numpy() + 1.0)

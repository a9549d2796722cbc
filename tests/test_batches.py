"""Inner batches: the same ones in any order, in data sets and compiled functions, and errors for what is not one."""

import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.data import batches

X = np.arange(24.0).reshape(4, 6)
Y = np.arange(4)


def make(kind):
    """Three inner batches of the kind, and the list of what they must be."""
    if kind == "repeat":
        return farhox.repeat({"x": X, "y": Y}, 3), [{"x": X, "y": Y}] * 3
    if kind == "gather":
        indices = np.array([[0, 1], [3, 3], [2, 0]])
        return farhox.gather({"x": X, "y": Y}, indices), [{"x": X[i], "y": Y[i]} for i in indices]
    expected = [{"x": X + t, "y": Y + t} for t in range(3)]
    if kind == "stack":
        return farhox.stack(expected), expected
    return {"x": np.stack([X, X + 1, X + 2]), "y": np.stack([Y, Y + 1, Y + 2])}, expected


kinds = pytest.mark.parametrize("kind", ["repeat", "stack", "gather", "bare nest"])


def assert_equal(batch, expected):
    tf.nest.map_structure(np.testing.assert_array_equal, batch, expected)


@kinds
def test_batches_are_read_by_their_step_in_any_order(kind):
    made, expected = make(kind)
    made = batches.as_inner_batches(made)
    assert batches.num_steps(made) == 3
    for step in (2, 0, 1, 0):
        assert_equal(batches.batch_at(made, tf.constant(step)), expected[step])


@kinds
def test_batches_are_elements_of_a_data_set_with_a_static_number_of_steps(kind):
    made, expected = make(kind)
    dataset = tf.data.Dataset.from_tensors((made, X)).repeat(2)
    assert batches.num_steps(dataset.element_spec[0]) == 3
    for element, _ in dataset:
        assert_equal(batches.batch_at(element, 1), expected[1])


@kinds
def test_batches_are_arguments_of_a_compiled_function_that_traces_once(kind):
    made, expected = make(kind)
    traces = []

    @tf.function(autograph=False)
    def read(inner_batches, step):
        traces.append(batches.num_steps(inner_batches))
        return batches.batch_at(batches.as_inner_batches(inner_batches), step)

    made = batches.as_inner_batches(made)
    for step in range(3):
        assert_equal(read(made, tf.constant(step)), expected[step])
    assert traces == [3]


def test_number_of_steps_may_be_unknown_while_tracing():
    count = tf.function(lambda x: batches.num_steps(x) + 0, autograph=False, input_signature=[tf.TensorSpec([None, 2])])
    assert count(np.zeros([5, 2], "float32")).numpy() == 5


def test_numpy_integers_count_steps():
    assert batches.num_steps(farhox.repeat(X, np.int64(4))) == 4


def test_gather_keeps_one_copy_of_the_data():
    data = tf.constant(X)
    assert farhox.gather(data, np.zeros([100, 2], int)).data is data


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, None, "3"])
def test_repeat_refuses_a_number_of_steps_that_is_not_a_positive_integer(steps):
    with pytest.raises(ValueError, match="must be a positive integer. Received: "):
        farhox.repeat(X, steps)


@pytest.mark.parametrize("given, rule", [
    ([], "at least one batch"),
    ([(X, Y), (X,)], "the same structure"),
    ([(X, Y), {"x": X}], "the same structure"),
    ([(X, Y), (X[:2], Y[:2])], "the same shapes"),
])
def test_stack_refuses_batches_that_do_not_match(given, rule):
    with pytest.raises(ValueError, match=rule):
        farhox.stack(given)


@pytest.mark.parametrize("data, indices, error, rule", [
    (X, [[0.0, 1.0]], TypeError, "must be integers"),
    (X, [0, 1], ValueError, r"shape \[T, batch\]"),
    (X, [[], []], TypeError, "must be integers"),
    (X, np.zeros([2, 0], int), ValueError, r"shape \[T, batch\]"),
    ((X, Y[:2]), [[0, 1]], ValueError, r"same number of examples. Received lengths: \[2, 4\]"),
    ((X, 1.0), [[0, 1]], ValueError, "Received a scalar"),
    ((), [[0, 1]], ValueError, "Received no array"),
    (X, [[0, 4]], ValueError, r"from 0 to the number of examples - 1 \(3\). Received indices from 0 to 4"),
    (X, [[-1, 0]], ValueError, "Received indices from -1 to 0"),
])
def test_gather_refuses_indices_and_arrays_that_do_not_fit(data, indices, error, rule):
    with pytest.raises(error, match=rule):
        farhox.gather(data, indices)


@pytest.mark.parametrize("given, rule", [
    ((), "at least one tensor"),
    ((X, 1.0), "leading axis T"),
    (np.zeros([0, 4]), "T=0"),
    (batches.GatheredBatches(X, np.zeros([0, 4], int)), "T=0"),
    (batches.RepeatedBatch(X, tf.range(0)), "T=0"),
    ((np.zeros([3, 2]), np.zeros([4, 2])), r"same leading axis T. Received leading axes: \[3, 4\]"),
])
def test_inner_batches_without_a_common_number_of_steps_are_refused(given, rule):
    with pytest.raises(ValueError, match=rule):
        batches.as_inner_batches(given)

"""bilevel_dataset: hyper-iterations from arrays and from tf.data."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.data import k_fold_dataset
from farhox.data.batches import batch_at, num_steps
from farhox.data.finite import first_not_finite

X, Y = np.arange(30.0).reshape(30, 1), np.arange(30)
X_VAL, Y_VAL = -np.arange(8.0).reshape(8, 1), np.arange(8)


def dataset(**settings):
    return farhox.bilevel_dataset((X, Y), (X_VAL, Y_VAL), **{"inner_steps": 3, **settings})


def test_full_batches_are_the_whole_data_in_every_step():
    ((inner, outer),) = list(dataset())
    assert num_steps(inner) == 3
    for t in range(3):
        np.testing.assert_array_equal(batch_at(inner, t)[0], X)
    np.testing.assert_array_equal(outer[0], X_VAL)


def test_an_epoch_goes_once_through_the_training_data():
    elements = list(dataset(batch_size=5))
    assert len(elements) == 2  # 30 examples, 15 in a hyper-iteration.
    seen = np.concatenate([batch_at(inner, t)[1] for inner, _ in elements for t in range(3)])
    np.testing.assert_array_equal(np.sort(seen), Y)


def test_batches_keep_examples_and_labels_together_and_know_their_index():
    for inner, _ in dataset(batch_size=5, index=True):
        x, y, index = batch_at(inner, 1)
        np.testing.assert_array_equal(x[:, 0], y)
        np.testing.assert_array_equal(index, y)
        assert index.dtype == tf.int64


def test_one_hyper_iteration_may_need_more_than_all_examples():
    (element,) = list(dataset(batch_size=20, inner_steps=7))
    assert num_steps(element[0]) == 7


def test_the_order_is_seeded_and_changes_from_epoch_to_epoch():
    def epoch(data):
        return np.concatenate([np.ravel(inner.indices) for inner, _ in data])

    first, other = dataset(batch_size=5, seed=3), dataset(batch_size=5, seed=4)
    epochs = epoch(first), epoch(first)
    assert not np.array_equal(*epochs) and not np.array_equal(epochs[0], epoch(other))
    np.testing.assert_array_equal(epochs[0], epoch(dataset(batch_size=5, seed=3)))


@pytest.mark.one_case
@pytest.mark.parametrize("make", [
    lambda: dataset(batch_size=5, outer_batch_size=4, seed=0),
    lambda: k_fold_dataset((X, Y), 3, inner_steps=2, batch_size=5, seed=0)], ids=["bilevel", "k_fold"])
def test_the_order_does_not_depend_on_the_global_seed(make):
    orders = []
    for global_seed in (None, 0, 7):
        if global_seed is not None:
            keras.utils.set_random_seed(global_seed)
        data = make()
        orders.append([np.ravel(leaf) for _ in range(2) for element in data for leaf in tf.nest.flatten(element)])
    for order in orders[1:]:
        for leaf, expected in zip(order, orders[0]):
            np.testing.assert_array_equal(leaf, expected)


def test_outer_batches_have_their_own_size():
    outer = [outer for _, outer in dataset(batch_size=5, outer_batch_size=4)]
    assert [part[0].shape for part in outer] == [(4, 1)] * 2
    np.testing.assert_array_equal(np.sort(np.concatenate([part[1] for part in outer])), Y_VAL)


def test_outer_batches_are_drawn_in_an_order_of_their_own():
    """With one seed for both, the outer batches of data used twice would be the inner ones."""
    data = farhox.bilevel_dataset((X, Y), (X, Y), inner_steps=1, batch_size=5, outer_batch_size=5)
    inner, outer = zip(*((batch_at(inner, 0)[1].numpy(), outer[1].numpy()) for inner, outer in data))
    assert sorted(np.ravel(inner)) == sorted(np.ravel(outer)) == list(Y)
    assert not np.array_equal(inner, outer)


def examples(count=30, sign=1.0):
    return tf.data.Dataset.from_tensor_slices((sign * X[:count], Y[:count]))


def labels(inner):
    return np.concatenate([np.ravel(batch_at(inner, t)[1]) for t in range(num_steps(inner))]).tolist()


def streamed(train, validation=(X_VAL, Y_VAL), inner_steps=3, **settings):
    return farhox.bilevel_dataset(train, validation, inner_steps, **settings)


def test_batches_of_tf_data_are_taken_as_they_come_and_go_on_from_epoch_to_epoch():
    # 8 batches in a pass, the last one with 2 examples, which is filled up from the next pass.
    data = streamed(examples().batch(4), examples(8, -1.0).batch(3))
    assert int(data.cardinality()) == 2
    epochs = [[(labels(inner), outer[1].numpy().tolist()) for inner, outer in data] for _ in range(3)]
    assert [inner for epoch in epochs for inner, _ in epoch] == [
        [(12 * k + i) % 30 for i in range(12)] for k in range(6)]
    assert [outer for epoch in epochs for _, outer in epoch] == [[0, 1, 2], [3, 4, 5], [6, 7]] * 2
    for inner, _ in data:
        x, y = batch_at(inner, 2)
        assert x.shape == (4, 1)
        np.testing.assert_array_equal(x[:, 0], y)


def test_single_examples_of_tf_data_are_batched_here():
    data = streamed(examples(), examples(8), batch_size=5, outer_batch_size=2)
    elements = list(data)
    assert [labels(inner) for inner, _ in elements] == [list(range(15)), list(range(15, 30))]
    assert [outer[1].numpy().tolist() for _, outer in elements] == [[0, 1], [2, 3]]


@pytest.mark.one_case
@pytest.mark.parametrize("of_unknown_length", [False, True])
def test_single_examples_without_a_batch_size_are_full_batches_drawn_anew(of_unknown_length):
    def drawn(data):
        data = data.map(lambda x, y: (x + tf.random.normal([1], dtype=x.dtype), y))
        return data.filter(lambda x, y: True) if of_unknown_length else data

    data = streamed(drawn(examples()), drawn(examples(8)))
    (first,), (second,) = list(data), list(data)
    assert first[0].batch[0].shape == (30, 1) and first[1][0].shape == (8, 1)
    np.testing.assert_array_equal(batch_at(first[0], 0)[0], batch_at(first[0], 2)[0])
    for old, new in ((first[0].batch, second[0].batch), (first[1], second[1])):
        np.testing.assert_array_equal(old[1], new[1])
        assert not np.intersect1d(old[0], new[0]).size


@pytest.mark.one_case
@pytest.mark.parametrize("batched", [False, True])
def test_augmentation_is_drawn_anew_on_every_pass_even_when_it_is_seeded(batched):
    # Of an iterator that starts anew, TensorFlow repeats the draws of seeded operations.
    data = tf.data.Dataset.from_tensor_slices((np.zeros([40], "float32"), np.zeros([40], "int64")))
    data = data.map(lambda x, y: (x + tf.random.normal([], seed=1), y))
    train = streamed(data.batch(10)) if batched else streamed(data, batch_size=10)
    passes = [{float(v) for inner, _ in train for v in tf.reshape(tf.gather(inner.data[0], inner.indices), [-1])}
              for _ in range(3)]
    assert [len(values) for values in passes] == [30] * 3 and len(set().union(*passes)) == 90


def test_the_way_back_meets_the_batches_of_the_way_forward():
    # Random batches: the last inner step's gradient on another draw would be another number.
    train = tf.data.Dataset.range(8).map(lambda i: (tf.random.normal([1], seed=2), tf.ones([]))).batch(2)
    rate = farhox.Hyperparameter(0.3, low=0.0, dtype="float64")
    w = keras.Variable(np.zeros([1]), dtype="float64")
    problem = farhox.BilevelProblem(
        lambda batch: tf.reduce_mean(tf.square(tf.linalg.matvec(tf.cast(batch[0], w.dtype), w) - 1.0)),
        lambda batch: tf.reduce_sum(tf.square(w - 1.0)), inner_variables=[w], outer_variables=[rate],
        dynamics=farhox.GradientDescent(rate))
    ((inner, outer),) = streamed(train, hyper_iterations=1)
    result = farhox.ReverseHG().compute(problem, inner, outer)
    value, derivative = 0.0, 0.0  # dw/drate, along with w.
    for t in range(3):
        x = batch_at(inner, t)[0].numpy()[:, 0].astype("float64")
        gradient = np.mean(2 * x * (x * value - 1.0))
        derivative += -gradient - 0.3 * np.mean(2 * x * x) * derivative
        value -= 0.3 * gradient
    scale = tf.sigmoid(tf.convert_to_tensor(rate.variable))  # The derivative of softplus.
    np.testing.assert_allclose(result.gradients[0], 2 * (value - 1.0) * derivative * scale, rtol=1e-10)


class Pages(keras.utils.PyDataset):
    """30 examples in batches of 4, with the number of passes in place of the input."""

    def __init__(self, count=8):
        super().__init__()
        self.count, self.passes = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        y = Y[4 * index:4 * index + 4]
        return np.full([len(y), 1], self.passes, "float32"), y

    def on_epoch_end(self):
        self.passes += 1


def test_a_py_dataset_is_read_in_a_new_order_on_each_pass():
    data = streamed(Pages(), Pages(2), inner_steps=5)
    epochs = [list(data) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [1] * 3  # Of 20 examples.
    seen = sum((labels(inner) for ((inner, _),) in epochs), [])
    assert sorted(seen[:30]) == sorted(seen[30:]) + sorted(set(range(30)) - set(seen[30:]))
    assert seen[:30] != sorted(seen[:30]) and seen[:30] != seen[30:]
    passes = np.concatenate([np.ravel(batch_at(inner, t)[0]) for ((inner, _),) in epochs for t in range(5)])
    np.testing.assert_array_equal(passes, [0.0] * 30 + [1.0] * 30)
    again = streamed(Pages(), Pages(2), inner_steps=5)
    assert labels(next(iter(again))[0]) == seen[:20]
    assert labels(next(iter(streamed(Pages(), Pages(2), inner_steps=5, seed=1)))[0]) != seen[:20]


def test_outer_batches_of_a_py_dataset_come_in_an_order_of_their_own():
    inner, outer = zip(*((labels(inner), outer[1].numpy().tolist()) for inner, outer in streamed(
        Pages(7), Pages(7), inner_steps=1)))  # Full batches alone.
    assert len(inner) == len(outer) > 5 and sorted(inner) == sorted(outer) and inner != outer


def test_example_weights_find_their_examples_in_a_shuffled_stream():
    numbered = examples().enumerate().map(lambda index, example: (*example, index)).shuffle(30, seed=1).batch(5)
    for inner, _ in streamed(numbered):
        _, y, index = batch_at(inner, 1)
        np.testing.assert_array_equal(y, index)


@pytest.mark.one_case
@pytest.mark.parametrize("make", [
    lambda: streamed(examples().map(lambda x, y: (
        x + tf.random.normal([1], seed=1, dtype=x.dtype), y)).shuffle(9, seed=1).batch(5)),
    lambda: farhox.bilevel_dataset((X, Y), (X_VAL, Y_VAL), 3, batch_size=5, outer_batch_size=3),
], ids=["stream", "arrays"])
def test_skipped_epochs_leave_the_order_and_draws_of_those_after_them(make):
    def epochs(data, count):
        return [[np.ravel(batch_at(inner, t)[0]).tolist() + np.ravel(outer[1]).tolist()
                 for inner, outer in data for t in range(3)] for _ in range(count)]

    whole, resumed = make(), make()
    expected = epochs(whole, 5)
    resumed.skip_epochs(3)
    assert epochs(resumed, 2) == expected[3:] and expected[3] != expected[4]
    with pytest.raises(ValueError, match="epochs must be a non-negative integer"):
        resumed.skip_epochs(-1)


@pytest.mark.slow
def test_a_run_on_a_stream_trains_in_fit():
    w = keras.Variable(1.0)
    strength = farhox.Hyperparameter(0.1, low=0.0)
    problem = farhox.BilevelProblem(
        lambda batch: tf.reduce_mean(tf.square(tf.cast(batch[0], w.dtype) - w)) / 900.0 + strength() * w ** 2,
        lambda batch: tf.square(w), inner_variables=[w], outer_variables=[strength])
    optimizer = farhox.HyperOptimizer(problem, online=True)
    optimizer.compile(run_eagerly=False)
    history = optimizer.fit(streamed(examples().batch(4)), epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2 and optimizer.hyper_iterations == 4


STREAM_LARGER_THAN_MEMORY = """
import resource
import tensorflow as tf
import farhox

batch = tf.data.Dataset.range(400).map(
    lambda i: (tf.fill([2500000], tf.cast(i, tf.float32))[tf.newaxis], i[tf.newaxis]))
data = farhox.bilevel_dataset(batch, batch.take(3), inner_steps=4)
next(iter(data))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000, used + 1_000_000_000))
print(sum(float(inner.data[0][0, 0]) for inner, _ in data))
"""


@pytest.mark.slow
def test_memory_stays_flat_on_a_stream_larger_than_memory():
    # 4 GB in batches of 10 MB, with an address space of one more GB.
    ended = subprocess.run(
        [sys.executable, "-c", STREAM_LARGER_THAN_MEMORY], capture_output=True, text=True, check=True)
    assert float(ended.stdout) == sum(range(4, 400, 4))


@pytest.mark.parametrize("arguments, error, message", [
    ({"inner_steps": 0}, ValueError, "inner_steps must be a positive integer"),
    ({"batch_size": 2.5}, ValueError, "batch_size must be a positive integer"),
    ({"outer_batch_size": -1}, ValueError, "outer_batch_size must be a positive integer"),
    ({"batch_size": 5, "seed": 0.5}, ValueError, "seed must be an integer"),
    ({"batch_size": 31}, ValueError, "batch_size must not exceed the number of training examples"),
    ({"outer_batch_size": 9}, ValueError, "outer_batch_size must not exceed the number of validation examples"),
    ({"train": (X[:0], Y[:0])}, ValueError, "train must hold at least one example"),
    ({"validation": (X, Y[:3])}, ValueError, "All arrays of validation must have the same number"),
    ({"train": tf.data.Dataset.from_tensor_slices((X, Y)).take(0)}, ValueError, "train must hold at least one example"),
    ({"train": tf.data.Dataset.from_tensor_slices((X, Y)).repeat()}, ValueError, "train must be finite"),
    ({"train": examples().batch(4).take(0)}, ValueError, "train must hold at least one example"),
    ({"train": Pages(0)}, ValueError, "train must hold at least one example"),
    ({"train": examples().batch(4), "batch_size": 4}, ValueError, "batch_size is for a train data set of single"),
    ({"train": Pages(), "batch_size": 4}, ValueError, "PyDataset makes its own batches"),
    ({"train": examples(), "batch_size": 31}, ValueError, "batch_size must not exceed the number of training examples"),
    ({"validation": examples(8), "outer_batch_size": 9}, ValueError, "must not exceed the number of validation"),
    ({"train": examples().batch(4).repeat()}, ValueError, "hyper-iterations in an epoch must be known"),
    ({"train": examples().batch(4), "index": True}, ValueError, "must bring the index of each example itself"),
    ({"hyper_iterations": 0}, ValueError, "hyper_iterations must be a positive integer"),
    ({"train": examples().ragged_batch(4).map(lambda x, y: (tf.RaggedTensor.from_tensor(x), y))}, TypeError,
     "must be dense tensors"),
    ({"train": (np.where(X == 7.0, np.nan, X), Y)}, ValueError,
     r"train must hold finite numbers. Received NaN or infinity in array 1 at index \[7, 0\]"),
    ({"validation": (X, np.where(Y == 3, np.inf, Y))}, ValueError,
     r"validation must hold finite numbers. Received NaN or infinity in array 2 at index \[3\]"),
    ({"validation": (np.full([8, 2, 2], np.nan), Y_VAL)}, ValueError, r"in array 1 at index \[0, 0\]"),
    ({"train": (object(), Y)}, TypeError, "train must be a nest of arrays"),
])
def test_bad_input_is_refused(arguments, error, message):
    arguments = {"train": (X, Y), "validation": (X_VAL, Y_VAL), "inner_steps": 3, **arguments}
    with pytest.raises(error, match=message):
        farhox.bilevel_dataset(**arguments)


def test_order_follows_from_seed_and_iteration_however_the_data_are_read():
    data, small = (np.arange(200.0),), (np.arange(4.0),)

    def epoch(dataset):
        return [element[0].indices.numpy().tolist() for element in dataset]

    # 9 of the 10 batches of a pass: reading ahead begins another pass or does not.
    make = [farhox.bilevel_dataset(data, small, 3, batch_size=20, seed=4) for _ in range(4)]
    whole = [[epoch(dataset) for _ in range(3)] for dataset in make[:3]]
    assert whole[0] == whole[1] == whole[2]
    assert whole[0][0] != whole[0][1] and int(make[3].cardinality()) == 3
    for _ in range(2):
        next(iter(make[3]))  # Left early, after one element.
    assert epoch(make[3]) == whole[0][2]


@pytest.mark.parametrize("shape, index, place", [
    ((), (), [2, -1, -1]), ((3,), (2,), [2, 2, -1]), ((3, 4), (1, 3), [2, 1, 3]),
    ((3, 4, 2, 2), (1, 3, 0, 1), [2, 1, 3]),
    ((0, 4), None, [0, 0, 0]), ((3, 4), None, [0, 0, 0])])
def test_the_place_of_a_value_that_is_not_finite_is_found_eagerly_in_graphs_and_by_xla(shape, index, place):
    values = np.zeros(shape)
    if index is not None:
        values[index] = np.nan
    nest = (tf.constant(Y), {"a": tf.constant(values), "b": tf.constant(["a", "b"])})
    numbers = (nest[0], tf.constant(values))
    np.testing.assert_array_equal(first_not_finite(nest), place)
    np.testing.assert_array_equal(tf.function(first_not_finite, autograph=False)(nest), place)
    np.testing.assert_array_equal(tf.function(first_not_finite, autograph=False, jit_compile=True)(numbers), place)
    unknown = tf.function(first_not_finite, input_signature=[tf.TensorSpec(None, tf.float64)])(tf.constant(values))
    assert (int(unknown[0]) == 0) == (place[0] == 0)

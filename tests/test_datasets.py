"""bilevel_dataset: hyper-iterations from arrays and from tf.data."""

import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.data.batches import batch_at, num_steps

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


def test_outer_batches_have_their_own_size():
    outer = [outer for _, outer in dataset(batch_size=5, outer_batch_size=4)]
    assert [part[0].shape for part in outer] == [(4, 1)] * 2
    np.testing.assert_array_equal(np.sort(np.concatenate([part[1] for part in outer])), Y_VAL)


def test_tf_data_gives_what_arrays_give():
    slices = [tf.data.Dataset.from_tensor_slices(part) for part in ((X, Y), (X_VAL, Y_VAL))]
    streamed = farhox.bilevel_dataset(*slices, inner_steps=3, batch_size=5, index=True)
    for (inner, outer), (expected_inner, expected_outer) in zip(streamed, dataset(batch_size=5, index=True)):
        for a, b in zip(tf.nest.flatten((inner, outer)), tf.nest.flatten((expected_inner, expected_outer))):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("arguments, error, message", [
    ({"inner_steps": 0}, ValueError, "inner_steps must be a positive integer"),
    ({"batch_size": 2.5}, ValueError, "batch_size must be a positive integer"),
    ({"outer_batch_size": -1}, ValueError, "outer_batch_size must be a positive integer"),
    ({"batch_size": 31}, ValueError, "batch_size must not exceed the number of training examples"),
    ({"outer_batch_size": 9}, ValueError, "outer_batch_size must not exceed the number of validation examples"),
    ({"train": (X[:0], Y[:0])}, ValueError, "train must hold at least one example"),
    ({"validation": (X, Y[:3])}, ValueError, "All arrays of validation must have the same number"),
    ({"train": tf.data.Dataset.from_tensor_slices((X, Y)).take(0)}, ValueError, "train must hold at least one example"),
    ({"train": tf.data.Dataset.from_tensor_slices((X, Y)).repeat()}, ValueError, "train must be finite"),
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

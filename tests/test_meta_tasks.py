"""Episodes of one's own tasks: any form, any size, the numbers of tasks that are not padded."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from test_meta_learners import meta_gradients

from farhox import meta

SIZES = [(2, 3), (4, 1), (3, 5)]


def part(size, seed, dtype="float32"):
    random = np.random.default_rng(seed)
    return random.normal(size=[size, 3]).astype(dtype), random.normal(size=[size, 1]).astype(dtype)


def tasks(dtype="float32"):
    """Regression tasks of different size."""
    return [(part(support, 2 * i, dtype), part(query, 2 * i + 1, dtype)) for i, (support, query) in enumerate(SIZES)]


def sets(*counts):
    """A set of examples for each list of numbers of examples per class: x says its place, y its class."""
    made = []
    for each in counts:
        y = np.repeat(np.arange(len(each)) + 5, each)
        made.append((np.arange(len(y), dtype="float32")[:, None], y))
    return made


def drawn(source, number=6):
    return [tf.nest.map_structure(np.asarray, tuple(source.draw(index))) for index in range(number)]


@pytest.mark.slow
def test_uneven_tasks_have_the_meta_gradient_and_losses_of_tasks_that_are_not_padded(float64):
    model = keras.Sequential([
        keras.Input([3]), keras.layers.Dense(4, use_bias=False), keras.layers.BatchNormalization(),
        keras.layers.Activation("tanh"), keras.layers.Dense(1)])
    learner = meta.MAML(model, 0.1, 2, loss="mean_squared_error")
    source = meta.TaskEpisodes(tasks("float64"))
    batch = next(iter(source.dataset(3)))
    assert batch.support[0].shape == (3, 4, 3) and batch.query[2].shape == (3, 5)
    one_by_one = [meta.Episode(*tf.nest.map_structure(lambda leaf: tf.constant(leaf)[None], task))
                  for task in tasks("float64")]
    expected = [np.mean(columns, axis=0) for columns in zip(*(meta_gradients(learner, each) for each in one_by_one))]
    assert_close(meta_gradients(learner, batch), expected, 1e-9)
    np.testing.assert_allclose(sorted(learner._judge(batch)["loss"]),
                               sorted(float(learner._judge(each)["loss"][0]) for each in one_by_one), rtol=1e-9)


def test_every_task_comes_once_before_any_comes_again_in_another_order_each_time():
    source = meta.TaskEpisodes(tasks(), seed=3)
    first = [episode[0][0][0, 0] for episode in drawn(source, 30)]
    assert [episode[0][0][0, 0] for episode in drawn(source, 30)] == first
    passes = [tuple(first[start:start + 3]) for start in range(0, 30, 3)]
    assert all(sorted(each) == sorted(passes[0]) for each in passes) and len(set(passes)) > 1


def test_even_tasks_have_no_weights_and_given_weights_stay():
    even = meta.TaskEpisodes([(part(2, 0), part(3, 1)), (part(2, 2), part(3, 3))])
    assert [len(each) for each in even.draw(0)] == [2, 2]
    (x, y), query = tasks()[1]
    weighted = meta.TaskEpisodes([((x, y, np.array([1, 2, 0, 4], "float32")), query), tasks()[0]])
    weights = {tuple(episode[0][2]) for episode in drawn(weighted, 2)}
    assert weights == {(1, 2, 0, 4), (1, 1, 0, 0)}


@pytest.mark.parametrize("form", [
    lambda: (task for task in tasks()), lambda: itertools.cycle(tasks()), lambda: [meta.Episode(*t) for t in tasks()],
    lambda: {f"task {i}": {"support": s, "query": q} for i, (s, q) in enumerate(tasks())},
    lambda: [[list(map(np.ndarray.tolist, each)) for each in task] for task in tasks()],
    lambda: tf.nest.map_structure(tf.constant, tasks())],
    ids=["generator", "endless", "episodes", "dictionary", "lists", "tensors"])
def test_tasks_come_in_any_form(form):
    expected, found = drawn(meta.TaskEpisodes(tasks())), drawn(meta.TaskEpisodes(form(), count=3))
    for a, b in zip(tf.nest.flatten(expected), tf.nest.flatten(found)):
        np.testing.assert_array_equal(a, b)


def test_one_task_and_nests_of_inputs_are_taken():
    task = tasks()[0]
    for one in (task, meta.Episode(*task), {"support": task[0], "query": task[1]}):
        assert meta.TaskEpisodes(one).num_tasks == 1
    assert meta.TaskEpisodes(part(5, 0), shots=2).num_tasks == 1
    nested = [(({"a": x, "b": x[:, :1]}, y), ({"a": z, "b": z[:, :1]}, v)) for (x, y), (z, v) in tasks()]
    assert {key: value.shape for key, value in meta.TaskEpisodes(nested).draw(0).support[0].items()} == {
        "a": (4, 3), "b": (4, 1)}


@pytest.mark.one_case
@pytest.mark.parametrize("queries", [None, 2])
def test_sets_are_divided_anew_into_support_and_queries_of_each_class(queries):
    counts = [[4, 3], [6, 5, 4]]
    episodes = drawn(meta.TaskEpisodes(sets(*counts), shots=1, queries=queries, seed=1), 8)
    chosen = set()
    for support, query in episodes:
        (places, labels), (asked, asked_labels) = (
            (each[0][each[2] > 0][:, 0], each[1][each[2] > 0]) for each in (support, query))
        own = counts[len(labels) - 2]
        np.testing.assert_array_equal(np.bincount(labels)[5:], [1] * len(own))
        np.testing.assert_array_equal(np.bincount(asked_labels)[5:], [queries or n - 1 for n in own])
        both = [*places, *asked]
        assert len(set(both)) == len(both) and set(both) <= set(range(sum(own)))
        for x, y in ((places, labels), (asked, asked_labels)):
            np.testing.assert_array_equal(y, np.repeat(np.arange(len(own)) + 5, own)[x.astype(int)])
        chosen.add(tuple(places))
    assert len(chosen) > 4


def test_sets_without_classes_are_divided_by_their_number_of_examples():
    for support, query in drawn(meta.TaskEpisodes([part(5, 0), part(7, 1)], shots=3)):
        assert len(support) == len(query) == 3 and support[2].sum() == 3
        assert query[2].sum() in (2, 4) and len(query[2]) == 4


def test_what_is_too_small_is_named_and_left_out_if_asked_for():
    small = dict(zip(("lion", "zebra"), sets([4, 4], [4, 2])))
    with pytest.raises(ValueError, match="at least shots \\+ queries = 3 examples. Received: 2 of class 6 in task"):
        meta.TaskEpisodes(small, shots=1, queries=2)
    source = meta.TaskEpisodes(small, shots=1, queries=2, leave_out_small=True)
    assert source.names == ["lion"] and source.left_out == ["zebra"]
    classes = {"cat": np.zeros([5, 2]), "dog": np.ones([4, 2]), "emu": np.full([3, 2], 2.0), "fox": np.ones([1, 2])}
    with pytest.raises(ValueError, match="class 'emu' of 3 examples, class 'fox' of 1 examples for shots=1"):
        meta.ClassificationEpisodes(classes, ways=2, shots=1, queries=3)
    kept = meta.ClassificationEpisodes(classes, ways=2, shots=1, queries=3, leave_out_small=True)
    assert kept.left_out == ["emu", "fox"] and kept.num_classes == 2
    (x, y), _ = kept.draw(0)
    assert sorted(np.asarray(x)[:, 0]) == [0, 1] and list(y.numpy()) == [0, 1]


@pytest.mark.slow
def test_single_episodes_are_meta_batches_of_one():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    results = []
    for data in (meta.Episode(*tasks()[0]), tasks()[0], tf.data.Dataset.from_tensors(tasks()[0]),
                 meta.TaskEpisodes(tasks()[0]).dataset(1, count=1)):
        model.set_weights([np.ones([3, 1]), np.zeros([1])])
        learner = meta.MAML(model, 0.1, 1, loss="mean_squared_error")
        learner.compile(keras.optimizers.SGD(0.1))
        learner.fit(data, verbose=0)
        results.append(np.concatenate([np.ravel(weight) for weight in model.get_weights()]))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-6)


@pytest.mark.parametrize("make, error, message", [
    (lambda: meta.TaskEpisodes([]), ValueError, "at least one task. Received: none"),
    (lambda: meta.TaskEpisodes(3), TypeError, "tasks must be an iterable of tasks.* Received: int"),
    (lambda: meta.TaskEpisodes([part(3, 0)]), TypeError, "must be a pair .* for the support of task '0': ndarray"),
    (lambda: meta.TaskEpisodes({"a": 3}), TypeError, "must be a pair .* for task 'a': int"),
    (lambda: meta.TaskEpisodes([(part(3, 0), (part(3, 0)[0], part(2, 0)[1]))]), ValueError,
     r"The query of a task must have .* x and y as many. Received for task '0': shapes \[\(3, 3\), \(2, 1\)\]"),
    (lambda: meta.TaskEpisodes([(part(0, 0), part(1, 0))]), ValueError, "support of a task must have at least one"),
    (lambda: meta.TaskEpisodes([tasks()[0], (part(2, 0), (np.ones([2, 4], "f"), np.ones([2, 1], "f")))]), ValueError,
     r"the same inputs and labels.*float32 \[3\].* in task '0', .*float32 \[4\].* in task '1'"),
    (lambda: meta.TaskEpisodes([(part(2, 0), (np.full([2, 3], np.nan), np.ones([2, 1])))]), ValueError,
     "query of a task must be finite. Received NaN or infinity in task '0', example 0"),
    (lambda: meta.TaskEpisodes([((["a", [1]], [0, 1]), part(2, 0))]), TypeError, "arrays of one shape and type"),
    (lambda: meta.TaskEpisodes([((np.array([None, 1]), [0, 1]), part(2, 0))]), TypeError, "arrays of one shape"),
    (lambda: meta.TaskEpisodes(tasks(), queries=2), ValueError, "queries needs shots"),
    (lambda: meta.TaskEpisodes(tasks(), shots=0), ValueError, "shots must be a positive integer"),
    (lambda: meta.TaskEpisodes([part(3, 0)], shots=3), ValueError, "at least shots .* 1 = 4 examples. Received: 3 in"),
    (lambda: meta.TaskEpisodes([part(3, 0)], shots=3, leave_out_small=True), ValueError, "none but 1 that are too sma"),
    (lambda: meta.TaskEpisodes(tf.data.Dataset.from_tensors(1).repeat()), ValueError, "Tasks must come to an end"),
    (lambda: meta.ClassificationEpisodes({}), ValueError, "at least one class"),
    (lambda: meta.ClassificationEpisodes({"a": np.ones([9, 2]), "b": np.ones([9, 3])}), ValueError, "have one shape"),
    (lambda: meta.ClassificationEpisodes({"a": np.ones([9, 2])}, [1]), ValueError, "labels must be None"),
])
def test_wrong_tasks_are_errors_that_name_the_task(make, error, message):
    with pytest.raises(error, match=message):
        make()

"""Data sets of hyper-iterations: elements (inner_batches, outer_batch) from arrays or `tf.data`."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Data
from farhox.data.batches import GatheredBatches, RepeatedBatch, as_inner_batches, as_tensors
from farhox.data.finite import raise_if_not_finite
from farhox.data.streams import HyperIterations, continued, inner_stream, is_stream, outer_stream

KERAS_IS_OLD = keras.__version__.startswith("3.8.")


def bilevel_dataset(train: Data, validation: Data, inner_steps: int, batch_size: int | None = None,
                    outer_batch_size: int | None = None, index: bool = False, seed: int = 0,
                    hyper_iterations: int | None = None) -> tf.data.Dataset:
    """A `tf.data.Dataset` whose elements are hyper-iterations, for `HyperOptimizer.fit`.

    **Arrays** are held once, and batches are made of indices into them. Without `batch_size` inner training is
    full-batch and one epoch is one hyper-iteration. With it, a hyper-iteration takes `inner_steps` batches of a
    shuffled stream that goes through the training examples again and again; one epoch is as many hyper-iterations as go
    once through them, and at least one. Shuffling goes on over the epochs.

    **Streams** are read as they come: a `tf.data.Dataset` of batches, as `image_dataset_from_directory` or `.batch(n)`
    make it, or a `keras.utils.PyDataset`, whose batches are shuffled as in `fit`. A hyper-iteration takes the next
    `inner_steps` batches, and they alone are held for the way back. One iterator goes on through all epochs, so that
    shuffling and random augmentation are drawn anew on every pass. A `tf.data.Dataset` of single examples is batched
    here with `batch_size`; without it, each hyper-iteration reads all of them as one batch.

    ```python
    train = keras.utils.image_dataset_from_directory("photos/train", image_size=(64, 64))
    data = farhox.bilevel_dataset(train, validation, inner_steps=20)
    ```

    Args:
        train: Training data: a nest of arrays such as (x, y), a `tf.data.Dataset` or a `keras.utils.PyDataset`.
        validation: Outer data, of the same kinds. Of a stream of batches, each hyper-iteration takes one.
        inner_steps: Positive int, T.
        batch_size: Positive int or None, examples in an inner batch. Not for data that are batched already.
        outer_batch_size: Positive int or None, examples in an outer batch. None: all of them, or batches as they come.
        index: Bool. Inner batches are (x, y, index) with the position of each example in the training arrays (int64). A
            stream brings its index itself, since only it knows how it shuffles:
            `examples.enumerate().map(lambda index, example: (*example, index)).shuffle(1000).batch(32)`.
        seed: Int, seed of the shuffling.
        hyper_iterations: Positive int, hyper-iterations in an epoch. Default: as many as go once through the training
            data; needed where their number is not known, as with `Dataset.from_generator`.

    Returns:
        A `tf.data.Dataset` of pairs with a method `skip_epochs(n)`, for runs that go on after an interruption.

    Raises:
        ValueError: If a data set is empty, arrays differ in length or hold NaN or infinity, a size is not a positive
            integer or larger than the data, data that are batched are to be batched again, the length of an epoch is
            not known, or a stream is to be numbered with `index=True`.
        TypeError: If the data are of another kind, or not made of dense tensors.
    """
    for name, value in (("inner_steps", inner_steps), ("batch_size", batch_size),
                        ("outer_batch_size", outer_batch_size), ("hyper_iterations", hyper_iterations)):
        if value is not None or name == "inner_steps":
            checks.positive_integer(name, value)
    checks.integer("seed", seed)
    if is_stream(train):
        if index:
            raise ValueError("index=True numbers the examples of arrays. A stream must bring the index of each example "
                             f"itself, as (x, y, index). Received: index=True with a {type(train).__name__}")
        inner, epoch = inner_stream(train, inner_steps, batch_size, seed)
    else:
        inner, epoch = _inner_batches(train, inner_steps, batch_size, index, seed)
    if hyper_iterations is None and epoch is None:
        raise ValueError("The hyper-iterations in an epoch must be known. Received training data of unknown length: "
                         "give hyper_iterations, or apply tf.data.experimental.assert_cardinality to them.")
    epoch = epoch if hyper_iterations is None else hyper_iterations
    if is_stream(validation):
        outer = outer_stream(validation, outer_batch_size, seed + 1)
    else:
        outer = _outer_batches(validation, outer_batch_size, seed + 1)
    elements = tf.data.Dataset.zip(inner, outer)
    if is_stream(train) or is_stream(validation):
        return continued(elements, epoch)
    dataset = elements.take(epoch).prefetch(tf.data.AUTOTUNE)
    return HyperIterations(dataset, lambda: next(iter(dataset)))


def _inner_batches(train, inner_steps, batch_size, index, seed):
    """Endless inner batches of arrays, and the hyper-iterations that go once through them."""
    train, num_train = _arrays("train", train)
    if index:
        numbered = tf.range(num_train, dtype=tf.int64)
        train = (*train, numbered) if isinstance(train, (tuple, list)) else (train, numbered)
    if batch_size is None:
        return tf.data.Dataset.from_tensors(RepeatedBatch(train, tf.range(inner_steps))).repeat(), 1
    if batch_size > num_train:
        raise ValueError(f"batch_size must not exceed the number of training examples. Received: "
                         f"batch_size={batch_size} for {num_train} examples")
    indices = _shuffled_indices(num_train, batch_size, seed).batch(inner_steps, drop_remainder=True)
    return indices.map(lambda chosen: GatheredBatches(train, chosen)), max(1, num_train // (batch_size * inner_steps))


def _outer_batches(validation, batch_size, seed):
    """Endless outer batches of arrays."""
    validation, count = _arrays("validation", validation)
    if batch_size is None:
        return tf.data.Dataset.from_tensors(validation).repeat()
    if batch_size > count:
        raise ValueError(f"outer_batch_size must not exceed the number of validation examples. Received: "
                         f"outer_batch_size={batch_size} for {count} examples")
    return _shuffled_indices(count, batch_size, seed).map(
        lambda chosen: tf.nest.map_structure(lambda leaf: tf.gather(leaf, chosen), validation))


def _shuffled_indices(count, batch_size, seed):
    """Batches of indices, an endless stream reshuffled on every pass; each iteration starts another one.

    A pass follows from the seed, the iteration and its own number alone. `Dataset.shuffle` would draw from a generator
    at the start of each pass, and reading ahead starts passes that nobody sees: the order would depend on timing.
    """
    def passes(number):
        return tf.data.Dataset.counter().map(lambda index: tf.random.experimental.stateless_shuffle(
            tf.range(count, dtype=tf.int64), seed=[number, index]))

    # Keras' progress bar needs the length of what is taken from the stream.
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return _number_of_each_iteration(seed).flat_map(passes).rebatch(batch_size, drop_remainder=True).apply(endless)


def _number_of_each_iteration(seed):
    """A data set with one number, another one in each iteration: those of a seed are always the same.

    `tf.data.Dataset.random` would mix the global seed into it, which whoever made it does not see.
    """
    variant = tf.raw_ops.RandomDatasetV2(
        seed=tf.constant(1, tf.int64), seed2=tf.constant(seed, tf.int64),
        seed_generator=tf.raw_ops.DummySeedGenerator(), output_types=[tf.int64], output_shapes=[[]],
        rerandomize_each_iteration=True)
    return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.int64)).take(1)


def _arrays(name, data):
    """Data as a nest of tensors with a common leading axis, and its length."""
    if isinstance(data, tf.data.Dataset):
        data = _read(name, data)
    try:
        data = as_tensors(name, data)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a nest of arrays such as (x, y), or a tf.data.Dataset of examples. "
                        f"Received: {type(data).__name__}") from error
    leaves = tf.nest.flatten(data)
    lengths: list[Any] = [leaf.shape[0] if leaf.shape.rank else None for leaf in leaves]
    if not leaves or None in lengths or len(set(lengths)) > 1:
        raise ValueError(f"All arrays of {name} must have the same number of examples. Received lengths: {lengths}")
    if lengths[0] == 0:
        raise ValueError(f"{name} must hold at least one example. Received an empty data set.")
    raise_if_not_finite(name, data)
    return data, lengths[0]


def _read(name, dataset):
    """All examples of a data set, stacked: inner batches are read again on the way back, so they must stay."""
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(f"{name} must be finite. Received a tf.data.Dataset that repeats without end: take(n) cuts it")
    examples = list(dataset.as_numpy_iterator())
    if not examples:
        raise ValueError(f"{name} must hold at least one example. Received an empty tf.data.Dataset.")
    return tf.nest.map_structure(lambda *leaves: np.stack(leaves), *examples)


def k_fold_dataset(data: Data, folds: int, inner_steps: int, batch_size: int | None = None,
                   seed: int = 0) -> tf.data.Dataset:
    """A `tf.data.Dataset` of K-fold cross-validation for `EpisodesHG`: one element holds all folds.

    Episode k trains on all examples but those of fold k, and its outer batch is fold k; the outer loss and the
    hypergradient are means over folds. The examples are shuffled once; what is left over when they are divided by
    `folds` takes part in no fold.

    Args:
        data: A nest of arrays such as (x, y), or an unbatched `tf.data.Dataset` of examples.
        folds: Int of at least 2.
        inner_steps: Positive int, T.
        batch_size: Positive int or None, examples in an inner batch, drawn without replacement from the training part
            and anew in each element. None: full batch.
        seed: Int, seed of the division into folds and of the batches.

    Returns:
        A `tf.data.Dataset` with one element (inner_batches, outer_batch) per epoch.

    Raises:
        ValueError: If `folds` is less than 2 or there are fewer examples than folds, or a size is out of range.
    """
    data, count = _arrays("data", data)
    for name, value, least in (("folds", folds, 2), ("inner_steps", inner_steps, 1), ("batch_size", batch_size, 1)):
        if value is not None or name != "batch_size":
            checks.integer_of_at_least(name, value, least)
    if count < folds:
        raise ValueError(f"There must be at least one example per fold. Received: folds={folds} for {count} examples")
    order = np.random.default_rng(seed).permutation(count)[:count - count % folds].reshape(folds, -1)
    training = np.stack([np.delete(order, k, axis=0).reshape(-1) for k in range(folds)])
    if batch_size is None:
        batch_size = training.shape[1]
    if batch_size > training.shape[1]:
        raise ValueError(f"batch_size must not exceed the {training.shape[1]} training examples of a fold. "
                         f"Received: batch_size={batch_size}")
    outer = tf.nest.map_structure(lambda leaf: tf.gather(leaf, order), data)

    def element(shuffled):
        chosen = tf.gather(tf.constant(training), tf.reshape(shuffled, [inner_steps, batch_size]), axis=1)
        return GatheredBatches(data, chosen), outer

    if batch_size == training.shape[1]:
        shuffled = tf.data.Dataset.from_tensors(tf.tile(tf.range(batch_size, dtype=tf.int64), [inner_steps]))
    else:
        shuffled = _shuffled_indices(training.shape[1], batch_size, seed).batch(inner_steps, drop_remainder=True)
    return shuffled.map(element).take(1)


def as_hyper_iterations(data: Data, strategy: Any) -> Data:
    """The data of `HyperOptimizer.fit` as a data set, checked.

    Args:
        data: A `tf.data.Dataset` of pairs (inner_batches, outer_batch), a distributed one, or one such pair.
        strategy: The `tf.distribute.Strategy`. Each replica takes elements of its own: none is split.

    Returns:
        A `tf.data.Dataset`, or a distributed one where there are several replicas.

    Raises:
        ValueError: If the data are something else, or empty; or there are several replicas on Keras 3.8, whose `fit`
            does not take what `distribute_datasets_from_function` returns.
    """
    if isinstance(data, tf.distribute.DistributedDataset):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2:
        data = tf.data.Dataset.from_tensors((as_inner_batches(data[0]), as_tensors("outer_batch", data[1])))
    if not isinstance(data, tf.data.Dataset):
        raise ValueError("Data must be a tf.data.Dataset of pairs (inner_batches, outer_batch), as "
                         f"farhox.bilevel_dataset makes it, or one such pair. Received: {type(data).__name__}")
    dataset: Any = data
    if dataset.cardinality() == 0:
        raise ValueError("The data set must hold at least one pair (inner_batches, outer_batch). "
                         "Received an empty one.")
    if strategy.num_replicas_in_sync == 1:
        return dataset
    if KERAS_IS_OLD:
        raise ValueError("Training on several replicas needs Keras 3.9 or newer. Received: "
                         f"{strategy.num_replicas_in_sync} replicas on Keras {keras.__version__}")
    return strategy.distribute_datasets_from_function(
        lambda context: dataset.shard(context.num_input_pipelines, context.input_pipeline_id))


def pair(element: Any) -> Any:
    """(inner_batches, outer_batch), or a ValueError if the element of the data set is not such a pair."""
    if not isinstance(element, (tuple, list)) or len(element) != 2:
        length = f" of length {len(element)}" if isinstance(element, (tuple, list)) else ""
        raise ValueError("An element of the data set must be a pair (inner_batches, outer_batch). "
                         f"Received: {type(element).__name__}{length}")
    return element


def raise_if_endless(data: Data, name: str, steps: int | None) -> None:
    """Raises a ValueError for data without an end of which nobody says how much is wanted.

    Args:
        data: A data set.
        name: Name of the argument that says it.
        steps: Its value.
    """
    if steps is None and isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(f"{name} must be given for data that repeat without end. Received: {name}=None")

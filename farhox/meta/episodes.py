"""Episodes: few-shot tasks drawn from labelled examples or from a family of functions."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Array, Batch, Tensor


class Episode(NamedTuple):
    """One task, or several along a leading axis of episodes.

    Attributes:
        support: Tuple (x, y), what a learner adapts to: [ways * shots, ...].
        query: Tuple (x, y), what it is judged by: [ways * queries, ...].
    """

    support: Batch
    query: Batch


class EpisodeSource(abc.ABC):
    """Where episodes come from: episode k of a source is always the same one.

    Subclasses define `draw`.
    """

    @abc.abstractmethod
    def draw(self, index: int) -> Episode:
        """The episode with number `index`, a scalar int64 tensor: an `Episode`. Pure TensorFlow."""

    def dataset(self, meta_batch_size: int, start: Any = 0, count: int | None = None, shards: int = 1,
                shard: int = 0) -> tf.data.Dataset:
        """Episodes in meta-batches, in the order of their numbers.

        Args:
            meta_batch_size: Positive int, episodes in an element.
            start: Non-negative int, number of the first episode; or a scalar integer variable, which is read whenever
                the data set is read from its beginning: with `start=learner.episodes_seen` a training goes on with
                the first episode that it has not seen, also after `load_weights` and an interruption.
            count: Positive int, a multiple of `meta_batch_size`: the number of episodes. Default: without end.
            shards: Positive int. Every one of so many processes takes meta-batches of its own, none draws the others'.
            shard: Non-negative int below `shards`: meta-batches number `shard`, `shard + shards`, ... are in the data.

        Returns:
            A `tf.data.Dataset` of `Episode`s with a leading axis of episodes.

        Raises:
            ValueError: If an argument is out of range.
        """
        checks.positive_integer("meta_batch_size", meta_batch_size)
        checks.positive_integer("shards", shards)
        if not checks.is_integer(shard) or not 0 <= shard < shards:
            raise ValueError(f"shard must be a non-negative integer below shards={shards}. Received: {shard!r}")
        is_variable = isinstance(start, (tf.Variable, keras.Variable))
        if not is_variable:
            checks.non_negative_integer("start", start)
        elif tuple(start.shape) or not tf.as_dtype(start.dtype).is_integer:
            raise ValueError("start must be a non-negative integer, or a scalar integer variable. Received a variable "
                             f"of shape {tuple(start.shape)} and type {tf.as_dtype(start.dtype).name}")
        if count is None:
            length, size = tf.int64.max - 1, tf.data.INFINITE_CARDINALITY
        else:
            length = size = checks.positive_integer("count", count)
            if count % meta_batch_size:
                raise ValueError("count must be a multiple of meta_batch_size, so that all elements have one shape. "
                                 f"Received: count={count}, meta_batch_size={meta_batch_size}")
        if is_variable:
            # Read once, when the first episode is drawn: training moves the variable on.
            first = tf.data.Dataset.from_tensors(0).map(lambda _: tf.cast(tf.convert_to_tensor(start), tf.int64))
            numbers = first.flat_map(lambda first: tf.data.Dataset.range(length).map(lambda index: first + index))
            numbers = numbers.apply(tf.data.experimental.assert_cardinality(size))
        elif count is None:
            numbers = tf.data.Dataset.counter(start)
        else:
            numbers = tf.data.Dataset.range(start, start + count)
        if shards > 1:
            numbers = numbers.batch(meta_batch_size, drop_remainder=True).shard(shards, shard).unbatch()
        episodes = numbers.map(self.draw, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return episodes.batch(meta_batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


class ClassificationEpisodes(EpisodeSource):
    """Episodes of a few-shot classification: some classes, a few examples of each, labels from 0 to ways - 1.

    ```python
    episodes = farhox.meta.ClassificationEpisodes(images, labels, ways=5, shots=1, queries=15, seed=0)
    learner.fit(episodes.dataset(meta_batch_size=4), epochs=10, steps_per_epoch=100)
    ```

    Support and query examples are ordered by class, and the classes of an episode are in random order.

    Args:
        images: Array [examples, ...]. uint8 is kept as it is and divided by 255 when drawn. Or a dictionary from
            classes to such arrays, of any number of examples.
        labels: Array [examples] of integers, any numbers, or of strings. None of a dictionary.
        ways: Positive int, classes in an episode.
        shots: Positive int, support examples per class.
        queries: Positive int, query examples per class.
        seed: Non-negative int.
        leave_out_small: Bool. Classes with fewer examples than shots + queries are left out; else they are an error.

    Attributes:
        num_classes: Int.
        left_out: List of the classes that were left out.

    Raises:
        TypeError: If images or labels are no arrays.
        ValueError: If a number is not positive, there are fewer classes than ways, a class has fewer examples than
            shots + queries (it is named), images and labels differ in number, or an image holds NaN or infinity.
    """

    def __init__(self, images: Array, labels: Array = None, ways: int = 5, shots: int = 1, queries: int = 15,
                 seed: int = 0, leave_out_small: bool = False) -> None:
        images, labels = _of_classes(images, labels) if isinstance(images, dict) else _examples(images, labels)
        for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
            checks.positive_integer(name, value)
        checks.non_negative_integer("seed", seed)
        names, counts = np.unique(labels, return_counts=True)
        small = counts < shots + queries
        if small.any() and not leave_out_small:
            listed = ", ".join(f"class {name!r} of {count} examples" for name, count in zip(
                names[small][:5].tolist(), counts[small]))
            raise ValueError(
                f"Every class must have at least shots + queries examples. Received: {listed}"
                f"{' and others' if small.sum() > 5 else ''} for shots={shots} and queries={queries}. "
                "leave_out_small=True leaves them out")
        self.left_out = names[small].tolist()
        kept = np.isin(labels, names[~small])
        images, labels = images[kept], labels[kept]
        _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if len(counts) < ways:
            raise ValueError("There must be at least as many classes as ways. "
                             f"Received: {len(counts)} classes for ways={ways}"
                             f"{f', and {len(self.left_out)} that are too small' if self.left_out else ''}")
        self.ways, self.shots, self.queries, self.seed = int(ways), int(shots), int(queries), int(seed)
        self.num_classes = len(counts)
        order = np.argsort(numbers, kind="stable")
        # On the host: the arrays are what data pipelines read.
        with tf.device("CPU:0"):
            self._images = tf.constant(images[order])
            self._starts = tf.constant(np.cumsum(counts) - counts, tf.int32)
            self._counts = tf.constant(counts, tf.int32)
        self._most = int(counts.max())

    def draw(self, index: int) -> Episode:
        seed = tf.stack([tf.constant(self.seed, tf.int64), episode_number(index)])
        class_seed, example_seed = tf.unstack(tf.random.split(seed, 2))
        classes = first_of_shuffled(tf.random.stateless_uniform([self.num_classes], class_seed), self.ways)
        # A random order of the examples of each class; places past its last example come at the end.
        keys = tf.random.stateless_uniform([self.ways, self._most], example_seed)
        there = tf.range(self._most)[None, :] < tf.gather(self._counts, classes)[:, None]
        chosen = first_of_shuffled(tf.where(there, keys, 2.0), self.shots + self.queries)
        chosen += tf.gather(self._starts, classes)[:, None]
        labels = tf.range(self.ways)
        return Episode((self._read(chosen[:, :self.shots]), tf.repeat(labels, self.shots)),
                       (self._read(chosen[:, self.shots:]), tf.repeat(labels, self.queries)))

    def _read(self, indices):
        images = tf.gather(self._images, tf.reshape(indices, [-1]))
        return tf.cast(images, tf.float32) / 255.0 if images.dtype == tf.uint8 else images


class SinusoidEpisodes(EpisodeSource):
    """Regression tasks y = a sin(x - b), a family of few-shot regression.

    Amplitudes a are uniform in [0.1, 5], phases b in [0, π], points x in [-5, 5]; x and y have shape [points, 1].

    Args:
        shots: Positive int, support points.
        queries: Positive int, query points.
        seed: Non-negative int.

    Raises:
        ValueError: If a number is not positive.

    Reference:
        [Finn et al., 2017](https://arxiv.org/abs/1703.03400), section 5.1.
    """

    def __init__(self, shots: int = 10, queries: int = 10, seed: int = 0) -> None:
        checks.positive_integer("shots", shots)
        checks.positive_integer("queries", queries)
        self.shots, self.queries, self.seed = int(shots), int(queries), int(seed)

    def draw(self, index: int) -> Episode:
        x, amplitude, phase = self._task(index)
        y = amplitude * tf.sin(x - phase)
        return Episode((x[:self.shots], y[:self.shots]), (x[self.shots:], y[self.shots:]))

    def curve(self, index: int) -> tuple[float, float]:
        """(amplitude, phase) of the episode with number `index`, two floats."""
        _, amplitude, phase = self._task(index)
        return float(amplitude), float(phase)

    def _task(self, index):
        seed = tf.stack([tf.constant(self.seed, tf.int64), episode_number(index)])
        seeds = tf.unstack(tf.random.split(seed, 3))
        x = tf.random.stateless_uniform([self.shots + self.queries, 1], seeds[0], -5.0, 5.0)
        return (x, tf.random.stateless_uniform([], seeds[1], 0.1, 5.0),
                tf.random.stateless_uniform([], seeds[2], 0.0, math.pi))


def split_classes(images: Array, labels: Array, sizes: Sequence[int | None],
                  seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits examples by their classes: no class is in two parts.

    Args:
        images: Array [examples, ...].
        labels: Integer array [examples].
        sizes: List of positive ints, classes in each part; the last may be None for all that remain.
        seed: Int, of the random order of classes.

    Returns:
        List of (images, labels), one per part.

    Raises:
        TypeError: If images or labels are no arrays, or `sizes` no list.
        ValueError: If there are fewer classes than the sizes name, or images and labels differ in number.
    """
    images, labels = _examples(images, labels)
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"sizes must be a list of numbers of classes. Received: {sizes!r}")
    classes = np.unique(labels)
    given = [size for size in sizes if size is not None]
    for size in given:
        checks.positive_integer("A size", size)
    if sum(given) + (None in sizes) > len(classes) or None in sizes[:-1]:
        raise ValueError("sizes must be numbers of classes, no more in all than there are; only the last may be None. "
                         f"Received: {list(sizes)} for {len(classes)} classes")
    order = np.random.default_rng(seed).permutation(classes)
    ends = np.cumsum([len(order) - sum(given) if size is None else size for size in sizes])
    parts = np.split(order, ends)[:len(sizes)]
    chosen = [np.isin(labels, part) for part in parts]
    return [(images[mask], labels[mask]) for mask in chosen]


def with_rotations(images: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    """Every class four times: as it is and turned by 90, 180 and 270 degrees, each a class of its own.

    Args:
        images: Array [examples, height, width, channels] with height = width.
        labels: Integer array [examples].

    Returns:
        images [4 * examples, ...], labels [4 * examples].

    Raises:
        TypeError: If images or labels are no arrays.
        ValueError: If the images are not square, or images and labels differ in number.

    Reference:
        [Santoro et al., 2016](https://arxiv.org/abs/1605.06065), section 4.1.
    """
    images, labels = _examples(images, labels)
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise ValueError("images must have shape [examples, height, width, channels] with height = width. "
                         f"Received shape: {images.shape}")
    turned = np.concatenate([np.rot90(images, k, axes=(1, 2)) for k in range(4)])
    classes, numbers = np.unique(labels, return_inverse=True)
    return turned, np.concatenate([numbers + k * len(classes) for k in range(4)])


def new_episodes_seen() -> keras.Variable:
    """A variable that counts the episodes that a learner was trained on."""
    return keras.Variable(0, dtype="int64", trainable=False, name="episodes_seen", aggregation="only_first_replica")


def count_episodes(learner: Any, number: Any) -> None:
    """Counts the episodes of a meta-batch, which every replica has one of."""
    seen = tf.cast(number, tf.int64) * learner.distribute_strategy.num_replicas_in_sync
    learner.episodes_seen.assign(tf.convert_to_tensor(learner.episodes_seen) + seen)


def _of_classes(classes, labels):
    """Images and labels of a dictionary from classes to images."""
    if labels is not None:
        raise ValueError("labels must be None where images are a dictionary from classes to images. "
                         f"Received: {type(labels).__name__}")
    if not classes:
        raise ValueError("There must be at least one class. Received an empty dictionary")
    parts = [_examples(images, np.zeros(len(images), int))[0] for images in classes.values()]
    shapes = {str(name): part.shape[1:] for name, part in zip(classes, parts)}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The images of all classes must have one shape. Received: {shapes}")
    return np.concatenate(parts), np.repeat([str(name) for name in classes], [len(part) for part in parts])


def _examples(images, labels):
    """Images and labels as arrays of one length."""
    arrays = []
    for name, value in (("images", images), ("labels", labels)):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"{name} must be an array, all examples of one shape. Received: {type(value).__name__} of "
                            "several shapes") from error
        if array.dtype == object and array.ndim and all(isinstance(entry, (str, bytes)) for entry in array.flat):
            array = array.astype(str)
        if array.dtype == object or not array.ndim:
            raise TypeError(f"{name} must be an array with one entry per example. Received: {type(value).__name__}"
                            f"{' of objects' if array.ndim else ''}")
        arrays.append(array)
    images, labels = arrays
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS":
        raise ValueError("labels must be integers or strings of shape [examples]. "
                         f"Received: {labels.dtype} of shape {labels.shape}")
    if len(images) != len(labels):
        raise ValueError("There must be one label for each image. "
                         f"Received: {len(images)} images and {len(labels)} labels")
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
        raise ValueError("images must hold finite numbers. Received NaN or infinity in example "
                         f"{np.argwhere(~np.isfinite(images))[0][0]}")
    return images, labels


def episode_number(index: Any) -> Tensor:
    """The number of an episode as an int64 tensor."""
    if checks.is_integer(index):
        checks.non_negative_integer("The number of an episode", index)
    index = tf.convert_to_tensor(index)
    if not index.dtype.is_integer or index.shape.rank != 0:
        raise ValueError("The number of an episode must be a scalar integer. "
                         f"Received: {index.dtype.name} of shape {index.shape}")
    return tf.cast(index, tf.int64)


def first_of_shuffled(keys: Any, count: Any) -> Tensor:
    """Places of the `count` least keys along the last axis, in their order: int32."""
    return tf.argsort(keys, axis=-1, stable=True)[..., :count]

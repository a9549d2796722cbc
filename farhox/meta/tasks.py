"""Episodes of one's own tasks: from lists, dictionaries or generators of arrays, of any size."""

import itertools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Tensor
from farhox.meta.episodes import Episode, EpisodeSource, episode_number, first_of_shuffled

_TASK = ("A task must be a pair (support, query), each (x, y) or (x, y, sample weights), or a dictionary with these "
         "two keys; with shots=, one set of examples (x, y)")


class TaskEpisodes(EpisodeSource):
    """Episodes of given tasks: every task once in random order, then all of them in another order, and so on.

    ```python
    tasks = [((x_1, y_1), (more_x_1, more_y_1)), ((x_2, y_2), (more_x_2, more_y_2)), ...]    # Of any sizes.
    episodes = farhox.meta.TaskEpisodes(tasks)
    episodes = farhox.meta.TaskEpisodes(sets, shots=5)     # Sets of examples (x, y), divided anew in each episode.
    learner.fit(episodes.dataset(meta_batch_size=4), epochs=10, steps_per_epoch=100)
    ```

    Tasks of different size are padded to that of the greatest one with examples of weight zero, which have no part in
    anything: the numbers are those of tasks that are not padded.

    Args:
        tasks: Iterable of tasks, or a dictionary from names to tasks, or one task. A task is an `Episode` or another
            pair (support, query), each (x, y) or (x, y, sample weights); or a dictionary with the keys "support" and
            "query". With `shots`, a task is one set of examples (x, y) or a dictionary with the keys "x" and "y".
            x and y are arrays or nests of arrays, alike in all tasks but for the number of examples.
        shots: Positive int: in each episode so many examples of a task are its support set, chosen at random; of a task
            whose y are class numbers, so many of each class.
        queries: Positive int, the same for the query set. Default: all other examples.
        leave_out_small: Bool. Tasks that have too few examples, or a class with too few, are left out; else they are
            an error that names them.
        count: Positive int, the number of tasks to take of an iterable without end. Default: all.
        seed: Non-negative int.

    Attributes:
        names: List of the names of the tasks, their numbers by default.
        left_out: List of the names of those that were left out.

    Raises:
        TypeError: If a task is none.
        ValueError: If there is no task, tasks differ in more than their size, parts of a task differ in their number of
            examples, a number is not finite, or a task is too small.
    """

    def __init__(self, tasks: Any, shots: int | None = None, queries: int | None = None, leave_out_small: bool = False,
                 count: int | None = None, seed: int = 0) -> None:
        if shots is not None:
            checks.positive_integer("shots", shots)
        if queries is not None:
            checks.positive_integer("queries", queries)
            if shots is None:
                raise ValueError("queries needs shots: without it, tasks say themselves what their queries are. "
                                 f"Received: queries={queries}")
        self.seed = checks.non_negative_integer("seed", seed)
        names, tasks = _listed(tasks, count, shots is None)
        self._split = None if shots is None else (shots, queries)
        self.names, self.left_out, parts = [], [], []
        for name, task in zip(names, tasks):
            read = _support_and_query(name, task) if shots is None else [_set(name, task)]
            small = None if shots is None else _too_small(name, read[0], shots, queries)
            if small is None:
                self.names.append(name)
                parts.append(read)
            elif leave_out_small:
                self.left_out.append(name)
            else:
                raise ValueError(f"{small}. leave_out_small=True leaves out tasks that are too small")
        if not parts:
            raise ValueError("There must be at least one task. Received: none"
                             f"{f' but {len(self.left_out)} that are too small' if self.left_out else ''}")
        weighted = any(len(part) == 3 for task in parts for part in task)
        stores = [_Examples(self.names, column, weighted) for column in zip(*parts)]
        if shots is None:
            self._stores = stores
        else:
            self._store, self._chosen = stores[0], _Division(parts, shots, queries)
            self._weighted = weighted or not self._chosen.even
        self.num_tasks = len(parts)

    def draw(self, index: int) -> Episode:
        number = episode_number(index)
        seed = tf.stack([tf.constant(self.seed, tf.int64), number // self.num_tasks])
        order_seed = tf.random.split(seed, 2)[0]
        order = first_of_shuffled(tf.random.stateless_uniform([self.num_tasks], order_seed), self.num_tasks)
        task = order[number % self.num_tasks]
        if self._split is None:
            return Episode(*(store.of(task) for store in self._stores))
        seed = tf.random.split(tf.stack([tf.constant(self.seed, tf.int64), number]), 2)[1]
        places = self._chosen.places(task, seed)
        return Episode(*(self._store.at(task, chosen, there if self._weighted else None) for chosen, there in places))


class _Examples:
    """Examples of all tasks one after another, on the host, where data pipelines read."""

    def __init__(self, names: Any, parts: Any, weighted: bool) -> None:
        sizes = np.array([len(tf.nest.flatten(part[0])[0]) for part in parts])
        if weighted:
            parts = [part if len(part) == 3 else (*part, np.ones(size, keras.config.floatx()))
                     for part, size in zip(parts, sizes)]
        for name, part in zip(names, parts):
            _check_alike(names[0], parts[0], name, part)
        self._most, self._padded, self._weighted = int(sizes.max()), bool(sizes.min() < sizes.max()), weighted
        with tf.device("CPU:0"):
            self._data = tf.nest.map_structure(lambda *leaves: tf.constant(np.concatenate(leaves)), *parts)
            self._starts = tf.constant(np.cumsum(sizes) - sizes, tf.int32)
            self._sizes = tf.constant(sizes, tf.int32)

    def of(self, task: Tensor) -> Any:
        """All examples of a task, padded to the greatest, with weights if there are any or tasks differ in size."""
        places = tf.range(self._most)
        there = places < self._sizes[task]
        return self.at(task, tf.where(there, places, 0), there if self._padded or self._weighted else None)

    def at(self, task: Any, places: Any, there: Any) -> Any:
        """The examples of a task at some places; where it is false that they are there, of weight zero."""
        part = tf.nest.map_structure(lambda leaf: tf.gather(leaf, self._starts[task] + places), self._data)
        if there is None:
            return part
        weights = part[2] if self._weighted else tf.ones(tf.shape(places), keras.config.floatx())
        there = tf.reshape(there, tf.concat([tf.shape(there), tf.ones([tf.rank(weights) - 1], tf.int32)], 0))
        return *part[:2], weights * tf.cast(there, weights.dtype)


class _Division:
    """Which examples of a task are support and which are queries, anew in each episode."""

    def __init__(self, parts: Any, shots: int, queries: int | None) -> None:
        labels = [_class_numbers(task[0][1]) for task in parts]
        # Examples without classes are of one class.
        groups = [np.zeros(len(tf.nest.flatten(task[0][0])[0]), int) if y is None else np.unique(
            y, return_inverse=True)[1].reshape(-1) for task, y in zip(parts, labels)]
        counts = [np.bincount(group) for group in groups]
        sizes = np.array([len(group) for group in groups])
        supports = np.array([shots * len(each) for each in counts])
        asked = sizes - supports if queries is None else np.array([queries * len(each) for each in counts])
        self.even = len({*supports}) == len({*asked}) == 1
        self._shots, self._queries = shots, queries
        self._sizes = [int(supports.max()), int(asked.max())]
        self._most = int(sizes.max())
        padded = np.full([len(groups), self._most], np.iinfo(np.int32).max, np.int64)
        for row, group in zip(padded, groups):
            row[:len(group)] = group
        with tf.device("CPU:0"):
            self._groups = tf.constant(padded)
            self._numbers = [tf.constant(supports, tf.int32), tf.constant(asked, tf.int32)]

    def places(self, task: Any, seed: Any) -> Any:
        """Pairs (places, whether they are there) of the support set and of the queries."""
        groups = self._groups[task]
        order = tf.argsort(tf.random.stateless_uniform([self._most], seed), stable=True)
        order = tf.gather(order, tf.argsort(tf.gather(groups, order), stable=True))  # By class, in random order within.
        classes = tf.gather(groups, order)
        first = tf.searchsorted(classes, classes, side="left")
        rank = tf.range(self._most) - first  # How many of its class come before an example.
        there = classes < np.iinfo(np.int32).max
        support = there & (rank < self._shots)
        query = there & (rank >= self._shots)
        if self._queries is not None:
            query &= rank < self._shots + self._queries
        pairs = []
        for chosen, size, numbers in zip((support, query), self._sizes, self._numbers):
            front = tf.argsort(tf.cast(~chosen, tf.int32), stable=True)[:size]
            present = tf.range(size) < numbers[task]
            # Padding repeats the first one chosen.
            pairs.append((tf.gather(order, tf.where(present, front, front[0])), present))
        return pairs


def _listed(tasks, count, paired):
    """Names and tasks as two lists."""
    if count is not None:
        checks.positive_integer("count", count)
    if isinstance(tasks, tf.data.Dataset) and count is None and tasks.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("Tasks must come to an end. Received a tf.data.Dataset that repeats without one: count=100 "
                         "takes the first hundred")
    if isinstance(tasks, Episode) or _is_task(tasks, paired):
        tasks = [tasks]
    if isinstance(tasks, dict):
        return [str(name) for name in tasks][:count], list(tasks.values())[:count]
    try:
        tasks = list(itertools.islice(tasks, count))
    except TypeError as error:
        raise TypeError(f"tasks must be an iterable of tasks. {_TASK}. Received: {type(tasks).__name__}") from error
    return [str(number) for number in range(len(tasks))], tasks


def _is_task(value, paired):
    """Whether a value is one task rather than several."""
    if isinstance(value, dict):
        return set(value) == ({"support", "query"} if paired else {"x", "y"})
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    if paired:
        return all(isinstance(part, tuple) and len(part) in (2, 3) and not isinstance(part[0], tuple) for part in value)
    return all(isinstance(part, (np.ndarray, tf.Tensor, dict)) for part in value)


def _support_and_query(name, task):
    if isinstance(task, dict) and set(task) == {"support", "query"}:
        task = task["support"], task["query"]
    if not isinstance(task, (tuple, list)) or len(task) != 2:
        raise TypeError(f"{_TASK}. Received for task {name!r}: {_in_words(task)}")
    return [_part(name, what, part) for what, part in zip(("support", "query"), task)]


def _set(name, task):
    if isinstance(task, dict) and set(task) == {"x", "y"}:
        task = task["x"], task["y"]
    return _part(name, "examples", task)


def _part(name, what, part):
    """(x, y) or (x, y, weights) as arrays with the same number of examples."""
    if not isinstance(part, (tuple, list)) or len(part) not in (2, 3):
        raise TypeError(f"{_TASK}. Received for the {what} of task {name!r}: {_in_words(part)}")
    arrays = tuple(tf.nest.map_structure(lambda leaf: _array(name, what, leaf), _as_nest(name, what, entry))
                   for entry in part)
    lengths = {len(leaf) if leaf.ndim else None for leaf in tf.nest.flatten(arrays)}
    if len(lengths) != 1 or lengths <= {None, 0}:
        shapes = [leaf.shape for leaf in tf.nest.flatten(arrays)]
        raise ValueError(f"The {what} of a task must have at least one example, and x and y as many. "
                         f"Received for task {name!r}: shapes {shapes}")
    return arrays


def _as_nest(name, what, entry):
    """Lists are arrays; tuples and dictionaries are nests of them."""
    try:
        return np.asarray(entry) if isinstance(entry, list) else entry
    except ValueError as error:
        raise TypeError(f"The {what} of a task must be arrays of one shape and type. "
                        f"Received for task {name!r}: a list of several shapes") from error


def _array(name, what, leaf):
    array = leaf.numpy() if isinstance(leaf, tf.Tensor) else np.asarray(leaf)
    if array.dtype == object and all(isinstance(entry, (str, bytes)) for entry in array.flat):
        array = array.astype(str)
    if array.dtype == object:
        raise TypeError(f"The {what} of a task must be arrays of one shape and type. "
                        f"Received for task {name!r}: {type(leaf).__name__}")
    if array.dtype.kind == "f":
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            raise ValueError(f"The {what} of a task must be finite. Received NaN or infinity in task {name!r}, "
                             f"example {bad[0][0] if array.ndim else 0}")
        return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array
    return array


def _check_alike(first, expected, name, part):
    """Raises a ValueError if a part differs from that of the first task in more than its number of examples."""
    try:
        tf.nest.assert_same_structure(expected, part)
        alike = all(a.shape[1:] == b.shape[1:] and (a.dtype.kind == b.dtype.kind == "U" or a.dtype == b.dtype)
                    for a, b in zip(tf.nest.flatten(expected), tf.nest.flatten(part)))
    except (TypeError, ValueError):
        alike = False
    if not alike:
        of = [[f"{leaf.dtype} {list(leaf.shape[1:])}" for leaf in tf.nest.flatten(each)] for each in (expected, part)]
        raise ValueError("Tasks must have the same inputs and labels but for the number of examples. "
                         f"Received: {of[0]} in task {first!r}, {of[1]} in task {name!r}")


def _class_numbers(labels):
    """The labels of a task as class numbers [examples], or None where they are something else."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and (labels.ndim == 1 or labels.shape[1:] == (1,)):
        return labels.reshape(-1)
    return None


def _too_small(name, part, shots, queries):
    """What is too small of a task, as a sentence, or None."""
    needed, other = shots + (queries or 1), "queries" if queries else 1
    rule = f"shots + {other} = {needed}"
    labels = _class_numbers(part[1])
    if labels is None:
        count = len(tf.nest.flatten(part[0])[0])
        return None if count >= needed else (f"A task must have at least {rule} examples. "
                                             f"Received: {count} in task {name!r}")
    classes, counts = np.unique(labels, return_counts=True)
    small = [f"{count} of class {label}" for label, count in zip(classes, counts) if count < needed]
    return None if not small else (f"Each class of a task must have at least {rule} examples. "
                                   f"Received: {', '.join(small)} in task {name!r}")


def _in_words(value):
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}: {', '.join(type(part).__name__ for part in value)}"
    return type(value).__name__

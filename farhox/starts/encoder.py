"""DatasetEncoder: a network that reads data sets and says which of them are alike."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Array, Config
from farhox.starts.baselines import neighbour_mean_order
from farhox.starts.evaluations import PriorEvaluations, checked_table
from farhox.starts.properties import class_numbers, flat_features
from farhox.starts.rule import StartRule, check_fitted, checked_pair

_DRAWS = 8  # Of which the code of a data set is the mean.
_FITTED = ("table", "codes", "history")


@keras.saving.register_keras_serializable(package="farhox")
class DatasetEncoder(StartRule, keras.Model):
    """A network whose codes of two data sets are as far apart as the scores of configurations on them.

    Deep sets over pairs (value, class): with f, g and h small networks, the code of a data set is

        m = h(mean over features and classes of g(mean over rows of f(asinh(value), whether it is of the class))),

    with the logarithms of the numbers of rows, features and classes beside what h reads. Trained is the mean over pairs
    of data sets of (||m_i - m_j|| - d_ij)^2, where d_ij is the mean over configurations of |s_i - s_j|, the difference
    of scaled scores. Rows, features and classes are drawn anew for every step.

    It is a `keras.Model`: `save` and pickle keep what it has learned and the scores of the table.

    Args:
        size: Positive int, numbers of a code.
        units: Positive int, of the hidden layers.
        rows, features, classes: Positive ints, of a data set that are drawn for a step.
        steps: Positive int, training steps.
        batch_size: Int of at least 2, data sets of a step, all pairs of which are compared.
        learning_rate: Positive float, of Adam; it ends in a cosine.
        neighbours: Positive int, data sets whose mean scores order suggestions.
        seed: Non-negative int: the same seed on the same data sets gives the same codes.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Kim et al., 2017](https://arxiv.org/abs/1710.06219) (the distance, the start);
        [Jomaa et al., 2019](https://arxiv.org/abs/1905.11063) (pairs of value and class, for tables of any columns).
        Deviations: scores are averaged over the nearest data sets, where Kim et al. take the best configuration of
        each; the numbers of rows, features and classes, which means do not tell, are read too.
    """

    def __init__(self, size: int = 8, units: int = 32, rows: int = 64, features: int = 16, classes: int = 4,
                 steps: int = 400, batch_size: int = 16, learning_rate: float = 3e-3, neighbours: int = 3,
                 seed: int = 0, **options: Any) -> None:
        counts = {"size": size, "units": units, "rows": rows, "features": features, "classes": classes, "steps": steps,
                  "neighbours": neighbours}
        settings: dict[str, Any] = {name: checks.positive_integer(name, value) for name, value in counts.items()}
        settings["batch_size"] = checks.integer_of_at_least("batch_size", batch_size, 2)
        settings["learning_rate"] = checks.positive_number("learning_rate", learning_rate)
        settings["seed"] = checks.non_negative_integer("seed", seed)
        super().__init__(**options)
        self._settings = settings
        seeds = iter(range(1000 * seed, 1000 * seed + 100))
        self._of_pairs = _layers([None, None, None, 2], [units, units], units, seeds)
        self._of_features = _layers([None, None, units], [units], units, seeds)
        self._of_sets = _layers([units + 3], [units], size, seeds)
        self._fitted: _Fitted | None = None
        self.built = True

    def call(self, inputs: Any) -> tf.Tensor:
        """Codes [sets, size] of values [sets, rows, features], classes [sets, rows, classes] and facts [sets, 3]."""
        values, classes, facts = inputs
        shape = [*values.shape, classes.shape[-1]]
        pairs = tf.stack([tf.broadcast_to(values[..., tf.newaxis], shape),
                          tf.broadcast_to(classes[:, :, tf.newaxis], shape)], axis=-1)
        of_columns = self._of_features(tf.reduce_mean(self._of_pairs(pairs), axis=1))
        return self._of_sets(tf.concat([tf.reduce_mean(of_columns, axis=[1, 2]), facts], axis=-1))

    def fit(self, table: PriorEvaluations, datasets: Any = None) -> DatasetEncoder:  # type: ignore[override]
        """Learns from a table, anew.

        Args:
            table: A `PriorEvaluations` of at least two data sets.
            datasets: List of a pair (x, y) for each data set of the table. Default: those that the table keeps.

        Returns:
            The encoder itself.

        Raises:
            TypeError: If `table` is no `PriorEvaluations`, or a data set is no pair of arrays.
            ValueError: If there are fewer than two data sets, no arrays, or no two data sets with a configuration that
                was evaluated on both.
        """
        sets, targets = self._checked(table, datasets)
        self.set_weights(self.unfitted().get_weights())
        random = np.random.default_rng([self._settings["seed"], 1])
        count = min(self._settings["batch_size"], len(sets))
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(
            self._settings["learning_rate"], self._settings["steps"]))
        optimizer.build(self.trainable_variables)

        @tf.function
        def step(inputs, distances):
            with tf.GradientTape() as tape:
                loss = _loss(self(inputs), distances)
            optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_variables)
            return loss

        losses = []
        for _ in range(self._settings["steps"]):
            chosen = random.permutation(len(sets))[:count]
            inputs = self._drawn([sets[index] for index in chosen], random)
            losses.append(float(step(inputs, tf.constant(targets[np.ix_(chosen, chosen)], tf.float32))))
        kept = table.subset(range(len(table)))
        kept.data = None
        self._fitted = _Fitted(kept, self._codes(sets), losses)
        return self

    @property
    def space(self) -> dict[str, tuple[float, float]]:
        """Dictionary from names of hyperparameters to pairs (low, high)."""
        return self._learned().table.space

    @property
    def training_losses(self) -> list[float]:
        """The loss of each training step."""
        return list(self._learned().losses)

    def distance_loss(self, table: PriorEvaluations, datasets: Any = None) -> tuple[float, float]:
        """How well distances of codes are those of scores, on the data sets of a table, which may be others.

        Args:
            table, datasets: As of `fit`.

        Returns:
            The mean squared error over pairs, and the variance of their distances: the error of the best constant.
        """
        sets, targets = self._checked(table, datasets)
        self._learned()
        found = targets[np.triu_indices(len(sets), 1)]
        return (float(_loss(tf.constant(self._codes(sets), tf.float32), tf.constant(targets, tf.float32))),
                float(np.nanvar(found)))

    def distances(self, x: Array, y: Array) -> np.ndarray:
        """Distances [data sets] of the code of a data set to those of the table."""
        learned = self._learned()
        return np.linalg.norm(learned.codes - self._codes([_as_set(x, y)]), axis=1)

    def nearest(self, x: Array, y: Array, k: int = 3) -> list[int]:
        """Indices of the data sets of the table whose codes are the nearest.

        Args:
            x: Array [n, ...] of finite numbers.
            y: Array [n] or [n, 1] of classes, or one-hot [n, m].
            k: Positive int, at most the number of data sets.

        Returns:
            List of `k` ints, the nearest first.

        Raises:
            TypeError: If x or y is no array of numbers or classes.
            ValueError: If nothing was learned, or an argument is out of range.
        """
        k = checks.integer_in_range("k", k, 1, len(self._learned().table))
        return np.argsort(self.distances(x, y), kind="stable")[:k].tolist()

    def suggest(self, dataset: Any, count: int = 1) -> list[dict[str, Any]]:
        """The configurations with the highest mean scores over the nearest data sets.

        Args:
            dataset: A pair (x, y).
            count: Positive int.

        Returns:
            List of at most `count` different dictionaries from names to values.
        """
        count = checks.positive_integer("count", count)
        table, (x, y) = self._learned().table, checked_pair(dataset)
        nearest = np.array(self.nearest(x, y, len(table)))
        return neighbour_mean_order(table, nearest, count, self._settings["neighbours"])

    def unfitted(self) -> DatasetEncoder:
        """An encoder of the same settings that has learned nothing."""
        return DatasetEncoder(**self._settings)

    def get_config(self) -> Config:
        """The settings, and what was learned but the weights."""
        config = {**super().get_config(), **self._settings}
        if self._fitted is not None:
            config.update(zip(_FITTED, (self._fitted.table.to_json(), self._fitted.codes.tolist(),
                                        self._fitted.losses)))
        return config

    @classmethod
    def from_config(cls, config: Config, custom_objects: Any = None) -> DatasetEncoder:
        """The encoder of a configuration."""
        config = dict(config)
        table, codes, losses = (config.pop(name, None) for name in _FITTED)
        made = cls(**config)
        if table is not None:
            made._fitted = _Fitted(PriorEvaluations.from_json(table), np.array(codes), list(losses or []))
        return made

    def _learned(self):
        check_fitted("encoder", self._fitted is not None)
        return self._fitted or _Fitted(PriorEvaluations({}, [], [], []), np.zeros([0, 0]), [])

    def _checked(self, table, datasets):
        """Data sets as arrays, and the distances of scores [data sets, data sets], NaN where there are none."""
        datasets = checked_table(table).data if datasets is None else datasets
        if datasets is None:
            raise ValueError("A DatasetEncoder reads data sets as arrays. Received: a table of properties only, and "
                             "datasets=None")
        if not isinstance(datasets, (list, tuple)):
            raise TypeError(f"datasets must be a list of pairs (x, y). Received: {type(datasets).__name__}")
        if len(datasets) != len(table) or len(table) < 2:
            raise ValueError("datasets must be one for each data set of the table, at least two. Received: "
                             f"{len(datasets)} for {len(table)}")
        sets = [_as_set(*checked_pair(entry)) for entry in datasets]
        scores = table.scaled_scores()
        differences = np.abs(scores[:, np.newaxis] - scores[np.newaxis])
        known = np.isfinite(differences)
        targets = np.sum(np.where(known, differences, 0.0), axis=2) / np.where(np.any(known, axis=2), np.sum(
            known, axis=2), np.nan)
        if not np.any(np.isfinite(targets[np.triu_indices(len(sets), 1)])):
            raise ValueError("Two data sets at least must have a configuration that was evaluated on both. Received: "
                             "none")
        return sets, targets

    def _codes(self, sets):
        """Codes [data sets, size], the means over draws."""
        codes = []
        for entry in sets:
            random = np.random.default_rng([self._settings["seed"], 2])
            codes.append(np.mean(self(self._drawn([entry] * _DRAWS, random)).numpy().astype("float64"), axis=0))
        return np.array(codes)

    def _drawn(self, sets, random):
        rows, features, classes = (self._settings[name] for name in ("rows", "features", "classes"))
        values, labels, facts = [], [], []
        for x, y, known in sets:
            columns = _sample(random, x.shape[1], features)
            chosen = _sample(random, len(x), rows)
            values.append(x[np.ix_(chosen, columns)])
            labels.append(y[chosen, np.newaxis] == _sample(random, int(np.max(y)) + 1, classes))
            facts.append(known)
        return tuple(tf.constant(np.array(part), tf.float32) for part in (values, labels, facts))


class _Fitted:
    """What an encoder has learned, beside its weights."""

    def __init__(self, table: PriorEvaluations, codes: np.ndarray, losses: list[float]) -> None:
        self.table, self.codes, self.losses = table, codes, losses


def _layers(shape, hidden, outputs, seeds):
    """Dense layers with ReLU, the last without."""
    def dense(units, activation):
        return keras.layers.Dense(units, activation, kernel_initializer=keras.initializers.GlorotUniform(next(seeds)))

    return keras.Sequential([keras.Input(shape), *(dense(units, "relu") for units in hidden), dense(outputs, None)])


def _loss(codes, distances):
    """Mean of (||m_i - m_j|| - d_ij)^2 over pairs whose d_ij is a number."""
    squares = tf.reduce_sum(tf.square(codes[:, tf.newaxis] - codes[tf.newaxis]), axis=-1)
    count = tf.shape(codes)[0]
    pairs = tf.range(count)[:, tf.newaxis] < tf.range(count)
    known = tf.cast(pairs & tf.math.is_finite(distances), codes.dtype)
    errors = tf.square(tf.sqrt(squares + 1e-12) - tf.where(tf.math.is_finite(distances), distances, 0.0))
    return tf.reduce_sum(known * errors) / tf.maximum(tf.reduce_sum(known), 1.0)


def _sample(random, count, wanted):
    """Indices, without repetition where there are enough."""
    return random.permutation(count)[:wanted] if count >= wanted else random.integers(count, size=wanted)


def _as_set(x, y):
    """Features on a scale that takes all magnitudes, classes as numbers, and the logarithms of their counts."""
    columns, classes = flat_features(x), class_numbers(y)
    if len(columns) != len(classes):
        raise ValueError(f"x and y must have the same number of examples. Received: {len(columns)} and {len(classes)}")
    counts = [*columns.shape, int(np.max(classes)) + 1]
    return np.arcsinh(columns), classes, [math.log(number) / 5.0 for number in counts]

"""What learners with a head in closed form share: features of an embedding, and a linear classifier for each task."""

import abc
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.copies import copy_of
from farhox._core.types import Batch, Data, Logs, Loss, Metrics, Optimizer, Tensor
from farhox.dynamics.base import check_keras_optimizer
from farhox.meta import episode_checks
from farhox.meta.accuracy import correct
from farhox.meta.episodes import EpisodeSource, count_episodes, new_episodes_seen
from farhox.meta.evaluation import evaluate_episodes
from farhox.meta.statistics import statistics_of
from farhox.meta.weights import is_present, joined, scaled, weighted_mean, with_both_weights, with_weights
from farhox.problem.losses import checked_labels
from farhox.training.errors import graph_calls

_LOSS = "sparse_categorical_crossentropy"


class EmbeddingLearner(keras.Model, abc.ABC):
    """A learner in which nothing is trained inside: the support set gives a linear classifier of features directly.

    A subclass says which: `head` is the whole of it. Batch-norm layers behave as everywhere in Keras: statistics of the
    batch in training, moving ones else, so that predictions do not depend on other queries.

    ```python
    class NearestMean(farhox.meta.EmbeddingLearner):
        def head(self, features, members):
            means = tf.linalg.matmul(features, members, transpose_a=True) / tf.reduce_sum(members, 1, keepdims=True)
            return 2 * means, -tf.reduce_sum(means ** 2, axis=1)
    ```

    Args:
        embedding: A built `keras.Model`, inputs to features.
        ways: Positive int, classes in an episode.
        name: Name of the Keras model.

    Attributes:
        embedding, ways: As given.
        episodes_seen: As of a `Learner`.

    Raises:
        TypeError: If `embedding` is not a Keras model.
        ValueError: If it is not built, or `ways` is not a positive integer.
    """

    def __init__(self, embedding: keras.Model, ways: int, name: str | None = None) -> None:
        super().__init__(name=name)
        episode_checks.check_model("embedding", embedding)
        if not embedding.built:
            raise ValueError(f"embedding must be built: give it an Input. Received the unbuilt {embedding.name!r}")
        self.embedding, self.ways = embedding, checks.positive_integer("ways", ways)
        self.episodes_seen = new_episodes_seen()
        self.built = True
        self._judge_function: Any = None

    @abc.abstractmethod
    def head(self, features: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier of each episode.

        Args:
            features: Tensor [episodes, support examples, features].
            members: Tensor [episodes, support examples, ways], the sample weight of an example, 1 if there are none, at
                its class and 0 elsewhere.

        Returns:
            Kernel [episodes, features, ways] and bias [episodes, ways]: class probabilities of features f are the
            softmax of f'kernel + bias.
        """

    def scores(self, features: Tensor, support: Tensor, members: Tensor) -> Tensor:
        """What class probabilities are the softmax of, [episodes, queries, ways]."""
        kernel, bias = self.head(support, members)
        return tf.matmul(features, kernel) + bias[:, None]

    def compile(self, optimizer: Optimizer = "adam", loss: Loss = _LOSS, metrics: Metrics | None = None,
                weighted_metrics: Metrics | None = None, **kwargs: Any) -> None:
        """As `keras.Model.compile`; all metrics count a query by its sample weight, if there are weights."""
        kwargs.setdefault("jit_compile", False)  # XLA slows convolutions down on CPUs.
        check_keras_optimizer("optimizer", optimizer)
        super().compile(optimizer, loss, weighted_metrics=joined(metrics, weighted_metrics), **kwargs)

    def fit(self, x: Data = None, **kwargs: Any) -> keras.callbacks.History:
        kwargs.setdefault("shuffle", False)  # A data set shuffles itself; Keras warns where it is asked to.
        if kwargs.get("validation_data") is not None:
            kwargs["validation_data"] = self._dataset(kwargs["validation_data"])
        with graph_calls():
            return super().fit(self._dataset(x), **kwargs)

    def _dataset(self, x):
        x = episode_checks.checked_data(x, self.embedding)
        return tf.data.Dataset.from_tensors(x) if isinstance(x, (tuple, list)) else x

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Class probabilities [episodes, queries, ways] of (support x, support y, query x).

        Of episodes with sample weights: of (support x, support y, query x, support weights, query weights).
        """
        support, labels, query, *weights = inputs
        num_support = tf.shape(support)[1]
        images = tf.concat([support, query], axis=1)
        present = is_present(tf.reshape(tf.concat(weights, axis=1), [-1])) if weights else None
        with statistics_of(self.embedding, present):
            features = self.embedding(
                tf.reshape(images, tf.concat([[-1], tf.shape(images)[2:]], 0)), training=training)
        features = tf.reshape(features, [tf.shape(images)[0], tf.shape(images)[1], features.shape[-1]])
        members = self._members(labels, features.dtype, *weights[:1])
        return tf.nn.softmax(self.scores(features[:, num_support:], features[:, :num_support], members))

    def train_step(self, data: Data) -> Logs:
        inputs, targets, *weights = self._as_keras(data)
        logs = super().train_step((inputs, targets, *weights))
        with tf.control_dependencies([tf.convert_to_tensor(targets)]):  # As in `Learner`: after the data are drawn.
            count_episodes(self, tf.shape(targets)[0])
        return logs

    def test_step(self, data: Data) -> Logs:
        return super().test_step(self._as_keras(data))

    def evaluate(self, x: Data = None, episodes: int = 600, meta_batch_size: int = 10, **kwargs: Any) -> Any:
        """As `Learner.evaluate`."""
        if not isinstance(x, EpisodeSource):
            with graph_calls():
                return super().evaluate(self._dataset(x), **kwargs)
        if self._judge_function is None:
            self._judge_function = tf.function(self._judge, autograph=False)
        with graph_calls():
            return {**evaluate_episodes(self._judge_function, x, episodes, meta_batch_size), "transductive": False}

    def predict(self, support: Batch, query: Batch) -> np.ndarray:
        """As `Learner.predict`."""
        support = episode_checks.as_support(support, self.embedding, self.ways)
        query = episode_checks.as_inputs("query inputs", query, self.embedding)
        return self.predict_episodes(tuple(part[None] for part in support), query[None])[0].numpy()

    def predict_episodes(self, support: Batch, query: Batch) -> Tensor:
        """As `Learner.predict_episodes`."""
        inputs = *support[:2], query
        if len(support) == 3:
            weights = with_weights(support)[2]
            inputs += weights, tf.ones(tf.shape(query)[:2], weights.dtype)
        return self(inputs)

    def embed(self, inputs: Tensor) -> Tensor:
        """The features of inputs, by moving batch-norm statistics: a tensor [inputs, features]."""
        return self.embedding(tf.convert_to_tensor(inputs), training=False)

    def adapt(self, support: Batch) -> keras.Model:
        """A plain Keras model for the classes of a support set: the embedding and a dense softmax layer on it.

        Args:
            support: Tuple (x, y) of arrays, or (x, y, sample weights).

        Returns:
            A `keras.Model`.
        """
        x, y, *weights = episode_checks.as_support(support, self.embedding, self.ways)
        features = self.embed(x)[None]
        members = self._members(y[None], features.dtype, *(part[None] for part in weights))
        head = keras.layers.Dense(self.ways, activation="softmax")
        model = keras.Sequential([
            keras.Input(x.shape[1:], dtype=x.dtype.name), copy_of(self.embedding), head])
        head.set_weights([part[0].numpy() for part in self.head(features, members)])
        return model

    def _members(self, labels, dtype, weights=None):
        """See `head`."""
        members = tf.one_hot(checked_labels(labels, tf.TensorSpec([None, self.ways])), self.ways, dtype=dtype)
        return members if weights is None else members * tf.cast(weights, dtype)[:, :, None]

    def _judge(self, episodes):
        inputs, targets, *weights = self._as_keras(episodes)
        weights = weights[0] if weights else tf.ones_like(targets, keras.config.floatx())
        predictions = self(inputs)
        losses = keras.losses.sparse_categorical_crossentropy(targets, predictions)
        return {"loss": tf.reduce_mean(tf.cast(weights, losses.dtype) * losses, axis=1),
                "accuracy": weighted_mean(correct(targets, predictions), weights, axis=1)}

    def _as_keras(self, episodes):
        """Episodes as Keras' (inputs, targets) or (inputs, targets, sample weights)."""
        support, query = with_both_weights(*episode_checks.as_parts(episodes, self.embedding))
        inputs = support[0], support[1], query[0]
        if len(support) == 2:
            return inputs, query[1]
        loss = self.loss if self.compiled else _LOSS
        return (*inputs, support[2], query[2]), query[1], scaled(query[2], loss)

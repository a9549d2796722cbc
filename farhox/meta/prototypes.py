"""Prototypical networks, the reference that needs no inner training."""

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
from farhox.training.hyper_optimizer import clear_errors

# The logarithm of a probability that is zero in float32; an infinite one would make derivatives that are not numbers.
_NEVER = -1e30
_LOSS = "sparse_categorical_crossentropy"


class PrototypicalNetwork(keras.Model):
    """Classifies a query by its distance to the mean embedding of each class of the support set.

    p(k | x) is the softmax over classes of -||f(x) - c_k||^2, with c_k the mean of f over the support examples of class
    k. Batch-norm layers behave as everywhere in Keras: statistics of the batch in training, moving ones else, so that
    predictions do not depend on other queries.

    ```python
    learner = farhox.meta.PrototypicalNetwork(farhox.meta.convolutional_body(), ways=5)
    learner.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    learner.fit(episodes.dataset(meta_batch_size=4), epochs=10, steps_per_epoch=100)
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

    Reference:
        [Snell et al., 2017](https://arxiv.org/abs/1703.05175), equations 1 and 2.
    """

    def __init__(self, embedding: keras.Model, ways: int, name: str = "prototypical_network") -> None:
        super().__init__(name=name)
        episode_checks.check_model("embedding", embedding)
        if not embedding.built:
            raise ValueError(f"embedding must be built: give it an Input. Received the unbuilt {embedding.name!r}")
        self.embedding, self.ways = embedding, checks.positive_integer("ways", ways)
        self.episodes_seen = new_episodes_seen()
        self.built = True
        self._judge_function = None

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
        with clear_errors():
            return super().fit(self._dataset(x), **kwargs)

    def _dataset(self, x):
        x = episode_checks.checked_data(x, self.embedding)
        return tf.data.Dataset.from_tensors(x) if isinstance(x, (tuple, list)) else x

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Class probabilities [episodes, queries, ways] of (support x, support y, query x).

        Of episodes with sample weights: of (support x, support y, query x, support weights, query weights). Prototypes
        are weighted means.
        """
        support, labels, query, *weights = inputs
        num_support = tf.shape(support)[1]
        images = tf.concat([support, query], axis=1)
        present = is_present(tf.reshape(tf.concat(weights, axis=1), [-1])) if weights else None
        with statistics_of(self.embedding, present):
            features = self.embedding(
                tf.reshape(images, tf.concat([[-1], tf.shape(images)[2:]], 0)), training=training)
        features = tf.reshape(features, [tf.shape(images)[0], tf.shape(images)[1], features.shape[-1]])
        prototypes, present = self._prototypes(features[:, :num_support], labels, *weights[:1])
        query = features[:, num_support:]
        distances = tf.reduce_sum((query[:, :, None] - prototypes[:, None]) ** 2, axis=-1)
        return tf.nn.softmax(tf.where(present[:, None], -distances, _NEVER))

    def train_step(self, data: Data) -> Logs:
        inputs, targets, *weights = self._as_keras(data)
        logs = super().train_step((inputs, targets, *weights))
        count_episodes(self, tf.shape(targets)[0])
        return logs

    def test_step(self, data: Data) -> Logs:
        return super().test_step(self._as_keras(data))

    def evaluate(self, x: Data = None, episodes: int = 600, meta_batch_size: int = 10, **kwargs: Any) -> Any:
        """As `Learner.evaluate`."""
        if not isinstance(x, EpisodeSource):
            with clear_errors():
                return super().evaluate(self._dataset(x), **kwargs)
        if self._judge_function is None:
            self._judge_function = tf.function(self._judge, autograph=False)
        with clear_errors():
            return {**evaluate_episodes(self._judge_function, x, episodes, meta_batch_size), "transductive": False}

    def predict(self, support: Batch, query: Batch) -> np.ndarray:
        """As `Learner.predict`. A class without support examples has probability zero."""
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

        -||f - c||^2 = 2 f'c - ||c||^2 - ||f||^2, and the last term is the same for all classes.

        Args:
            support: Tuple (x, y) of arrays, or (x, y, sample weights).

        Returns:
            A `keras.Model`.
        """
        x, *others = episode_checks.as_support(support, self.embedding, self.ways)
        parts = self._prototypes(self.embed(x)[None], *(part[None] for part in others))
        prototypes, present = (part[0] for part in parts)
        biases = tf.where(present, -tf.reduce_sum(prototypes ** 2, axis=-1), _NEVER)
        embedding = copy_of(self.embedding)
        head = keras.layers.Dense(self.ways, activation="softmax")
        model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), embedding, head])
        head.set_weights([2 * prototypes.numpy().T, biases.numpy()])
        return model

    def _prototypes(self, features, labels, weights=None):
        """The mean of each class [episodes, ways, features], and whether it has support examples [episodes, ways]."""
        members = tf.one_hot(checked_labels(labels, tf.TensorSpec([None, self.ways])), self.ways, dtype=features.dtype)
        if weights is not None:
            members *= tf.cast(weights, features.dtype)[:, :, None]
        sums = tf.einsum("esw,esf->ewf", members, features)
        counts = tf.reduce_sum(members, axis=1)
        return tf.math.divide_no_nan(sums, counts[:, :, None]), counts > 0

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

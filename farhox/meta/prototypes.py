"""Prototypical networks, the reference that needs no inner training."""

import keras
import tensorflow as tf

from farhox._core.types import Tensor
from farhox.meta.embedding_learner import EmbeddingLearner

# The logarithm of a probability that is zero in float32; an infinite one would make derivatives that are not numbers.
_NEVER = -1e30


class PrototypicalNetwork(EmbeddingLearner):
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
        embedding, ways, name: As of `EmbeddingLearner`.

    Raises:
        TypeError, ValueError: As `EmbeddingLearner`.

    Reference:
        [Snell et al., 2017](https://arxiv.org/abs/1703.05175), equations 1 and 2.
    """

    def __init__(self, embedding: keras.Model, ways: int, name: str = "prototypical_network") -> None:
        super().__init__(embedding, ways, name)

    def head(self, features: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """-||f - c||^2 = 2 f'c - ||c||^2 - ||f||^2, and the last term is the same for all classes."""
        prototypes, present = _prototypes(features, members)
        bias = tf.where(present, -tf.reduce_sum(prototypes ** 2, axis=-1), _NEVER)
        return 2 * tf.linalg.matrix_transpose(prototypes), bias

    def scores(self, features: Tensor, support: Tensor, members: Tensor) -> Tensor:
        prototypes, present = _prototypes(support, members)
        distances = tf.reduce_sum((features[:, :, None] - prototypes[:, None]) ** 2, axis=-1)
        return tf.where(present[:, None], -distances, _NEVER)


def _prototypes(features, members):
    """The weighted mean of each class [episodes, ways, features], and whether it has support examples."""
    sums = tf.einsum("esw,esf->ewf", members, features)
    counts = tf.reduce_sum(members, axis=1)
    return tf.math.divide_no_nan(sums, counts[:, :, None]), counts > 0

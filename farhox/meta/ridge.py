"""R2-D2: a ridge regression on features as the head of each task, in closed form."""

import keras
import tensorflow as tf

from farhox._core.types import Tensor
from farhox.meta.embedding_learner import EmbeddingLearner
from farhox.outer.hyperparameters import Hyperparameter


class RidgeNetwork(EmbeddingLearner):
    """Classifies by a ridge regression from features to classes that each support set has its own of.

    W = X'(P X X' + λ I)⁻¹ P Y with features X, one-hot classes Y and sample weights P; class probabilities are the
    softmax of α f'W. The strength λ, the scale α and the embedding are learned through the solution, which takes a
    system of the size of the support set and no inner steps. The paper's common bias is left out: a softmax does not
    see it.

    ```python
    learner = farhox.meta.RidgeNetwork(farhox.meta.convolutional_body(), ways=5)
    learner.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    learner.fit(episodes.dataset(meta_batch_size=4), epochs=10, steps_per_epoch=100)
    ```

    Args:
        embedding, ways, name: As of `EmbeddingLearner`.
        strength: Positive float, where λ starts.
        scale: Positive float, where α starts.

    Attributes:
        strength, scale: `Hyperparameter`s.

    Raises:
        TypeError, ValueError: As `EmbeddingLearner`; or if a number is not positive.

    Reference:
        [Bertinetto et al., 2019](https://arxiv.org/abs/1805.08136), equations 4 and 6.
    """

    def __init__(self, embedding: keras.Model, ways: int, strength: float = 1.0, scale: float = 1.0,
                 name: str = "ridge_network") -> None:
        super().__init__(embedding, ways, name)
        self.strength = Hyperparameter(strength, low=0.0, log=True, name="strength")
        self.scale = Hyperparameter(scale, low=0.0, log=True, name="scale")
        self._learned = [self.strength.variable, self.scale.variable]  # Keras saves and trains what it sees.

    def head(self, features: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        weights = tf.reduce_sum(members, axis=-1, keepdims=True)
        # Roots on both sides keep the system symmetric, and an example of weight zero out of it.
        root = tf.where(weights > 0, tf.sqrt(tf.where(weights > 0, weights, 1.0)), 0.0)
        targets = tf.math.divide_no_nan(members, root)
        rows = root * features
        strength = tf.cast(self.strength(), features.dtype)
        system = tf.matmul(rows, rows, transpose_b=True) + strength * tf.eye(tf.shape(rows)[1], dtype=rows.dtype)
        kernel = tf.matmul(rows, tf.linalg.cholesky_solve(tf.linalg.cholesky(system), targets), transpose_a=True)
        kernel *= tf.cast(self.scale(), kernel.dtype)
        return kernel, tf.zeros([tf.shape(kernel)[0], self.ways], kernel.dtype)

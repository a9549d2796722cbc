"""MetaOptNet: a linear support vector machine on features as the head of each task."""

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Tensor
from farhox.meta.embedding_learner import EmbeddingLearner
from farhox.outer.hyperparameters import Hyperparameter

_STEPS, _BARRIER = 20, 1e-8


class SupportVectorNetwork(EmbeddingLearner):
    """Classifies by a support vector machine for several classes that each support set has its own of.

    W = X'A with features X and the minimum A of ½ tr(A'XX'A) - tr(A'Y) where rows of A sum to zero and A <= C P Y, of
    one-hot classes Y and sample weights P; class probabilities are the softmax of α f'W. The embedding and the scale α
    are learned through the solution, which an interior point method finds in float64 and one more of its steps
    differentiates.

    ```python
    learner = farhox.meta.SupportVectorNetwork(farhox.meta.convolutional_body(), ways=5)
    learner.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    learner.fit(episodes.dataset(meta_batch_size=4), epochs=10, steps_per_epoch=100)
    ```

    Args:
        embedding, ways, name: As of `EmbeddingLearner`.
        cost: Positive float C, what an example costs that lies on the wrong side of the margin.
        scale: Positive float, where α starts.

    Attributes:
        cost: As given.
        scale: A `Hyperparameter`.

    Raises:
        TypeError, ValueError: As `EmbeddingLearner`; or if a number is not positive.

    Reference:
        [Lee et al., 2019](https://arxiv.org/abs/1904.03758), equations 5 to 8;
        [Crammer and Singer, 2001](https://www.jmlr.org/papers/v2/crammer01a.html).
    """

    def __init__(self, embedding: keras.Model, ways: int, cost: float = 0.1, scale: float = 1.0,
                 name: str = "support_vector_network") -> None:
        super().__init__(embedding, ways, name)
        self.cost = checks.positive_number("cost", cost)
        self.scale = Hyperparameter(scale, low=0.0, log=True, name="scale")
        self._learned = [self.scale.variable]  # Keras saves and trains what it sees.

    def head(self, features: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        weights = tf.cast(tf.reduce_sum(members, axis=-1), tf.float64)
        present = weights > 0
        # An example of weight zero is alone in the problem, and left out of the solution.
        rows = tf.where(present[:, :, None], tf.cast(features, tf.float64), 0.0)
        classes = tf.cast(members > 0, tf.float64)
        bounds = self.cost * tf.where(present, weights, 1.0)
        slack = _slack(tf.matmul(rows, rows, transpose_b=True), classes, bounds)
        duals = bounds[:, :, None] * classes - slack
        kernel = tf.cast(tf.matmul(rows, duals, transpose_a=True), features.dtype)
        kernel *= tf.cast(self.scale(), kernel.dtype)
        return kernel, tf.zeros([tf.shape(kernel)[0], self.ways], kernel.dtype)


def _slack(gram, classes, bounds):
    """The distance S = CPY - A of the solution from its bounds: at least zero, rows with the sum `bounds`.

    Its conditions are G (S - CPY) + Y - Z + ν = 0 with a multiplier Z >= 0 of each entry and ν of each row, and S Z = a
    barrier that goes to zero: then S is the minimum.
    """
    constant = tf.stop_gradient(gram), tf.stop_gradient(classes), tf.stop_gradient(bounds)
    least = _BARRIER * tf.reduce_mean(bounds, axis=1)[:, None, None]
    size = tf.cast(tf.shape(classes)[-1], tf.float64)
    slack = constant[2][:, :, None] / size * tf.ones_like(classes)

    def step(slack, multipliers, shifts):
        gap = tf.reduce_mean(slack * multipliers, axis=[1, 2], keepdims=True)
        changes = _newton(*constant, slack, multipliers, shifts, tf.maximum(0.1 * gap, least))
        # As far as entries stay positive.
        lengths = [tf.reduce_min(tf.where(change < 0, -0.95 * value / change, 1.0), axis=[1, 2], keepdims=True)
                   for value, change in zip((slack, multipliers), changes)]
        length = tf.minimum(tf.ones_like(gap), tf.minimum(*lengths))
        return tuple(value + length * change for value, change in zip((slack, multipliers, shifts), changes))

    start = slack, tf.ones_like(slack), tf.zeros_like(slack[:, :, :1])
    end = tf.while_loop(lambda *_: True, step, start, maximum_iterations=_STEPS)
    slack, multipliers, shifts = (tf.stop_gradient(part) for part in end)
    # At the solution the derivative of a step of Newton is that of the solution.
    return slack + _newton(gram, classes, bounds, slack, multipliers, shifts, least)[0]


def _newton(gram, classes, bounds, slack, multipliers, shifts, barrier):
    """The step of Newton of all three: a system of the size of the support set for each class, and one for the rows."""
    residual = tf.matmul(gram, slack - bounds[:, :, None] * classes) + classes - barrier / slack + shifts
    ratios = tf.linalg.matrix_transpose(multipliers / slack)  # [episodes, ways, examples], as all by classes below.
    inverses = tf.linalg.inv(gram[:, None] + tf.linalg.diag(ratios))
    free = -tf.linalg.matvec(inverses, tf.linalg.matrix_transpose(residual))
    missing = bounds - tf.reduce_sum(slack, axis=2)
    turn = tf.linalg.solve(tf.reduce_sum(inverses, axis=1), (tf.reduce_sum(free, axis=1) - missing)[:, :, None])
    change = tf.linalg.matrix_transpose(free - tf.linalg.matvec(inverses, turn[:, None, :, 0]))
    return change, (barrier - multipliers * change) / slack - multipliers, turn

"""Losses of a self-tuning model: the training loss may depend on hyperparameters, the validation loss does not."""

import keras
import tensorflow as tf

from farhox.outer.serialization import deserialized, serialized
from farhox.stn.strengths import checked_strength, strength_value


class FunctionLoss(keras.losses.Loss):
    """A function (targets, predictions) -> losses of the examples, or one loss, as a Keras loss."""

    def __init__(self, function, dtype):
        super().__init__(name="loss", dtype=dtype)
        self._function = function

    def call(self, y_true, y_pred):
        return self._function(y_true, y_pred)


def as_loss(loss, dtype):
    """The name of a Keras loss, a loss or a function as a Keras loss that computes in `dtype`."""
    if not isinstance(loss, (str, keras.losses.Loss)) and not callable(loss):
        raise TypeError("A loss must be the name of a Keras loss, a keras.losses.Loss or a function (targets, "
                        f"predictions). Received: {loss!r}")
    loss = keras.losses.get(loss)
    return loss if isinstance(loss, keras.losses.Loss) else FunctionLoss(loss, dtype)


@keras.saving.register_keras_serializable(package="farhox")
class LabelSmoothing(keras.losses.Loss):
    """Cross-entropy from logits with smoothed labels, each example with its own smoothing while it is perturbed.

    The target is (1 - smoothing) one_hot(label) + smoothing / classes.

    Args:
        smoothing: `Hyperparameter` or float in [0, 1].
        sparse: Bool. Targets are labels [batch, ...]; otherwise distributions [batch, ..., classes].

    Raises:
        ValueError: If the smoothing can leave [0, 1].
    """

    def __init__(self, smoothing, sparse=True, name="label_smoothing", **kwargs):
        super().__init__(name=name, **kwargs)
        self.smoothing = checked_strength(smoothing, "smoothing", 0.0, 1.0)
        self.sparse = bool(sparse)

    def call(self, y_true, y_pred):
        log_probabilities = tf.nn.log_softmax(y_pred)
        classes = y_pred.shape[-1]
        if self.sparse:
            labels = tf.cast(y_true, "int32")
            labels = tf.squeeze(labels, -1) if labels.shape.rank == y_pred.shape.rank else labels
            of_label = tf.gather(log_probabilities, labels, batch_dims=labels.shape.rank)
        else:
            of_label = tf.reduce_sum(y_true * log_probabilities, axis=-1)
        smoothing = tf.cast(strength_value(self.smoothing), y_pred.dtype)
        if smoothing.shape.rank:
            smoothing = tf.reshape(smoothing, [-1] + [1] * (of_label.shape.rank - 1))
        return -(1 - smoothing) * of_label - smoothing / classes * tf.reduce_sum(log_probabilities, axis=-1)

    def get_config(self):
        return {**super().get_config(), "smoothing": serialized(self.smoothing), "sparse": self.sparse}

    @classmethod
    def from_config(cls, config):
        return cls(**deserialized(config, "smoothing"))

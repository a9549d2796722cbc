"""Losses of a self-tuning model: the training loss may depend on hyperparameters, the validation loss does not."""

from typing import Any

import keras
import tensorflow as tf

from farhox._core.types import Config, Loss, Tensor
from farhox.outer.outer_variable import Strength, value_of
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.strengths import checked_strength


class FunctionLoss(keras.losses.Loss):
    """A function (targets, predictions) -> losses of the examples, or one loss, as a Keras loss."""

    def __init__(self, function: Any, dtype: Any) -> None:
        super().__init__(name="loss", dtype=dtype)
        self._function = function

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return self._function(y_true, y_pred)


def as_loss(loss: Loss, dtype: Any) -> keras.losses.Loss:
    """The name of a Keras loss, a loss or a function as a Keras loss that computes in `dtype`."""
    if not isinstance(loss, (str, keras.losses.Loss)) and not callable(loss):
        raise TypeError("A loss must be the name of a Keras loss, a keras.losses.Loss or a function (targets, "
                        f"predictions). Received: {loss!r}")
    loss = keras.losses.get(loss)
    return loss if isinstance(loss, keras.losses.Loss) else FunctionLoss(loss, dtype)


@keras.saving.register_keras_serializable(package="farhox")
class LabelSmoothing(keras.losses.Loss):
    """Cross-entropy with smoothed labels, each example with its own smoothing while it is perturbed.

    The target is (1 - smoothing) one_hot(label) + smoothing / classes; of a binary loss, (1 - smoothing) y +
    smoothing / 2.

    Args:
        smoothing: `Hyperparameter` or float in [0, 1].
        sparse: Bool, without a `loss`. Targets are labels [batch, ...]; otherwise distributions [batch, ..., classes].
        loss: A Keras loss with label smoothing, of which the smoothing takes the place: `CategoricalCrossentropy`,
            `BinaryCrossentropy`, `CategoricalFocalCrossentropy` or `BinaryFocalCrossentropy`, or
            `SparseCategoricalCrossentropy`, which has none in Keras. Default: from logits.

    Raises:
        TypeError: If the loss is another one.
        ValueError: If the smoothing can leave [0, 1], or the loss leaves out a class.
    """

    def __init__(self, smoothing: Strength, sparse: bool = True, loss: Any = None,
                 name: str = "label_smoothing", **kwargs: Any) -> None:
        if loss is None:
            kind = keras.losses.SparseCategoricalCrossentropy if sparse else keras.losses.CategoricalCrossentropy
            loss = kind(from_logits=True, **kwargs)
        elif type(loss) not in (*_SMOOTHING, keras.losses.SparseCategoricalCrossentropy):
            raise TypeError("Labels are smoothed in cross-entropies of Keras: "
                            f"{', '.join(kind.__name__ for kind in _SMOOTHING)}, SparseCategoricalCrossentropy. "
                            f"Received: {loss!r}")
        config = loss.get_config()
        if config.get("ignore_class") is not None:
            raise ValueError("The loss must not leave out a class: its label has no place among the smoothed ones. "
                             f"Received: ignore_class={config['ignore_class']}")
        super().__init__(name=name, reduction=loss.reduction, dtype=loss.dtype)
        self.smoothing = checked_strength(smoothing, "smoothing", 0.0, 1.0)
        self.loss = loss
        self.sparse = isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        if self.sparse:
            settings = {key: config[key] for key in ("from_logits", "axis") if key in config}
            self._hard = keras.losses.CategoricalCrossentropy(reduction=None, dtype=loss.dtype, **settings)
        else:
            self._hard = type(loss).from_config({**config, "label_smoothing": 0.0, "reduction": None})

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        y_pred = tf.convert_to_tensor(y_pred)
        axis = self._hard.get_config().get("axis", -1)
        targets = tf.convert_to_tensor(y_true)
        if self.sparse:
            labels = tf.squeeze(targets, axis) if targets.shape.rank == y_pred.shape.rank else targets
            targets = tf.one_hot(tf.cast(labels, "int32"), y_pred.shape[axis], axis=axis, dtype=y_pred.dtype)
        targets = tf.cast(targets, y_pred.dtype)
        if targets.shape.rank == y_pred.shape.rank - 1:  # As Keras, of binary labels.
            targets = targets[..., tf.newaxis]
        smoothing = tf.cast(value_of(self.smoothing), y_pred.dtype)
        if smoothing.shape.rank:
            smoothing = tf.reshape(smoothing, [-1] + [1] * (targets.shape.rank - 1))
        classes = 2 if isinstance(self._hard, _BINARY) else y_pred.shape[axis]
        return self._hard.call(targets * (1.0 - smoothing) + smoothing / classes, y_pred)

    def to_keras(self) -> Any:
        """The Keras loss with the current smoothing; without any for labels that are numbers of classes."""
        config = self.loss.get_config()
        if self.sparse:
            return type(self.loss).from_config(config)
        return type(self.loss).from_config({**config, "label_smoothing": float(value_of(self.smoothing))})

    def get_config(self) -> Config:
        return {"name": self.name, "smoothing": serialized(self.smoothing),
                "loss": keras.losses.serialize(self.loss)}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**deserialized(config, "smoothing", "loss"))


_BINARY = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
_SMOOTHING = (*_BINARY, keras.losses.CategoricalCrossentropy, keras.losses.CategoricalFocalCrossentropy)

"""Which examples are predicted right, resolved by shapes as Keras resolves the metric "accuracy"."""

import keras
import tensorflow as tf

from farhox._core.types import Loss, Tensor

_CLASSIFYING = (
    keras.losses.sparse_categorical_crossentropy, keras.losses.categorical_crossentropy,
    keras.losses.binary_crossentropy, keras.losses.categorical_focal_crossentropy,
    keras.losses.binary_focal_crossentropy)
_CLASSES = (
    keras.losses.SparseCategoricalCrossentropy, keras.losses.CategoricalCrossentropy,
    keras.losses.BinaryCrossentropy, keras.losses.CategoricalFocalCrossentropy, keras.losses.BinaryFocalCrossentropy)


def classifies(loss: Loss) -> bool:
    """Whether a loss is one of Keras' cross-entropies, whose predictions are right or wrong."""
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    return isinstance(loss, _CLASSES) or loss in _CLASSIFYING


def correct(targets: Tensor, predictions: Tensor) -> Tensor:
    """One where a prediction is right and zero where it is wrong, [examples, ...].

    As the metric "accuracy" of Keras: one output is compared with .5; else the greatest output is compared with the
    class number, or with the place of the greatest target where the targets have the shape of the outputs.
    """
    outputs, last = predictions.shape[-1], targets.shape[-1] if targets.shape.rank else None
    if outputs == 1:
        right = keras.metrics.binary_accuracy(targets, predictions)
        return tf.squeeze(right, -1) if right.shape.rank == predictions.shape.rank else right
    if targets.shape.rank < predictions.shape.rank or last == 1:
        return keras.metrics.sparse_categorical_accuracy(targets, predictions)
    return keras.metrics.categorical_accuracy(targets, predictions)

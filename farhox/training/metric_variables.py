"""Variables of compiled metrics, made before training from the shapes of predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from farhox._core.types import Data

if TYPE_CHECKING:
    from farhox.training.hyper_optimizer import HyperOptimizer


def make_metrics(optimizer: HyperOptimizer, metrics: Any, data: Data, predictions: Callable[..., Any]) -> None:
    """Makes the variables of metrics where no strategy is: TensorFlow traces twice what makes variables itself.

    Args:
        optimizer: A `HyperOptimizer`.
        metrics: Its compiled metrics, or None.
        data: Its data set.
        predictions: Callable, an element of the data set -> (targets, predictions, sample weights).
    """
    if (metrics is None or metrics.built or optimizer.run_eagerly
            or optimizer._distribute_strategy is not None or not isinstance(data, tf.data.Dataset)):
        return
    _build(optimizer, metrics, data.element_spec, predictions)  # No element is read: a stream would go on from it.


def make_metrics_of_replicas(optimizer: HyperOptimizer, metrics: Any, iterator: Any,
                             predictions: Callable[..., Any]) -> None:
    """The same under a distribution strategy, which needs them before training.

    Keras' own way averages the data of all replicas, which makes fractions of indices and labels.

    Args:
        optimizer, metrics, predictions: As in `make_metrics`.
        iterator: Keras' iterator over an epoch.
    """
    if metrics is None or metrics.built or optimizer._distribute_strategy is None:
        return
    batch = next(next(iter(iterator))[2])
    _build(optimizer, metrics, tf.nest.map_structure(
        lambda leaf: optimizer.distribute_strategy.experimental_local_results(leaf)[0], batch), predictions)


def _build(optimizer, metrics, element, predictions):
    # Traced for its shapes and never run.
    traced = tf.function(predictions, autograph=False).get_concrete_function(element)
    targets, outputs, _ = traced.structured_outputs
    if any(part.shape.rank is None for part in tf.nest.flatten([targets, outputs])):
        return
    with optimizer.distribute_strategy.scope():
        metrics.build(*tf.nest.map_structure(
            lambda part: keras.KerasTensor(part.shape, part.dtype.name), (targets, outputs)))

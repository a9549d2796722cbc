"""Several hyper-iterations in one execution of `fit`, which makes its logs once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

if TYPE_CHECKING:
    from farhox.training.hyper_optimizer import HyperOptimizer


def in_one_execution(optimizer: HyperOptimizer, keras_function: Callable[[Any], Any],
                     train: Callable[[Any], Any], logs: Callable[[], Any]) -> Callable[[Any], Any]:
    """What `fit` calls for each execution: a function of an iterator over the data that returns the logs.

    In Keras' own loop every hyper-iteration is a branch, to which each variable that it reads or writes is handed
    again, and makes all logs, of which the last ones are used.

    Args:
        optimizer: The `HyperOptimizer`, compiled.
        keras_function: Keras' function for the same, for what is no iterator of TensorFlow.
        train: Callable, an element of the data set: one hyper-iteration, metrics included.
        logs: Callable, the logs after the hyper-iterations so far.
    """
    limit = optimizer.steps_per_execution
    step = tf.function(train, autograph=False, jit_compile=bool(optimizer.jit_compile))

    @tf.function(autograph=False, reduce_retracing=True)
    def execution(iterator):
        def body(count, element):
            step(element.get_value())
            # An element that no hyper-iteration follows is left to the next execution.
            return count + 1, tf.cond(count + 1 < limit, iterator.get_next_as_optional, lambda: element)

        # For a single element too: where none is left, an error of the iterator would not keep what does not depend on
        # the element, such as counts, from being run.
        count, _ = tf.while_loop(
            lambda count, element: (count < limit) & element.has_value(), body,
            [tf.constant(0), iterator.get_next_as_optional()], parallel_iterations=1)
        return count, logs()

    def function(iterator):
        if not isinstance(iterator, tf.data.Iterator):
            return keras_function(iterator)
        count, found = execution(iterator)
        if not int(count):
            raise StopIteration
        return found

    return function


def is_suited(optimizer: HyperOptimizer, train_step: Any) -> bool:
    """Whether hyper-iterations can be run so: compiled, on one device, by steps that nobody has made others.

    Args:
        optimizer: The `HyperOptimizer`, compiled.
        train_step: Its class's own `train_step`.
    """
    own = type(optimizer).train_step is train_step and "train_step" not in vars(optimizer)
    own_metrics = type(optimizer).compute_metrics is keras.Model.compute_metrics
    return own and own_metrics and not optimizer.run_eagerly and optimizer._distribute_strategy is None

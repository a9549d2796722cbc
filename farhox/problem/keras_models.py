"""Keras models as farhox sees them: what can be trained, which variables are state, whose loss `fit` would train on."""

from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from farhox._core import functional
from farhox._core.types import Loss, Tensor, Variables
from farhox.problem.losses import takes_class_numbers
from farhox.stn.layers import SelfTuning


def check_model(model: keras.Model) -> None:
    """Raises an error unless farhox can train the model as `fit` would, variable by variable.

    Raises:
        TypeError: If it is not a Keras model.
        ValueError: If it is not built, trains by a `train_step` of its own, or has quantized, stateful or self-tuning
            layers.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. Received: {model!r} of type {type(model).__name__}")
    if type(model).train_step is not keras.Model.train_step or "train_step" in vars(model):
        raise ValueError(
            "A model must be trained by Keras' own train_step: what another one does cannot be differentiated from "
            f"outside. Received: {model.name!r} of class {type(model).__name__}, which has its own train_step. Give "
            "what it minimises to farhox.BilevelProblem as an inner objective, or to the model as compute_loss.")
    if not model.built or not model.weights:
        raise ValueError(f"The model must be built before a problem is made of it, so that its variables exist: call "
                         f"model.build(input_shape) or give it an Input. Received the unbuilt model {model.name!r}")
    stateful = [layer.name for layer in model._flatten_layers()
                if isinstance(layer, keras.layers.RNN) and layer.stateful]
    if stateful:
        raise ValueError("Recurrent layers must not be stateful: the outer batch would start where training ended. "
                         f"Received: {model.name!r} with the stateful layers {stateful}")
    tuned = [layer.name for layer in model._flatten_layers() if isinstance(layer, SelfTuning)]
    if tuned:
        raise ValueError("Self-tuning layers need a farhox.stn.SelfTuningModel, which draws their hyperparameters. "
                         f"Received: {model.name!r} with the self-tuning layers {tuned}")
    quantized = [layer.name for layer in model._flatten_layers()
                 if isinstance(layer.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy)]
    if quantized:
        raise ValueError("Quantized layers have no derivative in their integer or float8 weights and cannot be trained "
                         f"inside. Received: {model.name!r} with the quantized layers {quantized}. Quantize the model "
                         "after training.")


def state_variables(model: keras.Model) -> Variables:
    """Statistics and seeds: variables that are not trainable by nature, rather than frozen weights."""
    frozen = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables}
    return [v for v in model.non_trainable_variables if id(v) not in frozen]


def check_examples(model: keras.Model, x: Tensor) -> None:
    """Raises a ValueError if inner inputs lack the axis of examples, as those of a batch that was not repeated do."""
    if not isinstance(model, (Functional, keras.Sequential)) or keras.tree.is_nested(x) or len(model.inputs) != 1:
        return
    shape = tuple(model.inputs[0].shape)
    # Keras adds a last axis of length 1 itself.
    if tf.TensorShape(x.shape).rank == len(shape) - 1 and shape[-1] != 1:
        raise ValueError(
            f"An inner batch must have an axis of examples: inputs of shape {shape}. Received shape "
            f"{tuple(x.shape)}. Inner batches have a leading axis T, one entry per inner step: use "
            "farhox.repeat(batch, steps) for the same batch in every step.")


def has_own_loss(model: keras.Model) -> bool:
    """Whether `fit` trains the model on a `compute_loss` of its own."""
    return type(model).compute_loss is not keras.Model.compute_loss or "compute_loss" in vars(model)


def own_loss(model: keras.Model, x: Tensor, y: Tensor, predictions: Tensor, weights: Tensor, training: bool) -> Tensor:
    """The model's own `compute_loss`, as `fit` calls it. What its metrics count is dropped.

    Raises:
        ValueError: If it assigns something else that is not a state of the model, or returns nothing.
    """
    state = state_variables(model)
    result = functional.call(
        lambda: model._compute_loss(x=x, y=y, y_pred=predictions, sample_weight=weights, training=training),
        bindings=[(variable, tf.convert_to_tensor(variable)) for variable in state])
    counts = {id(variable) for metric in model.metrics for variable in metric.variables}
    assigned = {id(variable): variable for variable in result.assigned if id(variable) not in counts}
    for variable, value in zip(state, result.values):
        if assigned.pop(id(variable), None) is not None:
            variable.assign(value)
    if assigned:
        raise ValueError(
            "compute_loss may assign the model's statistics and count in the metrics that model.metrics lists. That of "
            f"{model.name!r} assigned {', '.join(repr(variable.path) for variable in assigned.values())}.")
    if result.value is None:
        raise ValueError(f"compute_loss must return the loss. That of {model.name!r} returned None.")
    return tf.convert_to_tensor(result.value)


def example_specs(model: keras.Model, loss: Loss, with_index: bool, with_groups: bool) -> Any:
    """(inner batch, outer batch) of `tf.TensorSpec` that the model and its loss take.

    Raises:
        ValueError: If the model does not say its inputs and outputs, or its outputs have a loss each.
    """
    if not isinstance(model, (Functional, keras.Sequential)) or loss is None or isinstance(loss, (list, tuple, dict)):
        raise ValueError(
            "outer_variables='all' needs example_batches=(inner_batch, outer_batch), arrays or tf.TensorSpec, for a "
            f"model that is not functional or has a loss for each output. Received: {model.name!r} of type "
            f"{type(model).__name__} with loss={loss!r}")

    def spec(tensor):
        return tf.TensorSpec(tensor.shape, tensor.dtype)

    def target(output):
        return tf.TensorSpec(output.shape[:-1], tf.int64) if takes_class_numbers(loss) else spec(output)

    inputs, outputs = (model.inputs[0], model.outputs[0]) if isinstance(model, keras.Sequential) else (
        model.input, model.output)
    x, y = keras.tree.map_structure(spec, inputs), keras.tree.map_structure(target, outputs)
    column = tf.TensorSpec([None], tf.int64)
    return (x, y, column) if with_index else (x, y), (x, y, column) if with_groups else (x, y)

"""The signatures of an export: functions from named tensors to named tensors that check what they are given.

The checks are operations of the graph. They run before everything else, so that bad input never gets as far as an
operation that would name itself instead of the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox import meta
from farhox._core.types import Tensor, Tensors
from farhox.training.hyper_optimizer import HyperOptimizer


@dataclasses.dataclass(frozen=True)
class Input:
    """A named input of a signature.

    Attributes:
        name: Its name.
        shape: Tuple with a name for each axis of any size, at least one, and an int for each axis of that size. Axes of
            one name have one size in all inputs of a signature.
        dtype: A `tf.DType`.
        classes: Int, if the entries are class numbers: they must be less.
        feature: Its name within a `tf.train.Example`.
    """

    name: str
    shape: tuple
    dtype: Any
    classes: Any = None
    feature: Any = None

    @property
    def axes(self) -> str:
        """The shape as people read it."""
        return f"[{', '.join(str(size) for size in self.shape)}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """A function of an export.

    Attributes:
        inputs: List of `Input`.
        function: Callable `*tensors -> dictionary of tensors`, the tensors in the order of the inputs.
        output_shapes: Dictionary from the names of the outputs to shapes as in `Input`.
    """

    inputs: list
    function: Any
    output_shapes: dict


def signatures_of(model: Any, label_spec: Any = None) -> dict[str, Signature]:
    """The signatures of a learner, an embedding learner or a Keras model: a dictionary by name.

    Raises:
        TypeError: If the model is none of these, or `label_spec` no specification.
        ValueError: If a Keras model does not say what its inputs are, or labels are not what the loss takes.
    """
    numbers = isinstance(model, meta.EmbeddingLearner) or (
        isinstance(model, meta.Learner) and model.labels_are_class_numbers)
    if label_spec is not None and (numbers or not isinstance(model, meta.Learner)):
        raise ValueError("label_spec is for learners whose labels are no class numbers. "
                         f"Received: label_spec={label_spec!r} with {type(model).__name__} {model.name!r}")
    if isinstance(model, meta.EmbeddingLearner):
        signatures = _adapting(model, model.embedding, (model.ways,), "probabilities", _class_numbers(model.ways))
    elif isinstance(model, meta.Learner):
        shape = model.model.output_shape[1:]
        labels = _class_numbers(shape[-1]) if numbers else _targets(model, label_spec, shape)
        signatures = _adapting(model, model.model, shape, _output_name(model.model), labels)
    elif isinstance(model, keras.Model) and not isinstance(model, HyperOptimizer):
        return {"serving_default": _predicting(model)}
    else:
        raise TypeError("saved_model exports a learner of farhox.meta, a farhox.stn.SelfTuningModel or a keras.Model, "
                        f"such as the one that a HyperOptimizer tunes. Received: {model!r}")
    if isinstance(model, (meta.HyperRepresentation, meta.EmbeddingLearner)):
        body = model.body if isinstance(model, meta.HyperRepresentation) else model.embedding
        signatures["embed"] = Signature(
            _model_inputs(body), lambda inputs: {"representation": model.embed(inputs)},
            {"representation": ("examples", *body.output_shape[1:])})
    return signatures


def network_of(model: Any) -> keras.Model:
    """The Keras model whose weights an export holds."""
    if isinstance(model, meta.EmbeddingLearner):
        return model.embedding
    return model.model if isinstance(model, meta.Learner) else model


def checked(inputs: list[Input], tensors: Sequence[Tensor]) -> Tensors:
    """The tensors with their shapes set, behind the checks of all of them."""
    sizes = {}
    passed = []
    for entry, tensor in zip(inputs, tensors):
        what = f"{entry.name} must have shape {entry.axes}"
        # As many sizes as there should be, whatever the rank: what looks at one of them cannot fail before the checks.
        shape = tf.concat([tf.shape(tensor), tf.fill([len(entry.shape)], -1)], axis=0)[:len(entry.shape)]
        received = f"{what}. Received shape:", tf.shape(tensor)
        checks = [_check(tf.rank(tensor) == len(entry.shape), *received)]
        for axis, size in enumerate(entry.shape):
            if not isinstance(size, str):
                checks.append(_check(shape[axis] == size, *received))
            elif size not in sizes:
                sizes[size] = shape[axis], entry.name
                checks.append(_check(shape[axis] > 0, f"{what}, none of them empty. Received shape:",
                                     tf.shape(tensor)))
            else:
                expected, other = sizes[size]
                checks.append(_check(
                    shape[axis] == expected, f"{what}, with as many of {size} as in {other}. Received:",
                    shape[axis], "and", expected))
        with tf.control_dependencies(checks):
            # What is asked of the values assumes the shape. A reshape, as the shape of what goes through an identity
            # is inferred from what the model makes of it, and the check of its rank optimised away.
            tensor = tf.reshape(tensor, shape)
        tensor.set_shape([None if isinstance(size, str) else size for size in entry.shape])
        checks = []
        if entry.dtype.is_floating:
            checks.append(_check(tf.reduce_all(tf.math.is_finite(tensor)),
                                 f"{entry.name} must be finite: it holds a NaN or an infinity."))
        if entry.classes is not None:
            low, high = tf.reduce_min(tensor), tf.reduce_max(tensor)
            checks.append(_check(
                tf.logical_and(low >= 0, high < entry.classes),
                f"{entry.name} must be integers from 0 to {entry.classes - 1}, as the model has {entry.classes} "
                "outputs. Received numbers from", low, "to", high))
        passed.append((tensor, checks))
    with tf.control_dependencies([check for _, checks in passed for check in checks]):
        return [tf.identity(tensor) for tensor, _ in passed]


def from_examples(signature: Signature) -> Signature:
    """The signature that takes each group of inputs as serialized `tf.train.Example`s.

    Inputs with the same first axis are features of one example.
    """
    groups = {}
    for entry in signature.inputs:
        groups.setdefault(entry.shape[0], []).append(entry)
    inputs = [Input(axis if axis == "examples" else f"{axis}_examples", (axis,), tf.string) for axis in groups]

    def function(*serialized):
        tensors = {}
        for name, entries, examples in zip([entry.name for entry in inputs], groups.values(), serialized):
            features = {entry.feature: tf.io.FixedLenFeature(entry.shape[1:], entry.dtype) for entry in entries}
            places = tf.strings.as_string(tf.range(tf.shape(examples)[0]))
            parsed = tf.io.parse_example(examples, features, example_names=tf.strings.join([name, places], " "))
            tensors.update((entry.name, parsed[entry.feature]) for entry in entries)
        return signature.function(*checked(signature.inputs, [tensors[entry.name] for entry in signature.inputs]))

    return Signature(inputs, function, signature.output_shapes)


def _check(condition, *message):
    return tf.debugging.Assert(condition, list(message), summarize=10)


def _class_numbers(classes):
    """Labels that are class numbers: as a nest of `Input`."""
    return Input("support_labels", ("support",), tf.int64, classes, "label")


def _targets(learner, spec, shape):
    """Labels that are numbers like the outputs, or what `spec` says of one example: a nest of `Input`."""
    if spec is None:
        spec, loss = tf.TensorSpec(shape, tf.float32), keras.losses.get(learner.support_loss)
        predictions = tf.TensorSpec([1, *shape], learner.model.compute_dtype)
        try:
            tf.function(loss, autograph=False).get_concrete_function(tf.TensorSpec([1, *shape]), predictions)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError("Labels of a learner whose loss takes other ones than arrays like the model's outputs, "
                             f"{list(shape)} of an example, must be described: label_spec=. The loss says: {error}"
                             ) from error
    parts = spec if isinstance(spec, dict) else {"labels": spec}
    if not parts or not all(isinstance(name, str) and isinstance(part, tf.TensorSpec) for name, part in parts.items()):
        raise TypeError("label_spec must be a tf.TensorSpec of the labels of one example, or a dictionary of them by "
                        f"name. Received: {spec!r}")
    for part in parts.values():
        if not part.shape.is_fully_defined():
            raise ValueError(f"label_spec must have known shapes, without an axis of examples. Received: {spec!r}")
    inputs = {name: Input(f"support_{name}", ("support", *part.shape), part.dtype,
                          feature=name if isinstance(spec, dict) else "label") for name, part in parts.items()}
    return inputs if isinstance(spec, dict) else inputs["labels"]


def _adapting(learner, network, output_shape, output, labels):
    """`adapt` and `adapt_batch`: from a support set and queries to predictions, the inner training included.

    Args:
        labels: An `Input`, or a dictionary of them.
    """
    own = _model_inputs(network)
    support, query = ([dataclasses.replace(entry, name=f"{part}_{entry.name}", shape=(part, *entry.shape[1:]))
                       for entry in own] for part in ("support", "query"))
    inputs = [*support, *tf.nest.flatten(labels), *query]
    names = [entry.name for entry in inputs]
    if len(set(names)) < len(names):
        twice = sorted({name.removeprefix("support_") for name in names if names.count(name) > 1})
        raise ValueError(f"Inputs of the model and labels must have names that differ. Received twice: {twice}")

    def packed(tensors):
        return tensors[0] if len(own) == 1 else keras.tree.pack_sequence_as(network.input, tensors)

    def adapt(*tensors):
        return {output: learner_predictions(*(tensor[None] for tensor in tensors))[0]}

    def adapt_batch(*tensors):
        return {output: learner_predictions(*tensors)}

    def learner_predictions(*tensors):
        given = tf.nest.pack_sequence_as(labels, tensors[len(own):-len(own)])
        return learner.predict_episodes((packed(tensors[:len(own)]), given), packed(tensors[-len(own):]))

    batch = [dataclasses.replace(entry, shape=("tasks", *entry.shape)) for entry in inputs]
    return {"adapt": Signature(inputs, adapt, {output: ("query", *output_shape)}),
            "adapt_batch": Signature(batch, adapt_batch, {output: ("tasks", "query", *output_shape)})}


def _predicting(model):
    """`serving_default`: the model in inference."""
    inputs = _model_inputs(model)
    names = list(model.output_names) if len(model.outputs) > 1 else [_output_name(model)]

    def predict(*tensors: Tensor):
        packed = tensors[0] if len(tensors) == 1 else keras.tree.pack_sequence_as(model.input, tensors)
        return dict(zip(names, keras.tree.flatten(model(packed, training=False))))

    return Signature(inputs, predict, {
        name: ("examples", *output.shape[1:]) for name, output in zip(names, model.outputs)})


def _model_inputs(model):
    """The inputs of a Keras model: "inputs" if there is one, or else by their names in the model."""
    if not getattr(model, "inputs", None):
        raise ValueError("The model must say what its inputs are: a functional model, or a Sequential with an Input. "
                         f"Received: {model.name!r} of type {type(model).__name__}")
    names = ["inputs"] if len(model.inputs) == 1 else [tensor.name for tensor in model.inputs]
    axes = [tuple(f"{name}_{axis}" if size is None else size for axis, size in enumerate(tensor.shape) if axis)
            for name, tensor in zip(names, model.inputs)]
    return [Input(name, ("examples", *shape), tf.as_dtype(tensor.dtype), feature=name)
            for name, shape, tensor in zip(names, axes, model.inputs)]


def _output_name(model):
    """What the outputs of a model are."""
    activation = getattr(model.layers[-1], "activation", None)
    classifies = activation in (keras.activations.softmax, keras.activations.sigmoid) or isinstance(
        model.layers[-1], keras.layers.Softmax)
    return "probabilities" if classifies else "predictions"

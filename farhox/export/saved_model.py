"""SavedModels for TensorFlow Serving, of learners and of models: no Python and no farhox where they are served."""

from __future__ import annotations

import inspect
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from farhox import stn
from farhox._core import checks, functional
from farhox._core.types import Array, Arrays
from farhox.export.signatures import checked, from_examples, network_of, signatures_of

_EXISTS = "A version is never overwritten. Received: version={version}, which exists in {directory}"
_LABELS = "labels.txt"
_WARMUP = pathlib.Path("assets.extra", "tf_serving_warmup_requests")


def saved_model(learner_or_model: keras.Model, directory: str | os.PathLike, version: int | None = None,
                labels: Sequence[str] | None = None, serialized_examples: bool = False, warmup: Any = False,
                float16: bool = False, jit_compile: bool = False, label_spec: Any = None) -> pathlib.Path:
    """Writes a SavedModel as a new version of a served model: `directory/<version>/saved_model.pb`.

    Signatures, all with sizes of batches that are open:

    - of a Keras model, and of a `SelfTuningModel`, which is baked: `serving_default`, inputs to outputs in inference;
    - of a learner: `adapt`, from `support_inputs`, `support_labels` and `query_inputs` to what `learner.predict`
      returns, with the whole inner training of `evaluation_steps` steps inside; `adapt_batch`, the same for a batch of
      tasks with as many support examples and queries each. `serving_default` is `adapt`;
    - of `HyperRepresentation` and an `EmbeddingLearner` also `embed`, what `learner.embed` returns.

    Outputs are called "probabilities" after a softmax or a sigmoid, "predictions" otherwise, and "representation".
    Every signature checks its inputs and fails with an error that names the one that makes no sense.

    The version appears in one step when it is complete: a server that watches the folder never sees half of it.

    ```python
    path = farhox.export.saved_model(learner, "served/omniglot")       # served/omniglot/1
    ```

    Args:
        learner_or_model: A learner of `farhox.meta`, a `farhox.stn.SelfTuningModel`, or a functional or Sequential
            `keras.Model`, such as one that `learner.adapt` returns.
        directory: Folder of the served model; its last part is the name under which it is served.
        version: Positive int. Default: one more than the greatest version in the folder.
        labels: List of strings, the name of each output; written to the asset `labels.txt`, one in a line.
        serialized_examples: Bool. Adds `<signature>_examples` for all signatures but `adapt_batch`: they take strings,
            serialized `tf.train.Example`s, as `examples`, or `support_examples` and `query_examples`. Features are
            "inputs" (or the names of the model's inputs) and, of a support example, "label".
        warmup: True, or a list of pairs (signature, dictionary of arrays): requests that a server runs when it loads
            the model, so that the first user does not wait. True: one of zeros for each signature without examples.
            Needs the package tensorflow-serving-api.
        float16: Bool. The model's weights are stored in half precision, which halves the size; computed is as before.
        jit_compile: Bool. Compile with XLA, once for each size of a request. Slow for convolutions on CPUs.
        label_spec: A `tf.TensorSpec` of the labels of one example, or a dictionary of them, of a learner with a loss of
            one's own. The parts of a dictionary are inputs `support_<name>`. Default: floats, as the model's outputs.

    Returns:
        The `pathlib.Path` of the version.

    Raises:
        TypeError: If `learner_or_model` is something else, `directory` no path, `labels` or `warmup` no list, or
            `label_spec` no specification.
        ValueError: If the version is not a positive integer, labels do not fit the outputs, a warm-up request does not
            fit a signature, the model does not say what its inputs are, or the loss takes other labels than
            `label_spec` says.
        FileExistsError: If the version exists. It is never touched.
        ImportError: If `warmup` needs a package that is not installed.
    """
    directory = _folder(directory)
    if version is not None:
        checks.positive_integer("version", version)
    if version is not None and (directory / str(version)).exists():
        raise FileExistsError(_EXISTS.format(version=version, directory=directory))
    if isinstance(learner_or_model, stn.SelfTuningModel):
        learner_or_model = stn.bake(learner_or_model)
    signatures = signatures_of(learner_or_model, label_spec)
    labels = _checked_labels(labels, signatures)
    requests = _warmup_requests(warmup, signatures)
    if requests:
        _serving_api()  # Before the work rather than after it.
    if serialized_examples:
        signatures.update({f"{name}_examples": from_examples(signature) for name, signature in signatures.items()
                           if name != "adapt_batch"})
    if "serving_default" not in signatures:
        signatures["serving_default"] = signatures["adapt"]

    directory.mkdir(parents=True, exist_ok=True)
    # In the folder itself, as a rename is a single step within one file system only. Servers look at numbers alone.
    with tempfile.TemporaryDirectory(prefix=".exporting_", dir=directory) as folder:
        made = pathlib.Path(folder, "model")
        _write(made, learner_or_model, signatures, labels, float16, jit_compile)
        if requests:
            _write_warmup(made / _WARMUP, requests, directory.resolve().name)
        return _publish(made, directory, version)


def load(directory: str | os.PathLike, version: int | None = None) -> ServedModel:
    """A handle on an exported model, for tests and notebooks.

    Args:
        directory: Folder of the served model, with its versions.
        version: Positive int. Default: the greatest.

    Returns:
        A `ServedModel`.

    Raises:
        TypeError: If `directory` is no path.
        ValueError: If `version` is not a positive integer, or `labels.txt` does not fit the outputs.
        FileNotFoundError: If there is no such version, or none at all.
    """
    directory = _folder(directory)
    version = None if version is None else checks.positive_integer("version", version)
    versions = _versions(directory)
    if not versions or version not in (None, *versions):
        wanted = "a version" if version is None else f"version {version}"
        raise FileNotFoundError(f"There must be {wanted} of the model in {directory}. It holds: {versions or 'none'}")
    return ServedModel(directory / str(version or versions[-1]))


class ServedModel:
    """An exported model as a server would answer with it.

    ```python
    served = farhox.export.load("served/omniglot")
    served.predict("adapt", support_inputs=images, support_labels=labels, query_inputs=queries)["probabilities"]
    ```

    Args:
        path: Folder of one version.

    Attributes:
        path, version: The folder, and its number.
        labels: List of the names of the outputs, or None.
        signatures: Dictionary from the name of a signature to a dictionary with "inputs" and "outputs", each of
            which is a dictionary from names to `tf.TensorSpec`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        self.version = int(self.path.name)
        self._model = tf.saved_model.load(str(self.path))
        self.signatures = {
            name: {side: {key: _spec(key, info) for key, info in sorted(getattr(definition, side).items())}
                   for side in ("inputs", "outputs")}
            for name, definition in _read(self.path).meta_graphs[0].signature_def.items() if not name.startswith("__")}
        labels = self.path / "assets" / _LABELS
        self.labels = _read_labels(labels, self.signatures) if labels.exists() else None

    def predict(self, signature: str = "serving_default", **inputs: Array) -> Arrays:
        """The answer to a request.

        Args:
            signature: Name of a signature.
            **inputs: Its inputs, arrays or what can be made arrays of. Numbers are cast to the type of the signature.

        Returns:
            Dictionary from the names of outputs to arrays.

        Raises:
            TypeError: If an input is of a type that the signature does not take.
            ValueError: If there is no such signature, or it has other inputs; or a number is not a whole one where the
                signature takes whole ones.
            tf.errors.InvalidArgumentError: If an input makes no sense; from the graph, as a server would answer.
        """
        if signature not in self.signatures:
            raise ValueError(f"The signature must be one of {sorted(self.signatures)}. Received: {signature!r}")
        specs = self.signatures[signature]["inputs"]
        if set(inputs) != set(specs):
            raise ValueError(f"{signature!r} takes the inputs {sorted(specs)}. Received: {sorted(inputs)}")
        tensors = {name: _as_type(name, value, specs[name].dtype) for name, value in inputs.items()}
        return {name: value.numpy() for name, value in self._model.signatures[signature](**tensors).items()}


def _write(path, model, signatures, labels, float16, jit_compile):
    """The SavedModel, with the documented shapes of inputs and outputs in its signatures."""
    network = network_of(model)
    bindings = _in_half_precision(network) if float16 else []
    functions = {}
    for name, signature in signatures.items():
        if signature not in functions:
            functions[signature] = _graph_function(name, signature, bindings, jit_compile)
    module = tf.Module()
    variables = {id(variable): variable for function in functions.values() for variable in function.variables}
    module.captured = list(variables.values())
    module.tables = [layer for layer in network._flatten_layers() if not layer.variables]
    with tempfile.TemporaryDirectory() as folder:
        if labels is not None:
            file = pathlib.Path(folder, _LABELS)
            file.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8", newline="\n")
            module.labels = tf.saved_model.Asset(str(file))
        tf.saved_model.save(
            module, str(path), signatures={name: functions[signature] for name, signature in signatures.items()})
    proto = _read(path)
    for name, signature in signatures.items():
        definition = proto.meta_graphs[0].signature_def[name]
        for entry in signature.inputs:
            _set_shape(definition.inputs[entry.name], entry.shape)
        for output, shape in signature.output_shapes.items():
            _set_shape(definition.outputs[output], shape)
    (path / "saved_model.pb").write_bytes(proto.SerializeToString(deterministic=True))


def _graph_function(name, signature, bindings, jit_compile):
    """The concrete function of a signature.

    Its inputs have no shape in the graph: TensorFlow would take a shape for granted, leave out what checks it, and fail
    somewhere inside. The documented shapes are those in the SavedModel's signatures.
    """
    def compute(*tensors):
        values = [(variable, tf.cast(half, variable.dtype)) for variable, half in bindings]
        return functional.call(signature.function, *tensors, bindings=values).value

    # XLA drops assertions: they stay outside of what it compiles.
    compute = tf.function(compute, autograph=False, jit_compile=True) if jit_compile else compute

    def function(*tensors):
        return compute(*checked(signature.inputs, tensors))

    function.__name__ = name
    specs = [tf.TensorSpec(None, entry.dtype, entry.name) for entry in signature.inputs]
    return tf.function(function, autograph=False, input_signature=specs).get_concrete_function()


def _in_half_precision(network):
    """Pairs of a floating-point variable of a network and a variable with its value in float16."""
    return [(variable, tf.Variable(tf.cast(variable.value, tf.float16), trainable=False))
            for variable in network.variables if tf.as_dtype(variable.dtype).is_floating]


def _publish(made, directory, version):
    """Moves a complete version to its place in one step."""
    while True:
        number = version or max(_versions(directory), default=0) + 1
        try:
            # Fails if another process has published this number: a folder that is not empty is not replaced.
            made.rename(directory / str(number))
            return directory / str(number)
        except OSError as error:
            if not (directory / str(number)).exists():
                raise
            if version is not None:
                raise FileExistsError(_EXISTS.format(version=version, directory=directory)) from error


def _versions(directory):
    """Numbers of the versions in a folder, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if re.fullmatch("[0-9]+", path.name))


def _checked_labels(labels, signatures):
    if labels is None:
        return None
    if not isinstance(labels, (list, tuple)):
        raise TypeError(f"labels must be a list of strings, one for each output. Received: {labels!r}")
    labels = list(labels)
    (shape, *_) = next(iter(signatures.values())).output_shapes.values()
    bad = [label for label in labels if not isinstance(label, str) or "\n" in label or "\r" in label]
    if bad or len(labels) != shape[-1]:
        raise ValueError(f"labels must be {shape[-1]} strings of one line, one for each output. Received: {labels}")
    return labels


def _warmup_requests(warmup, signatures):
    """A list of (signature, dictionary of arrays) that fits the signatures."""
    if warmup is True:
        return [(name, {entry.name: np.zeros([1 if isinstance(size, str) else size for size in entry.shape],
                                             entry.dtype.as_numpy_dtype) for entry in signature.inputs})
                for name, signature in signatures.items()]
    if warmup and not (isinstance(warmup, (list, tuple)) and all(
            isinstance(request, (list, tuple)) and len(request) == 2 and isinstance(request[1], dict)
            for request in warmup)):
        raise TypeError("warmup must be True or a list of pairs (signature, dictionary of arrays). "
                        f"Received: {warmup!r}")
    requests = []
    for name, inputs in warmup or []:
        if name not in signatures or set(inputs) != {entry.name for entry in signatures[name].inputs}:
            known = {name: [entry.name for entry in signature.inputs] for name, signature in signatures.items()}
            raise ValueError(f"A warm-up request must be one of the signatures with its inputs, {known}. "
                             f"Received: {name!r} with {sorted(inputs)}")
        arrays = {entry.name: _as_type(entry.name, inputs[entry.name], entry.dtype).numpy()
                  for entry in signatures[name].inputs}
        for entry in signatures[name].inputs:
            expected = tf.TensorShape([None if isinstance(size, str) else size for size in entry.shape])
            if not expected.is_compatible_with(arrays[entry.name].shape):
                raise ValueError(f"{entry.name} of a warm-up request must have shape {entry.axes}. "
                                 f"Received shape: {arrays[entry.name].shape}")
        requests.append((name, arrays))
    return requests


def _write_warmup(path, requests, name):
    """A file of records as TensorFlow Serving reads it when it loads a model."""
    prediction_log = _serving_api()
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests:
            log = prediction_log.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name, request.model_spec.signature_name = name, signature
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())


def _folder(directory):
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory must be a path. Received: {directory!r}")
    return pathlib.Path(directory)


def _as_type(name, value, dtype):
    """A tensor of the type that a signature takes, of numbers of any type that hold no less."""
    if value is None or inspect.isgenerator(value):
        raise TypeError(f"{name} must be an array. Received: {type(value).__name__}")
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of one shape and type. Received: {value!r}") from error
    if (tensor.dtype == tf.string) != (dtype == tf.string):
        raise TypeError(f"{name} must be of type {dtype.name}. Received: {tensor.dtype.name}")
    if dtype.is_integer and tensor.dtype.is_floating and not bool(tf.reduce_all(tensor == tf.round(tensor))):
        raise ValueError(f"{name} must be whole numbers. Received: {tensor.dtype.name} with fractions")
    return tensor if tensor.dtype == dtype else tf.cast(tensor, dtype)


def _read_labels(path, signatures):
    """The lines of labels.txt, whatever they end with."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8. Received: {error}") from error
    labels = lines[:-1] if lines[-1] == "" else lines
    sizes = {spec.shape[-1] for signature in signatures.values() for name, spec in signature["outputs"].items()
             if name != "representation" and spec.shape.rank}
    if len(labels) not in sizes:
        raise ValueError(f"{path} must hold one line for each of the model's outputs: {sorted(sizes)}. "
                         f"Received: {len(labels)} lines")
    return labels


def _serving_api():
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as error:
        raise ImportError("Warm-up requests are written with the package tensorflow-serving-api, which is not "
                          "installed: pip install 'farhox[serving]'") from error
    return prediction_log_pb2


def _read(path):
    return saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())


def _set_shape(info, shape):
    shape = tf.TensorShape([size if isinstance(size, int) else None for size in shape])
    info.tensor_shape.CopyFrom(shape.as_proto())


def _spec(name, info):
    return tf.TensorSpec(tf.TensorShape(info.tensor_shape), tf.as_dtype(info.dtype), name)

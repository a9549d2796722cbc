"""From a Keras model to a self-tuning one and back: `convert`, `bake`, `summary`."""

import keras
import numpy as np
import tensorflow as tf
from keras.src.models.functional import Functional

from farhox.outer.hyperparameters import Hyperparameter
from farhox.outer.regularizers import L1L2
from farhox.stn import layers, recurrent
from farhox.stn.gates import as_hyperparameters, unconstrained
from farhox.stn.layers import SelfTuning
from farhox.stn.network import Network, hyperparameters_of
from farhox.stn.perturbations import PerturbationLayer

_TWINS = {
    keras.layers.Dense: layers.Dense, keras.layers.Conv1D: layers.Conv1D, keras.layers.Conv2D: layers.Conv2D,
    keras.layers.DepthwiseConv2D: layers.DepthwiseConv2D, keras.layers.Embedding: layers.Embedding,
    keras.layers.LSTM: recurrent.LSTM, keras.layers.GRU: recurrent.GRU,
}
_PLAIN = {twin: plain for plain, twin in _TWINS.items()}
# Settings of Keras' layers that a twin does not take: how to compute on a GPU, LoRA and quantisation, initial values.
_UNUSED = ("use_cudnn", "implementation", "lora_rank", "lora_alpha", "quantization_config", "weights")
_OWN = ("hyperparameters", "gate_initializer", "centred", "reference", "recurrent_dropconnect")


def convert(model, hyperparameters=None, gate_initializer="zeros"):
    """A self-tuning copy of a functional or Sequential Keras model.

    Dense, Conv1D, Conv2D, DepthwiseConv2D, Embedding, LSTM and GRU become the self-tuning layers of those names, with
    their weights as elementary weights. All other layers, subclasses of these among them, stay as they are, copied with
    their weights, and `stn.summary` names those that have weights. Layers that perturb (`stn.Dropout`, ...) are shared
    with the model. Layers of nested models are converted too. With gates that start at zero the copy computes what the
    model computes. Gates measure hyperparameters from their current values.

    Args:
        model: A built functional or Sequential `keras.Model`.
        hyperparameters: List of `Hyperparameter` that the weights respond to. Default: those that layers and
            regularizers of the model read; name them if the training loss alone reads one.
        gate_initializer: Keras initializer of the gates.

    Returns:
        A `keras.Model` of the same kind.

    Raises:
        TypeError: If the model is not functional or Sequential.
        ValueError: If it is not built, a layer cannot be converted (LoRA, quantised weights, one that is self-tuning
            already), or no hyperparameter is found.
    """
    _check_model(model, "stn.convert")
    if hyperparameters is None:
        hyperparameters = hyperparameters_of(model._flatten_layers())
        if not hyperparameters:
            raise ValueError("stn.convert needs hyperparameters: in layers of the model, such as stn.Dropout(rate), or "
                             f"as an argument. Received: {model.name!r}, in which no layer reads one")
    hyperparameters = as_hyperparameters(hyperparameters, "stn.convert")
    # A reference keeps what gates see of order one.
    reference = unconstrained(hyperparameters).numpy().tolist()
    pairs = []

    def twin(layer):
        _check_layer(layer)
        if isinstance(layer, PerturbationLayer):
            return layer
        if type(layer) in _TWINS:
            settings = {key: value for key, value in layer.get_config().items() if key not in _UNUSED}
            copy = _TWINS[type(layer)].from_config({
                **settings, "hyperparameters": list(hyperparameters), "gate_initializer": gate_initializer,
                "reference": reference})
            _keep_live_regularizers(getattr(layer, "cell", layer), getattr(copy, "cell", copy))
        else:
            copy = _copy(layer)
        pairs.append((layer, copy))
        return copy

    converted = keras.models.clone_model(model, clone_function=twin, recursive=True)
    for layer, copy in pairs:
        _copy_weights(layer, copy)
    return converted


def bake(model):
    """A plain Keras model with the weights that a self-tuning one has at the current hyperparameters.

    Needs no farhox, neither to run nor to load. Dropout and Gaussian noise become the Keras layers of the current
    strengths, regularizers Keras regularizers of them. Other layers that perturb become the identity: Keras' own
    augmentation layers act whenever they are not told that this is no training.

    Args:
        model: A `SelfTuningModel`, or a functional or Sequential model with self-tuning layers.

    Returns:
        A functional or Sequential `keras.Model` with the same outputs in inference.

    Raises:
        TypeError: If the model is not functional or Sequential.
        ValueError: If it is not built, or an embedding is also the output (`reverse=True`), which Keras' has no way of.
    """
    model = getattr(model, "model", model)
    _check_model(model, "stn.bake")
    pairs = []

    def plain(layer):
        if isinstance(layer, PerturbationLayer):
            replacement = layer.to_keras()
            return keras.layers.Identity(name=layer.name) if replacement is None else replacement
        if type(layer) in _PLAIN:
            kind = _PLAIN[type(layer)]
            if any(node.arguments.kwargs.get("reverse") for node in layer._inbound_nodes):
                raise ValueError("stn.bake needs layers that have a plain twin. Received: "
                                 f"{layer.name!r}, called with reverse=True")
            own = _OWN + (("dropout", "seed") if kind is keras.layers.Embedding else ())
            copy = kind.from_config({
                key: "zeros" if key.endswith("_initializer") else value
                for key, value in layer.get_config().items() if key not in own})
        else:
            copy = _copy(layer)
        _make_regularizers_plain(getattr(copy, "cell", copy))
        pairs.append((layer, copy))
        return copy

    baked = keras.models.clone_model(model, clone_function=plain, recursive=True)
    for layer, copy in pairs:
        _copy_weights(layer, copy)
    return baked


def summary(model):
    """What of a model responds to hyperparameters, as text.

    Args:
        model: A `SelfTuningModel` or another `keras.Model`.

    Returns:
        A string: the hyperparameters with their values, the number of self-tuning layers and of their parameters, and
        the names of the layers with weights that do not respond.
    """
    model = getattr(model, "model", model)
    network = Network(model)
    responding = {id(v) for layer in network.gated for v in layer.variables}
    stay = [layer for layer in _layers_of(model)
            if any(id(v) not in responding for v in layer.trainable_variables)]
    read = hyperparameters_of(network.layers) + [entry for layer in network.gated for entry in layer.hyperparameters]
    names = {id(entry): f"{entry.name} = {entry.numpy()}" for entry in read}
    lines = ["Hyperparameters: " + (", ".join(names.values()) or "none")]
    count = sum(int(tf.size(v)) for v in network.response)
    lines.append(f"Self-tuning layers: {len(network.gated)}, with {count:,} parameters for their response")
    lines.append("Layers whose weights do not respond: " + (
        ", ".join(f"{layer.name} ({type(layer).__name__})" for layer in stay) or "none"))
    return "\n".join(lines)


def _layers_of(model):
    """The layers a person has put in, those of nested models among them, without the layers they are made of."""
    return [inner for layer in model.layers
            for inner in (_layers_of(layer) if isinstance(layer, keras.Model) else [layer])]


def _check_model(model, name):
    if not isinstance(model, (keras.Sequential, Functional)):
        raise TypeError(f"{name} needs a functional or Sequential keras.Model. Received: {model!r}")
    if not model.built:
        raise ValueError(f"{name} needs a built model: give it a keras.Input, or call it once. "
                         f"Received: {model.name!r}")


def _check_layer(layer):
    reasons = []
    if isinstance(layer, (SelfTuning, recurrent.LSTM, recurrent.GRU)):
        reasons.append("responds to hyperparameters already")
    elif type(layer) in _TWINS:
        if layer.get_config().get("lora_rank"):
            reasons.append("has LoRA weights")
        if layer.quantization_mode is not None:
            reasons.append(f"is quantised to {layer.quantization_mode}")
    if reasons:
        raise ValueError(f"A layer must be a plain Keras layer to be converted. Received: {layer.name!r}, which "
                         f"{' and '.join(reasons)}")


def _copy(layer):
    """A layer like the given one, not built. Operations without weights stay themselves."""
    if not isinstance(layer, keras.Layer):
        return layer
    copy = type(layer).from_config(layer.get_config())
    _keep_live_regularizers(layer, copy)
    return copy


def _copy_weights(layer, copy):
    """Weights of a layer to one of the same class, of a plain layer to the elementary weights of its twin."""
    source, target = getattr(layer, "cell", layer), getattr(copy, "cell", copy)
    if isinstance(target, SelfTuning):
        for name in target.elementary_weights():
            getattr(target, name).assign(getattr(source, name))
    elif isinstance(source, SelfTuning):
        for name, value in source.realized_weights().items():
            getattr(target, name).assign(value)
    elif isinstance(layer, keras.Layer):
        copy.set_weights(layer.get_weights())


def _keep_live_regularizers(layer, copy):
    # A configuration makes hyperparameters of its own.
    for key, value in vars(layer).items():
        if isinstance(value, L1L2):
            setattr(copy, key, value)


def _make_regularizers_plain(layer):
    for key, value in list(vars(layer).items()):
        if isinstance(value, L1L2):
            strengths = {name: strength.numpy() if isinstance(strength, Hyperparameter) else strength
                         for name, strength in (("l1", value.l1), ("l2", value.l2))}
            # Keras has no strength per weight.
            scalars = {name: float(strength) for name, strength in strengths.items() if np.ndim(strength) == 0}
            setattr(layer, key, keras.regularizers.L1L2(**scalars))

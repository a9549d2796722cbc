"""From a Keras model to a self-tuning one, or one whose layers read strengths, and back; what responds."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.models.functional import Functional

from farhox._core.types import Initializer
from farhox.outer.outer_variable import OuterVariable
from farhox.outer.regularizers import L1L2
from farhox.stn.gates import as_hyperparameters, unconstrained
from farhox.stn.held import hyperparameters_in, layers_of, share_hyperparameters
from farhox.stn.keras_strengths import checked_strengths, find_layer, perturbing_twin
from farhox.stn.network import Network
from farhox.stn.perturbations import PerturbationLayer
from farhox.stn.plain_twins import self_tuning_twins
from farhox.stn.self_tuning import Twin


def convert(model: keras.Model, hyperparameters: Sequence[OuterVariable] | None = None,
            gate_initializer: Initializer = "zeros", twins: Mapping[type, type] | None = None,
            strengths: Mapping[Any, Any] | None = None) -> keras.Model:
    """A self-tuning copy of a functional or Sequential Keras model.

    Dense, Embedding, Conv1D, Conv2D, Conv3D, Conv2DTranspose, DepthwiseConv2D, SeparableConv2D, LSTM, GRU, EinsumDense,
    MultiHeadAttention and GroupQueryAttention become the self-tuning layers of those names, with their weights as
    elementary weights; so do layers of your own with the `twins` you give. All other layers, subclasses of these among
    them, stay as they are, copied with their weights, and `stn.summary` names those that have weights. Layers that
    perturb (`stn.Dropout`, ...) are shared with the model. Layers of nested models are converted too. With gates that
    start at zero the copy computes what the model computes. Gates measure hyperparameters from their current values.

    Args:
        model: A built functional or Sequential `keras.Model`.
        hyperparameters: List of `Hyperparameter` that the weights respond to. Default: those that layers and
            regularizers of the model read, those of `strengths` among them; name them if the training loss alone reads
            one. What a layer reads and the list leaves out stays at its value, and a `SelfTuningModel` warns of it.
        gate_initializer: Keras initializer of the gates.
        twins: Dictionary from classes of Keras layers to self-tuning ones (see `stn.SelfTuning`), besides farhox' own
            or in their place; None leaves layers of a class as they are.
        strengths: Dictionary from dropout, noise and augmentation layers of Keras in the model, or their names, to a
            `Hyperparameter`, or to a dictionary from arguments of the layer to `Hyperparameter`; `stn.strengths_of`
            makes it. These layers then have a strength per example, and `stn.bake` gives them back with the values
            found.

    Returns:
        A `keras.Model` of the same kind.

    Raises:
        TypeError: If the model is not functional or Sequential, or an argument has the wrong type.
        ValueError: If it is not built, a layer cannot be converted (LoRA, quantised weights, one that is self-tuning
            already), a layer with strengths is not in the model, or no hyperparameter is found.
    """
    _check_model(model, "stn.convert")
    table = {**self_tuning_twins(), **_checked_twins(twins)}
    found = {id(layer): (layer, checked_strengths(layer, given)) for layer, given in _found(model, strengths).items()}
    perturbing = {key: perturbing_twin(*entry) for key, entry in found.items()}
    if hyperparameters is None:
        in_strengths = [entry for _, given in found.values() for entry in given.values()
                        if isinstance(entry, OuterVariable)]
        hyperparameters = list({id(entry): entry for entry in [
            *in_strengths, *hyperparameters_in(model._flatten_layers())]}.values())
        if not hyperparameters:
            raise ValueError("stn.convert needs hyperparameters: in layers of the model, such as stn.Dropout(rate), as "
                             f"strengths, or as an argument. Received: {model.name!r}, in which no layer reads one")
    hyperparameters = as_hyperparameters(hyperparameters, "stn.convert")
    settings = {
        "hyperparameters": list(hyperparameters), "gate_initializer": gate_initializer,
        # A reference keeps what gates see of order one.
        "reference": unconstrained(hyperparameters).numpy().tolist()}

    def twin(layer):
        if perturbing.get(id(layer)) is not None:
            return perturbing[id(layer)]
        if isinstance(layer, PerturbationLayer):
            return layer
        kind = table.get(type(layer))
        _check_layer(layer, kind)
        rates = found[id(layer)][1] if id(layer) in found else {}
        if rates and kind is None:
            raise ValueError("A layer with strengths must become a self-tuning one. Received: "
                             f"{layer.name!r}, which twins leaves as it is")
        return _copy(layer) if kind is None else kind.from_plain(layer, **settings, **rates)

    return _rebuilt(model, twin)


def with_strengths(model: keras.Model, strengths: Mapping[Any, Any]) -> keras.Model:
    """A copy of a functional or Sequential Keras model whose dropout, noise and augmentation layers read strengths.

    Its weights do not respond: strengths act along the path of training. Hypergradients of a `BilevelProblem` reach
    those of layers that are `differentiable`: dropout (in the mean over masks), noise, contrast, brightness, and what
    moves pixels with bilinear interpolation.

    ```python
    strengths = stn.strengths_of(model)
    network = stn.with_strengths(model, strengths)
    ```

    Args:
        model: A built functional or Sequential `keras.Model`.
        strengths: As in `convert`. Attention, `LSTM` and `GRU`, which drop out besides what they compute, are not among
            these layers.

    Returns:
        A `keras.Model` of the same kind, which computes what the model computes. `stn.bake` gives the layers of Keras
        back, with the strengths found.

    Raises:
        TypeError: If the model is not functional or Sequential, or a layer has no strengths.
        ValueError: If it is not built, or a layer with strengths is not in the model, or is one of attention, `LSTM`
            and `GRU`.
    """
    _check_model(model, "stn.with_strengths")
    perturbing = {}
    for layer, given in _found(model, strengths).items():
        perturbing[id(layer)] = perturbing_twin(layer, checked_strengths(layer, given))
        if perturbing[id(layer)] is None:
            raise ValueError("The strengths of layers that drop out besides what they compute need stn.convert. "
                             f"Received: {layer.name!r} of the class {type(layer).__name__}")

    def reading(layer):
        return layer if isinstance(layer, PerturbationLayer) else perturbing.get(id(layer)) or _copy(layer)

    return _rebuilt(model, reading)


def bake(model: keras.Model) -> keras.Model:
    """A plain Keras model with the weights that a self-tuning one has at the current hyperparameters.

    Needs no farhox, neither to run nor to load. Dropout and noise become the Keras layers of the current strengths, and
    so do layers that `convert` made from Keras layers with `strengths`; regularizers become Keras regularizers of them.
    Other layers that perturb become the identity: Keras' own augmentation layers act whenever they are not told that
    this is no training.

    Args:
        model: A `SelfTuningModel`, or a functional or Sequential model with self-tuning layers.

    Returns:
        A functional or Sequential `keras.Model` with the same outputs in inference.

    Raises:
        TypeError: If the model is not functional or Sequential.
        ValueError: If it is not built, or a layer has no plain twin: a subclass of a self-tuning layer that does not
            say `plain` itself, a layer that holds self-tuning ones, an embedding that is also the output
            (`reverse=True`).
    """
    model = getattr(model, "model", model)
    _check_model(model, "stn.bake")

    def plain(layer):
        if isinstance(layer, PerturbationLayer):
            replacement = layer.to_keras()
            return keras.layers.Identity(name=layer.name) if replacement is None else replacement
        _check_bakeable(layer)
        copy = layer.to_keras() if isinstance(layer, Twin) else _copy(layer)
        _make_plain(copy)
        return copy

    return _rebuilt(model, plain)


def summary(model: keras.Model) -> str:
    """What of a model responds to hyperparameters, as text.

    Args:
        model: A `SelfTuningModel` or another `keras.Model`.

    Returns:
        A string: the hyperparameters with their values, the number of self-tuning layers and of their parameters, and
        the names of the layers with weights that do not respond.

    Raises:
        TypeError: If the model is not a `keras.Model`.
    """
    model = getattr(model, "model", model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"stn.summary needs a keras.Model. Received: {model!r}")
    network = Network(model)
    responding = {id(v) for layer in network.gated
                  for v in [*layer.elementary_weights().values(), *layer.response_variables]}
    stay = [layer for layer in layers_of(model)
            if any(id(v) not in responding for v in layer.trainable_variables)]
    read = hyperparameters_in(network.layers) + [entry for layer in network.gated for entry in layer.hyperparameters]
    names = {id(entry): f"{entry.name} = {entry.numpy()}" for entry in read}
    lines = ["Hyperparameters: " + (", ".join(names.values()) or "none")]
    count = sum(int(tf.size(v)) for v in network.response)
    lines.append(f"Self-tuning layers: {len(network.gated)}, with {count:,} parameters for their response")
    lines.append("Layers whose weights do not respond: " + (
        ", ".join(f"{layer.name} ({type(layer).__name__})" for layer in stay) or "none"))
    return "\n".join(lines)


def _check_model(model, name):
    if not isinstance(model, (keras.Sequential, Functional)):
        raise TypeError(f"{name} needs a functional or Sequential keras.Model. Received: {model!r}")
    if not model.built:
        raise ValueError(f"{name} needs a built model: give it a keras.Input, or call it once. "
                         f"Received: {model.name!r}")


def _checked_twins(twins):
    twins = {} if twins is None else twins
    if not isinstance(twins, dict):
        raise TypeError("twins must be a dictionary from classes of Keras layers to self-tuning ones. "
                        f"Received: {twins!r}")
    for plain, twin in twins.items():
        if not (isinstance(plain, type) and issubclass(plain, keras.Layer)):
            raise TypeError(f"The keys of twins must be classes of Keras layers. Received: {plain!r}")
        if twin is not None and not (isinstance(twin, type) and issubclass(twin, Twin)):
            raise TypeError("The values of twins must be None or classes with stn.SelfTuning or stn.SelfTuningParts in "
                            f"front of a Keras layer. Received: {twin!r}")
        if twin is not None and twin.plain is not plain:
            raise ValueError("A self-tuning layer must say of which class it is the twin. Received: "
                             f"{twin.__name__} with plain = {twin.plain} for {plain.__name__}")
    return twins


def _rebuilt(model, replacement):
    """A copy of a model with `replacement(layer)` in the place of each layer, and the weights that layers have."""
    pairs = []

    def replaced(layer):
        pairs.append((layer, replacement(layer)))
        return pairs[-1][1]

    rebuilt = keras.models.clone_model(model, clone_function=replaced, recursive=True)
    for layer, copy in pairs:
        if not isinstance(layer, PerturbationLayer) and not isinstance(copy, PerturbationLayer):
            _copy_weights(layer, copy)
    return rebuilt


def _found(model, strengths):
    """Dictionary from layers of the model to their strengths."""
    strengths = {} if strengths is None else strengths
    if not isinstance(strengths, dict):
        raise TypeError("strengths must be a dictionary from layers, or names of layers, to hyperparameters. "
                        f"Received: {strengths!r}")
    return {find_layer(model, entry): given for entry, given in strengths.items()}


def _check_layer(layer, twin):
    reasons = []
    inside = layer._flatten_layers() if isinstance(layer, keras.Layer) else []
    if any(isinstance(each, Twin) for each in inside):
        reasons.append("responds to hyperparameters already")
    elif twin is not None:
        if layer.get_config().get("lora_rank"):
            reasons.append("has LoRA weights")
        if layer.quantization_mode is not None:
            reasons.append(f"is quantised to {layer.quantization_mode}")
    if reasons:
        raise ValueError(f"A layer must be a plain Keras layer to be converted. Received: {layer.name!r}, which "
                         f"{' and '.join(reasons)}")


def _check_bakeable(layer):
    if isinstance(layer, Twin):
        # A subclass may compute anything.
        if vars(type(layer)).get("plain") is None:
            raise ValueError("stn.bake needs layers that say their plain twin. Received: "
                             f"{layer.name!r} of the class {type(layer).__name__}, which has no `plain` of its own")
    elif isinstance(layer, keras.Layer):
        held = [each for each in layer._flatten_layers() if isinstance(each, (Twin, PerturbationLayer))]
        if held:
            raise ValueError("stn.bake needs layers that have a plain twin. Received: "
                             f"{layer.name!r} ({type(layer).__name__}), which holds {held[0].name!r} "
                             f"({type(held[0]).__name__})")


def _copy(layer):
    """A layer like the given one, not built. Operations without weights stay themselves."""
    if not isinstance(layer, keras.Layer):
        return layer
    copy = type(layer).from_config(layer.get_config())
    share_hyperparameters(layer, copy)
    return copy


def _copy_weights(layer, copy):
    """Weights of a layer to one of the same class, of a plain layer to the elementary weights of its twin and back."""
    if not isinstance(layer, keras.Layer):
        return
    twin = copy if isinstance(copy, Twin) else layer if isinstance(layer, Twin) else None
    if twin is None:
        copy.set_weights(layer.get_weights())
        return
    for part in twin.parts:
        if part in vars(layer):  # Some parts are made for some settings alone.
            _copy_weights(getattr(layer, part), getattr(copy, part))
    if twin is copy:
        values = {name: getattr(layer, name) for name in twin.elementary_weights()}
    else:
        values = twin.realized_weights()
    for name, value in values.items():
        getattr(copy, name).assign(value)
    rest, rest_of_copy = _other_weights(layer, values, twin), _other_weights(copy, values, twin)
    if [tuple(v.shape) for v in rest] != [tuple(v.shape) for v in rest_of_copy]:
        raise ValueError("A self-tuning layer must have the weights of its plain twin besides those that respond. "
                         f"Received: {[v.path for v in rest]} in {layer.name!r} and "
                         f"{[v.path for v in rest_of_copy]} in its copy of the class {type(copy).__name__}")
    for value, variable in zip(rest, rest_of_copy):
        variable.assign(value)


def _other_weights(layer, elementary, twin):
    """The weights of a layer without those of parts, the elementary ones, and hyper weights and gates."""
    parts = [getattr(layer, part) for part in twin.parts if part in vars(layer)]
    known = {id(v) for part in parts for v in part.weights} | {id(getattr(layer, name)) for name in elementary}
    known |= {id(v) for v in layer.response_variables} if isinstance(layer, Twin) else set()
    return [v for v in layer.weights if id(v) not in known]


def _make_plain(layer):
    """Puts Keras' regularizers of the current strengths in the place of farhox', in a layer and its parts."""
    for key, value in list(vars(layer).items()):
        if isinstance(value, L1L2):
            strengths = {name: strength.numpy() if isinstance(strength, OuterVariable) else strength
                         for name, strength in (("l1", value.l1), ("l2", value.l2))}
            # Keras has no strength per weight.
            scalars = {name: float(strength) for name, strength in strengths.items() if np.ndim(strength) == 0}
            setattr(layer, key, keras.regularizers.L1L2(**scalars))
        elif isinstance(value, keras.Layer):
            _make_plain(value)

"""Parts of a model that are outer: their variables, and models of the layers before and after."""

from collections.abc import Sequence
from typing import Any

import keras

from farhox._core.types import Variables
from farhox.problem.keras_models import state_variables


def representation_variables(model: keras.Model, parts: Any, name: str = "representation") -> Variables:
    """The trainable variables of parts of the model, its layers and single variables, each once.

    Raises:
        ValueError: If a part is not the model's, or a variable is not trainable.
    """
    layers = {id(layer) for layer in model._flatten_layers()}
    trainable = {id(variable) for variable in model.trainable_variables}
    variables = {}
    for part in parts:
        if id(part) in layers:
            variables.update((id(variable), variable) for variable in part.trainable_variables)
        elif id(part) in trainable:
            variables[id(part)] = part
        else:
            raise ValueError(f"{name} must hold layers of the model {model.name!r}, or trainable variables of it. "
                             f"Received: {part!r}")
    return list(variables.values())


def can_share_representation(layers: Sequence[Any]) -> bool:
    """Whether parts give the same representation of a batch at each inner step: layers, no random numbers, no masks."""
    if not all(isinstance(layer, keras.Layer) for layer in layers):
        return False
    own = [own for layer in layers for own in layer._flatten_layers()]
    statistics = {id(v) for layer in own if isinstance(layer, keras.layers.BatchNormalization)
                  for v in (layer.moving_mean, layer.moving_variance)}
    steady = all(id(v) in statistics for layer in layers for v in state_variables(layer))
    return steady and not any(isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
                              for layer in own)


def split(model: keras.Model, representation: Sequence[Any]) -> Any:
    """The model's first layers, which are those of the representation, and the others: two models."""
    layers, count = model.layers, len(representation)
    ahead = isinstance(model, keras.Sequential) and 0 < count < len(layers) and all(
        a is b for a, b in zip(layers, representation))
    if not ahead or not can_share_representation(representation):
        raise ValueError(
            "share_representation needs a keras.Sequential that begins with the layers of the representation, without "
            f"random numbers and masks. Received: {type(model).__name__} {model.name!r} with the layers "
            f"{[layer.name for layer in layers]} and the representation {[part.name for part in representation]}")
    first = keras.Sequential([keras.Input(model.input_shape[1:], dtype=model.inputs[0].dtype), *layers[:count]])
    rest = keras.Input(first.output_shape[1:], dtype=first.outputs[0].dtype)
    return first, keras.Sequential([rest, *layers[count:]])

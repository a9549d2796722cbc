"""Which hyperparameters layers, losses and optimizers hold, and that a copy holds the same ones."""

from collections.abc import Sequence
from typing import Any

import keras

from farhox.outer.outer_variable import OuterVariable

# What holds settings, and may be a setting itself.
_HOLDERS = (keras.regularizers.Regularizer, keras.losses.Loss, keras.optimizers.Optimizer,
            keras.optimizers.schedules.LearningRateSchedule)


def hyperparameters_in(objects: Sequence[Any]) -> list[OuterVariable]:
    """List of the hyperparameters that objects, or the regularizers, losses, ... in them, hold as settings, each once.

    Those that weights respond to are no settings. Layers inside layers are not looked into: they are among the layers.
    """
    found, seen = {}, set()

    def look(value):
        if isinstance(value, OuterVariable):
            found[id(value)] = value
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, _HOLDERS) and id(value) not in seen:
            seen.add(id(value))
            look(list(vars(value).values()))

    for holder in objects:
        seen.add(id(holder))
        look(list(vars(holder).values()))
    return list(found.values())


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """The layers a person has put in, each once, those of nested models among them, without what they are made of."""
    found = {}
    for layer in model.layers:
        inner = layers_of(layer) if isinstance(layer, keras.Model) else [layer]
        found.update({id(each): each for each in inner})
    return list(found.values())


def share_hyperparameters(layer: keras.Layer, copy: Any) -> None:
    """Gives a copy that was made from a configuration the hyperparameters of the layer in the place of its own."""
    for key, value in vars(layer).items():
        if key in vars(copy) and isinstance(value, (OuterVariable, keras.regularizers.Regularizer)):
            if isinstance(value, OuterVariable) or hyperparameters_in([value]):
                setattr(copy, key, value)
    pairs = [(vars(layer)[key], vars(copy)[key]) for key in vars(layer) if key in vars(copy)]
    for inner, copied in pairs:
        if isinstance(inner, keras.Layer) and isinstance(copied, keras.Layer) and inner is not copied:
            share_hyperparameters(inner, copied)

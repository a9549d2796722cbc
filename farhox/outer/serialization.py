"""Hyperparameters in the configurations of layers, regularizers and models that hold them."""

from typing import Any

import keras

from farhox._core.types import Config
from farhox.outer.outer_variable import OuterVariable


def serialized(value: Any) -> Any:
    """A setting for `get_config`: hyperparameters, also in a list, as configurations; anything else stays.

    Configurations are marked so that all that is saved in one file shares its hyperparameters again when it is loaded.
    An outer variable that has none stays too: copies in memory share it, and Keras asks it for one to save it.
    """
    if isinstance(value, (list, tuple)):
        return [serialized(entry) for entry in value]
    if not isinstance(value, OuterVariable) or type(value).get_config is OuterVariable.get_config:
        return value
    config = keras.saving.serialize_keras_object(value)
    # Keras marks an object from its second appearance on, and loses marks that are set inside nested models.
    config["shared_object_id"] = id(value)
    return config


def deserialized(config: Config, *keys: str) -> Config:
    """The configuration of an object, with hyperparameters and other Keras objects in the place of the `keys`."""
    config = dict(config)
    for key in keys:
        if key in config:
            config[key] = _object(config[key])
    return config


def _object(entry):
    if isinstance(entry, (list, tuple)):
        return [_object(item) for item in entry]
    return keras.saving.deserialize_keras_object(entry) if isinstance(entry, dict) else entry

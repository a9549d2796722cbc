"""Copies of Keras models with weights of their own."""

import keras


def copy_of(model: keras.Model) -> keras.Model:
    """A model of the same layers with the same weights, which are its own.

    A layer without weights, such as one that holds a table of words, is the same one in both: what it holds is no
    part of its configuration. What other layers keep beside their weights is restored as when a model is loaded.

    Args:
        model: A built `keras.Model`.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: If Keras cannot make the model again from its configuration.
    """
    rule = (f"The model {model.name!r} must be one that Keras can make again: {type(model).__name__} needs a "
            "configuration and a build method.")
    try:
        copy = _made_again(model)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{rule} Received: {error}") from error
    if len(copy.variables) != len(model.variables):
        raise ValueError(f"{rule} Received a copy with {len(copy.variables)} of {len(model.variables)} variables")
    for own, original in zip(copy._flatten_layers(), model._flatten_layers()):
        if own is not original and not own._layers:
            _restore(own, original)
    for own, original in zip(copy.variables, model.variables):
        own.assign(original)
    return copy


def _made_again(model):
    if isinstance(model, keras.Sequential) or getattr(model, "inputs", None):
        return keras.models.clone_model(model, clone_function=_own_or_shared, recursive=True)
    return keras.models.clone_model(model)  # A class of its own makes its layers itself.


def _own_or_shared(layer):
    has_own = isinstance(layer, keras.Layer) and layer.variables
    return layer.__class__.from_config(layer.get_config()) if has_own else layer


def _restore(layer, original):
    """What a layer keeps, by the way in which Keras saves and loads it."""
    stored = {}
    original.save_own_variables(stored)
    if stored:
        layer.load_own_variables(stored)

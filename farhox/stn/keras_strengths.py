"""The strengths of a Keras model's own dropout, noise and augmentation layers, as hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from farhox.outer.hyperparameters import Hyperparameter
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.held import layers_of
from farhox.stn.images import Augmentation, augmentation_strengths, has_differentiable_factors
from farhox.stn.plain_twins import perturbing_twins, self_tuning_twins

# Where a rate stands in a denominator, and all is lost at 1.
_GREATEST_RATE = 0.9


def strengths_of(model: keras.Model, shared: bool = False,
                 skip: Sequence[Any] = ()) -> dict[keras.Layer, dict[str, OuterVariable]]:
    """Hyperparameters for the strengths of a Keras model's own layers that perturb, for `stn.convert(strengths=)`.

    Of `Dropout`, `SpatialDropout1D` to `3D`, `GaussianDropout` and `AlphaDropout` the rate, in [0, 0.9]; of
    `GaussianNoise` the standard deviation; of `RandomRotation`, `RandomTranslation`, `RandomZoom`, `RandomContrast`,
    `RandomBrightness` and `RandomErasing` the factors; of `LSTM`, `GRU`, `MultiHeadAttention` and `GroupQueryAttention`
    the rates of dropout that are not zero. Each starts at its current value, or, from zero, at a fiftieth
    of its range. They are named `{layer}_{argument}`.

    ```python
    strengths = stn.strengths_of(model)
    tuned = stn.SelfTuningModel(stn.convert(model, strengths=strengths))
    ```

    Args:
        model: A `keras.Model`; layers of nested models count.
        shared: Bool. One hyperparameter for all layers of a class, named `{class}_{argument}` and starting at the mean
            of their values.
        skip: List of layers, or names of layers, to leave as they are.

    Returns:
        Dictionary from layers to dictionaries from arguments to `Hyperparameter`, in the order of the layers.

    Raises:
        TypeError: If the model is not a `keras.Model`.
        ValueError: If a layer to skip is not in it.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"stn.strengths_of needs a keras.Model. Received: {model!r}")
    skipped = {id(layer) for layer in (find_layer(model, entry) for entry in skip)}
    values, found = {}, []
    for layer in layers_of(model):
        if id(layer) in skipped:
            continue
        for argument, (value, greatest) in _values_of(layer).items():
            key = (type(layer), argument) if shared else (layer, argument)
            name = f"{type(layer).__name__ if shared else layer.name}_{argument}"
            values.setdefault(key, (name, greatest, []))[2].append(value)
            found.append((layer, argument, key))
    hyperparameters = {key: _hyperparameter(*entry) for key, entry in values.items()}
    strengths = {}
    for layer, argument, key in found:
        strengths.setdefault(layer, {})[argument] = hyperparameters[key]
    return strengths


def find_layer(model: keras.Model, entry: Any) -> keras.Layer:
    """A layer of a model, by itself or by its name.

    Raises:
        ValueError: If there is none, or more than one.
    """
    matching = [layer for layer in layers_of(model) if layer is entry or layer.name == entry]
    if len(matching) != 1:
        raise ValueError(f"A layer must be in {model.name!r} once, by itself or by its name. Received: {entry!r}, of "
                         f"which there are {len(matching)}")
    return matching[0]


def checked_strengths(layer: keras.Layer, strengths: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionary from arguments of a Keras layer to strengths.

    Args:
        layer: A Keras layer.
        strengths: A hyperparameter for each of its strengths, or a dictionary from arguments to hyperparameters.

    Raises:
        TypeError: If it has no strengths.
        ValueError: If a strength is none of its arguments.
    """
    arguments = list(_rates_of(layer)) or list(_values_of(layer))
    if not arguments:
        kinds = [*perturbing_twins(), *(plain for plain, twin in self_tuning_twins().items() if twin.rates)]
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"Strengths are those of dropout, noise and augmentation layers of Keras: {names}, and those "
                        f"that stn.Augmentation takes. Received: {layer!r}")
    if not isinstance(strengths, dict):
        strengths = dict.fromkeys(list(_values_of(layer)) or arguments, strengths)
    unknown = [argument for argument in strengths if argument not in arguments]
    if unknown:
        raise ValueError(f"The strengths of {layer.name!r} must be among {arguments}. Received: {unknown}")
    return strengths


def perturbing_twin(layer: keras.Layer, strengths: Mapping[str, Any]) -> Any:
    """The layer that perturbs as a Keras layer does, with strengths in the place of its numbers, or None.

    None for layers that respond themselves, which take the strengths as settings.
    """
    if _rates_of(layer):
        return None
    kind: Any = perturbing_twins().get(type(layer), Augmentation)
    return kind.from_plain(layer, strengths)


def has_derivative(layer: keras.Layer) -> bool:
    """Whether what a Keras layer with strengths computes has a derivative with respect to them, once it reads them."""
    twin = perturbing_twins().get(type(layer))
    if twin is not None:
        return twin.differentiable
    return not _rates_of(layer) and has_differentiable_factors(layer)


def _rates_of(layer):
    """The rates of a Keras layer that drops out besides what it computes, and responds itself."""
    twin = self_tuning_twins().get(type(layer))
    return () if twin is None else twin.rates


def _values_of(layer):
    """Dictionary from the strengths of a Keras layer to (value, greatest value), empty for a layer that has none."""
    if _rates_of(layer):
        rates = {name: float(getattr(layer, name)) for name in _rates_of(layer)}
        return {name: (rate, _GREATEST_RATE) for name, rate in rates.items() if rate > 0.0}
    twin = perturbing_twins().get(type(layer))
    if twin is None:
        return augmentation_strengths(layer)
    return {name: (float(getattr(layer, name)), min(greatest, _GREATEST_RATE) if np.isfinite(greatest) else None)
            for name, (_, greatest) in twin.STRENGTHS.items()}


def _hyperparameter(name, greatest, values):
    value = float(np.mean(values))
    if greatest is None:
        return Hyperparameter(max(value, 0.02), low=0.0, name=name)
    # A rate that is greater stays where it is, with as much room above it.
    greatest = max(greatest, (1.0 + value) / 2.0) if value >= greatest else greatest
    return Hyperparameter(min(max(value, 0.02 * greatest), 0.99 * greatest), low=0.0, high=greatest, name=name)

"""L1 and L2 penalties of a Keras model: found, put under hyperparameters, and written into a plain model."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Config, Tensor
from farhox.outer import L1L2, OuterVariable, value_of
from farhox.stn.held import layers_of
from farhox.tuner import tunables
from farhox.tuner.tunables import Place

_KINDS = {(False, "l1"): tunables.L1, (False, "l2"): tunables.L2,
          (True, "l1"): tunables.ACTIVITY_L1, (True, "l2"): tunables.ACTIVITY_L2}


class Penalties:
    """The penalties of a model's layers, in the order of its layers: the same in every copy of the model.

    Strengths that are outer variables already, in `farhox.L1L2`, stay what they are.

    Args:
        model: A built `keras.Model`.
        choice: A `Choice`.

    Attributes:
        found: List of `Tunable`.
    """

    def __init__(self, model: keras.Model, choice: Any) -> None:
        places, own = {}, {}
        for key, layer, regularizer in _regularizers(model):
            for name in ("l1", "l2"):
                strength = _strength(regularizer, name)
                if isinstance(strength, OuterVariable):
                    own.setdefault(id(strength), (strength, name, []))[2].append((key, layer.name))
                elif np.ndim(strength) == 0 and strength != 0.0:
                    of_activity = key[1] == "activity_regularizer"
                    places.setdefault((of_activity, name), []).append((key, Place(layer.name, strength)))
        self.found, self._settings = [], {}
        for (of_activity, strength), entries in sorted(places.items()):
            kind = _KINDS[of_activity, strength]
            keys = {id(place): key for key, place in entries}
            for name, group in choice.groups(kind, [place for _, place in entries]):
                row = choice.tunable(name, kind, group)
                self.found.append(row)
                for place, ratio in zip(group, row.ratios):
                    self._settings.setdefault(keys[id(place)], {})[strength] = (row.hyperparameter, ratio)
        for hyperparameter, strength, entries in own.values():
            where = [Place(layer, None) for _, layer in entries]
            self.found.append(choice.own(hyperparameter, tunables.PATH, where))
            for key, _ in entries:
                self._settings.setdefault(key, {})[strength] = (hyperparameter, 1.0)

    def install(self, model: keras.Model) -> None:
        """Puts the hyperparameters in the place of the strengths, in a copy of the model."""
        self._replace(model, lambda strengths: _Penalty(**strengths))

    def write(self, model: keras.Model, values: Any) -> None:
        """Puts plain strengths into a copy of the model: those that hyperparameters have in `values`, by their name."""
        self._replace(model, lambda strengths: keras.regularizers.L1L2(**{
            name: float(values[hyperparameter.name]) * ratio for name, (hyperparameter, ratio) in strengths.items()}))

    def _replace(self, model, make):
        for key, layer, regularizer in list(_regularizers(model)):
            if key not in self._settings:
                continue
            replacement = make(self._settings[key])
            for variable in layer._trainable_variables:
                if variable.regularizer is regularizer:
                    variable.regularizer = replacement
            if isinstance(key[1], str):
                setattr(layer, key[1], replacement)


@keras.saving.register_keras_serializable(package="farhox")
class _Penalty(keras.regularizers.Regularizer):
    """Adds sum(l1 |x| + l2 x^2) with strengths (hyperparameter, ratio). Saved, it is Keras' with their numbers."""

    def __init__(self, l1: Any = None, l2: Any = None) -> None:
        self._l1, self._l2 = l1, l2

    def __call__(self, x: Tensor) -> Tensor:
        x = tf.convert_to_tensor(x)
        total = tf.zeros([], x.dtype)
        for strength, measure in ((self._l1, tf.abs), (self._l2, tf.square)):
            if strength is not None:
                total += strength[1] * value_of(strength[0], dtype=x.dtype) * tf.reduce_sum(measure(x))
        return total

    def get_config(self) -> Config:
        strengths = {"l1": self._l1, "l2": self._l2}
        return {name: 0.0 if entry is None else float(entry[0]) * entry[1] for name, entry in strengths.items()}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return keras.regularizers.L1L2(**config)


_REGULARIZERS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2, L1L2, _Penalty)


def _regularizers(model):
    """((place of the layer, name of its attribute or number of its variable), layer, regularizer) of L1 and L2.

    Places and names are the same in copies of a model, and in the self-tuning layers that are made of its layers.
    """
    for index, layer in enumerate(layers_of(model)):
        for place, holder in _holders(layer, (index,)):
            held = {name: value for name, value in vars(holder).items() if isinstance(value, _REGULARIZERS)}
            for name, value in held.items():
                yield (place, name), holder, value
            for number, variable in enumerate(holder._trainable_variables):
                regularizer = variable.regularizer
                if isinstance(regularizer, _REGULARIZERS) and not any(regularizer is value for value in held.values()):
                    yield (place, number), holder, regularizer


def _holders(layer, place):
    """A layer and the layers in it: the cell of a recurrent one, the layer of a wrapper."""
    yield place, layer
    for name, value in vars(layer).items():
        if isinstance(value, keras.Layer):
            yield from _holders(value, (*place, name))


def _strength(regularizer, name):
    """A float, an array or an `OuterVariable`."""
    if isinstance(regularizer, L1L2):
        strength = getattr(regularizer, name)
        return strength if isinstance(strength, OuterVariable) or np.ndim(strength) else float(strength)
    return float(regularizer.get_config().get(name, 0.0))

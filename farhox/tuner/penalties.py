"""L1 and L2 penalties of a Keras model: found, put under hyperparameters, and written into a plain model."""

import keras
import numpy as np
import tensorflow as tf

from farhox.outer import L1L2, Hyperparameter
from farhox.outer.outer_variable import value_of
from farhox.tuner import tunables
from farhox.tuner.tunables import Place

_REGULARIZERS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2, L1L2)
_KINDS = {(False, "l1"): tunables.L1, (False, "l2"): tunables.L2,
          (True, "l1"): tunables.ACTIVITY_L1, (True, "l2"): tunables.ACTIVITY_L2}


class Penalties:
    """The penalties of a model's layers, in the order of its layers: the same in every copy of the model.

    Strengths that are `Hyperparameter`s already, in `farhox.L1L2`, stay what they are.

    Args:
        model: A built `keras.Model`.
        choice: A `Choice`.

    Attributes:
        found: List of `Tunable`.
    """

    def __init__(self, model, choice):
        places, own = {}, {}
        for key, layer, regularizer in _regularizers(model):
            for name in ("l1", "l2"):
                strength = _strength(regularizer, name)
                if isinstance(strength, Hyperparameter):
                    own.setdefault(id(strength), (strength, name, []))[2].append((key, layer.name))
                elif np.ndim(strength) == 0 and strength != 0.0:
                    places.setdefault((key[2], name), []).append((key, Place(layer.name, strength)))
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

    def install(self, model):
        """Puts the hyperparameters in the place of the strengths, in a copy of the model."""
        self._replace(model, lambda strengths: _Penalty(**strengths))

    def write(self, model, values):
        """Puts plain strengths into a copy of the model: those that hyperparameters have in `values`, by their name."""
        self._replace(model, lambda strengths: keras.regularizers.L1L2(**{
            name: float(values[hyperparameter.name]) * ratio for name, (hyperparameter, ratio) in strengths.items()}))

    def _replace(self, model, make):
        for key, layer, regularizer in list(_regularizers(model)):
            if key not in self._settings:
                continue
            replacement = make(self._settings[key])
            if not key[2]:
                layer._trainable_variables[key[1]].regularizer = replacement
            for name, value in list(vars(layer).items()):
                if value is regularizer:
                    setattr(layer, name, replacement)


class _Penalty(keras.regularizers.Regularizer):
    """Adds sum(l1 |x| + l2 x^2) with strengths (hyperparameter, ratio)."""

    def __init__(self, l1=None, l2=None):
        self._l1, self._l2 = l1, l2

    def __call__(self, x):
        x = tf.convert_to_tensor(x)
        total = tf.zeros([], x.dtype)
        for strength, measure in ((self._l1, tf.abs), (self._l2, tf.square)):
            if strength is not None:
                total += strength[1] * value_of(strength[0], dtype=x.dtype) * tf.reduce_sum(measure(x))
        return total


def _regularizers(model):
    """((index of the layer, index of its variable, whether of activities), layer, regularizer) of L1 and L2."""
    for index, layer in enumerate(model._flatten_layers(include_self=False)):
        for number, variable in enumerate(layer._trainable_variables):
            if isinstance(variable.regularizer, _REGULARIZERS):
                yield (index, number, False), layer, variable.regularizer
        if isinstance(layer.activity_regularizer, _REGULARIZERS):
            yield (index, 0, True), layer, layer.activity_regularizer


def _strength(regularizer, name):
    """A float, an array or a `Hyperparameter`."""
    if isinstance(regularizer, L1L2):
        strength = getattr(regularizer, name)
        return strength if isinstance(strength, Hyperparameter) or np.ndim(strength) else float(strength)
    return float(regularizer.get_config().get(name, 0.0))

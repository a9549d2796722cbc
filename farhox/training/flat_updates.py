"""Updates of many small variables as one of a vector."""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras
import tensorflow as tf

from farhox._core import functional, tree
from farhox._core.types import Tensor, Tensors, Variables
from farhox.dynamics.functional_optimizer import functional_copy, view_of

# Optimizers of Keras whose update of an entry depends on no other entry, and on nothing that an update of another
# variable changes. Those of SGD are too few operations to gain by it.
_ENTRY_BY_ENTRY = frozenset(getattr(keras.optimizers, name) for name in (
    "Adam", "AdamW", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Ftrl", "Lion"))
_NOT_WITH = ("clipnorm", "global_clipnorm", "weight_decay", "use_ema", "gradient_accumulation_steps")
# Entries of a variable: a larger one takes longer to copy than its operations take to start.
_SMALL = 1024
# Of fewer variables, making a vector and taking it apart costs what it saves.
_LEAST = 4


class FlatUpdates:
    """What a Keras optimizer does with gradients, in one update for all small variables of a type where it can be.

    Optimizers such as Adam take a dozen operations for each variable, which of a scalar are all that the update costs.
    What is assigned, slots and iterations included, is what the optimizer would assign. Where entries depend on each
    other (norms of variables), and under a distribution strategy, it is the optimizer's own `apply`.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, built. Its settings are read when an update is traced.
        variables: List of `keras.Variable`, what it updates.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, variables: Variables) -> None:
        self._optimizer, self._all, self._groups = optimizer, list(variables), []
        # An optimizer that was built for other variables says so itself, at the first update.
        known = all(optimizer._var_key(variable) in optimizer._trainable_variables_indices for variable in variables)
        if known and type(optimizer) in _ENTRY_BY_ENTRY and not tf.distribute.has_strategy():
            self._groups = [_Group(optimizer, variables, places) for places in _places(variables)]
        together = {place for group in self._groups for place in group.places}
        self._alone = [place for place in range(len(self._all)) if place not in together]

    @property
    def variables(self) -> Variables:
        """The optimizer's variables."""
        return self._optimizer.variables

    def apply(self, gradients: Tensors) -> None:
        """The update; `gradients` are a list of tensors, one per variable."""
        settings = vars(self._optimizer)
        if not self._groups or tf.distribute.has_strategy() or any(settings.get(name) for name in _NOT_WITH):
            self._optimizer.apply(gradients, self._all)
            return
        iterations = tf.convert_to_tensor(self._optimizer.iterations)
        for group in self._groups:
            group.apply(self._optimizer, iterations, [gradients[place] for place in group.places])
        if self._alone:
            self._optimizer.apply([gradients[place] for place in self._alone],
                                  [self._all[place] for place in self._alone])
        else:
            self._optimizer.iterations.assign_add(1)


def _places(variables):
    """Places of variables that can be updated as one vector, a list for each type."""
    groups = {}
    for place, variable in enumerate(variables):
        if variable.constraint is None and math.prod(variable.shape) <= _SMALL:
            groups.setdefault(variable.dtype, []).append(place)
    return [places for places in groups.values() if len(places) >= _LEAST]


class _Group:
    """Variables of one type, and a copy of the optimizer for a vector in their place, which is never assigned."""

    def __init__(self, optimizer, variables, places):
        self.places = places
        self._variables = [variables[place] for place in places]
        self._shapes = [tuple(variable.shape) for variable in self._variables]
        self._vector = keras.Variable(tf.zeros(sum(map(math.prod, self._shapes)), self._variables[0].dtype))
        self._copy = functional_copy(optimizer, {})
        self._copy.build([self._vector])
        own = [optimizer._get_variable_index(variable) for variable in self._variables]
        self._slots, self._columns = [], []  # Each slot of the copy, and the optimizer's that it stands for.
        for name, value in vars(self._copy).items():
            if (isinstance(value, list) and len(value) == 1 and value[0] is not self._copy.iterations
                    and any(value[0] is slot for slot in self._copy.variables)):
                self._slots.append(value[0])
                self._columns.append([vars(optimizer)[name][place] for place in own])

    def apply(self, optimizer, iterations, gradients):
        """The update of these variables, but for the count of iterations."""
        settings = {name: value for name, value in vars(optimizer).items() if name in vars(self._copy)
                    and isinstance(value, numbers.Real) or name == "_learning_rate"}
        view = view_of(self._copy, **settings, settings_of={id(self._vector): {}})
        columns = [self._variables, *self._columns]
        result = functional.call(view.apply, [_joined(gradients)], [self._vector], bindings=[
            *zip([self._vector, *self._slots], map(_joined, columns)), (view.iterations, iterations)])
        for column, values in zip(columns, result.values):
            for variable, value in zip(column, self._parts(values)):
                variable.assign(value)

    def _parts(self, vector):
        """The inverse of `_joined`."""
        if not any(self._shapes):
            return tf.unstack(vector)
        parts = tf.split(vector, [math.prod(shape) for shape in self._shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, self._shapes)]


def _joined(values: Any) -> Tensor:
    """The entries of tensors or variables as one vector."""
    values = [tf.convert_to_tensor(value) for value in values]
    return tf.stack(values) if all(value.shape.rank == 0 for value in values) else tree.ravel(values)

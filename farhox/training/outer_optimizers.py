"""OptimizerGroups: a Keras optimizer that gives outer variables optimizers of their own."""

from collections.abc import Sequence
from typing import Any

import keras

from farhox._core.types import Tensors, Variables
from farhox.dynamics.base import check_keras_optimizer, check_unscaled
from farhox.outer.outer_variable import OuterVariable
from farhox.training.flat_updates import FlatUpdates


class OptimizerGroups(keras.optimizers.Optimizer):
    """Several Keras optimizers as one, each for its own outer variables.

    Learning rates, example weights and representations live on different scales:

    ```python
    optimizer.compile(farhox.training.OptimizerGroups(
        keras.optimizers.Adam(1e-3), [(keras.optimizers.Adam(0.1), [example_weights])]))
    ```

    `learning_rate` is that of the default optimizer, so that callbacks which change it change that one.

    Args:
        default: Keras optimizer of all variables that no group names.
        groups: List of (Keras optimizer, list of outer variables).
        name: Name of the optimizer.

    Raises:
        TypeError: If `groups` is not a list of such pairs.
        ValueError: If an optimizer is used twice, a variable is named twice, or, when building, a group names a
            variable that is not optimised.
    """

    def __init__(self, default: keras.optimizers.Optimizer,
                 groups: Sequence[tuple[keras.optimizers.Optimizer, Sequence[keras.Variable | OuterVariable]]],
                 name: str = "optimizer_groups") -> None:
        if not isinstance(groups, (list, tuple)) or not all(
                isinstance(group, (list, tuple)) and len(group) == 2 and isinstance(group[1], (list, tuple))
                for group in groups):
            raise TypeError("groups must be a list of pairs (optimizer, list of outer variables). "
                            f"Received: {groups!r}")
        optimizers = [default] + [optimizer for optimizer, _ in groups]
        for optimizer in optimizers:
            check_keras_optimizer("Every optimizer", optimizer)
            check_unscaled("Every optimizer", optimizer)
            if not isinstance(optimizer, keras.optimizers.Optimizer):
                raise TypeError(f"Every optimizer must be a keras.optimizers.Optimizer. Received: {optimizer!r}")
        if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
            raise ValueError("Every group needs an optimizer of its own. Received one optimizer twice.")
        super().__init__(learning_rate=0.0, name=name)
        self.optimizers = optimizers
        named = [[entry.variable if isinstance(entry, OuterVariable) else entry for entry in entries]
                 for _, entries in groups]
        self._group_of = {}
        for group, variables in enumerate(named, start=1):
            for variable in variables:
                if id(variable) in self._group_of:
                    raise ValueError(f"A variable must be in one group. Received twice: {variable.path!r}")
                self._group_of[id(variable)] = group
        self._named = [variable for variables in named for variable in variables]

    @property
    def learning_rate(self) -> Any:
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> Any:
        self.optimizers[0].learning_rate = value

    def build(self, variables: Variables) -> None:
        for variable in self._named:
            if not any(variable is v for v in variables):
                raise ValueError(f"Groups may name optimised variables only. Received: {variable.path!r}")
        super().build(variables)
        updates = []
        for optimizer, members in zip(self.optimizers, self._split(variables)):
            if members:
                optimizer.build([variables[i] for i in members])
            updates.append(FlatUpdates(optimizer, [variables[i] for i in members]))
        self.__dict__["_updates"] = updates  # Nothing that Keras should keep track of.

    def apply(self, grads: Tensors, trainable_variables: Variables | None = None) -> None:
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if not self.built:
            self.build(variables)
        as_built = list(map(id, variables)) == list(map(id, self._trainable_variables))
        for optimizer, updates, members in zip(self.optimizers, self._updates, self._split(variables)):
            gradients = [grads[i] for i in members]
            if members and as_built:
                updates.apply(gradients)
            elif members:
                optimizer.apply(gradients, [variables[i] for i in members])
        self._iterations.assign_add(1)

    def _split(self, variables):
        """The positions of each optimizer's variables."""
        return [[i for i, variable in enumerate(variables) if self._group_of.get(id(variable), 0) == group]
                for group in range(len(self.optimizers))]

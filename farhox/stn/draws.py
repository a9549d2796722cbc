"""Perturbed hyperparameters: one draw per example around the current values, with scales that can be learned."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Tensor
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.gates import num_entries, unconstrained
from farhox.stn.saved_names import check_names, save_names


class Draws(keras.layers.Layer):
    """Draws u + scale * noise in unconstrained space, noise standard normal, scale = softplus(raw_scales).

    Holds the hyperparameters' variables too, so that a model that has this layer saves them.

    Args:
        hyperparameters: List of `Hyperparameter`, n entries in all.
        initial_scale: Positive float, the standard deviation of every draw.
        one_draw: List of those of them that have one draw for the whole batch: hyperparameters of weights, for example.

    Attributes:
        variables_of: List of the hyperparameters' variables.
        raw_scales: `keras.Variable` [n].
    """

    def __init__(self, hyperparameters: Sequence[OuterVariable], initial_scale: float,
                 one_draw: Sequence[OuterVariable] = ()) -> None:
        super().__init__(name="draws")
        self._hyperparameters = tuple(hyperparameters)
        self.variables_of = [entry.variable for entry in hyperparameters]
        self._sizes = [num_entries(entry) for entry in hyperparameters]
        self.seed_generator = keras.random.SeedGenerator()
        self._one_draw = [any(entry is other for other in one_draw) for entry in hyperparameters]
        self.raw_scales = self.add_weight(
            shape=(sum(self._sizes),), name="raw_scales", dtype=keras.config.floatx(),
            initializer=keras.initializers.Constant(initial_scale + math.log(-math.expm1(-initial_scale))))
        self.built = True

    def scales(self) -> Tensor:
        """Standard deviations [n] of the draws."""
        return tf.nn.softplus(tf.convert_to_tensor(self.raw_scales))

    def entropy(self, scales: Tensor) -> Tensor:
        """Entropy of the draws, the sum of log(scale sqrt(2 pi e))."""
        return tf.reduce_sum(tf.math.log(scales) + 0.5 * math.log(2 * math.pi * math.e))

    def centre(self) -> Tensor:
        """Current unconstrained values as a vector [n], differentiable."""
        return tf.cast(unconstrained(self._hyperparameters), self.raw_scales.dtype)

    def noise(self, batch_size: Any) -> Tensor:
        """Standard normal numbers [batch, n], the same in all rows for hyperparameters with one draw."""
        # The state of a generator of Keras' is a variable: a training can go on with the draws it would have had.
        return self.same_rows(keras.random.normal(
            [batch_size, sum(self._sizes)], dtype=self.raw_scales.dtype, seed=self.seed_generator))

    def same_rows(self, noise: Tensor) -> Tensor:
        """The noise with its first row in the place of all others, for hyperparameters with one draw."""
        if not any(self._one_draw):
            return noise
        same = np.repeat(self._one_draw, self._sizes)
        return tf.where(same, noise[:1], noise)

    def values_of(self, draws: Tensor) -> list[tuple[keras.Variable, Tensor]]:
        """What takes the place of each hyperparameter's variable, without derivative.

        Args:
            draws: Tensor [batch, n].

        Returns:
            List of (variable, tensor): a value per example, or one for all.
        """
        parts = tf.split(tf.stop_gradient(draws), self._sizes, axis=-1)
        return [(variable, tf.reshape(part[0] if one else part, ([] if one else [-1]) + list(variable.shape)))
                for variable, part, one in zip(self.variables_of, parts, self._one_draw)]

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        # Keras leaves the state of generators out.
        store["seed"] = self.seed_generator.state
        save_names(store, self._hyperparameters)

    def load_own_variables(self, store: Any) -> None:
        check_names(store, self._hyperparameters, self.name)
        variables = [*self._trainable_variables, *self._non_trainable_variables]
        for i, variable in enumerate(variables):
            variable.assign(store[str(i)])
        self.seed_generator.state.assign(store["seed"])

    def columns_of(self, hyperparameters: Sequence[OuterVariable]) -> list[int]:
        """Indices into [n] of the entries of some of the hyperparameters, in their order."""
        starts = np.cumsum([0] + self._sizes)
        places = {id(entry): range(starts[i], starts[i + 1]) for i, entry in enumerate(self._hyperparameters)}
        return [column for entry in hyperparameters for column in places[id(entry)]]

"""Gates: how a layer's weights answer to hyperparameters, for each example on its own.

A self-tuning layer has elementary weights W and hyper weights V of the same shape, and for every output unit one gate
per kind of weight, linear in the hyperparameters u (Eq. 10):

    W(u) = W + diag(gate_weights u) V,    b(u) = b + (gate_biases u) * b_hyper.

An output is linear in the weights, so a draw of u per example needs no weights per example: the outputs of W and V
are computed once for the whole batch, and the second ones are scaled unit by unit and example by example.

Reference:
    [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), section 3.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Config, DType, Initializer, Shape, Tensor, Tensors
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.saved_names import check_names, save_names


class GateInput:
    """What gates see of their hyperparameters: the unconstrained values u less a reference, as one vector.

    The response is the same affine function with any reference, but gradient descent learns it badly where gates see
    large numbers, of the logarithm of a weight decay for example.

    While a `SelfTuningModel` takes a step, it puts a matrix in the place of `variable`: a row per example, or a
    single row for all. Otherwise gates see the current values, or zero if they are centred at them (`centred`, as in
    Delta-STN: the elementary weights then are the response at the current values).

    Args:
        hyperparameters: List of `Hyperparameter`, n entries in all.
        owner: Name of the layer, for errors.
        centred: Bool.
        reference: List of n floats, or None: zero, as in the paper.

    Raises:
        TypeError: If an entry is not a `Hyperparameter`.
        ValueError: If there is none, one comes twice, or the reference has another length.
    """

    def __init__(self, hyperparameters: Sequence[OuterVariable], owner: str, centred: bool = False,
                 reference: Any = None) -> None:
        self.hyperparameters = as_hyperparameters(hyperparameters, owner)
        self.size = sum(num_entries(entry) for entry in self.hyperparameters)
        self.centred = bool(centred)
        reference = [0.0] * self.size if reference is None else list(reference)
        if len(reference) != self.size:
            raise ValueError(f"The reference of {owner!r} must have one number for each of the {self.size} entries of "
                             f"its hyperparameters. Received: reference={reference}")
        self.reference = [checks.finite_number(f"A number in the reference of {owner!r}", each) for each in reference]
        self.variable = keras.Variable(np.zeros([self.size]), dtype=keras.config.floatx(), trainable=False,
                                       name="gate_input")

    def __call__(self) -> Tensor:
        """Tensor [n], or [batch, n] while examples have draws of their own."""
        value = tf.convert_to_tensor(self.variable)
        if value.shape.rank == 2:
            return value[0] if value.shape[0] == 1 else value
        if self.centred:
            return tf.zeros_like(value)
        return tf.cast(self.relative(unconstrained(self.hyperparameters)), value.dtype)

    def relative(self, u: Tensor) -> Tensor:
        """Unconstrained values [..., n] less the reference."""
        return u - tf.constant(self.reference, u.dtype)


class Gate(keras.layers.Layer):
    """The gates of a layer's weights as linear maps of the hyperparameters, without bias.

    Args:
        hyperparameters: List of `Hyperparameter`, n entries in all.
        initializer: Keras initializer of the map [n, units]. None: normal with standard deviation 0.01.
        owner: Name of the layer, for errors.
        centred, reference: See `GateInput`.
    """

    def __init__(self, hyperparameters: Sequence[OuterVariable], initializer: Initializer, owner: str,
                 centred: bool = False, reference: Any = None, **kwargs: Any) -> None:
        super().__init__(name="gate", **kwargs)
        self.input_of_gates = GateInput(hyperparameters, owner, centred, reference)
        # An initializer object gives the same numbers again, so that a default must not be shared between layers.
        self.initializer = keras.initializers.get(initializer) or keras.initializers.RandomNormal(stddev=0.01)

    def build(self, units: Any) -> None:
        """Makes the map for a list of numbers of units, one per weight."""
        self._units = list(units)
        self.kernel = self.add_weight(
            shape=(self.input_of_gates.size, sum(units)), initializer=self.initializer, name="kernel")
        self.built = True

    def values(self, dtype: DType) -> Tensors:
        """List of gates, one tensor [units] or [batch, units] per weight, of the type in which the layer computes."""
        u, kernel = tf.cast(self.input_of_gates(), dtype), tf.cast(tf.convert_to_tensor(self.kernel), dtype)
        gates = tf.matmul(u, kernel) if u.shape.rank == 2 else tf.linalg.matvec(kernel, u, transpose_a=True)
        return tf.split(gates, self._units, axis=-1)

    def save_own_variables(self, store: Any) -> None:
        store["kernel"] = self.kernel
        save_names(store, self.input_of_gates.hyperparameters)

    def load_own_variables(self, store: Any) -> None:
        check_names(store, self.input_of_gates.hyperparameters, self.path)
        self.kernel.assign(store["kernel"])


@keras.saving.register_keras_serializable(package="farhox")
class FanInUniform(keras.initializers.Initializer):
    """Uniform between -1/sqrt(fan_in) and 1/sqrt(fan_in), for a kernel and for the bias that belongs to it.

    Args:
        fan_in: Positive int, the number of inputs of a unit. None: a self-tuning layer sets it when it is built.
        seed: Int, `keras.random.SeedGenerator` or None.
    """

    def __init__(self, fan_in: int | None = None, seed: int | None = None) -> None:
        self.fan_in: Any = None if fan_in is None else checks.positive_integer("fan_in", fan_in)
        self.seed = seed

    def __call__(self, shape: Shape, dtype: DType | None = None, **kwargs: Any) -> Tensor:
        return self.to_keras()(shape, dtype)

    def to_keras(self) -> Any:
        """The initializer of Keras that does the same."""
        limit = 1.0 / float(np.sqrt(self.fan_in))
        return keras.initializers.RandomUniform(-limit, limit, seed=self.seed)

    def get_config(self) -> Config:
        return {"fan_in": self.fan_in, "seed": self.seed}


def as_hyperparameters(hyperparameters: Any, owner: str) -> tuple[OuterVariable, ...]:
    """The hyperparameters as a tuple; errors name `owner`."""
    if isinstance(hyperparameters, OuterVariable):
        hyperparameters = [hyperparameters]
    if not isinstance(hyperparameters, (list, tuple)):
        raise TypeError(f"hyperparameters of {owner!r} must be a list of farhox.Hyperparameter. "
                        f"Received: {hyperparameters!r}")
    for entry in hyperparameters:
        if not isinstance(entry, OuterVariable):
            raise TypeError(f"hyperparameters of {owner!r} must be farhox.Hyperparameter objects. Received: {entry!r}")
    if not hyperparameters:
        raise ValueError(f"{owner!r} needs at least one hyperparameter to respond to. Received: {hyperparameters!r}")
    names = [entry.name for entry in hyperparameters]
    if len({id(entry) for entry in hyperparameters}) < len(names):
        raise ValueError(f"hyperparameters of {owner!r} must be different objects. Received: {names}")
    return tuple(hyperparameters)


def num_entries(hyperparameter: OuterVariable) -> int:
    """Number of entries of an array of hyperparameters, 1 for a scalar."""
    return int(np.prod(hyperparameter.variable.shape, dtype=int))


def unconstrained(hyperparameters: Sequence[OuterVariable]) -> Tensor:
    """The unconstrained values as one vector [n], differentiable."""
    return tf.concat([tf.reshape(tf.convert_to_tensor(entry.variable), [-1]) for entry in hyperparameters], axis=0)

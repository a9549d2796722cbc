"""Self-tuning LSTM and GRU: gates per unit of every input and recurrent projection.

Cells and layers take the arguments of the Keras ones, and besides those of the other self-tuning layers (see
`farhox.stn.layers`) and

    recurrent_dropconnect: float in [0, 1] or `farhox.Hyperparameter`, the share of recurrent weights that is zero in
        training. One mask for elementary and hyper weights, drawn once per call of the layer for all steps and
        examples.
    dropout, recurrent_dropout: as in Keras, or a `farhox.Hyperparameter`: every example then has a rate of its own.

A layer computes gates and input projections once per call, for all steps. The paper's LSTM has two biases per unit,
Keras' has one.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox._core.types import Config, Initializer, Shape, Tensor
from farhox.outer.outer_variable import OuterVariable, Strength, value_of
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.gates import FanInUniform
from farhox.stn.layers import Affine
from farhox.stn.self_tuning import Twin
from farhox.stn.strengths import checked_strength, kept


class _Cell(Affine):
    """What both cells have in common: projections that respond, prepared once for all steps."""

    own_settings = (*Twin.own_settings, "recurrent_dropconnect")
    rates = ("dropout", "recurrent_dropout")
    alone = False

    def __init__(self, units: int, hyperparameters: Sequence[OuterVariable],
                 gate_initializer: Initializer | None = None, kernel_initializer: Initializer | None = None,
                 recurrent_initializer: Initializer | None = None, bias_initializer: Initializer | None = None,
                 dropout: Strength = 0.0, recurrent_dropout: Strength = 0.0, recurrent_dropconnect: Strength = 0.0,
                 **kwargs: Any) -> None:
        # Keras cuts off what is out of range without a word.
        checked_strength(dropout, "dropout", 0.0, 1.0)
        checked_strength(recurrent_dropout, "recurrent_dropout", 0.0, 1.0)
        super().__init__(units, hyperparameters=hyperparameters, gate_initializer=gate_initializer,
                         kernel_initializer=kernel_initializer or FanInUniform(),
                         recurrent_initializer=recurrent_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(),
                         dropout=float(dropout), recurrent_dropout=float(recurrent_dropout), **kwargs)
        self.input_rate, self.state_rate = dropout, recurrent_dropout
        self.recurrent_dropconnect = checked_strength(
            recurrent_dropconnect, f"recurrent_dropconnect of {self.name!r}", 0.0, 1.0)
        self._prepared = None

    @property
    def hyperparameters_with_one_draw(self) -> list[OuterVariable]:
        rate = self.recurrent_dropconnect
        return [rate] if isinstance(rate, OuterVariable) else []

    @property
    def gate_axes(self) -> dict[str, tuple[int, ...]]:
        axes = {"kernel": (-1,), "recurrent_kernel": (-1,)}
        return axes if self.bias is None else {**axes, "bias": tuple(range(len(self.bias.shape)))}

    def hyper_initializer(self, name: str) -> Initializer:
        return FanInUniform(self.kernel.shape[0] if name == "kernel" else self.units)

    def build(self, input_shape: Shape) -> None:
        self.set_fan_in(input_shape[-1], "kernel_initializer")
        self.set_fan_in(self.units, "recurrent_initializer", "bias_initializer")
        super().build(input_shape)

    def prepare(self, sequences: Tensor, training: bool) -> Any:
        """Sequences [batch, steps, features] projected, and gates and masks kept, for the steps up to `release`."""
        projected, self._prepared = self._project(sequences, self.response(), training)
        return projected

    def release(self) -> None:
        self._prepared = None

    def get_config(self) -> Config:
        return {**super().get_config(), "dropout": serialized(self.input_rate),
                "recurrent_dropout": serialized(self.state_rate),
                "recurrent_dropconnect": serialized(self.recurrent_dropconnect)}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return super().from_config(deserialized(config, "recurrent_dropconnect", *cls.rates))

    def _projected(self, inputs, states, training):
        """The input's projection with its bias, the state, and what projects it: weights, bias."""
        if self._prepared is None:
            self._check_alone(training)
            inputs, (recurrent, bias, kept) = self._project(inputs, self.response(), training)
        else:
            recurrent, bias, kept = self._prepared
        if kept is not None:
            states = states * kept
        elif training and 0.0 < self.recurrent_dropout < 1.0:
            states = states * _first(self.get_recurrent_dropout_mask(states))
        return inputs, states, recurrent, bias

    def _check_alone(self, training):
        """In an RNN of Keras a cell is called step by step, and cannot do what is done once for all steps."""
        penalties = (self.kernel_regularizer, self.recurrent_regularizer, self.bias_regularizer)
        drops = self._drops_connections() or any(
            isinstance(rate, OuterVariable) for rate in (self.input_rate, self.state_rate))
        if any(penalty is not None for penalty in penalties) or (training and drops):
            raise ValueError("A self-tuning cell with regularizers, DropConnect or a hyperparameter as dropout must be "
                             "in a layer of its kind, stn.LSTM or stn.GRU. Received: cell "
                             f"{self.name!r} by itself or in another layer")

    def _drops_connections(self):
        return bool(self.hyperparameters_with_one_draw) or self.recurrent_dropconnect > 0

    def _project(self, inputs, response, training):
        """Projections of inputs [batch, (steps,) features] with their bias; (recurrent weights, their bias, mask)."""
        first, kept_states = inputs[:, 0] if inputs.shape.rank == 3 else inputs, None
        mask = None
        if training and isinstance(self.input_rate, OuterVariable):
            mask = self._kept(self.input_rate, tf.shape(first))
        elif training and 0.0 < self.dropout < 1.0:
            mask = _first(self.get_dropout_mask(first))
        if mask is not None:
            inputs = inputs * (mask[:, tf.newaxis] if inputs.shape.rank == 3 else mask)
        if training and isinstance(self.state_rate, OuterVariable):
            kept_states = self._kept(self.state_rate, [tf.shape(first)[0], self.units])
        projected = _product(inputs, *response.parts("kernel"))
        recurrent_bias = 0.0
        if "bias" in response:
            bias = response.weight("bias")
            bias = bias if response.per_example else bias[tf.newaxis]
            if len(self.bias.shape) == 2:  # Of a GRU with `reset_after`: one for inputs, one for states.
                bias, recurrent_bias = bias[:, 0], bias[:, 1]
            projected += bias[:, tf.newaxis] if inputs.shape.rank == 3 else bias
        recurrent = response.parts("recurrent_kernel")
        mask = self._mask() if training else None
        if mask is not None:
            recurrent = tuple(part if i == 2 or part is None else part * mask for i, part in enumerate(recurrent))
        return projected, (recurrent, recurrent_bias, kept_states)

    def _mask(self):
        if not self._drops_connections():
            return None
        return self._kept(self.recurrent_dropconnect, self.recurrent_kernel.shape)

    def _kept(self, rate, shape):
        """What is multiplied with to drop a share of the entries, or that of its own of every example."""
        rate = tf.cast(value_of(rate), self.compute_dtype)
        rate = rate[:, tf.newaxis] if rate.shape.rank else rate
        uniform = keras.random.uniform(shape, dtype=self.compute_dtype, seed=self.seed_generator)
        return tf.math.divide_no_nan(kept(uniform, rate), 1.0 - rate)


def _product(inputs, weight, hyper_weight, gates):
    """inputs weight + gates * (inputs hyper_weight), for inputs [batch, (steps,) features] and gates [batch, units]."""
    if inputs.shape.rank == 3:
        outputs = tf.tensordot(inputs, weight, axes=1)
        return outputs if gates is None else outputs + gates[:, tf.newaxis] * tf.tensordot(inputs, hyper_weight, axes=1)
    outputs = tf.matmul(inputs, weight)
    return outputs if gates is None else outputs + gates * tf.matmul(inputs, hyper_weight)


def _columns(parts, columns):
    """Some columns of the weights and gates that `_product` takes."""
    return [None if part is None else part[:, columns] for part in parts]


def _first(mask):
    # Keras draws a mask per gate where recurrent dropout is used; these cells use one for all gates.
    return mask[0] if isinstance(mask, (list, tuple)) else mask


@keras.saving.register_keras_serializable(package="farhox")
class LSTMCell(_Cell, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` with a best response: one gate per row of the 4 units' input and recurrent projections.

    Args:
        units: Positive int.
        hyperparameters, gate_initializer, centred, reference, recurrent_dropconnect: See the module.
        **kwargs: As in Keras.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), section 4.3.
    """

    plain = keras.layers.LSTMCell

    def call(self, inputs: Tensor, states: Any, training: bool = False) -> tuple[Tensor, Any]:
        projected, hidden, recurrent, _ = self._projected(inputs, states[0], training)
        entry, forget, candidate, output = tf.split(projected + _product(hidden, *recurrent), 4, axis=1)
        carry = self.recurrent_activation(forget) * states[1]
        carry += self.recurrent_activation(entry) * self.activation(candidate)
        hidden = self.recurrent_activation(output) * self.activation(carry)
        return hidden, [hidden, carry]


@keras.saving.register_keras_serializable(package="farhox")
class GRUCell(_Cell, keras.layers.GRUCell):
    """`keras.layers.GRUCell` with a best response: one gate per row of the 3 units' input and recurrent projections.

    Args:
        units: Positive int.
        hyperparameters, gate_initializer, centred, reference, recurrent_dropconnect: See the module.
        **kwargs: As in Keras.
    """

    plain = keras.layers.GRUCell

    def call(self, inputs: Tensor, states: Any, training: bool = False) -> tuple[Tensor, Any]:
        previous = states[0] if isinstance(states, (list, tuple)) else states
        projected, hidden, recurrent, bias = self._projected(inputs, previous, training)
        update_x, reset_x, candidate_x = tf.split(projected, 3, axis=1)
        if self.reset_after:
            update_h, reset_h, candidate_h = tf.split(_product(hidden, *recurrent) + bias, 3, axis=1)
        else:
            update_h, reset_h = tf.split(_product(hidden, *_columns(recurrent, slice(2 * self.units))), 2, axis=1)
        update, reset = self.recurrent_activation(update_x + update_h), self.recurrent_activation(reset_x + reset_h)
        if self.reset_after:
            candidate_h = reset * candidate_h
        else:
            candidate_h = _product(reset * hidden, *_columns(recurrent, slice(2 * self.units, None)))
        candidate = self.activation(candidate_x + candidate_h)
        hidden = update * previous + (1.0 - update) * candidate
        return hidden, [hidden] if isinstance(states, (list, tuple)) else hidden


class _Recurrent(Twin, keras.layers.RNN):
    """An RNN over a self-tuning cell, with the arguments of both."""

    own_settings, rates = _Cell.own_settings, _Cell.rates
    _own = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")

    def __init__(self, units: int, hyperparameters: Sequence[OuterVariable], **kwargs: Any) -> None:
        use_cudnn = kwargs.pop("use_cudnn", "auto")
        own = {key: kwargs.pop(key) for key in list(kwargs) if key in self._own + (
            "name", "activity_regularizer", "dtype", "trainable")}
        shared = {key: own[key] for key in ("dtype", "trainable") if key in own}
        cell = self.parts["cell"](units, hyperparameters, name="cell", **shared, **kwargs)
        super().__init__(cell, **own)
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.use_cudnn = use_cudnn  # Of no use here: kept for the plain twin.

    @property
    def units(self) -> int:
        return self.cell.units


    def inner_loop(self, sequences: Tensor, initial_state: Any, mask: Any, training: bool = False) -> Any:
        projected = self.cell.prepare(sequences, training)
        try:
            return super().inner_loop(projected, initial_state, mask, training=training)
        finally:
            self.cell.release()

    def get_config(self) -> Config:
        config = super().get_config()
        cell = self.cell.get_config()
        for key in ("name", "dtype", "trainable"):
            cell.pop(key, None)
        config.pop("cell")
        return {**cell, **config, "use_cudnn": self.use_cudnn,
                "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer)}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**deserialized(config, "hyperparameters", "recurrent_dropconnect", *cls.rates))


@keras.saving.register_keras_serializable(package="farhox")
class LSTM(_Recurrent):
    """`keras.layers.LSTM` with a best response.

    Args:
        units: Positive int.
        hyperparameters: List of `Hyperparameter`.
        **kwargs: Those of `LSTMCell` and of `keras.layers.RNN`.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), section 4.3.
    """

    plain = keras.layers.LSTM
    parts = {"cell": LSTMCell}


@keras.saving.register_keras_serializable(package="farhox")
class GRU(_Recurrent):
    """`keras.layers.GRU` with a best response.

    Args:
        units: Positive int.
        hyperparameters: List of `Hyperparameter`.
        **kwargs: Those of `GRUCell` and of `keras.layers.RNN`.
    """

    plain = keras.layers.GRU
    parts = {"cell": GRUCell}

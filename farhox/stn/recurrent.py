"""Self-tuning LSTM and GRU: gates per unit of every input and recurrent projection.

Cells and layers take the arguments of the Keras ones, and besides those of the other self-tuning layers (see
`farhox.stn.layers`) and

    recurrent_dropconnect: float in [0, 1] or `farhox.Hyperparameter`, the share of recurrent weights that is zero in
        training. One mask for elementary and hyper weights, drawn once per call of the layer for all steps and
        examples.

The gates of all units are computed once per call of a layer. The paper's LSTM has two biases per unit, Keras' has one.
"""

import keras
import tensorflow as tf

from farhox._serialization import deserialized, serialized
from farhox.hyperparameters import Hyperparameter
from farhox.stn.gates import FanInUniform
from farhox.stn.layers import SelfTuning
from farhox.stn.strengths import checked_strength, strength_value


class _Cell(SelfTuning):
    """What both cells have in common: projections that respond, prepared once for all steps."""

    @property
    def hyperparameters_with_one_draw(self):
        rate = self.recurrent_dropconnect
        return [rate] if isinstance(rate, Hyperparameter) else []

    def build(self, input_shape):
        self._set_fan_in(input_shape[-1], "kernel_initializer")
        self._set_fan_in(self.units, "recurrent_initializer", "bias_initializer")
        super().build(input_shape)
        weights = [("kernel", self.kernel), ("recurrent_kernel", self.recurrent_kernel), ("bias", self.bias)]
        initializers = {"kernel": FanInUniform(input_shape[-1])}
        axes = {} if self.bias is None else {"bias": len(self.bias.shape)}
        self._add_response(weights, FanInUniform(self.units), axes, initializers)

    def prepare(self, training):
        """Computes the gates, and masks of weights, for the steps that follow. `release` ends it."""
        self._prepared = self._gated_weights(training)
        self._add_penalties({"kernel": self.kernel_regularizer, "recurrent_kernel": self.recurrent_regularizer,
                             "bias": self.bias_regularizer}, self._gates(self.compute_dtype))

    def release(self):
        self._prepared = None

    def get_config(self):
        return {**super().get_config(), "recurrent_dropconnect": serialized(self.recurrent_dropconnect)}

    @classmethod
    def from_config(cls, config):
        return super().from_config(deserialized(config, "recurrent_dropconnect"))

    def _set_up_cell(self, hyperparameters, gate_initializer, centred, recurrent_dropconnect):
        self._set_up(hyperparameters, gate_initializer, centred)
        self.recurrent_dropconnect = checked_strength(
            recurrent_dropconnect, f"recurrent_dropconnect of {self.name!r}", 0.0, 1.0)
        self._prepared = None

    def _gated_weights(self, training):
        """By name: (weight, None, None), or (weight, hyper weight, gates) if every example has gates of its own."""
        gates = self._gates(self.compute_dtype)
        mask = self._mask() if training else None
        prepared = {}
        for name, (weight, hyper_weight, shape) in self._responding.items():
            factor = mask if name == "recurrent_kernel" and mask is not None else 1.0
            if gates[name].shape.rank == 1:
                prepared[name] = (self._realized(name, gates[name]) * factor, None, None)
            else:
                prepared[name] = (tf.cast(weight, self.compute_dtype) * factor,
                                  tf.cast(hyper_weight, self.compute_dtype) * factor,
                                  tf.reshape(gates[name], [-1, *shape]))
        return prepared

    def _mask(self):
        if not self.hyperparameters_with_one_draw and not self.recurrent_dropconnect:
            return None
        rate = tf.cast(strength_value(self.recurrent_dropconnect), self.compute_dtype)
        uniform = keras.random.uniform(self.recurrent_kernel.shape, dtype=self.compute_dtype, seed=self.seed_generator)
        return tf.cast(uniform >= rate, self.compute_dtype) / (1.0 - rate)

    def _projections(self, inputs, states, training):
        """The input's projection x W(u); the state to project, U(u) as `_product` takes it, and the biases."""
        prepared = self._prepared or self._gated_weights(training)
        if training and 0.0 < self.dropout < 1.0:
            inputs = inputs * _first(self.get_dropout_mask(inputs))
        if training and 0.0 < self.recurrent_dropout < 1.0:
            states = states * _first(self.get_recurrent_dropout_mask(states))
        bias = 0.0
        if "bias" in prepared:
            bias, hyper_bias, gates = prepared["bias"]
            bias = bias[tf.newaxis] if gates is None else bias + gates * hyper_bias
        return _product(inputs, *prepared["kernel"]), states, prepared["recurrent_kernel"], bias


def _product(inputs, weight, hyper_weight, gates, columns=slice(None)):
    outputs = tf.matmul(inputs, weight[:, columns])
    return outputs if gates is None else outputs + gates[:, columns] * tf.matmul(inputs, hyper_weight[:, columns])


def _first(mask):
    # Keras draws a mask per gate where recurrent dropout is used; these cells use one for all gates.
    return mask[0] if isinstance(mask, (list, tuple)) else mask


@keras.saving.register_keras_serializable(package="farhox")
class LSTMCell(_Cell, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` with a best response: one gate per row of the 4 units' input and recurrent projections.

    Args:
        units: Positive int.
        hyperparameters, gate_initializer, centred, recurrent_dropconnect: See the module.
        **kwargs: As in Keras.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), section 4.3.
    """

    def __init__(self, units, hyperparameters, gate_initializer=None, kernel_initializer=None,
                 recurrent_initializer=None, bias_initializer=None, recurrent_dropconnect=0.0, centred=False, **kwargs):
        super().__init__(units, kernel_initializer=kernel_initializer or FanInUniform(),
                         recurrent_initializer=recurrent_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)
        self._set_up_cell(hyperparameters, gate_initializer, centred, recurrent_dropconnect)

    def call(self, inputs, states, training=False):
        projected, hidden, recurrent, bias = self._projections(inputs, states[0], training)
        entry, forget, candidate, output = tf.split(projected + _product(hidden, *recurrent) + bias, 4, axis=1)
        carry = self.recurrent_activation(forget) * states[1]
        carry += self.recurrent_activation(entry) * self.activation(candidate)
        hidden = self.recurrent_activation(output) * self.activation(carry)
        return hidden, [hidden, carry]


@keras.saving.register_keras_serializable(package="farhox")
class GRUCell(_Cell, keras.layers.GRUCell):
    """`keras.layers.GRUCell` with a best response: one gate per row of the 3 units' input and recurrent projections.

    Args:
        units: Positive int.
        hyperparameters, gate_initializer, centred, recurrent_dropconnect: See the module.
        **kwargs: As in Keras.
    """

    def __init__(self, units, hyperparameters, gate_initializer=None, kernel_initializer=None,
                 recurrent_initializer=None, bias_initializer=None, recurrent_dropconnect=0.0, centred=False, **kwargs):
        super().__init__(units, kernel_initializer=kernel_initializer or FanInUniform(),
                         recurrent_initializer=recurrent_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)
        self._set_up_cell(hyperparameters, gate_initializer, centred, recurrent_dropconnect)

    def call(self, inputs, states, training=False):
        previous = states[0] if isinstance(states, (list, tuple)) else states
        projected, hidden, recurrent, bias = self._projections(inputs, previous, training)
        two = self.use_bias and self.reset_after
        update_x, reset_x, candidate_x = tf.split(projected + (bias[:, 0] if two else bias), 3, axis=1)
        if self.reset_after:
            update_h, reset_h, candidate_h = tf.split(
                _product(hidden, *recurrent) + (bias[:, 1] if two else 0.0), 3, axis=1)
        else:
            update_h, reset_h = tf.split(_product(hidden, *recurrent, slice(None, 2 * self.units)), 2, axis=1)
        update, reset = self.recurrent_activation(update_x + update_h), self.recurrent_activation(reset_x + reset_h)
        if self.reset_after:
            candidate_h = reset * candidate_h
        else:
            candidate_h = _product(reset * hidden, *recurrent, slice(2 * self.units, None))
        candidate = self.activation(candidate_x + candidate_h)
        hidden = update * previous + (1.0 - update) * candidate
        return hidden, [hidden] if isinstance(states, (list, tuple)) else hidden


class _Recurrent(keras.layers.RNN):
    """An RNN over a self-tuning cell, with the arguments of both."""

    _cell_class = None
    _own = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")

    def __init__(self, units, hyperparameters, **kwargs):
        kwargs.pop("use_cudnn", None)
        own = {key: kwargs.pop(key) for key in list(kwargs) if key in self._own + (
            "name", "activity_regularizer", "dtype", "trainable")}
        shared = {key: own[key] for key in ("dtype", "trainable") if key in own}
        cell = self._cell_class(units, hyperparameters, name="cell", **shared, **kwargs)
        super().__init__(cell, **own)
        self.input_spec = keras.layers.InputSpec(ndim=3)

    @property
    def units(self):
        return self.cell.units

    def inner_loop(self, sequences, initial_state, mask, training=False):
        self.cell.prepare(training)
        try:
            return super().inner_loop(sequences, initial_state, mask, training=training)
        finally:
            self.cell.release()

    def get_config(self):
        config = super().get_config()
        cell = self.cell.get_config()
        for key in ("name", "dtype", "trainable"):
            cell.pop(key, None)
        config.pop("cell")
        return {**cell, **config, "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer)}

    @classmethod
    def from_config(cls, config):
        return cls(**deserialized(config, "hyperparameters", "recurrent_dropconnect"))


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

    _cell_class = LSTMCell


@keras.saving.register_keras_serializable(package="farhox")
class GRU(_Recurrent):
    """`keras.layers.GRU` with a best response.

    Args:
        units: Positive int.
        hyperparameters: List of `Hyperparameter`.
        **kwargs: Those of `GRUCell` and of `keras.layers.RNN`.
    """

    _cell_class = GRUCell

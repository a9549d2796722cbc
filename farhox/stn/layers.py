"""Self-tuning layers: Keras layers with weights that respond to hyperparameters.

Each layer takes the arguments of the Keras layer of the same name, and besides

    hyperparameters: list of `farhox.Hyperparameter` that the weights respond to, n entries in all.
    gate_initializer: Keras initializer of the gates. Default: normal with standard deviation 0.01. With "zeros" the
        layer starts as the plain one.
    reference: list of n floats, unconstrained values that gates measure from. Default: zero, as in the paper;
        `stn.convert` takes the current values.
    centred: bool. Gates see the difference from the current hyperparameters; `SelfTuningModel(method="delta")` sets it.

Weights and biases start uniformly within 1 / sqrt(fan_in), as in the paper, unless initializers are given; hyper
weights always do. Regularizers apply to the weights as they respond: to those of the first example of a batch when each
example has a draw of its own. Outside of a `SelfTuningModel` weights respond to the hyperparameters' current values.
"""

import math

import keras
import tensorflow as tf

from farhox.outer.hyperparameters import Hyperparameter
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.gates import FanInUniform, Gate
from farhox.stn.strengths import checked_strength, strength_value


class SelfTuning:
    """What self-tuning layers have in common: gates, hyper weights, regularizers, configuration.

    A mixin in front of a Keras layer. The constructor calls `_set_up` and `build` calls `_add_response`.
    """

    @property
    def hyperparameters(self):
        """Tuple of the hyperparameters that the weights respond to."""
        return self.gate.input_of_gates.hyperparameters

    @property
    def response_variables(self):
        """Hyper weights and gates, without the elementary weights."""
        return [hyper_weight for _, hyper_weight, _ in self._responding.values()] + [self.gate.kernel]

    def elementary_weights(self):
        """Dictionary of variables by name."""
        return {name: weight for name, (weight, _, _) in self._responding.items()}

    def realized_weights(self):
        """Dictionary of tensors by name: the weights at the current hyperparameters, or those of the first example."""
        return {name: self._realized(name, gates) for name, gates in self._gates(None).items()}

    def enable_lora(self, *args, **kwargs):
        raise ValueError(f"A self-tuning layer cannot have LoRA weights. Received: enable_lora() of {self.name!r}")

    def get_config(self):
        config = super().get_config()
        for unused in ("lora_rank", "lora_alpha", "quantization_config"):
            config.pop(unused, None)
        return {**config, "hyperparameters": serialized(self.hyperparameters),
                "gate_initializer": keras.initializers.serialize(self.gate.initializer),
                "centred": self.gate.input_of_gates.centred, "reference": self.gate.input_of_gates.reference}

    @classmethod
    def from_config(cls, config):
        return super().from_config(deserialized(config, "hyperparameters"))

    def save_own_variables(self, store):
        # The Keras layers store the weights they know by name.
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        keras.layers.Layer.load_own_variables(self, store)

    def _set_up(self, hyperparameters, gate_initializer, centred, reference):
        self.gate = Gate(hyperparameters, gate_initializer, self.name, centred, reference, dtype=self.dtype_policy)

    def _set_fan_in(self, fan_in, *names):
        for name in names:
            initializer = getattr(self, name)
            if isinstance(initializer, FanInUniform) and initializer.fan_in is None:
                setattr(self, name, FanInUniform(fan_in, initializer.seed))

    def _add_response(self, weights, initializer, axes=None, initializers=None):
        """Adds a hyper weight and gates for every weight.

        Args:
            weights: List of (name, variable or None).
            initializer: Keras initializer of the hyper weights.
            axes: Dictionary by name, how many of the last axes of a weight have a gate per entry. Default: one.
            initializers: Dictionary by name, other initializers for some of the hyper weights.
        """
        self._responding = {}
        for name, weight in weights:
            if weight is not None:
                weight.regularizer = None  # Regularizers see the response.
                hyper_weight = self.add_weight(
                    shape=weight.shape, initializer=(initializers or {}).get(name, initializer), name=f"hyper_{name}")
                setattr(self, f"hyper_{name}", hyper_weight)
                self._responding[name] = (weight, hyper_weight, tuple(weight.shape)[-(axes or {}).get(name, 1):])
        self.gate.build([math.prod(shape) for _, _, shape in self._responding.values()])

    def _gates(self, dtype):
        """Gates by name of the weight: [units], or [batch, units] while every example has a draw of its own."""
        return dict(zip(self._responding, self.gate.values(dtype or self.variable_dtype)))

    def _realized(self, name, gates):
        weight, hyper_weight, shape = self._responding[name]
        gates = tf.reshape(gates[0] if gates.shape.rank == 2 else gates, shape)
        return tf.cast(weight, gates.dtype) + gates * tf.cast(hyper_weight, gates.dtype)

    def _add_penalties(self, regularizers, gates):
        for name, regularizer in regularizers.items():
            if regularizer is not None and name in gates:
                self.add_loss(regularizer(self._realized(name, tf.cast(gates[name], self.variable_dtype))))


class _Affine(SelfTuning):
    """A layer activation(linear(x, kernel(u)) + bias(u)), which leaves `_linear` to its subclasses."""

    def call(self, inputs, training=None):
        gates = self._gates(self.compute_dtype)
        self._add_penalties({"kernel": self._kernel_regularizer(), "bias": self.bias_regularizer}, gates)
        channel_axis = 1 if getattr(self, "data_format", None) == "channels_first" else -1
        if gates["kernel"].shape.rank == 1:
            outputs = self._linear(inputs, self._realized("kernel", gates["kernel"]))
            bias = self._realized("bias", gates["bias"])[tf.newaxis] if self.use_bias else None
        else:
            kernel, hyper_kernel, _ = self._responding["kernel"]
            # One product with both kernels side by side is no faster, and needs memory for them.
            response = self._linear(inputs, tf.cast(hyper_kernel, inputs.dtype))
            outputs = self._linear(inputs, tf.cast(kernel, inputs.dtype))
            outputs += per_output(gates["kernel"], response, channel_axis) * response
            if self.use_bias:
                bias, hyper_bias, _ = self._responding["bias"]
                bias = tf.cast(bias, outputs.dtype) + gates["bias"] * tf.cast(hyper_bias, outputs.dtype)
        if self.use_bias:
            outputs += per_output(bias, outputs, channel_axis)
        return outputs if self.activation is None else self.activation(outputs)

    def _kernel_regularizer(self):
        return self.kernel_regularizer


def per_output(gates, outputs, channel_axis):
    """Gates [batch or 1, units] in a shape that broadcasts to the outputs, with units on the channel axis."""
    shape = [1] * outputs.shape.rank
    shape[channel_axis] = gates.shape[-1]
    shape[0] = 1 if gates.shape[0] == 1 else -1
    return tf.reshape(gates, shape)


@keras.saving.register_keras_serializable(package="farhox")
class Dense(_Affine, keras.layers.Dense):
    """`keras.layers.Dense` with a best response, y = x W(u) + b(u).

    Of the parameters units (2 fan_in + n) are for the weights and units (2 + n) for the biases (Eq. 11).

    Args:
        units: Positive int.
        hyperparameters, gate_initializer, centred, reference: See the module.
        **kwargs: As in Keras.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), Eq. 10 and 11. Its code also multiplies the elementary
        output by a learned scalar, which is not in the paper and not here.
    """

    def __init__(self, units, hyperparameters, gate_initializer=None, kernel_initializer=None, bias_initializer=None,
                 centred=False, reference=None, **kwargs):
        super().__init__(units, kernel_initializer=kernel_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)
        self._set_up(hyperparameters, gate_initializer, centred, reference)

    def build(self, input_shape):
        self._set_fan_in(input_shape[-1], "kernel_initializer", "bias_initializer")
        super().build(input_shape)
        self._add_response([("kernel", self.kernel), ("bias", self.bias)], FanInUniform(input_shape[-1]))

    def _linear(self, inputs, kernel):
        return tf.matmul(inputs, kernel) if inputs.shape.rank == 2 else tf.tensordot(inputs, kernel, axes=1)


class _Convolution(_Affine):
    """What `Conv1D` and `Conv2D` have in common."""

    def __init__(self, filters, kernel_size, hyperparameters, gate_initializer=None, kernel_initializer=None,
                 bias_initializer=None, centred=False, reference=None, **kwargs):
        super().__init__(filters, kernel_size, kernel_initializer=kernel_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)
        self._set_up(hyperparameters, gate_initializer, centred, reference)

    def build(self, input_shape):
        channels = input_shape[1 if self.data_format == "channels_first" else -1]
        fan_in = math.prod(self.kernel_size) * channels // self.groups
        self._set_fan_in(fan_in, "kernel_initializer", "bias_initializer")
        super().build(input_shape)
        self._add_response([("kernel", self.kernel), ("bias", self.bias)], FanInUniform(fan_in))

    def _linear(self, inputs, kernel):
        padding = self.padding
        if padding == "causal":
            amount = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            time = 2 if self.data_format == "channels_first" else 1
            inputs = tf.pad(inputs, [[amount, 0] if axis == time else [0, 0] for axis in range(3)])
            padding = "valid"
        return keras.ops.conv(inputs, kernel, strides=list(self.strides), padding=padding,
                              dilation_rate=self.dilation_rate, data_format=self.data_format)


@keras.saving.register_keras_serializable(package="farhox")
class Conv1D(_Convolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with a best response: one gate per output channel.

    Args:
        filters, kernel_size: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See the module.
        **kwargs: As in Keras.
    """


@keras.saving.register_keras_serializable(package="farhox")
class Conv2D(_Convolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with a best response: one gate per output channel.

    Args:
        filters, kernel_size: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See the module.
        **kwargs: As in Keras.
    """


@keras.saving.register_keras_serializable(package="farhox")
class DepthwiseConv2D(_Affine, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a best response: one gate per output channel.

    Args:
        kernel_size: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See the module.
        **kwargs: As in Keras.
    """

    def __init__(self, kernel_size, hyperparameters, gate_initializer=None, depthwise_initializer=None,
                 bias_initializer=None, centred=False, reference=None, **kwargs):
        super().__init__(kernel_size, depthwise_initializer=depthwise_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)
        self._set_up(hyperparameters, gate_initializer, centred, reference)

    def build(self, input_shape):
        fan_in = math.prod(self.kernel_size)
        self._set_fan_in(fan_in, "depthwise_initializer", "bias_initializer")
        super().build(input_shape)
        self._add_response([("kernel", self.kernel), ("bias", self.bias)], FanInUniform(fan_in), {"kernel": 2})

    def _kernel_regularizer(self):
        return self.depthwise_regularizer

    def _linear(self, inputs, kernel):
        return keras.ops.depthwise_conv(inputs, kernel, strides=self.strides, padding=self.padding,
                                        dilation_rate=self.dilation_rate, data_format=self.data_format)


@keras.saving.register_keras_serializable(package="farhox")
class Embedding(SelfTuning, keras.layers.Embedding):
    """`keras.layers.Embedding` with a best response: one gate per dimension of the embedding.

    Both tables start uniformly within 0.1, as in the paper, unless an initializer is given. Called a second time with
    `reverse=True`, on features [..., output_dim], the layer returns logits [..., input_dim] with the elementary table
    (tied weights), which do not respond themselves, as in the paper; there is no bias.

    Args:
        input_dim, output_dim: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See the module.
        dropout: `Hyperparameter` or float in [0, 1), the share of words whose embedding is zero in training. One mask
            of words for the whole batch and both tables. Logits see none.
        **kwargs: As in Keras.

    Raises:
        ValueError: When called with `reverse=True`, if it masks zeros.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), section 4.3.
    """

    def __init__(self, input_dim, output_dim, hyperparameters, gate_initializer=None, embeddings_initializer=None,
                 dropout=0.0, seed=None, centred=False, reference=None, **kwargs):
        super().__init__(input_dim, output_dim, embeddings_initializer=embeddings_initializer or _uniform(), **kwargs)
        self._set_up(hyperparameters, gate_initializer, centred, reference)
        self.dropout = checked_strength(dropout, f"dropout of {self.name!r}", 0.0, 1.0)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def hyperparameters_with_one_draw(self):
        """Hyperparameters that apply to the batch as a whole."""
        return [self.dropout] if isinstance(self.dropout, Hyperparameter) else []

    def build(self, input_shape=None):
        if self.built:
            return
        super().build(input_shape)
        self._add_response([("embeddings", self.embeddings)], _uniform())

    def call(self, inputs, training=None, reverse=False):
        if reverse:
            self._check_reverse()
            return tf.tensordot(tf.cast(inputs, self.compute_dtype),
                                tf.cast(tf.convert_to_tensor(self.embeddings), self.compute_dtype), [[-1], [1]])
        gates = self._gates(self.compute_dtype)
        self._add_penalties({"embeddings": self.embeddings_regularizer}, gates)
        indices = tf.cast(inputs, "int32")
        table, hyper_table, _ = self._responding["embeddings"]
        elementary = tf.cast(tf.gather(table, indices), self.compute_dtype)
        response = tf.cast(tf.gather(hyper_table, indices), self.compute_dtype)
        gates = gates["embeddings"]
        outputs = elementary + (gates if gates.shape.rank == 1 else per_output(gates, response, -1)) * response
        if training and (self.hyperparameters_with_one_draw or self.dropout):
            rate = tf.cast(strength_value(self.dropout), outputs.dtype)
            words = keras.random.uniform([self.input_dim], dtype=self.compute_dtype, seed=self.seed_generator)
            kept = tf.math.divide_no_nan(tf.cast(words >= rate, outputs.dtype), 1.0 - rate)
            outputs *= tf.gather(kept, indices)[..., tf.newaxis]
        return outputs

    def compute_output_spec(self, inputs, training=None, reverse=False):
        if not reverse:
            return super().compute_output_spec(inputs)
        self._check_reverse()
        return keras.KerasTensor((*inputs.shape[:-1], self.input_dim), dtype=self.compute_dtype)

    def _check_reverse(self):
        if self.mask_zero:
            raise ValueError("An embedding must not mask zeros if it is called with reverse=True: what it is called on "
                             f"then is no index. Received: {self.name!r} with mask_zero=True")

    def get_config(self):
        return {**super().get_config(), "seed": self.seed, "dropout": serialized(self.dropout)}

    @classmethod
    def from_config(cls, config):
        return super().from_config(deserialized(config, "dropout"))


def _uniform():
    return keras.initializers.RandomUniform(-0.1, 0.1)

"""Self-tuning einsum layers and attention: a gate per output of every projection; see `farhox.stn.layers`."""

import re

import keras

from farhox.stn.layers import Affine
from farhox.stn.self_tuning import SelfTuningParts


@keras.saving.register_keras_serializable(package="farhox")
class EinsumDense(Affine, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with a best response: one gate for every entry of the outputs that the kernel makes.

    Args:
        equation, output_shape: As in Keras; initializers too have Keras' defaults.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
        **kwargs: As in Keras.

    Raises:
        ValueError: When built, if the first axis of inputs and outputs is not that of the examples.
    """

    plain = keras.layers.EinsumDense

    def __init__(self, equation, output_shape, hyperparameters, **kwargs):
        super().__init__(equation, output_shape, hyperparameters=hyperparameters, **kwargs)

    def build(self, input_shape):
        inputs, kernel, outputs = self._labels()
        if inputs[:1] != outputs[:1] or inputs[:1] in tuple(kernel):
            raise ValueError("A self-tuning EinsumDense must leave the first axis of its inputs, that of the examples, "
                             f"to its outputs. Received: equation={self.equation!r} of {self.name!r}")
        super().build(input_shape)

    @property
    def gate_axes(self):
        _, kernel, outputs = self._labels()
        axes = {"kernel": tuple(axis for axis, label in enumerate(kernel) if label in outputs)}
        return axes if self.bias is None else {**axes, "bias": tuple(range(len(self.bias.shape)))}

    def linear(self, inputs, response):
        _, labels, outputs = self._labels()
        left, _, right = outputs.partition("...")
        places = {label: axis for axis, label in enumerate(left)}
        places.update({label: axis - len(right) for axis, label in enumerate(right)})
        # Where two axes are out of order `on_axes` turns them; the weight has its axes with gates in order.
        return response.linear("kernel", lambda kernel: keras.ops.einsum(self.equation, inputs, kernel),
                               [places[label] for label in labels if label in places])

    def call(self, inputs, training=None):
        response = self.response()
        outputs = self.linear(inputs, response)
        if "bias" in response:
            # As Keras adds it: the last axes of the outputs are those of the bias.
            outputs = response.added("bias", outputs, range(-len(self.bias.shape), 0))
        return outputs if self.activation is None else self.activation(outputs)

    def _labels(self):
        return re.split(",|->", self.equation.replace(" ", ""))


@keras.saving.register_keras_serializable(package="farhox")
class MultiHeadAttention(SelfTuningParts, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with projections that respond: of query, key, value, gate and output.

    Args:
        *arguments, **kwargs: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
    """

    plain = keras.layers.MultiHeadAttention
    parts = dict.fromkeys(["_query_dense", "_key_dense", "_value_dense", "_gate_dense", "_output_dense"], EinsumDense)


@keras.saving.register_keras_serializable(package="farhox")
class GroupQueryAttention(SelfTuningParts, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with projections that respond: of query, key, value, gate and output.

    Args:
        *arguments, **kwargs: As in Keras.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
    """

    plain = keras.layers.GroupQueryAttention
    parts = MultiHeadAttention.parts

"""Self-tuning einsum layers and attention: a gate per output of every projection; see `farhox.stn.layers`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from farhox._core.types import Config, Shape, Tensor
from farhox.outer.outer_variable import OuterVariable
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.dropout import Dropout
from farhox.stn.layers import Affine
from farhox.stn.self_tuning import SelfTuningParts
from farhox.stn.strengths import checked_strength

if TYPE_CHECKING:
    from farhox.stn.self_tuning import Response


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

    def __init__(self, equation: str, output_shape: Shape, hyperparameters: Sequence[OuterVariable],
                 **kwargs: Any) -> None:
        super().__init__(equation, output_shape, hyperparameters=hyperparameters, **kwargs)

    def build(self, input_shape: Shape) -> None:
        inputs, kernel, outputs = self._labels()
        if inputs[:1] != outputs[:1] or inputs[:1] in tuple(kernel):
            raise ValueError("A self-tuning EinsumDense must leave the first axis of its inputs, that of the examples, "
                             f"to its outputs. Received: equation={self.equation!r} of {self.name!r}")
        super().build(input_shape)

    @property
    def gate_axes(self) -> dict[str, tuple[int, ...]]:
        _, kernel, outputs = self._labels()
        axes = {"kernel": tuple(axis for axis, label in enumerate(kernel) if label in outputs)}
        return axes if self.bias is None else {**axes, "bias": tuple(range(len(self.bias.shape)))}

    def linear(self, inputs: Tensor, response: Response) -> Tensor:
        _, labels, outputs = self._labels()
        left, _, right = outputs.partition("...")
        places = {label: axis for axis, label in enumerate(left)}
        places.update({label: axis - len(right) for axis, label in enumerate(right)})
        # Where two axes are out of order `on_axes` turns them; the weight has its axes with gates in order.
        return response.linear("kernel", lambda kernel: keras.ops.einsum(self.equation, inputs, kernel),
                               [places[label] for label in labels if label in places])

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        response = self.response()
        outputs = self.linear(inputs, response)
        if "bias" in response:
            # As Keras adds it: the last axes of the outputs are those of the bias.
            outputs = response.added("bias", outputs, range(-len(self.bias.shape), 0))
        return outputs if self.activation is None else self.activation(outputs)

    def _labels(self):
        return re.split(",|->", self.equation.replace(" ", ""))


class _Attention(SelfTuningParts):
    """Projections that respond, and dropout of scores with a rate of every example if it is a hyperparameter."""

    parts = dict.fromkeys(["_query_dense", "_key_dense", "_value_dense", "_gate_dense", "_output_dense"], EinsumDense)
    rates = ("dropout",)
    _rate: Any

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        rate = kwargs.get("dropout")
        object.__setattr__(self, "_rate", rate if isinstance(rate, OuterVariable) else None)
        if self._rate is not None:
            # Keras asks whether anything is dropped.
            kwargs["dropout"] = float(checked_strength(rate, "dropout", 0.0, 1.0))
        super().__init__(*arguments, **kwargs)

    def __setattr__(self, name, value):
        if name == "_dropout_layer" and self._rate is not None:
            value = Dropout(self._rate, seed=value.seed, name=value.name, dtype=value.dtype_policy)
        super().__setattr__(name, value)

    def get_config(self) -> Config:
        config = super().get_config()
        return config if self._rate is None else {**config, "dropout": serialized(self._rate)}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return super().from_config(deserialized(config, "dropout"))


@keras.saving.register_keras_serializable(package="farhox")
class MultiHeadAttention(_Attention, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with projections that respond: of query, key, value, gate and output.

    Args:
        *arguments, **kwargs: As in Keras; `dropout` may be a `Hyperparameter`, with a rate per example.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
    """

    plain = keras.layers.MultiHeadAttention


@keras.saving.register_keras_serializable(package="farhox")
class GroupQueryAttention(_Attention, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with projections that respond: of query, key, value, gate and output.

    Args:
        *arguments, **kwargs: As in Keras; `dropout` may be a `Hyperparameter`, with a rate per example.
        hyperparameters, gate_initializer, centred, reference: See `farhox.stn.layers`.
    """

    plain = keras.layers.GroupQueryAttention

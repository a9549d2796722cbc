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

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from farhox._core.types import Config, Initializer, Shape, Tensor
from farhox.outer.outer_variable import OuterVariable, Strength, value_of
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.gates import FanInUniform
from farhox.stn.self_tuning import SelfTuning, on_axes
from farhox.stn.strengths import checked_strength, kept

if TYPE_CHECKING:
    from farhox.stn.self_tuning import Response


class Affine(SelfTuning):
    """A layer activation(linear(x, kernel(u)) + bias(u)), which leaves `linear` to its subclasses."""

    gate_axes = {"kernel": (-1,), "bias": (-1,)}

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        response = self.response()
        outputs = self.linear(inputs, response)
        if "bias" in response:
            outputs = response.added("bias", outputs, [self.channel_axis])
        return outputs if self.activation is None else self.activation(outputs)

    def linear(self, inputs: Tensor, response: Response) -> Tensor:
        """Outputs without their bias."""
        raise NotImplementedError

    @property
    def channel_axis(self) -> int:
        return -1

    def set_fan_in(self, fan_in: int, *names: str) -> None:
        """Tells initializers of the paper, at attributes of those names, the number of inputs of a unit."""
        for name in names:
            initializer = getattr(self, name)
            if isinstance(initializer, FanInUniform) and initializer.fan_in is None:
                setattr(self, name, FanInUniform(fan_in, initializer.seed))


@keras.saving.register_keras_serializable(package="farhox")
class Dense(Affine, keras.layers.Dense):
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

    plain = keras.layers.Dense

    def __init__(self, units: int, hyperparameters: Sequence[OuterVariable],
                 gate_initializer: Initializer | None = None, kernel_initializer: Initializer | None = None,
                 bias_initializer: Initializer | None = None, **kwargs: Any) -> None:
        super().__init__(units, hyperparameters=hyperparameters, gate_initializer=gate_initializer,
                         kernel_initializer=kernel_initializer or FanInUniform(),
                         bias_initializer=bias_initializer or FanInUniform(), **kwargs)

    def build(self, input_shape: Shape) -> None:
        self.set_fan_in(input_shape[-1], "kernel_initializer", "bias_initializer")
        super().build(input_shape)

    def linear(self, inputs: Tensor, response: Response) -> Tensor:
        return response.linear("kernel", lambda kernel: (
            tf.matmul(inputs, kernel) if inputs.shape.rank == 2 else tf.tensordot(inputs, kernel, axes=1)))


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

    plain = keras.layers.Embedding
    gate_axes = {"embeddings": (-1,)}
    own_settings = (*SelfTuning.own_settings, "dropout", "seed")

    def __init__(self, input_dim: int, output_dim: int, hyperparameters: Sequence[OuterVariable],
                 gate_initializer: Initializer | None = None, embeddings_initializer: Initializer | None = None,
                 dropout: Strength = 0.0, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(input_dim, output_dim, hyperparameters=hyperparameters, gate_initializer=gate_initializer,
                         embeddings_initializer=embeddings_initializer or _uniform(), **kwargs)
        self.dropout = checked_strength(dropout, f"dropout of {self.name!r}", 0.0, 1.0)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def hyperparameters_with_one_draw(self) -> list[OuterVariable]:
        return [self.dropout] if isinstance(self.dropout, OuterVariable) else []

    def hyper_initializer(self, name: str) -> Initializer:
        return _uniform()

    def call(self, inputs: Tensor, training: bool | None = None, reverse: bool = False) -> Tensor:
        if reverse:
            self._check_reverse()
            return tf.tensordot(tf.cast(inputs, self.compute_dtype),
                                tf.cast(tf.convert_to_tensor(self.embeddings), self.compute_dtype), [[-1], [1]])
        indices = tf.cast(inputs, "int32")
        # Rows that were read respond, and not the whole table.
        table, hyper_table, gates = self.response().parts("embeddings", realize=False)
        responding = tf.gather(hyper_table, indices)
        outputs = tf.gather(table, indices) + on_axes(gates, responding.shape.rank, [-1]) * responding
        if training and (isinstance(self.dropout, OuterVariable) or self.dropout > 0):
            rate = tf.cast(value_of(self.dropout), outputs.dtype)
            words = keras.random.uniform([self.input_dim], dtype=self.compute_dtype, seed=self.seed_generator)
            factors = tf.math.divide_no_nan(kept(words, rate), 1.0 - rate)
            outputs *= tf.gather(factors, indices)[..., tf.newaxis]
        return outputs

    def compute_output_spec(self, inputs: Tensor, training: bool | None = None,
                            reverse: bool = False) -> keras.KerasTensor:
        if not reverse:
            return super().compute_output_spec(inputs)
        self._check_reverse()
        return keras.KerasTensor((*inputs.shape[:-1], self.input_dim), dtype=self.compute_dtype)

    def _check_reverse(self):
        if self.mask_zero:
            raise ValueError("An embedding must not mask zeros if it is called with reverse=True: what it is called on "
                             f"then is no index. Received: {self.name!r} with mask_zero=True")

    def to_keras(self) -> Any:
        if any(node.arguments.kwargs.get("reverse") for node in self._inbound_nodes):
            raise ValueError("stn.bake needs layers that have a plain twin. Received: "
                             f"{self.name!r}, called with reverse=True")
        return super().to_keras()

    @classmethod
    def settings_of_plain(cls, layer: keras.Layer) -> Config:
        return {key: value for key, value in super().settings_of_plain(layer).items() if key != "weights"}

    def get_config(self) -> Config:
        return {**super().get_config(), "seed": self.seed, "dropout": serialized(self.dropout)}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return super().from_config(deserialized(config, "dropout"))


def _uniform():
    return keras.initializers.RandomUniform(-0.1, 0.1)

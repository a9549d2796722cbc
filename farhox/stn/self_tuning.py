"""What a self-tuning layer says of itself: its plain twin, the weights that respond, where their gates are, its parts.

A self-tuning layer is a class with `SelfTuning` in front of a Keras layer. It says

    plain: the class of its plain twin, which `stn.convert` replaces and `stn.bake` brings back.
    gate_axes: dictionary from the name of every weight that responds to the axes of that weight with a gate per entry.

and computes with `self.response()`, which has its weights as they respond:

```python
@keras.saving.register_keras_serializable()
class SelfTuningScale(stn.SelfTuning, Scale):
    plain = Scale
    gate_axes = {"factors": (-1,)}

    def call(self, inputs):
        return self.response().linear("factors", lambda factors: inputs * factors)

stn.convert(model, twins={Scale: SelfTuningScale})
```

A layer that is made of other layers is a class with `SelfTuningParts` in front of it, and says which of its attributes
are parts, and what makes them respond: `parts = {"query_dense": stn.EinsumDense}`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from farhox._core.types import Config, DType, Initializer, InKeras, Shape, Tensor, Variables
from farhox.outer.outer_variable import OuterVariable, value_of
from farhox.outer.serialization import deserialized, serialized
from farhox.stn.gates import FanInUniform, Gate
from farhox.stn.held import share_hyperparameters

# Settings that say how Keras stores weights or adds to them, which weights that respond have no use for.
_STORAGE = ("lora_rank", "lora_alpha", "quantization_config")


class Elementary(NamedTuple):
    """A weight that responds.

    Attributes:
        weight, hyper_weight: Variables of one shape.
        gate_axes: Tuple of the axes with a gate per entry, in order.
        regularizer: Keras regularizer of the weight as it responds, or None.
    """

    weight: keras.Variable
    hyper_weight: keras.Variable
    gate_axes: tuple[int, ...]
    regularizer: Any

    @property
    def gate_shape(self) -> tuple[int, ...]:
        """Sizes of the axes with gates."""
        return tuple(self.weight.shape[axis] for axis in self.gate_axes)


class Response:
    """The weights of a layer as they respond, in one call of it.

    Attributes:
        per_example: Bool, whether every example has weights of its own.
    """

    def __init__(self, elementary: Any, gates: Any, dtype: DType) -> None:
        self._elementary, self._gates, self._dtype = elementary, gates, dtype
        self.per_example = any(gate.shape.rank == 2 for gate in gates.values())

    def __contains__(self, name):
        return name in self._elementary

    def weight(self, name: str) -> Tensor:
        """W(u) of the weight's own shape, or with an axis of examples in front: for weights that are small."""
        gates = self._gates[name]
        return self._realized(name, tf.reshape(gates, self._beside_weight(name, gates)))

    def of_first_example(self, name: str) -> Tensor:
        """W(u) of the weight's own shape: of the first example, if every one has weights of its own."""
        gates = self._gates[name]
        gates = gates[0] if gates.shape.rank == 2 else gates
        return self._realized(name, tf.reshape(gates, self._beside_weight(name, gates)))

    def parts(self, name: str, realize: bool = True) -> Any:
        """(W, V, gates [batch, ...]) if every example has weights of its own, otherwise (W(u), None, None).

        With `realize=False` otherwise (W, V, gates [1, ...]), for functions that read a small part of the weight.
        """
        if realize and not self.per_example:
            return self.weight(name), None, None
        entry = self._elementary[name]
        return (tf.cast(entry.weight, self._dtype), tf.cast(entry.hyper_weight, self._dtype),
                tf.reshape(self._gates[name], [-1, *entry.gate_shape]))

    def linear(self, name: str, function: Callable[..., Any], output_axes: Sequence[int] = (-1,)) -> Tensor:
        """function(W(u)) of every example, for a function linear in the weight: function(W) + gates function(V).

        Args:
            name: Name of the weight.
            function: Callable from a weight to outputs [batch, ...].
            output_axes: Where the outputs have what the weight has on its axes with gates: one axis for each of them,
                or one for all.
        """
        weight, hyper_weight, gates = self.parts(name)
        outputs = function(weight)
        if gates is None:
            return outputs
        # One product with both weights side by side is no faster, and needs memory for them.
        response = function(hyper_weight)
        return outputs + on_axes(gates, response.shape.rank, output_axes) * response

    def added(self, name: str, outputs: Tensor, output_axes: Sequence[int] = (-1,)) -> Tensor:
        """The outputs plus W(u), with the axes of the weight on the given axes of the outputs; for a bias."""
        weight = self.weight(name)
        weight = weight if self.per_example else weight[tf.newaxis]
        return outputs + on_axes(weight, outputs.shape.rank, output_axes)

    def _beside_weight(self, name, gates):
        """The shape in which gates broadcast to their weight."""
        weight, axes = self._elementary[name].weight, self._elementary[name].gate_axes
        shape = [size if axis in axes else 1 for axis, size in enumerate(weight.shape)]
        return [-1, *shape] if gates.shape.rank == 2 else shape

    def _realized(self, name, gates):
        entry = self._elementary[name]
        return tf.cast(entry.weight, self._dtype) + gates * tf.cast(entry.hyper_weight, self._dtype)


class Twin(InKeras):
    """What has a plain twin: `convert` makes it from that, `bake` makes that from it.

    Attributes:
        plain: The class of the plain twin. It must stand in a class itself, because a subclass may compute anything.
        parts: Dictionary from names of attributes to the self-tuning classes of the layers that are there.
        own_settings: Tuple of the names of settings that the plain twin does not take.
        rates: Tuple of the names of settings of the plain twin that can be hyperparameters, with a rate per example.
        alone: Bool, whether it stands in a model by itself and not only as a part of another layer.
    """

    plain: Any = None
    parts = {}
    rates = ()
    alone = True
    own_settings = ("hyperparameters", "gate_initializer", "centred", "reference")

    @classmethod
    def from_plain(cls, layer: keras.Layer, **settings: Mapping[str, Any]) -> Any:
        """A layer like the plain one, not built, without its weights."""
        twin = cls.from_config({**cls.settings_of_plain(layer), **settings})
        share_hyperparameters(layer, twin)
        return twin

    @classmethod
    def settings_of_plain(cls, layer: keras.Layer) -> Config:
        """The configuration of the plain layer, without settings that do not say what it computes."""
        return {key: value for key, value in layer.get_config().items() if key not in _STORAGE}

    def to_keras(self) -> Any:
        """The plain layer, not built, without its weights."""
        config = self.get_config()
        config.update({rate: float(value_of(deserialized(config, rate)[rate])) for rate in self.rates})
        return self.plain.from_config({
            key: _in_keras(value) for key, value in config.items() if key not in self.own_settings})

    def elementary_weights(self) -> dict[str, keras.Variable]:
        """Dictionary by name of the variables that a plain twin has too, without those of parts."""
        return {}

    def realized_weights(self) -> dict[str, Tensor]:
        """Dictionary of tensors by name: those weights at the current hyperparameters, or of the first example."""
        return {}

    @property
    def response_variables(self) -> Variables:
        """Hyper weights and gates, without those of parts."""
        return []

    @property
    def hyperparameters_with_one_draw(self) -> list[OuterVariable]:
        """List of the hyperparameters that the layer applies to a batch as a whole."""
        return []


class SelfTuning(Twin):
    """Weights that respond to hyperparameters, in front of a Keras layer; see the module.

    `build` adds a hyper weight and gates for every weight in `gate_axes`. A layer with several inputs defines `build`
    and calls `add_response` there.

    Args:
        *arguments, **kwargs: Those of the Keras layer.
        hyperparameters: List of `farhox.Hyperparameter` that the weights respond to, n entries in all.
        gate_initializer: Keras initializer of the gates. Default: normal with standard deviation 0.01.
        centred: Bool. Gates see the difference from the current hyperparameters.
        reference: List of n floats, unconstrained values that gates measure from. Default: zero.
    """

    gate_axes = {}

    def __init__(self, *arguments: Any, hyperparameters: Sequence[OuterVariable],
                 gate_initializer: Initializer | None = None, centred: bool = False, reference: Any = None,
                 **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        self.gate = Gate(hyperparameters, gate_initializer, self.name, centred, reference, dtype=self.dtype_policy)

    def build(self, input_shape: Shape = None) -> None:
        if not self.built:
            super().build(input_shape)
            self.add_response()

    def add_response(self) -> None:
        """Adds a hyper weight and gates for every weight in `gate_axes` that the built layer has."""
        self._elementary = {}
        for name, axes in self.gate_axes.items():
            weight = getattr(self, name)
            if weight is None:  # A bias that is not used.
                continue
            regularizer, weight.regularizer = weight.regularizer, None  # Regularizers see the response.
            hyper_weight = self.add_weight(
                shape=weight.shape, initializer=self.hyper_initializer(name), name=f"hyper_{name}")
            setattr(self, f"hyper_{name}", hyper_weight)
            axes = tuple(sorted(axis % len(weight.shape) for axis in axes))
            self._elementary[name] = Elementary(weight, hyper_weight, axes, regularizer)
        self.gate.build([math.prod(entry.gate_shape) for entry in self._elementary.values()])

    def hyper_initializer(self, name: str) -> Initializer:
        """Keras initializer of a hyper weight: uniform within 1 / sqrt(fan_in), of a bias as of the first weight."""
        for weight, axes in ((getattr(self, each), self.gate_axes[each]) for each in (name, *self.gate_axes)):
            axes = {axis % len(weight.shape) for axis in axes}
            shared = [size for axis, size in enumerate(weight.shape) if axis not in axes]
            if shared:
                return FanInUniform(math.prod(shared))
        return FanInUniform(1)

    def response(self) -> Response:
        """The weights as they respond, for one call; adds the penalties of their regularizers to the layer's losses."""
        gates = self.gate.values(self.compute_dtype)
        gates = dict(zip(self._elementary, gates))
        penalties = {name: entry for name, entry in self._elementary.items() if entry.regularizer is not None}
        if penalties:
            values = Response(penalties, {name: tf.cast(gates[name], self.variable_dtype) for name in penalties},
                              self.variable_dtype)
            for name, entry in penalties.items():
                self.add_loss(entry.regularizer(values.of_first_example(name)))
        return Response(self._elementary, gates, self.compute_dtype)

    @property
    def hyperparameters(self) -> tuple[OuterVariable, ...]:
        """Tuple of the hyperparameters that the weights respond to."""
        return self.gate.input_of_gates.hyperparameters

    @property
    def response_variables(self) -> Variables:
        return [entry.hyper_weight for entry in self._elementary.values()] + [self.gate.kernel]

    def elementary_weights(self) -> dict[str, keras.Variable]:
        return {name: entry.weight for name, entry in self._elementary.items()}

    def realized_weights(self) -> dict[str, Tensor]:
        gates = dict(zip(self._elementary, self.gate.values(self.variable_dtype)))
        response = Response(self._elementary, gates, self.variable_dtype)
        return {name: response.of_first_example(name) for name in self._elementary}

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"A self-tuning layer cannot have LoRA weights. Received: enable_lora() of {self.name!r}")

    def get_config(self) -> Config:
        config = {key: value for key, value in super().get_config().items() if key not in _STORAGE}
        return {**config, "hyperparameters": serialized(self.hyperparameters),
                "gate_initializer": keras.initializers.serialize(self.gate.initializer),
                "centred": self.gate.input_of_gates.centred, "reference": self.gate.input_of_gates.reference}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return super().from_config(deserialized(config, "hyperparameters"))

    def save_own_variables(self, store: Any) -> None:
        # The Keras layers store the weights they know by name.
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        keras.layers.Layer.load_own_variables(self, store)


@dataclasses.dataclass(frozen=True)
class _Responds:
    """What the gates of a layer's parts are made of."""

    hyperparameters: Any
    gate_initializer: Any
    centred: bool
    reference: Any


class SelfTuningParts(Twin):
    """Parts that respond to hyperparameters, in front of a Keras layer that makes them itself; see the module.

    A layer that the Keras layer puts at an attribute named in `parts` becomes its self-tuning twin on the way.

    Args:
        *arguments, **kwargs: Those of the Keras layer.
        hyperparameters, gate_initializer, centred, reference: See `SelfTuning`.
    """

    _responds: _Responds

    def __init__(self, *arguments: Any, hyperparameters: Sequence[OuterVariable],
                 gate_initializer: Initializer | None = None, centred: bool = False, reference: Any = None,
                 **kwargs: Any) -> None:
        # Keras tracks attributes from its constructor on, which may make parts.
        object.__setattr__(self, "_responds", _Responds(hyperparameters, gate_initializer, centred, reference))
        super().__init__(*arguments, **kwargs)

    def __setattr__(self, name, value):
        part = self.parts.get(name)
        if part is not None and isinstance(value, part.plain) and not isinstance(value, Twin):
            value = part.from_plain(value, **vars(self._responds))
        super().__setattr__(name, value)

    def get_config(self) -> Config:
        return {**super().get_config(), **vars(self._responds),
                "hyperparameters": serialized(self._responds.hyperparameters),
                "gate_initializer": keras.initializers.serialize(
                    keras.initializers.get(self._responds.gate_initializer))}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return super().from_config(deserialized(config, "hyperparameters"))


def on_axes(values: Tensor, rank: int, axes: Sequence[int]) -> Tensor:
    """Values [batch or 1, ...] in a shape that broadcasts to outputs of a rank, with what follows on the given axes.

    Args:
        values: Tensor of known shape but for its first axis.
        rank: Int, the rank of the outputs.
        axes: Axes of the outputs, one for each axis of the values after the first, or a single one for all of them.
    """
    sizes = list(values.shape[1:])
    places = [axis % rank for axis in axes]
    if len(places) == 1:
        sizes = [math.prod(sizes)]
    elif places != sorted(places):
        order = sorted(range(len(places)), key=places.__getitem__)
        values = tf.transpose(values, [0, *(place + 1 for place in order)])
        places, sizes = [places[place] for place in order], [sizes[place] for place in order]
    shape = [1 if values.shape[0] == 1 else -1] + [1] * (rank - 1)
    for axis, size in zip(places, sizes):
        shape[axis] = size
    return tf.reshape(values, shape)


def _in_keras(setting):
    """A setting of a layer's configuration without farhox: an initializer of farhox' becomes Keras' that equals it."""
    if isinstance(setting, dict) and setting.get("class_name") == FanInUniform.__name__:
        return keras.initializers.serialize(keras.initializers.deserialize(setting).to_keras())
    return setting

"""A Keras model as a pure function of its weights, of the draws its layers read, and of what its gates see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from farhox._core import functional
from farhox._core.types import Nest
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.held import hyperparameters_in
from farhox.stn.self_tuning import SelfTuning, Twin

if TYPE_CHECKING:
    from farhox.stn.gates import GateInput


class Pass(NamedTuple):
    """A forward pass.

    Attributes:
        value: What the function of the predictions returned.
        updates: List of (variable, tensor) of statistics and seeds.
        read: Dictionary from their ids to the variables that were read.
    """

    value: Any
    updates: list
    read: dict


class Network:
    """The layers of a model and their variables, seen by a self-tuning model.

    Args:
        model: A built `keras.Model`.

    Attributes:
        gated: List of its self-tuning layers.
        general, response: Lists of its trainable variables: hyper weights and gates are the response.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.layers = list(model._flatten_layers())
        self.gated = [layer for layer in self.layers if isinstance(layer, SelfTuning)]
        response = {id(v) for layer in self.gated for v in layer.response_variables}
        self.general = [v for v in model.trainable_variables if id(v) not in response]
        self.response = [v for v in model.trainable_variables if id(v) in response]

    @property
    def gate_inputs(self) -> list[GateInput]:
        """List of `GateInput`, one per self-tuning layer."""
        return [layer.gate.input_of_gates for layer in self.gated]

    def hyperparameters_with_one_draw(self) -> list[OuterVariable]:
        """Hyperparameters that layers or regularizers apply to a batch as a whole."""
        found = hyperparameters_in([value for layer in self.layers for value in vars(layer).values()
                                    if isinstance(value, keras.regularizers.Regularizer)])
        return found + [entry for layer in self.layers if isinstance(layer, Twin)
                        for entry in layer.hyperparameters_with_one_draw]

    def run(self, function: Callable[..., Any], x: Nest, training: bool, weights: Any = (), draws: Any = (),
            gates: Any = None) -> Pass:
        """Calls `function(predictions)`, which may read `model.losses`.

        Args:
            x: Inputs of the model.
            training: Bool.
            weights: List of (variable, tensor), in the place of weights.
            draws: List of (variable, tensor), in the place of the variables of hyperparameters.
            gates: None, or a function from a `GateInput` to a tensor [batch or 1, n].

        Returns:
            A `Pass`.
        """
        state = [v for v in self.model.non_trainable_variables]
        draws = list(draws)
        if gates is not None:
            draws += [(gate_input.variable, gates(gate_input)) for gate_input in self.gate_inputs]
        bindings = [(v, tf.convert_to_tensor(v)) for v in state] + list(weights)
        result = functional.call(
            lambda: function(self.model(x, training=training)), bindings=bindings, draws=draws)
        assigned = {id(v) for v in result.assigned}
        updates = [(v, value) for v, value in zip(state, result.values) if id(v) in assigned]
        return Pass(result.value, updates, result.read)

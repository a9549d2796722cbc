"""A Keras model as a pure function of its weights, of the draws its layers read, and of what its gates see."""

from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core import functional
from farhox.outer.hyperparameters import Hyperparameter
from farhox.outer.regularizers import L1L2
from farhox.stn.layers import Embedding, SelfTuning
from farhox.stn.recurrent import GRUCell, LSTMCell


class Pass(NamedTuple):
    """A forward pass.

    Attributes:
        value: What the function of the predictions returned.
        updates: List of (variable, tensor) of statistics and seeds.
        read: Set of the ids of the variables that were read.
    """

    value: Any
    updates: list
    read: set


class Network:
    """The layers of a model and their variables, seen by a self-tuning model.

    Args:
        model: A built `keras.Model`.

    Attributes:
        gated: List of its self-tuning layers.
        general, response: Lists of its trainable variables: hyper weights and gates are the response.
    """

    def __init__(self, model):
        self.model = model
        self.layers = list(model._flatten_layers())
        self.gated = [layer for layer in self.layers if isinstance(layer, SelfTuning)]
        response = {id(v) for layer in self.gated for v in layer.response_variables}
        self.general = [v for v in model.trainable_variables if id(v) not in response]
        self.response = [v for v in model.trainable_variables if id(v) in response]

    @property
    def gate_inputs(self):
        """List of `GateInput`, one per self-tuning layer."""
        return [layer.gate.input_of_gates for layer in self.gated]

    def hyperparameters_with_one_draw(self):
        """Hyperparameters that layers or regularizers apply to a batch as a whole."""
        found = [entry for layer in self.layers for regularizer in _regularizers(layer)
                 for entry in _hyperparameters_in(vars(regularizer))]
        for layer in self.layers:
            if isinstance(layer, (LSTMCell, GRUCell, Embedding)):
                found += layer.hyperparameters_with_one_draw
        return found

    def run(self, function, x, training, weights=(), draws=(), gates=None):
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


def hyperparameters_of(layers):
    """List of the hyperparameters that layers, or their regularizers, hold as strengths, each once."""
    found = []
    for layer in layers:
        found += _hyperparameters_in(vars(layer))
        for regularizer in _regularizers(layer):
            found += _hyperparameters_in(vars(regularizer))
    return list({id(entry): entry for entry in found}.values())


def _regularizers(layer):
    return [value for value in vars(layer).values() if isinstance(value, L1L2)]


def _hyperparameters_in(attributes):
    return [value for value in attributes.values() if isinstance(value, Hyperparameter)]

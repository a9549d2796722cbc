"""The steps of self-tuning networks as functions: gradients of weights, gradients of hyperparameters.

`STN` is the method of MacKay et al., `DeltaSTN` that of Bae and Grosse, with a response that is centred at the current
hyperparameters and linear in the gates.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core import autodiff
from farhox._core.types import Nest, Tensor, Tensors


class TrainingStep(NamedTuple):
    """Gradients of the training loss.

    Attributes:
        loss: Scalar.
        predictions: Nest of tensors.
        general, response: Lists of gradients, aligned with `network.general` and `network.response`.
        updates: List of (variable, tensor) of statistics and seeds.
        read: Set of the ids of the variables that layers and loss read.
    """

    loss: Tensor
    predictions: Any
    general: list
    response: list
    updates: list
    read: set


class ValidationStep(NamedTuple):
    """Gradients of the validation loss.

    Attributes:
        loss: Scalar, without the entropy term.
        hyperparameters: List of gradients of the unconstrained variables, None where gates do not see one.
        raw_scales: Gradient of the scales' variable, or None if nothing was perturbed.
    """

    loss: Tensor
    hyperparameters: Tensors
    raw_scales: Any


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """How weights and hyperparameters get their gradients.

    Args:
        network: `Network`.
        draws: `Draws`.
        training_loss: Callable (x, targets, predictions, sample_weight) -> scalar; it may add `network.model.losses`.
        validation_loss: The same for validation.
        scale_loss: Callable scalar -> scalar, applied before differentiating (for mixed precision).
        entropy_weight: Float.
    """

    network: Any
    draws: Any
    training_loss: Callable
    validation_loss: Callable
    scale_loss: Callable
    entropy_weight: float

    @abc.abstractmethod
    def training(self, x: Nest, targets: Tensor, sample_weight: Tensor, noise: Tensor) -> TrainingStep:
        """A `TrainingStep` on draws with the noise [batch, n]."""

    @abc.abstractmethod
    def predictions(self, x: Nest, u: Tensor, draws: Any) -> Tensor:
        """Predictions for validation at the unconstrained values `u` [n], or at one row of `draws` per example."""

    def validation(self, x: Nest, targets: Tensor, sample_weight: Tensor,
                   noise: Tensor | None = None) -> ValidationStep:
        """A `ValidationStep`, on draws if there is noise [batch, n] and at the current values otherwise."""
        variables = [tf.convert_to_tensor(v) for v in self.draws.variables_of]

        def function(tensors):
            u = tf.concat([tf.cast(tf.reshape(tensor, [-1]), self.draws.raw_scales.dtype)
                           for tensor in tensors[:len(variables)]], axis=0)
            if noise is None:
                predictions, entropy = self.predictions(x, u, None), 0.0
            else:
                scales = tf.nn.softplus(tensors[-1])
                predictions, entropy = self.predictions(x, u, u + scales * noise), self.draws.entropy(scales)
            loss = self.validation_loss(x, targets, predictions, sample_weight)
            return loss - tf.cast(self.entropy_weight * entropy, loss.dtype), loss

        scales = [] if noise is None else [tf.convert_to_tensor(self.draws.raw_scales)]
        _, loss, gradients = autodiff.gradients(function, variables + scales)
        return ValidationStep(loss, gradients[:len(variables)], None if noise is None else gradients[-1])

    def drawn(self, noise: Tensor) -> Tensor:
        return tf.stop_gradient(self.draws.centre() + self.draws.scales() * noise)

    def gates(self, matrix: Tensor) -> Any:
        """What each gate input sees of a matrix [batch or 1, n] over all hyperparameters, as it is."""
        def columns(gate_input):
            indices = self.draws.columns_of(gate_input.hyperparameters)
            return matrix if indices == list(range(matrix.shape[-1])) else tf.gather(matrix, indices, axis=-1)
        return columns

    def gates_at(self, draws: Any) -> Callable[..., Any]:
        """What each gate input sees of draws of the hyperparameters."""
        columns = self.gates(draws)
        return lambda gate_input: gate_input.relative(columns(gate_input))

    def weight_gradients(self, x: Nest, targets: Tensor, sample_weight: Tensor, weights: Any, draws: Any,
                         gates: Any) -> Any:
        """Loss, predictions, the pass, and gradients of the training loss with respect to a list of weights."""
        def function(tensors):
            result = self.network.run(
                lambda predictions: (self.training_loss(x, targets, predictions, sample_weight), predictions),
                x, True, list(zip(weights, tensors)), draws, gates)
            return self.scale_loss(result.value[0]), result

        _, result, gradients = autodiff.gradients(function, [tf.convert_to_tensor(v) for v in weights])
        return (*result.value, result, gradients)


@dataclasses.dataclass(frozen=True)
class STN(Method):
    """All weights learn at the draws; gates see the draws themselves.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), Algorithm 1.
    """

    def training(self, x: Nest, targets: Tensor, sample_weight: Tensor, noise: Tensor) -> TrainingStep:
        draws, general = self.drawn(noise), self.network.general
        loss, predictions, result, gradients = self.weight_gradients(
            x, targets, sample_weight, general + self.network.response, self.draws.values_of(draws),
            self.gates_at(draws))
        return TrainingStep(loss, predictions, gradients[:len(general)], gradients[len(general):], result.updates,
                            result.read)

    def predictions(self, x: Nest, u: Tensor, draws: Any) -> Tensor:
        values = () if draws is None else self.draws.values_of(draws)
        gates = self.gates_at(u[tf.newaxis] if draws is None else draws)
        return self.network.run(lambda predictions: predictions, x, False, (), values, gates).value


@dataclasses.dataclass(frozen=True)
class DeltaSTN(Method):
    """The elementary weights learn at the current hyperparameters, the response on the linearised network.

    The gates' input is zero at the current hyperparameters u, and the predictions at a draw u' are y + J (u' - u), with
    J the derivative of the predictions in the gates' input.

    Reference:
        [Bae and Grosse, 2020](https://arxiv.org/abs/2010.13514), Algorithm 1.
    """

    def training(self, x: Nest, targets: Tensor, sample_weight: Tensor, noise: Tensor) -> TrainingStep:
        network = self.network
        zero = tf.zeros_like(self.draws.centre())[tf.newaxis]
        current = tf.repeat(tf.stop_gradient(self.draws.centre())[tf.newaxis], tf.shape(noise)[0], axis=0)
        loss, predictions, result, general = self.weight_gradients(
            x, targets, sample_weight, network.general, self.draws.values_of(current), self.gates(zero))
        draws = self.drawn(noise)
        difference = draws - tf.stop_gradient(self.draws.centre())
        values = self.draws.values_of(draws)
        # The second pass goes on with the seeds of the first one; statistics are those of the first one alone.
        seeds = [(v, value) for v, value in result.updates if not v.dtype.startswith("float")]

        def function(tensors):
            weights = list(zip(network.response, tensors)) + seeds
            linear, later = self._linearized(x, True, weights, values, difference)
            # What layers add to the loss is no prediction: its curvature in the response is what keeps that bounded.
            value = network.run(lambda _: self.training_loss(x, targets, linear, sample_weight),
                                x, True, weights, values, self.gates(difference)).value
            return self.scale_loss(value), later

        _, later, response = autodiff.gradients(function, [tf.convert_to_tensor(v) for v in network.response])
        updates = {id(v): (v, value) for v, value in result.updates}
        updates.update({id(v): (v, value) for v, value in later if not v.dtype.startswith("float")})
        return TrainingStep(loss, predictions, general, response, list(updates.values()), result.read)

    def predictions(self, x: Nest, u: Tensor, draws: Any) -> Tensor:
        if draws is None:
            # Zero with the derivative of u.
            gates = self.gates((u - tf.stop_gradient(u))[tf.newaxis])
            return self.network.run(lambda predictions: predictions, x, False, (), (), gates).value
        values = self.draws.values_of(draws)
        return self._linearized(x, False, [], values, draws - tf.stop_gradient(u))[0]

    def _linearized(self, x, training, weights, values, difference):
        """Predictions at zero plus their derivative along the gates' input `difference`; updates of the state."""
        structure, updated = [], []

        def forward(gates):
            result = self.network.run(
                lambda predictions: predictions, x, training, weights, values, self.gates(gates[0]))
            structure[:], updated[:] = [result.value], [variable for variable, _ in result.updates]
            return tf.nest.flatten(result.value), [tf.convert_to_tensor(value) for _, value in result.updates]

        outputs, tangents, values_after = autodiff.forward_product(
            forward, [tf.zeros_like(difference)], [difference])
        linear = [output + tangent for output, tangent in zip(outputs, tangents)]
        return tf.nest.pack_sequence_as(structure[0], linear), list(zip(updated, values_after))

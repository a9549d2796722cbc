"""What steps make of a self-tuning model: gradients become updates under the guard, and what they were is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from farhox._core.types import Nest, Tensor
from farhox.outer.outer_variable import OuterVariable

_TRAINING_LOSS, _STATISTICS, _GRADIENTS, _WEIGHTS = _TRAINING_PARTS = (
    "the training loss", "statistics of layers", "gradients of the weights", "the weights after an update")
_VALIDATION_LOSS, _SCALES = "the validation loss", "the scales of the draws or their gradient"


def guarded_parts(hyperparameters: Sequence[OuterVariable]) -> dict[str, list[str]]:
    """For an `UpdateGuard`: the kinds of updates, and what of one can be not finite, as an error names it."""
    return {"training": list(_TRAINING_PARTS), "validation": [_VALIDATION_LOSS, *_named(hyperparameters), _SCALES]}


@dataclasses.dataclass(frozen=True, eq=False)
class Updates:
    """Updates of weights, statistics, hyperparameters and scales, each made if all of it is finite.

    Args:
        hyperparameters: List of `Hyperparameter`.
        steps: A `Method` of `farhox.stn.steps`, which computes the gradients.
        guard: `UpdateGuard`.
        optimizer, hyper_optimizer: Keras optimizers, built.
        response_optimizer: That of hyper weights and gates, or None: they are `optimizer`'s too.
        scale_optimizer: That of the scales of the draws, or None: they stay.
        scales_loss: Bool, whether `optimizer` judges gradients itself and lowers its scale.
        inner_loss, outer_loss: Keras metrics, of the losses of training and of validation steps.
        compiled_metrics: What measures predictions of training steps, or None.
    """

    hyperparameters: Sequence[OuterVariable]
    steps: Any
    guard: Any
    optimizer: Any
    hyper_optimizer: Any
    response_optimizer: Any
    scale_optimizer: Any
    scales_loss: bool
    inner_loss: Any
    outer_loss: Any
    compiled_metrics: Any

    def training(self, x: Nest, y: Nest, sample_weight: Any, noise: Tensor) -> Tensor:
        """One training step on draws with the noise [batch, n]; returns the training loss."""
        step = self.steps.training(x, y, sample_weight, noise)
        self._check_used(step.read)
        network = self.steps.network
        own = [self.optimizer] if self.response_optimizer is None else [self.optimizer, self.response_optimizer]

        def apply():
            if self.response_optimizer is None:
                self.optimizer.apply(step.general + step.response, network.general + network.response)
            else:
                self.optimizer.apply(step.general, network.general)
                self.response_optimizer.apply(step.response, network.response)
            for variable, value in step.updates:
                variable.assign(value)

        statistics = [value for _, value in step.updates]
        parts = {_TRAINING_LOSS: step.loss, _STATISTICS: statistics}
        if not self.scales_loss:
            parts[_GRADIENTS] = [step.general, step.response]
        changed = network.general + network.response + [v for each in own for v in each.variables]
        made = self.guard.update("training", (x, y, sample_weight), parts, apply, {
            _WEIGHTS: changed, _STATISTICS: [variable for variable, _ in step.updates]})
        _measure(self.inner_loss, step.loss, made, noise)
        if self.compiled_metrics is not None:
            tf.cond(made, lambda: done(self.compiled_metrics.update_state, y, step.predictions, sample_weight),
                    tf.no_op)
        return step.loss

    def validation(self, x: Nest, y: Nest, sample_weight: Any, noise: Tensor) -> Tensor:
        """One validation step, on draws with the noise if their scales are learned; returns the validation loss."""
        step = self.steps.validation(x, y, sample_weight, None if self.scale_optimizer is None else noise)
        draws, names = self.steps.draws, _named(self.hyperparameters)

        def apply():
            self.hyper_optimizer.apply(step.hyperparameters, draws.variables_of)
            if self.scale_optimizer is not None:
                self.scale_optimizer.apply([step.raw_scales], [draws.raw_scales])

        parts = {_VALIDATION_LOSS: step.loss, **dict(zip(names, step.hyperparameters))}
        changed = {part: [variable] for part, variable in zip(names, draws.variables_of)}
        changed[names[0]] += self.hyper_optimizer.variables
        if self.scale_optimizer is not None:
            parts[_SCALES] = step.raw_scales
            changed[_SCALES] = [draws.raw_scales, *self.scale_optimizer.variables]
        made = self.guard.update("validation", (x, y, sample_weight), parts, apply, changed, self._natural_values)
        _measure(self.outer_loss, step.loss, made, noise)
        return step.loss

    def _natural_values(self):
        """What hyperparameters and scales must be after an update too: exp(u) can be infinite where u is not."""
        values = {part: entry.natural_value()
                  for part, entry in zip(_named(self.hyperparameters), self.hyperparameters)}
        return {**values, _SCALES: self.steps.draws.scales()}

    def _check_used(self, read):
        unused = [entry.name for entry in self.hyperparameters if id(entry.variable) not in read]
        if unused:
            raise ValueError("Every hyperparameter must have a use in training: a layer, a regularizer or the training "
                             f"loss that reads it. Received: {', '.join(map(repr, unused))} without any")


def done(step: Any, *arguments: Any) -> Any:
    """Calls a step and returns what all branches of a condition return: nothing."""
    step(*arguments)
    return tf.no_op()


def _named(hyperparameters):
    return [f"the hyperparameter {entry.name!r} or its gradient" for entry in hyperparameters]


def _measure(metric, loss, made, noise):
    """The loss of an update that was made, weighted by its examples."""
    metric.update_state(tf.where(made, loss, tf.zeros_like(loss)), sample_weight=tf.where(made, tf.shape(noise)[0], 0))

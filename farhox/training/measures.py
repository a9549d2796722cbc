"""What hyper-iterations are measured by: losses averaged over an epoch, figures of solvers, and the logs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from farhox._core.logs import log_names, log_values
from farhox._core.types import Tensor
from farhox.hypergradients.base import HyperGradientResult
from farhox.problem.bilevel import BilevelProblem
from farhox.training.watch import GAP

if TYPE_CHECKING:
    from farhox.training.hyper_optimizer import HyperOptimizer

# What implicit methods add to the logs; the last one is for a warning alone.
_OF_SOLVERS = ("solver_failed", "solver_residual", "inner_gradient_norm", GAP)


class Measures:
    """Means over the hyper-iterations of an epoch, and the logs of a `HyperOptimizer`.

    Args:
        problem: A `BilevelProblem`.

    Attributes:
        outer_loss, inner_loss: `keras.metrics.Mean`.
        of_solvers: Dictionary of `keras.metrics.Mean`, what implicit methods add.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self._log_names = log_names(problem)
        self.outer_loss, self.inner_loss = _Mean(name="outer_loss"), _Mean(name="inner_loss")
        self.of_solvers = {name: _Mean(name=name) for name in _OF_SOLVERS}
        # Whether the method of the hyper-iterations solves linear systems.
        self._has_solver = False

    @property
    def gap(self) -> float:
        """The mean stationarity gap since the epoch began, 0 where nothing was measured."""
        return float(self.of_solvers[GAP].result())

    def joined_with(self, others: list[keras.metrics.Metric]) -> list[keras.metrics.Metric]:
        """The metrics of this class before those of `others` that are not among them."""
        own = [self.outer_loss, self.inner_loss, *self.of_solvers.values()]
        return own + [metric for metric in others if not any(metric is m for m in own)]

    def names(self, optimizer: HyperOptimizer) -> list[str]:
        """The names of what an evaluation returns, in its order."""
        names = [self.outer_loss.name] + ([] if optimizer.online else [self.inner_loss.name])
        if optimizer._compile_metrics is not None and optimizer._compile_metrics.built:
            names += [metric.name for metric in optimizer._compile_metrics.metrics]
        return names

    def logs(self, optimizer: HyperOptimizer, outer_loss: Tensor,
             outer_predictions: Callable[[], Any]) -> dict[str, Any]:
        """The logs after an outer loss.

        Args:
            optimizer: The `HyperOptimizer`, for its compiled metrics.
            outer_loss: Scalar.
            outer_predictions: Callable, (targets, predictions, sample weights); called where there are metrics.
        """
        self._take(optimizer, outer_loss, outer_predictions)
        return self._logs(optimizer)

    def take(self, optimizer: HyperOptimizer, result: HyperGradientResult,
             outer_predictions: Callable[[], Any]) -> None:
        """Takes a hyper-iteration into all means and metrics; arguments as of `logs`."""
        self.inner_loss.update_state(result.inner_losses[..., -1])
        self._take(optimizer, result.outer_loss, outer_predictions)
        self._has_solver = "solver_failed" in result.diagnostics
        if self._has_solver:
            for name, metric in self.of_solvers.items():
                metric.update_state(tf.cast(result.diagnostics[name], tf.float32))

    def logs_of_training(self, optimizer: HyperOptimizer) -> dict[str, Any]:
        """The logs after the hyper-iterations so far: means, what their method reports, current hyperparameters."""
        logs = self._logs(optimizer)
        if self._has_solver:
            logs.update({name: metric.result() for name, metric in self.of_solvers.items() if name != GAP})
        logs.update(log_values(self._log_names))
        return logs

    def _take(self, optimizer, outer_loss, outer_predictions):
        self.outer_loss.update_state(outer_loss)
        if optimizer._compile_metrics is not None:
            targets, predictions, weights = outer_predictions()
            optimizer.compute_metrics(None, targets, predictions, sample_weight=weights)

    def _logs(self, optimizer):
        outer_mean = self.outer_loss.result()
        logs = {"loss": outer_mean, "outer_loss": outer_mean, "inner_loss": self.inner_loss.result()}
        if optimizer._compile_metrics is not None:
            own = {self.outer_loss.name, self.inner_loss.name, "loss", *self.of_solvers}
            logs.update({name: value for name, value in optimizer.get_metrics_result().items() if name not in own})
        return logs


class _Mean(keras.metrics.Mean):
    """Keras' mean of numbers, which adds to each of its variables in one operation."""

    def update_state(self, values: Tensor, sample_weight: None = None) -> None:
        values = tf.cast(values, self.dtype)
        self.total.value.assign_add(tf.reduce_sum(values))
        self.count.value.assign_add(tf.cast(tf.size(values), self.dtype))

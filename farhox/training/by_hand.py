"""Hyper-iterations and inner trainings that are called by hand, outside of `fit`: compiled once, their data checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farhox._core.inner_state import InnerState
from farhox._core.types import Batch, InnerBatches, Tensors
from farhox.data.batches import as_inner_batches, as_tensors, examples_of
from farhox.hypergradients.base import HyperGradientResult
from farhox.problem.inner_training import InnerTraining
from farhox.training.errors import graph_calls
from farhox.training.trained import Trained, raise_if_not_finite

if TYPE_CHECKING:
    from farhox.training.hyper_optimizer import HyperOptimizer


class ByHand:
    """What `HyperOptimizer.step` and `HyperOptimizer.trained_state` call.

    Args:
        optimizer: The `HyperOptimizer`, compiled as it stays.
    """

    def __init__(self, optimizer: HyperOptimizer) -> None:
        self._optimizer = optimizer
        self._step_function: Any = None
        self._inner_function: Any = None

    def step(self, inner_batches: InnerBatches, outer_batch: Batch) -> HyperGradientResult:
        """One hyper-iteration with its update."""
        optimizer = self._optimizer
        optimizer.problem.raise_if_model_changed()
        inner_batches, outer_batch = as_inner_batches(inner_batches), as_tensors("outer_batch", outer_batch)
        with graph_calls():
            self._check_data(inner_batches, outer_batch)
            if self._step_function is None:
                self._step_function = optimizer._compilation.chosen(
                    optimizer._hyper_iteration, (inner_batches, outer_batch),
                    lambda result: [result.outer_loss, *result.gradients])
            return self._step_function(inner_batches, outer_batch)

    def trained(self, inner_batches: InnerBatches, outer: Tensors | None, state: InnerState | None) -> Trained:
        """One inner training, of which nothing is kept.

        Raises:
            DivergedError: A RuntimeError, if it diverged.
        """
        problem = self._optimizer.problem
        problem.raise_if_model_changed()
        if outer is None:
            outer = problem.outer_values()
        if state is None:
            state = self._optimizer._kept.state_now() if self._optimizer.online else problem.initial_state(outer)
        if self._inner_function is None:
            self._inner_function = self._optimizer._compiled(self._train)
        inner_batches = as_inner_batches(inner_batches)
        with graph_calls():
            self._check_data(inner_batches, None)
            run = self._inner_function(inner_batches, outer, state)
        raise_if_not_finite(run)
        return run

    def _train(self, inner_batches, outer, state):
        training = InnerTraining(
            self._optimizer.problem, inner_batches, state, outer, iteration=self._optimizer._iteration())
        run = training.run()
        return Trained(run.state, training.losses(run))

    def _check_data(self, inner_batches, outer_batch):
        """The checks of the data that XLA leaves out of a compiled hyper-iteration."""
        if self._optimizer._compilation.checks_apart:
            self._optimizer.problem.data_checks(examples_of(inner_batches), outer_batch)

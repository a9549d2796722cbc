"""EpisodesHG: a method over several inner problems, said at the method in the place of the problem."""

from __future__ import annotations

import dataclasses
from typing import Any

from farhox.hypergradients.base import HyperGradient


@dataclasses.dataclass(frozen=True)
class EpisodesHG(HyperGradient):
    """Hypergradients of several episodes, aggregated: meta-batches, folds of a cross-validation.

    `EpisodesHG(method, aggregation)` on a problem is `method` on `problem.over_episodes(aggregation)`, which says what
    batches and results are then.

    Args:
        hypergradient: A `HyperGradient`.
        aggregation: As for `BilevelProblem.over_episodes`.

    Raises:
        TypeError: If `hypergradient` is not a method or `aggregation` not callable.

    Reference:
        [Franceschi et al., 2018](https://arxiv.org/abs/1806.04910), equation 3.
    """

    hypergradient: HyperGradient
    aggregation: Any = None

    takes_episodes = True

    def __post_init__(self):
        if isinstance(self.hypergradient, HyperGradient) and self.hypergradient.takes_episodes:
            raise TypeError("hypergradient must be a method for one episode, for example farhox.ReverseHG(). "
                            f"{type(self.hypergradient).__name__} averages over episodes itself: use it as it is. "
                            f"Received: {self.hypergradient!r}")
        if not isinstance(self.hypergradient, HyperGradient):
            raise TypeError("hypergradient must be a method for one episode, for example farhox.ReverseHG(). "
                            f"Received: {self.hypergradient!r}")
        if self.aggregation is not None and not callable(self.aggregation):
            raise TypeError(f"aggregation must be a callable [episodes, ...] -> [...]. Received: {self.aggregation!r}")

    def _compute(self, problem, inner_batches, outer_batch, state, carry, iteration):
        return self.hypergradient.compute(
            problem.over_episodes(self.aggregation), inner_batches, outer_batch, state, carry, iteration)

"""ObjectivesHG: several outer objectives, each for outer variables of its own."""

import dataclasses
from typing import Any

import tensorflow as tf

from farhox._core import tree
from farhox._core.types import Carry
from farhox.hypergradients.base import HyperGradient
from farhox.problem.bilevel import BilevelProblem


@dataclasses.dataclass(frozen=True)
class ObjectivesHG(HyperGradient):
    """Hypergradients of several outer objectives, each with respect to its own outer variables.

    Outer variables that are not named here follow the outer objective of the problem, which also remains the one that
    is reported. The inner training runs once per objective.

    ```python
    method = farhox.hypergradients.ObjectivesHG(farhox.ReverseHG(), [(robust_loss, [example_weights])])
    ```

    In the result `carry` is a list with one memory per objective, the problem's own last; "finite" and
    "hypergradient_norm" are over all objectives.

    Args:
        hypergradient: A `HyperGradient`.
        objectives: List of (outer objective, list of outer variables), both as for `BilevelProblem`.

    Raises:
        TypeError: If `hypergradient` is not a method or `objectives` not a list of such pairs.
        ValueError: When computing: if a variable is named twice or is not an outer variable of the problem.
    """

    hypergradient: HyperGradient
    objectives: Any

    def __post_init__(self):
        if not isinstance(self.hypergradient, HyperGradient):
            raise TypeError("hypergradient must be a method, for example farhox.ReverseHG(). "
                            f"Received: {self.hypergradient!r}")
        pairs = self.objectives if isinstance(self.objectives, (list, tuple)) else [None]
        if not pairs or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and callable(pair[0])
                                and isinstance(pair[1], (list, tuple)) for pair in pairs):
            raise TypeError("objectives must be a list of pairs (outer objective, list of outer variables). "
                            f"Received: {self.objectives!r}")

    @property
    def carry_outlives_state(self) -> bool:
        return self.hypergradient.carry_outlives_state

    @property
    def averages_episodes(self) -> bool:
        return self.hypergradient.averages_episodes

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        parts = self._parts(problem)
        carries = list(carry) if carry else [None] * len(parts)
        results = [self.hypergradient.compute(part, inner_batches, outer_batch, state, memory)
                   for part, memory in zip(parts, carries)]
        found = {id(variable): gradient for part, result in zip(parts, results)
                 for variable, gradient in zip(part.outer_variables, result.gradients)}
        gradients = [found[id(variable)] for variable in problem.outer_variables]
        own = results[-1]
        diagnostics = dict(own.diagnostics)
        diagnostics["finite"] = tf.reduce_all([result.diagnostics["finite"] for result in results])
        diagnostics["hypergradient_norm"] = tree.norm(gradients)
        outer_loss = own.outer_loss
        if len(parts) == len(self.objectives):
            # No variable is left for the problem's own objective: it is still what is reported.
            outer_loss = problem.outer_loss(own.state, problem.outer_values(), outer_batch)
        return own._replace(gradients=gradients, outer_loss=outer_loss, diagnostics=diagnostics,
                            carry=[result.carry for result in results])

    def initial_carry(self, problem: BilevelProblem) -> Carry:
        return [self.hypergradient.initial_carry(part) for part in self._parts(problem)]

    def _parts(self, problem):
        """One problem per objective, the one of what is left last."""
        parts = [problem.with_outer(objective, list(variables)) for objective, variables in self.objectives]
        known = {id(variable) for variable in problem.outer_variables}
        named = [variable for part in parts for variable in part.outer_variables]
        for i, variable in enumerate(named):
            if id(variable) not in known:
                raise ValueError("Objectives may name outer variables of the problem only. "
                                 f"Received: {variable.path!r}")
            if any(variable is earlier for earlier in named[:i]):
                raise ValueError(f"An outer variable must follow one objective. Received twice: {variable.path!r}")
        entries = {id(entry.variable): entry for entry in problem.hyperparameters}
        left = [entries.get(id(variable), variable) for variable in problem.outer_variables
                if not any(variable is v for v in named)]
        return parts + ([problem.with_outer(problem.outer_objective, left)] if left else [])

"""ObjectivesHG: several outer objectives, each for outer variables of its own."""

import dataclasses
from typing import Any

import tensorflow as tf

from farhox._core import tree
from farhox._core.types import Carry
from farhox.hypergradients.base import HyperGradient, Memory, SingleHyperGradient
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.inner_training import InnerTraining


@dataclasses.dataclass(frozen=True)
class ObjectivesHG(HyperGradient):
    """Hypergradients of several outer objectives, each with respect to its own outer variables.

    Outer variables that are not named here follow the outer objective of the problem, which also remains the one that
    is reported. The inner training runs once for all objectives.

    ```python
    method = farhox.hypergradients.ObjectivesHG(farhox.ReverseHG(), [(robust_loss, [example_weights])])
    ```

    In the result `carry` is a list with one memory per objective, the problem's own last; "finite" and
    "hypergradient_norm" are over all objectives.

    Args:
        hypergradient: A method for one inner training, a `SingleHyperGradient`.
        objectives: List of (outer objective, list of outer variables), both as for `BilevelProblem`.

    Raises:
        TypeError: If `hypergradient` is not a method or `objectives` not a list of such pairs.
        ValueError: When computing: if a variable is named twice or is not an outer variable of the problem.
    """

    hypergradient: SingleHyperGradient
    objectives: Any

    def __post_init__(self):
        if not isinstance(self.hypergradient, SingleHyperGradient):
            raise TypeError("hypergradient must be a method for one inner training, for example farhox.ReverseHG(). "
                            f"Received: {self.hypergradient!r}")
        pairs = self.objectives if isinstance(self.objectives, (list, tuple)) else [None]
        if not pairs or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and callable(pair[0])
                                and isinstance(pair[1], (list, tuple)) for pair in pairs):
            raise TypeError("objectives must be a list of pairs (outer objective, list of outer variables). "
                            f"Received: {self.objectives!r}")

    @property
    def remembers(self) -> Memory:
        return self.hypergradient.remembers

    @property
    def needs_online(self) -> bool:
        return self.hypergradient.needs_online

    def _compute(self, problem, inner_batches, outer_batch, state, carry, iteration):
        parts = self._parts(problem)
        method = self.hypergradient
        training = InnerTraining(
            problem, inner_batches, state, share_features=method.shares_features, iteration=iteration)
        carries = list(carry) if carry else [None] * len(parts)
        results = [method.differentiate(training.under(objective, variables), outer_batch, memory)
                   for (objective, variables), memory in zip(parts, carries)]
        # Each outer variable follows its own objective.
        gradients = [next(result.gradients[i] for (_, variables), result in zip(parts, results)
                          if any(variable is own for own in variables))
                     for i, variable in enumerate(problem.outer_variables)]
        own = results[-1]
        diagnostics = dict(own.diagnostics)
        diagnostics["finite"] = tf.reduce_all([result.diagnostics["finite"] for result in results])
        diagnostics["hypergradient_norm"] = tree.norm(gradients)
        outer_loss = own.outer_loss
        if len(parts) == len(self.objectives):
            # No variable is left for the problem's own objective: it is still what is reported.
            outer_loss = problem.outer_loss(own.state, training.outer, outer_batch)
        return own._replace(gradients=gradients, outer_loss=outer_loss, diagnostics=diagnostics,
                            carry=[result.carry for result in results])

    def initial_carry(self, problem: BilevelProblem) -> Carry:
        return [self.hypergradient.initial_carry(problem) for _ in self._parts(problem)]

    def _parts(self, problem):
        """Pairs of an outer objective and its outer variables, that of the problem with what is left last."""
        known = {id(variable) for variable in problem.outer_variables}
        parts, named = [], []
        for objective, entries in self.objectives:
            variables = [entry.variable if isinstance(entry, OuterVariable) else entry for entry in entries]
            for variable in variables:
                if id(variable) not in known:
                    raise ValueError("Objectives may name outer variables of the problem only. "
                                     f"Received: {variable.path!r}")
                if any(variable is earlier for earlier in named):
                    raise ValueError(f"An outer variable must follow one objective. Received twice: {variable.path!r}")
                named.append(variable)
            parts.append((objective, variables))
        left = [variable for variable in problem.outer_variables if not any(variable is v for v in named)]
        return parts + ([(problem.outer_objective, left)] if left else [])

"""What ReverseHG stores of an inner training, and why, in words and bytes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from farhox._core.cut import kept_bytes
from farhox._core.types import Batch
from farhox.problem.back_step import BackStep
from farhox.problem.inner_training import InnerTraining

if TYPE_CHECKING:
    from farhox.problem.bilevel import BilevelProblem


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What the way back through an inner training keeps; `print` shows it as text.

    Attributes:
        steps: Int, the steps that are stored at a time.
        state_bytes: Int, one inner state.
        kept: List of `Choice`, the results of a step that are kept beside the states.
        computed_again: List of `Choice`, the dearest operations that are run again on the way back.
    """

    steps: int
    state_bytes: int
    kept: list[Any]
    computed_again: list[Any]

    @property
    def total_bytes(self) -> int:
        """Bytes of everything that is stored at a time."""
        return (self.steps + 1) * self.state_bytes + self.steps * sum(choice.bytes for choice in self.kept)

    def __str__(self):
        lines = [f"{self.steps} steps, {_megabytes(self.total_bytes)} in all",
                 f"states: {_megabytes(self.state_bytes)} each; the states before and after a step are at hand on the "
                 "way back"]
        lines += ["kept of each step, as computing it again would be dearer than its bytes:"] if self.kept else []
        lines += [f"  {choice.name} {list(choice.shape)}: {_megabytes(choice.bytes)}" for choice in self.kept]
        lines += ["computed again, as keeping it would be dearer or would not fit:"] if self.computed_again else []
        lines += [f"  {choice.name} {list(choice.shape)}: {choice.arithmetic:.2g} operations"
                  for choice in self.computed_again]
        return "\n".join(lines)


def memory_plan(problem: BilevelProblem, batch: Batch, steps: int, memory: float) -> MemoryPlan:
    """See `BilevelProblem.memory_plan`."""
    plans = []

    def plan(*leaves):
        examples = tf.nest.pack_sequence_as(batch, leaves)
        training = InnerTraining(problem, tf.nest.map_structure(lambda leaf: leaf[tf.newaxis], examples))
        back = BackStep(training, range(len(problem.inner_variables)))
        plans.append(back.plan(memory, steps))
        return tf.constant(0)

    tf.function(plan, autograph=False).get_concrete_function(*tf.nest.flatten(batch))
    state = tf.nest.flatten(problem.initial_state())
    kept, again = plans[-1]
    return MemoryPlan(steps, kept_bytes(state), kept, again)


def _megabytes(count):
    return f"{count / 2**20:.3g} MB"


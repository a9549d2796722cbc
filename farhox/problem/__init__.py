"""The bilevel problem: who depends on what, as pure functions of tensors."""

from farhox._core.inner_state import InnerState
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.supervised import supervised_problem

__all__ = ["BilevelProblem", "InnerState", "supervised_problem"]

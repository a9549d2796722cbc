"""Solvers of linear systems given by a matrix-vector product, for implicit methods."""

from farhox.linear_solvers.solvers import (
    GMRES,
    ConjugateGradient,
    Dense,
    FixedPoint,
    LinearSolution,
    LinearSolver,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
)

__all__ = ["ConjugateGradient", "Dense", "FixedPoint", "GMRES", "LinearSolution", "LinearSolver", "Neumann",
           "NormalConjugateGradient", "Nystrom"]

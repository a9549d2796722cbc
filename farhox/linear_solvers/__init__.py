"""Solvers of linear systems given by a matrix-vector product, for implicit methods.

Frozen settings with a pure `solve`; vectors are flat tensors, loops are `tf.while_loop`s. A family per file: `krylov`,
`series`, `direct`; `base` is what they share.
"""

from farhox.linear_solvers.base import LinearOperator, LinearSolution, LinearSolver
from farhox.linear_solvers.direct import Dense, Direct, Nystrom
from farhox.linear_solvers.krylov import GMRES, ConjugateGradient, NormalConjugateGradient
from farhox.linear_solvers.series import FixedPoint, Neumann

__all__ = ["ConjugateGradient", "Dense", "Direct", "FixedPoint", "GMRES", "LinearOperator", "LinearSolution",
           "LinearSolver", "Neumann", "NormalConjugateGradient", "Nystrom"]

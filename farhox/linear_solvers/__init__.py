"""Solvers of linear systems given by a matrix-vector product, for implicit methods.

Frozen settings with a pure `solve`; vectors are flat tensors, loops are `tf.while_loop`s. A family per file: `krylov`,
`series`, `direct`; `base` is what they share.
"""

from farhox._core.moved import moved as _moved
from farhox.linear_solvers.base import LinearOperator, LinearSolution, LinearSolver
from farhox.linear_solvers.direct import Direct, Nystrom
from farhox.linear_solvers.krylov import GMRES, ConjugateGradient, NormalConjugateGradient
from farhox.linear_solvers.series import FixedPoint, Neumann

__all__ = ["ConjugateGradient", "Direct", "FixedPoint", "GMRES", "LinearOperator", "LinearSolution",
           "LinearSolver", "Neumann", "NormalConjugateGradient", "Nystrom"]

# The old name, which clashed with that of the layer.
__getattr__ = _moved(__name__, {"Dense": "farhox.linear_solvers.Direct"})

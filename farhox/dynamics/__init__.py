"""One step of inner training as a pure function, one family of rules per file."""

from farhox.dynamics.base import Adam, GradientDescent, InnerDynamics, Momentum
from farhox.dynamics.keras_optimizers import KerasDynamics
from farhox.dynamics.line_search import BacktrackingGradientDescent
from farhox.dynamics.penalties import L1, GroupLasso, NuclearNorm, Penalty, Projection
from farhox.dynamics.proximal import ProximalGradient

__all__ = [
    "Adam", "BacktrackingGradientDescent", "GradientDescent", "GroupLasso", "InnerDynamics", "KerasDynamics", "L1",
    "Momentum", "NuclearNorm", "Penalty", "Projection", "ProximalGradient"]

"""One step of inner training as a pure function, one family of rules per file."""

from farhox.dynamics.base import Adam, GradientDescent, InnerDynamics, Momentum
from farhox.dynamics.keras_optimizers import KerasDynamics
from farhox.dynamics.line_search import BacktrackingGradientDescent

__all__ = ["Adam", "BacktrackingGradientDescent", "GradientDescent", "InnerDynamics", "KerasDynamics", "Momentum"]

"""Methods that compute the hypergradient dE/dλ: one per file, one interface."""

from farhox.hypergradients.base import HyperGradient, HyperGradientResult, Memory, SingleHyperGradient, result
from farhox.hypergradients.darts import DartsHG
from farhox.hypergradients.episodes import EpisodesHG
from farhox.hypergradients.evograd import EvoGradHG
from farhox.hypergradients.forward import ForwardHG
from farhox.hypergradients.implicit import ImplicitHG
from farhox.hypergradients.initial import InitialHG
from farhox.hypergradients.objectives import ObjectivesHG
from farhox.hypergradients.reptile import ReptileHG
from farhox.hypergradients.reverse import ReverseHG
from farhox.hypergradients.reversible import ReversibleHG

__all__ = [
    "DartsHG", "EpisodesHG", "EvoGradHG", "ForwardHG", "HyperGradient", "HyperGradientResult", "ImplicitHG",
    "InitialHG", "Memory", "ObjectivesHG", "ReptileHG", "ReverseHG", "ReversibleHG", "SingleHyperGradient", "result",
]

"""The `keras.Model` that `fit` trains, its outer optimizers and its callbacks."""

from farhox.training.hyper_optimizer import HyperOptimizer
from farhox.training.outer_optimizers import OptimizerGroups

__all__ = ["HyperOptimizer", "OptimizerGroups"]

"""farhox: gradient-based hyperparameter optimisation and meta-learning for Keras models on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "farhox differentiates through training with TensorFlow and needs Keras to run on it. Received the Keras "
        f"backend {keras.backend.backend()!r}: set the environment variable KERAS_BACKEND=tensorflow before the first "
        "import of keras.")

from farhox import (  # noqa: E402
    callbacks,
    constraints,
    data,
    dynamics,
    export,
    hypergradients,
    insight,
    linear_solvers,
    losses,
    meta,
    plots,
    problem,
    starts,
    stn,
    training,
)
from farhox._core.moved import moved as _moved  # noqa: E402
from farhox.data import bilevel_dataset, gather, repeat, stack  # noqa: E402
from farhox.dynamics import Adam, GradientDescent, KerasDynamics, Momentum  # noqa: E402
from farhox.hypergradients import ForwardHG, ImplicitHG, ReverseHG  # noqa: E402
from farhox.insight import check_hypergradient, compare_hypergradients  # noqa: E402
from farhox.linear_solvers import ConjugateGradient  # noqa: E402
from farhox.outer import L1L2, ExampleWeights, Hyperparameter, LearnedSchedule, OuterVariable  # noqa: E402
from farhox.problem import BilevelProblem, supervised_problem  # noqa: E402
from farhox.training import HyperOptimizer  # noqa: E402
from farhox.tuner import Tuner  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "Adam", "BilevelProblem", "ConjugateGradient", "ExampleWeights", "ForwardHG", "GradientDescent", "HyperOptimizer",
    "Hyperparameter", "ImplicitHG", "KerasDynamics", "L1L2", "LearnedSchedule", "Momentum", "OuterVariable",
    "ReverseHG", "Tuner", "bilevel_dataset", "callbacks", "check_hypergradient", "compare_hypergradients",
    "constraints", "data", "dynamics", "export", "gather", "hypergradients", "insight", "linear_solvers", "losses",
    "meta", "plots", "problem", "repeat", "stack", "starts", "stn", "supervised_problem", "training",
]

# What was a name of this module in earlier versions, and what to write instead.
__getattr__ = _moved(__name__, {
    "BacktrackingGradientDescent": "farhox.dynamics.BacktrackingGradientDescent",
    "Box": "farhox.constraints.Box",
    "CappedSimplex": "farhox.constraints.CappedSimplex",
    "DartsHG": "farhox.hypergradients.DartsHG",
    "Dense": "farhox.linear_solvers.Direct",
    "Direct": "farhox.linear_solvers.Direct",
    "EpisodesHG": "farhox.hypergradients.EpisodesHG",
    "EvoGradHG": "farhox.hypergradients.EvoGradHG",
    "FixedPoint": "farhox.linear_solvers.FixedPoint",
    "GMRES": "farhox.linear_solvers.GMRES",
    "HyperGradient": "farhox.hypergradients.HyperGradient",
    "HyperGradientResult": "farhox.hypergradients.HyperGradientResult",
    "InitialHG": "farhox.hypergradients.InitialHG",
    "InnerDynamics": "farhox.dynamics.InnerDynamics",
    "InnerState": "farhox.problem.InnerState",
    "LinearSolver": "farhox.linear_solvers.LinearSolver",
    "Neumann": "farhox.linear_solvers.Neumann",
    "NormalConjugateGradient": "farhox.linear_solvers.NormalConjugateGradient",
    "Nystrom": "farhox.linear_solvers.Nystrom",
    "ObjectivesHG": "farhox.hypergradients.ObjectivesHG",
    "OptimizerGroups": "farhox.training.OptimizerGroups",
    "ProximalGradient": "farhox.dynamics.ProximalGradient",
    "ReptileHG": "farhox.hypergradients.ReptileHG",
    "ReversibleHG": "farhox.hypergradients.ReversibleHG",
    "Simplex": "farhox.constraints.Simplex",
    "health": "farhox.insight.health",
    "k_fold_dataset": "farhox.data.k_fold_dataset",
})


def __dir__():
    return [*__all__, "__version__"]

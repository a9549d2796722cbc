"""farhox: gradient-based hyperparameter optimisation and meta-learning for Keras models on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "farhox differentiates through training with TensorFlow and needs Keras to run on it. Received the Keras "
        f"backend {keras.backend.backend()!r}: set the environment variable KERAS_BACKEND=tensorflow before the first "
        "import of keras.")

from farhox import callbacks, export, meta, plots, stn  # noqa: E402
from farhox.batches import gather, repeat, stack  # noqa: E402
from farhox.constraints import Box, CappedSimplex, Simplex  # noqa: E402
from farhox.datasets import bilevel_dataset, k_fold_dataset  # noqa: E402
from farhox.diagnostics import check_hypergradient, compare_hypergradients  # noqa: E402
from farhox.dynamics import Adam, GradientDescent, InnerDynamics, Momentum  # noqa: E402
from farhox.health import health  # noqa: E402
from farhox.hyper_optimizer import HyperOptimizer  # noqa: E402
from farhox.hypergradients import (  # noqa: E402
    DartsHG, EpisodesHG, EvoGradHG, ForwardHG, HyperGradient, HyperGradientResult, ImplicitHG, InitialHG, ObjectivesHG,
    ReptileHG, ReverseHG, ReversibleHG)
from farhox.hyperparameters import ExampleWeights, Hyperparameter, LearnedSchedule  # noqa: E402
from farhox.inner_state import InnerState  # noqa: E402
from farhox.keras_dynamics import KerasDynamics  # noqa: E402
from farhox.linear_solvers import (  # noqa: E402
    GMRES, ConjugateGradient, Dense, FixedPoint, LinearSolver, Neumann, NormalConjugateGradient, Nystrom)
from farhox.line_search import BacktrackingGradientDescent  # noqa: E402
from farhox.outer_optimizers import OptimizerGroups  # noqa: E402
from farhox.problem import BilevelProblem  # noqa: E402
from farhox.regularizers import L1L2  # noqa: E402
from farhox.supervised import supervised_problem  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Adam", "BacktrackingGradientDescent", "BilevelProblem", "Box", "CappedSimplex", "ConjugateGradient", "DartsHG",
    "Dense", "EpisodesHG", "EvoGradHG", "ExampleWeights", "FixedPoint", "ForwardHG", "GMRES", "GradientDescent",
    "HyperGradient", "HyperGradientResult", "HyperOptimizer", "Hyperparameter", "ImplicitHG", "InitialHG",
    "InnerDynamics", "InnerState", "KerasDynamics", "L1L2", "LearnedSchedule", "LinearSolver", "Momentum", "Neumann",
    "NormalConjugateGradient", "Nystrom", "ObjectivesHG", "OptimizerGroups", "ReptileHG", "ReverseHG", "ReversibleHG",
    "Simplex", "bilevel_dataset", "callbacks", "check_hypergradient", "compare_hypergradients", "export", "gather",
    "health", "k_fold_dataset", "meta", "plots", "repeat", "stack", "stn", "supervised_problem",
]

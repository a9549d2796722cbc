"""farhox: gradient-based hyperparameter optimisation and meta-learning for Keras models on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "farhox differentiates through training with TensorFlow and needs Keras to run on it. Received the Keras "
        f"backend {keras.backend.backend()!r}: set the environment variable KERAS_BACKEND=tensorflow before the first "
        "import of keras.")

from farhox import callbacks, constraints, dynamics, export, linear_solvers, losses, meta, plots, stn  # noqa: E402
from farhox._core.inner_state import InnerState  # noqa: E402
from farhox.data import bilevel_dataset, gather, k_fold_dataset, repeat, stack  # noqa: E402
from farhox.dynamics import (  # noqa: E402
    Adam,
    BacktrackingGradientDescent,
    GradientDescent,
    InnerDynamics,
    KerasDynamics,
    Momentum,
    ProximalGradient,
)
from farhox.hypergradients import (  # noqa: E402
    DartsHG,
    EpisodesHG,
    EvoGradHG,
    ForwardHG,
    HyperGradient,
    HyperGradientResult,
    ImplicitHG,
    InitialHG,
    ObjectivesHG,
    ReptileHG,
    ReverseHG,
    ReversibleHG,
)
from farhox.insight import check_hypergradient, compare_hypergradients, health  # noqa: E402
from farhox.linear_solvers import (  # noqa: E402
    GMRES,
    ConjugateGradient,
    Dense,
    Direct,
    FixedPoint,
    LinearSolver,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
)
from farhox.outer import (  # noqa: E402
    L1L2,
    Box,
    CappedSimplex,
    ExampleWeights,
    Hyperparameter,
    LearnedSchedule,
    OuterVariable,
    Simplex,
)
from farhox.problem import BilevelProblem, supervised_problem  # noqa: E402
from farhox.training import HyperOptimizer, OptimizerGroups  # noqa: E402
from farhox.tuner import Tuner  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Adam", "BacktrackingGradientDescent", "BilevelProblem", "Box", "CappedSimplex", "ConjugateGradient", "DartsHG",
    "Dense", "Direct", "EpisodesHG", "EvoGradHG", "ExampleWeights", "FixedPoint", "ForwardHG", "GMRES",
    "GradientDescent", "HyperGradient", "HyperGradientResult", "HyperOptimizer", "Hyperparameter", "ImplicitHG",
    "InitialHG", "InnerDynamics", "InnerState", "KerasDynamics", "L1L2", "LearnedSchedule", "LinearSolver", "Momentum",
    "Neumann", "NormalConjugateGradient", "Nystrom", "ObjectivesHG", "OptimizerGroups", "OuterVariable",
    "ProximalGradient", "ReptileHG", "ReverseHG", "ReversibleHG", "Simplex", "Tuner", "bilevel_dataset", "callbacks",
    "check_hypergradient", "compare_hypergradients", "constraints", "dynamics", "export", "gather", "health",
    "k_fold_dataset", "linear_solvers", "losses", "meta", "plots", "repeat", "stack", "stn", "supervised_problem",
]

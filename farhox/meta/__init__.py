"""Few-shot learning: episodes, learners over them, and their evaluation."""

from farhox.meta.context import CAVIA, TaskContext
from farhox.meta.curvature import MetaCurvature, PreconditionedDescent, identity_factors
from farhox.meta.distributed import fit_distributed, is_chief
from farhox.meta.embedding_learner import EmbeddingLearner
from farhox.meta.episodes import (
    ClassificationEpisodes,
    Episode,
    EpisodeSource,
    SinusoidEpisodes,
    split_classes,
    with_rotations,
)
from farhox.meta.evaluation import evaluate_episodes, mean_and_interval
from farhox.meta.feature_transformation import FeatureWiseTransformation
from farhox.meta.learner import Learner
from farhox.meta.learners import ANIL, IMAML, MAML, HyperRepresentation, JointTraining, Reptile
from farhox.meta.maml_plus_plus import MAMLPlusPlus
from farhox.meta.networks import convolutional_body, few_shot_classifier, residual_body
from farhox.meta.omniglot import load_omniglot
from farhox.meta.problem import episode_problem
from farhox.meta.prototypes import PrototypicalNetwork
from farhox.meta.ridge import RidgeNetwork
from farhox.meta.statistics import StepBatchNormalization
from farhox.meta.support_vectors import SupportVectorNetwork
from farhox.meta.tasks import TaskEpisodes

__all__ = [
    "ANIL", "CAVIA", "ClassificationEpisodes", "EmbeddingLearner", "Episode", "EpisodeSource",
    "FeatureWiseTransformation", "HyperRepresentation", "IMAML", "JointTraining", "Learner", "MAML", "MAMLPlusPlus",
    "MetaCurvature", "PreconditionedDescent", "PrototypicalNetwork", "Reptile", "RidgeNetwork", "SinusoidEpisodes",
    "StepBatchNormalization", "SupportVectorNetwork", "TaskContext", "TaskEpisodes", "convolutional_body",
    "episode_problem", "evaluate_episodes", "few_shot_classifier", "fit_distributed", "identity_factors", "is_chief",
    "load_omniglot", "mean_and_interval", "residual_body", "split_classes", "with_rotations",
]

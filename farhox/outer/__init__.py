"""What is learned: hyperparameters with their bounds, weights of examples, schedules, penalties, projections."""

from farhox.outer.constraints import Box, CappedSimplex, Simplex
from farhox.outer.hyperparameters import ExampleWeights, Hyperparameter, LearnedSchedule
from farhox.outer.outer_variable import OuterVariable, value_of
from farhox.outer.regularizers import L1L2

__all__ = [
    "Box", "CappedSimplex", "ExampleWeights", "Hyperparameter", "L1L2", "LearnedSchedule", "OuterVariable", "Simplex",
    "value_of"]

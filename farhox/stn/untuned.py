"""Hyperparameters that a self-tuning model reads and would never tune: named in a warning, or refused."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox._core import functional
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.held import hyperparameters_in


def warn_of_untuned(read: Any, reader: str, tuned: Sequence[OuterVariable]) -> None:
    """Warns of every hyperparameter that a reader reads and that is not among the tuned ones."""
    own = {id(entry) for entry in tuned}
    for entry in read:
        if id(entry) not in own:
            warnings.warn(
                f"{reader} reads the hyperparameter {entry.name!r}, which this SelfTuningModel does not tune: it stays "
                f"at {entry.numpy()}. Name it in stn.convert(model, hyperparameters), or give a number in its place.",
                stacklevel=4)


def check_settings(name: str, optimizer: keras.optimizers.Optimizer, tuned: Sequence[OuterVariable]) -> None:
    """Checks that no setting of an optimizer is a hyperparameter.

    Raises:
        ValueError: If one is, or the optimizer averages its variables.
    """
    settings = hyperparameters_in([optimizer])
    # A schedule, or a function without arguments, may read one.
    read = functional.call(lambda: tf.convert_to_tensor(optimizer.learning_rate), bindings=[]).read
    settings += [entry for entry in tuned if id(entry.variable) in read]
    if settings:
        raise ValueError(
            f"The settings of {name} must not be hyperparameters: a self-tuning model differentiates through gates and "
            "not through updates, so they would never be tuned. HyperOptimizer tunes them. Received: "
            f"{settings[0].name!r} in {type(optimizer).__name__}")
    if optimizer.use_ema:
        raise ValueError(f"{name} must not average its variables. Received: {type(optimizer).__name__} with "
                         "use_ema=True")

"""Files of weights: they hold the names of what they are of, and loading checks them before anything changes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

if TYPE_CHECKING:
    from farhox.training.hyper_optimizer import HyperOptimizer

SAVE_RULE = (
    "A HyperOptimizer holds objectives, which are Python code and cannot be saved. Use save_weights (ModelCheckpoint "
    "with save_weights_only=True): it holds inner and outer variables, the outer optimizer and all memory. Save the "
    "Keras model itself with model.save.")
_KEY = "of_problem"
_FORMAT = 1
# What errors of this module begin with.
_MARK = "The weights do not fit: "


def check_checkpoints(callbacks: list[Any]) -> None:
    """Raises a ValueError if a `ModelCheckpoint` is to save more than weights."""
    if any(isinstance(c, keras.callbacks.ModelCheckpoint) and not c.save_weights_only for c in callbacks):
        raise ValueError(f"ModelCheckpoint must have save_weights_only=True. {SAVE_RULE}")


def write_names(optimizer: HyperOptimizer, store: Any) -> None:
    """Adds the names and shapes of the variables of a `HyperOptimizer` to what it saves."""
    text = json.dumps({"format": _FORMAT, **_description(optimizer)})
    store[_KEY] = np.frombuffer(text.encode(), dtype="uint8")


def read_names(optimizer: HyperOptimizer, store: Any) -> dict[str, Any]:
    """Checks the names in a store; returns what is saved without them.

    Raises:
        ValueError: If they are not those of the optimizer's problem, or of a later format.
    """
    keys = list(store.keys())
    if _KEY in keys:  # Files of earlier versions have none.
        try:
            found = json.loads(bytes(np.asarray(store[_KEY]).astype("uint8")).decode())
            later = found.pop("format") > _FORMAT
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{_MARK}the names of its variables cannot be read, so it is damaged") from error
        if later:
            raise ValueError(f"{_MARK}it was written by a later version of farhox")
        names, own = ([name for name, _ in part["outer"]] for part in (found, _description(optimizer)))
        if names != own:
            raise ValueError(f"{_MARK}Weights must be loaded into a problem with the same outer variables in the same "
                             f"order. Received weights of {names} for the outer variables {own}.")
        for kind, expected in _description(optimizer).items():
            if found.get(kind) != expected:
                raise ValueError(f"{_MARK}its {kind} variables are {_in_words(found.get(kind, []))}, "
                                 f"those of the problem are {_in_words(expected)}")
    return {key: store[key] for key in keys if key != _KEY}


@contextlib.contextmanager
def unchanged_on_error(optimizer: HyperOptimizer, path: str | os.PathLike) -> Iterator[None]:
    """Loading in this context changes nothing where it fails; the error names the file and what does not fit."""
    variables = list(optimizer.variables) + (list(optimizer.optimizer.variables) if optimizer.compiled else [])
    before = [variable.numpy() for variable in variables]
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # Of a damaged file, h5py and Keras raise errors of many kinds.
        for variable, value in zip(variables, before):
            variable.assign(value)
        reason = str(error)
        if _MARK in reason:  # Keras wraps it in advice that does not apply here.
            reason = reason[reason.index(_MARK) + len(_MARK):].split("\n")[0]
        raise ValueError(f"A file of weights must be what save_weights wrote for the same problem. Received: "
                         f"{os.fspath(path)!r}: {reason}") from error


def _description(optimizer):
    problem = optimizer.problem
    owned = {id(entry.variable): entry.name for entry in problem.hyperparameters}
    return {"outer": [[owned.get(id(v), _name(v)), list(v.shape)] for v in problem.outer_variables],
            "inner": [[_name(v), list(v.shape)] for v in problem.inner_variables]}


def _name(variable):
    """The name without the number that Keras appends, which counts all variables of a process."""
    name, _, number = variable.name.rpartition("_")
    return name if name and number.isdigit() else variable.name


def _in_words(entries):
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in entries) or "none"

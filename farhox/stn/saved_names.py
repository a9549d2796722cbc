"""Names of hyperparameters beside weights that are saved by position, so that no value lands in another's place."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from farhox.outer.outer_variable import OuterVariable

_KEY = "hyperparameter_names"


def save_names(store: Any, hyperparameters: Sequence[OuterVariable]) -> None:
    """Puts the names, in their order, into what Keras saves of a layer."""
    text = json.dumps([entry.name for entry in hyperparameters])
    store[_KEY] = np.frombuffer(text.encode("utf-8"), "uint8")


def check_names(store: Any, hyperparameters: Sequence[OuterVariable], owner: str) -> None:
    """Checks the saved names against a layer's.

    Raises:
        ValueError: If they are others, or come in another order.
    """
    names = [entry.name for entry in hyperparameters]
    saved = json.loads(np.asarray(store[_KEY]).astype("uint8").tobytes()) if _KEY in store.keys() else None
    if saved != names:
        raise ValueError(f"Weights must be loaded into a model with the hyperparameters that it had when they were "
                         f"saved, in the same order. Received: {saved} in the file, {names} in {owner!r}")

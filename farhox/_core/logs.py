"""The outer variables a person can read, under their names, for logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from farhox._core.types import Logs

if TYPE_CHECKING:
    from farhox.problem.bilevel import BilevelProblem


def log_names(problem: BilevelProblem) -> dict[str, Any]:
    """Dictionary from unique names to the problem's hyperparameters and other scalar outer variables."""
    owned = {id(entry.variable) for entry in problem.hyperparameters}
    entries = problem.hyperparameters + [
        v for v in problem.outer_variables if id(v) not in owned and tuple(v.shape) == ()]
    return unique_names(entries)


def unique_names(entries: Any, taken: Any = ()) -> dict[str, Any]:
    """Dictionary from unique names, none of which is taken, to the entries: `rate`, `rate_1`, `rate_2`."""
    named = {}
    for entry in entries:
        name, count = entry.name, 1
        while name in named or name in taken:
            name, count = f"{entry.name}_{count}", count + 1
        named[name] = entry
    return named


def log_values(named: Any) -> Logs:
    """Scalars by name, in natural units: the entries of arrays of up to 16, the mean of larger ones."""
    logs = {}
    for name, entry in named.items():
        value = tf.convert_to_tensor(entry) if isinstance(entry, keras.Variable) else entry.natural_value()
        if value.shape.rank == 0:
            logs[name] = value
        elif value.shape.num_elements() <= 16:
            logs.update({f"{name}[{i}]": part for i, part in enumerate(tf.unstack(tf.reshape(value, [-1])))})
        else:
            logs[f"{name}_mean"] = tf.reduce_mean(value)
    return logs

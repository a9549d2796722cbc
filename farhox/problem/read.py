"""What objectives and dynamics read: outer variables that nobody named, an outer objective without a derivative."""

import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from farhox._core import functional
from farhox._core.types import Objective, Tensor
from farhox.dynamics.base import InnerDynamics
from farhox.outer.outer_variable import OuterVariable, owners


def found_outer_variables(inner_objective: Objective, outer_objective: Objective, dynamics: InnerDynamics,
                          inner_variables: Any, proximal: Any, features: Tensor, batches: Any,
                          fixed: Sequence[OuterVariable], weights: Any = ()) -> list[OuterVariable]:
    """The outer variables that are read, in the order: inner objective, outer objective, dynamics, proximal strength.

    Args:
        inner_objective, outer_objective, dynamics, inner_variables, proximal, features: As of a `BilevelProblem`.
        batches: (inner batch, outer batch), nests of arrays or `tf.TensorSpec`.
        fixed: List of `OuterVariable` to leave out.
        weights: List of further variables that layers regularise.

    Returns:
        List of `OuterVariable`. Nothing was computed.

    Raises:
        ValueError: If there are no batches.
    """
    if not isinstance(batches, (tuple, list)) or len(batches) != 2:
        raise ValueError("outer_variables='all' needs example_batches=(inner_batch, outer_batch), arrays or "
                         f"tf.TensorSpec, to find what is read. Received: example_batches={batches!r}")
    read = {}

    def collect(function, *arguments):
        # Keras gives regularizers what the scope holds of a weight.
        bindings = [(variable, tf.convert_to_tensor(variable)) for variable in [*inner_variables, *weights]]
        result = functional.call(function, *arguments, bindings=bindings)
        read.update((key, variable) for key, variable in result.read.items() if key not in read)
        return result.value

    def trace(inner_batch, outer_batch):
        batch = inner_batch if features is None else collect(features, inner_batch)
        collect(inner_objective, batch)
        collect(outer_objective, outer_batch)
        collect(update)

    def update():
        variables = [tf.convert_to_tensor(variable) for variable in inner_variables]
        objective = [lambda variables: tf.add_n([tf.cast(tf.reduce_sum(v), tf.float64) for v in variables])]
        return dynamics.update(
            [tf.zeros_like(v) for v in variables], variables, dynamics.initial_slots(variables),
            tf.constant(0, tf.int64), *(objective if dynamics.needs_objective else []))

    specs = tf.nest.map_structure(
        lambda leaf: leaf if isinstance(leaf, tf.TensorSpec) else tf.TensorSpec.from_tensor(tf.convert_to_tensor(leaf)),
        tuple(batches))
    tf.function(trace, autograph=False).get_concrete_function(*specs)
    found = owners(read.values()) + ([proximal] if isinstance(proximal, OuterVariable) else [])
    return [entry for i, entry in enumerate(found) if not any(entry is other for other in [*found[:i], *fixed])]


def warn_of_unnamed(read: Any, known: Any) -> None:
    """Warns of outer variables that were read and are not known, once each.

    Args:
        read: Dictionary from ids to variables.
        known: Set of the ids of variables that are outer or fixed; those warned of are added.
    """
    unnamed = owners(variable for key, variable in read.items() if key not in known)
    if unnamed:
        known.update(id(entry.variable) for entry in unnamed)
        warnings.warn(
            f"{', '.join(repr(entry.name) for entry in unnamed)}: read and not named in outer_variables, so the value "
            "stays as it is. Name it there, or write outer_variables='all', to learn it; name it in fixed=[...] to "
            "keep it without this warning.", stacklevel=3)


def check_derivative(outer_objective: Objective, of_outer: Any, inner: Any) -> None:
    """An error, or a warning, for an outer objective that has no derivative in the inner state.

    Args:
        outer_objective: The callable.
        of_outer: List of its derivatives with respect to the outer variables, None where there is none.
        inner: List of the inner variables that it read.

    Raises:
        ValueError: If it has no derivative at all.
    """
    rule = ("outer_objective must have a derivative. What counts or decides has none (accuracy, F1, argmax, rounding, "
            "comparisons), and neither has what tf.stop_gradient cuts off")
    advice = ("Use a smooth loss, such as cross-entropy or one of farhox.losses, and give what counts to "
              "compile(metrics=[...]).")
    name = getattr(outer_objective, "__qualname__", repr(outer_objective))
    if all(gradient is None for gradient in of_outer):
        raise ValueError(f"{rule}. Received: {name}, of which nothing depends smoothly on an inner or outer variable. "
                         f"{advice}")
    if inner:
        warnings.warn(f"{rule}: {name} reads inner variables and has a derivative in none of them, only in outer "
                      f"variables. {advice}", stacklevel=3)

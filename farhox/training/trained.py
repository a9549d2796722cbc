"""From a `HyperOptimizer` to trained models: a run of inner training, a copy, and what is learned in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from farhox._core import tree
from farhox._core.copies import copy_of
from farhox._core.inner_state import InnerState
from farhox._core.logs import log_names, log_values
from farhox._core.types import Data, Tensor, Tensors
from farhox.data.datasets import pair
from farhox.problem.bilevel import BilevelProblem
from farhox.training.errors import DivergedError
from farhox.training.watch import ADVICE

if TYPE_CHECKING:
    from farhox.training.hyper_optimizer import HyperOptimizer


class Trained(NamedTuple):
    """An inner training; see `HyperOptimizer.trained_state`."""

    state: InnerState
    losses: Tensor


def raise_if_not_finite(run: Trained) -> None:
    """Raises a DivergedError that says where an inner training stopped being finite, if it did."""
    if tree.is_finite([run.losses, run.state]):
        return
    bad = np.flatnonzero(~np.isfinite(run.losses.numpy()))
    where = f"the inner objective at step {bad[0]}" if bad.size else "the state after the last step"
    raise DivergedError(f"Inner training diverged: {where} of {len(run.losses)} is not finite. The model is as "
                        f"it was. {ADVICE}", run.losses.numpy())


def trained_copy(optimizer: HyperOptimizer, data: Data, outer: Tensors | None = None) -> keras.Model:
    """A new Keras model whose inner variables were trained; see `HyperOptimizer.trained_model`.

    Args:
        optimizer: A `HyperOptimizer`.
        data: T inner batches, or a `tf.data.Dataset` of hyper-iterations.
        outer: List of tensors, other outer values than the current ones.
    """
    problem = optimizer.problem
    known_model(problem)
    outer = problem.outer_values() if outer is None else outer
    state = None
    for inner_batches in (pair(element)[0] for element in data) if isinstance(data, tf.data.Dataset) else [data]:
        state = optimizer.trained_state(inner_batches, outer, state).state
    if state is None:
        raise ValueError("The data set must hold at least one pair (inner_batches, outer_batch). "
                         "Received an empty one.")
    return model_at(problem, outer, state)


def known_model(problem: BilevelProblem) -> keras.Model:
    """The Keras model of a problem.

    Raises:
        ValueError: If the problem does not know it.
    """
    if problem.model is None:
        raise ValueError("The problem must know its Keras model: make it with farhox.supervised_problem, or give "
                         "BilevelProblem(model=...). Received a problem without one.")
    return problem.model


def model_at(problem: BilevelProblem, outer: Tensors, state: InnerState) -> keras.Model:
    """A copy of the problem's model with the outer values and the inner state as weights."""
    state = state._replace(variables=problem.dynamics.finished(state.variables, state.slots))
    values = {id(variable): value for variable, value in zip(problem.outer_variables, outer)}
    values.update((id(variable), value) for variable, value in zip(
        [*problem.inner_variables, *problem.state_variables], [*state.variables, *state.state_variables]))
    copy = copy_of(problem.model)
    for own, variable in zip(copy.variables, problem.model.variables):
        own.assign(values.get(id(variable), variable))
    return copy


def describe(optimizer: HyperOptimizer) -> str:
    """A few lines on what a `HyperOptimizer` learns, and how."""
    problem, method = optimizer.problem, optimizer.hypergradient
    rows = [f"{type(optimizer).__name__} {optimizer.name!r}: {type(method).__name__}, dynamics "
            f"{type(problem.dynamics).__name__}, online={optimizer.online}"]
    named = log_names(problem)
    rows += [f"  {name} = {float(value):.6g}" for name, value in log_values(named).items()]
    known = {id(entry if isinstance(entry, keras.Variable) else entry.variable) for entry in named.values()}
    rows += [f"  {variable.path}, shape {tuple(variable.shape)}" for variable in problem.outer_variables
             if id(variable) not in known]
    count = sum(math.prod(variable.shape) for variable in problem.inner_variables)
    rows.append(f"Inner variables: {len(problem.inner_variables)} with {count} entries")
    return "\n".join(rows)

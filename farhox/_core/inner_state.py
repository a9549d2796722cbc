"""The state of inner training, and what is computed at one: plain tuples of tensors."""

from typing import NamedTuple

import tensorflow as tf

from farhox._core.types import Nest, Tensor, Tensors


class InnerState(NamedTuple):
    """The inner state s: everything that one inner step reads and writes.

    Attributes:
        variables: List of tensors, the inner variables w.
        state_variables: List of tensors: batch-norm statistics, random seeds.
        slots: Nest of tensors, the optimizer's own state.
        step: Scalar int64 tensor, inner steps taken so far.
    """

    variables: Tensors
    state_variables: Tensors
    slots: Nest
    step: Tensor


class StepResult(NamedTuple):
    """One inner step.

    Attributes:
        state: The state after the step.
        loss: Scalar, the inner objective before the step.
        gradient_norm: Scalar, the Euclidean norm of the inner gradient before the step.
        gradients: List of tensors, the inner gradient before the step.
    """

    state: InnerState
    loss: Tensor
    gradient_norm: Tensor
    gradients: Tensors


class OuterGradients(NamedTuple):
    """The outer objective E and its partial derivatives.

    Attributes:
        loss: Scalar, E.
        state: List aligned with `float_leaves(state)`, dE/ds; None where E does not depend.
        outer: List aligned with `problem.outer_variables`, the explicit dE/dλ; None where E does not depend.
    """

    loss: Tensor
    state: Tensors
    outer: Tensors


def float_leaves(state: Nest) -> Tensors:
    """The floating-point tensors of a state as a flat list: what can be differentiated."""
    return [leaf for leaf in tf.nest.flatten(state) if leaf.dtype.is_floating]


def with_float_leaves(state: Nest, leaves: Tensors) -> Nest:
    """The state with its floating-point tensors replaced, in the order of `float_leaves`."""
    new = iter(leaves)
    return tf.nest.map_structure(lambda leaf: next(new) if leaf.dtype.is_floating else leaf, state)

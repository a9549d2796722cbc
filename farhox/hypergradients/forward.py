"""ForwardHG: the tangents of the inner state, carried along with the inner training."""

import dataclasses

import tensorflow as tf

from farhox import _autodiff
from farhox.batches import batch_at, num_steps
from farhox.hypergradients.base import (
    HyperGradient, HyperGradientResult, InnerRun, common_diagnostics, goes_on, gradients_or_error, new_losses,
    norm_before_first_step, reached_by_step, stacked_losses)
from farhox.problem import float_leaves, with_float_leaves


@dataclasses.dataclass(frozen=True)
class ForwardHG(HyperGradient):
    """Hypergradient by forward-mode differentiation of the inner dynamics.

    Carries the tangents Z = ds/dλ of all P scalar directions of λ: Z <- A_t Z + B_t, at the state before each step; the
    hypergradient is Z' dE/ds + dE/dλ. Time grows with P and memory is P copies of the state, whatever T: for a few
    scalar hyperparameters, and for training that goes on (real-time hyperparameter optimisation).

    `result.carry` holds Z. Passing state and carry back continues both (with `HyperOptimizer(online=True)`: real-time
    hyperparameter optimisation); passing the state alone starts Z at zero.

    Args:
        warm_restart: Bool. Keep no tangents: where the state goes on, Z starts at zero again, so that each
            hypergradient is that of its own T steps.

    Reference:
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785), Algorithm 2 and section 4.
    """

    warm_restart: bool = False

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        outer = problem.outer_values()
        steps = num_steps(inner_batches)
        directions = _unit_directions(outer)
        reached = [False] * len(outer)
        if state is None:
            state = problem.initial_state(outer)
            tangents = _initial_tangents(problem, outer, directions, reached)
        elif carry:
            # Tangents that were carried along hold what every variable did before, initial values too.
            tangents, reached = carry, [True] * len(outer)
        else:
            tangents = _zero_tangents(state, directions)
        reached = [a or b for a, b in zip(
            reached, reached_by_step(problem, state, outer, batch_at(inner_batches, 0)))]

        def body(t, state, tangents, losses, norm):
            batch = batch_at(inner_batches, t)
            leaves = float_leaves(state)

            def step(inputs):
                at_state = with_float_leaves(state, inputs[:len(leaves)])
                return float_leaves(problem.step(at_state, inputs[len(leaves):], batch).state)

            def tangent(direction):
                return _forward_product(step, leaves + list(outer), direction)

            new_tangents = _map_directions(tangent, tangents + directions, leaves)
            for new, old in zip(new_tangents, tangents):
                new.set_shape(old.shape)
            result = problem.step(state, outer, batch)
            return t + 1, result.state, new_tangents, losses.write(t, result.loss), result.gradient_norm

        taken, state, tangents, losses, norm = tf.while_loop(
            lambda t, state, tangents, losses, norm: goes_on(problem, t, steps, norm), body,
            [tf.constant(0), state, tangents, new_losses(problem, steps), norm_before_first_step(problem)],
            parallel_iterations=1)

        at_end = problem.outer_gradients(state, outer, outer_batch)
        reached = [a or b is not None for a, b in zip(reached, at_end.outer)]
        gradients = _contract(at_end, tangents, outer)
        gradients = gradients_or_error(
            problem, gradients, reached,
            "ForwardHG sees what the inner steps, the outer objective and the initial state depend on.")
        run = InnerRun(state, losses, norm, taken, None)
        diagnostics = common_diagnostics(gradients, at_end.loss, run)
        carry = [] if self.warm_restart else tangents
        return HyperGradientResult(gradients, at_end.loss, stacked_losses(problem, run), state, carry, diagnostics)

    def initial_carry(self, problem):
        if self.warm_restart:
            return []
        outer = problem.outer_values()
        return _initial_tangents(problem, outer, _unit_directions(outer), [False] * len(outer))


def _unit_directions(outer):
    """The P unit vectors of λ: for each outer variable a tensor [P, *shape]."""
    sizes = [value.shape.num_elements() for value in outer]
    identity = {dtype: tf.eye(sum(sizes), dtype=dtype) for dtype in {value.dtype for value in outer}}
    directions, start = [], 0
    for value, size in zip(outer, sizes):
        columns = identity[value.dtype][:, start:start + size]
        directions.append(tf.reshape(columns, [sum(sizes)] + list(value.shape)))
        start += size
    return directions


def _initial_tangents(problem, outer, directions, reached):
    """∂Φ_0/∂λ for all directions; `reached` is updated with the variables that Φ_0 depends on."""
    def initial(inputs):
        return float_leaves(problem.initial_state(inputs))

    leaves = initial(outer)
    for i, product in enumerate(_autodiff.transposed_product(initial, list(outer), leaves)):
        reached[i] = reached[i] or product is not None
    tangents = _map_directions(
        lambda direction: _forward_product(initial, list(outer), direction), directions, leaves)
    count = directions[0].shape[0]
    return [tf.ensure_shape(z, [count] + list(leaf.shape)) for z, leaf in zip(tangents, leaves)]


def _zero_tangents(state, directions):
    count = directions[0].shape[0]
    return [tf.zeros([count] + list(leaf.shape), leaf.dtype) for leaf in float_leaves(state)]


def _contract(at_end, tangents, outer):
    """Z' dE/ds + dE/dλ, in the shapes of the outer variables."""
    count = sum(value.shape.num_elements() for value in outer)
    dtype = max((value.dtype for value in outer), key=lambda dtype: dtype.size)
    total = tf.zeros([count], dtype)
    for gradient, z in zip(at_end.state, tangents):
        if gradient is not None:
            flat = tf.reshape(z, [count, -1])
            total += tf.cast(tf.linalg.matvec(flat, tf.reshape(gradient, [-1])), dtype)
    pieces = tf.split(total, [value.shape.num_elements() for value in outer])
    return [tf.cast(tf.reshape(piece, value.shape), value.dtype) + (0 if explicit is None else explicit)
            for piece, value, explicit in zip(pieces, outer, at_end.outer)]


def _map_directions(function, directions, like):
    # AutoGraph would rewrite the user's objective, and turn its errors into others.
    return tf.map_fn(tf.autograph.experimental.do_not_convert(function), directions, parallel_iterations=1,
                     fn_output_signature=[leaf.dtype for leaf in like])


def _forward_product(function, inputs, tangents):
    return _autodiff.forward_product(function, inputs, tangents)[1]

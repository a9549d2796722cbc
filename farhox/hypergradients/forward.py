"""ForwardHG: the tangents of the inner state, carried along with the inner training."""

import dataclasses

import tensorflow as tf

from farhox._core import autodiff
from farhox._core.inner_state import float_leaves, with_float_leaves
from farhox.data.batches import batch_at, num_steps
from farhox.hypergradients.base import (
    HyperGradient,
    HyperGradientResult,
    InnerRun,
    common_diagnostics,
    goes_on,
    gradients_or_error,
    new_losses,
    norm_before_first_step,
    reached_by_step,
    stacked_losses,
)

# Outer variables that have a loop each over their directions, at most: each is traced on its own.
_MOST_LOOPS = 8


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
        reached = [False] * len(outer)
        if state is None:
            state = problem.initial_state(outer)
            tangents = _initial_tangents(problem, outer, reached)
        elif carry:
            # Tangents that were carried along hold what every variable did before, initial values too.
            tangents, reached = carry, [True] * len(outer)
        else:
            tangents = _zero_tangents(state, outer)
        reached = [a or b for a, b in zip(
            reached, reached_by_step(problem, state, outer, batch_at(inner_batches, 0)))]

        def body(t, state, arrays, losses, norm):
            batch = batch_at(inner_batches, t)
            leaves = float_leaves(state)

            def step(inputs):
                at_state = with_float_leaves(state, inputs[:len(leaves)])
                result = problem.step(at_state, inputs[len(leaves):], batch)
                return float_leaves(result.state), result

            linearization = autodiff.ForwardLinearization(step, leaves + list(outer))
            result = linearization.auxiliary
            arrays = _step_of_tangents(linearization, arrays, outer)
            return t + 1, result.state, arrays, losses.write(t, result.loss), result.gradient_norm

        # An entry per direction: a tensor [P, ...] would be copied as a whole in each step.
        count = _num_directions(outer)
        arrays = [tf.TensorArray(z.dtype, size=count, element_shape=z.shape[1:], clear_after_read=False).unstack(z)
                  for z in tangents]
        taken, state, arrays, losses, norm = tf.while_loop(
            lambda t, state, arrays, losses, norm: goes_on(problem, t, steps, norm), body,
            [tf.constant(0), state, arrays, new_losses(problem, steps), norm_before_first_step(problem)],
            parallel_iterations=1)
        tangents = [tf.ensure_shape(array.stack(), z.shape) for array, z in zip(arrays, tangents)]

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
        return _initial_tangents(problem, outer, [False] * len(outer))


def _num_directions(outer):
    return sum(value.shape.num_elements() for value in outer)


def _unit_direction(outer, index, among):
    """Unit vector `index` of λ in the shapes of the outer variables; None for the variables that are not `among`."""
    direction, start = [], 0
    for i, value in enumerate(outer):
        size = value.shape.num_elements()
        # Zero where the index lies in another variable.
        direction.append(tf.reshape(tf.one_hot(index - start, size, dtype=value.dtype), value.shape)
                         if i in among else None)
        start += size
    return direction


def _step_of_tangents(linearization, arrays, outer):
    """Z <- A_t Z + B_t, direction by direction, in place of the old ones.

    Outer variables have a loop each over their directions: there the other variables' part of B_t is known to be zero.
    Many of them share one loop, whose graph is a single one.
    """
    everything = range(len(outer))
    groups = [[i] for i in everything] if len(outer) <= _MOST_LOOPS else [everything]
    stop = 0
    for group in groups:
        start, stop = stop, stop + _num_directions([outer[i] for i in group])

        def product(index, arrays, group=group):
            tangents = [array.read(index) for array in arrays] + _unit_direction(outer, index, group)
            products = linearization.product(tangents)
            return index + 1, [array.write(index, z) for array, z in zip(arrays, products)]

        if stop - start == 1:
            _, arrays = product(start, arrays)
        else:
            _, arrays = tf.while_loop(lambda index, _, stop=stop: index < stop, product,
                                      [tf.constant(start), arrays], parallel_iterations=1)
    return arrays


def _initial_tangents(problem, outer, reached):
    """∂Φ_0/∂λ for all directions; `reached` is updated with the variables that Φ_0 depends on."""
    def initial(inputs):
        return float_leaves(problem.initial_state(inputs)), ()

    linearization = autodiff.ForwardLinearization(initial, list(outer))
    leaves, count = linearization.outputs, _num_directions(outer)
    reached[:] = [a or b for a, b in zip(reached, linearization.depends)]
    everything = range(len(outer))
    # AutoGraph would rewrite the user's dynamics, and turn their errors into others.
    tangents = tf.map_fn(
        tf.autograph.experimental.do_not_convert(
            lambda index: linearization.product(_unit_direction(outer, index, everything))),
        tf.range(count), parallel_iterations=1, fn_output_signature=[leaf.dtype for leaf in leaves])
    return [tf.ensure_shape(z, [count] + list(leaf.shape)) for z, leaf in zip(tangents, leaves)]


def _zero_tangents(state, outer):
    return [tf.zeros([_num_directions(outer)] + list(leaf.shape), leaf.dtype) for leaf in float_leaves(state)]


def _contract(at_end, tangents, outer):
    """Z' dE/ds + dE/dλ, in the shapes of the outer variables."""
    count = _num_directions(outer)
    dtype = max((value.dtype for value in outer), key=lambda dtype: dtype.size)
    total = tf.zeros([count], dtype)
    for gradient, z in zip(at_end.state, tangents):
        if gradient is not None:
            flat = tf.reshape(z, [count, -1])
            total += tf.cast(tf.linalg.matvec(flat, tf.reshape(gradient, [-1])), dtype)
    pieces = tf.split(total, [value.shape.num_elements() for value in outer])
    return [tf.cast(tf.reshape(piece, value.shape), value.dtype) + (0 if explicit is None else explicit)
            for piece, value, explicit in zip(pieces, outer, at_end.outer)]

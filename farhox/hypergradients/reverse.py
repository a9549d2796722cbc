"""ReverseHG: the adjoint of the inner training, walked back from its end."""

import dataclasses
import math
from typing import Any

import tensorflow as tf

from farhox._core import autodiff, checks
from farhox._core.inner_state import float_leaves, with_float_leaves
from farhox.data.batches import batch_at, num_steps
from farhox.hypergradients.base import (
    HyperGradient,
    HyperGradientResult,
    InnerRecord,
    InnerRun,
    StateStore,
    add_initial_dynamics,
    common_diagnostics,
    goes_on,
    gradients_or_error,
    new_losses,
    run_inner,
    stacked_losses,
    zeros_for_none,
)

# Inner gradients are kept for the way back as long as those of all steps fit in this many bytes.
_KEPT_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class ReverseHG(HyperGradient):
    """Hypergradient by reverse-mode differentiation of the inner dynamics.

    Walks back from s_T: gradients += B_t' adjoint, adjoint = A_t' adjoint with A_t = ∂Φ_t/∂s and B_t = ∂Φ_t/∂λ, each
    step recomputed from a stored state with the batch, seeds and statistics it had. Costs about three times the inner
    training whatever the number of outer variables; memory grows by one stored state per step. The inner gradients are
    stored too as long as those of all steps take no more than 128 MB, which saves computing them again.

    Args:
        truncation: Non-negative int or None. Differentiate only the last `truncation` steps; 0 keeps dE/dλ alone.
        checkpoint_every: Positive int, "sqrt" or None. Store one state in this many and recompute the others, at the
            price of running the inner training once more. "sqrt" stores about the square root of T. None: store all.
        step_weights: Tuple of T non-negative numbers that sum to one, or a callable without arguments that returns
            them as a tensor [T]. The hypergradient is then that of Σ_t weight_t E(s_t, λ) over the states after step
            1, ..., T instead of E(s_T, λ) alone, at the price of up to T outer gradients; `outer_loss` stays E(s_T, λ).

    Raises:
        ValueError: If an argument is out of range, or `step_weights` come with a truncation. When called: if the number
            of weights is not T, or the problem has a stop tolerance.

    Reference:
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785), Algorithm 1;
        [Shaban et al., 2019](https://arxiv.org/abs/1810.10667) (truncation);
        [Antoniou et al., 2019](https://arxiv.org/abs/1810.09502), section 4 (weights of steps).
    """

    truncation: Any = None
    checkpoint_every: Any = None
    step_weights: Any = None

    shares_features = True

    def __post_init__(self):
        if self.truncation is not None and not (checks.is_integer(self.truncation) and self.truncation >= 0):
            raise ValueError(f"truncation must be a non-negative integer or None. Received: {self.truncation!r}")
        if self.checkpoint_every not in (None, "sqrt") and (
                not checks.is_integer(self.checkpoint_every) or self.checkpoint_every < 1):
            raise ValueError("checkpoint_every must be a positive integer, 'sqrt' or None. "
                             f"Received: {self.checkpoint_every!r}")
        if self.step_weights is None:
            return
        if self.truncation is not None:
            raise ValueError("step_weights are over all inner steps and cannot come with a truncation. "
                             f"Received: truncation={self.truncation}")
        if not callable(self.step_weights) and not _is_distribution(self.step_weights):
            raise ValueError("step_weights must be a tuple of non-negative numbers that sum to one, a callable that "
                             f"returns them, or None. Received: {self.step_weights!r}")

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        outer = problem.outer_values()
        from_initial_state = state is None
        if from_initial_state:
            state = problem.initial_state(outer)
        steps = num_steps(inner_batches)
        # Differentiated steps at most: what is stored has this size, which XLA must know.
        most = steps - self._first_differentiated_step(steps)
        walk = _Walk(problem, outer, inner_batches, outer_batch, self._weights_at_states(problem, steps),
                     self._segment_length(most), most, _gradients_are_kept(state.variables, most))
        walk.left_out = walk.has_no_effect(state)
        losses = new_losses(problem, steps)
        if problem.stop_tolerance is not None and self.truncation is not None:
            # Which steps are the last ones shows only at the end: the inner training runs once more.
            steps = run_inner(problem, state, outer, inner_batches, 0, steps, new_losses(problem, steps)).steps
        first = self._first_differentiated_step(steps)

        run = run_inner(problem, state, outer, inner_batches, 0, first, losses)
        run, store = walk.forward(run, first, steps)
        if problem.stop_tolerance is not None:
            steps = run.steps
        at_end, adjoint, gradients = walk.at_end(run.state, steps)

        if self.truncation != 0:
            adjoint, gradients = walk.back(store, first, steps, adjoint, gradients)
            if from_initial_state and not (isinstance(first, int) and first > 0):
                if not isinstance(first, int):
                    adjoint = [tf.where(first > 0, tf.zeros_like(part), part) for part in adjoint]
                gradients = add_initial_dynamics(problem, outer, adjoint, gradients, walk.reached)
            reached = walk.reached
        else:
            reached = [True] * len(outer)  # What the user asked for: the explicit dependence alone.

        gradients = gradients_or_error(
            problem, gradients, reached,
            "ReverseHG sees what the inner steps, the outer objective and the initial state depend on"
            f"{'' if from_initial_state else '; a state that is passed in does not depend on initial values'}.")
        return HyperGradientResult(
            gradients, at_end.loss, stacked_losses(problem, run), run.state, [],
            common_diagnostics(gradients, at_end.loss, run))

    def _first_differentiated_step(self, steps):
        if self.truncation is None:
            return 0
        return max(steps - self.truncation, 0) if isinstance(steps, int) else tf.maximum(steps - self.truncation, 0)

    def _weights_at_states(self, problem, steps):
        """The weights of the states s_0, ..., s_T, the first of which is zero, as a tensor [T + 1]; or None."""
        if self.step_weights is None:
            return None
        if problem.stop_tolerance is not None:
            raise ValueError("step_weights need the number of inner steps in advance. Received a problem with "
                             f"stop_tolerance={problem.stop_tolerance}")
        if callable(self.step_weights):
            weights = tf.cast(self.step_weights(), problem.loss_dtype)
        else:
            weights = tf.constant(self.step_weights, problem.loss_dtype)
        if weights.shape.rank != 1 or not isinstance(steps, int) or weights.shape[0] != steps:
            raise ValueError("step_weights must have one entry per inner step, of which the number must be known. "
                             f"Received: shape {weights.shape} for T={steps}")
        return tf.pad(weights, [[1, 0]])

    def _segment_length(self, count):
        """Steps between stored states; None for a single segment all of whose states are stored."""
        if self.checkpoint_every == "sqrt":
            if isinstance(count, int):
                return max(1, math.isqrt(max(count - 1, 0)) + 1)
            return tf.cast(tf.math.ceil(tf.sqrt(tf.cast(tf.maximum(count, 1), tf.float32))), tf.int32)
        return self.checkpoint_every


@dataclasses.dataclass
class _Walk:
    """The differentiated part of an inner training, and the way back through it.

    Args:
        weights: Tensor [T + 1], the weight of the outer objective at each state, or None for the last state alone.
        segment: Steps between stored states; None for a single segment all of whose states are stored.
        most: Differentiated steps at most.
        keep_gradients: Whether the inner gradients of the stored steps are stored too.
    """

    problem: Any
    outer: list
    inner_batches: Any
    outer_batch: Any
    weights: Any
    segment: Any
    most: Any
    keep_gradients: bool
    # Whether steps back leave the adjoint and the gradients as they are: nothing is stored, and none is taken.
    left_out: bool = dataclasses.field(init=False, default=False)
    # Set at the end of the training: which outer variables anything depends on, and whether steps back go through ∇L.
    reached: list = dataclasses.field(init=False)
    through_gradient: bool = dataclasses.field(init=False)

    def _run(self, state, losses, start, stop, store=None, **kwargs):
        return run_inner(self.problem, state, self.outer, self.inner_batches, start, stop, losses, store, **kwargs)

    def _record_store(self, state, size):
        return StateStore(InnerRecord(state, state.variables if self.keep_gradients else []), size)

    def _num_segments(self, first, steps):
        return 1 if self.segment is None else (steps - first + self.segment - 1) // self.segment

    def _bounds(self, index, first, steps):
        start = first + index * self.segment
        return start, tf.minimum(start + self.segment, steps)

    def forward(self, run, first, steps):
        """The run from step `first` on, and the store of its steps or of each segment's first state."""
        if self.left_out:
            return self._run(run.state, run.losses, first, steps, norm=run.gradient_norm), None
        if self.segment is None:
            store = self._record_store(run.state, self.most)
            run = self._run(run.state, run.losses, first, steps, store, norm=run.gradient_norm)
            return run, run.store
        count = self._num_segments(first, steps)
        store = StateStore(run.state, self._num_segments(0, self.most))

        def body(index, state, losses, norm, taken, arrays):
            arrays = store.with_arrays(arrays).write(index, state).arrays
            run = self._run(state, losses, *self._bounds(index, first, steps), norm=norm)
            return index + 1, run.state, run.losses, run.gradient_norm, run.steps, arrays

        _, *ended, arrays = tf.while_loop(
            lambda index, state, losses, norm, taken, arrays: goes_on(self.problem, index, count, norm), body,
            [tf.constant(0), run.state, run.losses, run.gradient_norm, run.steps, store.arrays], parallel_iterations=1)
        return InnerRun(*ended, None), store.with_arrays(arrays)

    def at_end(self, state, steps):
        """The outer gradients at the last state, and the adjoint and the gradients that the way back starts from."""
        at_end = self.problem.outer_gradients(state, self.outer, self.outer_batch)
        self.reached = [gradient is not None for gradient in at_end.outer]
        self.through_gradient = not self.problem.dynamics.first_order or _statistics_matter(state, at_end.state)
        adjoint = zeros_for_none(at_end.state, float_leaves(state))
        gradients = zeros_for_none(at_end.outer, self.outer)
        if self.weights is not None:
            weight = self.weights[steps]
            adjoint, gradients = _weighted(weight, adjoint), _weighted(weight, gradients)
        return at_end, adjoint, gradients

    def has_no_effect(self, state):
        """Whether steps back leave adjoint and gradients as they are: first-order gradient descent at a fixed rate.

        What the outer objective depends on shows in its trace alone. It is traced into a function that is never called,
        before the steps that then need no storing; without a graph around it that would cost more than it saves.
        """
        if tf.executing_eagerly() or self.weights is not None or not self._updates_pass_on(state):
            return False
        seen = []

        def look():
            at_state = self.problem.outer_gradients(state, self.outer, self.outer_batch)
            seen.append(_statistics_matter(state, at_state.state))

        tf.function(look, autograph=False).get_concrete_function()
        return not seen[-1]

    def _updates_pass_on(self, state):
        """Whether the update of first-order dynamics passes the adjoint on, and depends on no outer variable."""
        if not self.problem.dynamics.first_order or self.problem.dynamics.needs_objective:
            return False
        # How the update depends on its inputs does not depend on their values: any stand in for gradients and adjoint.
        leaves, count = float_leaves(state), len(state.variables)
        after_statistics = count + len(float_leaves(state.state_variables))
        products = self._update_product(state.variables, state, None, leaves)[count:]
        # The update sees no statistics.
        passed_on = leaves[:count] + [None] * (after_statistics - count) + leaves[after_statistics:]
        return all(product is part for product, part in zip(products, passed_on + [None] * len(self.outer)))

    def back(self, store, first, steps, adjoint, gradients):
        """The adjoint at step `first`, and the gradients with the contribution of each step from there on."""
        if self.left_out:
            return adjoint, gradients

        # A single segment takes the same loops as many do: with other loops around it TensorFlow's graph optimizer adds
        # up the terms of a step in another order, and the last bit of the result would depend on the checkpoints.
        def body(index, adjoint, gradients):
            if self.segment is None:
                start, stop, records = first, steps, store
            else:
                start, stop = self._bounds(index, first, steps)
                state = store.read(index)
                records = self._run(state, new_losses(self.problem, num_steps(self.inner_batches)), start, stop,
                                    self._record_store(state, self.segment), replay=True).store
            return index - 1, *self._steps_back(records, start, stop, adjoint, gradients)

        last = tf.convert_to_tensor(self._num_segments(first, steps) - 1, tf.int32)
        _, adjoint, gradients = tf.while_loop(
            lambda index, *_: index >= 0, body, [last, adjoint, gradients], parallel_iterations=1)
        return adjoint, gradients

    def _steps_back(self, records, start, stop, adjoint, gradients):
        """Steps stop - 1 down to `start`; `records` holds the `InnerRecord` of each of them."""
        def body(t, adjoint, gradients):
            record = records.read(t - start)
            leaves = float_leaves(record.state)
            products = self._step_product(record, batch_at(self.inner_batches, t), adjoint)
            for i, product in enumerate(products[len(leaves):]):
                self.reached[i] = self.reached[i] or product is not None
            adjoint = zeros_for_none(products[:len(leaves)], leaves)
            gradients = [total if product is None else total + product
                         for total, product in zip(gradients, products[len(leaves):])]
            return t - 1, *self._with_outer(t, record.state, adjoint, gradients)

        _, adjoint, gradients = tf.while_loop(
            lambda t, *_: t >= start, body, [tf.convert_to_tensor(stop - 1, tf.int32), adjoint, gradients],
            parallel_iterations=1)
        return adjoint, gradients

    def _with_outer(self, t, state, adjoint, gradients):
        """Adds weight_t dE/ds and weight_t dE/dλ at the state before step t."""
        if self.weights is None:
            return adjoint, gradients

        def added():
            at_state = self.problem.outer_gradients(state, self.outer, self.outer_batch)
            parts = zeros_for_none(at_state.state, adjoint), zeros_for_none(at_state.outer, gradients)
            return [[total + part for total, part in zip(totals, _weighted(self.weights[t], part))]
                    for totals, part in zip((adjoint, gradients), parts)]

        return tf.cond(self.weights[t] > 0, added, lambda: [adjoint, gradients])

    def _step_product(self, record, batch, adjoint):
        """adjoint' (∂Φ_t/∂s, ∂Φ_t/∂λ) as a list over the leaves of s and the outer variables, None where independent.

        First through the update (∇L, s, λ) -> (w, slots), then through the inner gradient ∇L(s, λ): with the gradient
        at hand the second part takes its product alone and need not finish computing it. Without `through_gradient`
        the second part is known to be zero: first-order dynamics, and statistics that nothing depends on.
        """
        problem, outer, state = self.problem, self.outer, record.state
        if not self.through_gradient:
            gradients = record.gradients or problem.step_gradients(state, outer, batch)[2]
            return self._update_product(gradients, state, batch, adjoint)[len(gradients):]
        leaves, count = float_leaves(state), len(state.variables)
        after_statistics = count + len(float_leaves(state.state_variables))

        def gradient(inputs):
            at_state = with_float_leaves(state, inputs[:len(leaves)])
            _, state_variables, gradients = problem.step_gradients(at_state, inputs[len(leaves):], batch)
            return gradients + float_leaves(state_variables)

        inner_gradient = autodiff.Linearization(gradient, leaves, list(outer))
        products = self._update_product(record.gradients or inner_gradient.outputs[:count], state, batch, adjoint)
        through_gradient = inner_gradient.product(products[:count] + adjoint[count:after_statistics])
        return [a if b is None else b if a is None else a + b for a, b in zip(products[count:], through_gradient)]

    def _update_product(self, gradients, state, batch, adjoint):
        """adjoint' times the derivative of the update, as a list over the inner gradients, the leaves of s and λ."""
        leaves, count = float_leaves(state), len(state.variables)
        after_statistics = count + len(float_leaves(state.state_variables))

        def update(inputs):
            gradients, inputs = inputs[:count], inputs[count:]
            at_state = with_float_leaves(state, inputs[:len(leaves)])
            return float_leaves(self.problem.updated(gradients, at_state, inputs[len(leaves):], batch))

        return autodiff.transposed_product(
            update, gradients + leaves + list(self.outer), adjoint[:count] + adjoint[after_statistics:])


def _gradients_are_kept(variables, steps):
    """Whether the inner gradients of `steps` steps take little memory. The same with checkpoints and without."""
    sizes = [variable.shape.num_elements() for variable in variables]
    if not isinstance(steps, int) or None in sizes:
        return False
    return steps * sum(size * variable.dtype.size for size, variable in zip(sizes, variables)) <= _KEPT_BYTES


def _statistics_matter(state, adjoint):
    """Whether the outer objective reads a state variable, given its derivatives over `float_leaves` of the state."""
    start = len(state.variables)
    return any(part is not None for part in adjoint[start:start + len(float_leaves(state.state_variables))])


def _weighted(weight, tensors):
    return [tf.cast(weight, tensor.dtype) * tensor for tensor in tensors]


def _is_distribution(weights):
    numbers_alone = isinstance(weights, tuple) and all(checks.is_number(weight) for weight in weights)
    return numbers_alone and min(weights, default=-1) >= 0 and abs(sum(weights) - 1) < 1e-5

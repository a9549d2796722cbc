"""What every hypergradient method shares: the interface, the result, the forward run of the inner training."""

import abc
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core import autodiff, tree
from farhox._core.inner_state import float_leaves
from farhox.data.batches import as_inner_batches, batch_at, num_steps
from farhox.problem.bilevel import BilevelProblem, variable_names
from farhox.problem.features import with_shared_features


class HyperGradientResult(NamedTuple):
    """What one computation of a hypergradient returns.

    Attributes:
        gradients: List of tensors aligned with `problem.outer_variables`, dE/dλ.
        outer_loss: Scalar, E(s_T, λ).
        inner_losses: Tensor [T], the inner objective before each step; when the training stopped early, the last one
            fills the rest.
        state: The inner state s_T; pass it back to go on from there.
        carry: The method's own memory; pass it back together with the state.
        diagnostics: Dictionary of scalar tensors. Always there: "finite" (bool), "inner_gradient_norm" (before the last
            step), "inner_steps" (int, the steps taken), "hypergradient_norm". Implicit methods add the residual and the
            steps of their linear solver.
    """

    gradients: list
    outer_loss: Any
    inner_losses: Any
    state: Any
    carry: Any
    diagnostics: dict


class InnerRun(NamedTuple):
    """The inner training without derivatives.

    Attributes:
        state: The state after the last step.
        losses: `tf.TensorArray` with the inner objective before each step; see `stacked_losses`.
        gradient_norm: Scalar, the norm of the last inner gradient.
        steps: Scalar int32, the index of the step after the last one.
        store: A `StateStore` with the `InnerRecord` of each step, or None.
    """

    state: Any
    losses: Any
    gradient_norm: Any
    steps: Any
    store: Any


class InnerRecord(NamedTuple):
    """What is kept of one inner step for the way back.

    Attributes:
        state: The state before the step.
        gradients: The inner gradient there, or an empty list where it is not kept.
    """

    state: Any
    gradients: list


class Evaluation(NamedTuple):
    """The inner training and the outer objective without derivatives.

    Attributes:
        outer_loss: Scalar, E(s_T, λ).
        inner_losses: Tensor [T], the inner objective before each step.
        state: The inner state s_T.
    """

    outer_loss: Any
    inner_losses: Any
    state: Any


class HyperGradient(abc.ABC):
    """A method that computes dE/dλ. Subclasses are frozen settings."""

    def compute(self, problem, inner_batches, outer_batch, state=None, carry=None):
        """Runs T inner steps and computes the hypergradient. Pure TensorFlow: no variable changes.

        Args:
            problem: A `BilevelProblem`.
            inner_batches: T inner batches: `repeat`, `gather`, or a nest with a leading axis T.
            outer_batch: The batch of the outer objective.
            state: Inner state to start from; default: the initial state Φ_0(λ).
            carry: The method's memory from an earlier result; default: none.

        Returns:
            A `HyperGradientResult`.

        Raises:
            TypeError: If `problem` is not a `BilevelProblem`.
            ValueError: If there is no inner step, or nothing depends on an outer variable; it is named.
        """
        if not isinstance(problem, BilevelProblem):
            raise TypeError(f"problem must be a farhox.BilevelProblem. Received: {problem!r}")
        inner_batches = as_inner_batches(inner_batches)
        outer_batch = tf.nest.map_structure(tf.convert_to_tensor, outer_batch)
        shared = with_shared_features(problem, inner_batches) if self.shares_features else problem
        result = self._compute(shared, inner_batches, outer_batch, state, carry)
        if shared is problem:
            return result
        gradients = shared.through_features(result.gradients)
        return result._replace(gradients=gradients, diagnostics={
            **result.diagnostics, **gradient_diagnostics(gradients, result.outer_loss)})

    @abc.abstractmethod
    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        """`compute` on checked tensors."""

    def evaluate(self, problem, inner_batches, outer_batch):
        """T inner steps from the initial state and the outer objective: an `Evaluation`, no derivative."""
        inner_batches = as_inner_batches(inner_batches)
        problem = with_shared_features(problem, inner_batches)
        outer = problem.outer_values()
        steps = num_steps(inner_batches)
        run = run_inner(
            problem, problem.initial_state(outer), outer, inner_batches, 0, steps, new_losses(problem, steps))
        return Evaluation(problem.outer_loss(run.state, outer, outer_batch), stacked_losses(problem, run), run.state)

    def predict(self, problem, state, outer_batch):
        """Targets, predictions and sample weights (or None) of the outer batch at the state `state`, for metrics."""
        return problem.predict_outer(state, problem.outer_values(), outer_batch)

    # Whether `_compute` may be given a problem with shared features, whose outer values are more than its variables.
    shares_features = False

    # Whether the carry is of use when the inner state starts anew.
    carry_outlives_state = False

    def initial_carry(self, problem):
        """The memory before the first computation, of the structure of `result.carry`: a nest of tensors."""
        del problem
        return []


class StateStore:
    """States of the inner training by their index, inside loops of a graph.

    Args:
        like: A nest of tensors with the structure, types and shapes to store.
        size: Number of entries, int or scalar tensor.
        arrays: For internal use: the tensor arrays of a store that a loop carries.

    Attributes:
        like: As given.
    """

    def __init__(self, like, size=None, arrays=None):
        self.like = like
        self.arrays = arrays if arrays is not None else [
            tf.TensorArray(leaf.dtype, size=size, element_shape=leaf.shape, clear_after_read=False)
            for leaf in tf.nest.flatten(like)]

    def write(self, index, state):
        """The store with `state` at `index`."""
        return StateStore(self.like, arrays=[
            array.write(index, leaf) for array, leaf in zip(self.arrays, tf.nest.flatten(state))])

    def read(self, index):
        """The state at `index`."""
        return tf.nest.pack_sequence_as(self.like, [array.read(index) for array in self.arrays])

    def with_arrays(self, arrays):
        """The same store with the arrays that came out of a loop."""
        return StateStore(self.like, arrays=arrays)


def run_inner(problem, state, outer, inner_batches, start, stop, losses, store=None, norm=None, replay=False):
    """Inner steps `start` to `stop` in one `tf.while_loop`; fewer where the problem's stop tolerance is reached.

    Args:
        problem: A `BilevelProblem`.
        state: The state before step `start`.
        outer: List of tensors, λ.
        inner_batches: The batches; step t uses batch t.
        start, stop: Ints or scalar int32 tensors.
        losses: `tf.TensorArray`; the inner objective before step t is written at t.
        store: A `StateStore` of `InnerRecord`s or None; that of step t is written at t - start.
        norm: The norm of the inner gradient at step start - 1, or None.
        replay: Bool. These steps were taken before: all of them are taken again, whatever the tolerance.

    Returns:
        An `InnerRun`.
    """
    if norm is None:
        norm = norm_before_first_step(problem)

    def body(t, state, losses, norm, arrays):
        result = problem.step(state, outer, batch_at(inner_batches, t))
        if store is not None:
            record = InnerRecord(state, result.gradients if store.like.gradients else [])
            arrays = store.with_arrays(arrays).write(t - start, record).arrays
        return t + 1, result.state, losses.write(t, result.loss), result.gradient_norm, arrays

    steps, state, losses, norm, arrays = tf.while_loop(
        lambda t, state, losses, norm, arrays: t < stop if replay else goes_on(problem, t, stop, norm), body,
        [tf.convert_to_tensor(start, tf.int32), state, losses, norm, [] if store is None else store.arrays],
        parallel_iterations=1)
    return InnerRun(state, losses, norm, steps, None if store is None else store.with_arrays(arrays))


def goes_on(problem, index, stop, norm):
    """Whether a loop over inner training goes on: `index` < `stop`, and `norm` has not fallen below the tolerance."""
    if problem.stop_tolerance is None:
        return index < stop
    # What is not a number is not below.
    return tf.logical_and(index < stop, tf.logical_not(norm < problem.stop_tolerance))


def norm_before_first_step(problem):
    """A norm that lets the first step be taken."""
    return tf.constant(0.0 if problem.stop_tolerance is None else float("inf"), problem.loss_dtype)


def stacked_losses(problem, run):
    """The inner losses of a run as a tensor [T]; after an early stop the last one fills the rest."""
    losses = run.losses.stack()
    if problem.stop_tolerance is None:
        return losses
    return tf.where(tf.range(tf.shape(losses)[0]) < run.steps, losses, losses[run.steps - 1])


def new_losses(problem, steps):
    """An empty `tf.TensorArray` for the inner losses of `steps` steps."""
    return tf.TensorArray(problem.loss_dtype, size=steps, element_shape=[], clear_after_read=False)


def reached_by_step(problem, state, outer, batch):
    """Which outer variables one inner step depends on: a list of bools. In a graph its operations are never run."""
    leaves = float_leaves(state)
    products = autodiff.transposed_product(
        lambda inputs: float_leaves(problem.step(state, inputs, batch).state), list(outer), leaves)
    return [product is not None for product in products]


def gradients_or_error(problem, gradients, reached, reason):
    """The hypergradients, or an error that names the outer variables which nothing depends on.

    Args:
        problem: A `BilevelProblem`.
        gradients: List of tensors aligned with `problem.outer_variables`.
        reached: List of bools: whether anything that was computed depends on the variable.
        reason: What the method sees, the end of the error message.

    Raises:
        ValueError: If a variable is not reached.
    """
    missing = [variable for variable, ok in zip(problem.outer_variables, reached)
               if not ok and not problem.is_reached_by_features(variable)]
    if missing:
        raise ValueError(f"Every outer variable must have an effect that the method can see. Nothing that was computed "
                         f"depends on {variable_names(missing)}. {reason}")
    return gradients


def add_initial_dynamics(problem, outer, adjoint, gradients, reached):
    """gradients + (∂Φ_0/∂λ)' adjoint; `reached` is updated in place with the variables that Φ_0 depends on."""
    products = autodiff.transposed_product(
        lambda inputs: float_leaves(problem.initial_state(inputs)), list(outer), adjoint)
    for i, product in enumerate(products):
        reached[i] = reached[i] or product is not None
    return [total if product is None else total + product for total, product in zip(gradients, products)]


def zeros_for_none(products, like):
    """The products, zero tensors where there is none."""
    return [tf.zeros_like(leaf) if product is None else product for product, leaf in zip(products, like)]


def common_diagnostics(gradients, outer_loss, run):
    """The diagnostics that every method reports."""
    return {"inner_gradient_norm": run.gradient_norm, "inner_steps": run.steps,
            **gradient_diagnostics(gradients, outer_loss)}


def gradient_diagnostics(gradients, outer_loss):
    """The diagnostics of the hypergradient alone."""
    return {"finite": tf.logical_and(tree.is_finite(gradients), tf.math.is_finite(outer_loss)),
            "hypergradient_norm": tree.norm(gradients)}

"""One inner training: a problem, a start and T batches, with the step traced once into a graph.

Every method runs, walks back along or pushes tangents through the same graph, so that there is one training: what
Python or a random generator draws while it is traced is the same in all directions, and what was mended in the graph is
mended everywhere.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from farhox._core import tree
from farhox._core.few import FewTensors, is_few
from farhox._core.inner_state import InnerState, float_leaves, with_float_leaves
from farhox._core.linearized import LinearizedMap
from farhox._core.refusals import check_compared_draws, check_operations
from farhox._core.step_graph import StepGraph
from farhox._core.types import Batch, InnerBatches, Nest, Objective, Tensor, Tensors, Variables
from farhox.data.batches import RepeatedBatch, as_inner_batches, batch_at, num_steps
from farhox.problem.outer_graph import OuterGraph

if TYPE_CHECKING:
    from farhox.problem.bilevel import BilevelProblem


class InnerRun(NamedTuple):
    """A part of the inner training.

    Attributes:
        state: The state after the last step.
        losses: `tf.TensorArray` or `FewTensors` with the inner objective before each step.
        gradient_norm: Scalar, the norm of the last inner gradient.
        steps: Scalar int32, the index of the step after the last one.
        record: The `Record` of these steps, or None.
    """

    state: InnerState
    losses: Tensor
    gradient_norm: Tensor
    steps: Tensor
    record: Any = None


class InnerTraining:
    """T steps of inner training from one state, and the derivatives of a step.

    A method runs the training, asks for products at its steps, and makes its result:

    ```python
    training = InnerTraining(problem, inner_batches, state)
    run = training.run()
    at_end = training.outer_gradients(run.state, outer_batch)
    ```

    Derivatives are over `leaves`, the floating-point tensors of an inner state, and over `parameters`: the values of
    the outer variables and, after them, features of the batch that all steps share.

    Args:
        problem: A `BilevelProblem`.
        inner_batches: T inner batches.
        state: Inner state to start from; default: the initial state Φ_0(λ).
        outer: List of tensors, λ; default: the current values of the outer variables.
        share_features: Bool. Compute the problem's features once where all steps have the same batch.
        iteration: The number of the hyper-iteration.

    Attributes:
        problem, inner_batches: As given.
        outer: List of tensors, λ.
        parameters: List of tensors, see above.
        steps: T, an int where it is static, else a scalar int32 tensor.
        start: The state before the first step.
        from_initial_state: Bool, whether that is Φ_0(λ).
        iteration: Scalar int64 tensor, as given.
    """

    def __init__(self, problem: BilevelProblem, inner_batches: InnerBatches, state: Any = None, outer: Any = None,
                 share_features: bool = True, iteration: int | Tensor = 0) -> None:
        self.problem = problem
        self.iteration = tf.cast(iteration, tf.int64)
        self._found = {}
        self._must_be_seen = {id(variable) for variable in problem.outer_variables}
        self.inner_batches = as_inner_batches(inner_batches)
        self.outer = problem.outer_values() if outer is None else outer
        self.steps = num_steps(self.inner_batches)
        self.from_initial_state = state is None
        self.start = problem.initial_state(self.outer) if state is None else state
        self._tolerance = problem.tolerance(self.iteration)
        self._feature_graph: Any = None
        self._features: Any = None
        if share_features and problem.has_features and isinstance(self.inner_batches, RepeatedBatch):
            batch = self.inner_batches.batch
            values = self.outer + tf.nest.flatten(batch)
            self._feature_graph = StepGraph(
                lambda inputs: problem.features(
                    tf.nest.pack_sequence_as(batch, inputs[len(self.outer):]), inputs[:len(self.outer)]), values)
            check_operations(self._feature_graph, self._feature_graph.outputs)
            self._features = self._feature_graph.nest(self._feature_graph.outputs, values, checks=True)
        self.parameters = self.outer + ([] if self._features is None else float_leaves(self._features))

    def under(self, outer_objective: Objective, outer_variables: Variables) -> InnerTraining:
        """The same training under another outer objective; what was found by `once` stays.

        Args:
            outer_objective: Callable `batch -> scalar`.
            outer_variables: List of those of the problem's that this objective is for. Others that nothing depends on
                under it have a hypergradient of zero.
        """
        other = copy.copy(self)
        other.problem = self.problem.under(outer_objective)
        other._must_be_seen = {id(variable) for variable in outer_variables}
        return other

    def once(self, key: Any, function: Callable[[], Any]) -> Any:
        """`function()`, computed once for this training and those `under` other objectives.

        Args:
            key: Hashable, what names the result.
        """
        if key not in self._found:
            self._found[key] = function()
        return self._found[key]

    # The training without derivatives.

    def run(self, start: Any = 0, stop: Any = None, earlier: Any = None, record: Any = None,
            replay: bool = False) -> InnerRun:
        """Steps `start` to `stop` in one loop, a few written out; fewer where the problem's stop tolerance is reached.

        Args:
            start, stop: Ints or scalar int32 tensors. Default: all T steps.
            earlier: The `InnerRun` of the steps before. Default: none were taken.
            record: An empty `Record` for these steps, or None.
            replay: Bool. These steps were taken before: all of them are taken again, whatever the tolerance.

        Returns:
            An `InnerRun`.
        """
        if stop is None and earlier is None and record is None:
            return self.once("run", lambda: self._run_steps(start, self.steps, None, None, replay))
        return self._run_steps(start, self.steps if stop is None else stop, earlier, record, replay)

    def _run_steps(self, start, stop, earlier, record, replay):
        # Losses of all steps written out are in no array.
        in_row = self.writes_out(start, stop) and start == 0 and stop is self.steps
        earlier = self.before_first_step(in_row) if earlier is None else earlier
        if record is None and isinstance(start, int) and isinstance(stop, int) and stop <= start:
            # A loop that is never entered would be traced and optimized all the same.
            return earlier._replace(steps=tf.constant(start))
        kept = [] if record is None else record.kept

        def body(t, state, losses, norm, arrays):
            state, loss, norm, kept_values = self.step(state, t, kept)
            if record is not None:
                arrays = record.with_arrays(arrays).written(t - start, state, kept_values).arrays
            return t + 1, state, losses.write(t, loss), norm, arrays

        if self.writes_out(start, stop):
            arrays = [] if record is None else record.written_first(earlier.state).arrays
            state, losses, norm = earlier.state, earlier.losses, earlier.gradient_norm
            for t in range(start, stop):
                _, state, losses, norm, arrays = body(t, state, losses, norm, arrays)
            return InnerRun(state, losses, norm, tf.constant(stop),
                            None if record is None else record.with_arrays(arrays))

        arrays = [] if record is None else record.written_first(earlier.state).arrays
        steps, state, losses, norm, arrays = tf.while_loop(
            lambda t, state, losses, norm, arrays: t < stop if replay else self.goes_on(t, stop, norm), body,
            [tf.convert_to_tensor(start, tf.int32), earlier.state, earlier.losses, earlier.gradient_norm, arrays],
            parallel_iterations=1)
        return InnerRun(state, losses, norm, steps, None if record is None else record.with_arrays(arrays))

    def writes_out(self, start: Any, stop: Any) -> bool:
        """Whether the steps `start` to `stop` are so few that no loop is made of them."""
        return (isinstance(start, int) and isinstance(stop, int) and is_few(stop - start)
                and self.problem.stop_tolerance is None)

    def before_first_step(self, in_row: bool = False) -> InnerRun:
        """The `InnerRun` of no step; its losses will be `FewTensors` with `in_row`."""
        # A norm that lets the first step be taken.
        norm = 0.0 if self.problem.stop_tolerance is None else float("inf")
        losses: Any = FewTensors() if in_row else tf.TensorArray(
            self.problem.loss_dtype, size=self.steps, element_shape=[], clear_after_read=False)
        return InnerRun(self.start, losses, tf.constant(norm, self.problem.loss_dtype), tf.constant(0))

    def goes_on(self, index: Any, stop: Any, norm: Tensor) -> Tensor:
        """Whether a loop over steps goes on: `index` < `stop`, and `norm` has not fallen below the tolerance."""
        if self.problem.stop_tolerance is None:
            return index < stop
        # What is not a number is not below.
        return tf.logical_and(index < stop, tree.not_less(norm, tf.cast(self._tolerance, norm.dtype)))

    def step(self, state: Any, t: Tensor, kept: Nest = (), known: Any = ()) -> Any:
        """The step t from `state`: the next state, the loss and the gradient norm before it, the tensors `kept`.

        Args:
            kept: List of tensors of `graph`.
            known: List of pairs (tensor of `graph`, its value at this step): they are not computed again.
        """
        if tf.executing_eagerly() and not kept:  # Functions run eagerly: for debugging the user's objective.
            result = self.problem.step(state, self.outer, batch_at(self.inner_batches, t), self._features)
            return result.state, result.loss, result.gradient_norm, []
        outputs = self.graph.outputs
        flat = [*tf.nest.flatten(outputs.state), outputs.loss, outputs.gradient_norm, *kept]
        values = self.graph.nest(flat, self.inputs(state, t), known, checks=True)
        count = len(flat) - len(kept) - 2
        return tf.nest.pack_sequence_as(state, values[:count]), values[count], values[count + 1], values[count + 2:]

    def inner_gradients(self, state: Any, t: Tensor) -> Tensors:
        """The first half of the step t at `state`.

        Returns:
            A flat list: the loss, the gradient norm, the inner gradients, the next state variables.
        """
        outputs = self.graph.outputs
        wanted = [outputs.loss, outputs.gradient_norm, *outputs.gradients, *outputs.state.state_variables]
        return self.graph.nest(wanted, self.inputs(state, t))

    def losses(self, run: InnerRun) -> Tensor:
        """The inner losses of a run as a tensor [T]; after an early stop the last one fills the rest."""
        losses = run.losses.stack()
        if self.problem.stop_tolerance is None:
            return losses
        return tf.where(tf.range(tf.shape(losses)[0]) < run.steps, losses, losses[run.steps - 1])

    # The graph of a step.

    @property
    def graph(self) -> StepGraph:
        """The `StepGraph` of a step. Its outputs are a `StepResult`; see `inputs` for what it is given."""
        return self.once("graph", self._traced)

    def _traced(self):
        batch = batch_at(self.inner_batches, 0)
        self.problem.last_batch = tf.nest.map_structure(lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), batch)
        counts = [len(tf.nest.flatten(self.start)), len(self.parameters)]

        def step(inputs):
            state = tf.nest.pack_sequence_as(self.start, inputs[:counts[0]])
            parameters = inputs[counts[0]:sum(counts)]
            features = self._features
            if features is not None:
                features = with_float_leaves(features, parameters[len(self.outer):])
            return self.problem.step(state, parameters[:len(self.outer)],
                                     tf.nest.pack_sequence_as(batch, inputs[sum(counts):]), features)

        graph = StepGraph(step, tf.nest.flatten(self.start) + self.parameters + tf.nest.flatten(batch))
        check_operations(graph, graph.outputs)
        given = graph.inputs[counts[0]:counts[0] + len(self.outer)]
        check_compared_draws(graph.inside(float_leaves(graph.outputs.state)), given,
                             [variable.name for variable in self.problem.outer_variables])
        return graph

    def inputs(self, state: Any, t: Tensor) -> Any:
        """What the graph of a step is given, a flat list: the state, the parameters, the batch of step t."""
        return tf.nest.flatten(state) + self.parameters + tf.nest.flatten(batch_at(self.inner_batches, t))

    @property
    def leaf_inputs(self) -> Tensors:
        """The tensors of `graph` in the place of the leaves of the state."""
        return [x for x in self.graph.inputs[:len(tf.nest.flatten(self.start))] if x.dtype.is_floating]

    @property
    def parameter_inputs(self) -> Tensors:
        """The tensors of `graph` in the place of the parameters."""
        start = len(tf.nest.flatten(self.start))
        return self.graph.inputs[start:start + len(self.parameters)]

    @property
    def leaf_outputs(self) -> Tensors:
        """The tensors of `graph` that are the leaves of the next state."""
        return float_leaves(self.graph.outputs.state)

    def gradient_system(self, state: Any, t: Tensor) -> LinearizedMap:
        """The inner gradient as a function of (w, parameters) at `state` on the batch of step t, as a `LinearizedMap`.

        Its products are those of ∇²_ww L and ∇²_wλ L, proximal term included.
        """
        return LinearizedMap(self.graph, self.inputs(state, t), self.leaf_inputs[:len(state.variables)],
                             self.parameter_inputs, self.graph.outputs.gradients, list(state.variables))

    def step_system(self, state: Any, t: Tensor) -> LinearizedMap:
        """The step t as a function of (s, parameters) at `state`, as a `LinearizedMap` over the leaves."""
        return LinearizedMap(self.graph, self.inputs(state, t), self.leaf_inputs, self.parameter_inputs,
                             self.leaf_outputs, float_leaves(state))

    def update_system(self, state: Any, t: Tensor) -> LinearizedMap:
        """The next inner variables as a function of (inner gradient, parameters), as a `LinearizedMap`.

        The gradient is an input like any other: products with the parameters do not pass through it.
        """
        graph = self.graph
        gradients = graph.inside(graph.outputs.gradients)
        return LinearizedMap(graph, self.inputs(state, t), gradients, self.parameter_inputs,
                             list(graph.outputs.state.variables), list(state.variables), held=gradients)

    def mixed_difference(self, state: Any, t: Tensor, direction: Tensors, distance: Tensor) -> Any:
        """(∂g/∂λ)' direction, of the inner gradient g on the batch of step t, by a central difference in w.

        Values under `tf.stop_gradient` stay those at `state`: g is the gradient with them held.

        Args:
            direction: List of tensors aligned with the inner variables.
            distance: Scalar tensor, the length of the step along the direction.

        Returns:
            List aligned with the parameters, None where the inner objective does not depend.
        """
        graph, loss = self.graph, self.graph.outputs.loss
        (one,) = graph.placeholders([loss])
        products = graph.pullback([loss], self.parameter_inputs, [one])
        needed = graph.ancestors([product for product in products if product is not None])
        stops = [operation.outputs[0] for operation in graph.graph.get_operations()
                 if operation.type == "StopGradient" and operation.name in needed]
        values = self.inputs(state, t)
        held = list(zip(stops, graph.nest(stops, values)))

        def at(sign):
            moved = [w + tf.cast(sign * distance, w.dtype) * d for w, d in zip(state.variables, direction)]
            feeds = [*zip(graph.inputs, moved), *held, (one, tf.ones([], loss.dtype))]
            return graph.nest(products, values, feeds)

        return [None if plus is None else (plus - minus) / tf.cast(2.0 * distance, plus.dtype)
                for plus, minus in zip(at(1.0), at(-1.0))]

    @property
    def has_stops(self) -> bool:
        """Whether a part of the inner objective is under `tf.stop_gradient`."""
        needed = self.graph.ancestors(self.graph.outputs.gradients)
        return any(operation.type == "StopGradient" for operation in self.graph.operations(needed))

    @property
    def learns_initial_state(self) -> bool:
        """Whether the training starts from Φ_0(λ), and that depends on λ."""
        return self.from_initial_state and self.once("learns initial state", lambda: any(
            self.initial_system().depends_on()))

    def initial_system(self) -> LinearizedMap:
        """Φ_0 as a function of λ, as a `LinearizedMap` without inputs over the leaves of the state."""
        graph = StepGraph(lambda outer: float_leaves(self.problem.initial_state(outer)), self.outer)
        return LinearizedMap(graph, self.outer, [], list(graph.inputs), graph.outputs, float_leaves(self.start))

    # The outer objective.

    def outer_graph(self, outer_batch: Batch) -> OuterGraph:
        """The outer objective and its derivatives, traced once: a callable state -> `OuterGradients`.

        Its attribute `depends` is a list of bools, whether the objective reads each leaf of the state.
        """
        return OuterGraph(self, outer_batch)

    def outer_gradients(self, state: Any, outer_batch: Batch) -> Any:
        """The outer objective and its derivatives at `state`, as `OuterGradients`."""
        return self.problem.outer_gradients(state, self.outer, outer_batch)

    # The result.

    def gradients(self, *parts: Any, adjoint: Tensor | None = None, sees: Any) -> Tensors:
        """The hypergradient: the sum of its parts, what came through shared features, and (∂Φ_0/∂λ)' adjoint.

        Args:
            *parts: Lists aligned with `parameters` (or with `outer`), None where nothing depends.
            adjoint: dE/ds_0 over the leaves, or None where Φ_0 does not count.
            sees: What the method sees, the end of the error message.

        Raises:
            ValueError: If an outer variable is not reached; it is named.
        """
        padded = [list(part) + [None] * (len(self.parameters) - len(part)) for part in parts]
        total = [_sum(column) for column in zip(*padded)]
        own, of_features = total[:len(self.outer)], total[len(self.outer):]
        if of_features:
            own = [_sum(pair) for pair in zip(own, self._through_features(of_features))]
        if adjoint is not None and self.from_initial_state:
            own = [_sum(pair) for pair in zip(own, self.initial_system().parameter_product(adjoint))]
        missing = [variable for variable, part in zip(self.problem.outer_variables, own)
                   if part is None and id(variable) in self._must_be_seen]
        if missing and not self.problem.allow_unused:
            names = ", ".join(repr(variable.path) for variable in missing)
            raise ValueError("Every outer variable must have an effect that the method can see. Nothing that was "
                             f"computed depends on {names}. {sees} With allow_unused=True of the problem such "
                             "variables stay as they are.")
        return [tf.zeros_like(value) if part is None else part for value, part in zip(self.outer, own)]

    def _through_features(self, gradients):
        graph = self._feature_graph
        outputs = float_leaves(graph.outputs)
        cotangents = [None if gradient is None else placeholder
                      for gradient, placeholder in zip(gradients, graph.placeholders(outputs))]
        products = graph.pullback(outputs, graph.inputs[:len(self.outer)], cotangents)
        feeds = [(cotangent, gradient) for cotangent, gradient in zip(cotangents, gradients) if cotangent is not None]
        values = self.outer + tf.nest.flatten(self.inner_batches.batch)
        return graph.nest(products, values, feeds)

    def diagnostics(self, gradients: Tensors, outer_loss: Tensor, run: InnerRun) -> dict[str, Tensor]:
        """The diagnostics that every method reports."""
        found = {"inner_gradient_norm": run.gradient_norm, "inner_steps": run.steps,
                 **gradient_diagnostics(gradients, outer_loss)}
        if "graph" in self._found and self.graph.is_copied:
            found["step_is_copied"] = tf.constant(True)
        return found


def gradient_diagnostics(gradients: Tensors, outer_loss: Tensor) -> dict[str, Tensor]:
    """The diagnostics of the hypergradient alone."""
    return {"finite": tf.logical_and(tree.is_finite(gradients), tf.math.is_finite(outer_loss)),
            "hypergradient_norm": tree.norm(gradients)}


def _sum(parts):
    present = [part for part in parts if part is not None]
    return functools.reduce(tf.add, present) if present else None


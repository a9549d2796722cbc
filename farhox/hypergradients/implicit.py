"""ImplicitHG: the implicit function theorem at the end of the inner training."""

import dataclasses
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core import autodiff, checks, tree
from farhox._core.inner_state import float_leaves, with_float_leaves
from farhox.data.batches import batch_at, num_steps
from farhox.hypergradients.base import (
    HyperGradient,
    HyperGradientResult,
    common_diagnostics,
    gradients_or_error,
    new_losses,
    run_inner,
    stacked_losses,
)
from farhox.linear_solvers import ConjugateGradient, FixedPoint, LinearOperator, LinearSolver
from farhox.problem.bilevel import variable_names

_SYSTEMS = ("objective", "dynamics")
_SEES = {
    "objective": (
        "ImplicitHG sees what the inner and the outer objective depend on, at the end of the inner training. What acts "
        "in the dynamics alone and moves their fixed point, as a decoupled weight decay, is seen with "
        'ImplicitHG(system="dynamics"). A learning rate or another setting of the dynamics, and an initial value '
        "without a proximal term, act through the path: use ReverseHG or ForwardHG for them (for initial values also "
        "BilevelProblem(proximal=...))."),
    "dynamics": (
        'ImplicitHG sees with system="dynamics" what the inner and the outer objective depend on, and settings of the '
        "dynamics that move their fixed point. Settings that are without effect where the inner gradient is zero, as a "
        "learning rate, and an initial value without a proximal term, act through the path: use ReverseHG or ForwardHG "
        "for them (for initial values also BilevelProblem(proximal=...))."),
}


@dataclasses.dataclass(frozen=True)
class ImplicitHG(HyperGradient):
    """Hypergradient by the implicit function theorem at s_T: a linear system in the place of the path.

    Nothing of the path is kept, so memory does not grow with T, and the result is exact when inner training has
    converged. Any solver solves either of two systems:

    - `system="objective"`: (∇²_ww L) v = dE/dw, hypergradient dE/dλ - (∇²_wλ L)' v, where L is the inner objective on
      the last inner batch at the last state, proximal term included. Symmetric. Statistics of batch norm count as
      constants. At a minimum on the border of a Keras constraint it does not hold: such problems are refused.
    - `system="dynamics"`: (I - A') v = dE/ds, hypergradient dE/dλ + B' v, where A and B are the derivatives of the last
      inner step with respect to the whole inner state and to λ: the fixed point of whatever dynamics, with constraints,
      decoupled weight decay, thresholds and statistics. Not symmetric in general.

    `result.carry` holds v, the number of hyper-iterations and the memory of the solver; passed back, v is where the
    solver starts, and the number is what schedules go by. A solution that failed is not carried on: the next system is
    solved anew.

    The diagnostics have `solver_residual`, `solver_steps` (products with the matrix), `solver_failed`, and
    `stationarity_gap`: how far the inner training has to go yet, along what the outer objective sees of it, relative
    to the norm of the inner variables: |v'(s_∞ - s_T)| to first order, over ||dE/ds|| and the norm. Well below 1e-2 the
    result is that of a stationary point.

    Args:
        linear_solver: A `LinearSolver`.
        damping: Non-negative float added to the diagonal of the system.
        warm_start: Bool. Start the solver from the carried v.
        system: "objective" or "dynamics". Default: the objective; the dynamics with `FixedPoint`, which iterates on
            them.

    Raises:
        TypeError: If `linear_solver` is not one.
        ValueError: If the damping is negative or `system` neither; when computing: if an outer variable is not seen, or
            the system is that of the objective and an inner variable has a Keras constraint, or the dynamics have a
            proximal step or a weight decay.

    Reference:
        [Pedregosa, 2016](https://arxiv.org/abs/1602.02355), Algorithm 1;
        [Rajeswaran et al., 2019](https://arxiv.org/abs/1909.04630) (with the proximal term);
        [Grazzi et al., 2020](https://arxiv.org/abs/2006.16218) (the dynamics' fixed point).
    """

    linear_solver: Any = ConjugateGradient()
    damping: float = 0.0
    warm_start: bool = True
    system: Any = None

    shares_features = True
    carry_outlives_state = True

    def __post_init__(self):
        if not isinstance(self.linear_solver, LinearSolver):
            raise TypeError("linear_solver must be one of farhox' solvers, for example farhox.ConjugateGradient(). "
                            f"Received: {self.linear_solver!r}")
        checks.non_negative_number("damping", self.damping)
        if self.system is not None and self.system not in _SYSTEMS:
            raise ValueError(f'system must be "objective", "dynamics" or None. Received: {self.system!r}')

    @property
    def solved_system(self):
        """The system that is solved: that asked for, or the default of the solver."""
        return self.system or ("dynamics" if isinstance(self.linear_solver, FixedPoint) else "objective")

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        solver, on_dynamics = self.linear_solver, self.solved_system == "dynamics"
        if not on_dynamics and problem.constrained_variables:
            raise ValueError(
                'ImplicitHG(system="objective") needs inner variables without constraints: at the border of one the '
                "inner gradient is not zero. The fixed point of the dynamics includes constraints: use "
                'ImplicitHG(system="dynamics"). '
                f"Received constraints on {variable_names(problem.constrained_variables)}")
        if not on_dynamics and not problem.dynamics.zero_gradient_is_stationary:
            raise ValueError(
                'ImplicitHG(system="objective") needs dynamics that rest where the inner gradient is zero. '
                f"{type(problem.dynamics).__name__} does not here, because of a penalty or a weight decay that is no "
                'part of the inner objective. Use ImplicitHG(system="dynamics"), for example '
                "ImplicitHG(farhox.FixedPoint(max_steps=1000)).")
        outer = problem.outer_values()
        steps = num_steps(inner_batches)
        first = problem.initial_state(outer) if state is None else state
        run = run_inner(problem, first, outer, inner_batches, 0, steps, new_losses(problem, steps))
        at_end = problem.outer_gradients(run.state, outer, outer_batch)
        batch = batch_at(inner_batches, run.steps - 1)

        build = _dynamics_system if on_dynamics else _objective_system
        system = build(problem, run.state, outer, batch, at_end, self.damping, solver.uses_transposed)
        gradients_or_error(problem, outer, system.sees, _SEES[self.solved_system])

        unknowns = system.unknowns
        rhs = tree.ravel([tf.zeros_like(leaf) if part is None else part
                          for part, leaf in zip(at_end.state, unknowns)])  # The objective's are the first leaves.
        initial, iteration, *memory = carry if carry else self._initial_carry(rhs)
        arguments = {"memory": memory} if memory else {}
        solution = solver.solve(
            system.operator, rhs, initial if self.warm_start and carry else None, iteration, **arguments)
        products = system.parameter_product(tree.unravel(solution.vector, unknowns))
        gradients = [_sum(explicit, product, value)
                     for explicit, product, value in zip(at_end.outer, products, outer)]

        size = tf.maximum(tree.norm(first.variables), tree.norm(run.state.variables))
        scale = tf.norm(rhs) * tf.cast(size, rhs.dtype)
        gap = tf.math.divide_no_nan(tf.abs(tf.reduce_sum(solution.vector * tree.ravel(system.distance))), scale)
        diagnostics = common_diagnostics(gradients, at_end.loss, run)
        diagnostics.update(solver_residual=solution.residual, solver_steps=solution.steps,
                           solver_failed=solution.failed, stationarity_gap=gap)
        good = tf.logical_not(solution.failed)
        carry = [tf.where(good, solution.vector, tf.zeros_like(rhs)), iteration + 1, *tf.nest.flatten(solution.memory)]
        return HyperGradientResult(gradients, at_end.loss, stacked_losses(problem, run), run.state, carry, diagnostics)

    def initial_carry(self, problem):
        state = problem.initial_state()
        unknowns = float_leaves(state) if self.solved_system == "dynamics" else state.variables
        return self._initial_carry(tree.ravel(unknowns))

    def _initial_carry(self, like):
        return [tf.zeros_like(like), tf.constant(0, tf.int64),
                *tf.nest.flatten(self.linear_solver.initial_memory(like))]


class _System(NamedTuple):
    """A linear system of the implicit function theorem.

    Attributes:
        unknowns: List of tensors, of the shapes of v.
        operator: `LinearOperator` on flat vectors, damping included.
        parameter_product: Callable, list v to the list of its products that the hypergradient adds; None for none.
        distance: List of tensors like the unknowns, such that v'distance is to first order what E changes by on the way
            to the stationary point.
        sees: List of bools: whether the hypergradient of each outer value is seen.
    """

    unknowns: list
    operator: Any
    parameter_product: Any
    distance: list
    sees: list


def _objective_system(problem, state, outer, batch, at_end, damping, with_transposed):
    """∇²_ww L v = dE/dw, from the inner gradient as a function of (w, λ), recorded once."""
    del with_transposed  # The matrix is symmetric.
    gradient = _inner_gradient(problem, state, outer, batch)

    def product(vector):
        return tree.ravel(gradient.input_product(tree.unravel(vector, gradient.inputs))) + damping * vector

    def parameter_product(v):
        return [None if part is None else -part for part in gradient.parameter_product(v)]

    return _System(gradient.inputs, LinearOperator(product), parameter_product,
                   [-part for part in gradient.outputs], _seen_by_objectives(gradient, at_end))


def _dynamics_system(problem, state, outer, batch, at_end, damping, with_transposed):
    """(I - A') v = dE/ds, from one inner step as a function of (s, λ), recorded once: the last step, taken at its end.

    Schedules and bias corrections are those of the last step too; there may be none for the step after it.
    """
    state = state._replace(step=state.step - 1)
    leaves = float_leaves(state)

    def step(inputs):
        at_state = with_float_leaves(state, inputs[:len(leaves)])
        return float_leaves(problem.step(at_state, inputs[len(leaves):], batch).state)

    linearization = autodiff.Linearization(step, leaves, list(outer))

    def product(vector):
        moved = linearization.input_product(tree.unravel(vector, leaves))
        return vector - tree.ravel(moved) + damping * vector

    def transposed(vector):
        return vector - tree.ravel(forward.product(tree.unravel(vector, leaves))) + damping * vector

    if with_transposed:  # Recorded here, since a loop of the solver would record it anew in each iteration.
        forward = autodiff.ForwardLinearization(lambda inputs: (step([*inputs, *outer]), ()), leaves)
    sees = _seen_by_objectives(_inner_gradient(problem, state, outer, batch), at_end)
    if not all(sees):
        sees = [seen or moved for seen, moved in zip(sees, _moves_the_fixed_point(problem, len(outer)))]
    return _System(leaves, LinearOperator(product, transposed), linearization.parameter_product,
                   tree.subtract(linearization.outputs, leaves), sees)


def _inner_gradient(problem, state, outer, batch):
    """The inner gradient as a function of (w, λ), recorded once: its products are those of ∇²_ww L and ∇²_wλ L."""
    count = len(state.variables)

    def gradient(inputs):
        return problem.inner_gradients(inputs[:count], state.state_variables, inputs[count:], batch)[2]

    return autodiff.Linearization(gradient, list(state.variables), list(outer))


def _seen_by_objectives(gradient, at_end):
    """Which outer values the inner gradient or the outer objective depends on: a list of bools."""
    return [inner is not None or explicit is not None
            for inner, explicit in zip(gradient.parameter_product(gradient.outputs), at_end.outer)]


def _moves_the_fixed_point(problem, count):
    """Which outer values move the inner variables where the inner gradient is zero: a list of `count` bools.

    A learning rate or a momentum acts on the step through the gradient alone. At a stationary point it changes nothing,
    and its hypergradient would be a zero that says nothing of its effect on the path.
    """
    if problem.dynamics.needs_objective:
        return [False] * count  # A line search does not move where the gradient is zero.
    # Values, also while a graph is traced; they depend on no batch. Tapes do not record there.
    with tf.init_scope():
        outer = [tf.convert_to_tensor(variable) for variable in problem.outer_variables]
        state = problem.initial_state(outer)
        # Anywhere but at zero, where a weight decay would be without effect.
        state = state._replace(variables=[
            tf.cast(tf.random.stateless_uniform(leaf.shape, [0, i], 0.5, 1.5), leaf.dtype)
            for i, leaf in enumerate(state.variables)])
        zeros = [tf.zeros_like(leaf) for leaf in state.variables]

        def updated(values):
            return tree.ravel(problem.updated(zeros, state, values, None)[0])

        here = updated(outer)
        moves = [bool(tf.reduce_any(tf.not_equal(here, updated([*outer[:i], value + 0.125, *outer[i + 1:]]))))
                 for i, value in enumerate(outer)]
    return moves + [False] * (count - len(moves))


def _sum(explicit, product, like):
    total = tf.zeros_like(like) if explicit is None else explicit
    return total if product is None else total + product

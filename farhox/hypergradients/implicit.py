"""ImplicitHG: the implicit function theorem at the end of the inner training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from farhox._core import checks, tree
from farhox._core.inner_state import float_leaves
from farhox._core.types import Batch, Carry
from farhox.data.batches import RepeatedBatch
from farhox.hypergradients.base import Memory, SingleHyperGradient, result
from farhox.linear_solvers import ConjugateGradient, FixedPoint, LinearOperator, LinearSolver
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.inner_training import InnerTraining
from farhox.problem.maps import variable_names

if TYPE_CHECKING:
    from farhox.hypergradients.base import HyperGradientResult

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
class ImplicitHG(SingleHyperGradient):
    """Hypergradient by the implicit function theorem at s_T: a linear system in the place of the path.

    Nothing of the path is kept, so memory does not grow with T, and the result is exact when inner training has
    converged. Any solver solves either of two systems:

    - `system="objective"`: (∇²_ww L) v = dE/dw, hypergradient dE/dλ - (∇²_wλ L)' v, where L is the inner objective on
      the last inner batch at the last state, proximal term included. Symmetric. Statistics of batch norm count as
      constants. At a minimum on the border of a Keras constraint it does not hold: such problems are refused.
    - `system="dynamics"`: (I - A') v = dE/ds, hypergradient dE/dλ + B' v, where A and B are the derivatives of the last
      inner step with respect to the whole inner state and to λ: the fixed point of whatever dynamics, with constraints,
      decoupled weight decay, thresholds and statistics. Not symmetric in general.

    `result.carry` holds v and the memory of the solver; passed back, v is where the solver starts. A solution that
    failed is not carried on: the next system is solved anew. Schedules of the solver go by `compute(iteration=)`.

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
        system_batch: Callable, outer batch -> inner batch: the examples that the system of the objective is made on,
            where those of the last inner step say too little. Default: these.

    Raises:
        TypeError: If `linear_solver` is not one or `system_batch` not callable.
        ValueError: If the damping is negative, `system` neither, or `system_batch` comes with the system of the
            dynamics; when computing: if an outer variable is not seen, or the system is that of the objective and an
            inner variable has a Keras constraint, or the dynamics have a proximal step or a weight decay.

    Reference:
        [Pedregosa, 2016](https://arxiv.org/abs/1602.02355), Algorithm 1;
        [Rajeswaran et al., 2019](https://arxiv.org/abs/1909.04630) (with the proximal term);
        [Grazzi et al., 2020](https://arxiv.org/abs/2006.16218) (the dynamics' fixed point).
    """

    linear_solver: LinearSolver = ConjugateGradient()
    damping: float = 0.0
    warm_start: bool = True
    system: str | None = None
    system_batch: Callable[..., Any] | None = None

    remembers = Memory.ALWAYS

    def __post_init__(self):
        if not isinstance(self.linear_solver, LinearSolver):
            raise TypeError("linear_solver must be one of farhox' solvers, for example farhox.ConjugateGradient(). "
                            f"Received: {self.linear_solver!r}")
        checks.non_negative_number("damping", self.damping)
        if self.system is not None and self.system not in _SYSTEMS:
            raise ValueError(f'system must be "objective", "dynamics" or None. Received: {self.system!r}')
        if self.system_batch is not None and not callable(self.system_batch):
            raise TypeError("system_batch must be a callable outer batch -> inner batch. "
                            f"Received: {self.system_batch!r}")
        if self.system_batch is not None and self.solved_system == "dynamics":
            raise ValueError('system_batch needs ImplicitHG(system="objective"): the fixed point of the dynamics is '
                             "one of their last step, on the last inner batch.")

    @property
    def shares_features(self) -> bool:
        """Whether features of the batch may be computed once: not where the system is made on another batch."""
        return self.system_batch is None

    @property
    def solved_system(self) -> str:
        """The system that is solved: that asked for, or the default of the solver."""
        return self.system or ("dynamics" if isinstance(self.linear_solver, FixedPoint) else "objective")

    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        problem, solver, on_dynamics = training.problem, self.linear_solver, self.solved_system == "dynamics"
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
                "ImplicitHG(farhox.linear_solvers.FixedPoint(max_steps=1000)).")
        run = training.run()
        at_end = training.outer_gradients(run.state, outer_batch)
        if on_dynamics:
            system = _dynamics_system(training, run, self.damping)
        else:
            at_end_of, t = training, run.steps - 1
            if self.system_batch is not None:  # Traced for its own shapes.
                batch = RepeatedBatch(self.system_batch(outer_batch), tf.range(1))
                at_end_of, t = InnerTraining(problem, batch, run.state, training.outer, share_features=False), 0
            system = _objective_system(at_end_of, run, t, self.damping, solver.uses_transposed)

        unknowns = system.unknowns
        rhs = tree.ravel([tf.zeros_like(leaf) if part is None else part
                          for part, leaf in zip(at_end.state, unknowns)])  # The objective's are the first leaves.
        initial, *memory = carry if carry else self._initial_carry(rhs)
        arguments = {"memory": memory} if memory else {}
        solution = solver.solve(
            system.operator, rhs, initial if self.warm_start and carry else None, training.iteration, **arguments)
        products = system.parameter_product(tree.unravel(solution.vector, unknowns))
        gradients = training.gradients(
            at_end.outer, [product if seen else None for product, seen in zip(products, system.sees)],
            sees=_SEES[self.solved_system])

        size = tf.maximum(tree.norm(training.start.variables), tree.norm(run.state.variables))
        scale = tf.norm(rhs) * tf.cast(size, rhs.dtype)
        gap = tf.math.divide_no_nan(tf.abs(tf.reduce_sum(solution.vector * tree.ravel(system.distance))), scale)
        good = tf.logical_not(solution.failed)
        carry = [tf.where(good, solution.vector, tf.zeros_like(rhs)), *tf.nest.flatten(solution.memory)]
        return result(training, gradients, at_end.loss, run, carry=carry, solver_residual=solution.residual,
                      solver_steps=solution.steps, solver_failed=solution.failed, stationarity_gap=gap)

    def initial_carry(self, problem: BilevelProblem) -> Carry:
        state = problem.initial_state()
        unknowns = float_leaves(state) if self.solved_system == "dynamics" else state.variables
        return self._initial_carry(tree.ravel(unknowns))

    def _initial_carry(self, like):
        return [tf.zeros_like(like), *tf.nest.flatten(self.linear_solver.initial_memory(like))]


class _System(NamedTuple):
    """A linear system of the implicit function theorem.

    Attributes:
        unknowns: List of tensors, of the shapes of v.
        operator: `LinearOperator` on flat vectors, damping included.
        parameter_product: Callable, list v to the list of its products that the hypergradient adds; None for none.
        distance: List of tensors like the unknowns, such that v'distance is to first order what E changes by on the way
            to the stationary point.
        sees: List of bools: whether the products with each parameter are what a hypergradient is made of.
    """

    unknowns: list
    operator: Any
    parameter_product: Any
    distance: list
    sees: list


def _objective_system(training, run, t, damping, with_transposed):
    """J v = dE/dw with the transposed Jacobian J = ∇²_ww L of the inner gradient, a function of (w, λ).

    It is symmetric unless a part of the objective is under `tf.stop_gradient`: then the inner gradient is that of no
    function.
    """
    gradient = training.gradient_system(run.state, t)
    unknowns = gradient.unknowns

    def product(vector):
        return tree.ravel(gradient.input_product(tree.unravel(vector, unknowns))) + damping * vector

    def transposed(vector):
        along = gradient.product(tree.unravel(vector, unknowns), [None] * len(training.parameters))
        return tree.ravel(along) + damping * vector

    def parameter_product(v):
        return [None if part is None else -part for part in gradient.parameter_product(v)]

    operator = LinearOperator(product, transposed if with_transposed or training.has_stops else None)
    distance = [-part for part in training.inner_gradients(run.state, t)[2:2 + len(unknowns)]]
    return _System(unknowns, operator, parameter_product, distance, gradient.depends_on())


def _dynamics_system(training, run, damping):
    """(I - A') v = dE/ds, from one inner step as a function of (s, λ): the last step, taken at its end.

    Schedules and bias corrections are those of the last step too; there may be none for the step after it.
    """
    t = run.steps - 1
    state = run.state._replace(step=run.state.step - 1)
    leaves = float_leaves(state)
    step = training.step_system(state, t)

    def product(vector):
        return vector - tree.ravel(step.input_product(tree.unravel(vector, leaves))) + damping * vector

    def transposed(vector):
        along = step.product(tree.unravel(vector, leaves), [None] * len(training.parameters))
        return vector - tree.ravel(along) + damping * vector

    sees = training.gradient_system(state, t).depends_on()
    if not all(sees[:len(training.outer)]):
        moves = _moves_the_fixed_point(training.problem, len(training.outer))
        sees = [seen or moved for seen, moved in zip(sees, moves)] + sees[len(moves):]
    after = float_leaves(training.step(state, t)[0])
    return _System(leaves, LinearOperator(product, transposed), step.parameter_product,
                   tree.subtract(after, leaves), sees)


def _moves_the_fixed_point(problem, count):
    """Which outer values move the inner variables where the inner gradient is zero: a list of `count` bools.

    A learning rate or a momentum acts on the step through the gradient alone, or scales gradient, decay and threshold
    alike. At a stationary point it changes nothing, and its hypergradient would be a zero that says nothing of its
    effect on the path.
    """
    dynamics = problem.dynamics.at_learning_rate(0.1)
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
            return tree.ravel(problem.updated(zeros, state, values, None, dynamics=dynamics)[0])

        here = updated(outer)
        moves = [bool(tf.reduce_any(tf.not_equal(here, updated([*outer[:i], value + 0.125, *outer[i + 1:]]))))
                 for i, value in enumerate(outer)]
    return moves + [False] * (count - len(moves))

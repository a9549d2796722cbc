"""ImplicitHG: the implicit function theorem at the end of the inner training."""

import dataclasses
from typing import Any

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
from farhox.linear_solvers.solvers import ConjugateGradient, LinearSolver

_SEES = ("ImplicitHG sees what the inner and the outer objective depend on, at the end of the inner training. A "
         "learning rate or another setting of the dynamics, and an initial value without a proximal term, act through "
         "the path: use ReverseHG or ForwardHG for them (for initial values also BilevelProblem(proximal=...)).")


@dataclasses.dataclass(frozen=True)
class ImplicitHG(HyperGradient):
    """Hypergradient by the implicit function theorem: (∇²_ww L) v = dE/dw, hypergradient dE/dλ - (∇²_wλ L)' v.

    L is the inner objective on the last inner batch at the last state, proximal term included. Nothing of the path is
    kept, so memory does not grow with T, and the result is exact when inner training has converged. Statistics of batch
    norm count as constants.

    With `FixedPoint` the system is that of the dynamics' fixed point, (I - A') v = dE/ds and dE/dλ + B' v over the
    whole inner state.

    `result.carry` holds v and the number of hyper-iterations; passed back, v is where the solver starts, and the
    number is what a tightening tolerance goes by.

    Args:
        linear_solver: A `LinearSolver`.
        damping: Non-negative float added to the diagonal of the system.
        warm_start: Bool. Start the solver from the carried v.

    Raises:
        TypeError: If `linear_solver` is not one.
        ValueError: If the damping is negative.

    Reference:
        [Pedregosa, 2016](https://arxiv.org/abs/1602.02355), Algorithm 1;
        [Rajeswaran et al., 2019](https://arxiv.org/abs/1909.04630) (with the proximal term).
    """

    linear_solver: Any = ConjugateGradient()
    damping: float = 0.0
    warm_start: bool = True

    shares_features = True
    carry_outlives_state = True

    def __post_init__(self):
        if not isinstance(self.linear_solver, LinearSolver):
            raise TypeError("linear_solver must be one of farhox' solvers, for example farhox.ConjugateGradient(). "
                            f"Received: {self.linear_solver!r}")
        checks.non_negative_number("damping", self.damping)

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        outer = problem.outer_values()
        steps = num_steps(inner_batches)
        state = problem.initial_state(outer) if state is None else state
        run = run_inner(problem, state, outer, inner_batches, 0, steps, new_losses(problem, steps))
        at_end = problem.outer_gradients(run.state, outer, outer_batch)
        batch = batch_at(inner_batches, run.steps - 1)

        gradient = _gradient_system(problem, run.state, outer, batch)
        seen = gradient.parameter_product(gradient.outputs)
        reached = [a is not None or b is not None for a, b in zip(seen, at_end.outer)]
        gradients_or_error(problem, seen, reached, _SEES)
        system = _dynamics_system(problem, run.state, outer, batch) if self.linear_solver.on_dynamics else gradient

        unknowns = system.inputs
        rhs_parts = at_end.state if self.linear_solver.on_dynamics else at_end.state[:len(unknowns)]
        rhs = tree.ravel([tf.zeros_like(leaf) if part is None else part for part, leaf in zip(rhs_parts, unknowns)])

        def matvec(vector):
            product = tree.ravel(system.input_product(tree.unravel(vector, unknowns)))
            if self.linear_solver.on_dynamics:
                product = vector - product
            return product + self.damping * vector

        start, iteration = (None, tf.constant(0, tf.int64)) if not carry else carry
        solution = self.linear_solver.solve(matvec, rhs, start if self.warm_start else None, iteration)
        products = system.parameter_product(tree.unravel(solution.vector, unknowns))
        sign = 1.0 if self.linear_solver.on_dynamics else -1.0
        gradients = [_sum(explicit, product, sign, value)
                     for explicit, product, value in zip(at_end.outer, products, outer)]
        diagnostics = common_diagnostics(gradients, at_end.loss, run)
        diagnostics.update(solver_residual=solution.residual, solver_steps=solution.steps,
                           solver_failed=solution.failed)
        carry = [solution.vector, iteration + 1]
        return HyperGradientResult(gradients, at_end.loss, stacked_losses(problem, run), run.state, carry, diagnostics)

    def initial_carry(self, problem):
        state = problem.initial_state()
        unknowns = float_leaves(state) if self.linear_solver.on_dynamics else state.variables
        return [tf.zeros_like(tree.ravel(unknowns)), tf.constant(0, tf.int64)]


def _gradient_system(problem, state, outer, batch):
    """The inner gradient as a function of (w, λ), recorded once: its products are those of ∇²_ww L and ∇²_wλ L."""
    count = len(state.variables)

    def gradient(inputs):
        return problem.inner_gradients(inputs[:count], state.state_variables, inputs[count:], batch)[2]

    return autodiff.Linearization(gradient, list(state.variables), list(outer))


def _dynamics_system(problem, state, outer, batch):
    """One inner step as a function of (s, λ), recorded once."""
    leaves = float_leaves(state)

    def step(inputs):
        at_state = with_float_leaves(state, inputs[:len(leaves)])
        return float_leaves(problem.step(at_state, inputs[len(leaves):], batch).state)

    return autodiff.Linearization(step, leaves, list(outer))


def _sum(explicit, product, sign, like):
    total = tf.zeros_like(like) if explicit is None else explicit
    return total if product is None else total + tf.cast(sign, product.dtype) * product

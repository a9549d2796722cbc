"""ForwardHG: the tangents of the inner state, carried along with the inner training."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import tensorflow as tf

from farhox._core import checks
from farhox._core.few import FewTensors, is_few
from farhox._core.inner_state import float_leaves
from farhox._core.types import Batch, Carry
from farhox.hypergradients.base import Memory, SingleHyperGradient, result
from farhox.hypergradients.each_step import each_step
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.inner_training import InnerTraining

if TYPE_CHECKING:
    from farhox.hypergradients.base import HyperGradientResult

# Outer variables that have a loop each over their directions, at most: each is traced on its own.
_MOST_LOOPS = 8


@dataclasses.dataclass(frozen=True)
class ForwardHG(SingleHyperGradient):
    """Hypergradient by forward-mode differentiation of the inner dynamics.

    Carries the tangents Z = ds/dλ of all P scalar directions of λ: Z <- A_t Z + B_t, at the state before each step; the
    hypergradient is Z' dE/ds + dE/dλ. Time grows with P and memory is P copies of the state, whatever T: for a few
    scalar hyperparameters, and for training that goes on (real-time hyperparameter optimisation).

    `result.carry` holds Z. Passing state and carry back continues both (with `HyperOptimizer(online=True)`: real-time
    hyperparameter optimisation); passing the state alone starts Z at zero.

    Args:
        warm_restart: Bool. Keep no tangents: where the state goes on, Z starts at zero again, so that each
            hypergradient is that of its own T steps.
        parallel_iterations: Positive int, directions that are pushed at the same time where TensorFlow may use several
            threads between operations, as of `tf.while_loop`. The numbers are the same; tangents take twice the memory.
            With up to eight outer variables each has directions of its own: scalars are then bounded by the threads
            alone.

    Raises:
        ValueError: If `parallel_iterations` is not a positive integer.

    Reference:
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785), Algorithm 2 and section 4.
    """

    warm_restart: bool = False
    parallel_iterations: int = 1

    shares_features = False
    remembers = Memory.WITH_STATE

    def __post_init__(self):
        checks.positive_integer("parallel_iterations", self.parallel_iterations)

    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        run, tangents, reached = training.once("tangents", lambda: self._pushed(training, carry))
        at_end = training.outer_gradients(run.state, outer_batch)
        along = [part if ok else None for part, ok in zip(_contract(at_end, tangents, training.outer), reached)]
        gradients = training.gradients(
            at_end.outer, along,
            sees="ForwardHG sees what the inner steps, the outer objective and the initial state depend on.")
        return result(training, gradients, at_end.loss, run, carry=[] if self.warm_restart else tangents)

    def _pushed(self, training, carry):
        """The run, the tangents at its end, and whether anything depends on each outer variable."""
        outer = training.outer
        reached = [False] * len(outer)
        if training.from_initial_state:
            tangents, reached = _initial_tangents(training)
        elif carry:
            # Tangents that were carried along hold what every variable did before, initial values too.
            tangents, reached = carry, [True] * len(outer)
        else:
            tangents = [tf.zeros([_num_directions(outer), *leaf.shape], leaf.dtype)
                        for leaf in float_leaves(training.start)]
        by_step = training.step_system(training.start, tf.constant(0)).depends_on()
        reached = [a or b for a, b in zip(reached, by_step)]

        def body(t, state, arrays):
            system = training.step_system(state, t)
            arrays = _step_of_tangents(system, arrays, outer, self.parallel_iterations)
            next_state, loss, norm, _ = training.step(state, t, known=system.computed)
            return next_state, loss, norm, arrays

        # An entry per direction: a tensor [P, ...] would be copied as a whole in each step.
        writes_out = training.writes_out(0, training.steps) and not _has_loops(outer)
        if writes_out:
            arrays = [FewTensors(tf.unstack(z, _num_directions(outer))) for z in tangents]
        else:
            arrays = [tf.TensorArray(z.dtype, size=_num_directions(outer), element_shape=z.shape[1:],
                                     clear_after_read=False).unstack(z) for z in tangents]
        run, arrays = each_step(training, body, arrays, writes_out)
        return run, [tf.ensure_shape(array.stack(), z.shape) for array, z in zip(arrays, tangents)], reached

    def initial_carry(self, problem: BilevelProblem) -> Carry:
        if self.warm_restart:
            return []
        return _initial_tangents(InnerTraining(problem, tf.zeros([1])))[0]


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


def _groups(outer):
    """Places of the outer variables whose directions are taken together, a sequence for each loop."""
    everything = range(len(outer))
    return [[i] for i in everything] if len(outer) <= _MOST_LOOPS else [everything]


def _has_loops(outer):
    """Whether a group has more than one direction."""
    return any(_num_directions([outer[i] for i in group]) > 1 for group in _groups(outer))


def _step_of_tangents(system, arrays, outer, parallel_iterations):
    """Z <- A_t Z + B_t, direction by direction, in place of the old ones.

    Outer variables have a loop each over their directions: there the other variables' part of B_t is known to be zero.
    Many of them share one loop, whose graph is a single one. Where directions are pushed at the same time none waits
    for what another one has written: all are read from the arrays of the step before.
    """
    stop, before = 0, arrays
    for group in _groups(outer):
        start, stop = stop, stop + _num_directions([outer[i] for i in group])

        def product(index, arrays, group=group):
            read = arrays if parallel_iterations == 1 else before
            products = system.product([array.read(index) for array in read], _unit_direction(outer, index, group))
            return index + 1, [array.write(index, z) for array, z in zip(arrays, products)]

        if stop - start == 1:
            _, arrays = product(start, arrays)
        else:
            _, arrays = tf.while_loop(lambda index, _, stop=stop: index < stop, product,
                                      [tf.constant(start), arrays], parallel_iterations=parallel_iterations)
    return arrays


def _initial_tangents(training):
    """∂Φ_0/∂λ for all directions, and which outer variables Φ_0 depends on."""
    outer = training.outer
    system = training.initial_system()
    count, everything = _num_directions(outer), range(len(outer))
    leaves = float_leaves(training.start)

    def product(index):
        return system.product([], _unit_direction(outer, index, everything))

    if is_few(count):
        tangents = [tf.stack(parts) for parts in zip(*map(product, range(count)))]
    else:
        # AutoGraph would rewrite the user's dynamics, and turn their errors into others.
        tangents = tf.map_fn(tf.autograph.experimental.do_not_convert(product), tf.range(count), parallel_iterations=1,
                             fn_output_signature=[leaf.dtype for leaf in leaves])
    tangents = [tf.ensure_shape(z, [count, *leaf.shape]) for z, leaf in zip(tangents, leaves)]
    return tangents, system.depends_on()


def _contract(at_end, tangents, outer):
    """Z' dE/ds, in the shapes of the outer variables."""
    count = _num_directions(outer)
    dtype = max((value.dtype for value in outer), key=lambda dtype: dtype.size)
    total = tf.zeros([count], dtype)
    for gradient, z in zip(at_end.state, tangents):
        if gradient is not None:
            flat = tf.reshape(z, [count, -1])
            total += tf.cast(tf.linalg.matvec(flat, tf.reshape(gradient, [-1])), dtype)
    pieces = tf.split(total, [value.shape.num_elements() for value in outer])
    return [tf.cast(tf.reshape(piece, value.shape), value.dtype) for piece, value in zip(pieces, outer)]

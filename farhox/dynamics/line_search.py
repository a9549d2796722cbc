"""Gradient descent that finds its step size by a line search, as inner dynamics."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from farhox._core import checks, tree
from farhox._core.types import Nest, Tensor, Tensors
from farhox.dynamics.base import InnerDynamics
from farhox.dynamics.settings import check_setting, setting_per_variable
from farhox.outer.outer_variable import Setting


@dataclasses.dataclass(frozen=True, eq=False)
class BacktrackingGradientDescent(InnerDynamics):
    """Gradient descent whose step is shrunk until the inner objective L decreases enough.

    w <- w - shrink^k learning_rate g with the smallest k = 0, 1, ... for which

        L(w - shrink^k learning_rate g) <= L(w) - decrease shrink^k learning_rate ||g||^2,

    on the batch and with the seeds of the step. Each try is one forward pass. The slots hold k of the last step.

    For the derivative k is a constant, which is exact wherever a small change of λ does not change it; a learning rate
    that is an outer variable acts through the first try.

    Args:
        learning_rate: A setting, the first try; or a list with one per inner variable.
        decrease: Float in (0, 1), the part of the decrease that the gradient promises.
        shrink: Float in (0, 1).
        max_backtracks: Non-negative int, the largest k: the step it gives is taken whatever L is there.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If the learning rate is not a setting.
        ValueError: If another argument is out of range.

    Reference:
        [Armijo, 1966](https://doi.org/10.2140/pjm.1966.16.1).
    """

    learning_rate: Setting | list[Setting] = 1.0
    decrease: float = 0.5
    shrink: float = 0.5
    max_backtracks: int = 30
    first_order: bool = False

    needs_objective = True

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, low=0.0, per_variable=True)
        for name in ("decrease", "shrink"):
            checks.number_between(name, getattr(self, name), 0, 1)
        checks.non_negative_integer("max_backtracks", self.max_backtracks)

    def initial_slots(self, variables: Tensors) -> Nest:
        return [tf.constant(0)]

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor,
               objective: Callable[[Tensors], Tensor]) -> tuple[Tensors, Nest]:
        rates = setting_per_variable(self.learning_rate, variables, step)
        moves = [rate * g for rate, g in zip(rates, gradients)]
        k = self._backtracks(_constants(gradients), _constants(variables), _constants(moves), objective)
        return [w - self._factor(k, move.dtype) * move for w, move in zip(variables, moves)], [k]

    def _backtracks(self, gradients, variables, moves, objective):
        start = objective(variables)
        promised = tf.cast(self.decrease * tree.dot(gradients, moves), start.dtype)

        def refused(k):
            moved = objective([w - self._factor(k, move.dtype) * move for w, move in zip(variables, moves)])
            # What is not a number has not decreased.
            wanted = start - self._factor(k, start.dtype) * promised
            return (moved > wanted) | tf.math.is_nan(moved) | tf.math.is_nan(wanted)

        k, _ = tf.while_loop(
            lambda k, refuse: tf.logical_and(refuse, k < self.max_backtracks),
            lambda k, refuse: (k + 1, refused(k + 1)), [tf.constant(0), refused(tf.constant(0))],
            parallel_iterations=1)
        return k

    def _factor(self, k, dtype):
        return tf.pow(tf.constant(self.shrink, dtype), tf.cast(k, dtype))


def _constants(tensors):
    return [tf.stop_gradient(tensor) for tensor in tensors]

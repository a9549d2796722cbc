"""Proximal gradient descent as inner dynamics: objectives with a part that has no gradient, as L1 penalties."""

import copy
import dataclasses
from typing import Any

import keras
import tensorflow as tf

from farhox._core.types import Nest, Tensor, Tensors, Variables
from farhox.dynamics.base import InnerDynamics
from farhox.dynamics.penalties import L1, Penalty, Projection
from farhox.dynamics.settings import check_setting, setting_per_variable
from farhox.outer.constraints import Box
from farhox.outer.outer_variable import Setting
from farhox.outer.regularizers import L1L2

# Projections on intervals, which may follow a soft threshold: the two together are the proximal map of the sum.
_INTERVALS = (Box, keras.constraints.NonNeg)


@dataclasses.dataclass(frozen=True, eq=False)
class ProximalGradient(InnerDynamics):
    """Proximal gradient descent on L + P: w <- argmin_x 1/2 ||x - (w - learning_rate g)||^2 + learning_rate P(x).

    g is the gradient of the inner objective L, which P is no part of. The step settles at a minimum of L + P, with
    zeros that are exactly zero, where the subgradient of |w| jumps about forever; and its derivative is the exact one,
    on the entries that are not zero. `ReverseHG` and `ForwardHG` give hypergradients of the path,
    `ImplicitHG(FixedPoint(...))` that of the minimum; `ImplicitHG` over the inner objective alone does not apply.

    ```python
    strength = farhox.Hyperparameter(0.1, low=0.0, log=True, name="l1")
    layer = keras.layers.Dense(1, kernel_regularizer=farhox.L1L2(l1=strength))
    dynamics = farhox.dynamics.ProximalGradient(0.1)
    ```

    An inner variable of which the Keras regularizer is `farhox.L1L2` has the penalty of its `l1` part without being
    told: there the regularizer adds its value to L, but no gradient, and the proximal step does the rest. The `l2` part
    stays a part of L. The regularizer must count with the weight one, as in `supervised_problem` and in
    `sum(model.losses)`.

    Args:
        learning_rate: A setting, not negative, or a list with one per inner variable. At most 1 over the greatest
            curvature of L, as for gradient descent.
        penalty: A `Penalty` for every inner variable, or a list with a `Penalty` or None per inner variable. A Keras
            constraint that is a projection, as `farhox.constraints.Simplex`, counts as the penalty
            `Projection(constraint)`. Default: those of the regularizers.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.

    Raises:
        TypeError: If the learning rate is not a setting, or a penalty no penalty.
        ValueError: If the learning rate is out of range. In a problem: if no inner variable has a penalty, one has two,
            a penalty cannot go with a constraint, or an L1 part cannot be taken over.

    Reference:
        [Parikh and Boyd, 2014](https://doi.org/10.1561/2400000003), section 4.2;
        [Bertrand et al., 2020](https://arxiv.org/abs/2002.08943) (hypergradients on the support).
    """

    learning_rate: Setting | list[Setting] = 0.01
    penalty: Any = None
    first_order: bool = False
    taken_over: Any = dataclasses.field(default=(), repr=False, init=False)
    _penalties: Any = dataclasses.field(default=None, repr=False, init=False)

    zero_gradient_is_stationary = False

    def __post_init__(self):
        check_setting("learning_rate", self.learning_rate, low=0.0, per_variable=True)
        for penalty in self.penalty if isinstance(self.penalty, (list, tuple)) else [self.penalty]:
            if penalty is not None and not isinstance(penalty, (Penalty, keras.constraints.Constraint)):
                raise TypeError("penalty must be one of farhox.dynamics' penalties, for example farhox.dynamics.L1(0.1)"
                                f", a Keras constraint, or a list of these. Received: {penalty!r} of type "
                                f"{type(penalty).__name__}")

    def bound_to(self, variables: Variables) -> InnerDynamics:
        bound = copy.copy(self)
        regularized = [_of_regularizer(variable) for variable in variables]
        given = self._given(variables)
        for variable, own, penalty in zip(variables, regularized, given):
            if own is not None and penalty is not None:
                raise ValueError(f"An inner variable can have one penalty. Received two for {variable.path!r}: "
                                 f"{penalty!r}, and the l1 part of its regularizer.")
        penalties = [own if penalty is None else penalty for own, penalty in zip(regularized, given)]
        if all(penalty is None for penalty in penalties):
            raise ValueError("ProximalGradient needs a penalty: farhox.L1L2(l1=...) as the regularizer of a layer, or "
                             "for example ProximalGradient(rate, penalty=farhox.dynamics.L1(0.1)). "
                             f"None of the {len(variables)} inner variables has one.")
        for variable, penalty in zip(variables, penalties):
            if penalty is not None and variable.constraint is not None and not (
                    isinstance(penalty, L1) and isinstance(variable.constraint, _INTERVALS)):
                raise ValueError("A penalty other than L1 with a bound is not applied together with a constraint, "
                                 "because one after the other is not the proximal map of both. "
                                 f"Received for {variable.path!r}: {penalty!r} and {variable.constraint!r}")
        object.__setattr__(bound, "_penalties", penalties)
        object.__setattr__(bound, "taken_over", tuple(
            variable for variable, own in zip(variables, regularized) if own is not None))
        return bound

    def initial_slots(self, variables: Tensors) -> Nest:
        return []

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        penalties = self._given(variables) if self._penalties is None else self._penalties
        rates = setting_per_variable(self.learning_rate, variables, step)
        new = []
        for w, rate, g, penalty in zip(variables, rates, gradients, penalties):
            moved = w - rate * g
            if penalty is not None and rate.shape.rank != 0 and not penalty.elementwise:
                raise ValueError(f"{type(penalty).__name__} needs one learning rate for all entries of a variable. "
                                 f"Received a learning rate of shape {tuple(rate.shape)}")
            new.append(moved if penalty is None else penalty.proximal(moved, rate, step))
        return new, slots

    @property
    def rests_at_minimum(self) -> bool:
        return True

    def residuals(self, gradients: Tensors, variables: Tensors, new_variables: Tensors, step: Tensor) -> Tensors:
        rates = setting_per_variable(self.learning_rate, variables, step)
        return [tf.math.divide_no_nan(w - new, rate * tf.ones_like(w))
                for w, new, rate in zip(variables, new_variables, rates)]

    def at_learning_rate(self, learning_rate: float) -> "ProximalGradient":
        other = copy.copy(self)
        object.__setattr__(other, "learning_rate", learning_rate)
        return other

    def _given(self, variables):
        """The penalties as given, one or None for each variable."""
        penalties = self.penalty if isinstance(self.penalty, (list, tuple)) else [self.penalty] * len(variables)
        if len(penalties) != len(variables):
            raise ValueError("A list of penalties must have one entry per inner variable. "
                             f"Received {len(penalties)} entries for {len(variables)} inner variables.")
        return [Projection(penalty) if isinstance(penalty, keras.constraints.Constraint) else penalty
                for penalty in penalties]


def _of_regularizer(variable):
    """The penalty of a variable's regularizer, or None."""
    regularizer = variable.regularizer
    if isinstance(regularizer, L1L2):
        return L1(regularizer.l1) if regularizer.has_l1 else None
    if isinstance(regularizer, (keras.regularizers.L1, keras.regularizers.L1L2)) and regularizer.l1 > 0:
        raise ValueError("ProximalGradient takes over the l1 part of farhox.L1L2; that of Keras' own regularizers "
                         f"would stay a subgradient. Received a {type(regularizer).__name__} on {variable.path!r}: use "
                         "farhox.L1L2(l1=...) there.")
    return None

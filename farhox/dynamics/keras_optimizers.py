"""Any Keras optimizer as differentiable inner dynamics.

A copy of the optimizer runs its own `apply` on tensors: clipping, weight decay, constraints, moving averages and
gradient accumulation are what they are in `fit`. Its slots are part of the inner state, bound while `apply` runs; its
iteration counter is the inner step; a setting that is not a float is put into its attribute of that name as a tensor.
"""

import copy
import dataclasses
import numbers
import types
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import exact, functional
from farhox._core.types import Nest, Tensor, Tensors, Variables
from farhox.dynamics.base import InnerDynamics, check_keras_optimizer
from farhox.dynamics.functional_optimizer import (
    Setting,
    Slot,
    functional_copy,
    optimizer_config,
    use_weight_decay_as,
    view_of,
)
from farhox.dynamics.settings import check_decays, check_length, check_setting, setting_per_variable
from farhox.outer.outer_variable import OuterVariable
from farhox.outer.regularizers import check_no_subgradients

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
# Settings of every Keras optimizer that are floats if given and None by default.
_OPTIONAL = ("weight_decay", *_CLIPPING)
# Newer than the oldest Keras that is supported; nothing is an instance of ().
_MULTI_OPTIMIZER = getattr(keras.optimizers, "MultiOptimizer", ())
_SCHEDULE_FREE = getattr(keras.optimizers, "ScheduleFreeAdamW", ())
# Float settings that have no derivative: a gradient of zero would say nothing.
_WITHOUT_DERIVATIVE = (
    (keras.optimizers.Lion, ("beta_1", "beta_2"), "reaches the variables through a sign"),
    (_SCHEDULE_FREE, ("beta_1",), "cancels out of what Keras does on TensorFlow"))
# Decays of which a power is subtracted from 1 and divided by.
_BIAS_CORRECTED = (
    (keras.optimizers.Adam, "beta_2"), (keras.optimizers.Nadam, "beta_2"), (keras.optimizers.Lamb, "beta_2"),
    (_SCHEDULE_FREE, "beta_2"), (getattr(keras.optimizers, "Muon", ()), "adam_beta_2"))
# Settings that move the variables where the gradient is zero.
_SHRINKING = ("weight_decay", "adam_weight_decay", "l1_regularization_strength", "l2_regularization_strength",
              "l2_shrinkage_regularization_strength")
# Ranges that hold for a setting of this name in every optimizer of Keras; a user's may mean something else by others.
_RANGES: dict[str, Any] = {
    **dict.fromkeys(("learning_rate", "weight_decay"), {"low": 0.0}),
    **dict.fromkeys(_CLIPPING, {"above": 0.0}),
    **dict.fromkeys(("momentum", "ema_momentum", "rho"), {"low": 0.0, "high": 1.0}),
    **dict.fromkeys(("beta_1", "beta_2", "adam_beta_1", "adam_beta_2"), {"low": 0.0, "below": 1.0}),
    **dict.fromkeys(("epsilon", "epsilon_1", "epsilon_2", "adam_weight_decay"), {"low": 0.0})}


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class KerasDynamics(InnerDynamics):
    """The update rule of a Keras optimizer, differentiable in its settings, the gradients and the state.

    ```python
    decay = farhox.Hyperparameter(0.004, low=0.0, log=True, name="weight_decay")
    dynamics = farhox.KerasDynamics(keras.optimizers.AdamW(0.01), weight_decay=decay)
    ```

    A step is what `optimizer.apply` does to the inner variables, their constraints included, and the slots start as
    those of a new optimizer. The optimizer given is not changed, and changing it later has no effect: farhox works on
    a copy made from its configuration. Roots, powers and quotients have derivative zero where theirs is infinite and
    an exact zero is multiplied with it.

    Where an update is piecewise constant in the gradient (the sign in Lion), its derivative is zero almost everywhere,
    and so is the hypergradient of all that acts through the inner gradient alone, such as example weights. Learning
    rate and weight decay have the right hypergradient there.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, for example of your own subclass. Of a `MultiOptimizer`, the settings
            hold for every optimizer in it.
        first_order: Bool. Treat the inner gradient as a constant when differentiating the step.
        **settings: Float settings of the optimizer by name, each a setting of the dynamics to use instead of the
            optimizer's own value; for `learning_rate` also a list with one per inner variable. A setting that is not
            a float counts as positive where the optimizer's code compares it with zero in Python.

    Attributes:
        optimizer, first_order, settings: As given.

    Raises:
        TypeError: If `optimizer` is not a Keras optimizer or a setting has the wrong type.
        ValueError: If the optimizer has no such float setting, the setting cannot be learned, the optimizer cannot be
            copied, or it does what inner training has no place for (loss scaling, averages of the variables that are
            never written back). In a problem: if a beta of Adam or a relative is 1 in the type of an inner variable, as
            0.999 is in bfloat16. In an inner step: if the optimizer assigns a variable that is not its own.
    """

    optimizer: keras.optimizers.Optimizer
    first_order: bool
    settings: Mapping[str, Any]
    _parts: Any = dataclasses.field(default=None, repr=False)

    applies_constraints = True

    def __init__(self, optimizer: keras.optimizers.Optimizer, first_order: bool = False, **settings: Any) -> None:
        check_keras_optimizer("optimizer", optimizer)
        base = keras.optimizers.Optimizer
        if not isinstance(optimizer, base) or type(optimizer) is base:
            raise TypeError("optimizer must be an instance of a subclass of keras.optimizers.Optimizer. "
                            f"Received: {optimizer!r} of type {type(optimizer).__name__}")
        if not isinstance(optimizer, _MULTI_OPTIMIZER):
            _check_optimizer(optimizer, settings)
        for name, setting in settings.items():
            check_setting(name, setting, **_RANGES.get(name, {}), per_variable=name == "learning_rate")
        object.__setattr__(self, "optimizer", optimizer)
        object.__setattr__(self, "first_order", bool(first_order))
        object.__setattr__(self, "settings", types.MappingProxyType(settings))

    @property
    def zero_gradient_is_stationary(self) -> bool:
        """Whether no optimizer in it decays or shrinks the variables by itself."""
        optimizers = [self.optimizer] if self._parts is None else [part.optimizer for part in self._parts]
        shrinking = [self.settings.get(name, vars(optimizer).get(name))
                     for optimizer in optimizers for name in _SHRINKING]
        return all(value is None or isinstance(value, numbers.Real) and value == 0 for value in shrinking)

    def bound_to(self, variables: Variables) -> InnerDynamics:
        check_length(self.settings.get("learning_rate"), variables)
        check_no_subgradients(variables, self)
        bound = copy.copy(self)
        # A problem may be made inside a tf.function; the variables that stand for the slots are no part of its graph.
        with tf.init_scope():
            object.__setattr__(bound, "_parts", [
                _part(optimizer, [variables[index] for index in indices], indices, self.settings)
                for optimizer, indices in _groups(self.optimizer, variables)])
        return bound

    def initial_slots(self, variables: Tensors) -> Nest:
        return [part.initial_slots([variables[index] for index in part.indices]) for part in self._bound_parts()]

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        new_variables, new_slots = list(variables), []
        for part, own_slots in zip(self._bound_parts(), slots):
            own_variables, own_slots = part.update(
                [gradients[index] for index in part.indices], [variables[index] for index in part.indices],
                own_slots, step)
            for index, value in zip(part.indices, own_variables):
                new_variables[index] = value
            new_slots.append(own_slots)
        return new_variables, new_slots

    def at_learning_rate(self, learning_rate: float) -> "KerasDynamics":
        # A rule of the user's own may use the rate for a part of the step.
        other = copy.copy(self)
        object.__setattr__(other, "_parts", [
            dataclasses.replace(part, settings={**part.settings, "learning_rate": learning_rate})
            if type(part.optimizer).update_step.__module__.startswith("keras.") else part
            for part in self._bound_parts()])
        return other

    def finished(self, variables: Tensors, slots: Nest) -> Tensors:
        finished = list(variables)
        for part, own_slots in zip(self._bound_parts(), slots):
            own = part.finished([variables[index] for index in part.indices], own_slots)
            for index, value in zip(part.indices, own):
                finished[index] = value
        return finished

    def _bound_parts(self):
        if self._parts is None:
            raise ValueError("KerasDynamics must be bound to Keras variables before it runs, because optimizers read "
                             "their names, shapes and constraints: take the `dynamics` of a BilevelProblem, or "
                             "dynamics.bound_to(variables). Received: dynamics that are not bound.")
        return self._parts


def learnable_settings(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """The names of a Keras optimizer's settings that can be outer variables, a sorted list."""
    return sorted(_float_settings(optimizer) - set(_without_derivative(optimizer)))


@dataclasses.dataclass(frozen=True)
class _Part:
    """One optimizer and the inner variables that it updates. All lists of tensors are aligned with `variables`.

    Attributes:
        optimizer: The functional copy, built; never changed.
        settings: What is put into its attributes at each step.
        indices: Places of its variables among the inner variables.
        variables: List of `keras.Variable`, these inner variables.
        slots: List of `keras.Variable` that stand for the slots; never assigned.
        initial_values: One array per slot.
        rebuilds: Bool. Instead, the initial values are functions of the inner variables or of settings.
    """

    optimizer: Any
    settings: dict
    indices: list
    variables: list
    slots: list
    initial_values: list
    rebuilds: bool

    def initial_slots(self, variables: Tensors) -> Nest:
        if self.rebuilds:
            return self.rebuild(variables).values[len(variables):]
        return self._constant_slots()

    def rebuild(self, variables: Tensors) -> functional.FunctionalResult:
        """Runs the optimizer's `build` again on the slots there are, as a `FunctionalResult`."""
        view = self._view(variables, tf.constant(0, tf.int64))
        del vars(view)["_tracker"]  # Neither Keras nor, by the last attribute, TensorFlow keeps track of a view.
        vars(view).update(built=False, recreated=iter(self.optimizer.created), _trainable_variables_indices={},
                          _self_setattr_tracking=False)
        return functional.call(view.build, self.variables, bindings=[
            *zip(self.variables, variables), *zip(self.slots, self._constant_slots())])

    def update(self, gradients: Tensors, variables: Tensors, slots: Nest, step: Tensor) -> tuple[Tensors, Nest]:
        # Settings are read here, in the scope of the outer variables, which the optimizer's own scope hides.
        view = self._view(variables, step)

        def apply():
            with exact.finite_roots():
                view.apply(gradients, self.variables)

        result = functional.call(apply, bindings=zip(
            view.assignable, [*variables, *slots, tf.cast(step, view._iterations.dtype)]))
        known = {id(variable) for variable in view.assignable}
        stray = [repr(variable.path) for variable in result.assigned if id(variable) not in known]
        if stray:
            raise ValueError(
                "An optimizer must assign nothing but the variables it updates and its own slots. "
                f"{type(view).__name__} assigned {', '.join(stray)}: make slots in `build` with self.add_variable or "
                "self.add_optimizer_variables.")
        count = len(variables)
        return result.values[:count], result.values[count:-1]

    def finished(self, variables: Tensors, slots: Nest) -> Tensors:
        """The variables after the optimizer's `finalize_variable_values`."""
        view = self._view(variables, tf.constant(0, tf.int64))
        result = functional.call(view.finalize_variable_values, self.variables, bindings=[
            *zip(self.variables, variables), *zip(self.slots, slots)])
        return result.values[:len(variables)]

    def _view(self, variables, step):
        """The optimizer with the values of its settings for variables of these types at `step`."""
        columns = {name: setting_per_variable(setting, variables, step) for name, setting in self.settings.items()}
        settings_of = [dict(_attribute(name, _entry(self.settings[name], i), column[i])
                            for name, column in columns.items()) for i in range(len(variables))]
        widest = max(range(len(variables)), key=lambda i: variables[i].dtype.size)
        return view_of(
            self.optimizer, **settings_of[widest],
            settings_of={id(variable): own for variable, own in zip(self.variables, settings_of)},
            assignable=[*self.variables, *self.slots, self.optimizer._iterations])

    def _constant_slots(self):
        return [_constant(value, slot.dtype) for slot, value in zip(self.slots, self.initial_values)]


def _part(optimizer, variables, indices, settings):
    """An optimizer, copied and built for its variables."""
    _check_optimizer(optimizer, settings)
    check_decays({name: settings.get(name, vars(optimizer)[name]) for kind, name in _BIAS_CORRECTED
                  if isinstance(optimizer, kind)}, variables, type(optimizer).__name__)
    built = functional_copy(optimizer, _configured(settings))
    use_weight_decay_as(optimizer, built, variables)
    settings = {name: setting for name, setting in settings.items() if name not in _configured(settings)}
    own_rate = built._learning_rate
    if isinstance(settings.get("learning_rate"), (list, tuple)):
        settings["learning_rate"] = [settings["learning_rate"][index] for index in indices]
    elif "learning_rate" not in settings and isinstance(own_rate, keras.Variable):
        settings["learning_rate"] = float(keras.ops.convert_to_numpy(own_rate))
    values = [tf.convert_to_tensor(variable) for variable in variables]
    part = _Part(built, settings, indices, variables, [], [], False)
    # Whether slots exist depends on settings that are given, and whether their values do shows in `used`.
    probes = vars(part._view(values, tf.constant(0, tf.int64)))
    probes = {name: probes[name] for name in settings if name != "learning_rate"}
    vars(built).update(probes, created=[])
    built.build(variables)
    slots = [slot for slot in built.variables if slot is not built._iterations and slot is not own_rate]
    for slot in slots:
        slot.__class__ = Slot
    part = dataclasses.replace(
        part, slots=slots, initial_values=[keras.ops.convert_to_numpy(slot) for slot in slots])
    depends = any(probe.used for probe in probes.values())
    try:
        assigned = part.rebuild(values).assigned
    except ValueError as error:
        # Variables made without add_variable, as in Nadam, cannot be made again.
        if depends or not all(_is_uniform(value) for value in part.initial_values):
            raise ValueError(
                "Slots whose initial values depend on the inner variables or on settings must be made in `build` with "
                f"self.add_variable or self.add_optimizer_variables. Received: {type(optimizer).__name__}, whose build "
                "makes a keras.Variable by itself.") from error
        return part
    return dataclasses.replace(part, rebuilds=depends or len(assigned) > len(built.created))


def _groups(optimizer, variables):
    """The optimizers that update the variables, each with the indices of its own."""
    if not isinstance(optimizer, _MULTI_OPTIMIZER):
        return [(optimizer, list(range(len(variables))))]
    groups = {}
    for index, variable in enumerate(variables):
        own = optimizer._optimizer_map(variable)
        groups.setdefault(id(own), (own, []))[1].append(index)
    return list(groups.values())


def _configured(settings):
    """The floats among the settings, which the optimizer's constructor takes; learning rates would lose precision."""
    return {name: float(setting) for name, setting in settings.items()
            if isinstance(setting, numbers.Real) and name != "learning_rate"}


def _entry(setting, index):
    return setting[index] if isinstance(setting, (list, tuple)) else setting


def _attribute(name, setting, value):
    """The optimizer's attribute that holds a setting, and what to put there."""
    if name != "learning_rate":
        return name, Setting(name, value)
    # Some optimizers ask whether the learning rate is a schedule.
    is_schedule = setting.changes_with_step if isinstance(setting, OuterVariable) else (
        callable(setting) and not isinstance(setting, keras.Variable))
    return "_learning_rate", (lambda: value) if is_schedule else value


def _is_uniform(value):
    return value.size > 0 and np.all(value == value.flat[0])


def _constant(value, dtype):
    """A tensor. Slots whose entries are all equal, which is the rule, take no room in a graph."""
    if _is_uniform(value):
        return tf.fill(value.shape, tf.constant(value.flat[0], dtype))
    return tf.constant(value, dtype)


def _float_settings(optimizer):
    config = optimizer_config(optimizer)
    names = {name for name, value in config.items() if isinstance(value, float) and name in vars(optimizer)}
    names |= {"learning_rate"} | {name for name in _OPTIONAL if name in config}
    return names - ({"loss_scale_factor"} if optimizer.use_ema else {"loss_scale_factor", "ema_momentum"})


def _without_derivative(optimizer):
    """Settings that cannot be learned, with the reason."""
    return {name: reason for kind, names, reason in _WITHOUT_DERIVATIVE
            if isinstance(optimizer, kind) for name in names}


def _check_optimizer(optimizer, settings):
    """Raises a ValueError unless the optimizer can be inner dynamics with these settings."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError("The inner objective is not scaled, so gradients must not be unscaled. Received: "
                         f"{kind}. Give KerasDynamics its inner_optimizer.")
    if optimizer.loss_scale_factor is not None:
        raise ValueError("The inner objective is not scaled, so gradients must not be unscaled. Received: "
                         f"{kind} with loss_scale_factor={optimizer.loss_scale_factor}. Make it without.")
    if optimizer.use_ema and not optimizer.ema_overwrite_frequency:
        raise ValueError(
            "Inner training has no end at which averages could replace the variables, as they do at the end of fit. "
            f"Received: {kind} with use_ema=True and ema_overwrite_frequency=None. Make it with an "
            "ema_overwrite_frequency, for example the number of inner steps, or without use_ema.")
    for name, value in vars(optimizer).items():
        if name != "_learning_rate" and isinstance(value, OuterVariable) and (
                name in _OPTIONAL or type(optimizer).__module__.startswith("keras.")):
            raise ValueError(
                "Of a Keras optimizer's settings only the learning rate may be an outer variable in the optimizer "
                f"itself. Received: {kind} with {name}={value!r}. Give it to KerasDynamics: KerasDynamics({kind}(...), "
                f"{name}=...).")
    own = {name: vars(optimizer).get(name) for name in _RANGES if name != "learning_rate" and name not in settings}
    if "learning_rate" not in settings and not tf.inside_function():
        own["learning_rate"] = vars(optimizer)["_learning_rate"]
    for name, value in own.items():
        if isinstance(value, (numbers.Real, keras.Variable)):
            check_setting(f"{name} of {kind}", value, **_RANGES[name])
    floats = _float_settings(optimizer)
    for name, setting in settings.items():
        if name not in floats:
            value = optimizer_config(optimizer).get(name)
            raise ValueError(
                f"A setting must be a float setting of the optimizer, kept in its attribute of the same name. Those of "
                f"{kind} are: {', '.join(sorted(floats))}. Received: {name}"
                f"{'' if value is None else f', which is {value!r} in the optimizer'}. What is not a float cannot be "
                f"learned and is given to the optimizer itself: {kind}({name}=...).")
        reason = _without_derivative(optimizer).get(name)
        if reason is not None and isinstance(setting, (keras.Variable, OuterVariable)):
            raise ValueError(
                f"An outer variable must have a derivative. In {kind}, {name} {reason}: its derivative is zero. "
                f"Received: {name}={setting!r}. Give a float, or learn the momentum of farhox.Momentum or the beta_1 "
                "of farhox.Adam instead.")
    clipping = [name for name in _CLIPPING if name in settings or vars(optimizer)[name] is not None]
    if len(clipping) > 1:
        raise ValueError(f"At most one of {', '.join(_CLIPPING)} can be given. Received: {', '.join(clipping)}")
    functional_copy(optimizer, {})

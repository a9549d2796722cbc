"""A Keras optimizer whose `apply` obeys a scope, and settings of it that are tensors.

The class of the copy stands in front of and behind the optimizer's class in the method resolution order. Behind it, it
replaces what the TensorFlow backend does to raw variables by Keras' backend-independent rules.
"""

import abc
import numbers
import re
import warnings
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.optimizers.base_optimizer import BaseOptimizer

from farhox._core import functional
from farhox._core.types import Config, DType, InKeras, Shape, Tensor, Variables
from farhox.outer.hyperparameters import OuterVariable

# What an optimizer may keep that reads variables.
_HOLDERS = (keras.optimizers.schedules.LearningRateSchedule, keras.regularizers.Regularizer,
            keras.constraints.Constraint, keras.initializers.Initializer)


class _Operand(abc.ABC):
    """What is not a tensor but becomes one where it is used."""

    @abc.abstractmethod
    def __tf_tensor__(self, dtype=None, name=None):
        """The tensor."""

    def __neg__(self):
        return -tf.convert_to_tensor(self)

    def __add__(self, other):
        return tf.convert_to_tensor(self) + other

    def __radd__(self, other):
        return other + tf.convert_to_tensor(self)

    def __sub__(self, other):
        return tf.convert_to_tensor(self) - other

    def __rsub__(self, other):
        return other - tf.convert_to_tensor(self)

    def __mul__(self, other):
        return tf.convert_to_tensor(self) * other

    def __rmul__(self, other):
        return other * tf.convert_to_tensor(self)

    def __truediv__(self, other):
        return tf.convert_to_tensor(self) / other

    def __rtruediv__(self, other):
        return other / tf.convert_to_tensor(self)

    def __pow__(self, other):
        return tf.convert_to_tensor(self) ** other

    def __rpow__(self, other):
        return other ** tf.convert_to_tensor(self)


class Setting(_Operand):
    """A setting as the optimizer's code sees it: a tensor that compares with zero like a positive float.

    Optimizers ask in Python whether a setting is in use (`if self.momentum > 0`), which a tensor cannot answer in a
    graph. A subclass of float would become a constant somewhere without notice; this one is an error there.

    Args:
        name: Name in errors.
        value: Tensor.

    Attributes:
        used: Whether the value was read.
    """

    __hash__ = object.__hash__

    def __init__(self, name: str, value: Tensor) -> None:
        self._name = name
        self._value = value
        self.used = False

    @property
    def dtype(self) -> tf.DType:
        """Type of the tensor."""
        return self._value.dtype

    def __tf_tensor__(self, dtype=None, name=None):
        self.used = True
        return self._value if dtype is None else tf.cast(self._value, dtype)

    def __bool__(self):
        return True

    def __eq__(self, other):
        if isinstance(other, numbers.Real):
            self._check_zero(other)
        return other is self

    def __gt__(self, other):
        return self._check_zero(other)

    def __ge__(self, other):
        return self._check_zero(other)

    def __lt__(self, other):
        return not self._check_zero(other)

    def __le__(self, other):
        return not self._check_zero(other)

    def _check_zero(self, other):
        if not isinstance(other, numbers.Real) or other != 0:
            raise TypeError("Only a float can be compared in Python with anything but zero. The optimizer compares its "
                            f"setting {self._name!r}, which is not a float here, with {other!r}: give a float for it.")
        return True

    def __float__(self):
        raise TypeError(f"Only a float can be used as one in Python. The optimizer does so with its setting "
                        f"{self._name!r}, which is not a float here: give a float for it.")


class Slot(keras.Variable):
    """A variable of the optimizer whose `value` in a scope is read where it is used, as a `tf.Variable` is.

    ScheduleFreeAdamW takes `old = slot.value` before it assigns the slot. On TensorFlow, `old` is the new value then.
    """

    @property
    def value(self) -> Any:
        return _LateRead(self) if in_stateless_scope() else keras.Variable.value.fget(self)


class _LateRead(_Operand):
    def __init__(self, slot: Any) -> None:
        self._slot = slot

    def __tf_tensor__(self, dtype=None, name=None):
        value = keras.Variable.value.fget(self._slot)
        return tf.convert_to_tensor(value) if dtype is None else tf.cast(value, dtype)

    def __getattr__(self, name):
        return getattr(tf.convert_to_tensor(self), name)


def optimizer_config(optimizer: keras.optimizers.Optimizer) -> Config:
    """The optimizer's configuration.

    Raises:
        ValueError: If it has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A learning rate that is a lambda is not serialised in the end.
            return dict(optimizer.get_config())
    except Exception as error:
        raise _not_copyable(optimizer, f"get_config() failed with {error!r}") from error


def functional_copy(optimizer: keras.optimizers.Optimizer, floats: Any) -> Any:
    """A copy of an optimizer, not built, whose `apply` can run in a scope.

    Args:
        optimizer: A `keras.optimizers.Optimizer`; not changed.
        floats: Dictionary of floats that replace settings of the same name.

    Raises:
        ValueError: If the optimizer's configuration does not make an optimizer with the same settings. An error of
            the optimizer's constructor about `floats` passes through.
    """
    kind = type(optimizer)
    functional = type(kind.__name__, (_PerVariable, kind, _Functional), {})
    config = optimizer_config(optimizer)
    own_rate = vars(optimizer)["_learning_rate"]
    if "learning_rate" in config and not isinstance(own_rate, keras.Variable):
        config["learning_rate"] = 0.5  # Schedules and callables are shared instead: many cannot be serialised.
    try:
        copy = functional.from_config(dict(config))
    except Exception as error:
        raise _not_copyable(optimizer, f"from_config(get_config()) failed with {error!r}") from error
    lost = [name for name, value in vars(optimizer).items()
            if isinstance(value, (bool, numbers.Real, str)) and not name.startswith("_") and name != "built"
            and vars(copy).get(name) != value]
    if lost:
        raise _not_copyable(optimizer, f"get_config() does not return {', '.join(lost)}")
    if floats:
        copy = functional.from_config({**config, **floats})
    if not isinstance(own_rate, keras.Variable):
        vars(copy)["_learning_rate"] = own_rate
    kept = {id(variable) for variable in held_variables(copy)}
    lost = [variable for variable in held_variables(optimizer) if id(variable) not in kept]
    if lost:
        raise _not_copyable(
            optimizer, "get_config() does not return the objects that hold the variables "
            f"{', '.join(repr(variable.path) for variable in lost)}, but copies",
            "let it return the objects themselves, or give their values to KerasDynamics as settings")
    return copy


def held_variables(optimizer: keras.optimizers.Optimizer) -> Variables:
    """The variables that an optimizer reads through its attributes and that are not its own, as a list."""
    own = {id(variable) for variable in [*optimizer.variables, *vars(optimizer).get("_trainable_variables", ())]}
    attributes = {name: value for name, value in vars(optimizer).items()  # The others with an underscore are Keras'.
                  if not name.startswith("_") or name == "_learning_rate"}
    return [variable for variable in _variables_in(attributes) if id(variable) not in own]


def _variables_in(value):
    if isinstance(value, keras.Variable):
        return [value]
    if isinstance(value, OuterVariable):
        return [value.variable]
    if isinstance(value, dict):
        return [variable for entry in value.values() for variable in _variables_in(entry)]
    if isinstance(value, (list, tuple)):
        return [variable for entry in value for variable in _variables_in(entry)]
    return _variables_in(vars(value)) if isinstance(value, _HOLDERS) else []


def use_weight_decay_as(optimizer: keras.optimizers.Optimizer, copy: Any, variables: Variables) -> None:
    """Excludes the same variables from weight decay in the copy."""
    excluded = vars(optimizer).get("_exclude_from_weight_decay", ())
    pattern = vars(optimizer).get("_exclude_from_weight_decay_pattern")
    # Where TensorFlow's backend applies weight decay, the names it searches are those of the raw variables.
    raw = type(optimizer)._apply_weight_decay is keras.optimizers.Optimizer._apply_weight_decay
    decays = {}
    for variable in variables:
        name = variable.value.name if raw else variable.name
        decays[id(variable)] = optimizer._var_key(variable) not in excluded and (
            pattern is None or re.search(pattern, name) is None)
    vars(copy)["_exclude_from_weight_decay_cache"] = decays


def view_of(copy: Any, **attributes: Any) -> Any:
    """An object of its own with the copy's variables, and other attributes."""
    view = object.__new__(type(copy))
    vars(view).update(vars(copy), **attributes)
    return view


def _not_copyable(optimizer, reason, remedy="let get_config return every argument of the constructor"):
    return ValueError(
        "An optimizer must be copyable by type(optimizer).from_config(optimizer.get_config()), because farhox never "
        f"changes the one it is given. Received a {type(optimizer).__name__} of which {reason}: {remedy}.")


class _PerVariable(InKeras):
    """Stands before the optimizer's class: its weight decay sees the settings of one variable at a time."""

    def _apply_weight_decay(self, variables):
        for variable in variables:
            self.__dict__.update(self.settings_of[id(variable)])
            super()._apply_weight_decay([variable])


class _Functional(keras.optimizers.Optimizer):
    """Stands behind the optimizer's class and before TensorFlow's: nothing writes to a raw variable.

    Attributes:
        settings_of: Attributes that hold settings, for each variable by its id.
        assignable: Every variable that a step may assign.
        created: List of the slots that `build` made with `add_variable`, or None outside of `build`.
        recreated: While `build` runs again: an iterator over these slots.
    """

    settings_of: Any = None
    assignable = ()
    created = None
    recreated = None

    assign = BaseOptimizer.assign
    assign_add = BaseOptimizer.assign_add
    assign_sub = BaseOptimizer.assign_sub
    add_variable_from_reference = BaseOptimizer.add_variable_from_reference
    _var_key = BaseOptimizer._var_key
    _apply_weight_decay = BaseOptimizer._apply_weight_decay
    _overwrite_model_variables_with_average_value = BaseOptimizer._overwrite_model_variables_with_average_value
    _backend_increment_gradient_accumulators = BaseOptimizer._backend_increment_gradient_accumulators

    def add_variable(self, shape: Shape, initializer: Any = "zeros", dtype: DType | None = None, **kwargs: Any) -> Any:
        if self.recreated is not None:
            slot = next(self.recreated)
            slot.assign(keras.initializers.get(initializer)(shape, dtype=slot.dtype))
            return slot
        variable = super().add_variable(shape, initializer=initializer, dtype=dtype, **kwargs)
        if self.created is not None:
            self.created.append(variable)
        return variable

    def _backend_update_step(self, gradients, variables, learning_rate):
        for gradient, variable in zip(gradients, variables):
            self.__dict__.update(self.settings_of[id(variable)])
            self.update_step(gradient, variable, self.learning_rate)

    def _backend_apply_gradients(self, gradients, variables):
        # What Keras does, with conditions whose branches assign nothing outside of themselves.
        steps = self.gradient_accumulation_steps
        if steps:
            accumulators = [self._accumulated_gradients[self._get_variable_index(v)] for v in variables]

            def update():
                self._clipped_update([(g + a) / steps for g, a in zip(gradients, accumulators)], variables)
                self._backend_reset_gradient_accumulators()

            self._choose((self._iterations + 1) % steps == 0, update,
                         lambda: self._backend_increment_gradient_accumulators(gradients, accumulators))
        else:
            self._clipped_update(gradients, variables)
        if self.use_ema:
            self._update_model_variables_moving_average(self._trainable_variables)
            self._choose((self.iterations + 1) % self.ema_overwrite_frequency == 0,
                         lambda: self._overwrite_model_variables_with_average_value(self._trainable_variables),
                         lambda: None)

    def _clipped_update(self, gradients, variables):
        gradients = self._clip_gradients(gradients)
        self._apply_weight_decay(variables)
        self._backend_update_step(gradients, variables, self.learning_rate)

    def _choose(self, condition, first, second):
        """Runs one of two functions that assign variables."""
        bindings = [(variable, tf.convert_to_tensor(variable)) for variable in self.assignable]
        values = tf.cond(condition, lambda: functional.call(first, bindings=bindings).values,
                         lambda: functional.call(second, bindings=bindings).values)
        for (variable, _), value in zip(bindings, values):
            variable.assign(value)

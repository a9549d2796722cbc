"""Keras code as pure functions: the only `keras.StatelessScope`.

`call` runs a user's closure with tensors in the place of its Keras variables and returns what it assigned, so that
nothing outside changes and the result can be differentiated with respect to every tensor that was put in.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.losses import loss as keras_loss
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.autograph.core import config as autograph
from tensorflow.python.eager.polymorphic_function import autograph_util
from tensorflow.python.ops import custom_gradient

# AutoGraph leaves this package alone, as it does Keras: it has no loops or branches over tensors to be rewritten, and
# tracing takes three times as long when every call is.
autograph.CONVERSION_RULES = (autograph.DoNotConvert("farhox"), *autograph.CONVERSION_RULES)

# Their custom gradients are derivatives.
_EXACT_BY_THEMSELVES = frozenset(["tensorflow", "keras", "farhox"])
_Function = type(tf.function(lambda: None))


class FunctionalResult(NamedTuple):
    """What a closure returned, and the value of every bound variable after it.

    Attributes:
        value: The closure's return value.
        values: List of tensors, the values of the bound variables afterwards, in the order of the bindings.
        assigned: List of the variables that the closure assigned, bound or not.
        read: Dictionary from the ids of the variables that the closure read to the variables.
        met: Set of the ids of those variables of `taken_over` that code asked for.
    """

    value: Any
    values: list
    assigned: list
    read: dict
    met: set


class _Scope(keras.StatelessScope):
    """A `StatelessScope` that remembers which variables were read and assigned."""

    original_scope = None

    def __init__(self, bindings: Any, draws: Any, taken_over: Any) -> None:
        super().__init__(state_mapping=bindings, collect_losses=True)
        self.assigned = []
        self.read = {}
        self.taken_over = taken_over
        self.met = set()
        self.found = {}
        self.graph = tf.compat.v1.get_default_graph()
        for variable, value in draws:
            super().add_update((variable, tf.cast(value, variable.dtype)))

    def get_current_value(self, variable: keras.Variable) -> Any:
        self.read[id(variable)] = variable
        value = super().get_current_value(variable)
        # What a closure inside of a closure is given no value for is what it is around it.
        return self.original_scope.get_current_value(variable) if value is None and self.original_scope else value

    def add_update(self, update: Any) -> None:
        variable, value = update
        self.assigned.append(variable)
        self._check_reached(value, f"It assigns {variable.path!r} there, as dropout and batch normalisation do.")
        # Of a variable that is assigned to another one, Keras would keep the object, which outside has another value.
        super().add_update((variable, tf.convert_to_tensor(value)))

    def add_loss(self, loss: Any) -> None:
        self._check_reached(loss, "It adds a loss there.")
        super().add_loss(loss)

    def _check_reached(self, value, what):
        """Raises a ValueError if a value was made in a branch or a loop of the closure, which it cannot leave."""
        if tf.is_symbolic_tensor(value) and value.graph is not self.graph and tf.compat.v1.get_default_graph(
                ) is value.graph:
            raise ValueError(
                "What an objective assigns or adds must not be inside of a branch or a loop over tensors (tf.cond, "
                f"tf.while_loop, or an if or a for that AutoGraph makes one). {what} Call the layer before, and choose "
                "between its results inside: tf.where(condition, layer(x), x).")


def call(function: Callable[..., Any], *arguments: Any, bindings: Any, draws: Any = (),
         taken_over: Any = None) -> FunctionalResult:
    """Calls `function(*arguments)` with tensors in the place of Keras variables.

    Inside another call, a variable without a binding has the value that it has there.

    Args:
        function: Any Python callable that reads or assigns Keras variables.
        bindings: List of (keras.Variable, tensor). Of two entries for one variable the later one counts.
        draws: The same for variables that the closure only reads, and tensors of any shape: one value per example in
            the place of a scalar, say. Code that computes with the variable then broadcasts.
        taken_over: For the objective that a step of training minimises: variables of which somebody else does a part
            that the closure knows of; `is_taken_over` tells it. None for any other closure.

    Returns:
        A `FunctionalResult`. No variable changes.
    """
    bindings = list(bindings)
    with user_code(), _Scope(bindings, draws, taken_over) as scope:
        value = function(*arguments)
        read = dict(scope.read)
        value = tf.nest.map_structure(
            lambda leaf: tf.convert_to_tensor(leaf) if isinstance(leaf, keras.Variable) else leaf, value)
    values = [scope.get_current_value(variable) for variable, _ in bindings]
    return FunctionalResult(value, values, scope.assigned, read, scope.met)


def is_running() -> bool:
    """Whether a closure is called by `call`."""
    return isinstance(get_stateless_scope(), _Scope)


def once(function: Callable[[Any], Any], argument: Any) -> Any:
    """`function(argument)`; inside of a `call` it is computed once for each pair of the two."""
    scope = get_stateless_scope()
    if not isinstance(scope, _Scope):
        return function(argument)
    key = id(function), id(argument)
    if key not in scope.found:
        # The pair is kept, so that no other one gets its ids.
        scope.found[key] = function, argument, function(argument)
    return scope.found[key][2]


def is_training_step() -> bool:
    """Whether a closure is called by `call` as the objective that a step of training minimises."""
    scope = get_stateless_scope()
    while isinstance(scope, _Scope) and scope.taken_over is None:
        scope = scope.original_scope
    return isinstance(scope, _Scope)


def is_taken_over(value: Any) -> bool:
    """Whether a Keras variable, or the tensor that it is bound to, is one of the `taken_over` of a call around."""
    scope = get_stateless_scope()
    while scope is not None:
        for variable in scope.taken_over or () if isinstance(scope, _Scope) else ():
            if value is variable or value is scope.state_mapping.get(id(variable)):
                scope.met.add(id(variable))
                return True
        scope = scope.original_scope
    return False


class _UserCode:
    """What holds in TensorFlow and Keras while a user's code is run into the graph of an inner training.

    - Calls of `tf.function`s run their Python function as AutoGraph rewrites it. Their own traces would keep tensors of
      this graph and hide what the function reads.
    - Keras' losses are not divided by the number of replicas, as they are under a distribution strategy for gradients
      that will be added up. Here every replica trains an inner problem of its own on whole batches.
    - What `tf.recompute_grad` and `keras.RematScope` wrap runs as it is: what is kept is chosen for the whole step, and
      their gradients have no derivatives.
    - A `tf.custom_gradient` has derivatives with respect to its arguments; that a function with one reads an inner or
      an outer variable is an error, which otherwise would count as a constant.

    Contexts are counted: replica threads of a strategy enter and leave them in any order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._scale = keras_loss.scale_loss_for_distribution
        self._in_graph, self._in_eager = (
            custom_gradient._graph_mode_decorator, custom_gradient._eager_mode_decorator)
        self._call_function = _Function.__call__
        self._eagerly = False

    @contextlib.contextmanager
    def __call__(self) -> Any:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._eagerly = tf.config.functions_run_eagerly()
                tf.config.run_functions_eagerly(True)
                _Function.__call__ = _rewritten(self._call_function)
                keras_loss.scale_loss_for_distribution = lambda loss: loss
                custom_gradient._graph_mode_decorator = _with_checked_reads(self._in_graph)
                custom_gradient._eager_mode_decorator = _with_checked_reads(self._in_eager)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    tf.config.run_functions_eagerly(self._eagerly)
                    _Function.__call__ = self._call_function
                    keras_loss.scale_loss_for_distribution = self._scale
                    custom_gradient._graph_mode_decorator = self._in_graph
                    custom_gradient._eager_mode_decorator = self._in_eager


def _rewritten(call_function):
    """How a `tf.function` is called, with what `_UserCode` says of it."""

    def call(function, *args, **kwargs):
        if tf.executing_eagerly() or not function._autograph:
            return call_function(function, *args, **kwargs)
        rewritten = autograph_util.py_func_from_autograph(
            function.python_function, function._experimental_autograph_options)
        with ag_ctx.ControlStatusCtx(ag_ctx.Status.UNSPECIFIED):  # The functions around are not to be rewritten.
            return rewritten(*args, **kwargs)

    return call


def _with_checked_reads(decorator):
    """How TensorFlow calls a function with a gradient of its own, with what `_UserCode` says of it."""

    def call(function, args, kwargs):
        if function.__qualname__.startswith("recompute_grad."):
            return inspect.getclosurevars(function).nonlocals["f"](*args, **kwargs)
        scope = get_stateless_scope()
        if not isinstance(scope, _Scope):
            return decorator(function, args, kwargs)
        before, scope.read = scope.read, {}
        try:
            result = decorator(function, args, kwargs)
            hidden = [variable.path for key, variable in scope.read.items()
                      if key in scope.state_mapping and variable.trainable]
        finally:
            scope.read = {**before, **scope.read}
        if hidden:
            raise ValueError(
                "A function under tf.custom_gradient has derivatives with respect to its arguments alone: variables "
                f"must be passed to it. {getattr(function, '__name__', function)!r} reads {', '.join(hidden)}.")
        if is_training_step() and (function.__module__ or "").split(".")[0] not in _EXACT_BY_THEMSELVES:
            warnings.warn(
                f"The gradient that tf.custom_gradient gives {getattr(function, '__name__', function)!r} counts as its "
                "derivative in a hypergradient too. Where it is another one (a reversed, clipped or straight-through "
                "gradient), write it with tf.stop_gradient, as g(x) + tf.stop_gradient(f(x) - g(x)): the hypergradient "
                "is then that of the training that happens.", stacklevel=4)
        return result

    return call


user_code = _UserCode()

"""A function that is traced again when a Python value that it read has changed.

A trace keeps numbers of Python as constants. Code that is called eagerly is expected to see a number that was changed
since: a coefficient in a closure, the rate of a layer.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.sums import sums_as_written

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_FUNCTION = type(tf.function(lambda: None))
# Their functions read what they are given.
_LIBRARIES = frozenset(["tensorflow", "keras", "numpy"])
_DEPTH = 8
_MISSING = object()
# Traces because of values that changed, after which a warning says so.
_MANY = 5


class Retraced:
    """A `tf.function` that is traced again when a Python value has changed since the last trace.

    Args:
        function: Callable, what is traced.
        roots: List of objects and functions through which it reads Python values; see `Watched`.
    """

    def __init__(self, function: Callable[..., Any], roots: list[Any]) -> None:
        self._python_function = function
        self._roots = roots
        self._function: Any = None
        self._watched: Watched | None = None
        self._again = 0

    def __call__(self, *arguments: Any) -> Any:
        changed = None if self._watched is None else self._watched.changed()
        if self._watched is None or changed is not None:
            self._function = tf.function(self._python_function, autograph=False)
        if changed is not None:
            self._again += 1
            if self._again == _MANY:
                warnings.warn(
                    f"The objectives were traced {_MANY} times again, which takes seconds each, because {changed!r}, "
                    "which they read, was another value at each call. Pass it as a part of the batch, or make it a "
                    "keras.Variable that is assigned.", stacklevel=3)
        traces = self._function.experimental_get_tracing_count()
        with sums_as_written():
            result = self._function(*arguments)
        if self._function.experimental_get_tracing_count() > traces:
            # Afterwards, so that code which counts its traces is not traced because of that.
            self._watched = Watched(self._roots)
        return result


class Watched:
    """Values of Python that functions and objects read, as they are now.

    What is seen: what closures and the global names of a function hold, through the functions that are found there;
    numbers, strings and functions among the attributes of objects, of Keras layers and of the layers in them. A list or
    an array that is changed in place is the same one.

    Args:
        roots: List of functions and objects.
    """

    def __init__(self, roots: list[Any]) -> None:
        self._entries: list[tuple[str, Any, Any, Any]] = []
        self._seen: dict[int, Any] = {}
        for root in roots:
            self._follow(root, _DEPTH)
        self._seen.clear()

    def changed(self) -> str | None:
        """The name of the first value that is another one now, or None."""
        return next((name for name, place, key, value in self._entries if not _is_same(_read(place, key), value)), None)

    def _follow(self, value, depth):
        if depth == 0 or isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # Kept, so that no other object gets its id meanwhile.
        if isinstance(value, _FUNCTION):
            self._follow(value.python_function, depth)
        elif isinstance(value, types.FunctionType):
            self._follow_function(value, depth)
        elif isinstance(value, types.MethodType):
            self._follow(value.__func__, depth)
            self._follow(value.__self__, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._follow(part, depth)
        elif isinstance(value, (list, tuple)):
            for part in value:
                self._follow(part, depth - 1)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                self._add(str(key), value, key, part, depth)
        elif isinstance(value, keras.Layer):
            for layer in value._flatten_layers():
                self._attributes(layer, 1)
            self._follow(vars(type(value)).get("call"), depth - 1)
        elif not isinstance(value, (types.ModuleType, type, tf.Tensor, tf.Variable, keras.Variable, np.ndarray)):
            self._attributes(value, depth)

    def _follow_function(self, function, depth):
        if (function.__module__ or "").split(".")[0] in _LIBRARIES:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            self._add(name, cell, None, _read(cell, None), depth)
        for name in sorted(_global_names(function.__code__)):
            if name in function.__globals__:
                self._add(name, function.__globals__, name, function.__globals__[name], depth)
        self._follow(function.__defaults__, depth)
        self._follow(function.__kwdefaults__, depth)

    def _attributes(self, value, depth):
        attributes = getattr(value, "__dict__", {})
        for name, part in list(attributes.items()):
            # What Keras keeps for itself changes from call to call.
            if name.startswith("_") and type(value).__module__.split(".")[0] in _LIBRARIES:
                continue
            if isinstance(part, (*_PLAIN, types.FunctionType, types.MethodType, functools.partial, _FUNCTION)):
                self._add(name, attributes, name, part, depth)
            elif depth > 1:
                self._follow(part, depth - 1)

    def _add(self, name, place, key, value, depth):
        self._entries.append((name, place, key, value))
        self._follow(value, depth - 1)


def _read(place, key):
    if not isinstance(place, types.CellType):
        return place.get(key, _MISSING)
    try:
        return place.cell_contents
    except ValueError:  # Nothing was put in yet.
        return _MISSING


def _is_same(now, before):
    if now is before:
        return True
    return type(now) is type(before) and isinstance(now, _PLAIN) and bool(now == before or now != now)


def _global_names(code):
    """The global names that a function's code reads, and that of the functions which are made in it."""
    inner = [constant for constant in code.co_consts if inspect.iscode(constant)]
    own = {instruction.argval for instruction in dis.get_instructions(code) if instruction.opname == "LOAD_GLOBAL"}
    return own.union(*(_global_names(part) for part in inner))

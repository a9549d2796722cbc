"""Whether hyper-iterations are compiled with XLA: said by the user, or measured at the first one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from farhox.training.hyper_optimizer import HyperOptimizer

# XLA is worth its compilation if a hyper-iteration takes this part of its time without, at most.
_WORTH = 0.9
_ROUNDS, _SECONDS = 10, 1.0


class Compilation:
    """What `jit_compile` of `HyperOptimizer.compile` says, and what came of "auto".

    Args:
        optimizer: The `HyperOptimizer`.
        setting: Bool, or "auto".

    Attributes:
        pending: Bool, whether it is still to be measured. Until then nothing is compiled with XLA.
        choice: Str, what was chosen and why; None where nothing was.

    Raises:
        ValueError: If `setting` is something else.
    """

    def __init__(self, optimizer: HyperOptimizer, setting: bool | str) -> None:
        if not (isinstance(setting, (bool, np.bool_)) or isinstance(setting, str) and setting == "auto"):
            raise ValueError(f'jit_compile must be True, False or "auto". Received: {setting!r}')
        self._optimizer = optimizer
        self.pending = setting == "auto"
        self.choice: str | None = None

    @property
    def checks_apart(self) -> bool:
        """Whether data are checked beside the hyper-iterations, because XLA leaves checks out or may come to do so."""
        return self.pending or self._optimizer.compiled and bool(self._optimizer.jit_compile)

    def chosen(self, function: Callable[..., Any], arguments: Any,
               compared: Callable[[Any], Any]) -> Callable[..., Any]:
        """`function` compiled as it is said, or as measured with these arguments; all variables stay as they are.

        Args:
            function: What is done in a hyper-iteration.
            arguments: Tuple, what it is given.
            compared: Callable, its result to the list of numbers that must be the same with and without XLA.
        """
        if not self.pending:
            return self._optimizer._compiled(function)
        if self._optimizer.run_eagerly or self._optimizer.distribute_strategy.num_replicas_in_sync > 1:
            reason = "run_eagerly" if self._optimizer.run_eagerly else "several replicas"
            self._choose(False, f"without XLA, which is not measured with {reason}.")
            return self._optimizer._compiled(function)
        functions = [tf.function(function, autograph=False, jit_compile=jit_compile) for jit_compile in (False, True)]
        variables = self._variables()
        before = [tf.identity(variable.value) for variable in variables]

        def seconds_and_result(compiled):
            start = time.perf_counter()
            result = compared(compiled(*arguments))
            result = [np.asarray(part) for part in result]
            spent = time.perf_counter() - start
            for variable, value in zip(variables, before):
                variable.assign(value)
            return spent, result

        # Errors of the data or of the problem come here.
        _, plain = seconds_and_result(functions[0])
        try:
            _, compiled = seconds_and_result(functions[1])
        except (tf.errors.OpError, NotImplementedError, TypeError, ValueError) as error:
            for variable, value in zip(variables, before):
                variable.assign(value)
            self._choose(False, f"without XLA, which cannot compile it: {_first_line(error)}")
            return functions[0]
        difference = _difference(plain, compiled)
        if not difference <= _tolerance(plain):
            self._choose(False, "without XLA, under which the hypergradient is another one (relative difference "
                                f"{difference:.2g}), as of draws. jit_compile=True takes it all the same.")
            return functions[0]
        times, start = [], time.perf_counter()
        while not times or len(times) < _ROUNDS and time.perf_counter() - start < _SECONDS:
            times.append([seconds_and_result(compiled)[0] for compiled in functions])
        without, with_xla = np.min(times, axis=0)
        worth = bool(with_xla <= _WORTH * without)
        self._choose(worth, f"{'with' if worth else 'without'} XLA. A hyper-iteration takes {_in_words(with_xla)} with "
                            f"it and {_in_words(without)} without.")
        return functions[worth]

    def measured_first(self, train_function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that `fit` calls for each execution, the first call of which measures if that is pending."""
        if not self.pending or isinstance(train_function, _MeasuredFirst):
            return train_function
        return _MeasuredFirst(self._optimizer, self)

    def _choose(self, jit_compile, words):
        self.pending = False
        self._optimizer.jit_compile = jit_compile
        self.choice = f'jit_compile="auto": {words}'
        sys.stdout.write(self.choice + "\n")

    def _variables(self):
        optimizer = self._optimizer
        every = [*optimizer.variables, *optimizer.metrics_variables, *optimizer.optimizer.variables]
        return list({id(variable): variable for variable in every}.values())


class _MeasuredFirst:
    """Keras' `train_function` until the first execution, which it takes itself, hyper-iteration by hyper-iteration.

    No element of the data is read twice: streams and shuffled data would go on otherwise.
    """

    def __init__(self, optimizer: HyperOptimizer, compilation: Compilation) -> None:
        self._optimizer, self._compilation = optimizer, compilation

    def __call__(self, iterator: Any) -> dict[str, Any]:
        optimizer = self._optimizer
        if optimizer.run_eagerly or optimizer.distribute_strategy.num_replicas_in_sync > 1:
            self._compilation.chosen(optimizer.train_step, (), list)
            optimizer.make_train_function(force=True)
            return optimizer.train_function(iterator)
        element = next(iterator)
        train = self._compilation.chosen(optimizer.trained_on, (element,), lambda both: [
            both[1].outer_loss, *both[1].gradients])
        optimizer.make_train_function(force=True)
        logs, _ = train(element)
        for _ in range(optimizer.steps_per_execution - 1):
            try:
                logs, _ = train(next(iterator))
            except StopIteration:
                break
        return logs


def _difference(first, second):
    """The larger of the relative differences of the outer loss and of the hypergradient."""
    def of(a, b):
        return np.linalg.norm(a - b) / max(np.linalg.norm(a), np.finfo(a.dtype).tiny) if np.any(a != b) else 0.0

    flat = [np.concatenate([np.ravel(part).astype("float64") for part in parts[1:]]) for parts in (first, second)]
    return max(of(first[0].astype("float64"), second[0].astype("float64")), of(*flat))


def _tolerance(numbers):
    """What rounding may come to: half of the digits, and three times that."""
    # Of bfloat16, too, which is not NumPy's.
    return 3 * max(float(tf.experimental.numpy.finfo(part.dtype).eps) for part in numbers) ** 0.5


def _first_line(error):
    text = getattr(error, "message", None) or str(error)
    return text.strip().split("\n")[0][:200]


def _in_words(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"

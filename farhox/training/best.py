"""BestModel: a Keras callback that keeps the best hyper-iteration of `fit`, and writes the model trained with it."""

import math
import os
from typing import Any

import keras
import tensorflow as tf

from farhox._core import functional
from farhox._core.logs import log_names
from farhox._core.types import Data, Logs
from farhox.training.hyper_optimizer import HyperOptimizer
from farhox.training.trained import known_model, model_at, trained_copy


class BestModel(keras.callbacks.Callback):
    """Keeps the outer values with the smallest outer loss, and writes the `.keras` file of a model trained with them.

    The outer loss of a hyper-iteration is that of the values before its update, and it is those that are kept. With a
    stochastic outer batch the smallest loss is a matter of luck: monitor the validation loss of an epoch then.

    ```python
    best = farhox.callbacks.BestModel("best.keras", farhox.repeat((x, y), 100))
    optimizer.fit(data, epochs=20, callbacks=[best])
    print(best.loss, best.values)
    model = keras.models.load_model("best.keras")
    ```

    Args:
        path: Path of the file, which ends in ".keras"; None writes none. It is written after each epoch that brought a
            better one, in one step: an interruption leaves the file before it.
        data: T inner batches or a `tf.data.Dataset` of hyper-iterations, what the model is trained on, see
            `HyperOptimizer.trained_model`. Not used online, where the model is trained already.
        monitor: "outer_loss" for each hyper-iteration, or the name of a value in the logs of an epoch, "val_loss" for
            example, for the values at its end.
        mode: "min" or "max", what is better.

    Attributes:
        loss: Float, the best monitored value so far.
        values: Dictionary from the names of hyperparameters to their values in natural units, NumPy arrays.
        outer: List of arrays aligned with `problem.outer_variables`, the best unconstrained values.
        hyper_iteration: Int, the hyper-iterations before the best one.

    Raises:
        ValueError: If the path does not end in ".keras", `mode` is neither, or a path is given without data for a run
            that is not online; when an epoch ends, if the logs have no such value.
        TypeError: When training begins, if the model is no `HyperOptimizer`.
    """

    def __init__(self, path: str | os.PathLike | None = None, data: Data = None, monitor: str = "outer_loss",
                 mode: str = "min") -> None:
        super().__init__()
        if path is not None and not os.fspath(path).endswith(".keras"):
            raise ValueError(f'path must end in ".keras". Received: {path!r}')
        if mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max". Received: {mode!r}')
        self.path = None if path is None else os.fspath(path)
        self.data, self.monitor, self._sign = data, monitor, 1.0 if mode == "min" else -1.0
        self.loss = math.inf if mode == "min" else -math.inf
        self.values: dict[str, Any] = {}
        self.outer: Any = None
        self.hyper_iteration: int | None = None
        self._state: Any = None
        self._is_written = True

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if not isinstance(self.model, HyperOptimizer):
            raise TypeError(f"A BestModel needs a farhox.HyperOptimizer. Received: {self.model!r}")
        if self.path is not None:
            known_model(self.model.problem)
            if self.data is None and not self.model.online:
                raise ValueError("A BestModel with a path needs data to train the model on: inner batches. "
                                 "Received: data=None")

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        if self.monitor == "outer_loss":
            self._before = self._outer_values(), self.model.hyper_iterations

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if self.monitor == "outer_loss":
            self._look(float(self.model.last_outer_loss.numpy()), *self._before)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if self.monitor != "outer_loss":
            if self.monitor not in (logs or {}):
                raise ValueError(f"monitor must be a value in the logs of an epoch, one of {sorted(logs or {})}. "
                                 f"Received: {self.monitor!r}")
            self._look(float((logs or {})[self.monitor]), self._outer_values(), self.model.hyper_iterations)
        if self._is_written or self.path is None:
            return
        problem, outer = self.model.problem, [tf.convert_to_tensor(value) for value in self.outer]
        trained = model_at(problem, outer, self._state) if self.model.online else trained_copy(
            self.model, self.data, outer)
        # Keras goes by the ending of the name.
        part = f"{self.path[:-len('.keras')]}.part.keras"
        trained.save(part)
        os.replace(part, self.path)
        self._is_written = True

    def _outer_values(self):
        return [variable.numpy() for variable in self.model.problem.outer_variables]

    def _look(self, loss, outer, hyper_iteration):
        if not self._sign * loss < self._sign * self.loss:  # What is not a number is not better.
            return
        self.loss, self.outer, self.hyper_iteration, self._is_written = loss, outer, hyper_iteration, False
        values = dict(zip(map(id, self.model.problem.outer_variables), outer))
        self.values = {
            name: values[id(entry)] if isinstance(entry, keras.Variable) else _natural(
                entry, values[id(entry.variable)])
            for name, entry in log_names(self.model.problem).items()}
        if self.model.online:
            # The state at which the outer loss was taken is the one kept.
            self._state = self.model.kept_state()


def _natural(entry, unconstrained):
    bindings = [(entry.variable, tf.convert_to_tensor(unconstrained))]
    return functional.call(entry.natural_value, bindings=bindings).value.numpy()

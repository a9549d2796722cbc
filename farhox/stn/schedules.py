"""The schedule of hyperparameters that a self-tuning model found: recorded, saved, replayed in plain training."""

import json
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from farhox._core import checks
from farhox._core.resumable import Resumable
from farhox._core.types import Logs
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.gates import as_hyperparameters


class ScheduleRecorder(keras.callbacks.Callback, Resumable):
    """Records the hyperparameters of a `SelfTuningModel` while it trains.

    Args:
        every: Positive int, training steps between two records.
        path: File to write at the end of every epoch, or None.

    Attributes:
        schedule: Dictionary: "steps", a list of the numbers of training steps taken, and "values", a dictionary by
            name of lists of values in natural units, not floored, in force from then on.

    Raises:
        ValueError: If `every` is not positive, or, when training begins, the model is no `SelfTuningModel` or two
            hyperparameters have one name.
    """

    def __init__(self, every: int = 1, path: str | os.PathLike | None = None) -> None:
        super().__init__()
        self.every, self.path = checks.positive_integer("every", every), path
        self.schedule = {"steps": [], "values": {}}

    def on_train_begin(self, logs: Logs | None = None) -> None:
        hyperparameters = getattr(self.model, "hyperparameters", None)
        if hyperparameters is None:
            raise ValueError("A ScheduleRecorder needs a SelfTuningModel, which has hyperparameters. "
                             f"Received: {self.model!r}")
        self._hyperparameters = _by_name(hyperparameters)
        if not self.schedule["values"]:
            self.schedule["values"] = {name: [] for name in self._hyperparameters}
        self._record()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if self._steps() == self.schedule["steps"][-1] or self._steps() >= self.schedule["steps"][-1] + self.every:
            self._record()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if self.path is not None:
            self.save(self.path)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the schedule as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.schedule, file)

    def resume_state(self) -> Any:
        return self.schedule

    def resume_from(self, state: Any) -> None:
        self.schedule = state

    def _steps(self):
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def _record(self):
        # A validation step leaves the number of training steps, and its values are those of the next one.
        if self.schedule["steps"] and self.schedule["steps"][-1] == self._steps():
            for values in (self.schedule["steps"], *self.schedule["values"].values()):
                values.pop()
        self.schedule["steps"].append(self._steps())
        for name, entry in self._hyperparameters.items():
            self.schedule["values"][name].append(entry.numpy().tolist())


class ScheduleReplay(keras.callbacks.Callback):
    """Sets hyperparameters to recorded values while a Keras model trains, step by step.

    For plain training of the network that was converted: its layers (`stn.Dropout(rate)`, ...), regularizers and losses
    read the same hyperparameters, which are then numbers that change. After the last record its values stay.

    Args:
        schedule: Dictionary from a `ScheduleRecorder`, or the path of its JSON file.
        hyperparameters: List of `Hyperparameter`, matched by name.

    Raises:
        ValueError: If a hyperparameter is not in the schedule, or the schedule, or its file, is damaged.
    """

    def __init__(self, schedule: Any, hyperparameters: Sequence[OuterVariable]) -> None:
        super().__init__()
        schedule = _checked(schedule)
        self._hyperparameters = _by_name(as_hyperparameters(hyperparameters, "ScheduleReplay"))
        missing = [name for name in self._hyperparameters if name not in schedule["values"]]
        if missing:
            raise ValueError(f"Every hyperparameter must be in the schedule, which has {list(schedule['values'])}. "
                             f"Received: {', '.join(missing)}")
        self._steps = np.asarray(schedule["steps"])
        self._values = schedule["values"]
        self._place = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._place = None
        self._set()

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        self._set()

    def _set(self):
        steps = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        place = max(0, int(np.searchsorted(self._steps, steps, side="right")) - 1)
        if place != self._place:
            for name, entry in self._hyperparameters.items():
                entry.assign(_inside(entry, self._values[name][place]))
            self._place = place


def _checked(schedule):
    """A schedule, or that of a file, if every step has its values."""
    source = "the schedule"
    if not isinstance(schedule, dict):
        source = f"the file {schedule}"
        with open(schedule, encoding="utf-8") as file:
            try:
                schedule = json.load(file)
            except ValueError as error:
                raise ValueError("A schedule must be JSON that a ScheduleRecorder has saved. "
                                 f"Received: {source}, {error}") from error
    complete = isinstance(schedule, dict) and {"steps", "values"} <= set(schedule) and schedule["steps"] and all(
        len(values) == len(schedule["steps"]) for values in schedule["values"].values())
    if not complete:
        raise ValueError('A schedule must have "steps", and "values" of every hyperparameter at each of them. '
                         f"Received: {source}, in which they are missing or of other lengths")
    return schedule


def _inside(hyperparameter, value):
    """The value, moved off a bound that it was rounded to."""
    low, high = hyperparameter.low, hyperparameter.high
    margin = 1e-6 * (high - low if low is not None and high is not None else 1.0)
    least = None if low is None else 1e-30 if hyperparameter.log else low + margin
    return np.clip(value, least, None if high is None else high - margin)


def _by_name(hyperparameters):
    named = {entry.name: entry for entry in hyperparameters}
    if len(named) < len(hyperparameters):
        raise ValueError("Hyperparameters of a schedule must have different names. "
                         f"Received: {[entry.name for entry in hyperparameters]}")
    return named

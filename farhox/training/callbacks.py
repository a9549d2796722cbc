"""HyperparameterTrace: a Keras callback that records the hyperparameters while they are learned."""

import csv
import importlib.util
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.logs import log_names, log_values
from farhox._core.resumable import Resumable
from farhox._core.types import Arrays, Logs
from farhox.training.hyper_optimizer import HyperOptimizer

_COUNT = "hyper_iteration"


class HyperparameterTrace(keras.callbacks.Callback, Resumable):
    """Records all hyperparameters of a `HyperOptimizer`, in natural units, as `fit` learns them.

    The record at hyper-iteration k holds the values after k hyper-iterations, that at 0 those of the start.

    ```python
    trace = farhox.callbacks.HyperparameterTrace(csv_path="trace.csv", log_dir="logs")
    optimizer.fit(data, epochs=20, callbacks=[trace, farhox.callbacks.Resume("run")])
    trace.history["learning_rate"]
    ```

    The file has a column per scalar, named as in Keras' logs: an array of up to 16 entries has a column for each, a
    larger one its mean. In TensorBoard arrays are histograms as well.

    Every record is on disk before training goes on. When a run is resumed, records of the file that it is going to
    repeat are replaced, so that the file ends as that of a run that was not interrupted; TensorBoard shows repeated
    records twice. In the same way a run that starts anew starts the file anew.

    Args:
        csv_path: Path of a CSV file or None.
        log_dir: Folder of TensorBoard's event files or None; needs the package tensorboard.
        every: Positive int, hyper-iterations between two records; or "epoch". With `steps_per_execution` a record
            waits for the end of the execution.

    Raises:
        ValueError: If `every` is neither; when training begins, if the problem has no hyperparameters, or there is a
            file of other columns at `csv_path`.
        TypeError: When training begins, if the model is no `HyperOptimizer`.
        ImportError: If `log_dir` is given and tensorboard is not installed.
    """

    def __init__(self, csv_path: str | os.PathLike | None = None, log_dir: str | os.PathLike | None = None,
                 every: int = 1) -> None:
        super().__init__()
        if every != "epoch" and not (checks.is_integer(every) and every >= 1):
            raise ValueError(f'every must be a positive integer or "epoch". Received: every={every!r}')
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError("log_dir needs the package tensorboard, which is not installed: "
                              "pip install 'farhox[tensorboard]'")
        self.csv_path = None if csv_path is None else os.fspath(csv_path)
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.every = every
        self._records = []
        self._named: Any = None
        self._writer: Any = None
        self._last: Any = None
        self._begun = False

    @property
    def history(self) -> Arrays:
        """Dictionary: the number of hyper-iterations done at each record, and by name the values, [records, *shape].

        Arrays are whole. Only this object's own records are here; `read_trace` reads those of a file.
        """
        counts = np.array([count for count, _ in self._records], dtype="int64")
        return {_COUNT: counts, **{name: np.stack([values[name] for _, values in self._records])
                                   for name in (self._records[0][1] if self._records else {})}}

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if not isinstance(self.model, HyperOptimizer):
            raise TypeError("A HyperparameterTrace needs a farhox.HyperOptimizer, which has hyperparameters. "
                            f"Received: {self.model!r}")
        self._named = log_names(self.model.problem)
        if not self._named:
            raise ValueError("A HyperparameterTrace needs a problem with hyperparameters or other scalar outer "
                             f"variables. Received: {len(self.model.problem.outer_variables)} variables that are none")
        self._begun = False
        if self.csv_path is not None:
            _checked_rows(self.csv_path, self._columns())
        self._writer = None if self.log_dir is None else tf.summary.create_file_writer(self.log_dir)

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        if not self._begun:
            # Only now have all callbacks begun: one after this one may have set the model back.
            self._begun = True
            self._forget_from(self.model.hyper_iterations)
        self._record_if_due(between_epochs=True)

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        self._record_if_due(between_epochs=False)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._record_if_due(between_epochs=True)

    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._writer is not None:
            self._writer.close()

    def resume_state(self) -> Any:
        # Records stay in the file: in a state, which is written again and again, they would be ever more.
        return self._last

    def resume_from(self, state: Any) -> None:
        self._begun = True
        self._forget_from(0 if state is None else state + 1)

    def _record_if_due(self, between_epochs):
        count = self.model.hyper_iterations
        if self._last is None:
            due = True
        elif self.every == "epoch":
            due = between_epochs and count > self._last
        else:
            due = count - self._last >= self.every
        if due:
            self._record(count)

    def _forget_from(self, count):
        """Drops what the run is going to record anew: with the values of now, which may be another run's start."""
        self._records = [record for record in self._records if record[0] < count]
        counts = [record[0] for record in self._records]
        if self.csv_path is not None:
            columns = self._columns()
            rows = [row for row in _checked_rows(self.csv_path, columns) if int(row[0]) < count]
            # Replaced in one step, so that an interruption here loses nothing.
            part = f"{self.csv_path}.part"
            with open(part, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *rows])
            os.replace(part, self.csv_path)
            counts = [int(row[0]) for row in rows]
        self._last = counts[-1] if counts else None

    def _record(self, count):
        scalars = {name: keras.ops.convert_to_numpy(value) for name, value in log_values(self._named).items()}
        values = {name: keras.ops.convert_to_numpy(entry) if isinstance(entry, keras.Variable) else entry.numpy()
                  for name, entry in self._named.items()}
        self._records.append((count, values))
        if self.csv_path is not None:
            with open(self.csv_path, "a", newline="", encoding="utf-8") as file:
                # Written by NumPy, the shortest digits that give the same float again.
                csv.writer(file).writerow([count, *(str(value[()]) for value in scalars.values())])
        if self._writer is not None:
            with self._writer.as_default(step=count):
                for name, value in scalars.items():
                    tf.summary.scalar(f"hyperparameters/{name}", value)
                for name, value in values.items():
                    if value.ndim:
                        tf.summary.histogram(f"hyperparameters/{name}", value)
            self._writer.flush()
        self._last = count

    def _columns(self):
        return [_COUNT, *log_values(self._named)]


def read_trace(csv_path: str | os.PathLike) -> Arrays:
    """Reads the file of a `HyperparameterTrace`.

    Args:
        csv_path: Path of the CSV file.

    Returns:
        Dictionary from the names of the columns to arrays [records]: "hyper_iteration" and the scalars.

    Raises:
        ValueError: If the file is not that of a trace, or a line is short of entries.
    """
    columns, rows = _read(csv_path)
    if not columns or columns[0] != _COUNT:
        raise ValueError(f"The file of a trace begins with the column {_COUNT}. Received: {os.fspath(csv_path)!r} with "
                         f"the columns {columns}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(columns):
            raise ValueError(f"Every line of a trace must have an entry for each of its {len(columns)} columns. "
                             f"Received: {os.fspath(csv_path)!r} with {len(row)} in line {number}")
    series = list(zip(*rows)) or [()] * len(columns)
    return {name: np.array(entries, dtype="int64" if name == _COUNT else "float64")
            for name, entries in zip(columns, series)}


def _checked_rows(path, columns):
    """The rows of a trace, none if there is no file."""
    if not os.path.exists(path):
        return []
    found, rows = _read(path)
    if found not in ([], columns):
        raise ValueError(f"csv_path must be a new file or the trace of the same hyperparameters, with the columns "
                         f"{columns}. Received: {path!r} with the columns {found}")
    return rows


def _read(path):
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.readlines()
    # A line without an end was being written when the process ended.
    columns, *rows = list(csv.reader(line for line in lines if line.endswith("\n"))) or [[]]
    return columns, rows

"""Resume: a run of `fit` that goes on after an interruption as if there had been none."""

import contextlib
import copy
import inspect
import os
import re
import time
from typing import Any

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.resumable import Resumable
from farhox._core.types import Logs
from farhox.training.saved_states import SavedStates
from farhox.training.signals import Signals

# What a run changes in Keras' callbacks that have a state.
_STATE_OF = {
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "cooldown_counter", "best"),
    keras.callbacks.ModelCheckpoint: ("best", "_batches_seen_since_last_saving", "_last_batch_seen"),
    keras.callbacks.History: ("history", "epoch"),
}


class Resume(keras.callbacks.Callback):
    """Saves a training as it goes and goes on with it after an interruption, bit for bit as if there had been none.

    For a `HyperOptimizer`, a learner, a `SelfTuningModel` and any built Keras model:

    ```python
    optimizer.fit(data, epochs=200, callbacks=[farhox.callbacks.Resume("run")])
    ```

    Run again, the same program goes on from the last state in the folder, and `fit` returns the whole history. A
    training that is finished is not done again: its state is restored. SIGTERM and Ctrl-C are obeyed at the next end of
    a batch, after the state was saved, with a line that says so; a second one is obeyed at once.

    A state is one file that appears in one step: all variables of the model, states of its seed generators and metrics,
    all its optimizers' slots, carried memory and warm starts, the place in the data, history, and the state of
    `EarlyStopping`, `ReduceLROnPlateau`, `ModelCheckpoint` and each callback that is a `Resumable`. The last two are
    kept. One that is damaged is named in a warning, and the one before it is used.

    The data are read again from their beginning, without training on them, up to the place where the run goes on. They
    must be such that a program started again makes the same ones.

    Args:
        directory: Folder of this run alone.
        every: "epoch", or a positive int: batches, which are hyper-iterations, between two saved states. The end is
            saved in any case.
        seconds: Number, at least 0: no state is saved sooner after the last one.
        replay: Bool. False: `fit` is given data that begin with the epoch `initial_epoch`, or that are the same in all
            epochs, and nothing is read again but the beginning of an epoch that was interrupted.

    Raises:
        ValueError: If an argument is out of range; when training begins, if the model is not built, a state is of
            another model, states are there but all damaged, or `BackupAndRestore` or another `Resume` is in the list.
        OSError: When training begins or a state is saved, with the path, if it cannot be written. The last state stays.
    """

    def __init__(self, directory: str | os.PathLike, every: int | str = "epoch", seconds: float | None = 0.0,
                 replay: bool = True) -> None:
        super().__init__()
        if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
            raise ValueError(f"directory must be the path of a folder of this run alone. Received: {directory!r}")
        self.every = every if every == "epoch" else checks.positive_integer("every, where it is not \"epoch\",", every)
        self.seconds = checks.non_negative_number("seconds", seconds)
        self.replay = bool(replay)
        self._states = SavedStates(directory)
        self._signals = Signals(self._is_running)
        # A state to go on from, until the run is where it was saved.
        self._state: Any = None
        self._functions: Any = None
        self._list: Any = None
        self._others: list[Any] = []
        self._saved = time.monotonic()

    @property
    def saved_states(self) -> SavedStates:
        """The states in the folder."""
        return self._states

    @property
    def initial_epoch(self) -> int:
        """Int, the number of epochs that are done in the last state of the folder."""
        state = self._states.load()
        return 0 if state is None else state["epoch"]

    def is_time(self) -> bool:
        """Whether the last state is as old as `seconds` says."""
        return time.monotonic() - self._saved >= self.seconds

    def has_saved(self) -> None:
        """Notes that a state was saved now."""
        self._saved = time.monotonic()

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._list = _callback_list(self)
        self._others = [callback for callback in self._list.callbacks if callback is not self]
        self._check()
        self._epoch, self._batch, self._unsaved, self._saved = 0, 0, 0, time.monotonic()
        self._state, self._stepped = self._states.load(), False
        self._finished = self._state is not None and (
            self._state["stopped"] or self._state["epoch"] >= self.params["epochs"])
        if self._state is not None:
            self._restore_variables()
        # From here on, Resume hears of everything last, after Keras' History: it saves what the others made of it.
        self._list.callbacks = [*self._others, self]
        if self._finished:
            self._list.callbacks = [self, *self._others]
            self._start_with(self.params["epochs"])
            return
        self._states.check_writable()
        if self._state is not None:
            self._list.callbacks = [self]
            self._replace_functions()
            if not self.replay:
                self._start_with(self._state["epoch"])
        self._signals.start()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._epoch, self._batch = epoch, 0
        if self._state is None or epoch < self._state["epoch"]:
            return
        in_the_middle = self._state["batch"] > 0 and epoch == self._state["epoch"]
        self._start_with(None)
        with self._ending_on_errors():
            self._restore_variables(all_built=not in_the_middle)
            self._restore_callbacks()
            for callback in self._others:
                callback.on_epoch_begin(epoch, logs)
        if not in_the_middle:
            self._go_on()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        self._batch += 1
        if self._state is not None:
            if self._signals.received is not None:
                self._end(self._state["epoch"], self._state["batch"])
            if self._epoch == self._state["epoch"] and self._batch == self._state["batch"]:
                with self._ending_on_errors():
                    self._restore_variables(metrics=True)
                    self._restore_callbacks()
                self._go_on()
            return
        self._unsaved += self.model.steps_per_execution
        if self._signals.received is not None:
            self._save(logs)
            self._end(self._epoch, self._batch)
        if self.every != "epoch" and self._unsaved >= self.every and self.is_time():
            self._save(logs)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if self._state is not None:
            if epoch == self._state["epoch"]:
                batches = self._state["batch"]
                self._finish()
                raise ValueError(f"Data must be those of the run that goes on, which was saved after {batches} batches "
                                 f"of epoch {epoch}. Received data with {self._batch} batches in that epoch")
            return
        self._epoch, self._batch = epoch + 1, 0
        last = self.model.stop_training or self._epoch >= self.params["epochs"]
        due = self.every == "epoch" or self._unsaved >= int(self.every)
        if last or self._signals.received is not None or (due and self.is_time()):
            self._save({})
        if self._signals.received is not None:
            self._end(self._epoch, 0)

    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._finished:
            self._start_with(None)
            self._restore_callbacks()
        self._finish()

    def _save(self, logs):
        self._states.save({
            "epoch": self._epoch, "batch": self._batch, "stopped": bool(self.model.stop_training), "logs": logs or {},
            "variables": variables_with_names(self.model), "metrics": _named(self.model.metrics_variables),
            "callbacks": states_of(self._others)})
        self._unsaved = 0
        self.has_saved()

    def _restore_variables(self, all_built=False, metrics=False):
        assign_variables(self.model, self._state["variables"], self._states.path, all_built or metrics)
        if metrics:
            _assign(self.model.metrics_variables, self._state["metrics"], "metrics", self._states.path)

    def _restore_callbacks(self):
        give_states_back(self._others, self._state["callbacks"])

    def _go_on(self):
        """The run is where it was saved."""
        self._give_functions_back()
        self._state = None
        self._list.callbacks = [*self._others, self]

    def _replace_functions(self):
        """Until the run is where it was, `fit` reads data, with the iterators it would train with, and does no more."""
        self.model.make_test_function()
        self._functions = self.model.train_function, self.model.test_function
        self.model.train_function, self.model.test_function = self._read_training, self._read_batches

    def _give_functions_back(self):
        if self._functions is not None:
            self.model.train_function, self.model.test_function = self._functions
            self._functions = None

    def _read_training(self, iterator):
        if not self._stepped:
            # Metrics, and optimizers of plain models, have no variables before a step. What it does is undone.
            self._stepped = True
            with self._ending_on_errors():
                self._functions[0](iterator)
                self._restore_variables()
        else:
            self._read_batches(iterator)
        # Those of the last batch are what `fit` makes the logs of an epoch from.
        return self._state["logs"] if self._epoch == self._state["epoch"] else {}

    def _read_batches(self, iterator):
        with self._ending_on_errors():
            for i in range(self.model.steps_per_execution):
                try:
                    iterator.get_next()
                except tf.errors.OutOfRangeError:
                    if i == 0:
                        raise
                    break
        return {}

    @contextlib.contextmanager
    def _ending_on_errors(self):
        """Leaves the model as it was: after an error there is no `on_train_end`."""
        try:
            yield
        except tf.errors.OutOfRangeError:
            raise  # How an epoch ends.
        except BaseException:
            self._finish()
            raise

    def _start_with(self, epoch):
        # Keras' own way for a callback to begin `fit` with a later epoch. It outlasts `fit`, so it is taken back.
        self.model._initial_epoch = epoch

    def _end(self, epoch, batch):
        done = f"{epoch} epochs" + (f" and {batch} batches of the next" if batch else "")
        self._give_functions_back()
        self._signals.end(f"The state after {done} is saved in {self._states.path}: start the program again to go on.")

    def _finish(self):
        self._give_functions_back()
        self._state = None
        self._signals.stop()

    def _is_running(self, frame):
        """Whether `fit` of the model is under way: an exception ends it without a word to its callbacks."""
        while frame is not None:
            if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is self.model:
                return True
            frame = frame.f_back
        return False

    def _check(self):
        if not self.model.built:
            raise ValueError("Resume needs a model that is built: give it a keras.Input, or call it on a batch of data "
                             f"before fit(). Received: {self.model!r}")
        for callback in self._others:
            if isinstance(callback, (keras.callbacks.BackupAndRestore, Resume)):
                raise ValueError("Resume must be the only callback that restores a run. Received also: "
                                 f"{type(callback).__name__}")
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)


def states_of(callbacks: Any) -> dict[str, Any]:
    """The states of the callbacks that have one, by a name with a number."""
    return {name: _state_of(callback) for name, callback in _with_state(callbacks)}


def give_states_back(callbacks: Any, states: dict[str, Any]) -> None:
    """Gives the callbacks what `states_of` returned."""
    for name, callback in _with_state(callbacks):
        if name in states:
            # A copy: it may be given twice, and what is given is changed.
            _set_state(callback, copy.deepcopy(states[name]))


def variables_with_names(model: Any) -> dict[str, Any]:
    """All that a training changes in a model: by owner, the model or one of its optimizers, lists [name, variable]."""
    return {owner: _named(variables) for owner, variables in _owners(model).items()}


def assign_variables(model: Any, saved: Any, path: str | os.PathLike | None, all_built: bool = True) -> None:
    """Gives the variables of a model the values that `variables_with_names` had when they were saved.

    Args:
        model: A `keras.Model`.
        saved: What `SavedStates` read of it.
        path: Path of the file, for errors.
        all_built: Bool. False: optimizers that have no variables yet are left out.

    Raises:
        ValueError: If they are of another model.
    """
    owners = _owners(model)
    if list(owners) != list(saved):
        raise ValueError(f"A state must be of the same model and optimizers. Received: {path} with {list(saved)} for "
                         f"{list(owners)}")
    for owner, variables in owners.items():
        if variables or all_built:
            _assign(variables, saved[owner], owner, path)


def _assign(variables, saved, owner, path):
    """Assigns values after a check of all of them: nothing is changed by a state that does not fit."""
    expected = [(_name(variable), list(variable.shape), str(variable.dtype)) for variable in variables]
    found = [(name, list(value.shape), str(tf.as_dtype(value.dtype).name)) for name, value in saved]
    for i in range(max(len(expected), len(found))):
        here, there = (part[i] if i < len(part) else None for part in (expected, found))
        if here != there:
            raise ValueError(f"A state must be of the same model: name, shape and type of each variable. Received: "
                             f"{path} with {there} in the place of {here} of the {owner}")
    for variable, (_, value) in zip(variables, saved):
        variable.assign(value)


def _owners(model):
    """Variables by owner: those of the model with its seed generators, those of every optimizer that it holds."""
    owners = {"model": model.variables, **_optimizers(model, "")}
    seen = set()
    return {owner: [v for v in variables if id(v) not in seen and not seen.add(id(v))]
            for owner, variables in owners.items()}


def _optimizers(holder, prefix):
    """Variables of the optimizers among the attributes of an object, and of those that these hold, by their place."""
    found = {}
    for name, value in vars(holder).items():
        if name.startswith("_self_"):
            continue  # TensorFlow's own lists of what an object holds.
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        optimizers = [entry for entry in entries if isinstance(entry, keras.optimizers.Optimizer)]
        for i, optimizer in enumerate(optimizers):
            place = f"{prefix}{name}" + (f"[{i}]" if len(optimizers) > 1 else "")
            found.update({place: optimizer.variables, **_optimizers(optimizer, f"{place}.")})
    return found


def _named(variables):
    return [[_name(variable), variable] for variable in variables]


def _name(variable):
    """The path without Keras' numbers, which count what a process has made before."""
    return re.sub(r"_\d+(?=[/_]|$)", "", variable.path)


def _with_state(callbacks):
    """Pairs (name, callback) of those with a state; the name has a number, as there may be several of a class."""
    counts = {}
    for callback in callbacks:
        if isinstance(callback, (Resumable, *_STATE_OF)):
            name = type(callback).__name__
            counts[name] = counts.get(name, 0) + 1
            yield f"{name} {counts[name]}", callback


def _state_of(callback):
    if isinstance(callback, Resumable):
        return callback.resume_state()
    return {name: getattr(callback, name) for name in _names_of(callback)}


def _set_state(callback, state):
    if isinstance(callback, Resumable):
        callback.resume_from(state)
        return
    for name in _names_of(callback):
        setattr(callback, name, state[name])


def _names_of(callback):
    return next(names for kind, names in _STATE_OF.items() if isinstance(callback, kind))


def _callback_list(callback):
    """The list of callbacks that is calling. Keras tells a callback nothing of the others, whose state is needed."""
    frame = inspect.currentframe()
    while frame is not None:
        owner: Any = frame.f_locals.get("self")
        if isinstance(owner, keras.callbacks.CallbackList) and any(entry is callback for entry in owner.callbacks):
            return owner
        frame = frame.f_back
    raise ValueError("Resume is a callback of fit(). Received a call from elsewhere")

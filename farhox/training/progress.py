"""What `fit` and `evaluate` show and return: one line of at most 80 columns an epoch, no number twice."""

import sys
import time
from typing import Any

import keras

WIDTH = 80
# Left out of what is shown and returned where they are zero all the time.
_QUIET_AT_ZERO = ("skipped_updates", "solver_failed")
# Another name of the outer loss, under which callbacks of Keras look for it.
_ALIAS = {"loss": "outer_loss", "val_loss": "val_outer_loss"}


class Logs(dict):
    """Logs in which what says nothing new is not listed, but can be asked for by its name.

    `logs["loss"]` is `logs["outer_loss"]`, and counters that are zero all the time are there for who asks.

    Args:
        logs: Dictionary of numbers, or of lists of numbers.
    """

    def __init__(self, logs: Any) -> None:
        quiet = {name for name, value in logs.items() if _is_quiet(name, value, logs)}
        super().__init__({name: value for name, value in logs.items() if name not in quiet})
        self._quiet = {name: logs[name] for name in quiet}

    def __missing__(self, name):
        return self._quiet[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value under a name, those that are not listed included."""
        return self[name] if name in self or name in self._quiet else default

    def as_values(self, names: list[str]) -> Any:
        """What `evaluate` returns without names: the values of `names`, then the others; one alone as it is."""
        values = [self[name] for name in names] + [value for name, value in self.items() if name not in names]
        return values if len(values) > 1 else values[0]


def as_list(callbacks: Any) -> list[Any]:
    """Callbacks as a list of their own: of one, of a sequence, of Keras' `CallbackList`, of None."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []


def _is_quiet(name, value, logs):
    if name in _ALIAS:
        return _ALIAS[name] in logs
    values = value if isinstance(value, list) else [value]
    return name in _QUIET_AT_ZERO and all(entry == 0 for entry in values)


class Progress(keras.callbacks.ProgbarLogger):
    """Shows the logs of a `HyperOptimizer` in one line an epoch.

    With `verbose=1` the line is written anew while the epoch goes on, on a terminal and in a notebook; with `verbose=2`
    and in a file once. What does not fit in 80 columns is left out from the end: the outer loss, metrics, validation
    and the inner loss come first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._head, self._began, self._shown = "", 0.0, 0.0
        self._length = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start(f"Epoch {epoch + 1}/{self.epochs}")

    def on_test_begin(self, logs: Any = None) -> None:
        if not self._called_in_fit:
            self._start("Evaluation")

    def _start(self, head):
        self._head, self._began, self._shown = head, time.monotonic(), 0.0
        self._length = 0

    def _update_progbar(self, batch, logs=None):
        self.seen = batch + 1
        now = time.monotonic()
        if self.verbose == 1 and now - self._shown > 0.1 and _can_be_written_anew():
            self._shown = now
            done = f"{self.seen}/{self.target}" if self.target else str(self.seen)
            self._write(line(f"{self._head} [{done}]", logs or {}), "")

    def _finalize_progbar(self, logs):
        seconds = time.monotonic() - self._began
        spent = f"{seconds:.0f}s" if seconds >= 1 else f"{1e3 * seconds:.0f}ms"
        self._write(line(f"{self._head} {spent}", logs or {}), "\n")

    def _write(self, text, end):
        # In place of the line before, whose rest is wiped out.
        start = f"\r{' ' * self._length}\r" if self._length and self.verbose == 1 else ""
        self._length = 0 if end else len(text)
        sys.stdout.write(start + text + end)
        sys.stdout.flush()


def _can_be_written_anew():
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def line(head: Any, logs: Any) -> str:
    """The head and as many of the logs as fit in 80 columns."""
    logs = Logs(dict(logs))
    first = [name for prefix in ("", "val_") for name in (f"{prefix}outer_loss",)]
    last = ["inner_loss", "val_inner_loss"]
    order = [name for name in first if name in logs]
    order += [name for name in logs if name not in first and name not in last]
    order += [name for name in last if name in logs]
    text = head
    for name in order:
        part = f" - {name}: {float(logs[name]):.4g}"
        if len(text) + len(part) <= WIDTH:
            text += part
    return text


def add_progress(callbacks: Any, verbose: Any) -> None:
    """Adds the line that is shown, unless nothing is to be shown or something else shows it."""
    if verbose and not any(isinstance(callback, keras.callbacks.ProgbarLogger) for callback in callbacks):
        callbacks.append(Progress())

"""SIGTERM, SIGHUP and Ctrl-C while a training runs: noted, and answered where its state is whole."""

import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_NUMBERS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP")]


class Interrupted(KeyboardInterrupt, SystemExit):
    """A training was stopped by a signal, after its state was saved.

    A program that does not catch it ends with the code that shells use, 128 + the number of the signal, and without a
    traceback. It is a `KeyboardInterrupt` for code that catches Ctrl-C.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


class Signals:
    """Notes the first SIGTERM, SIGHUP or SIGINT instead of obeying it, from `start` to `stop`.

    A second one, or one that comes when nobody is going to look, has the effect that it would have without this class.

    Args:
        is_running: Callable of the frame that a signal interrupts: whether somebody is going to look at `received`.

    Attributes:
        received: The `signal.Signals` noted, or None.
    """

    def __init__(self, is_running: Callable[..., Any] = lambda frame: True) -> None:
        self.received = None
        self._is_running = is_running
        self._before = {}

    def start(self) -> None:
        self.received = None
        if self._before or threading.current_thread() is not threading.main_thread():
            return  # Python tells signals to the main thread alone.
        frame = inspect.currentframe()
        for number in _NUMBERS:
            handler = signal.getsignal(number)
            # That of a training which ended with an error, without a word to this class.
            while isinstance(owner := getattr(handler, "__self__", None), Signals) and not owner._is_running(frame):
                handler = owner._before[number]
            # Those that the process ignores, as with nohup, or that are not Python's stay as they are.
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, self._note)
                self._before[number] = handler

    def stop(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def end(self, line: str | None = None) -> None:
        """Says in one line what was done about the signal, and ends the training.

        Args:
            line: Str, or None where another process says it.

        Raises:
            Interrupted: Always.
        """
        number = self.received or signal.SIGTERM
        self.stop()
        if line is not None:
            with contextlib.suppress(OSError):  # A terminal that is closed.
                sys.stderr.write(f"\nStopped by {number.name}. {line}\n")
                sys.stderr.flush()
        raise Interrupted(number)

    def _note(self, number, frame):
        if self.received is None and self._is_running(frame):
            self.received = signal.Signals(number)
            return
        self.stop()
        signal.raise_signal(number)

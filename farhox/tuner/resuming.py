"""A tuned run that goes on after an interruption: what was read of the data, and the states between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from farhox._core.types import Data
from farhox.training.resume import Resume, give_states_back, states_of
from farhox.training.signals import Signals


class Reading:
    """Data of rounds that count what is read of them, so that a run that goes on finds the place.

    Args:
        data: What `rounds_of` returns.

    Attributes:
        read: List of ints, the rounds that each iteration has given.
    """

    def __init__(self, data: Data) -> None:
        self._data, self.read = data, []

    def __iter__(self) -> Iterator[Any]:
        self.read.append(0)
        for element in self._data:
            self.read[-1] += 1
            yield element

    def read_again(self, counts: list[int]) -> None:
        """Reads as many rounds in as many iterations, and does nothing with them."""
        for count in counts:
            elements = iter(self)
            for _ in range(count):
                next(elements)


class SavedRun:
    """The states of a tuned run in the folder of a `farhox.callbacks.Resume`, or nothing without one.

    Args:
        callbacks: List of callbacks.

    Attributes:
        callbacks: Those that are not `Resume`.
        state: The last state in the folder, or None.

    Raises:
        ValueError: If there is more than one `Resume`, or it is to save within epochs.
    """

    def __init__(self, callbacks: Any) -> None:
        found = [callback for callback in callbacks if isinstance(callback, Resume)]
        self.callbacks = [callback for callback in callbacks if not isinstance(callback, Resume)]
        if len(found) > 1:
            raise ValueError(f"One Resume restores a run. Received: {len(found)} of them in callbacks")
        self._resume: Any = found[0] if found else None
        self.state: Any = None
        self._signals = Signals()
        if self._resume is None:
            return
        if self._resume.every != "epoch":
            raise ValueError('A tuned run is saved at the end of epochs: Resume(..., every="epoch"). '
                             f"Received: every={self._resume.every}")
        self.state = self._resume.saved_states.load()
        if self.state is not None and "tuner" not in self.state:
            raise ValueError("A state must be of the same run. Received: "
                             f"{self._resume.saved_states.path}, which is of no Tuner")
        self._resume.saved_states.check_writable()

    def goes_on(self, epochs: int) -> bool:
        """Whether there is something to train: the run of the state is not finished."""
        return self.state is None or not self.state["stopped"] and self.state["epoch"] < epochs

    def restore(self, kept: Any) -> Any:
        """Gives variables the values of the state.

        Args:
            kept: List of variables.

        Returns:
            The state.

        Raises:
            ValueError: If it is of another model.
        """
        values = self.state["variables"]
        here, there = ([(tuple(entry.shape), keras.backend.standardize_dtype(entry.dtype)) for entry in entries]
                       for entries in (kept, values))
        if here != there:
            raise ValueError("A state must be of the same model and hyperparameters. Received: "
                             f"{self._resume.saved_states.path} with other shapes or types of variables")
        for variable, value in zip(kept, values):
            variable.assign(value)
        return self.state

    def restore_callbacks(self, callbacks: Any) -> None:
        """Gives callbacks their states back, once."""
        if self.state is not None:
            give_states_back(callbacks, self.state["callbacks"])

    def start(self) -> None:
        """From here on signals wait for the end of an epoch."""
        if self._resume is not None:
            self._signals.start()

    def stop(self) -> None:
        """Signals have their effect at once again."""
        self._signals.stop()

    def save(self, epoch: int, callbacks: Any, last: bool, make: Any) -> None:
        """Saves the state after so many epochs, where one is due, and obeys a signal.

        Args:
            epoch: Int.
            callbacks: List of callbacks with states.
            last: Bool, whether the run ends here.
            make: Callable that returns the rest of the state, a dictionary.
        """
        if self._resume is None:
            return
        if last or self._signals.received is not None or self._resume.is_time():
            self._resume.saved_states.save({"tuner": True, "epoch": epoch, "callbacks": states_of(callbacks), **make()})
            self._resume.has_saved()
        if self._signals.received is not None:
            self._signals.end(f"The state after {epoch} epochs is saved in {self._resume.saved_states.path}: start the "
                              "program again to go on.")

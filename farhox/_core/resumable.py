"""What a callback must have so that `farhox.callbacks.Resume` gives it back its state."""

import abc
from typing import Any


class Resumable(abc.ABC):
    """A Keras callback with a state of its own that a run goes on with after an interruption.

    ```python
    class Best(keras.callbacks.Callback, farhox.callbacks.Resumable):
        least = float("inf")

        def on_epoch_end(self, epoch, logs=None):
            self.least = min(self.least, logs["outer_loss"])

        def resume_state(self):
            return self.least

        def resume_from(self, state):
            self.least = state
    ```
    """

    @abc.abstractmethod
    def resume_state(self) -> Any:
        """The state: a nest of dictionaries (keys are str), lists, numbers, strings, bools, None and arrays."""

    @abc.abstractmethod
    def resume_from(self, state: Any) -> None:
        """Takes a state back. Called after `on_train_begin` and `on_epoch_begin`, with the model restored."""

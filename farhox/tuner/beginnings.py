"""Where the hyperparameters that are tuned along a training begin."""

from __future__ import annotations

from typing import Any

import numpy as np

from farhox.tuner import report
from farhox.tuner.tunables import L2, WEIGHT_DECAY

# Of strengths of dropout, noise and augmentation.
_LESS_STRENGTH = 1.0 / 3.0
# One choice is better than another if it makes so much more progress.
_MORE_PROGRESS = 0.1


class Beginnings:
    """Values with which hyperparameters begin a training: the model's own, or what a search of the rate is done with.

    A search goes with a third of the strengths of dropout, noise and augmentation, under which trainings can be told
    apart, and with decays under which weights forget their beginning once in the training: rate * weight_decay * steps
    is 1, or of SGD 2 * rate / (1 - momentum) * l2 * steps. In the end a heat with the model's own values decides:
    strengths are its own unless a third makes a tenth more progress, since from one that is far too high training would
    come down while the rate is best; decays are the rule's unless its own make a tenth more progress. Few steps do not
    tell more of a decay, whose effect comes late.

    Args:
        training: A `Training` at its start.
        total: Int, steps of the training to come.

    Reference:
        [Wang and Aitchison, 2024](https://arxiv.org/abs/2405.13698) (the time over which decay averages, in
        trainings).
    """

    def __init__(self, training: Any, total: int) -> None:
        self._training, self._total = training, total
        self._strengths = [row for row in training.tuned if row.kind.is_strength]
        kinds = (WEIGHT_DECAY, L2) if training.steps_follow_size else (WEIGHT_DECAY,)
        self._decays = [row for row in training.tuned if row.kind in kinds and not row.given]
        # Of an optimizer with a schedule the rate is a factor of it.
        self._steps = total * training.rate.mean_of_schedule(total) if self._decays else total
        self._own = {row.name: row.hyperparameter.numpy() for row in self._strengths + self._decays}

    def sweep(self) -> None:
        """Sets what the sweep goes with: no decay to speak of."""
        for row in self._decays:
            row.hyperparameter.assign(np.full_like(self._own[row.name], row.low))
        self._lower_strengths()

    def heat(self, rate: float) -> None:
        """Sets what a heat with this rate goes with."""
        for row in self._decays:
            value = 1.0 / (rate * self._steps)
            if row.kind == L2:
                value *= 0.5 * (1.0 - self._training.momentum())
            row.hyperparameter.assign(np.full_like(self._own[row.name], min(max(value, row.low), row.high)))

    def choose(self, progress: Any, rate: float, loss: float, untrained: float) -> list[str]:
        """Sets what the training begins with.

        Args:
            progress: Function without arguments, the validation loss after a heat with what is set.
            rate: The learning rate.
            loss: That loss with what the search went with.
            untrained: The loss of the initial weights.

        Returns:
            List of lines on what was chosen.
        """
        much, notes = _MORE_PROGRESS * abs(untrained - loss), []
        self.heat(rate)  # The last one may have been of another rate.
        if self._strengths:
            self._set_back(self._strengths)
            own = progress()
            if own - loss > much:
                self._lower_strengths()
                notes.append("strengths: a third of those at the start, by the validation loss after annealed steps")
            else:
                loss = own
        if self._decays:
            chosen = [row.hyperparameter.numpy() for row in self._decays]
            self._set_back(self._decays)
            if loss - progress() > much:
                notes.append("decays: as at the start, by the validation loss after annealed steps")
            else:
                for row, value in zip(self._decays, chosen):
                    row.hyperparameter.assign(value)
                named = ", ".join(f"{row.name} {report.number(float(row.hyperparameter.numpy()))}"
                                  for row in self._decays[:3])
                notes.append(f"decays: begin at {named}, for the rate and {self._total} steps")
        return notes

    def _lower_strengths(self):
        for row in self._strengths:
            low = row.hyperparameter.low or 0.0
            row.hyperparameter.assign(low + _LESS_STRENGTH * (self._own[row.name] - low))

    def _set_back(self, rows):
        for row in rows:
            row.hyperparameter.assign(self._own[row.name])

"""The search of the learning rate before a tuned training: a sweep, and short annealed trainings below its end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from farhox.tuner import report
from farhox.tuner.beginnings import Beginnings
from farhox.tuner.rate import Sweep, read_sweep

SWEEP_STEPS, _LEAST_SWEEP_STEPS = 100, 60
_RANGE = (1e-6, 10.0)
_FINE = 300.0
# Rates are tried from the stop divided by the first of these on, to the second in any case and the third at most; from
# a lower one of optimizers that normalise the gradient, of which short trainings favour rates that are too high.
_HEATS, _FIRST_OF_NORMALISED = (4.0, 36.0, 4e3), 4.0 * math.sqrt(3.0)
_HEAT_FACTOR = 3.0
# A rate with less than this share of the progress of the best one has not trained.
_LITTLE = 0.1
# In each of two rounds over so many steps, or a share of the training.
_HEAT_STEPS, _HEAT_SHARES = (20, 60), (100, 33)
_MOST_MOMENTUM = 0.9
# Momentum that multiplies the effect of the rate is lower in heats: a short training with a high one has hardly come to
# its speed, and ends with more noise.
_MOST_MOMENTUM_OF_HEATS = 0.5


class RateSearch:
    """Finds the rate: it rises until the loss does; short trainings below choose; then training starts afresh.

    Args:
        network: What is trained.
        training: A `Training` at its start.
        data: Rounds of steps.
        evaluated: Validation batches.
        total: Int, steps of the training to come.

    Attributes:
        notes: List of lines on what it did.

    Reference:
        [Smith, 2015](https://arxiv.org/abs/1506.01186).
    """

    def __init__(self, network: Any, training: Any, data: Any, evaluated: Any, total: int) -> None:
        self._network, self._training, self._data, self._evaluated = network, training, data, evaluated
        self._total = total
        self._start = training.state()
        self._times = 1.0
        self._beginnings = Beginnings(training, total)
        self.notes: list[str] = []

    def run(self) -> float:
        """Sets the rate and starts training afresh. Returns the least training loss that the sweep has seen.

        The penalties of the initial weights are those that training begins with.
        """
        training = self._training
        momenta = training.set_momentum()
        self._beginnings.sweep()
        penalty = self._network.penalty()
        steps = min(SWEEP_STEPS, max(_LEAST_SWEEP_STEPS, self._total // 10))
        coarse = self._swept(_RANGE, steps // 3)
        # The loss lags behind a rate that rises fast, so the stop is looked for again, slowly, below where it seemed.
        training.restart(self._start)
        sweep = self._swept((coarse.stop / _FINE, coarse.stop), steps - steps // 3)
        lowered = f", momentum {_MOST_MOMENTUM} at most" if any(m > _MOST_MOMENTUM for m in momenta) else ""
        self.notes.append(f"sweep: the loss {'rose at' if sweep.stopped else 'did not rise up to'} rate "
                          f"{sweep.stop:.2g}, in {len(coarse.losses) + len(sweep.losses)} steps{lowered}")
        stop = sweep.stop / (1.0 - training.momentum())
        momenta = [min(momentum, _MOST_MOMENTUM) for momentum in momenta]
        training.set_momentum(momenta)
        if (own := training.momentum()) > _MOST_MOMENTUM_OF_HEATS:
            training.set_momentum([min(momentum, _MOST_MOMENTUM_OF_HEATS) for momentum in momenta])
            self._times = (1.0 - own) / (1.0 - training.momentum())
        rate, loss, untrained = self.rate_of_heats(stop)
        self.notes += self._beginnings.choose(lambda: self._after(rate, self._heat_steps()[1]), rate, loss, untrained)
        training.set_momentum(momenta)
        training.restart(self._start)
        training.rate_row.hyperparameter.assign(rate * self._times)
        return sweep.least + self._network.penalty() - penalty

    def _swept(self, interval: tuple[float, float], steps: int) -> Sweep:
        self._training.rate.sweep(*interval, steps)
        rates, losses = np.geomspace(interval[0], interval[1], steps), np.zeros([0])
        while True:
            for inner_batches, outer_batch in self._data:
                losses = np.concatenate([losses, self._training.forward(inner_batches, outer_batch)])[:steps]
                sweep = read_sweep(rates[:len(losses)], losses)
                if sweep.stopped or len(losses) == steps:
                    return sweep

    def rate_of_heats(self, stop: float) -> tuple[float, float, float]:
        """The rate below the stop, over 1 - momentum, with which a short annealed training ends best.

        Returns it, for the momentum of heats, the validation loss after the longer training with it, and that of the
        initial weights.

        While the lowest is the best, a lower one is tried: a network that a high rate has left where it learns nothing
        has a loss that does not rise, so that the sweep goes on beyond the rates that train. The stop is then the
        lowest rate that has not trained. A second round of longer trainings chooses among the best and rates beside it,
        of an optimizer that normalises the gradient below it: a short training favours rates that are too high, or,
        where its loss is still noisy, too low.
        """
        self._training.restart(self._start)
        untrained = self._network.evaluate(self._evaluated)["val_loss"]
        short, long = self._heat_steps()

        def judged(rate, steps):
            loss = self.heat(rate, steps)
            return (loss if loss < untrained else math.inf), rate  # Of those that have not trained, the lowest is best.

        first, divisor = [], _HEATS[0] if self._training.steps_follow_size else _FIRST_OF_NORMALISED
        while divisor <= _HEATS[1] or min(first)[1] == first[-1][1] and divisor <= _HEATS[2]:
            first.append(judged(stop / divisor * (1.0 - self._training.momentum()), short))
            divisor *= _HEAT_FACTOR
        best, middle = min(first)
        lost = [rate for loss, rate in first if rate > middle and untrained - loss < _LITTLE * (untrained - best)]
        highest = min(first[0][1], *(rate / _HEATS[0] for rate in lost), math.inf)
        middle, between = min(middle, highest), math.sqrt(_HEAT_FACTOR)
        above = self._training.steps_follow_size and middle * between <= highest
        rates = [middle * between] * above + [middle, middle / between]
        second = [judged(rate, long) for rate in rates]

        def shown(rate):
            return report.number(rate * self._times)

        tried = (f"{', '.join(shown(rate) for _, rate in heats)} ({steps} steps)"
                 for heats, steps in ((first, short), (second, long)))
        loss, rate = min(second)
        self.notes.append(f"heats: rate {shown(rate)} of {', then of '.join(tried)}, by the validation loss after "
                          "annealed steps")
        return rate, loss, untrained

    def _heat_steps(self):
        """The steps of a heat of the first round, and of the second."""
        return [max(least, self._total // share) for least, share in zip(_HEAT_STEPS, _HEAT_SHARES)]

    def heat(self, rate: float, steps: int) -> float:
        """The validation loss after a short annealed training; infinity where it is not finite."""
        self._beginnings.heat(rate)
        return self._after(rate, steps)

    def _after(self, rate, steps):
        done = 0
        self._training.restart(self._start)
        self._training.rate_row.hyperparameter.assign(rate)
        self._training.rate.train(steps, 0.5)
        while done < steps:
            for inner_batches, outer_batch in self._data:
                done += len(self._training.forward(inner_batches, outer_batch))
                if done >= steps:
                    break
        loss = self._network.evaluate(self._evaluated)["val_loss"]
        return loss if math.isfinite(loss) else math.inf

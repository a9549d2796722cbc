"""One tuned training: rounds of inner steps, each with one update of the hyperparameters; states to go back to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Batch, InnerBatches
from farhox.dynamics import KerasDynamics
from farhox.hypergradients import ReverseHG
from farhox.problem import BilevelProblem
from farhox.training import HyperOptimizer, OptimizerGroups
from farhox.tuner.rate import Rate

_WITH_MOMENTUM = ("momentum", "beta_1")
_SWEEP_MOMENTUM = 0.5
# Strengths move in smaller steps, since the response has to keep up, and wait until there is one. Where training has
# fewer updates than this, they are larger again, by as much at most: strengths would not come far in it.
_RESPONSE_SLOWER, _WARM_UP = 3.0, 0.1
_MANY_UPDATES, _MOST_FASTER = 100, 4.0


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round of training gave.

    Attributes:
        loss: Mean of the training loss over the steps.
        first_loss: The training loss before the first step.
        outer_loss: Loss on the outer batch.
        finite: Whether all that was computed is.
    """

    loss: float
    first_loss: float
    outer_loss: float
    finite: bool


class Training:
    """The training of a network under hyperparameters that are tuned along the way.

    Args:
        network: What is trained: `inner_objective`, `outer_objective`, `inner_variables`, `state_variables`, `draws`.
        optimizer: The compiled Keras optimizer, of which a copy works.
        rows: List of `Tunable` of the model.
        truncation: Positive int, steps that hypergradients walk back.
        outer_rate: Float, the step of the outer optimizer in log space at the start.

    Attributes:
        kept: List of all variables that training changes.
        steps_follow_size: Bool, whether steps grow with the gradient, as those of SGD do, or are of one size.
        steps: Int, steps done.
    """

    def __init__(self, network: keras.Model, optimizer: keras.optimizers.Optimizer, rows: Any, truncation: int | None,
                 outer_rate: float) -> None:
        self.network = network
        self.steps_follow_size = isinstance(optimizer, keras.optimizers.SGD)
        self._rows = {row.name: row for row in rows}
        settings = {name: row.hyperparameter for name, row in self._rows.items()
                    if row.hyperparameter is not None and name in vars(optimizer)}
        self.rate_row = self._rows["learning_rate"]
        schedule = vars(optimizer)["_learning_rate"]
        schedule = schedule if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule) else None
        self.has_schedule = schedule is not None
        self.rate = Rate(self.rate_row.hyperparameter, schedule)
        self._momenta = [settings[name] for name in _WITH_MOMENTUM if name in settings]
        self.tuned = [row for row in rows if row.tuned and row.route != "sweep"]
        outer = [row.hyperparameter for row in self.tuned]
        # Without a hyperparameter to follow, the rate stands where the problem needs one, and does not move.
        idle = not outer
        named = [self.rate_row.hyperparameter] if idle else outer
        fixed = [row.hyperparameter for row in rows if row.hyperparameter is not None and not any(
            row.hyperparameter is entry for entry in named)]
        problem = BilevelProblem(
            network.inner_objective, network.outer_objective, network.inner_variables,
            named, state_variables=network.state_variables, fixed=fixed,
            dynamics=KerasDynamics(optimizer, **{**settings, "learning_rate": self.rate}),
            # Draws are constants: what they are drawn around acts through the response alone.
            stop_gradient="exact" if network.draws is None else "tensorflow")
        path = keras.optimizers.Adam(outer_rate, beta_2=0.9, epsilon=1e-12)
        self._response = keras.optimizers.Adam(outer_rate / _RESPONSE_SLOWER, beta_2=0.9, epsilon=1e-12)
        responding = [row.hyperparameter for row in self.tuned if row.route == "response"]
        # Without an effect: a rate of zero.
        self.outer_optimizer = keras.optimizers.SGD(0.0) if idle else OptimizerGroups(
            path, [(self._response, responding)] if responding else [])
        self._engine = HyperOptimizer(
            problem, ReverseHG(truncation=0 if idle else truncation), online=True, max_skipped_updates=2**31 - 1)
        self._engine.compile(self.outer_optimizer)
        self._outer_rate = outer_rate
        self.kept = [*self._engine.variables, *self.outer_optimizer.variables, *path.variables,
                      *self._response.variables,
                      *(row.hyperparameter.variable for row in rows if row.hyperparameter is not None)]
        self.kept = list({id(variable): variable for variable in self.kept}.values())
        self.steps = 0

    def run(self, inner_batches: InnerBatches, outer_batch: Batch, steps: int) -> Round:
        """One round: inner steps, a hypergradient, an update. Returns a `Round`."""
        result = self._engine.step(inner_batches, outer_batch)
        self.steps += steps
        losses, outer_loss = result.inner_losses.numpy(), float(result.outer_loss)
        finite = bool(result.diagnostics["finite"]) and bool(np.all(np.isfinite(losses)))
        return Round(float(np.mean(losses)), float(losses[0]), outer_loss, finite)

    def forward(self, inner_batches: InnerBatches, outer_batch: Batch) -> Any:
        """Inner steps alone: the training loss before each, an array; not numbers where they diverged.

        They are those of a round whose update changes nothing: a trace of their own would cost more than the derivative
        on the outer batch.
        """
        for optimizer in (self.outer_optimizer, self._response):
            optimizer.learning_rate.assign(0.0)
        return self._engine.step(inner_batches, outer_batch).inner_losses.numpy()

    def anneal_outer_rate(self, progress: float, updates: int) -> None:
        """Lets the steps of the outer optimizer fall to .3 of their start over the first 40 % of training.

        Layers learn how they respond before strengths follow it: these wait for the first tenth.

        Args:
            progress: The share of the training that is done, from 0 to 1.
            updates: Positive int, updates of the whole training.
        """
        if self.tuned:
            rate = self._outer_rate * (1.0 - 0.7 * min(1.0, progress / 0.4))
            self.outer_optimizer.learning_rate.assign(rate)
            faster = min(max(_MANY_UPDATES / updates, 1.0), _MOST_FASTER)
            self._response.learning_rate.assign(0.0 if progress < _WARM_UP else rate / _RESPONSE_SLOWER * faster)

    def state(self) -> Any:
        """All that training changes, as a list of tensors to go back to."""
        return [tf.identity(variable) for variable in self.kept], self.steps

    def go_back(self, state: Any) -> None:
        """Goes back to what `state` returned."""
        values, self.steps = state
        for variable, value in zip(self.kept, values):
            variable.assign(value)

    def restart(self, state: Any) -> None:
        """Goes back to the initial weights with fresh slots; hyperparameters stay as they are."""
        values = [row.hyperparameter.variable.numpy() for row in self._rows.values() if row.hyperparameter is not None]
        self.go_back(state)
        self._engine.reset_inner_state()
        for row, value in zip((row for row in self._rows.values() if row.hyperparameter is not None), values):
            row.hyperparameter.variable.assign(value)
        self.steps = 0

    def set_momentum(self, momentum: Any = _SWEEP_MOMENTUM) -> list[float]:
        """Sets momentum or beta_1, for the sweep or back to their values. Returns the values before."""
        before = [float(entry.numpy()) for entry in self._momenta]
        after = momentum if isinstance(momentum, list) else [momentum] * len(before)
        for entry, value in zip(self._momenta, after):
            low, high = entry.low, entry.high
            entry.assign(min(max(value, low + 1e-3 * (high - low)), high - 1e-3 * (high - low)))
        return before

    def momentum(self) -> float:
        """The momentum that multiplies the effect of the rate, 0 without one: that of Adam's beta_1 does not."""
        row = self._rows.get("momentum")
        return 0.0 if row is None or row.hyperparameter is None else float(row.hyperparameter.numpy())


class Guard:
    """Watches the training loss of rounds, and keeps the last good state to go back to.

    A window's mean loss above `factor` times the least so far and `margin` more, or a value that is not finite, is bad.
    The least starts at the loss of the initial weights. So is a loss that has not come to what the sweep reached, in
    about as many steps: a rate that is too high can hold a network where it learns nothing.

    Args:
        initial: The state before training.
        rounds: Int, rounds until training must have come to what the sweep reached.
        window: Positive int, rounds that are averaged.
    """

    factor, margin = 1.3, 0.1

    def __init__(self, initial: Any, rounds: int = 5, window: int = 5) -> None:
        self._losses, self._least, self._window = [], None, window
        self._rounds, self._waited = max(1, rounds), 0
        self.fired = 0
        self.begin(initial)

    def begin(self, initial: Any, reached: float | None = None) -> None:
        """Says where training starts, and the least loss of the sweep, or None without one."""
        self._initial, self._reached = initial, reached
        self.good = initial

    def resume_state(self) -> dict[str, Any]:
        """All it knows, as a nest of numbers and tensors."""
        return {"losses": self._losses, "least": self._least, "waited": self._waited, "fired": self.fired,
                "reached": self._reached, "initial": self._initial, "good": self.good}

    def resume_from(self, state: dict[str, Any]) -> None:
        """Takes back what `resume_state` returned."""
        self._losses, self._least, self._waited = state["losses"], state["least"], state["waited"]
        self.fired, self._reached = state["fired"], state["reached"]
        self._initial, self.good = state["initial"], state["good"]

    def watch(self, done: Round, state: Any) -> bool:
        """Takes in one `Round`. Returns whether it is bad; `state` is called for what to keep where it is the best."""
        if self._least is None:
            self._least = done.first_loss if math.isfinite(done.first_loss) else math.inf
        self._losses = [*self._losses, done.loss][-self._window:]
        mean = float(np.mean(self._losses))
        self._waited += 1
        due = self._waited == self._rounds
        behind = due and self._reached is not None and done.loss > self._reached
        if due and not behind:
            self._initial = None  # A state as large as training's own, which is not gone back to any more.
        if not done.finite or behind or mean > self.factor * self._least + self.margin:
            self._losses.clear()
            self.fired += 1
            if behind:
                self.good, self._least, self._waited = self._initial, None, 0
            return True
        if mean < self._least:
            self._least = mean
            self.good = state()
        return False

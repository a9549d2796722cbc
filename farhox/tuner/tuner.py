"""Tuner: from a compiled Keras model and its data to a tuned one, in one training."""

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from farhox._core import checks
from farhox._core.types import Array, Arrays, Callbacks, Data
from farhox.training.errors import graph_calls
from farhox.tuner import report
from farhox.tuner.data import rounds_of
from farhox.tuner.network import Network, Objective, check_model
from farhox.tuner.rate_search import SWEEP_STEPS, RateSearch
from farhox.tuner.resuming import Reading, SavedRun
from farhox.tuner.starting import assign, examples_of
from farhox.tuner.training import Guard, Training
from farhox.tuner.tunables import Choice, optimizer_tunables

_RATE_CUT = 0.3
# These set the rate or go on from a state of their own, which the tuner does itself.
_REFUSED = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau, keras.callbacks.BackupAndRestore)


class Tuner:
    """Tunes the hyperparameters of a compiled Keras model while it trains, and gives a plain Keras model back.

    ```python
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=1e-2), loss="sparse_categorical_crossentropy")
    tuner = farhox.Tuner(model)
    tuner.fit(train, validation_data=validation, epochs=30)
    best = tuner.get_model()
    ```

    It finds the settings of the optimizer, the penalties of layers, their dropout, noise and augmentation, the
    smoothing of labels and the weights of outputs and classes. A sweep of the learning rate from the initial weights
    sets the rate and where weight decay begins, and training starts afresh. About every twentieth step the other
    hyperparameters follow hypergradients of the validation loss through the last steps; those without a derivative, as
    of erased parts of images, follow the response of self-tuning layers. The rate ends in a cosine. A guard goes back
    to the last good state when the training loss rises. The model given is not changed.

    Args:
        model: A functional or Sequential `keras.Model`, built and compiled.
        objective: What is best: "val_loss", the name of a compiled metric such as "val_accuracy", a Keras loss or a
            Keras metric. Hypergradients follow the compiled loss where a metric counts and has no derivative.
        tune: List of names of hyperparameters, or of kinds of them, to tune. Default: those worth it.
        fix: List of names not to tune.
        ranges: Dictionary from names to pairs (low, high).
        start: Dictionary from names to values to start from; or a trial of Optuna or KerasTuner, or HyperParameters of
            the latter; or a fitted `farhox.starts.StartRule` (`SymbolicDefaults`, `DatasetEncoder`), which `fit` asks
            for values for its training data. Of a dictionary the model must have all names; of a trial or a rule one,
            and a warning says which others it has not. The sweep finds a rate of its own, so that a rate to start from
            needs `sweep=False`.
        granularity: "global", one hyperparameter per kind, or "layer", one per kind and layer.
        sweep: Bool. Find the learning rate by a sweep, and where weight decay begins, unless it is in `start`.
        online: Bool. Let hyperparameters follow hypergradients.
        annealing: Share of the training, from 0 to 1, over which the rate falls to zero along a cosine. It is 0 for an
            optimizer that has a schedule of its own.
        guard: Bool. Go back to the last good state when training diverges, with .3 of the rate.
        truncation: Positive int, steps that hypergradients walk back.
        outer_rate: Positive float, the greatest change of the logarithm of a hyperparameter in one update, at first.
        seed: Int, of the order of arrays.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model is not built and compiled, a name is none of the model's hyperparameters, or an
            argument is out of range.

    Reference:
        [Smith, 2015](https://arxiv.org/abs/1506.01186) (sweep);
        [Luketina et al., 2016](https://arxiv.org/abs/1511.06727) (regularisers by the gradient of one step);
        [Franceschi et al., 2017](https://arxiv.org/abs/1703.01785) (hypergradients);
        [Loshchilov and Hutter, 2016](https://arxiv.org/abs/1608.03983) (cosine).
    """

    def __init__(self, model: keras.Model, objective: Any = "val_loss", tune: Sequence[str] | None = None,
                 fix: Sequence[str] | None = None, ranges: Mapping[str, Any] | None = None, start: Any = None,
                 granularity: str = "global", sweep: bool = True, online: bool = True, annealing: float | None = 0.3,
                 guard: bool = True, truncation: int | None = 1, outer_rate: float = 0.3, seed: int = 0) -> None:
        check_model(model)
        self._model = model
        choice = Choice(tune, fix, ranges, start, granularity)
        self._rule = choice.rule
        self._objective = Objective(objective, model)
        self._sweeps, self._guards = bool(sweep), bool(guard)
        self._annealing = checks.number_in_range("annealing", annealing, 0.0, 1.0)
        self._truncation = checks.positive_integer("truncation", truncation)
        self._outer_rate = checks.positive_number("outer_rate", outer_rate)
        self._seed = checks.integer("seed", seed)
        self._network = Network(model, choice, self._objective)
        # Steps are taken as they are, and a loss that is scaled for half precision is not.
        scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        self._optimizer: Any = model.optimizer.inner_optimizer if scales else model.optimizer
        self._rows = optimizer_tunables(self._optimizer, choice) + self._network.found
        choice.check_used(self._rows)
        self._rows = [report.switched_off(row, self._sweeps, bool(online)) for row in self._rows]
        self._network.build(self._rows)
        self._history: list[Any] = []
        self._best: Any = None
        self._values_before = self.get_hyperparameters()
        self._says = [self._objective.note]
        if scales:
            self._says.append("loss scaling: left out while tuning; the model that is given back has it again")
        self.notes = list(self._says)

    def summary(self) -> None:
        """Prints the table of hyperparameters: where, value, range, route, tuned or fixed and why."""
        report.write(report.table(self._rows, self._sweeps))

    def fit(self, x: Data, y: Array = None, batch_size: int | None = None, epochs: int = 1,
            validation_data: Data = None, callbacks: Callbacks | None = None, verbose: Any = "auto",
            sample_weight: Array = None, steps_per_epoch: int | None = None) -> Any:
        """Trains and tunes.

        Args:
            x, y, sample_weight: Arrays; or `x` a pair of arrays (x, y), a `tf.data.Dataset` of batches or a
                `keras.utils.PyDataset`.
            batch_size: Positive int, for arrays. Default: 32.
            epochs: Positive int.
            validation_data: Data of the same kinds. They are tuned on, so they must not be what is reported.
            callbacks: List of Keras callbacks. Their model is the one that is trained. Those that set the learning rate
                are refused. With `farhox.callbacks.Resume` the same program goes on after an interruption, from the end
                of the last epoch that was saved.
            verbose: 0: silent; 1 or "auto": one line per epoch.
            steps_per_epoch: Positive int, needed where the number of batches is not known.

        Returns:
            A `keras.callbacks.History`, with the values of hyperparameters by their names.

        Raises:
            ValueError: If there is no validation data, data are not what is said above, labels are out of range, or
                training has no finite loss.
        """
        if validation_data is None:
            raise ValueError("A Tuner tunes hyperparameters on validation data. Received: validation_data=None")
        checks.positive_integer("epochs", epochs)
        saved = SavedRun(_checked_callbacks(callbacks))
        if y is not None:
            x = (x, y) if sample_weight is None else (x, y, sample_weight)
        data, rounds, inner_steps, evaluated = rounds_of(x, validation_data, batch_size, steps_per_epoch, self._seed)
        plan = _Plan(Reading(data), rounds, inner_steps, epochs, evaluated)
        started = []
        if self._rule is not None:
            started = [assign(self._rows, self._rule.start(*examples_of(x, steps_per_epoch)))]
            self._values_before = {row.name: row.value() for row in self._rows}
        with graph_calls():
            return self._fit(plan, saved, verbose, started)

    def _fit(self, plan, saved, verbose, started):
        training = Training(self._network, self._optimizer, self._rows, self._truncation, self._outer_rate)
        self.notes = [*self._says, *started]
        self._history, self._best = [], None
        guard = Guard(training.state(), -(-SWEEP_STEPS // plan.inner_steps)) if self._guards else None
        if saved.state is not None:
            self._go_on(training, guard, plan, saved)
        else:
            annealing = 0.0 if training.has_schedule else self._annealing
            if self._sweeps and training.rate_row.tuned:
                search = RateSearch(self._network, training, plan.data, plan.evaluated, plan.steps)
                reached = search.run()
                self.notes += search.notes
                if guard is not None:
                    guard.begin(training.state(), reached)
            training.rate.train(plan.steps, annealing)
            if annealing:
                self._note(f"annealing: the rate falls along a cosine over the last {annealing:.0%} of {plan.steps} "
                           "steps")
            elif training.has_schedule:
                self._note("annealing: left to the schedule of the optimizer")
        history = self._train(training, guard, plan, saved, verbose)
        if guard is not None:
            self._note(f"guard: went back {guard.fired} times" if guard.fired else "guard: never fired")
        if training.tuned:
            moved = ", ".join(f"{row.name} {report.number(self._values_before[row.name])} -> "
                              f"{report.number(row.value())}" for row in training.tuned[:3])
            more = f" and {len(training.tuned) - 3} more" if len(training.tuned) > 3 else ""
            self._note(f"online: {moved}{more}")
        return history

    def results_summary(self) -> None:
        """Prints the best epoch, the hyperparameters there beside those of the start, and what each part did."""
        self._check_fitted()
        best = self._best
        value = best["logs"][self._objective.name]
        report.write("\n".join([
            f"Best epoch: {best['epoch'] + 1}, {self._objective.name} {value:.4g}", "",
            report.results(self._rows, self._values_before, best["values"]), "", *report.wrapped(self.notes)]))

    def plot(self, path: str | os.PathLike) -> None:
        """Writes a picture of the values of the tuned hyperparameters and the validation loss over the epochs.

        Args:
            path: Path of a picture file, in a format that matplotlib writes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        self._check_fitted()
        report.plot(self._history, [row for row in self._rows if row.tuned], self._objective.name, path)

    def write_hparams(self, log_dir: str | os.PathLike) -> None:
        """Writes the run for TensorBoard's HParams plugin: hyperparameters and validation values of the best epoch.

        Args:
            log_dir: Folder of this run, beside those of others: `tensorboard --logdir` of the folder above shows them.

        Raises:
            ImportError: If tensorboard is not installed.
        """
        self._check_fitted()
        best = self._best
        values = {name: value for name, value in best["values"].items() if value is not None and np.ndim(value) == 0}
        report.write_hparams(log_dir, values, best["logs"], best["epoch"])

    def get_model(self) -> keras.Model:
        """A plain Keras model with the weights and hyperparameters of the best epoch, compiled; it needs no farhox."""
        self._check_fitted()
        values = self._best["values"]
        return self._network.plain_model(self._best["weights"], values, self._plain_optimizer(values))

    def get_hyperparameters(self) -> dict[str, Any]:
        """Dictionary from names to values: those of the best epoch, or before `fit` those of the start."""
        if self._best is not None:
            return dict(self._best["values"])
        return {row.name: row.value() for row in self._rows}

    def get_schedule(self) -> Arrays:
        """Dictionary from names to arrays [steps]: what each step was taken with, the annealed rate among them.

        With a guard that went back, what was taken back is not there: the steps are those that led to the result.
        """
        self._check_fitted()
        schedule = {}
        for entry in self._history:
            for name, values in entry.items():
                schedule.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in schedule.items()}

    def _train(self, training, guard, plan, saved, verbose):
        model, epochs = self._network.model, plan.epochs
        callbacks = keras.callbacks.CallbackList(
            saved.callbacks, add_history=True, add_progbar=False, model=model, verbose=0, epochs=epochs,
            steps=plan.rounds)
        model.stop_training = False
        done = 0 if saved.state is None else saved.state["epoch"]
        logs: dict[str, Any] = {}
        callbacks.on_train_begin()
        saved.restore_callbacks(callbacks.callbacks)
        saved.start()
        try:
            for epoch in range(done, epochs) if saved.goes_on(epochs) else ():
                began = time.monotonic()
                callbacks.on_epoch_begin(epoch)
                logs = self._epoch(training, guard, plan, callbacks, epoch)
                callbacks.on_epoch_end(epoch, logs)
                if verbose:
                    report.write(report.epoch_line(epoch, epochs, logs, time.monotonic() - began))
                saved.save(epoch + 1, callbacks.callbacks, model.stop_training or epoch + 1 == epochs,
                           lambda: self._state(training, guard, plan))
                if model.stop_training:
                    break
        finally:
            saved.stop()
        callbacks.on_train_end(logs)
        if self._best is None:
            raise ValueError(f"Training must have a finite loss. Received: {self._objective.name} "
                             f"{logs.get(self._objective.name)} in every epoch")
        return callbacks._history

    def _epoch(self, training, guard, plan, callbacks, epoch):
        """The rounds of one epoch; returns its logs."""
        losses, recorded, count = [], [], plan.inner_steps
        for index, (inner_batches, outer_batch) in enumerate(plan.data):
            callbacks.on_train_batch_begin(index)
            training.anneal_outer_rate(training.steps / plan.steps, plan.epochs * plan.rounds)
            first, before = training.steps, {
                row.name: row.value() for row in self._rows if row.hyperparameter is not None}
            done = training.run(inner_batches, outer_batch, count)
            losses.append(done.loss)
            recorded.append(self._steps_taken(training, before, first, count))
            if guard is not None and guard.watch(done, training.state):
                self._go_back(training, guard, done)
            callbacks.on_train_batch_end(index, {"loss": done.loss})
        self._history += recorded
        return self._epoch_logs(epoch, losses, plan.evaluated)

    def _state(self, training, guard, plan):
        """What a run that goes on needs, as dictionaries and arrays."""
        variables, steps = training.state()
        return {"variables": variables, "steps": steps, "read": plan.data.read, "rate": training.rate.state(),
                "guard": None if guard is None else guard.resume_state(), "best": self._best, "history": self._history,
                "notes": self.notes, "stopped": bool(self._network.model.stop_training)}

    def _go_on(self, training, guard, plan, saved):
        """Takes back what `_state` returned."""
        state = saved.restore(training.kept)
        training.steps = state["steps"]
        training.rate.restore(state["rate"])
        if guard is not None:
            guard.resume_from(state["guard"])
        self._best, self._history, self.notes = state["best"], state["history"], state["notes"]
        if saved.goes_on(plan.epochs):
            plan.data.read_again(state["read"])

    def _go_back(self, training, guard, done):
        steps, rate = training.steps, training.rate_row.hyperparameter
        cut = _RATE_CUT * rate.numpy()
        training.go_back(guard.good)
        training.steps = steps  # Time goes on, so that the annealing ends with the training.
        rate.assign(cut)
        self._note(f"guard: training loss {done.loss:.3g} at step {steps}; back to the last good state, rate "
                   f"{rate.numpy():.2g}")

    def _epoch_logs(self, epoch, losses, evaluated):
        logs = {"loss": float(np.mean(losses)), **self._network.evaluate(evaluated)}
        values = {row.name: row.value() for row in self._rows}
        score = logs[self._objective.name]
        better = self._best is None or (
            score > self._best["score"] if self._objective.maximize else score < self._best["score"])
        if math.isfinite(score) and better:
            self._best = {"epoch": epoch, "score": score, "logs": dict(logs), "values": values,
                          "weights": self._network.model.get_weights()}
        logs.update({row.name: values[row.name] for row in self._rows
                     if row.tuned and np.ndim(values[row.name]) == 0})
        return logs

    def _steps_taken(self, training, before, first, count):
        """What the steps of a round were taken with, by name."""
        taken = {name: np.repeat(np.asarray(value)[np.newaxis], count, axis=0) for name, value in before.items()}
        taken["learning_rate"] = training.rate.at(np.arange(first, first + count)) / float(
            training.rate_row.hyperparameter.numpy()) * before["learning_rate"]
        return taken

    def _plain_optimizer(self, values):
        optimizer = self._optimizer
        config = optimizer.get_config()
        settings = {name: value for name, value in values.items() if name in config and value is not None}
        if isinstance(vars(optimizer)["_learning_rate"], keras.optimizers.schedules.LearningRateSchedule):
            schedule = vars(optimizer)["_learning_rate"]
            settings["learning_rate"] = values["learning_rate"] * float(schedule(self._best["epoch"]))
        return type(optimizer).from_config({**config, **settings})

    def _note(self, line):
        self.notes.append(line)

    def _check_fitted(self):
        if self._best is None:
            raise ValueError("The tuner must have run: call fit() first.")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The data of a run and how long it is.

    Attributes:
        data: The `Reading` of rounds, an iteration an epoch.
        rounds: Int, rounds in an epoch.
        inner_steps: Int, steps in a round.
        epochs: Int.
        evaluated: Validation batches.
    """

    data: Reading
    rounds: int
    inner_steps: int
    epochs: int
    evaluated: Any

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.epochs * self.rounds * self.inner_steps


def _checked_callbacks(callbacks):
    callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
    for callback in callbacks:
        if isinstance(callback, _REFUSED):
            raise ValueError("The tuner sets the learning rate and its states itself, so callbacks must not. Received: "
                             f"{type(callback).__name__}")
    return callbacks

"""Plain trainings of a task beside tuned ones: annealed, at their best epoch, and black-box searches over them.

A task is an object with `batch_size`, `ranges()`, name of each hyperparameter to its (low, high, log), and
`model(values, seed, steps=None, average=False)`, the compiled model of values, with its rate annealed over the steps.
Its data are pairs of training, validation and test arrays; labels are class numbers or one-hot.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from _shared import experiment

ANNEALED = 0.3
STEPS_PER_EXECUTION = 10  # Plain trainings are spared the most of Keras' time between steps.
SEARCHES = ("random", "tpe", "hyperband")


class Cosine(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that falls to zero along a cosine over the last 30 % of the steps."""

    def __init__(self, rate, steps):
        self.rate, self.steps = rate, steps

    def __call__(self, step):
        progress = 1.0 - (self.steps - tf.cast(step, tf.float32)) / (ANNEALED * self.steps)
        return self.rate * 0.5 * (1.0 + tf.cos(math.pi * tf.clip_by_value(progress, 0.0, 1.0)))

    def get_config(self):
        return {"rate": self.rate, "steps": self.steps}


class Best(keras.callbacks.Callback):
    """Keeps the weights of the epoch with the least validation loss, penalties left out.

    Args:
        data: Validation data.
        average: Bool. Evaluate the averages of the weights.
        report: Callable (epoch, loss), or None.
    """

    def __init__(self, data, average=False, report=None):
        super().__init__()
        self.data, self.average, self.report = data, average, report
        self.loss, self.weights = math.inf, None

    def on_epoch_end(self, epoch, logs=None):
        weights = self.model.get_weights()
        if self.average:
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        loss = loss_and_accuracy(self.model, self.data)[0]
        if loss < self.loss:
            self.loss, self.weights = loss, self.model.get_weights()
        self.model.set_weights(weights)
        if self.report is not None:
            self.report(epoch, loss)


def loss_and_accuracy(model, data):
    """Cross-entropy and accuracy on a data set."""
    x, y = data
    predictions = model.predict(x, batch_size=500, verbose=0)
    y = np.argmax(y, -1) if np.shape(y) == predictions.shape else y  # One-hot labels.
    loss = float(np.mean(keras.losses.sparse_categorical_crossentropy(y, predictions, from_logits=True)))
    return (loss if math.isfinite(loss) else math.inf), float(np.mean(np.argmax(predictions, -1) == y))


def train(task, parts, epochs, values, seed, annealed=True, average=False, report=None):
    """One plain training. Returns the least validation loss and the model of that epoch, or None if there is none."""
    (x, y), validation, _ = parts
    model = task.model(values, seed, epochs * -(-len(x) // task.batch_size) if annealed else None, average)
    best = Best(validation, average, report)
    model.fit(x, y, batch_size=task.batch_size, epochs=epochs, verbose=0, callbacks=[best])
    if best.weights is None:
        return math.inf, None
    model.set_weights(best.weights)
    return best.loss, model


def result_of(validation_loss, model, test, **more):
    """What the JSON file of a run holds."""
    if model is None:
        return {"validation_loss": None, "test_loss": None, "test_accuracy": None, **more}
    loss, accuracy = loss_and_accuracy(model, test)
    return {"validation_loss": validation_loss, "test_loss": loss, "test_accuracy": accuracy, **more}


def search(method, task, parts, epochs, seed, budget, path):
    """Annealed trainings until the CPU seconds are spent, chosen by one of `SEARCHES`.

    Args:
        budget: Float, CPU seconds. The training that exceeds them is the last one.
        path: Folder for the weights of trainings that go on.

    Returns:
        Dictionary of "trials", a list with the results, the values and the CPU seconds "spent" after each.
    """
    if method == "hyperband":
        return _hyperband(task, parts, epochs, seed, budget, path)
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler, pruner = (
        (optuna.samplers.TPESampler(seed=seed), optuna.pruners.MedianPruner()) if method == "tpe" else
        (optuna.samplers.RandomSampler(seed=seed), optuna.pruners.NopPruner()))
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    began, trials = experiment.clocks()["cpu_seconds"], []
    while not trials or trials[-1]["spent"] < budget:
        trial = study.ask()
        values = {name: trial.suggest_float(name, low, high, log=log)
                  for name, (low, high, log) in task.ranges().items()}

        def report(epoch, loss, trial=trial):
            trial.report(min(loss, 1e9), epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            loss, model = train(task, parts, epochs, values, seed, report=report)
            found = result_of(loss, model, parts[2])
            study.tell(trial, min(loss, 1e9))
        except optuna.TrialPruned:
            found = result_of(math.inf, None, None)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        trials.append({**found, "values": values, "spent": experiment.clocks()["cpu_seconds"] - began})
        keras.backend.clear_session()
    return {"trials": trials}


def _hyperband(task, parts, epochs, seed, budget, path):
    """Trials of KerasTuner's Hyperband, again and again until the CPU seconds are spent.

    A trial that is promoted goes on from its weights at the step where it was, so that it is annealed at its end.
    """
    import keras_tuner
    (x, y), validation, test = parts
    steps = -(-len(x) // task.batch_size)
    began, trials = experiment.clocks()["cpu_seconds"], []

    class Spent(keras_tuner.errors.FatalError):
        """The end of the search."""

    class Search(keras_tuner.Hyperband):
        def run_trial(self, trial, *_, **__):
            if trials and trials[-1]["spent"] >= budget:
                raise Spent
            keras.backend.clear_session()
            values = {name: trial.hyperparameters.get(name) for name in task.ranges()}
            model = self.hypermodel.build(trial.hyperparameters)
            until, first = (trial.hyperparameters.values.get(f"tuner/{key}", 0) for key in ("epochs", "initial_epoch"))
            before = trial.hyperparameters.values.get("tuner/trial_id")
            if before is not None:
                model.optimizer.build(model.trainable_variables)  # Its state is loaded where it is built alone.
                model.load_weights(path / f"{before}.weights.h5")
                model.optimizer.iterations.assign(first * steps)
            best = Best(validation)
            model.fit(x, y, batch_size=task.batch_size, initial_epoch=first, epochs=until, verbose=0, callbacks=[best])
            model.save_weights(path / f"{trial.trial_id}.weights.h5")
            if best.weights is not None:
                model.set_weights(best.weights)
            trials.append({**result_of(best.loss, None if best.weights is None else model, test), "values": values,
                           "epochs": until, "spent": experiment.clocks()["cpu_seconds"] - began})
            return min(best.loss, 1e9)

    def build(parameters):
        values = {name: parameters.Float(name, low, high, sampling="log" if log else "linear")
                  for name, (low, high, log) in task.ranges().items()}
        return task.model(values, seed, epochs * steps)

    tuner = Search(build, objective=keras_tuner.Objective("default_objective", "min"), max_epochs=epochs,
                   hyperband_iterations=1000, seed=seed, directory=path, project_name="hyperband", overwrite=True)
    try:
        tuner.search(verbose=0)
    except Spent:
        pass
    return {"trials": trials}


def best_within(runs, budget):
    """The run with the least validation loss among the first ones that the budget pays for, or None.

    Args:
        runs: List of results with their "cpu_seconds".
        budget: Float, CPU seconds. The first run is had in any case.
    """
    spent, best = 0.0, None
    for run in runs:
        spent += run["cpu_seconds"]
        if spent > budget and best is not None:
            break
        if run["validation_loss"] is not None and (best is None or run["validation_loss"] < best["validation_loss"]):
            best = run
    return best


def with_seconds(trials):
    """The trials of a search with the "cpu_seconds" of each."""
    before = [0.0, *(trial["spent"] for trial in trials)]
    return [{**trial, "cpu_seconds": trial["spent"] - spent} for trial, spent in zip(trials, before)]

"""What the experiments with self-tuning networks share: trainings that are all alike, searches made of them, results.

A training takes --steps gradient steps on batches that the seed decides. After every --evaluate_every of them the
validation loss is computed, and the result is the test loss of the weights with the least one. One self-tuned training
is compared with --baseline:

- `grid`, `random`, `tpe`: searches by Optuna. Each of --trials plain trainings has one value of every hyperparameter,
  and the same initial weights and batches as the self-tuned one.
- `fixed`: plain trainings from other initial weights, on other batches: with the schedule that the self-tuned training
  found, with its final values, with the values it started from, and with the best values of the searches.

Curves are over gradient steps, those of the hyperparameters among them, and over CPU seconds. A killed program goes on
where it was.
"""

import dataclasses
import json
import math
import pathlib
import time
from typing import Callable

import experiment  # First: it sets TensorFlow's log level.
from absl import app, flags
import keras
import numpy as np
import tensorflow as tf

import farhox
from farhox import stn

SEARCHES = {"grid": "Grid search", "random": "Random search", "tpe": "Parzen estimator"}
FIXED = {"schedule": "schedule of STN, replayed", "final": "final values of STN, fixed",
         "start": "values of the start, fixed", "search": "best values of the searches, fixed"}
SETTINGS = ("train_examples", "validation_examples", "steps", "evaluate_every", "batch_size", "learning_rate",
            "hyper_learning_rate", "scale_learning_rate", "entropy_weight", "initial_scale", "warmup_steps",
            "training_steps", "validation_steps", "method", "trials")


@dataclasses.dataclass(frozen=True)
class Range:
    """A hyperparameter's values: those strictly between the bounds, whole numbers from `low` to `high` - 1 if discrete.

    Attributes:
        start: Float, where self-tuning begins.
        low, high: Floats.
        discrete: Bool.
    """

    start: float
    low: float
    high: float
    discrete: bool = False

    def hyperparameter(self, name):
        return farhox.Hyperparameter(self.start, low=self.low, high=self.high, discrete=self.discrete, name=name)

    def suggest(self, trial, name):
        """A value drawn by a trial of Optuna, a whole number in the middle between two that are floored differently."""
        if self.discrete:
            return trial.suggest_int(name, int(self.low), int(self.high) - 1) + 0.5
        margin = 1e-6 * (self.high - self.low)  # The bounds themselves are not allowed.
        return trial.suggest_float(name, self.low + margin, self.high - margin)

    def grid(self, points):
        """List of `points` values in the middle of equal parts of the range, each once."""
        values = self.low + (self.high - self.low) * (np.arange(points) + 0.5) / points
        return sorted({int(value) for value in values}) if self.discrete else values.tolist()


@dataclasses.dataclass(frozen=True)
class Task:
    """What an experiment trains.

    Attributes:
        ranges: Dictionary by name of `Range`.
        build: Function of a dictionary by name of `Hyperparameter`, that returns a built Keras model with logits.
        parts: Training, validation and test examples: three pairs of arrays (x, y).
        optimizer: Function without arguments that returns the Keras optimizer of the weights.
        convert: Function of such a model and the list of hyperparameters that returns the self-tuning one.
    """

    ranges: dict
    build: Callable
    parts: tuple
    optimizer: Callable
    convert: Callable = stn.convert

    def hyperparameters(self):
        return {name: entry.hyperparameter(name) for name, entry in self.ranges.items()}


def define_flags(output, **defaults):
    """The flags of all these experiments, with the defaults that differ between them."""
    experiment.define_flags(output)
    flags.DEFINE_list("baseline", defaults["baseline"], "What to compare with: some of grid, random, tpe, fixed.")
    for name, default, what in (
            ("train_examples", None, "Training examples."),
            ("validation_examples", None, "Validation examples, on which hyperparameters are tuned and chosen."),
            ("steps", None, "Gradient steps of a training."),
            ("evaluate_every", None, "Gradient steps between two evaluations."),
            ("batch_size", None, "Examples in a batch."),
            ("trials", 20, "Trainings of a search."),
            ("training_steps", 2, "Self-tuning: training steps in a row."),
            ("validation_steps", 1, "Self-tuning: validation steps after them.")):
        flags.DEFINE_integer(name, defaults.get(name, default), what, lower_bound=1)
    flags.DEFINE_integer("warmup_steps", defaults["warmup_steps"],
                         "Self-tuning: training steps before hyperparameters move.", lower_bound=0)
    for name, default, what in (
            ("learning_rate", None, "Learning rate of the weights, of all trainings."),
            ("hyper_learning_rate", 0.003, "Learning rate of Adam on the unconstrained hyperparameters."),
            ("scale_learning_rate", 0.003, "Learning rate of Adam on the scales of the perturbations; 0: they stay."),
            ("entropy_weight", 1e-3, "Weight of the entropy that keeps perturbations wide."),
            ("initial_scale", 0.5, "Standard deviation of the perturbations to begin with.")):
        flags.DEFINE_float(name, defaults.get(name, default), what, lower_bound=0.0)
    flags.DEFINE_enum("method", "stn", ["stn", "delta"], "Self-tuning networks, or the centred Delta-STN.")


def fit(model, task, settings, seed, folder, recorder=None, callbacks=(), save_every=10.0):
    """Trains a compiled model and evaluates it at regular intervals; after an interruption it goes on where it was.

    Args:
        model: A plain Keras model or a `SelfTuningModel`, with a metric "accuracy".
        seed: Int, of the order of the examples.
        folder: Folder for the state of the training.
        recorder: The `ScheduleRecorder` of a self-tuned training.
        callbacks: Further Keras callbacks.
        save_every: Float, seconds between two saved states.

    Returns:
        Dictionary: "losses" and "accuracies" on validation data after each `evaluate_every` steps, with "cpu_times"
        until then; "best_loss" with its place "best"; "test_loss" and "test_accuracy" of the weights at that place;
        "time_before", as `experiment.Folder.once` wants it.
    """
    train, validation, test = task.parts
    every, rounds = settings["evaluate_every"], settings["steps"] // settings["evaluate_every"]
    state = _State(model, folder, recorder)
    bar, saved = experiment.progress_bar(settings["steps"], ["loss", "best"], unit="step"), time.perf_counter()
    while state.done < rounds:
        tuning = {}
        if isinstance(model, stn.SelfTuningModel):
            order = np.random.default_rng([seed, 1, state.done]).permutation(len(validation[0]))
            # Evaluations are made below, for all trainings in the same way.
            tuning = {"validation_data": batches(validation, order, settings["batch_size"]), "validation_freq": 2}
        order = example_order(len(train[0]), state.done * every, every, settings["batch_size"], seed)
        model.fit(batches(train, order, settings["batch_size"]), verbose=0, shuffle=False,
                  callbacks=[entry for entry in (recorder, *callbacks) if entry is not None], **tuning)
        loss, accuracy = evaluate(model, validation, settings["batch_size"])
        state.add(loss, accuracy)
        bar.update(state.done * every, [("loss", loss), ("best", state.history["best_loss"])], finalize=False)
        if time.perf_counter() - saved > save_every or state.done == rounds:
            state.save()
            saved = time.perf_counter()
    bar.update(settings["steps"], finalize=True)
    model.load_weights(state.best_weights)
    test_loss, accuracy = evaluate(model, test, settings["batch_size"])
    return {**state.history, "test_loss": _finite(test_loss), "test_accuracy": accuracy, "time_before": state.before}


def example_order(size, first, count, batch_size, seed):
    """Indices of the examples of `count` batches from the batch `first` on; each pass over all has its own order."""
    start, end = first * batch_size, (first + count) * batch_size
    passes = [np.random.default_rng([seed, 0, i]).permutation(size) for i in range(start // size, -(-end // size))]
    return np.concatenate(passes)[start % size:][:end - start]


def batches(part, order, batch_size):
    """A data set of batches of examples in an order."""
    x, y = part
    return tf.data.Dataset.from_tensor_slices(order).batch(batch_size).map(
        lambda indices: (tf.gather(x, indices), tf.gather(y, indices))).prefetch(1)


def evaluate(model, part, batch_size):
    """Mean loss and accuracy, without perturbation."""
    data = batches(part, np.arange(len(part[0])), 4 * batch_size)
    values = model.evaluate(data, verbose=0, return_dict=True)
    return float(values["loss"]), float(values["accuracy"])


class _State:
    """A training so far: its history, the weights, and those with the least validation loss.

    All files are written before the JSON file that names them, so that a killed process leaves one state that is whole.
    """

    def __init__(self, model, folder, recorder):
        self.model, self.folder, self.recorder = model, pathlib.Path(folder), recorder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history = {"losses": [], "accuracies": [], "cpu_times": [], "best": 0, "best_loss": None}
        self.before = {"seconds": 0.0, "cpu_seconds": 0.0}
        self._file, self._start = self.folder / "state.json", _clocks()
        if self._file.exists():
            state = json.loads(self._file.read_text())
            self.history, self.before = state["history"], state["time"]
            if recorder is not None:
                recorder.schedule = state["schedule"]
            model.load_weights(self._weights)
            for variable, value in zip(self._seeds(), state["seeds"]):
                variable.assign(value)

    @property
    def done(self):
        return len(self.history["losses"])

    @property
    def best_weights(self):
        return self.folder / f"best{self.history['best']}.weights.h5"

    @property
    def _weights(self):
        return self.folder / f"after{self.done}.weights.h5"

    def add(self, loss, accuracy):
        """The result of an evaluation."""
        history = self.history
        for name, value in (("losses", _finite(loss)), ("accuracies", accuracy),
                            ("cpu_times", round(self._spent()["cpu_seconds"], 2))):
            history[name].append(value)
        if history["best_loss"] is None or loss < history["best_loss"]:
            history["best_loss"], history["best"] = _finite(loss), self.done - 1
            self.model.save_weights(self.best_weights)

    def save(self):
        self.model.save_weights(self._weights)
        experiment.write_json(self._file, {
            "history": self.history, "time": self._spent(),
            "seeds": [variable.numpy().tolist() for variable in self._seeds()],
            "schedule": None if self.recorder is None else self.recorder.schedule})
        for old in self.folder.glob("*.weights.h5"):
            if old not in (self._weights, self.best_weights):
                old.unlink()

    def _seeds(self):
        # Keras saves no state of random numbers.
        return [variable for variable in self.model.variables if "int" in variable.dtype]

    def _spent(self):
        return {clock: self.before[clock] + now - self._start[clock] for clock, now in _clocks().items()}


def _clocks():
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def _finite(value):
    return float(value) if math.isfinite(value) else None


class PlainTrainer:
    """Trains the network of a task in plain Keras, compiled once for all trainings."""

    def __init__(self, task, settings):
        self.task, self.settings = task, settings
        self.hyperparameters = task.hyperparameters()
        self.network = task.build(self.hyperparameters)
        self._variables, self._initial = self.network.variables, {}
        self.network.compile(task.optimizer(), cross_entropy(), metrics=["accuracy"], jit_compile=False)
        self.network.optimizer.build(self.network.trainable_variables)
        self._slots = [(variable, variable.numpy()) for variable in self.network.optimizer.variables]

    def train(self, seed, folder, values=None, schedule=None):
        """A training with fixed values of the hyperparameters by name, or with a schedule; returns what `fit` does."""
        if seed not in self._initial:
            keras.utils.set_random_seed(seed)
            self._initial[seed] = [variable.numpy() for variable in self.task.build(self.hyperparameters).variables]
        for variable, value in [*zip(self._variables, self._initial[seed]), *self._slots]:
            variable.assign(value)
        callbacks = []
        if schedule is not None:
            callbacks = [stn.ScheduleReplay(schedule, list(self.hyperparameters.values()))]
        else:
            for name, value in values.items():
                self.hyperparameters[name].assign(value)
        return fit(self.network, self.task, self.settings, seed, folder, callbacks=callbacks)


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def self_tune(task, settings, seed, folder, save_every=10.0):
    """The self-tuned training: what `fit` returns, and the schedule."""
    keras.utils.set_random_seed(seed)
    hyperparameters = task.hyperparameters()
    network = task.convert(task.build(hyperparameters), list(hyperparameters.values()))
    model = stn.SelfTuningModel(
        network, list(hyperparameters.values()), method=settings["method"], training_steps=settings["training_steps"],
        validation_steps=settings["validation_steps"], warmup_steps=settings["warmup_steps"],
        initial_scale=settings["initial_scale"], entropy_weight=settings["entropy_weight"])
    scale_rate = settings["scale_learning_rate"]
    model.compile(
        task.optimizer(), keras.optimizers.Adam(settings["hyper_learning_rate"]),
        keras.optimizers.Adam(scale_rate) if scale_rate else None, cross_entropy(), metrics=["accuracy"],
        jit_compile=False)
    recorder = stn.ScheduleRecorder(every=max(1, settings["steps"] // 200))
    result = fit(model, task, settings, seed, folder, recorder, save_every=save_every)
    return {**result, "schedule": recorder.schedule}


def search(task, trainer, settings, seed, sampler, folder):
    """Trainings with the values that a sampler of Optuna draws.

    Returns:
        List of what `fit` returns for each, with its "values".
    """
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if sampler == "grid":
        points = 2
        while math.prod(len(entry.grid(points)) for entry in task.ranges.values()) <= settings["trials"]:
            points += 1
        made = optuna.samplers.GridSampler(
            {name: entry.grid(points) for name, entry in task.ranges.items()}, seed=3 * seed)
    else:
        # A seed of its own: the estimator's first trials are random, and would be those of the random search.
        made = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}[sampler](
            seed=3 * seed + 1 + (sampler == "tpe"))
    study, runs = optuna.create_study(sampler=made), []
    for i in range(settings["trials"]):
        trial = study.ask()
        values = {name: entry.suggest(trial, name) for name, entry in task.ranges.items()}
        runs.append(folder.once(f"seed{seed}_{sampler}_{i:02d}", lambda path: {
            "values": values, **trainer.train(seed, path, values)}))
        study.tell(trial, loss_of(runs[-1]))
    return runs


def loss_of(run):
    """The least validation loss of a training; infinite if it never had a finite one."""
    return math.inf if run["best_loss"] is None else run["best_loss"]


def run_seed(task, settings, baselines, seed, folder):
    """The self-tuned training of a seed, and its baselines.

    Returns:
        Dictionary: "stn", a training; "searches", by name lists of trainings; "fixed", by name trainings.
    """
    tuned = folder.once(f"seed{seed}_stn", lambda path: self_tune(task, settings, seed, path))
    trainer = PlainTrainer(task, settings)
    searches = {name: search(task, trainer, settings, seed, name, folder) for name in SEARCHES if name in baselines}
    fixed = {}
    if "fixed" in baselines:
        schedule = tuned["schedule"]
        choices = {"schedule": {"schedule": schedule},
                   "final": {"values": {name: values[-1] for name, values in schedule["values"].items()}},
                   "start": {"values": {name: entry.start for name, entry in task.ranges.items()}}}
        if searches:
            best = min((run for runs in searches.values() for run in runs), key=loss_of)
            choices["search"] = {"values": best["values"]}
        for name, choice in choices.items():
            # The searches chose the values that suit this seed's weights and batches: others are fair to all. What the
            # best values of the searches are depends on which have run.
            tag = name if name != "search" else "_".join(["search", *searches])
            fixed[name] = folder.once(f"seed{seed}_fixed_{tag}", lambda path: {
                **choice, **trainer.train(seed + 10_000, path, **choice)})
    return {"stn": tuned, "searches": searches, "fixed": fixed}


def best_so_far(runs):
    """CPU seconds and least validation loss until then, over trainings one after the other."""
    losses, seconds, before = [], [], 0.0
    for run in runs:
        losses += [math.inf if loss is None else loss for loss in run["losses"]]
        seconds += [before + second for second in run["cpu_times"]]
        before += run["cpu_times"][-1]
    return np.array(seconds), np.minimum.accumulate(losses)


def steps_per_training(settings):
    """Gradient steps of a self-tuned training, those of the hyperparameters among them."""
    every, training = settings["evaluate_every"], settings["training_steps"]
    return settings["steps"] // every * (every + every // training * settings["validation_steps"])


def summaries(by_seed, settings):
    """What the table says: a list of (label, trainings of the seeds, gradient steps, CPU seconds of the seeds)."""
    results = list(by_seed.values())
    tuned = [result["stn"] for result in results]
    rows = [("Self-tuning network", tuned, steps_per_training(settings), [run["cpu_times"][-1] for run in tuned])]
    for name in results[0]["searches"]:
        searches = [result["searches"][name] for result in results]
        seconds = [sum(run["cpu_times"][-1] for run in runs) for runs in searches]
        steps = settings["trials"] * settings["steps"]
        rows.append((f"{SEARCHES[name]}, best by validation loss", [min(runs, key=loss_of) for runs in searches],
                     steps, seconds))
        rows.append((f"{SEARCHES[name]}, best by test loss", [min(runs, key=_test_loss) for runs in searches],
                     steps, seconds))
    for name in results[0]["fixed"]:
        runs = [result["fixed"][name] for result in results]
        rows.append((FIXED[name], runs, settings["steps"], [run["cpu_times"][-1] for run in runs]))
    return rows


def _test_loss(run):
    return math.inf if run["test_loss"] is None else run["test_loss"]


def table(rows):
    cells = []
    for label, runs, steps, seconds in rows:
        cells.append([
            label, experiment.mean_and_range([loss_of(run) for run in runs], "{:.4f}"),
            experiment.mean_and_range([_test_loss(run) for run in runs], "{:.4f}"),
            experiment.mean_and_range([100 * run["test_accuracy"] for run in runs]), str(steps),
            experiment.mean_and_range(seconds, "{:.0f}")])
    return experiment.markdown_table(
        ["", "best validation loss", "test loss", "test accuracy, %", "gradient steps", "CPU seconds"], cells)


def plot(by_seed, task, settings, path):
    """Best validation loss against time and steps, hyperparameters, and validation loss of fixed values."""
    colors = {"stn": experiment.ORANGE, "random": experiment.BLUE, "tpe": experiment.GREEN, "grid": experiment.PURPLE,
              "schedule": experiment.ORANGE, "final": experiment.BLUE, "start": experiment.GREY,
              "search": experiment.GREEN}
    first_seed, first = next(iter(by_seed.items()))
    every, steps = settings["evaluate_every"], settings["steps"]
    with experiment.figure(path, rows=2, columns=2, size=(11.5, 7.6)) as (time_axis, step_axis, values_axis, fixed):
        for name in ["stn", *first["searches"]]:
            label = "Self-tuning network" if name == "stn" else SEARCHES[name]
            for result in by_seed.values():
                runs = [result["stn"]] if name == "stn" else result["searches"][name]
                seconds, losses = best_so_far(runs)
                share = steps_per_training(settings) / steps if name == "stn" else 1.0
                for axis, x in ((time_axis, seconds), (step_axis, share * every * np.arange(1, len(losses) + 1))):
                    axis.plot(x, losses, color=colors[name], label=label, drawstyle="steps-post")
                label = None
        lowest = min(loss_of(result["stn"]) for result in by_seed.values())
        for axis, x in ((time_axis, "CPU seconds"), (step_axis, "Gradient steps")):
            axis.set(title=f"Best validation loss so far, {len(by_seed)} seed(s)", xlabel=x, xscale="log",
                     ylim=(0.95 * lowest, 2.0 * lowest))
            axis.legend(fontsize=8)
        schedule = first["stn"]["schedule"]
        for name, values in schedule["values"].items():
            entry = task.ranges[name]
            values_axis.plot(schedule["steps"], (np.array(values) - entry.low) / (entry.high - entry.low), label=name)
        values_axis.set(title=f"Hyperparameters, as shares of their range, seed {first_seed}", xlabel="Training steps")
        values_axis.legend(fontsize=7, ncols=2)
        for name in ["stn", *first["fixed"]]:
            curves = [[math.nan if loss is None else loss for loss in run["losses"]] for run in (
                result["stn"] if name == "stn" else result["fixed"][name] for result in by_seed.values())]
            fixed.plot(every * np.arange(1, len(curves[0]) + 1), np.mean(curves, axis=0), color=colors[name],
                       linestyle="--" if name == "stn" else "-",
                       label="Self-tuning network" if name == "stn" else FIXED[name])
        fixed.set(title="Validation loss of single trainings, mean of the seeds", xlabel="Training steps",
                  ylim=(0.95 * lowest, 2.0 * lowest))
        fixed.legend(fontsize=8)


def main(name, settings, make_task):
    """Runs a script.

    Args:
        name: Of the script.
        settings: Dictionary of the flags that the trainings depend on.
        make_task: Function of the settings and a seed that returns a `Task`.
    """
    baselines = flags.FLAGS.baseline
    unknown = sorted(set(baselines) - {*SEARCHES, "fixed"})
    if unknown:
        raise app.UsageError(f"--baseline may name {', '.join(SEARCHES)}, fixed. Received: {', '.join(unknown)}")
    if settings["steps"] % settings["evaluate_every"]:
        raise app.UsageError("--steps must be a multiple of --evaluate_every. Received: "
                             f"{settings['steps']} and {settings['evaluate_every']}")
    experiment.require(matplotlib="examples", **({"optuna": "search"} if set(baselines) & set(SEARCHES) else {}))
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    by_seed = {}
    for seed in experiment.seeds():
        task = make_task(settings, seed)
        by_seed[seed] = run_seed(task, settings, baselines, seed, folder)
    rows = summaries(by_seed, settings)
    print(f"\n{settings['steps']} steps per training, {len(by_seed)} seed(s): mean (least to greatest)\n{table(rows)}\n"
          f"Results and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": by_seed}))
    plot(by_seed, task, settings, output / f"{name}.png")

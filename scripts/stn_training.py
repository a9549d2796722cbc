"""Trainings of the experiments with self-tuning networks: self-tuned or plain, evaluated alike, resumable.

A training takes a number of gradient steps on batches that its seed decides. The validation loss is computed at regular
intervals, and the result is the test loss of the weights with the least one.
"""

import dataclasses
import json
import math
import pathlib
import time
from typing import Callable

import experiment  # First: it sets TensorFlow's log level.
import keras
import numpy as np
import tensorflow as tf

import farhox
from farhox import stn


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


def fit(model, evaluate, task, settings, seed, folder, recorder=None, callbacks=(), save_every=10.0):
    """Trains a compiled model and evaluates it at regular intervals; after an interruption it goes on where it was.

    Args:
        model: A plain Keras model or a `SelfTuningModel`.
        evaluate: Its `Evaluator`.
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
        loss, accuracy = evaluate(validation)
        state.add(loss, accuracy)
        bar.update(state.done * every, [("loss", loss), ("best", state.history["best_loss"])], finalize=False)
        if time.perf_counter() - saved > save_every or state.done == rounds:
            state.save()
            saved = time.perf_counter()
    bar.update(settings["steps"], finalize=True)
    model.load_weights(state.best_weights)
    test_loss, accuracy = evaluate(test)
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


class Evaluator:
    """Mean loss and accuracy of a model on examples (x, y), without perturbation; compiled once for all evaluations.

    Args:
        model: A Keras model with logits.
        batch_size: Int, examples at a time.
    """

    def __init__(self, model, batch_size):
        self.batch_size = batch_size

        @tf.function(autograph=False, reduce_retracing=True)
        def sums(x, y):
            logits = model(x, training=False)
            losses = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
            right = tf.cast(tf.argmax(logits, axis=-1, output_type=y.dtype) == y, losses.dtype)
            return tf.reduce_sum(losses), tf.reduce_sum(right)

        self._sums = sums

    def __call__(self, part):
        x, y = part
        sums = [self._sums(tf.constant(x[start:start + self.batch_size]), tf.constant(y[start:start + self.batch_size]))
                for start in range(0, len(x), self.batch_size)]
        return tuple(float(value) for value in np.sum(sums, axis=0, dtype="float64") / y.size)


class _State:
    """A training so far: its history, the weights, and those with the least validation loss.

    All files are written before the JSON file that names them, so that a killed process leaves one state that is whole.
    """

    def __init__(self, model, folder, recorder):
        self.model, self.folder, self.recorder = model, pathlib.Path(folder), recorder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history = {"losses": [], "accuracies": [], "cpu_times": [], "best": 0, "best_loss": None}
        self.before = {"seconds": 0.0, "cpu_seconds": 0.0}
        self._file, self._start = self.folder / "state.json", experiment.clocks()
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
        return {clock: self.before[clock] + now - self._start[clock] for clock, now in experiment.clocks().items()}


def _finite(value):
    return float(value) if math.isfinite(value) else None


class PlainTrainer:
    """Trains the network of a task in plain Keras, compiled once for all trainings."""

    def __init__(self, task, settings):
        self.task, self.settings = task, settings
        self.hyperparameters = task.hyperparameters()
        self.network = task.build(self.hyperparameters)
        self._variables, self._initial = self.network.variables, {}
        self.network.compile(task.optimizer(), cross_entropy(), jit_compile=False)
        self._evaluate = Evaluator(self.network, 4 * settings["batch_size"])
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
        return fit(self.network, self._evaluate, self.task, self.settings, seed, folder, callbacks=callbacks)


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
        keras.optimizers.Adam(scale_rate) if scale_rate else None, cross_entropy(), jit_compile=False)
    recorder = stn.ScheduleRecorder(every=max(1, settings["steps"] // 200))
    evaluate = Evaluator(model, 4 * settings["batch_size"])
    result = fit(model, evaluate, task, settings, seed, folder, recorder, save_every=save_every)
    return {**result, "schedule": recorder.schedule}

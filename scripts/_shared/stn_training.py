"""Trainings of the experiments with self-tuning networks: self-tuned or plain, evaluated alike, resumable.

A training takes a number of gradient steps on batches that its seed decides. The validation loss is computed at regular
intervals, and the result is the test loss of the weights with the least one.
"""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import farhox
from _shared import experiment
from farhox import stn
from farhox.callbacks import Resumable, Resume


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
    rounds = _Rounds(task, evaluate, settings, seed)
    tuning = {}
    if isinstance(model, stn.SelfTuningModel):
        # Evaluations are made between rounds, for all trainings in the same way.
        tuning = {"validation_data": batches(validation, rounds.validation_order, settings["batch_size"]),
                  "validation_freq": rounds.count + 1}
    # The data of a round follow from its number: nothing is read again when a training goes on.
    resume = Resume(folder, seconds=save_every, replay=False)
    model.fit(batches(train, rounds.train_order, settings["batch_size"]), epochs=rounds.count, verbose=0, shuffle=False,
              callbacks=[entry for entry in (rounds, recorder, *callbacks, resume) if entry is not None], **tuning)
    model.set_weights(rounds.best_weights)
    test_loss, accuracy = evaluate(test)
    return {**rounds.history, "test_loss": _finite(test_loss), "test_accuracy": accuracy, "time_before": rounds.before}


def example_order(size, first, count, batch_size, seed):
    """Indices of the examples of `count` batches from the batch `first` on; each pass over all has its own order."""
    start, end = first * batch_size, (first + count) * batch_size
    passes = [np.random.default_rng([seed, 0, i]).permutation(size) for i in range(start // size, -(-end // size))]
    return np.concatenate(passes)[start % size:][:end - start]


def batches(part, order, batch_size):
    """A data set of batches of examples, in the order that a variable has when it is read."""
    x, y = part
    indices = tf.data.Dataset.range(1).flat_map(lambda _: tf.data.Dataset.from_tensor_slices(order.value()))
    return indices.apply(tf.data.experimental.assert_cardinality(order.shape[0])).batch(batch_size).map(
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


class _Rounds(keras.callbacks.Callback, Resumable):
    """The rounds of a training, an epoch each: their data before, an evaluation after them, the best weights."""

    def __init__(self, task, evaluate, settings, seed):
        super().__init__()
        self.train, self.validation, _ = task.parts
        self.evaluate, self.seed = evaluate, seed
        self.every, self.batch_size = settings["evaluate_every"], settings["batch_size"]
        self.count = settings["steps"] // self.every
        self.history = {"losses": [], "accuracies": [], "cpu_times": [], "best": 0, "best_loss": None}
        self.best_weights = None
        self.train_order = tf.Variable(tf.zeros([self.every * self.batch_size], tf.int64), trainable=False)
        self.validation_order = tf.Variable(tf.zeros([len(self.validation[0])], tf.int64), trainable=False)
        self.before, self._start = {"seconds": 0.0, "cpu_seconds": 0.0}, experiment.clocks()
        self._bar = experiment.ProgressBar(settings["steps"], "step")

    def on_epoch_begin(self, epoch, logs=None):
        self.train_order.assign(
            example_order(len(self.train[0]), epoch * self.every, self.every, self.batch_size, self.seed))
        self.validation_order.assign(
            np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.validation[0])))

    def on_epoch_end(self, epoch, logs=None):
        loss, accuracy = self.evaluate(self.validation)
        history = self.history
        for name, value in (("losses", _finite(loss)), ("accuracies", accuracy),
                            ("cpu_times", round(self.resume_state()["time"]["cpu_seconds"], 2))):
            history[name].append(value)
        if history["best_loss"] is None or loss < history["best_loss"]:
            history["best_loss"], history["best"] = _finite(loss), epoch
            self.best_weights = self.model.get_weights()
        self._bar.update((epoch + 1) * self.every, {"validation_loss": loss, "best": history["best_loss"] or math.nan})

    def resume_state(self):
        spent = {clock: self.before[clock] + now - self._start[clock] for clock, now in experiment.clocks().items()}
        return {"history": self.history, "best_weights": self.best_weights, "time": spent}

    def resume_from(self, state):
        self.history, self.best_weights, self.before = state["history"], state["best_weights"], state["time"]
        self._bar = experiment.ProgressBar(self.count * self.every, "step", len(self.history["losses"]) * self.every)


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

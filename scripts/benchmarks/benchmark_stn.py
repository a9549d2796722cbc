r"""Time and memory of a step of a self-tuning network beside a step of the plain one.

    python scripts/benchmarks/benchmark_stn.py --quick
    python scripts/benchmarks/benchmark_stn.py --networks=cnn,lstm \
        --json=benchmark_stn.json

Networks, on synthetic data in float32: `mlp` 784-1200-1200-10; `cnn`, two convolutions and two dense layers on 28 x 28
images; `alexnet`, five convolutions and three dense layers on 32 x 32 images; `lstm`, an embedding, two layers of 200
units and a dense layer over 1000 words, 35 steps. Dropout everywhere, SGD with momentum, Adam for the hyperparameter.

Methods: `plain`, Keras' own training step; `stn` and `delta`, the mean over two training steps and a validation step.
Each case runs in a process of its own. Times are medians of CPU seconds per step, which other programs disturb little.
Peak is the most resident memory of the process, growth what of it came after TensorFlow was loaded and the data were
made: weights, slots, activations, and the tracing of steps.
"""

import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program
from _shared.measuring import peak_memory, timed

FLAGS = flags.FLAGS
NETWORKS, METHODS = ("mlp", "cnn", "alexnet", "lstm"), ("plain", "stn", "delta")
COLUMNS = [("network", "{}"), ("method", "{}"), ("step_s", "{:.4f}"), ("over_plain", "{:.2f}"), ("peak_mb", "{:.0f}"),
           ("peak_over_plain", "{:.2f}"), ("growth_mb", "{:.0f}"), ("growth_over_plain", "{:.2f}")]


def define_flags():
    """Called when the script runs, not when it is imported: absl flags are global."""
    program.define_names("networks", list(NETWORKS), NETWORKS, "Networks to run.")
    flags.DEFINE_integer("batch_size", None, "Examples per step. Default: 128, lstm 20; with --quick 4.",
                         lower_bound=1)
    flags.DEFINE_integer("repeats", None, "Timed rounds per case. Default: 15, with --quick 2.", lower_bound=1)
    cases.define_flags("Few repeats and small batches: shows that everything runs.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import keras
import numpy as np
import tensorflow as tf

import farhox
from farhox import stn


def main(_):
    if cases.is_measured_here(measure):
        return
    rows = []
    for network in FLAGS.networks:
        plain = None
        batch_size = FLAGS.batch_size or (4 if FLAGS.quick else 20 if network == "lstm" else 128)
        for method in METHODS:
            row = cases.measured(__file__, f"{network} {method}", network=network, method=method, batch_size=batch_size,
                                 repeats=FLAGS.repeats or (2 if FLAGS.quick else 15))
            plain = plain or row
            rows.append({**row, "over_plain": row["step_s"] / plain["step_s"],
                         "peak_over_plain": row["peak_mb"] / plain["peak_mb"],
                         "growth_over_plain": row["growth_mb"] / plain["growth_mb"]})
    print(cases.table(rows, COLUMNS))
    cases.write(rows)


def measure(network, method, batch_size, repeats):
    """Measures one case in this process: a dictionary with columns of the table."""
    keras.utils.set_random_seed(0)
    batch = synthetic_batch(network, batch_size)
    idle = peak_memory()
    steps = plain_steps(network, batch) if method == "plain" else self_tuning_steps(network, batch, method)
    for step in steps:
        timed(step)
    seconds = statistics.mean(statistics.median(timed(step) for _ in range(repeats)) for step in steps)
    peak = peak_memory()
    return dict(network=network, method=method, step_s=seconds, peak_mb=peak / 1024, growth_mb=(peak - idle) / 1024,
                batch_size=batch_size, repeats=repeats)


def plain_steps(network, batch):
    """Keras' own training step on the plain network."""
    model, _ = plain_network(network)
    model.compile(optimizer(), cross_entropy())
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step, autograph=False)
    return [lambda: step(batch)["loss"]]


def self_tuning_steps(network, batch, method):
    """One cycle of the self-tuning network."""
    plain, rate = plain_network(network)
    model = stn.SelfTuningModel(stn.convert(plain), [rate], method=method)
    model.compile(optimizer(), keras.optimizers.Adam(0.003), keras.optimizers.Adam(0.003), loss=cross_entropy())
    training = [lambda: model.training_step(batch)] * model.training_steps
    return training + [lambda: model.validation_step(batch)] * model.validation_steps


def plain_network(name):
    """A Keras network and the dropout rate that its layers read."""
    layers, rate = keras.layers, farhox.Hyperparameter(0.1, low=0.0, high=0.9, name="dropout")

    def dense(*widths):
        return [layer for width in widths for layer in (layers.Dense(width, "relu"), stn.Dropout(rate))]

    def convolution(filters, strides=1, pool=False):
        return [layers.Conv2D(filters, 3, strides, padding="same", activation="relu"), stn.Dropout(rate)] + (
            [layers.MaxPooling2D()] if pool else [])

    if name == "mlp":
        body = [keras.Input([784]), *dense(1200, 1200), layers.Dense(10)]
    elif name == "cnn":
        body = [keras.Input([28, 28, 1]), *convolution(32, pool=True), *convolution(64, pool=True), layers.Flatten(),
                *dense(128), layers.Dense(10)]
    elif name == "alexnet":
        body = [keras.Input([32, 32, 3]), *convolution(64, 2, True), *convolution(192, pool=True), *convolution(384),
                *convolution(256), *convolution(256, pool=True), layers.Flatten(), *dense(1024, 1024), layers.Dense(10)]
    else:
        body = [keras.Input([35], dtype="int32"), layers.Embedding(1000, 200),
                layers.LSTM(200, return_sequences=True), stn.Dropout(rate),
                layers.LSTM(200, return_sequences=True), stn.Dropout(rate), layers.Dense(1000)]
    return keras.Sequential(body), rate


def synthetic_batch(network, batch_size):
    """Normal inputs and random labels, or random words that are to be repeated."""
    random = np.random.default_rng(0)
    if network == "lstm":
        words = tf.constant(random.integers(0, 1000, [batch_size, 35]))
        return words, words
    shape = {"mlp": [784], "cnn": [28, 28, 1], "alexnet": [32, 32, 3]}[network]
    return (tf.constant(random.normal(size=[batch_size, *shape]), tf.float32),
            tf.constant(random.integers(0, 10, [batch_size])))


def optimizer():
    return keras.optimizers.SGD(0.01, momentum=0.9)


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


if __name__ == "__main__":
    program.run(main)

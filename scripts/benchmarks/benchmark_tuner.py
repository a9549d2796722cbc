r"""CPU seconds and memory of `farhox.Tuner.fit` beside Keras' `fit` of as many epochs.

    python scripts/benchmarks/benchmark_tuner.py --quick
    python scripts/benchmarks/benchmark_tuner.py --epochs=20

Networks on 10,000 synthetic images of 28 x 28 in batches of 100, 5,000 more to validate on: `mlp`, 128-128 units with
L2 penalties and SGD with momentum; `cnn`, two convolutions with layer normalization and two dense layers with AdamW;
`dropout`, the same with two dropout layers; `translation`, with images moved in front; `nearest`, with images moved to
the nearest pixel, which self-tuning layers tune.

One run of each in a process of its own: `fit_s` and `tuner_s` hold all of it, tracing, the sweep, validation at the end
of epochs. `started_s` is what the tuner had used before its first epoch had ended, `epoch_s` the median of later epochs
beside `keras_epoch_s`. Peak is the most resident memory of the process.
"""

import pathlib
import resource
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program

FLAGS = flags.FLAGS
NETWORKS = ("mlp", "cnn", "dropout", "translation", "nearest")
INTERPOLATIONS = {"translation": "bilinear", "nearest": "nearest"}
COLUMNS = [("network", "{}"), ("fit_s", "{:.1f}"), ("tuner_s", "{:.1f}"), ("ratio", "{:.2f}"),
           ("started_s", "{:.1f}"), ("keras_epoch_s", "{:.2f}"), ("epoch_s", "{:.2f}"), ("memory", "{:.2f}")]


def define_flags():
    """Called when the script runs, not when it is imported: absl flags are global."""
    program.define_names("networks", list(NETWORKS), NETWORKS, "Networks to run.")
    flags.DEFINE_integer("epochs", 20, "Epochs of each run.", lower_bound=2)
    cases.define_flags("Two epochs of few examples: shows that everything runs.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import keras
import numpy as np

import farhox


def main(_):
    if cases.is_measured_here(measure):
        return
    rows = []
    for network in FLAGS.networks:
        case = {"network": network, "epochs": 2 if FLAGS.quick else FLAGS.epochs,
                "examples": 200 if FLAGS.quick else 10_000}
        fit, tuner = (cases.measured(__file__, f"{network} {method}", **case, method=method)
                      for method in ("fit", "tuner"))
        rows.append({**case, "threads": fit["threads"], "fit_s": fit["seconds"], "tuner_s": tuner["seconds"],
                     "ratio": tuner["seconds"] / fit["seconds"], "started_s": tuner["first"],
                     "keras_epoch_s": fit["epoch"], "epoch_s": tuner["epoch"], "fit_mb": fit["peak_mb"],
                     "tuner_mb": tuner["peak_mb"], "memory": tuner["peak_mb"] / fit["peak_mb"]})
    print(cases.table(rows, COLUMNS))
    cases.write(rows)


class Clock(keras.callbacks.Callback):
    """CPU seconds at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.times = []

    def on_epoch_end(self, epoch, logs=None):
        self.times.append(time.process_time())


def measure(network, method, epochs, examples):
    """Measures one case in this process."""
    keras.utils.set_random_seed(0)
    train, validation = synthetic(examples), synthetic(examples // 2)
    model, clock, start = compiled(network), Clock(), time.process_time()
    if method == "fit":
        model.fit(*train, batch_size=100, epochs=epochs, validation_data=validation, validation_batch_size=500,
                  verbose=0, callbacks=[clock])
    else:
        farhox.Tuner(model).fit(
            *train, batch_size=100, epochs=epochs, validation_data=validation, verbose=0, callbacks=[clock])
    return {"seconds": time.process_time() - start, "first": clock.times[0] - start,
            "epoch": statistics.median(np.diff(clock.times)),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def synthetic(count):
    """Images of noise with a mark of their class."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(count, 28, 28, 1)).astype("float32"), random.integers(0, 10, count)
    x[np.arange(count), 0, y] += 3.0
    return x, y


def compiled(name):
    """The compiled network of this name."""
    layers = keras.layers
    if name == "mlp":
        penalty = {"kernel_regularizer": keras.regularizers.L2(1e-4)}
        body = [layers.Flatten(), layers.Dense(128, "relu", **penalty), layers.Dense(128, "relu", **penalty),
                layers.Dense(10, **penalty)]
        optimizer = keras.optimizers.SGD(0.02, momentum=0.9)
    else:
        drop = (lambda: [layers.Dropout(0.3)]) if name == "dropout" else (lambda: [])
        moves = INTERPOLATIONS.get(name)
        moved = [layers.RandomTranslation(0.1, 0.1, interpolation=moves)] if moves else []
        body = [*moved, layers.Conv2D(16, 3, strides=2, activation="relu"), layers.LayerNormalization(),
                layers.Conv2D(32, 3, strides=2, activation="relu"), layers.LayerNormalization(), layers.Flatten(),
                *drop(), layers.Dense(64, "relu"), *drop(), layers.Dense(10)]
        optimizer = keras.optimizers.AdamW(1e-3, weight_decay=1e-2)
    model = keras.Sequential([keras.Input([28, 28, 1]), *body])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


if __name__ == "__main__":
    program.run(main)

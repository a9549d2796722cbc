r"""Learns from partly wrong labels: learning rate, L2 strength and one weight per example, by gradient.

Some training labels are replaced by wrong ones. A small network is trained on them, again and again, and after each
training the gradient of the validation loss says how its hyperparameters should have been: that is one
hyper-iteration. Wrongly labelled examples end up with small weights, without anyone saying which they are.

    python scripts/hyperparameters/quickstart.py
    python scripts/hyperparameters/quickstart.py --dataset=mnist \
        --data_dir=/path/to/tensorflow_datasets
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import program

# What a person might start from; the hypergradient starts from it too.
DEFAULT_LEARNING_RATE, DEFAULT_L2, MOMENTUM = 0.1, 1e-4, 0.9
# All weights start here, halfway: an example whose weight has fallen below is one that training is better without.
INITIAL_WEIGHT = 0.5
# Examples for training, for validation and in an inner batch; the rest is the test set.
SIZES = {"digits": (600, 700, 100), "mnist": (5000, 5000, 500), "fashion_mnist": (5000, 5000, 500)}
NUM_CLASSES = 10


def define_flags():
    """Called when the script is run and not when it is imported, because absl flags are global."""
    flags.DEFINE_enum("dataset", "digits", sorted(SIZES), "digits needs no download; the others are read with TFDS.")
    flags.DEFINE_string("data_dir", os.environ.get("FARHOX_DATA_DIR"), "Folder of TFDS' data sets.")
    flags.DEFINE_integer("hyper_iterations", 40, "Updates of the outer variables.", lower_bound=1)
    flags.DEFINE_integer("inner_steps", 100, "Training steps in each hyper-iteration.", lower_bound=1)
    flags.DEFINE_float("noise", 0.3, "Fraction of training labels that are made wrong.", 0.0, 0.9)
    flags.DEFINE_integer("seed", 0, "Seed of the split, the noise and the initial weights.")
    flags.DEFINE_string("output", "quickstart_results", "Folder for plots and results.json.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import keras
import numpy as np
import tensorflow as tf

from _shared import data_sets, pictures
import farhox


def load(dataset, data_dir, rng):
    """Training, validation and test data, each (images in [0, 1] as vectors, labels)."""
    num_train, num_validation, _ = SIZES[dataset]
    if dataset == "digits":
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        x = x / 16.0
    else:
        builder = data_sets.prepared(dataset, data_dir)
        parts = [builder.as_dataset(split=split, batch_size=-1)
                 for split in (f"train[:{num_train + num_validation}]", "test")]
        x = np.concatenate([part["image"].numpy().reshape(len(part["image"]), -1) / 255.0 for part in parts])
        y = np.concatenate([part["label"].numpy() for part in parts])
    ends = [num_train, num_train + num_validation]
    order = np.arange(len(x))
    rng.shuffle(order if dataset == "digits" else order[:ends[1]])  # Data sets of TFDS have a test set of their own.
    x, y = x[order].astype("float32"), y[order].astype("int64")
    return list(zip(np.split(x, ends), np.split(y, ends)))


def flip_labels(y, noise, rng):
    """Labels of which a fraction `noise` is replaced by another class, and a mask of these."""
    flipped = np.zeros(len(y), bool)
    flipped[rng.permutation(len(y))[:round(noise * len(y))]] = True
    return np.where(flipped, (y + rng.integers(1, NUM_CLASSES, len(y))) % NUM_CLASSES, y), flipped


def build_model(num_features, l2):
    regularizer = farhox.L1L2(l2=l2)
    return keras.Sequential([
        keras.Input([num_features]),
        keras.layers.Dense(256, activation="relu", kernel_regularizer=regularizer),
        keras.layers.Dense(NUM_CLASSES, activation="softmax", kernel_regularizer=regularizer)])


def learn(train, validation, hyper_iterations, inner_steps, batch_size, seed):
    """Learned learning rate, L2 strength and example weights, and the history of all."""
    learning_rate = farhox.Hyperparameter(DEFAULT_LEARNING_RATE, low=0.0, log=True, name="learning_rate")
    l2 = farhox.Hyperparameter(DEFAULT_L2, low=0.0, log=True, name="l2_strength")
    weights = farhox.ExampleWeights(len(train[0]), initial=INITIAL_WEIGHT)
    problem = farhox.supervised_problem(
        build_model(train[0].shape[1], l2), loss="sparse_categorical_crossentropy",
        dynamics=farhox.Momentum(learning_rate, MOMENTUM),
        outer_variables=[learning_rate, l2], example_weights=weights)
    # index=True: inner batches say which examples they hold, so that each finds its weight.
    data = farhox.bilevel_dataset(train, validation, inner_steps, batch_size=batch_size, index=True, seed=seed)
    optimizer = farhox.HyperOptimizer(problem, farhox.ReverseHG())
    optimizer.compile(optimizer=keras.optimizers.Adam(0.05), metrics=["accuracy"])
    history = optimizer.fit(data.take(1), epochs=hyper_iterations).history  # An epoch is one hyper-iteration.
    return float(learning_rate.numpy()), float(l2.numpy()), weights.numpy(), history


def test_accuracy(train, test, learning_rate, l2, weights, inner_steps, batch_size, seed):
    """Trains a new model with plain Keras, as many steps as an inner training has, and tests it."""
    keras.utils.set_random_seed(seed)
    model = build_model(train[0].shape[1], l2)
    model.compile(keras.optimizers.SGD(learning_rate, MOMENTUM), "sparse_categorical_crossentropy",
                  weighted_metrics=["accuracy"])
    examples = tf.data.Dataset.from_tensor_slices((*train, weights.astype("float32")))
    batches = examples.shuffle(len(weights), seed).repeat().batch(batch_size)
    model.fit(batches.take(inner_steps), shuffle=False, verbose=0)
    return float(model.evaluate(*test, verbose=0, return_dict=True)["accuracy"])


def find_flipped(weights, flipped):
    """Precision and recall of calling an example wrongly labelled if its weight has fallen."""
    found = weights < INITIAL_WEIGHT
    hits = int(np.sum(found & flipped))
    return hits / max(1, int(np.sum(found))), hits / max(1, int(np.sum(flipped)))


def plot(history, weights, flipped, output):
    """Two PNG files: what was learned per hyper-iteration, and the weights."""
    with pictures.figure(output / "hyper_iterations.png", columns=3, size=(8.7, 2.9)) as axes:
        curves = [("outer_loss", "Validation loss"), ("learning_rate", "Learning rate"),
                  ("l2_strength", "L2 strength")]
        for axis, (name, label) in zip(axes, curves):
            values = np.array(history[name])
            power = int(np.floor(np.log10(values.max())))
            unit = 10.0 ** power if power < -2 else 1.0  # Ticks with one digit, and the zeros once.
            axis.plot(np.arange(1, len(values) + 1), values / unit, color=pictures.BLUE, linewidth=2)
            axis.set(xlabel="Hyper-iteration", ylabel=label + (f", 1e{power}" if unit < 1.0 else ""), ylim=(0.0, None))
        pictures.whole_numbers(*axes)
    with pictures.figure(output / "example_weights.png", size=(5.2, 3.6)) as axis:
        farhox.plots.example_weights(weights, flipped, INITIAL_WEIGHT, axis)


def run(dataset, data_dir, hyper_iterations, inner_steps, noise, seed, output):
    """The whole experiment; returns what results.json holds."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    (x, y), validation, test = load(dataset, data_dir, rng)
    noisy, flipped = flip_labels(y, noise, rng)
    batch_size = SIZES[dataset][-1]

    learning_rate, l2, weights, history = learn(
        (x, noisy), validation, hyper_iterations, inner_steps, batch_size, seed)

    # All three train the same new initial weights for the same number of steps.
    plain = {"test": test, "inner_steps": inner_steps, "batch_size": batch_size, "seed": seed + 1}
    ones = np.ones(len(x))
    clean = (x[~flipped], noisy[~flipped])
    results = {
        "untuned": test_accuracy((x, noisy), learning_rate=DEFAULT_LEARNING_RATE, l2=DEFAULT_L2, weights=ones, **plain),
        "tuned": test_accuracy((x, noisy), learning_rate=learning_rate, l2=l2, weights=weights, **plain),
        # The better of both settings, so that the bound is not lowered by settings made for noisy data.
        "clean_only": max(test_accuracy(clean, learning_rate=rate, l2=strength, weights=ones[~flipped], **plain)
                          for rate, strength in ((DEFAULT_LEARNING_RATE, DEFAULT_L2), (learning_rate, l2))),
        "learning_rate": learning_rate, "l2_strength": l2, "dataset": dataset, "noise": noise, "seed": seed}
    results["precision"], results["recall"] = find_flipped(weights, flipped)

    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    plot(history, weights, flipped, output)
    (output / "results.json").write_text(json.dumps({**results, "history": history}, indent=1))
    return results


def table(results):
    rows = [("untuned, all examples alike", "untuned"), ("tuned, learned weights", "tuned"),
            ("clean examples only (upper bound)", "clean_only")]
    return "\n".join([
        f"\n{results['dataset']}, {results['noise']:.0%} of the training labels flipped",
        f"{'training':35}test accuracy",
        *(f"{label:35}{results[name]:13.1%}" for label, name in rows),
        f"\nLearned: learning rate {results['learning_rate']:.3g} (from {DEFAULT_LEARNING_RATE:g}), "
        f"L2 strength {results['l2_strength']:.2g} (from {DEFAULT_L2:g})",
        f"Flipped labels found (weight below {INITIAL_WEIGHT:g}): precision {results['precision']:.1%}, "
        f"recall {results['recall']:.1%}"])


def main(_):
    program.require(matplotlib="examples", sklearn="examples")
    settings = {name: flags.FLAGS[name].value for name in (
        "dataset", "data_dir", "hyper_iterations", "inner_steps", "noise", "seed", "output")}
    print(table(run(**settings)))
    print(f"Plots and results: {pathlib.Path(settings['output']).resolve()}")


if __name__ == "__main__":
    program.run(main)

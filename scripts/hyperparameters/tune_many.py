"""farhox.Tuner with more than twenty hyperparameters in one run, beside searches over all of them.

    python scripts/hyperparameters/tune_many.py --quick
    python scripts/hyperparameters/tune_many.py --num_seeds=3

A convolutional network has an L2 strength and a dropout rate for each layer, eight strengths of augmentation, the
smoothing of labels and the learning rate. From the values that it is compiled with:

- `layers`: one run of `farhox.Tuner(granularity="layer")`, which tunes all of them;
- `four`: the same run with four values that all layers share;
- `sweep`: the same run with nothing tuned but the rate;
- `annealed`: Keras' `fit` with the rate falling along a cosine over the last 30 % of the steps.

Random search, Optuna's Parzen estimator with median pruning and KerasTuner's Hyperband draw all the values of annealed
trainings, for the CPU seconds of the run with all of them, or `--budgets` times as many.

Every finished run is a file: the same command goes on, and `--report` makes the table and the picture of what there is.
"""

import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

DATA_SETS = ("fashion_mnist", "mnist", "digits")
TUNED = {"layers": "tuner, all", "four": "tuner, four values for all layers", "sweep": "tuner, the rate alone",
         "annealed": "start, annealed"}
SEARCHED = {"random": "random search", "tpe": "Parzen estimator", "hyperband": "Hyperband"}
SETTINGS = ("dataset", "epochs", "examples")  # What a run depends on.
QUICK = {"dataset": "digits", "epochs": 3, "examples": 400, "budgets": ["0.3"],
         "methods": ["layers", "four", "annealed", "random", "tpe"]}


def define_flags():
    experiment_flags.define_flags("results/tune_many")
    flags.DEFINE_enum("dataset", "fashion_mnist", DATA_SETS, "Data set of TFDS, or the digits of scikit-learn.")
    program.define_names("methods", [*TUNED, *SEARCHED], [*TUNED, *SEARCHED], "What is run.")
    flags.DEFINE_integer("epochs", 20, "Epochs of each training.", lower_bound=1)
    flags.DEFINE_integer("examples", 5000, "Training images; half as many to validate on.", lower_bound=100)
    flags.DEFINE_list("budgets", ["1"], "CPU seconds of the searches, in runs of the tuner with all hyperparameters.")
    flags.DEFINE_bool("report", False, "No new runs: the table and the picture of those that are there.")


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np

from _shared import data_sets, experiment, pictures, searches
import farhox

CLASSES = 10
WEIGHTED = ("conv_1", "conv_2", "conv_3", "dense_1", "dense_2", "outputs")
DROPPED = ("conv_1", "conv_2", "conv_3", "dense_1", "dense_2")
AUGMENTED = ("rotation", "translation_height", "translation_width", "zoom_height", "zoom_width", "contrast",
             "brightness", "noise")
FOUR = ["l2", "dropout_rate", "random_rotation_factor", "label_smoothing"]


class ManyTask:
    """The network with all its hyperparameters, as `_shared.searches` takes it.

    Args:
        size: Int, rows and columns of an image.
    """

    batch_size = 100

    def __init__(self, size):
        self.size = size

    def start(self):
        """What the model is compiled with before anything is tuned, by name."""
        return {"learning_rate": 1e-3, "label_smoothing": 0.05, **{f"l2_{name}": 1e-4 for name in WEIGHTED},
                **{f"dropout_{name}": 0.1 for name in DROPPED}, **dict.fromkeys(AUGMENTED, 0.05)}

    def ranges(self):
        """Name of each hyperparameter to its (low, high, log)."""
        return {"learning_rate": (1e-4, 0.03, True), "label_smoothing": (0.0, 0.3, False),
                **{f"l2_{name}": (1e-7, 1e-2, True) for name in WEIGHTED},
                **{f"dropout_{name}": (0.0, 0.6, False) for name in DROPPED},
                **dict.fromkeys(AUGMENTED, (0.0, 0.3, False))}

    def model(self, values, seed, steps=None, average=False):
        """The compiled model of values; with `steps`, its rate is annealed."""
        del average
        keras.utils.set_random_seed(seed)
        layers = keras.layers

        def weighted(name, **settings):
            return {"name": name, "kernel_regularizer": keras.regularizers.L2(values[f"l2_{name}"]), **settings}

        def dropout(name):
            return layers.Dropout(values[f"dropout_{name}"], name=f"dropout_{name}")

        images = {"fill_mode": "constant"}
        model = keras.Sequential([
            keras.Input([self.size, self.size, 1]),
            layers.RandomRotation(values["rotation"], name="rotation", **images),
            layers.RandomTranslation(values["translation_height"], values["translation_width"], name="translation",
                                     **images),
            layers.RandomZoom(values["zoom_height"], values["zoom_width"], name="zoom", **images),
            layers.RandomContrast(values["contrast"], value_range=(0, 1), name="contrast"),
            layers.RandomBrightness(values["brightness"], value_range=(0, 1), name="brightness"),
            layers.GaussianNoise(values["noise"], name="noise"),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", **weighted("conv_1")),
            dropout("conv_1"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", **weighted("conv_2")),
            dropout("conv_2"),
            layers.Conv2D(32, 2, activation="relu", **weighted("conv_3")), layers.Flatten(),
            dropout("conv_3"),
            layers.Dense(64, activation="relu", **weighted("dense_1")), dropout("dense_1"),
            layers.Dense(32, activation="relu", **weighted("dense_2")), dropout("dense_2"),
            layers.Dense(CLASSES, **weighted("outputs"))])
        rate = values["learning_rate"] if steps is None else searches.Cosine(values["learning_rate"], steps)
        model.compile(keras.optimizers.Adam(rate), keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=values["label_smoothing"]),
            steps_per_execution=searches.STEPS_PER_EXECUTION)
        return model


def load(settings, data_dir, seed):
    """Training, validation and test data with one-hot labels, images of half the rows and columns."""
    if settings["dataset"] == "digits":
        parts = data_sets.digits((settings["examples"], settings["examples"] // 2), seed)
    else:
        parts = data_sets.images(
            settings["dataset"], data_dir, (settings["examples"], settings["examples"] // 2), seed)
        parts = [(x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)), y) for x, y in parts]
    return [(x, keras.utils.to_categorical(y, CLASSES)) for x, y in parts]


def tuned(method, task, parts, epochs, seed):
    """One run of the tuner."""
    choice = {"layers": {"granularity": "layer"}, "four": {"tune": [*FOUR, "learning_rate"]},
              "sweep": {"tune": ["learning_rate"]}}[method]
    tuner = farhox.Tuner(task.model(task.start(), seed), seed=seed, **choice)
    history = tuner.fit(*parts[0], batch_size=task.batch_size, epochs=epochs, validation_data=parts[1], verbose=0)
    values = {name: value for name, value in tuner.get_hyperparameters().items() if value is not None}
    names = [name for name in values if name in history.history]
    return searches.result_of(min(history.history["val_loss"]), tuner.get_model(), parts[2], values=values,
                              notes=tuner.notes, val_loss=history.history["val_loss"],
                              paths={name: history.history[name] for name in names})


def run_seed(folder, settings, chosen, data_dir, seed):
    """All runs of one seed, by method; searches as "method, budget"."""
    parts = None if chosen["report"] else load(settings, data_dir, seed)
    task = ManyTask(8 if settings["dataset"] == "digits" else 14)
    epochs, runs = settings["epochs"], {}

    def once(label, name, function):
        found = folder.done(name) if chosen["report"] else folder.once(name, function)
        if found is not None:
            runs[label] = found

    for method in [method for method in TUNED if method in chosen["methods"]]:
        def train(_, method=method):
            keras.backend.clear_session()
            if method == "annealed":
                return searches.result_of(*searches.train(task, parts, epochs, task.start(), seed), parts[2])
            return tuned(method, task, parts, epochs, seed)

        once(method, f"seed{seed}_{method}", train)
    for budget in chosen["budgets"] if "layers" in runs else ():
        for method in [method for method in SEARCHED if method in chosen["methods"]]:
            def search(path, method=method, seconds=float(budget) * runs["layers"]["cpu_seconds"]):
                return searches.search(method, task, parts, epochs, seed, seconds, path)

            once(f"{method}, {budget}", f"seed{seed}_{method}_{budget}", search)
    return runs


def best_of(label, runs):
    """What a method gives: its run, or the run that a search chooses within its CPU seconds, or None."""
    if "," not in label:
        return runs[label]
    trials = searches.with_seconds(runs[label]["trials"])
    return searches.best_within(trials, float(label.split(", ")[1]) * runs["layers"]["cpu_seconds"])


def named(label):
    """The name of a method for people."""
    method, _, budget = label.partition(", ")
    return TUNED.get(method) or f"{SEARCHED[method]}, {budget} x"


def by_method(by_seed):
    """Runs of all seeds that have a method, by its label: list of (what it gives or None, the run)."""
    labels = dict.fromkeys(label for runs in by_seed.values() for label in runs)
    return {label: [(best_of(label, runs), runs[label]) for runs in by_seed.values() if label in runs]
            for label in labels}


def table(by_seed):
    rows = []
    for label, found in by_method(by_seed).items():
        losses = [math.inf if run is None or run["test_loss"] is None else run["test_loss"] for run, _ in found]
        accuracy = [0.0 if run is None else 100 * (run["test_accuracy"] or 0.0) for run, _ in found]
        rows.append([named(label), len(found), experiment.mean_and_range(losses, "{:.3f}"),
                     experiment.mean_and_range(accuracy, "{:.1f}"),
                     experiment.mean_and_range([len(run.get("trials", [0])) for _, run in found], "{:.0f}"),
                     experiment.mean_and_range([run["cpu_seconds"] for _, run in found], "{:.0f}")])
    rows = [[str(entry) for entry in row] for row in rows]
    return experiment.markdown_table(
        ["method", "seeds", "test loss", "test accuracy, %", "trainings", "CPU seconds"], rows)


def plot(by_seed, path):
    """Test losses of all methods, and the strengths of augmentation along the training of the first seed."""
    with pictures.figure(path, columns=2, size=(10.0, 4.8)) as (losses, paths):
        methods = dict(reversed(by_method(by_seed).items()))
        for place, found in enumerate(methods.values()):
            values = [run["test_loss"] for run, _ in found if run is not None and run["test_loss"] is not None]
            losses.plot(values, [place] * len(values), "o", color=pictures.BLUE)
        losses.set(xlabel="Test loss", yticks=range(len(methods)), yticklabels=[named(label) for label in methods])
        first = next(iter(by_seed.values()))
        if "layers" in first:
            drawn = {name: values for name, values in first["layers"]["paths"].items()
                     if name.split(".")[0] in ("rotation", "translation", "zoom", "contrast", "brightness", "noise")}
            styles = pictures.line_styles(drawn)
            for name, values in drawn.items():
                paths.plot(np.arange(1, len(values) + 1), values, linewidth=1.2, label=name, **styles[name])
            paths.set(xlabel="Epoch", title="Strengths of augmentation, first seed")
            pictures.logarithmic(paths)
            paths.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)


def main(_):
    program.require(matplotlib="examples", optuna="search")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    chosen = experiment_flags.settings(("methods", "budgets", "report"), QUICK)
    if "hyperband" in chosen["methods"]:
        program.require(keras_tuner="search", tensorboard="search")
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    by_seed = {seed: run_seed(folder, settings, chosen, flags.FLAGS.data_dir, seed)
               for seed in experiment_flags.seeds()}
    by_seed = {seed: runs for seed, runs in by_seed.items() if runs}
    if not by_seed:
        raise SystemExit(f"{folder.runs} holds no finished runs.")
    print(f"\n{settings['dataset']}, {len(by_seed)} seed(s): mean (least to greatest)\n{table(by_seed)}\n"
          f"Results and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": by_seed}))
    plot(by_seed, output / "tune_many.png")


if __name__ == "__main__":
    program.run(main)

"""farhox.Tuner from random starts, beside the same trainings untuned, annealed, averaged, and beside searches.

    python scripts/hyperparameters/tune_model.py --quick
    python scripts/hyperparameters/tune_model.py --tasks=mlp_sgd --starts=20

Each task draws starts: a learning rate, a momentum or beta_1, an L2 strength or weight decay, a dropout rate. From each
one, with initial weights of its own:

- `tuner`: one run of `farhox.Tuner`.
- `untuned`: Keras' `fit` with the values of the start; `annealed`: the same with the rate falling along a cosine over
  the last 30 % of the steps; `averaged`: the same as untuned with an average of the weights.

`random` is the best of the first annealed runs by validation loss, as many as have the CPU seconds of one tuned run, or
of ten; further starts are run where those of the table are too few. `tpe` is Optuna's Parzen estimator with median
pruning, `hyperband` that of KerasTuner, both on annealed trainings and with the same CPU seconds.

Every finished run is a file: the same command goes on, with more starts, tasks or methods too, and `--report` makes the
table and the picture of what there is.
"""

import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

TASK_NAMES = ("mlp_sgd", "mlp_adamw", "cnn", "text", "digits")
METHODS = {"tuner": "Tuner", "untuned": "Untuned", "annealed": "Untuned, annealed",
           "averaged": "Untuned, averaged weights", "random": "Random search, annealed",
           "tpe": "Parzen estimator, annealed", "hyperband": "Hyperband, annealed"}
SEARCHES = ("random", "tpe", "hyperband")
AVERAGE = 0.99
SETTINGS = ("share", "examples")  # What a run depends on.
QUICK = {"tasks": ["digits"], "starts": 2, "budget": 0.5}
RATES = {"sgd": (1e-4, 1.0), "adamw": (1e-5, 0.1)}
WINDOW = 40


def define_flags():
    experiment_flags.define_flags("results/tune_model")
    program.define_names("tasks", [name for name in TASK_NAMES if name != "digits"], TASK_NAMES, "Tasks.")
    program.define_names("methods", list(METHODS), METHODS, "What is run.")
    flags.DEFINE_integer("starts", 20, "Random starts of each task.", lower_bound=1)
    flags.DEFINE_float("share", 1.0, "Share of the epochs of each task.", lower_bound=0.01, upper_bound=1.0)
    flags.DEFINE_integer("examples", 10_000, "Training images, or windows of text.", lower_bound=100)
    flags.DEFINE_float("budget", 10.0, "CPU seconds of a search, in tuned runs.", lower_bound=0.1)
    flags.DEFINE_bool("report", False, "No new runs: the table and the picture of those that are there.")


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np

from _shared import data_sets, experiment, pictures, searches
from _shared.searches import best_within, result_of
import farhox


class Task:
    """A network and its data; `draw` gives starts.

    Args:
        optimizer: "sgd" or "adamw".
        data: Function (folder of TFDS' data sets, training examples, seed) -> training, validation and test data.
        layers: Function (L2 strength, dropout rate) -> list of Keras layers, the input first.
        batch_size, epochs: Ints.
        dropout: Bool, whether the network has a dropout rate to draw.
    """

    def __init__(self, optimizer, data, layers, batch_size, epochs, dropout=False):
        self.optimizer, self.data, self.layers = optimizer, data, layers
        self.batch_size, self.epochs, self.dropout = batch_size, epochs, dropout

    def ranges(self):
        """Name of each hyperparameter to its (low, high, log)."""
        sgd = self.optimizer == "sgd"
        return {"learning_rate": (*RATES[self.optimizer], True), "momentum" if sgd else "beta_1": (0.05, 0.98, False),
                **({"l2": (3e-7, 0.03, True)} if sgd else {"weight_decay": (3e-5, 3.0, True)}),
                **({"dropout": (0.02, 0.8, False)} if self.dropout else {})}

    def draw(self, index):
        """The start of this number, a dictionary."""
        random = np.random.default_rng([7, index])
        return {name: float(np.exp(random.uniform(math.log(low), math.log(high))) if log else random.uniform(low, high))
                for name, (low, high, log) in self.ranges().items()}

    def model(self, values, seed, steps=None, average=False):
        """The compiled model of a start; with `steps`, its rate is annealed."""
        keras.utils.set_random_seed(seed)
        model = keras.Sequential(self.layers(values.get("l2", 0.0), values.get("dropout", 0.0)))
        rate = values["learning_rate"] if steps is None else searches.Cosine(values["learning_rate"], steps)
        extra = {"use_ema": True, "ema_momentum": AVERAGE} if average else {}
        if self.optimizer == "sgd":
            optimizer = keras.optimizers.SGD(rate, momentum=values["momentum"], **extra)
        else:
            optimizer = keras.optimizers.AdamW(
                rate, beta_1=values["beta_1"], weight_decay=values["weight_decay"], **extra)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                      steps_per_execution=searches.STEPS_PER_EXECUTION)
        return model


def tuned(task, parts, epochs, values, seed):
    """One run of the tuner, and what it says."""
    tuner = farhox.Tuner(task.model(values, seed), seed=seed)
    history = tuner.fit(*parts[0], batch_size=task.batch_size, epochs=epochs, validation_data=parts[1], verbose=0)
    return min(history.history["val_loss"]), tuner.get_model(), tuner


def run_task(name, folder, chosen, data_dir, seed):
    """All runs of a task: by method, a list over starts, and the searches.

    Args:
        chosen: Dictionary of `methods`, `starts`, `budget`, `report`, and the settings of the folder.
    """
    task, runs = TASKS[name], {}
    parts = None if chosen["report"] else task.data(data_dir, chosen["examples"], seed)
    epochs = max(1, round(chosen["share"] * task.epochs))

    def once(label, function):
        return folder.done(label) if chosen["report"] else folder.once(label, function)

    def from_start(method, index):
        def run(path):
            del path
            keras.backend.clear_session()
            values = task.draw(index)
            if method == "tuner":
                loss, model, tuner = tuned(task, parts, epochs, values, index)
                return result_of(loss, model, parts[2], start=values, notes=tuner.notes, values={
                    key: value for key, value in tuner.get_hyperparameters().items() if value is not None})
            found = searches.train(task, parts, epochs, values, index, annealed=method == "annealed",
                                   average=method == "averaged")
            return result_of(*found, parts[2], start=values)

        return once(f"{name}_seed{seed}_{method}_{index}", run)

    for index in range(chosen["starts"]):
        for method in [method for method in METHODS if method in chosen["methods"] and method not in SEARCHES]:
            found = from_start(method, index)
            if found is not None:
                runs.setdefault(method, []).append(found)
    if "tuner" in runs:
        budget = chosen["budget"] * float(np.mean([run["cpu_seconds"] for run in runs["tuner"]]))
        if "random" in chosen["methods"] and "annealed" in runs:
            runs["random"] = list(runs["annealed"])
            while sum(run["cpu_seconds"] for run in runs["random"]) < budget:
                found = from_start("annealed", len(runs["random"]))
                if found is None:
                    break
                runs["random"].append(found)
        for method in [method for method in SEARCHES[1:] if method in chosen["methods"]]:
            def search(path, method=method):
                return searches.search(method, task, parts, epochs, seed, budget, path)

            found = once(f"{name}_seed{seed}_{method}", search)
            if found is not None:
                runs[method] = found
    return runs


def found_by_searches(runs):
    """Test losses of the searches with the CPU seconds of one tuned run and of ten, where they have spent them."""
    if "tuner" not in runs:
        return {}
    one = float(np.mean([run["cpu_seconds"] for run in runs["tuner"]]))
    pool = runs.get("random", runs.get("annealed"))
    pools = {} if pool is None else {"random": pool}
    pools.update({method: searches.with_seconds(runs[method]["trials"]) for method in SEARCHES[1:] if method in runs})
    found = {f"{name}, {times} x": best_within(pool, times * one) for times in (1, 10) for name, pool in pools.items()
             if sum(run["cpu_seconds"] for run in pool) >= times * one}
    return {name: None if run is None else run["test_loss"] for name, run in found.items()}


def table(tasks):
    rows = []
    for name, runs in tasks.items():
        for method, label in METHODS.items():
            if method in SEARCHES or method not in runs:
                continue
            losses = np.array([math.inf if run["test_loss"] is None else run["test_loss"] for run in runs[method]])
            accuracy = np.median([run["test_accuracy"] or 0.0 for run in runs[method]])
            seconds = np.mean([run["cpu_seconds"] for run in runs[method]])
            rows.append([name, label, *(f"{value:.3f}" for value in (losses.min(), np.median(losses), losses.max())),
                         f"{100 * accuracy:.1f}", f"{seconds:.0f}"])
        for label, loss in found_by_searches(runs).items():
            rows.append([name, f"search: {label}", "-" if loss is None else f"{loss:.3f}", "", "", "", ""])
    return experiment.markdown_table(
        ["task", "method", "best test loss", "median", "worst", "median accuracy, %", "CPU seconds of a run"], rows)


def plot(tasks, path):
    """Test losses of all starts, method beside method."""
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    with pictures.figure(path, rows, columns, size=(max(4.2, 3.4 * columns), 4.6 * rows)) as axes:
        for axis in np.ravel(axes)[len(tasks):]:
            axis.set_axis_off()
        for axis, (name, runs) in zip(np.ravel(axes), tasks.items()):
            shown = [method for method in METHODS if method in runs and method not in SEARCHES]
            for place, method in enumerate(shown):
                losses = [run["test_loss"] for run in runs[method] if run["test_loss"] is not None]
                offsets = np.linspace(-0.2, 0.2, max(1, len(losses)))
                axis.scatter(place + offsets[:len(losses)], sorted(losses), s=14,
                             **pictures.point_styles(shown)[method])
            found = {label: loss for label, loss in found_by_searches(runs).items() if loss is not None}
            styles = pictures.line_styles(["", *found])
            for label, loss in found.items():
                axis.axhline(loss, linewidth=1, label=label.replace(" x", " x the CPU seconds"), **styles[label])
            axis.set(title=name, ylabel="Test loss", xticks=range(len(shown)))
            pictures.logarithmic(axis)
            axis.set_xticklabels([METHODS[method].replace(", ", ",\n").replace("averaged ", "averaged\n")
                                  for method in shown], fontsize=8)
            if found:
                pictures.legend_below(axis)


def fashion(data_dir, examples, seed):
    return data_sets.images("fashion_mnist", data_dir, (examples, examples // 2), seed)


def digits(data_dir, examples, seed):
    del data_dir, examples
    return data_sets.digits((600, 400), seed)


def shakespeare(data_dir, examples, seed):
    texts = data_sets.read_texts("characters", None, data_dir)
    numbers, _ = data_sets.encode(texts, 80)
    del seed
    return [data_sets.windows(text, WINDOW, count) for text, count in zip(numbers, (examples, 1000, 1000))]


def mlp(units, shape):
    def layers(l2, dropout):
        del dropout
        penalty = {"kernel_regularizer": keras.regularizers.L2(l2)} if l2 else {}
        return [keras.Input(shape), keras.layers.Flatten(), *(
            keras.layers.Dense(count, activation="relu", **penalty) for count in units),
            keras.layers.Dense(10, **penalty)]
    return layers


def cnn(l2, dropout):
    del l2
    return [keras.Input([28, 28, 1]), keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.LayerNormalization(), keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
            keras.layers.LayerNormalization(), keras.layers.Flatten(), keras.layers.Dropout(dropout),
            keras.layers.Dense(64, activation="relu"), keras.layers.Dropout(dropout), keras.layers.Dense(10)]


def text(l2, dropout):
    del l2
    return [keras.Input([WINDOW], dtype="int32"), keras.layers.Embedding(80, 32),
            keras.layers.GRU(96, return_sequences=True), keras.layers.Dropout(dropout), keras.layers.Dense(80)]


TASKS = {
    "mlp_sgd": Task("sgd", fashion, mlp((128, 128), [28, 28, 1]), 100, 20),
    "mlp_adamw": Task("adamw", fashion, mlp((128, 128), [28, 28, 1]), 100, 15),
    "cnn": Task("adamw", fashion, cnn, 100, 12, dropout=True),
    "text": Task("adamw", shakespeare, text, 50, 12, dropout=True),
    "digits": Task("sgd", digits, mlp((32,), [8, 8, 1]), 30, 5),
}


def main(_):
    program.require(matplotlib="examples", optuna="search")
    if "hyperband" in flags.FLAGS.methods:
        program.require(keras_tuner="search", tensorboard="search")
    settings = experiment_flags.settings(SETTINGS, {})
    chosen = {**settings, **experiment_flags.settings(("tasks", "methods", "starts", "budget", "report"), QUICK)}
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    tasks = {}
    for seed in experiment_flags.seeds():
        for name in chosen["tasks"]:
            label = name if len(experiment_flags.seeds()) == 1 else f"{name}, seed {seed}"
            runs = run_task(name, folder, chosen, flags.FLAGS.data_dir, seed)
            if runs:
                tasks[label] = runs
    if not tasks:
        raise SystemExit(f"{folder.runs} holds no finished runs of these tasks.")
    print(f"\n{table(tasks)}\nResults and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({
        "settings": settings, "tasks": tasks,
        "searches": {name: found_by_searches(runs) for name, runs in tasks.items()}}))
    plot(tasks, output / "tune_model.png")


if __name__ == "__main__":
    program.run(main)

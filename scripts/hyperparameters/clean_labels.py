r"""Data hyper-cleaning: finds wrong training labels by learning one weight per example within a budget.

Half of the training labels are replaced by wrong ones; the validation labels are right. The weights of the training
examples are outer variables in {0 <= w <= 1, sum(w) <= budget}, and hypergradients through the training say which ones
help the validation loss. An example counts as discarded if its weight falls below 0.001. With --tune_training the
learning rate and the weight decay of the training are learned beside the weights, with --online all of them are learned
along one training, which does not begin anew after an update.

    python scripts/hyperparameters/clean_labels.py --quick
    python scripts/hyperparameters/clean_labels.py --num_seeds=3
    python scripts/hyperparameters/clean_labels.py \
        --flagfile=scripts/hyperparameters/flags/clean_labels_paper.cfg
    python scripts/hyperparameters/clean_labels.py \
        --flagfile=scripts/hyperparameters/flags/clean_labels_online.cfg

Afterwards a new model is trained on training and validation examples together: with the learned weights, with the right
labels only (oracle), with all labels alike (baseline), and without the training examples (validation alone). What is
learned of the training holds for all of them.

Reference: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization, 2017, section 5.1.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

NUM_CLASSES = 10
DISCARDED_BELOW = 1e-3
LAST = 10  # Test accuracies along a training are means of so many tests at its end.
OF_LOGARITHMS = 0.03  # Rate of Adam on the logarithms of the learning rate and the weight decay.
SETTINGS = ("dataset", "model", "train_examples", "validation_examples", "budgets", "noise", "inner_steps",
            "batch_size", "hyper_iterations", "learning_rate", "momentum", "weight_decay", "online", "tune_training",
            "outer_learning_rate", "truncation", "retrain_steps")
QUICK = {"budgets": ["1500"], "inner_steps": 50, "hyper_iterations": 30, "outer_learning_rate": 0.04,
         "retrain_steps": 100}


def define_flags():
    experiment_flags.define_flags("results/clean_labels")
    flags.DEFINE_enum("dataset", "mnist", ["mnist", "fashion_mnist"], "Data set of TFDS.")
    flags.DEFINE_enum("model", "softmax", ["softmax", "mlp", "cnn"],
                      "Softmax regression, 64 hidden units or two convolutions.")
    flags.DEFINE_integer("train_examples", 5000, "Training examples.", lower_bound=1)
    flags.DEFINE_integer("validation_examples", 5000, "Validation examples, with right labels.", lower_bound=1)
    flags.DEFINE_list("budgets", ["1000", "1500", "2000", "2500"], "Largest sums of the weights.")
    flags.DEFINE_float("noise", 0.5, "Fraction of training labels that are made wrong.", 0.0, 0.9)
    flags.DEFINE_integer("inner_steps", 100, "Training steps in each hyper-iteration.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "Examples in an inner batch. Default: all.", lower_bound=1)
    flags.DEFINE_integer("hyper_iterations", 100, "Updates of the weights.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.1, "Inner learning rate, divided by the mean weight budget / examples.")
    flags.DEFINE_float("momentum", 0.9, "Inner momentum.", 0.0, 1.0)
    flags.DEFINE_float("weight_decay", 0.0, "Inner weight decay, as a factor of the rate.", lower_bound=0.0)
    flags.DEFINE_bool("online", False, "One training goes on, with an update after each --inner_steps.")
    flags.DEFINE_bool("tune_training", False, "Learn the rate and the weight decay too, which must not be 0.")
    flags.DEFINE_float("outer_learning_rate", 0.02, "Learning rate of Adam on the weights.")
    flags.DEFINE_integer("truncation", None, "Differentiate only this many of the last inner steps.", lower_bound=1)
    flags.DEFINE_integer("retrain_steps", 200, "Steps of the training whose test accuracy is reported.", lower_bound=1)


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import data_sets, experiment, pictures, searches
import farhox

ALONG = {"test_accuracy": "learned weights", "oracle": "right labels alone", "baseline": "all labels, no weights"}
PASS = "Pass through the training examples"
LEARNED = {"learning_rate": "learning rate", "weight_decay": "weight decay"}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def flip_labels(y, noise, rng):
    """Labels of which a fraction `noise` is replaced by another class, and a mask of these."""
    flipped = np.zeros(len(y), bool)
    flipped[rng.permutation(len(y))[:round(noise * len(y))]] = True
    return np.where(flipped, (y + rng.integers(1, NUM_CLASSES, len(y))) % NUM_CLASSES, y), flipped


def build_model(kind):
    if kind == "softmax":
        layers = [keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES, kernel_initializer="zeros")]
    elif kind == "mlp":
        layers = [keras.layers.Flatten(), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(NUM_CLASSES)]
    else:
        layers = [keras.layers.Conv2D(8, 5, strides=2, activation="relu"),
                  keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
                  keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)]
    return keras.Sequential([keras.Input([28, 28, 1]), *layers])


def find_flipped(weights, flipped):
    """Precision, recall and F1 of calling an example wrongly labelled if its weight is next to zero."""
    found = weights < DISCARDED_BELOW
    hits = float(np.sum(found & flipped))
    precision, recall = hits / max(1, np.sum(found)), hits / max(1, np.sum(flipped))
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-12, precision + recall)}


def test_accuracy(data, weights, settings, seed, training=None):
    """Trains a new model with plain Keras on training and validation examples, and tests it.

    Args:
        weights: Array, a weight per training example.
        training: Dictionary of the learned "learning_rate" and "weight_decay", or None: those of the settings.
    """
    (x, y), (x_validation, y_validation), test = data
    examples = np.concatenate([x, x_validation]), np.concatenate([y, y_validation]), np.concatenate(
        [weights, np.ones(len(x_validation))]).astype("float32")
    steps = settings["retrain_steps"]
    # A training of its own length: where the rate was learned for another one, it ends in a cosine.
    model = compiled_model(settings, seed, float(np.mean(examples[2])), training or settings,
                           steps if settings["online"] else None)
    model.fit(batches_of(examples, settings, seed).take(steps), shuffle=False, verbose=0)
    return tested(model, test)


def along(data, chosen, settings, seed, training):
    """Test accuracies along a training of the same steps as those of `--online`, on the chosen training examples."""
    (x, y), _, test = data
    model, accuracies = compiled_model(settings, seed, 1.0, training), []
    rounds = rounds_of(settings)
    model.fit(batches_of((x[chosen], y[chosen]), settings, seed), shuffle=False, verbose=0,
              epochs=settings["hyper_iterations"] // rounds, steps_per_epoch=rounds * settings["inner_steps"],
              callbacks=[keras.callbacks.LambdaCallback(
                  on_epoch_end=lambda epoch, logs: accuracies.append(tested(model, test)))])
    return accuracies


def rounds_of(settings):
    """Hyper-iterations between two tests: online as many as go once through the training examples, otherwise one."""
    if not settings["online"] or settings["batch_size"] is None:
        return 1
    return max(1, settings["train_examples"] // (settings["batch_size"] * settings["inner_steps"]))


def compiled_model(settings, seed, mean_weight, training, annealed_steps=None):
    """A new model whose optimizer has the rate and decay of `training`.

    The loss is the mean of weight times loss, so the rate is divided by the mean weight, as in the inner problem. Keras
    multiplies the decay by the rate: what it does in a step stays the same.
    """
    keras.utils.set_random_seed(seed)
    model = build_model(settings["model"])
    rate, decay = training["learning_rate"] / mean_weight, training["weight_decay"] * mean_weight
    rate = rate if annealed_steps is None else searches.Cosine(rate, annealed_steps)
    model.compile(keras.optimizers.SGD(rate, settings["momentum"], weight_decay=decay or None), LOSS,
                  weighted_metrics=["accuracy"])
    return model


def batches_of(examples, settings, seed):
    """Batches without end, or all examples as one."""
    if settings["batch_size"] is None:
        return tf.data.Dataset.from_tensors(examples).repeat()
    return tf.data.Dataset.from_tensor_slices(examples).shuffle(len(examples[0]), seed).repeat().batch(
        settings["batch_size"])


def tested(model, test):
    """The accuracy of a model on the test set; online of the model as it is trained so far."""
    predictions = model.predict(test[0], batch_size=1000, verbose=0)
    return float(np.mean(np.argmax(predictions, -1) == test[1]))


def inner_training(settings, mean_weight):
    """The dynamics, and a dictionary of the hyperparameters of it that are learned.

    The loss is the mean of weight times loss: the rate is divided by the mean weight, the decay multiplied by it.
    """
    rate, momentum = settings["learning_rate"] / mean_weight, settings["momentum"]
    decay = settings["weight_decay"] * mean_weight
    if settings["tune_training"]:
        learned = {"learning_rate": farhox.Hyperparameter(rate, low=0.0, log=True, name="learning_rate"),
                   "weight_decay": farhox.Hyperparameter(decay, low=0.0, log=True, name="weight_decay")}
        return farhox.KerasDynamics(keras.optimizers.SGD(momentum=momentum, weight_decay=decay), **learned), learned
    if decay > 0:
        return farhox.KerasDynamics(keras.optimizers.SGD(rate, momentum, weight_decay=decay)), {}
    return farhox.Momentum(rate, momentum) if momentum > 0 else farhox.GradientDescent(rate), {}


def learn_weights(data, flipped, budget, settings, seed, folder):
    """Learned example weights, the learned rate and decay or None, and the history of learning them."""
    (x, y), validation, test = data
    keras.utils.set_random_seed(seed)
    weights = farhox.ExampleWeights(len(x), budget=budget)
    mean_weight = budget / len(x)
    dynamics, learned = inner_training(settings, mean_weight)
    problem = farhox.supervised_problem(
        build_model(settings["model"]), loss=LOSS, example_weights=weights, dynamics=dynamics,
        outer_variables=list(learned.values()))
    batches = farhox.bilevel_dataset(
        (x, y), validation, settings["inner_steps"], batch_size=settings["batch_size"], index=True, seed=seed)
    if not settings["online"]:
        batches = batches.take(1)  # The same training again and again.
    optimizer = farhox.HyperOptimizer(
        problem, farhox.ReverseHG(truncation=settings["truncation"]), online=settings["online"])
    outer = keras.optimizers.Adam(settings["outer_learning_rate"])
    if learned:
        outer = farhox.training.OptimizerGroups(outer, [(keras.optimizers.Adam(OF_LOGARITHMS), list(learned.values()))])
    optimizer.compile(outer, metrics=["accuracy"])

    def observe():
        values = {name: float(entry.numpy()) for name, entry in learned.items()}
        if settings["online"]:
            values["test_accuracy"] = tested(optimizer, test)
        return {**find_flipped(weights.numpy(), flipped), **values}

    rounds = rounds_of(settings)
    history = experiment.fit_resumable(
        optimizer, batches, settings["hyper_iterations"] // rounds * rounds, folder, observe=observe,
        steps_per_epoch=rounds)
    training = {"learning_rate": history["learning_rate"][-1] * mean_weight,
                "weight_decay": history["weight_decay"][-1] / mean_weight} if learned else None
    return weights.numpy(), training, history


def run_budget(data, flipped, budget, settings, seed, folder):
    weights, training, history = learn_weights(data, flipped, budget, settings, seed, folder)
    result = {"test_accuracy": test_accuracy(data, weights, settings, seed, training), **find_flipped(weights, flipped)}
    if training is not None:
        result.update(training=training, oracle_accuracy=test_accuracy(data, ~flipped, settings, seed, training))
    if settings["online"]:
        history["oracle"] = along(data, ~flipped, settings, seed, training or settings)
        history["baseline"] = along(data, np.ones(len(weights), bool), settings, seed, training or settings)
    return {
        **result, "sum": float(np.sum(weights)), "weights": np.round(weights, 4).tolist(),
        "flipped": flipped.astype(int).tolist(), "time_before": history.pop("time_before"),
        "history": {name: history[name] for name in (
            "outer_loss", "inner_loss", "accuracy", "f1", "test_accuracy", "oracle", "baseline", "learning_rate",
            "weight_decay") if name in history}}


def run_seed(folder, settings, data_dir, seed):
    """All runs of one seed: dictionary of oracle, baseline and each budget."""
    sizes = settings["train_examples"], settings["validation_examples"]
    train, validation, test = data_sets.images(settings["dataset"], data_dir, sizes, seed)
    noisy, flipped = flip_labels(train[1], settings["noise"], np.random.default_rng(seed))
    data = (train[0], noisy), validation, test
    results = {}
    all_alike = np.ones(len(noisy))
    for name, weights in (("oracle", ~flipped), ("baseline", all_alike), ("validation alone", 0 * all_alike)):
        results[name] = folder.once(f"seed{seed}_{name.replace(' ', '_')}", lambda _: {
            "test_accuracy": test_accuracy(data, weights, settings, seed)})
    for budget in settings["budgets"]:
        results[f"budget {budget}"] = folder.once(
            f"seed{seed}_budget{budget}",
            lambda path: run_budget(data, flipped, float(budget), settings, seed, path))
    return results


def best_budget(by_seed):
    """The budget with the highest validation accuracy, mean over seeds: no test label takes part."""
    budgets = [name for name in next(iter(by_seed.values())) if name.startswith("budget")]
    return max(budgets, key=lambda name: np.mean([run[name]["history"]["accuracy"][-1] for run in by_seed.values()]))


def table(by_seed):
    rows = []
    for name, run in next(iter(by_seed.values())).items():
        runs = [runs[name] for runs in by_seed.values()]
        row = [name, experiment.mean_and_range([100 * run["test_accuracy"] for run in runs])]
        for key, form in (("precision", "{:.3f}"), ("recall", "{:.3f}"), ("f1", "{:.3f}"), ("seconds", "{:.0f}")):
            row.append(experiment.mean_and_range([run[key] for run in runs], form) if key in runs[0] else "")
        rows.append(row)
        if "oracle_accuracy" in run:
            rows.append([f"oracle, training of {name}", experiment.mean_and_range(
                [100 * run["oracle_accuracy"] for run in runs]), "", "", "", ""])
        for key, label in ALONG.items() if "oracle" in run.get("history", {}) else ():
            last = [100 * float(np.mean(run["history"][key][-LAST:])) for run in runs]
            rows.append([f"along {name}: {label}", experiment.mean_and_range(last), "", "", "", ""])
    return experiment.markdown_table(["", "test accuracy, %", "precision", "recall", "F1", "seconds"], rows)


def plot(by_seed, best, path):
    """Accuracy and F1 by budget, or along the one training; of the first seed F1 while learning, and weights."""
    seeds, first = list(by_seed), next(iter(by_seed.values()))
    names = [name for name in first if name.startswith("budget")]
    with pictures.figure(path, rows=2, columns=2, size=(7.8, 6.6)) as (accuracy, second, progress, histogram):
        if "oracle" in first[best]["history"]:
            plot_along([by_seed[seed][best]["history"] for seed in seeds], accuracy, second)
        else:
            plot_budgets(by_seed, names, accuracy, second)
        styles = pictures.line_styles(names)
        for name in (name for name in names if "history" in first[name]):
            values = first[name]["history"]["f1"]
            progress.plot(np.arange(1, len(values) + 1), values, label=name, **styles[name])
        progress.set(title=f"F1 while learning, seed {seeds[0]}",
                     xlabel=PASS if "oracle" in first[best]["history"] else "Hyper-iteration",
                     ylabel="F1 of the discarded", ylim=(0, 1))
        pictures.whole_numbers(progress)
        pictures.legend_below(progress, columns=2)
        weights, flipped = np.array(first[best]["weights"]), np.array(first[best]["flipped"], bool)
        farhox.plots.example_weights(weights, flipped, axes=histogram)
        histogram.set_title(f"Learned weights, {best}, seed {seeds[0]}")


def plot_budgets(by_seed, names, accuracy, f1):
    """Accuracy and F1 by budget, mean and range over seeds."""
    budgets = [int(float(name.split()[1])) for name in names]
    for name, label, color, dashes in (("oracle", "right labels alone", pictures.GREEN, "--"),
                                       ("baseline", "all labels, no weights", pictures.BLACK, ":")):
        mean = np.mean([100 * runs[name]["test_accuracy"] for runs in by_seed.values()])
        accuracy.axhline(mean, color=color, linestyle=dashes, label=label)
    for axis, key, scale in ((accuracy, "test_accuracy", 100), (f1, "f1", 1)):
        values = scale * np.array([[runs[name][key] for name in names] for runs in by_seed.values()])
        axis.errorbar(budgets, values.mean(0), [values.mean(0) - values.min(0), values.max(0) - values.mean(0)],
                      color=pictures.BLUE, marker="o", capsize=3, label="learned weights")
        axis.set(xlabel="Budget, sum of the weights", xticks=budgets)
    accuracy.set(title="Test accuracy", ylabel="Test accuracy, %")
    pictures.legend_below(accuracy)
    f1.set(title="Wrong labels found", ylabel="F1 of the discarded")


def plot_along(histories, accuracy, training):
    """Test accuracy along the one training, mean and range over seeds; what was learned of the training."""
    styles = pictures.line_styles(ALONG)
    for key, label in ALONG.items():
        values = 100 * np.array([history[key] for history in histories])
        steps = np.arange(1, values.shape[1] + 1)
        accuracy.plot(steps, values.mean(0), label=label, **styles[key])
        accuracy.fill_between(steps, values.min(0), values.max(0), color=styles[key]["color"], alpha=0.12, linewidth=0)
    accuracy.set(title="Test accuracy along one training", xlabel=PASS, ylabel="Test accuracy, %")
    styles = pictures.line_styles(LEARNED)
    for key, label in LEARNED.items():
        for number, history in enumerate(history for history in histories if key in history):
            values = np.array(history[key])
            training.plot(np.arange(1, len(values) + 1), values / values[0], label=None if number else label,
                          linewidth=1.2, **styles[key])
    training.set(title="Learned beside the weights", xlabel=PASS, ylabel="Times the first value")
    for axis in (accuracy, training):
        pictures.whole_numbers(axis)
        pictures.legend_below(axis)


def main(_):
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    by_seed = {seed: run_seed(folder, settings, flags.FLAGS.data_dir, seed) for seed in experiment_flags.seeds()}
    best = best_budget(by_seed)
    print(f"\n{settings['dataset']}, {settings['model']}: {settings['noise']:.0%} of {settings['train_examples']} "
          f"training labels wrong, {len(by_seed)} seed(s): mean (least to greatest)\n{table(by_seed)}\n"
          f"Highest validation accuracy: {best}. Results and plot: {output.resolve()}")
    drawn = next(iter(by_seed)), best  # The one histogram of weights: what the picture is drawn from is in the file.
    short = {seed: {name: {key: value for key, value in run.items()
                           if key not in ("weights", "flipped") or (seed, name) == drawn}
                    for name, run in runs.items()} for seed, runs in by_seed.items()}
    experiment.write_json(
        output / "results.json", experiment.rounded({"settings": settings, "best": best, "seeds": short}))
    plot(by_seed, best, output / "clean_labels.png")


if __name__ == "__main__":
    program.run(main)

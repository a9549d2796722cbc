r"""Noisy labels by a weight net: EvoGrad and the exact one-step hypergradient, their accuracy, time and memory.

Each wrong label of Fashion-MNIST is that of one of two other classes, which depend on the right one (flip2). A network
1-100-1 maps the loss of a training example to its weight; its own weights are the outer variables, learned on few
examples with right labels while the classifier is trained: the hypergradient at the current weights, the update of the
weight net, the training step on the same batch. EvoGrad takes two perturbed copies of the weights in the place of
second derivatives.

    python scripts/hyperparameters/weigh_noisy_labels.py --quick
    python scripts/hyperparameters/weigh_noisy_labels.py --num_seeds=3

The baseline is trained on all labels alike, the oracle on the right ones alone, with the same number of steps. Time and
memory of a step are measured in a process of their own, with one thread: CPU seconds per step, and the peak of resident
memory within a step above what is there between steps.

Reference: Bohdal et al., EvoGrad: efficient gradient-based meta-learning and hyperparameter optimization, 2021,
section 4.4; Shu et al., Meta-Weight-Net, 2019.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

NUM_CLASSES = 10
METHODS = ("baseline", "exact", "evograd", "oracle")
SETTINGS = ("dataset", "networks", "methods", "train_examples", "clean_examples", "noise", "steps", "batch_size",
            "learning_rate", "momentum", "l2", "outer_learning_rate", "perturbations", "sigma", "temperature",
            "outer_first", "evaluations", "measured_networks", "measured_steps")
QUICK = {"networks": ["4-8"], "train_examples": 1000, "clean_examples": 200, "steps": 60, "batch_size": 50,
         "evaluations": 3, "measured_networks": ["4-8"], "measured_steps": 5}


def define_flags():
    experiment_flags.define_flags("results/weigh_noisy_labels")
    flags.DEFINE_enum("dataset", "fashion_mnist", ["mnist", "fashion_mnist"], "Data set of TFDS.")
    flags.DEFINE_list("networks", ["8-16", "16-32"], "Filters of the two convolutions of each network.")
    program.define_names("methods", list(METHODS), METHODS, "What is trained.")
    flags.DEFINE_integer("train_examples", 2000, "Training examples.", lower_bound=1)
    flags.DEFINE_integer("clean_examples", 1000, "Examples with right labels for the outer objective.", lower_bound=1)
    flags.DEFINE_float("noise", 0.4, "Fraction of training labels that are made wrong.", 0.0, 0.9)
    flags.DEFINE_integer("steps", 500, "Training steps, as many as updates of the weight net.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 50, "Examples in an inner and in an outer batch.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.05, "Inner rate, divided by 10 after 2/3 and 5/6 of the steps.")
    flags.DEFINE_float("momentum", 0.9, "Nesterov's momentum.", 0.0, 1.0)
    flags.DEFINE_float("l2", 2.5e-4, "Strength of L2 of the kernels.")
    flags.DEFINE_float("outer_learning_rate", 3e-3, "Learning rate of Adam on the weight net.")
    flags.DEFINE_integer("perturbations", 2, "EvoGrad: copies of the weights.", lower_bound=2)
    flags.DEFINE_float("sigma", 1e-3, "EvoGrad: size of their perturbation.")
    flags.DEFINE_float("temperature", 0.05, "EvoGrad: temperature of the softmax over their losses.")
    flags.DEFINE_bool("outer_first", True, "Update the weight net before the training step, as published.")
    flags.DEFINE_integer("evaluations", 5, "Times the test accuracy is taken.", lower_bound=1)
    flags.DEFINE_list("measured_networks", ["8-16", "16-32", "32-64", "64-128"], "Networks for time and memory.")
    flags.DEFINE_integer("measured_steps", 20, "Steps that are timed.", lower_bound=1)
    flags.DEFINE_string("case", None, "JSON of the settings of a measurement, which this process makes and prints.")


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import data_sets, experiment, pictures
import farhox
from farhox.hypergradients import EvoGradHG

LABELS = {"baseline": "all labels alike", "exact": "exact, one step", "evograd": "EvoGrad",
          "oracle": "right labels alone"}


def flip_two(y, noise, rng):
    """Labels of which a fraction is replaced by one of two other classes of each class, and a mask of these."""
    others = np.array([rng.permutation(np.delete(np.arange(NUM_CLASSES), k))[:2] for k in range(NUM_CLASSES)])
    flipped = np.zeros(len(y), bool)
    flipped[rng.permutation(len(y))[:round(noise * len(y))]] = True
    return np.where(flipped, others[y, rng.integers(0, 2, len(y))], y), flipped


def build_model(network, l2):
    first, second = map(int, network.split("-"))
    decay = keras.regularizers.L2(l2)
    return keras.Sequential([
        keras.Input([28, 28, 1]),
        keras.layers.Conv2D(first, 3, strides=2, padding="same", activation="relu", kernel_regularizer=decay),
        keras.layers.Conv2D(second, 3, strides=2, padding="same", activation="relu", kernel_regularizer=decay),
        keras.layers.Flatten(), keras.layers.Dense(2 * second, activation="relu", kernel_regularizer=decay),
        keras.layers.Dense(NUM_CLASSES, kernel_regularizer=decay)])


def build_weight_net():
    return keras.Sequential([
        keras.Input([1]), keras.layers.Dense(100, activation="relu"), keras.layers.Dense(1, activation="sigmoid")])


def losses(model, batch, training=False):
    return keras.losses.sparse_categorical_crossentropy(batch[1], model(batch[0], training=training), from_logits=True)


def sgd(settings):
    """The optimizer of all trainings."""
    rate, steps = settings["learning_rate"], settings["steps"]
    rates = keras.optimizers.schedules.PiecewiseConstantDecay(
        [2 * steps // 3, 5 * steps // 6], [rate, rate / 10, rate / 100])
    return keras.optimizers.SGD(rates, momentum=settings["momentum"], nesterov=True)


def weighted_training(model, weight_net, method, settings, seed):
    """A compiled `HyperOptimizer` that trains the model and learns the weight net, online."""
    def inner_objective(batch):
        of_each = losses(model, batch, training=True)
        # To the weight net a loss is a number: the classifier is not trained to make its losses heavier.
        weights = weight_net(keras.ops.stop_gradient(of_each)[:, None])[:, 0]
        decay = sum(layer.kernel_regularizer(layer.kernel) for layer in model.layers if layer.weights)
        return keras.ops.sum(weights * of_each) / keras.ops.sum(weights) + decay

    problem = farhox.BilevelProblem(
        inner_objective, lambda batch: keras.ops.mean(losses(model, batch)), model.trainable_variables,
        weight_net.trainable_variables, dynamics=farhox.KerasDynamics(sgd(settings)), stop_gradient="tensorflow")
    evograd = EvoGradHG(settings["perturbations"], settings["sigma"], settings["temperature"], seed=seed,
                        at_start=settings["outer_first"])
    optimizer = farhox.HyperOptimizer(problem, evograd if method == "evograd" else farhox.ReverseHG(), online=True,
                                      outer_first=settings["outer_first"])
    # It rescales: EvoGrad's hypergradients are a hundred thousand times smaller than those of a step of size 1.
    optimizer.compile(keras.optimizers.Adam(settings["outer_learning_rate"], epsilon=1e-12))
    return optimizer


def compiled_model(network, settings):
    model = build_model(network, settings["l2"])
    model.compile(sgd(settings), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def batches(train, settings, seed):
    """Batches of plain training, without an end."""
    return tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[0]), seed).repeat().batch(
        settings["batch_size"])


def accuracy(model, data):
    return float(model.evaluate(*data, batch_size=500, verbose=0, return_dict=True)["accuracy"])


def train(data, network, method, settings, seed, folder):
    """One training: the test accuracy at the end and on the way, and what the weight net makes of losses."""
    (x, given, flipped), clean, test = data
    keras.utils.set_random_seed(seed)
    model = compiled_model(network, settings)
    every = max(1, settings["steps"] // settings["evaluations"])
    part = test[0][:1000], test[1][:1000]  # On the way a part of the test images tells enough.
    result = {}
    if method in ("baseline", "oracle"):
        seen = (x, given) if method == "baseline" else (x[~flipped], given[~flipped])
        on_the_way = []
        model.fit(batches(seen, settings, seed), steps_per_epoch=every, epochs=settings["steps"] // every,
                  verbose=0, shuffle=False, callbacks=[keras.callbacks.LambdaCallback(
                      on_epoch_end=lambda epoch, logs: on_the_way.append(accuracy(model, part)))])
    else:
        weight_net = build_weight_net()
        optimizer = weighted_training(model, weight_net, method, settings, seed)
        dataset = farhox.bilevel_dataset((x, given), clean, 1, batch_size=settings["batch_size"],
                                         outer_batch_size=settings["batch_size"], seed=seed)
        history = experiment.fit_resumable(
            optimizer, dataset, settings["steps"] // every * every, folder, steps_per_epoch=every,
            observe=lambda: {"test_part": accuracy(model, part)})
        result["time_before"], on_the_way = history.pop("time_before"), history["test_part"]
        grid = np.linspace(0.0, 6.0, 61, dtype="float32")
        result["weights"] = {"loss": grid.tolist(), "weight": np.array(weight_net(grid[:, None]))[:, 0].tolist()}
        of_each = np.concatenate([losses(model, (x[i:i + 500], given[i:i + 500])) for i in range(0, len(x), 500)])
        weights = np.array(weight_net(of_each[:, None]))[:, 0]
        result["wrong_to_right"] = float(np.mean(weights[flipped]) / np.mean(weights[~flipped]))
    return {**result, "test_accuracy": accuracy(model, test), "on_the_way": on_the_way}


def load(settings, data_dir, seed):
    """(images, given labels, mask of the wrong ones), the clean examples, the test set."""
    sizes = settings["train_examples"], settings["clean_examples"]
    (x, y), clean, test = data_sets.images(settings["dataset"], data_dir, sizes, seed)
    return (x, *flip_two(y, settings["noise"], np.random.default_rng(seed))), clean, test


def measure(settings):
    """Time and memory of a step in this process, on random images, by network and method."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    random, size = np.random.default_rng(0), settings["batch_size"]
    x = random.random((5 * size, 28, 28, 1)).astype("float32")
    data, costs = (x, random.integers(0, NUM_CLASSES, len(x))), {}
    for network in settings["measured_networks"]:
        for method in ("baseline", "exact", "evograd"):
            trained = model = compiled_model(network, settings)
            dataset = batches(data, settings, 0)
            if method != "baseline":
                trained = weighted_training(model, build_weight_net(), method, settings, 0)
                dataset = farhox.bilevel_dataset(data, data, 1, batch_size=size, outer_batch_size=size).repeat()

            def run(steps, trained=trained, dataset=dataset):
                trained.fit(dataset, steps_per_epoch=steps, verbose=0, shuffle=False)

            costs[f"{network} {method}"] = {
                "parameters": model.count_params(), **experiment.cost_of_steps(run, settings["measured_steps"])}
    return costs


def table(by_seed, costs, settings):
    rows = []
    for network in settings["networks"]:
        for method in settings["methods"]:
            runs = [runs[f"{network} {method}"] for runs in by_seed.values()]
            cost = costs.get(f"{network} {'baseline' if method == 'oracle' else method}")
            ratios = [run["wrong_to_right"] for run in runs if "wrong_to_right" in run]
            rows.append([network, LABELS[method],
                         experiment.mean_and_range([100 * run["test_accuracy"] for run in runs], "{:.1f}"),
                         experiment.mean_and_range(ratios) if ratios else "",
                         f"{1000 * cost['seconds_per_step']:.1f}" if cost else "",
                         f"{cost['step_mb']:.1f}" if cost else ""])
    return experiment.markdown_table(
        ["network", "training", "test accuracy, %", "weight wrong / right", "CPU ms per step", "MB per step"], rows)


def cost_table(costs):
    return experiment.markdown_table(
        ["network, training", "parameters", "CPU ms per step", "MB per step"],
        [[name, f"{cost['parameters']:,}", f"{1000 * cost['seconds_per_step']:.1f}", f"{cost['step_mb']:.1f}"]
         for name, cost in costs.items()])


def plot(by_seed, costs, settings, path):
    """Accuracy on the way and the learned weights of each network, time and memory by the size of the network."""
    seeds, networks = list(by_seed), settings["networks"]
    styles, rows = pictures.line_styles(METHODS), len(networks) + 1
    with pictures.figure(path, rows=rows, columns=2, size=(7.8, 3.0 * rows + 0.4)) as axes:
        *drawn, seconds, memory = axes
        for network, progress, weights in zip(networks, drawn[::2], drawn[1::2]):
            for method in settings["methods"]:
                values = 100 * np.array([by_seed[seed][f"{network} {method}"]["on_the_way"] for seed in seeds])
                steps = settings["steps"] / values.shape[1] * np.arange(1, values.shape[1] + 1)
                progress.plot(steps, values.mean(0), label=LABELS[method], **styles[method])
                progress.fill_between(steps, values.min(0), values.max(0), color=styles[method]["color"], alpha=0.12,
                                      linewidth=0)
                for i, seed in enumerate(seeds):
                    if (learned := by_seed[seed][f"{network} {method}"].get("weights")) is not None:
                        weights.plot(learned["loss"], learned["weight"], label=None if i else LABELS[method],
                                     linewidth=1.2, **styles[method])
            progress.set(title=f"Test accuracy, network {network}", xlabel="Training step", ylabel="Test accuracy, %")
            weights.set(title=f"Learned weights, network {network}", xlabel="Loss of an example", ylabel="Weight",
                        ylim=(0, 1))
        for method in ("baseline", "exact", "evograd"):
            points = [(cost["parameters"] / 1000, 1000 * cost["seconds_per_step"], cost["step_mb"])
                      for name, cost in costs.items() if name.split()[1] == method]
            for axis, column in ((seconds, 1), (memory, 2)):
                axis.plot([point[0] for point in points], [point[column] for point in points], marker="o",
                          markersize=4, label=LABELS[method], **styles[method])
        seconds.set(title="Time of a step", xlabel="Weights of the network, thousands", ylabel="CPU time per step, ms")
        memory.set(title="Memory of a step", xlabel="Weights of the network, thousands",
                   ylabel="Peak within a step, MB")
        for axis in (seconds, memory):
            pictures.logarithmic(axis, "x")
            pictures.logarithmic(axis, "y")
        pictures.legend_of_figure(list(axes), columns=4)


def main(_):
    if flags.FLAGS.case is not None:
        print(json.dumps(measure(json.loads(flags.FLAGS.case))))
        return
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    output = pathlib.Path(flags.FLAGS.output)
    # Which runs there are is not a setting of one of them.
    folder = experiment.Folder(output, {name: value for name, value in settings.items()
                                        if name not in ("networks", "methods")})
    by_seed = {}
    for seed in experiment_flags.seeds():
        data = load(settings, flags.FLAGS.data_dir, seed)
        by_seed[seed] = {f"{network} {method}": folder.once(
            f"seed{seed}_{network}_{method}", lambda path: train(data, network, method, settings, seed, path))
            for network in settings["networks"] for method in settings["methods"]}
    costs = folder.once("costs", lambda _: {"costs": experiment.measured_apart(__file__, settings)})["costs"]
    print(f"\n{settings['dataset']}, {settings['noise']:.0%} of {settings['train_examples']} training labels wrong, "
          f"{len(by_seed)} seed(s): mean (least to greatest)\n{table(by_seed, costs, settings)}\n\n"
          f"{cost_table(costs)}\nResults and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded(
        {"settings": settings, "seeds": by_seed, "costs": costs}))
    plot(by_seed, costs, settings, output / "weigh_noisy_labels.png")


if __name__ == "__main__":
    program.run(main)

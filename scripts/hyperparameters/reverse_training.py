r"""Hundreds and thousands of hyperparameters, learned by training that is reversed: six experiments of small networks.

- rates: a learning rate for each layer and step. momenta: a momentum for each layer and step besides.
- scales: the scale of the initial weights and biases of each layer.
- l2: an L2 strength for each weight of a softmax regression.
- images: ten training images, one of each class, learned from nothing.
- ties: for each layer and pair of Omniglot's alphabets how much their networks share.

    python scripts/hyperparameters/reverse_training.py --quick
    python scripts/hyperparameters/reverse_training.py

Every hyper-iteration trains T steps of momentum gradient descent and moves all hyperparameters along the hypergradient
of the validation loss: by ReversibleHG, which undoes the steps, or where the momentum is learned by ReverseHG, which
stores them. Then the test loss says how far the validation examples were learned by heart. Before it both methods
compute the same hypergradient once; their time and what they store are taken for several T.

Reference: Maclaurin et al., Gradient-based hyperparameter optimization through reversible learning, 2015, section 3.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

EXPERIMENTS = ("rates", "momenta", "scales", "l2", "images", "ties")
SETTINGS = ("experiments", "inner_steps", "batch_size", "hyper_iterations", "units", "train_examples", "l2_examples",
            "validation_examples", "alphabets", "draws", "measured_steps")
QUICK = {"inner_steps": 10, "batch_size": 20, "hyper_iterations": 3, "units": 8, "train_examples": 100,
         "l2_examples": 50, "validation_examples": 100, "alphabets": 2, "draws": 1, "measured_steps": ["5", "10"]}


def define_flags():
    experiment_flags.define_flags("results/reverse_training")
    program.define_names("experiments", list(EXPERIMENTS), EXPERIMENTS, "What is learned.")
    flags.DEFINE_integer("inner_steps", 100, "T, the steps of every training.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 100, "Examples in an inner batch of rates, momenta and scales.", lower_bound=1)
    flags.DEFINE_integer("hyper_iterations", 30, "Updates of the hyperparameters.", lower_bound=1)
    flags.DEFINE_integer("units", 50, "Units of the hidden layers.", lower_bound=1)
    flags.DEFINE_integer("train_examples", 5000, "Training examples.", lower_bound=1)
    flags.DEFINE_integer("l2_examples", 300, "Training examples for l2.", lower_bound=1)
    flags.DEFINE_integer("validation_examples", 1000, "Examples that hyperparameters are learned on.", lower_bound=1)
    flags.DEFINE_integer("alphabets", 8, "Alphabets for ties, those with the fewest characters.", lower_bound=2)
    flags.DEFINE_integer("draws", 2, "Trainings, each with new initial weights, in a test.", lower_bound=1)
    flags.DEFINE_list("measured_steps", ["25", "100", "400"], "T for which both methods are compared.")


if __name__ == "__main__":
    program.parse(define_flags)

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from _shared import data_sets, experiment, pictures
import farhox
from farhox.hypergradients import ReversibleHG

MOMENTUM = 0.9
HIDDEN_LAYERS = 3


@dataclasses.dataclass
class Experiment:
    """What one experiment is made of.

    Attributes:
        problem: A `BilevelProblem`, which is judged on batches like the outer batch.
        data: Elements (inner_batches, outer_batch).
        test: The test set, a batch like the outer batch.
        learned: Dictionary of the outer variables by name: `farhox` ones, or `keras.Variable`s.
        rate: Learning rate of Adam on them.
        draw: Callable, a seed: new initial weights.
        fixed: List of labels and callables that set the hyperparameters to others, to compare with.
        method: The method that learns.
    """

    problem: Any
    data: Any
    test: Any
    learned: dict
    rate: float
    draw: Callable = lambda seed: None
    fixed: list = dataclasses.field(default_factory=list)
    method: Any = dataclasses.field(default_factory=ReversibleHG)


def weights_of(sizes):
    """Kernels and biases of a network with layers of these sizes, all zero."""
    shapes = [shape for a, b in itertools.pairwise(sizes) for shape in ((a, b), (b,))]
    return [keras.Variable(np.zeros(shape, "float32"), name=f"{'bias' if len(shape) == 1 else 'kernel'}_{i // 2 + 1}")
            for i, shape in enumerate(shapes)]


def outputs(weights, x):
    """Logits of a network of tanh layers with these kernels and biases."""
    for i in range(0, len(weights), 2):
        x = keras.ops.matmul(x, weights[i]) + weights[i + 1]
        x = keras.ops.tanh(x) if i + 2 < len(weights) else x
    return x


def loss(weights, batch):
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(
        batch[1], outputs(weights, batch[0]), from_logits=True))


def predictions(weights):
    """For a problem: targets and predictions of a batch."""
    return lambda batch: (batch[1], outputs(weights, batch[0]), None)


def flat_images(dataset, data_dir, settings, seed):
    sizes = settings["train_examples"], settings["validation_examples"]
    return [(x.reshape(len(x), -1), y) for x, y in data_sets.images(dataset, data_dir, sizes, seed)]


def glorot(weights, seed):
    """Initial weights as Keras draws them."""
    draw = keras.initializers.GlorotUniform(seed)
    for weight in weights:
        weight.assign(draw(weight.shape) if len(weight.shape) == 2 else np.zeros(weight.shape))


def of_each_variable(by_layer):
    """Settings of the kernel and the bias of each layer, of which each step has its own number."""
    return [lambda step, numbers=numbers: numbers()[step] for numbers in by_layer for _ in range(2)]


def schedules(parts, settings, seed, momenta=False):
    """rates, momenta: numbers of every layer and step."""
    train, validation, test = parts
    steps = settings["inner_steps"]
    weights = weights_of([train[0].shape[1], *HIDDEN_LAYERS * [settings["units"]], 10])
    layers = range(1, len(weights) // 2 + 1)
    rates = [farhox.Hyperparameter(np.full(steps, 0.03), low=0.0, log=True, name=f"rate_{i}") for i in layers]
    learned = {rate.name: rate for rate in rates}
    per_layer: Any = MOMENTUM
    if momenta:
        values = [farhox.Hyperparameter(np.full(steps, MOMENTUM), low=0.0, high=1.0, name=f"momentum_{i}")
                  for i in layers]
        learned |= {value.name: value for value in values}
        per_layer = of_each_variable(values)
    problem = farhox.BilevelProblem(
        lambda batch: loss(weights, batch), lambda batch: loss(weights, batch), weights, list(learned.values()),
        dynamics=farhox.Momentum(of_each_variable(rates), per_layer),
        outer_predictions=predictions(weights))

    def constant(rate, momentum):
        for name, value in learned.items():
            value.assign(np.full(steps, rate if name.startswith("rate") else momentum))

    tried = [(rate, momentum) for rate in (0.01, 0.02, 0.05, 0.1, 0.2)
             for momentum in ((0.8, MOMENTUM, 0.95) if momenta else (MOMENTUM,))]
    return Experiment(
        problem, farhox.bilevel_dataset(train, validation, steps, batch_size=settings["batch_size"], seed=seed), test,
        learned, 0.1, lambda seed: glorot(weights, seed),
        [(f"rate {pair[0]}" + (f", momentum {pair[1]}" if momenta else ""), lambda pair=pair: constant(*pair))
         for pair in tried], farhox.ReverseHG() if momenta else ReversibleHG())


def scales(parts, settings, seed):
    """scales: initial weights are scale times normal numbers, of kernels and of biases of every layer."""
    train, validation, test = parts
    weights = weights_of([train[0].shape[1], *HIDDEN_LAYERS * [settings["units"]], 10])
    numbers = [keras.Variable(np.zeros(weight.shape), trainable=False) for weight in weights]
    values = [farhox.Hyperparameter(0.3, low=0.0, log=True, name=weight.name) for weight in weights]

    def moved():
        # What is trained is the way from the initial weights: the path is that of the weights themselves.
        return [scale() * number + weight for scale, number, weight in zip(values, numbers, weights)]

    def draw(seed):
        random = np.random.default_rng(seed)
        for number, weight in zip(numbers, weights):
            number.assign(random.normal(size=number.shape))
            weight.assign(np.zeros(weight.shape))

    problem = farhox.BilevelProblem(
        lambda batch: loss(moved(), batch), lambda batch: loss(moved(), batch), weights, values,
        dynamics=farhox.Momentum(0.05, MOMENTUM),
        outer_predictions=lambda batch: (batch[1], outputs(moved(), batch[0]), None))

    def as_keras():
        for value, weight in zip(values, weights):
            value.assign(np.sqrt(2.0 / sum(weight.shape)) if len(weight.shape) == 2 else 1e-6)

    return Experiment(
        problem, farhox.bilevel_dataset(train, validation, settings["inner_steps"], batch_size=settings["batch_size"],
                                        seed=seed),
        test, {value.name: value for value in values}, 0.15, draw, [("Glorot's", as_keras)])


def l2(parts, settings, seed):
    """l2: a strength for each weight."""
    train, validation, test = parts
    train = tuple(part[:settings["l2_examples"]] for part in train)
    weights = weights_of([train[0].shape[1], 10])
    strength = farhox.Hyperparameter(np.full(weights[0].shape, 1e-3), low=0.0, log=True, name="l2")
    problem = farhox.BilevelProblem(
        lambda batch: loss(weights, batch) + keras.ops.sum(strength() * keras.ops.square(weights[0])),
        lambda batch: loss(weights, batch), weights, [strength], dynamics=farhox.Momentum(0.1, MOMENTUM),
        outer_predictions=predictions(weights))
    tried = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    return Experiment(
        problem, tf.data.Dataset.from_tensors((farhox.repeat(train, settings["inner_steps"]), validation)), test,
        {"l2": strength}, 0.15,
        fixed=[(f"one strength {value:g}", lambda value=value: strength.assign(np.full(weights[0].shape, value)))
               for value in tried])


def images(parts, settings, seed):
    """images: ten pictures that are the whole training set."""
    train, validation, test = parts
    weights = weights_of([train[0].shape[1], 10])
    pixels = keras.Variable(np.zeros([10, train[0].shape[1]]), name="pixels")
    classes = np.arange(10)
    problem = farhox.BilevelProblem(
        lambda _: loss(weights, (pixels, classes)), lambda batch: loss(weights, batch), weights, [pixels],
        dynamics=farhox.Momentum(0.05, MOMENTUM), outer_predictions=predictions(weights))
    mean = np.stack([train[0][train[1] == k].mean(0) for k in classes])
    first = np.stack([train[0][train[1] == k][0] for k in classes])
    inner = farhox.repeat(np.zeros(1, "float32"), settings["inner_steps"])  # Which is not read.
    return Experiment(
        problem, tf.data.Dataset.from_tensors((inner, validation)), test, {"pixels": pixels}, 0.05,
        fixed=[("one real image of each class", lambda: pixels.assign(first)),
               ("mean image of each class", lambda: pixels.assign(mean))])


def ties(parts, settings, seed):
    """ties: networks of several alphabets, each pair of which is drawn together in each hidden layer."""
    train, validation, test = parts
    tasks, units = len(train[0]), settings["units"]
    sizes = [train[0].shape[-1], units, units, train[3].shape[-1]]
    weights = [keras.Variable(np.zeros([tasks, *([1] if len(weight.shape) == 1 else []), *weight.shape], "float32"),
                              name=weight.name) for weight in weights_of(sizes)]
    pairs = np.array(list(itertools.combinations(range(tasks), 2)))
    values = [farhox.Hyperparameter(np.full(len(pairs), 1e-3), low=0.0, log=True, name=f"ties_{i}") for i in (1, 2)]

    def logits(batch):
        # A character that an alphabet does not have is no answer.
        return outputs(weights, batch[0]) - 1e9 * (1.0 - batch[3][:, None, :])

    def tasks_loss(batch):
        of_each = keras.losses.sparse_categorical_crossentropy(batch[1], logits(batch), from_logits=True)
        return keras.ops.sum(batch[2] * of_each) / keras.ops.sum(batch[2])

    def drawn_together(batch):
        total = tasks * tasks_loss(batch)  # Each network is trained as if it were alone.
        for i, value in enumerate(values):
            for weight in weights[2 * i:2 * i + 2]:
                apart = keras.ops.square(tf.gather(weight, pairs[:, 0]) - tf.gather(weight, pairs[:, 1]))
                total += keras.ops.sum(value() * keras.ops.sum(apart, axis=(1, 2)))
        return total

    def predicted(batch):
        return (keras.ops.reshape(batch[1], [-1]), keras.ops.reshape(logits(batch), [-1, sizes[-1]]),
                keras.ops.reshape(batch[2], [-1]))

    def draw(seed):
        random = np.random.default_rng(seed)
        for weight in weights:  # The same for all alphabets: what is shared begins as shared.
            start = random.normal(size=weight.shape[1:]) / np.sqrt(weight.shape[1])
            weight.assign(np.broadcast_to(start if weight.name.startswith("kernel") else 0 * start, weight.shape))

    problem = farhox.BilevelProblem(
        drawn_together, tasks_loss, weights, values, dynamics=farhox.Momentum(0.05, MOMENTUM),
        outer_predictions=predicted)
    tried = (1e-6, 1e-3, 1e-2, 1e-1, 1.0)
    return Experiment(
        problem, tf.data.Dataset.from_tensors((farhox.repeat(train, settings["inner_steps"]), validation)), test,
        {value.name: value for value in values}, 0.2, draw,
        [(f"one strength {strength:g}", lambda strength=strength: [
            value.assign(np.full(len(pairs), strength)) for value in values]) for strength in tried])


def make(name, parts, settings, seed):
    if name in ("rates", "momenta"):
        return schedules(parts, settings, seed, momenta=name == "momenta")
    return {"scales": scales, "l2": l2, "images": images, "ties": ties}[name](parts, settings, seed)


def load(name, settings, data_dir, seed):
    """Training, validation and test data of an experiment."""
    if name == "ties":
        return data_sets.small_alphabets(data_dir, settings["alphabets"], (10, 5, 5), seed)
    return flat_images("mnist" if name in ("l2", "images") else "fashion_mnist", data_dir, settings, seed)


def judged(one, settings):
    """Loss and accuracy on the validation and on the test set, means over trainings with new initial weights."""
    results = []
    for i, (inner, validation) in enumerate(one.data.repeat().take(settings["draws"])):
        one.draw(1000 + i)
        for part, batch in (("validation", validation), ("test", one.test)):
            evaluation = one.problem.evaluate(inner, batch)
            targets, scores, weights = evaluation.predictions
            right = np.equal(np.argmax(scores, -1), targets)
            results.append((f"{part}_loss", float(evaluation.outer_loss)))
            results.append((f"{part}_accuracy", float(np.average(right, weights=weights))))
    return {name: float(np.mean([value for key, value in results if key == name])) for name, _ in results}


def both_methods(one):
    """What one hypergradient takes that stores states, and one that undoes them, where that is possible."""
    inner, validation = next(iter(one.data))
    one.draw(0)
    found = {}
    for name, method in (("reverse", farhox.ReverseHG()), ("reversible", ReversibleHG())):
        if name == "reversible" and not isinstance(one.method, ReversibleHG):
            continue
        method.compute(one.problem, inner, validation)
        start = time.process_time()
        result = method.compute(one.problem, inner, validation)
        found[name] = {"cpu_seconds": time.process_time() - start}
        gradient = np.concatenate([np.ravel(part) for part in result.gradients]).astype("float64")
        if name == "reverse":
            first, steps = gradient, int(result.diagnostics["inner_steps"])
            found[name]["stored_mb"] = one.problem.memory_plan(steps).total_bytes / 2**20
        else:
            found[name]["stored_mb"] = int(result.diagnostics["stored_bytes"]) / 2**20
            found["difference"] = float(np.linalg.norm(gradient - first) / np.linalg.norm(first))
    return found


def learn(name, settings, data_dir, seed, folder):
    """One experiment: what is learned, and the losses at the start, at the end and with one number for all."""
    one = make(name, load(name, settings, data_dir, seed), settings, seed)
    result = {"hyperparameters": sum(int(np.prod(v.shape)) for v in one.problem.outer_variables),
              "weights": sum(int(np.prod(v.shape)) for v in one.problem.inner_variables)}
    result["methods"] = both_methods(one)
    result["start"] = judged(one, settings)
    initial = {key: value.numpy() for key, value in one.learned.items()}
    result["fixed"] = {}
    for label, assign in one.fixed:
        assign()
        result["fixed"][label] = judged(one, settings)
    for key, value in initial.items():
        one.learned[key].assign(value)
    optimizer = farhox.HyperOptimizer(one.problem, one.method)
    optimizer.compile(keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(one.rate, settings["hyper_iterations"])))
    history = experiment.fit_resumable(
        optimizer, one.data, settings["hyper_iterations"], folder, prepare=lambda i: one.draw(10_000 * (seed + 1) + i))
    result["end"] = judged(one, settings)
    return {**result, "time_before": history.pop("time_before"), "validation_losses": history["outer_loss"],
            "values": {key: np.array(value.numpy()).tolist() for key, value in one.learned.items()}}


def measure(settings, data_dir, seed):
    """CPU seconds of a hypergradient of all rates, and what it stores of the training, by T and method."""
    parts, rows = load("rates", settings, data_dir, seed), []
    for steps in map(int, settings["measured_steps"]):
        one = schedules(parts, {**settings, "inner_steps": steps}, seed)
        one.draw(0)
        inner, validation = next(iter(one.data))
        segment = math.isqrt(steps - 1) + 1  # The steps between two checkpoints.
        for label, method in (("ReverseHG", farhox.ReverseHG()),
                              ("ReverseHG, checkpoints", farhox.ReverseHG(checkpoint_every=segment)),
                              ("ReversibleHG", ReversibleHG())):
            result = method.compute(one.problem, inner, validation)
            start = time.process_time()
            method.compute(one.problem, inner, validation)
            seconds = time.process_time() - start
            if label == "ReversibleHG":
                stored = int(result.diagnostics["stored_bytes"])
            else:  # All steps; or those of a segment, and the first state of each.
                plan = one.problem.memory_plan(steps if label == "ReverseHG" else segment)
                stored = plan.total_bytes + (label != "ReverseHG") * -(-steps // segment) * plan.state_bytes
            rows.append({"method": label, "steps": steps, "cpu_seconds": seconds, "stored_mb": stored / 2**20})
    return {"rows": rows}


def best_fixed(run):
    """The other values with the lowest validation loss."""
    return min(run["fixed"], key=lambda label: run["fixed"][label]["validation_loss"])


def table(runs):
    rows = []
    for name, run in runs.items():
        best = best_fixed(run)
        for label, values in (("start", run["start"]), (best, run["fixed"][best]), ("learned", run["end"])):
            rows.append([name, label, f"{run['hyperparameters']:,}" if label == "learned" else "",
                         f"{values['validation_loss']:.3f}", f"{values['test_loss']:.3f}",
                         f"{100 * values['test_accuracy']:.1f}"])
    return experiment.markdown_table(
        ["experiment", "values", "numbers", "validation loss", "test loss", "test accuracy, %"], rows)


def method_table(runs):
    rows = []
    for name, run in runs.items():
        methods = run["methods"]
        back = methods.get("reversible")
        rows.append([name, f"{run['weights']:,}", f"{methods['reverse']['stored_mb']:.2f}",
                     f"{back['stored_mb']:.2f}" if back else "", f"{methods['reverse']['cpu_seconds']:.2f}",
                     f"{back['cpu_seconds']:.2f}" if back else "", f"{methods['difference']:.0e}" if back else ""])
    return experiment.markdown_table(["experiment", "weights", "MB stored", "reversible", "CPU s", "reversible",
                                      "relative difference"], rows)


def plot_schedules(runs, measured, path):
    """Rates and momenta by layer, and time and memory by T."""
    with pictures.figure(path, rows=2, columns=2, size=(7.8, 6.4)) as axes:
        drawn = [("rates", "rate", "Rates alone", "Learning rate"),
                 ("momenta", "rate", "Rates, with momenta", "Learning rate"),
                 ("momenta", "momentum", "Momenta", "Momentum")]
        for axis, (name, kind, title, label) in zip(axes, drawn):
            values = {key: value for key, value in runs.get(name, {"values": {}})["values"].items()
                      if key.startswith(kind)}
            styles = pictures.line_styles([f"layer {key.split('_')[1]}" for key in values])
            for value, (layer, style) in zip(values.values(), styles.items()):
                axis.plot(np.arange(len(value)), value, label=layer, linewidth=1.2, **style)
            axis.set(title=title, xlabel="Training step", ylabel=label,
                     ylim=(0, 1) if kind == "momentum" else (0, None))
            pictures.whole_numbers(axis)
        memory = axes[3]
        names = list(dict.fromkeys(row["method"] for row in measured["rows"]))
        styles = pictures.line_styles(names)
        for name in names:
            rows = [row for row in measured["rows"] if row["method"] == name]
            memory.plot([row["steps"] for row in rows], [row["stored_mb"] for row in rows], marker="o",
                        markersize=4, label=name, **styles[name])
        memory.set(title="What is stored of a training", xlabel="Training steps T", ylabel="Stored, MB")
        pictures.logarithmic(memory, "x")
        memory.set_xticks(sorted({row["steps"] for row in measured["rows"]}))
        pictures.logarithmic(memory, "y")
        pictures.legend_below(memory)
        pictures.legend_of_figure(list(axes[:3]), columns=4)


def plot_pictures(values, titles, label, path):
    """Pictures of 28 x 28 numbers, one of each class, with one scale of colours."""
    with pictures.figure(path, rows=2, columns=5, size=(7.8, 3.7)) as axes:
        low, high = np.min(values), np.max(values)
        for axis, value, title in zip(axes, values, titles):
            image = axis.imshow(np.reshape(value, [28, 28]), vmin=low, vmax=high, cmap="viridis")
            axis.set(title=title, xticks=(0, 27), yticks=(0, 27))
            axis.grid(False)
        axes[0].figure.supxlabel("Column, pixels", fontsize=9)
        axes[0].figure.supylabel("Row, pixels", fontsize=9)
        axes[0].figure.colorbar(image, ax=list(axes), label=label, shrink=0.9)


def plot_ties(run, tasks, path):
    """The strength between each pair of alphabets, by layer."""
    with pictures.figure(path, columns=2, size=(7.4, 3.5)) as axes:
        logs = [np.log10(value) for value in run["values"].values()]
        for axis, value, layer in zip(axes, logs, (1, 2)):
            matrix = np.full([tasks, tasks], np.nan)
            for (a, b), strength in zip(itertools.combinations(range(tasks), 2), value):
                matrix[a, b] = matrix[b, a] = strength
            image = axis.imshow(matrix, cmap="viridis", vmin=np.min(logs), vmax=np.max(logs))
            axis.set(title=f"Hidden layer {layer}", xlabel="Alphabet", ylabel="Alphabet", xticks=range(tasks),
                     yticks=range(tasks), xticklabels=range(1, tasks + 1), yticklabels=range(1, tasks + 1))
            axis.grid(False)
        axes[0].figure.colorbar(image, ax=list(axes), label="log10 of the strength", shrink=0.9)


def plot(runs, measured, settings, output):
    plot_schedules(runs, measured, output / "reverse_training.png")
    if "l2" in runs:
        plot_pictures(np.log10(np.transpose(runs["l2"]["values"]["l2"])), [f"class {k}" for k in range(10)],
                      "log10 of the L2 strength", output / "reverse_training_l2.png")
    if "images" in runs:
        plot_pictures(runs["images"]["values"]["pixels"], [f"class {k}" for k in range(10)], "Pixel value",
                      output / "reverse_training_images.png")
    if "ties" in runs:
        plot_ties(runs["ties"], settings["alphabets"], output / "reverse_training_ties.png")


def main(_):
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    output, seed, data_dir = pathlib.Path(flags.FLAGS.output), flags.FLAGS.seed, flags.FLAGS.data_dir
    # Which runs there are is not a setting of one of them.
    folder = experiment.Folder(output, {name: value for name, value in settings.items() if name != "experiments"})
    runs = {name: folder.once(f"seed{seed}_{name}", lambda path: learn(name, settings, data_dir, seed, path))
            for name in settings["experiments"]}
    measured = folder.once("measured", lambda _: measure(settings, data_dir, seed))
    print(f"\nT = {settings['inner_steps']}, {settings['hyper_iterations']} hyper-iterations, seed {seed}\n"
          f"{table(runs)}\n\nOne hypergradient\n{method_table(runs)}\nResults and plots: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded(
        {"settings": settings, "seed": seed, "runs": runs, "measured": measured}, 4))
    plot(runs, measured, settings, output)


if __name__ == "__main__":
    program.run(main)

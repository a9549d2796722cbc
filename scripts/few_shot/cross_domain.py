r"""Few-shot learning of another domain: feature-wise transformations, off, fixed, learned exactly and by EvoGrad.

Four domains of 28 x 28 images: Omniglot, MNIST, Fashion-MNIST and the handwritten digits of scikit-learn, enlarged. A
convolutional embedding with prototypes learns from episodes (five ways, five shots) of three of them, and is tested on
the fourth. After each batch norm every channel is scaled and shifted by random numbers in training, whose strengths,
one of each for a channel, are the outer variables: after a training step on an episode of one domain the loss on an
episode of another one, without transformations, says how to change them.

    python scripts/few_shot/cross_domain.py --quick
    python scripts/few_shot/cross_domain.py --num_seeds=2

"exact" differentiates that training step, EvoGrad takes two perturbed copies of the weights in its place. "fixed" keeps
the strengths that both start from; "off" has none. Time and memory of a step are measured in a process of their own,
with one thread.

Reference: Bohdal et al., EvoGrad: efficient gradient-based meta-learning and hyperparameter optimization, 2021,
section 4.3; Tseng et al., Cross-domain few-shot classification via learned feature-wise transformation, 2020.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

DOMAINS = ("omniglot", "mnist", "fashion_mnist", "digits")
METHODS = ("off", "fixed", "exact", "evograd")
SETTINGS = ("domains", "methods", "filters", "blocks", "ways", "shots", "queries", "steps", "learning_rate",
            "outer_learning_rate", "perturbations", "sigma", "temperature", "test_episodes", "measured_filters",
            "measured_steps")
QUICK = {"filters": 4, "blocks": 2, "steps": 10, "test_episodes": 10, "domains": ["digits"],
         "measured_filters": ["4"], "measured_steps": 3}


def define_flags():
    experiment_flags.define_flags("results/cross_domain")
    program.define_names("domains", list(DOMAINS), DOMAINS, "What is tested on, each after training on the others.")
    program.define_names("methods", list(METHODS), METHODS, "What becomes of the strengths.")
    flags.DEFINE_integer("filters", 16, "Filters of each convolution.", lower_bound=1)
    flags.DEFINE_integer("blocks", 3, "Convolutions, each with strides of 2.", lower_bound=1)
    flags.DEFINE_integer("ways", 5, "Classes of an episode.", lower_bound=2)
    flags.DEFINE_integer("shots", 5, "Labelled examples of each class.", lower_bound=1)
    flags.DEFINE_integer("queries", 5, "Other examples of each class.", lower_bound=1)
    flags.DEFINE_integer("steps", 200, "Training steps, one episode each.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 5e-3, "Learning rate of Adam on the embedding.")
    flags.DEFINE_float("outer_learning_rate", 0.02, "Learning rate of Adam on the strengths.")
    flags.DEFINE_integer("perturbations", 2, "EvoGrad: copies of the weights.", lower_bound=2)
    flags.DEFINE_float("sigma", 1e-3, "EvoGrad: size of their perturbation.")
    flags.DEFINE_float("temperature", 0.05, "EvoGrad: temperature of the softmax over their losses.")
    flags.DEFINE_integer("test_episodes", 100, "Episodes of a test.", lower_bound=2)
    flags.DEFINE_list("measured_filters", ["16", "32", "64", "128"], "Filters of the networks that are timed, or none.")
    flags.DEFINE_integer("measured_steps", 10, "Steps that are timed.", lower_bound=1)
    flags.DEFINE_string("case", None, "JSON of the settings of a measurement, which this process makes and prints.")


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import data_sets, experiment, pictures
import farhox
from farhox import meta
from farhox.hypergradients import EvoGradHG

LABELS = {"off": "no transformations", "fixed": "fixed", "exact": "learned, exact", "evograd": "learned, EvoGrad"}
INITIAL = {"scale": 0.3, "shift": 0.5}  # Before the softplus, as published.
PER_CLASS = 200  # Images of each class of a domain with few classes.


def softplus(value):
    return float(np.log1p(np.exp(value)))


def load_domain(name, data_dir):
    """A list of uint8 arrays [images, 28, 28, 1], one of each class."""
    if name == "digits":
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        x = tf.image.resize(x.reshape(-1, 8, 8, 1) * (255 / 16), [28, 28]).numpy()
    elif name == "omniglot":
        _, _, (x, y) = meta.load_omniglot(data_dir, rotations=False)  # 323 characters are enough.
    else:
        (x, y), _ = data_sets.images(name, data_dir, (6000,), 0)
        x = 255 * x
    return [np.round(x[y == k][:PER_CLASS]).astype("uint8") for k in np.unique(y)]


def episode(classes, settings, random):
    """uint8 array [ways, shots + queries, 28, 28, 1]."""
    count = settings["shots"] + settings["queries"]
    chosen = random.choice(len(classes), settings["ways"], replace=False)
    return np.stack([classes[k][random.choice(len(classes[k]), count, replace=False)] for k in chosen])


def training_episodes(domains, settings, seed):
    """Pairs of an episode to train on and one of another domain to judge it by: two arrays with an axis of steps."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(settings["steps"]):
        seen, unseen = random.choice(len(domains), 2, replace=False)
        pairs.append([episode(domains[k], settings, random) for k in (seen, unseen)])
    return [np.stack(part) for part in zip(*pairs)]


class Embedding:
    """Convolutions with batch norm, transformations and ReLU, and the loss of an episode by the prototypes of classes.

    Batch norm has the statistics of the images of the episode, in training and in the test.
    """

    def __init__(self, settings, seed):
        filters = settings["filters"]
        self.ways, self.shots = settings["ways"], settings["shots"]
        self.strengths, self.blocks, channels = [], [], 1
        for block in range(1, settings["blocks"] + 1):
            scale, shift = (farhox.Hyperparameter(
                np.full(filters, softplus(INITIAL[kind])), low=0.0, name=f"{kind}_{block}") for kind in INITIAL)
            self.strengths += [scale, shift]
            layers = [keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False),
                      keras.layers.BatchNormalization(),
                      meta.FeatureWiseTransformation(scale, shift, seed=seed + block)]
            for layer in layers:
                layer.build((None, None, None, channels))
                channels = filters
            self.blocks.append(layers)
        layers = [layer for block in self.blocks for layer in block]
        self.variables = [v for layer in layers for v in layer.trainable_variables]
        self.state_variables = [v for layer in layers for v in layer.non_trainable_variables]

    def switch(self, on):
        """Sets the strengths to where they start, or to nothing."""
        for strength in self.strengths:
            kind = strength.name.split("_")[0]
            strength.assign(np.full(strength.variable.shape, softplus(INITIAL[kind]) if on else 1e-6))

    def __call__(self, images, transformed):
        """Squared distances of the queries to the prototypes, with a minus sign: [ways, queries, ways]."""
        x = keras.ops.cast(keras.ops.reshape(images, [-1, 28, 28, 1]), "float32") / 255
        for convolution, norm, transformation in self.blocks:
            x = norm(convolution(x), training=True)
            x = keras.ops.relu(transformation(x, training=transformed))
        features = keras.ops.reshape(x, [self.ways, images.shape[1], -1]) / x.shape[-1]
        prototypes = keras.ops.mean(features[:, :self.shots], axis=1)
        apart = features[:, self.shots:, None, :] - prototypes[None, None]
        return -keras.ops.sum(keras.ops.square(apart), axis=-1)

    def loss(self, images, transformed):
        scores = keras.ops.log_softmax(self(images, transformed))
        return -keras.ops.mean(keras.ops.sum(scores * keras.ops.eye(self.ways)[:, None, :], axis=-1))


def make_optimizer(embedding, method, settings):
    problem = farhox.BilevelProblem(
        lambda images: embedding.loss(images, True), lambda images: embedding.loss(images, False),
        embedding.variables, embedding.strengths, dynamics=farhox.Adam(settings["learning_rate"]),
        state_variables=embedding.state_variables)
    evograd = EvoGradHG(settings["perturbations"], settings["sigma"], settings["temperature"], at_start=True)
    optimizer = farhox.HyperOptimizer(problem, evograd if method == "evograd" else farhox.ReverseHG(), online=True)
    # EvoGrad's hypergradients are smaller than the epsilon that Adam has by default.
    optimizer.compile(keras.optimizers.Adam(settings["outer_learning_rate"], epsilon=1e-12))
    return optimizer


class Trainings:
    """All trainings of one embedding: compiled once, each with initial values of its own."""

    def __init__(self, settings):
        self.settings = settings
        self.embedding = Embedding(settings, 0)
        self.optimizers = {method: make_optimizer(self.embedding, method, settings) for method in ("exact", "evograd")}
        self.predict = tf.function(lambda images: self.embedding(images, False), autograph=False)
        everything = [v for optimizer in self.optimizers.values()
                      for v in (*optimizer.variables, *optimizer.optimizer.variables)]
        self.initial = [(v, v.numpy()) for v in everything]

    def fresh(self, seed, method):
        """The optimizer of a method, with new initial weights."""
        for variable, value in self.initial:
            variable.assign(value)
        draw = keras.initializers.GlorotUniform(seed)
        for variable in self.embedding.variables:
            if len(variable.shape) == 4:
                variable.assign(draw(variable.shape))
        self.embedding.switch(method != "off")
        return self.optimizers["evograd" if method == "evograd" else "exact"]

    def train(self, domains, tested, method, seed, folder):
        """One training without a domain, and the test on it."""
        steps = self.settings["steps"]
        optimizer = self.fresh(seed, method)
        seen, unseen = training_episodes([domains[name] for name in DOMAINS if name != tested], self.settings, seed)
        result = {}
        if method in ("off", "fixed"):
            losses = optimizer.train_inner(tf.constant(seen)).numpy()
        else:
            every = max(1, steps // 10)
            history = experiment.fit_resumable(
                optimizer, tf.data.Dataset.from_tensor_slices((seen[:, None], unseen)), steps // every * every, folder,
                steps_per_epoch=every)
            losses, result["time_before"] = history["inner_loss"], history.pop("time_before")
        strengths = {strength.name: strength.numpy().tolist() for strength in self.embedding.strengths}
        return {**result, "last_loss": float(np.mean(losses[-max(1, len(losses) // 10):])), "strengths": strengths,
                **self.test(domains[tested])}

    def test(self, classes):
        """Accuracy on episodes of a domain, and half of its 95 % interval; the episodes are the same for all."""
        random, accuracies = np.random.default_rng(10_000), []
        for _ in range(self.settings["test_episodes"]):
            best = np.argmax(self.predict(tf.constant(episode(classes, self.settings, random))), -1)
            accuracies.append(np.mean(best == np.arange(self.settings["ways"])[:, None]))
        mean, interval = meta.mean_and_interval(accuracies)
        return {"accuracy": float(mean), "interval": float(interval)}


def measure(settings):
    """Time and memory of a step in this process, on random images."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    random, method = np.random.default_rng(0), settings["method"]
    shape = [settings["ways"], settings["shots"] + settings["queries"], 28, 28, 1]
    data = tf.data.Dataset.from_tensors((random.integers(0, 256, [1, *shape]).astype("uint8"),
                                         random.integers(0, 256, shape).astype("uint8"))).repeat()
    embedding = Embedding(settings, 0)
    optimizer = make_optimizer(embedding, method, settings)
    inner = next(iter(data))[0]

    def run(steps):
        if method == "fixed":
            for _ in range(steps):
                optimizer.train_inner(inner)
        else:
            optimizer.fit(data, steps_per_epoch=steps, verbose=0)

    return {"filters": settings["filters"], "method": method,
            "parameters": sum(int(np.prod(v.shape)) for v in embedding.variables),
            **experiment.cost_of_steps(run, settings["measured_steps"])}


def table(by_seed, settings):
    rows = []
    for tested in settings["domains"]:
        rows.append([tested, *(experiment.mean_and_range([100 * runs[f"{tested} {method}"]["accuracy"]
                                                          for runs in by_seed.values()], "{:.1f}")
                               for method in settings["methods"])])
    means = [np.mean([100 * runs[f"{tested} {method}"]["accuracy"] for runs in by_seed.values()
                      for tested in settings["domains"]]) for method in settings["methods"]]
    rows.append(["mean", *(f"{mean:.1f}" for mean in means)])
    return experiment.markdown_table(["tested on", *(LABELS[method] for method in settings["methods"])], rows)


def cost_table(measured):
    return experiment.markdown_table(
        ["filters", "weights", "strengths", "CPU ms per step", "MB per step"],
        [[str(row["filters"]), f"{row['parameters']:,}", LABELS[row["method"]], f"{1000 * row['seconds_per_step']:.1f}",
          f"{row['step_mb']:.1f}"] for row in measured["rows"]])


def plot(by_seed, measured, settings, path):
    """Accuracy by the domain that is tested on, and the strengths that were learned."""
    styles = pictures.point_styles(METHODS)
    seeds, places = list(by_seed), np.arange(len(settings["domains"]))
    with pictures.figure(path, columns=2, size=(8.8, 3.9)) as (accuracy, strengths):
        for i, method in enumerate(settings["methods"]):
            values = 100 * np.array([[by_seed[seed][f"{tested} {method}"]["accuracy"] for tested in settings["domains"]]
                                     for seed in seeds])
            intervals = 100 * np.mean([[by_seed[seed][f"{tested} {method}"]["interval"]
                                        for tested in settings["domains"]] for seed in seeds], axis=0)
            accuracy.errorbar(places + 0.15 * (i - 1.5), values.mean(0), intervals, linestyle="", capsize=2,
                              label=LABELS[method], **styles[method])
        accuracy.set(title="Tested on a domain that was left out", ylabel="Accuracy, %", xlabel="Domain")
        pictures.whole_numbers_of_y(accuracy)
        accuracy.set_xticks(places, [name.replace("_", "-\n") for name in settings["domains"]])
        for method in ("exact", "evograd"):
            if method in settings["methods"]:
                runs = [by_seed[seed][f"{tested} {method}"]["strengths"] for seed in seeds
                        for tested in settings["domains"]]
                for kind, line in (("scale", "-"), ("shift", "--")):
                    means = [[np.mean(run[f"{kind}_{block}"]) for block in range(1, settings["blocks"] + 1)]
                             for run in runs]
                    strengths.plot(range(1, settings["blocks"] + 1), np.mean(means, axis=0), linestyle=line,
                                   label=f"{kind}, {LABELS[method].split(', ')[1]}", **styles[method])
        for kind, value in INITIAL.items():
            strengths.axhline(softplus(value), color=pictures.GREY, linewidth=0.8)
            strengths.annotate(f"start of the {kind}", (1.0, softplus(value)), xycoords=("axes fraction", "data"),
                               ha="right", va="bottom", fontsize=8, color=pictures.GREY)
        strengths.set(title="Learned strengths, means", xlabel="Block", ylabel="Strength")
        pictures.whole_numbers(strengths)
        pictures.legend_below(accuracy, columns=2)
        pictures.legend_below(strengths, columns=2)


def main(_):
    if flags.FLAGS.case is not None:
        print(json.dumps(measure(json.loads(flags.FLAGS.case))))
        return
    program.require(matplotlib="examples", sklearn="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    output = pathlib.Path(flags.FLAGS.output)
    # Which runs there are is not a setting of one of them.
    folder = experiment.Folder(output, {name: value for name, value in settings.items()
                                        if name not in ("domains", "methods", "measured_filters")})
    domains = {name: load_domain(name, flags.FLAGS.data_dir) for name in DOMAINS}
    trainings = Trainings(settings)
    by_seed = {seed: {f"{tested} {method}": folder.once(
        f"seed{seed}_{tested}_{method}", lambda path: trainings.train(domains, tested, method, seed, path))
        for tested in settings["domains"] for method in settings["methods"]} for seed in experiment_flags.seeds()}
    # Each in a process of its own: what one leaves behind would hide what the next one takes.
    measured = {"rows": [folder.once(f"measured_{filters}_{method}", lambda _: experiment.measured_apart(
        __file__, {**settings, "filters": int(filters), "method": method}))
        for filters in settings["measured_filters"] for method in ("fixed", "exact", "evograd")]}
    print(f"\n{settings['ways']} ways, {settings['shots']} shots, {settings['steps']} steps, {len(by_seed)} seed(s), "
          f"accuracy in %: mean (least to greatest)\n{table(by_seed, settings)}\n\n{cost_table(measured)}\n"
          f"Results and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded(
        {"settings": settings, "seeds": by_seed, "measured": measured}, 4))
    plot(by_seed, measured, settings, output / "cross_domain.png")


if __name__ == "__main__":
    program.run(main)

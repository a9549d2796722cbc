"""Which sums of inner gradients make a good meta-update, and what FOMAML and Reptile need of their inner mini-batches.

    python scripts/few_shot/first_order_study.py --quick
    python scripts/few_shot/first_order_study.py

An inner training takes gradients g_1, ..., g_T of mini-batches; the meta-update is a sum of some of them. The first
part compares sums over four disjoint mini-batches. The second compares Reptile (the sum of all), FOMAML with a separate
tail (the last one, of examples that no other mini-batch has) and with a shared tail (the last one, of the same ones):
mini-batches that go through all examples in turn against mini-batches drawn with replacement, for several numbers of
inner steps and batch sizes. The outer optimizer is Adam, to which the length of a sum does not matter.

Reference: Nichol et al., On first-order meta-learning algorithms, 2018, sections 6.2 and 6.3.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

SETTINGS = ("ways", "shots", "pool", "tail", "meta_batch_size", "meta_steps", "inner_learning_rate", "batch_size",
            "inner_steps", "batch_sizes", "outer_learning_rate", "filters", "evaluation_steps", "test_episodes")
QUICK = {"meta_steps": 20, "filters": 4, "inner_steps": ["4"], "batch_sizes": ["5"], "test_episodes": 20,
         "meta_batch_size": 2}
STEPS = 4
METHODS = {"reptile": "Reptile", "fomaml_separate": "FOMAML, separate tail", "fomaml_shared": "FOMAML, shared tail"}


def define_flags():
    experiment_flags.define_flags("results/first_order_study")
    flags.DEFINE_integer("ways", 5, "Classes in an episode.", lower_bound=2)
    flags.DEFINE_integer("shots", 5, "Support examples per class in the test.", lower_bound=1)
    flags.DEFINE_integer("pool", 12, "Examples per class that mini-batches are made of.", lower_bound=1)
    flags.DEFINE_integer("tail", 5, "Further examples per class for the last mini-batch, where it is separate.",
                         lower_bound=1)
    flags.DEFINE_integer("meta_batch_size", 5, "Episodes in a meta-step.", lower_bound=1)
    flags.DEFINE_integer("meta_steps", 200, "Meta-steps of each training, a multiple of 10.", lower_bound=10)
    flags.DEFINE_float("inner_learning_rate", 0.1, "Learning rate of gradient descent.", lower_bound=0.0)
    flags.DEFINE_integer("batch_size", 15, f"Examples in a mini-batch; {STEPS} of them come from the pool.",
                         lower_bound=1)
    flags.DEFINE_list("inner_steps", ["2", "4", "8"], f"Numbers of inner steps, {STEPS} among them.")
    flags.DEFINE_list("batch_sizes", ["5", "25"], "Further sizes of mini-batches, at most that of the tail.")
    flags.DEFINE_float("outer_learning_rate", 3e-3, "Learning rate of Adam.", lower_bound=0.0)
    flags.DEFINE_integer("filters", 16, "Filters of each of the four convolutions.", lower_bound=1)
    flags.DEFINE_integer("evaluation_steps", 5, "Full-batch inner steps in the test.", lower_bound=1)
    flags.DEFINE_integer("test_episodes", 200, "Episodes of each test, a multiple of 10.", lower_bound=10)


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import tensorflow as tf

from _shared import experiment, pictures
import farhox
from farhox import meta
from farhox.hypergradients import ReptileHG
from farhox.meta.statistics import query_call



def sums_of_gradients():
    """Weights of g_1, g_2, ... by name: each alone, and the sums up to each."""
    sums = {}
    for count in range(1, STEPS + 1):
        sums[f"g{count}"] = (0,) * (count - 1) + (1,)
        if count > 1:
            sums["+".join(f"g{i + 1}" for i in range(count))] = (1,) * count
    return sums


def variants(settings):
    """All trainings by name: weights of the steps, batch size, with replacement or not, separate tail or not."""
    size = settings["batch_size"]
    made = {f"sum_{name}": (weights, size, False, False) for name, weights in sums_of_gradients().items()}
    cases = [(STEPS, size, True), *((int(steps), size, False) for steps in settings["inner_steps"]),
             *((STEPS, int(other), False) for other in settings["batch_sizes"])]
    for method in METHODS:
        for steps, batch, replacement in cases:
            weights = (1,) * steps if method == "reptile" else (0,) * (steps - 1) + (1,)
            made[variant_name(method, steps, batch, replacement)] = (
                weights, batch, replacement, method == "fomaml_separate")
    return made


def variant_name(method, steps, batch, replacement=False):
    return f"{method}_steps{steps}_batch{batch}" + ("_replacement" if replacement else "")


def mini_batches(settings, steps, batch, replacement, separate, seed):
    """A function from numbered meta-batches of episodes to (inner batches [episodes, steps, batch, ...], outer batch).

    The pool is the support set, the separate tail the query set. All episodes of a meta-batch have the same places.
    """
    pool, tail = settings["ways"] * settings["pool"], settings["ways"] * settings["tail"]
    count = steps - 1 if separate else steps

    def places(number):
        seeds = tf.random.split([seed, number], 2)
        if replacement:
            chosen = tf.random.stateless_uniform([count * batch], seeds[0], 0, pool, tf.int32)
        else:
            passes = -(-count * batch // pool)
            keys = tf.random.stateless_uniform([passes, pool], seeds[0])
            chosen = tf.reshape(tf.argsort(keys), [-1])[:count * batch]
        if separate:
            last = tf.argsort(tf.random.stateless_uniform([tail], seeds[1]))[:batch]
            chosen = tf.concat([chosen, pool + last], axis=0)
        return tf.reshape(chosen, [steps, batch])

    def element(number, episodes):
        support, query = episodes
        chosen = places(number)
        inner = [tf.gather(tf.concat(both, axis=1), chosen, axis=1) for both in zip(support, query)]
        return tuple(inner), ((support[0], query[0]), query[1])

    return element


def run(settings, parts, variant, seed, folder):
    """Trains initial weights and tests them after gradient descent on the support sets of new tasks."""
    weights, batch, replacement, separate = variant
    train, test = (
        meta.ClassificationEpisodes(*part, settings["ways"], shots, queries, seed=seed)
        for part, shots, queries in ((parts[0], settings["pool"], settings["tail"]), (parts[2], settings["shots"], 5)))
    keras.utils.set_random_seed(seed)
    model = meta.few_shot_classifier(settings["ways"], meta.convolutional_body(filters=settings["filters"]))
    rate = settings["inner_learning_rate"]
    problem = farhox.supervised_problem(model, dynamics=farhox.GradientDescent(rate), learn_initialization=True,
                                        outer_call=query_call(model, transductive=True))
    optimizer = farhox.HyperOptimizer(problem, ReptileHG(weights))
    optimizer.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(
        settings["outer_learning_rate"], settings["meta_steps"])))
    dataset = train.dataset(settings["meta_batch_size"]).enumerate().map(
        mini_batches(settings, len(weights), batch, replacement, separate, seed))
    history = experiment.fit_resumable(
        optimizer, dataset, settings["meta_steps"], folder, steps_per_epoch=10, save_every=60.0)
    judge = meta.JointTraining(model, rate, settings["evaluation_steps"])
    return {"test": judge.evaluate(test, settings["test_episodes"]), "inner_loss": history["inner_loss"],
            "time_before": history["time_before"]}


def accuracies(by_seed, name):
    return [100 * runs[name]["test"]["accuracy"] for runs in by_seed.values()]


def tables(by_seed, settings):
    """Accuracies of the sums, and of the methods in all cases."""
    def cell(name):
        return experiment.mean_and_range(accuracies(by_seed, name), "{:.1f}")

    sums = experiment.markdown_table(
        ["meta-update", "test accuracy, %"], [[name, cell(f"sum_{name}")] for name in sums_of_gradients()])
    size = settings["batch_size"]
    cases = [(STEPS, size, True, "with replacement")]
    cases += [(int(steps), size, False, f"{steps} steps") for steps in settings["inner_steps"]]
    cases += [(STEPS, int(batch), False, f"batches of {batch}") for batch in settings["batch_sizes"]]
    rows = [[label, *(cell(variant_name(method, *case)) for method in METHODS)] for *case, label in cases]
    return sums + "\n\n" + experiment.markdown_table(["mini-batches", *METHODS.values()], rows)


def plot(by_seed, settings, path):
    """Sums of gradients; mini-batches, numbers of inner steps and batch sizes for each method."""
    def mean(name):
        values = accuracies(by_seed, name)
        return sum(values) / len(values)

    size, sizes = settings["batch_size"], sorted({settings["batch_size"], *map(int, settings["batch_sizes"])})
    with pictures.figure(path, rows=2, columns=2, size=(7.8, 6.4)) as (sums, draws, steps, batches):
        names = list(sums_of_gradients())
        for place, name in enumerate(names):
            value = mean(f"sum_{name}")
            sums.plot(value, place, color=pictures.BLACK, marker="D" if "+" in name else "x")
            sums.annotate(f"{value:.1f}", (value, place), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        sums.set(title="Sums of inner gradients", xlabel="Test accuracy, %", yticks=range(len(names)))
        sums.set_yticklabels(names)
        sums.invert_yaxis()
        sums.margins(x=0.12, y=0.12)
        counts = sorted(map(int, settings["inner_steps"]))
        styles, lines = pictures.point_styles(METHODS), pictures.line_styles(METHODS)
        for method, label in METHODS.items():
            style = {**styles[method], **lines[method], "label": label}
            draws.plot([0, 1], [mean(variant_name(method, STEPS, size, again)) for again in (False, True)], **style)
            steps.plot(counts, [mean(variant_name(method, count, size)) for count in counts], **style)
            batches.plot(sizes, [mean(variant_name(method, STEPS, batch)) for batch in sizes], **style)
        draws.set(title=f"How {STEPS} mini-batches of {size} are drawn", xticks=[0, 1], xlim=(-0.4, 1.4))
        draws.set_xticklabels(["in turn", "with replacement"])
        steps.set(title="Number of inner steps", xlabel="Inner steps", xticks=counts)
        batches.set(title="Size of a mini-batch", xlabel="Examples in a mini-batch", xticks=sizes)
        for axis in (draws, steps, batches):
            axis.set_ylabel("Test accuracy, %")
        pictures.legend_of_figure([draws], columns=3)


def main(_):
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    pool, tail = (settings["ways"] * settings[name] for name in ("pool", "tail"))
    if str(STEPS) not in settings["inner_steps"] or STEPS * settings["batch_size"] > pool or tail < max(
            settings["batch_size"], *map(int, settings["batch_sizes"])):
        raise SystemExit(f"--inner_steps must hold {STEPS}, the pool {STEPS} disjoint mini-batches and the tail one. "
                         f"Received: {settings['inner_steps']}, {pool} and {tail} examples, mini-batches of "
                         f"{settings['batch_size']} and {settings['batch_sizes']}")
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    parts = meta.load_omniglot(flags.FLAGS.data_dir)
    by_seed = {seed: {name: folder.once(
        f"{name}_seed{seed}", lambda path: run(settings, parts, variant, seed, path))
        for name, variant in variants(settings).items()} for seed in experiment_flags.seeds()}
    print(f"\n{len(by_seed)} seed(s): mean (least to greatest)\n{tables(by_seed, settings)}\n"
          f"Results and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": by_seed}))
    plot(by_seed, settings, output / "first_order_study.png")


if __name__ == "__main__":
    program.run(main)

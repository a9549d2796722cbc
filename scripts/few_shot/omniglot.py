"""Few-shot classification of Omniglot's characters by one of the learners of farhox.meta.

    python scripts/omniglot.py --algorithm=maml --quick
    python scripts/omniglot.py --flagfile=scripts/flags/omniglot_maml.cfg

Characters are split into 1,200 for meta-training, 100 for meta-validation and 323 for meta-test, with rotations as
classes of their own. Episode k of a seed is always the same, so that a run that was interrupted at any moment goes on
with the same command and ends with the same weights. Accuracies are means over test episodes with 95 % intervals, for
batch-norm statistics of the queries (transductive) and of the support set.
"""

import pathlib

import experiment  # First: it sets TensorFlow's log level.
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import farhox
from farhox import meta

ALGORITHMS = ("maml", "fomaml", "anil", "imaml", "reptile", "hyper_representation", "joint", "protonet")
SETTINGS = (
    "algorithm", "ways", "shots", "queries", "train_shots", "meta_batch_size", "meta_steps", "steps_per_epoch",
    "inner_steps", "evaluation_steps", "inner_learning_rate", "greatest_inner_learning_rate", "inner_batch_size",
    "outer_learning_rate", "decay", "clipnorm", "learn_learning_rates", "proximal", "damping", "linear_solver_steps",
    "filters", "downsampling", "normalize_features", "transductive", "validation_episodes", "test_episodes")
QUICK = {"meta_steps": 40, "steps_per_epoch": 20, "filters": 8, "validation_episodes": 20, "test_episodes": 40}


def define_flags():
    experiment.define_flags("results/omniglot")
    flags.DEFINE_enum("algorithm", "maml", ALGORITHMS, "Learner.")
    flags.DEFINE_integer("ways", 5, "Classes in an episode.", lower_bound=2)
    flags.DEFINE_integer("shots", 1, "Support examples per class.", lower_bound=1)
    flags.DEFINE_integer("queries", 15, "Query examples per class.", lower_bound=1)
    flags.DEFINE_integer("train_shots", None, "Support examples per class in meta-training. Default: shots.",
                         lower_bound=1)
    flags.DEFINE_integer("meta_batch_size", 4, "Episodes in a meta-step.", lower_bound=1)
    flags.DEFINE_integer("meta_steps", 10000, "Updates of the outer variables; a multiple of steps_per_epoch.",
                         lower_bound=1)
    flags.DEFINE_integer("steps_per_epoch", 200, "Meta-steps between two validations.", lower_bound=1)
    flags.DEFINE_integer("inner_steps", 5, "Inner steps in meta-training.", lower_bound=1)
    flags.DEFINE_integer("evaluation_steps", None, "Inner steps in validation and test. Default: inner_steps.",
                         lower_bound=1)
    flags.DEFINE_float("inner_learning_rate", 0.1, "Learning rate of the inner steps.", lower_bound=0.0)
    flags.DEFINE_float("greatest_inner_learning_rate", None, "Bound of the learned rate (hyper_representation).",
                       lower_bound=0.0)
    flags.DEFINE_integer("inner_batch_size", None, "Support examples in an inner batch (reptile). Default: all.",
                         lower_bound=1)
    flags.DEFINE_float("outer_learning_rate", 1e-3, "Learning rate of Adam, or reptile's step size.", lower_bound=0.0)
    flags.DEFINE_enum("decay", "cosine", ["none", "linear", "cosine"], "How the outer learning rate falls to zero.")
    flags.DEFINE_float("clipnorm", None, "Norm that longer meta-gradients are shortened to.", lower_bound=0.0)
    flags.DEFINE_bool("learn_learning_rates", False, "One learned inner learning rate per weight (maml, fomaml, anil).")
    flags.DEFINE_float("proximal", 2.0, "Strength of the proximal term (imaml).", lower_bound=0.0)
    flags.DEFINE_float("damping", 0.0, "Damping of the linear system (imaml).", lower_bound=0.0)
    flags.DEFINE_integer("linear_solver_steps", 5, "Steps of conjugate gradient (imaml).", lower_bound=1)
    flags.DEFINE_integer("filters", 64, "Filters of each of the four convolutions.", lower_bound=1)
    flags.DEFINE_enum("downsampling", "stride", ["stride", "pool"], "How the convolutions halve the image.")
    flags.DEFINE_bool("normalize_features", False, "Features of length 1.")
    flags.DEFINE_bool("transductive", True, "Batch-norm statistics of the queries in meta-training and validation.")
    flags.DEFINE_integer("validation_episodes", 100, "Episodes of a validation.", lower_bound=1)
    flags.DEFINE_integer("test_episodes", 600, "Episodes of the test.", lower_bound=1)
    flags.DEFINE_float("save_every", 60.0, "Seconds between two saved states.", lower_bound=0.0)
    flags.DEFINE_bool("tensorboard", False, "Write logs for TensorBoard to the folder `tensorboard` of --output.")


def network(settings):
    body = meta.convolutional_body(
        filters=settings["filters"], downsampling=settings["downsampling"],
        normalize_features=settings["normalize_features"])
    if settings["algorithm"] in ("protonet", "hyper_representation"):
        return body
    return meta.few_shot_classifier(settings["ways"], body)


def make_learner(settings, model, transductive):
    """The learner of the settings on a given network."""
    steps = settings["inner_steps"]
    common = {"transductive": transductive, "evaluation_steps": settings["evaluation_steps"] or steps}
    rate = settings["inner_learning_rate"]
    algorithm = settings["algorithm"]
    if algorithm in ("maml", "fomaml", "anil"):
        common.update(inner_learning_rate=rate, inner_steps=steps, first_order=algorithm == "fomaml",
                      learn_learning_rates=settings["learn_learning_rates"])
        return meta.ANIL(model, **common) if algorithm == "anil" else meta.MAML(model, **common)
    if algorithm == "imaml":
        return meta.IMAML(model, rate, steps, settings["proximal"], **common,
                          linear_solver=farhox.ConjugateGradient(max_steps=settings["linear_solver_steps"]),
                          damping=settings["damping"])
    if algorithm == "reptile":
        dynamics = farhox.KerasDynamics(keras.optimizers.Adam(rate, beta_1=0.0))
        return meta.Reptile(model, dynamics, steps, settings["inner_batch_size"], **common)
    if algorithm == "hyper_representation":
        head = keras.layers.Dense(settings["ways"], activation="softmax")
        bound = settings["greatest_inner_learning_rate"]
        rate = farhox.Hyperparameter(rate, low=0.0, high=bound, log=bound is None, name="inner_learning_rate")
        return meta.HyperRepresentation(model, head, rate, steps, **common)
    if algorithm == "joint":
        return meta.JointTraining(model, rate, **common)
    return meta.PrototypicalNetwork(model, settings["ways"])


def compile_learner(learner, settings):
    rate = settings["outer_learning_rate"]
    if settings["decay"] == "linear":
        rate = keras.optimizers.schedules.PolynomialDecay(rate, settings["meta_steps"], 0.0)
    elif settings["decay"] == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, settings["meta_steps"])
    sgd = settings["algorithm"] == "reptile"
    make = keras.optimizers.SGD if sgd else keras.optimizers.Adam
    optimizer = make(rate, global_clipnorm=settings["clipnorm"])
    if isinstance(learner, meta.PrototypicalNetwork):
        learner.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        optimizer.build(learner.trainable_variables)  # Before a saved state is read.
    else:
        learner.compile(optimizer, metrics=["accuracy"])


def sources(settings, data_dir, seed):
    """Episodes of meta-training, meta-validation and meta-test."""
    shots = settings["shots"]
    made = []
    for part, count in zip(meta.load_omniglot(data_dir), (settings["train_shots"] or shots, shots, shots)):
        queries = min(settings["queries"], 20 - count)  # There are 20 drawings of each character.
        made.append(meta.ClassificationEpisodes(*part, settings["ways"], count, queries, seed=seed))
    return made


def run_seed(settings, data_dir, seed, folder, logs, weights):
    """One training and its test; the learned weights are kept in the file `weights`."""
    train, validation, test = sources(settings, data_dir, seed)
    keras.utils.set_random_seed(seed)
    model = network(settings)
    learner = make_learner(settings, model, settings["transductive"])
    compile_learner(learner, settings)

    def observe():
        result = learner.evaluate(validation, settings["validation_episodes"])
        return {"validation_loss": result["loss"], "validation_accuracy": result["accuracy"]}

    callbacks = [keras.callbacks.TensorBoard(logs, write_graph=False)] if logs else []
    history = experiment.fit_resumable(
        learner, train.dataset(settings["meta_batch_size"]), settings["meta_steps"], folder, observe=observe,
        save_every=flags.FLAGS.save_every, steps_per_epoch=settings["steps_per_epoch"], callbacks=callbacks)
    learner.save_weights(weights)
    judges = [learner]
    if not isinstance(learner, meta.PrototypicalNetwork):
        other = make_learner(settings, network(settings), not settings["transductive"])
        compile_learner(other, settings)
        other.load_weights(weights)
        judges.append(other)
    results = {}
    for judge in judges:
        result = judge.evaluate(test, settings["test_episodes"])
        results["transductive" if result["transductive"] else "support statistics"] = result
    return {"test": results, "history": history, "time_before": history.pop("time_before")}


def table(settings, by_seed):
    rows = []
    for form in next(iter(by_seed.values()))["test"]:
        results = [run["test"][form] for run in by_seed.values()]
        rows.append([settings["algorithm"], f"{settings['ways']} ways, {settings['shots']} shots", form,
                     experiment.mean_and_range([100 * result["accuracy"] for result in results]),
                     experiment.mean_and_range([100 * result["accuracy_interval"] for result in results]),
                     *(experiment.mean_and_range([run[clock] / 60 for run in by_seed.values()], "{:.0f}")
                       for clock in ("seconds", "cpu_seconds"))])
    return experiment.markdown_table(
        ["", "episodes", "batch norm", "test accuracy, %", "95 % interval, ±", "minutes", "CPU minutes"], rows)


def plot_curves(settings, by_seed, path):
    """Accuracy and loss of meta-training and meta-validation."""
    with experiment.figure(path, columns=2, size=(10, 3.6)) as (accuracy, loss):
        for i, (seed, run) in enumerate(by_seed.items()):
            history = run["history"]
            steps = settings["steps_per_epoch"] * np.arange(1, len(history["loss"]) + 1)
            for axis, key, scale in ((accuracy, "accuracy", 100), (loss, "loss", 1)):
                for name, color in ((key, experiment.GREY), (f"validation_{key}", experiment.BLUE)):
                    label = "meta-training" if name == key else "meta-validation"
                    axis.plot(steps, scale * np.array(history[name]), color=color, linewidth=1,
                              label=label if i == 0 else None)
        accuracy.set(title=f"{settings['algorithm']}, {settings['ways']} ways, {settings['shots']} shots",
                     xlabel="Meta-step", ylabel="Query accuracy, %")
        loss.set(xlabel="Meta-step", ylabel="Query loss", yscale="log")
        loss.legend()


def plot_episodes(source, path, count=3, shown=5):
    """The first episodes of a source: support examples on the left, queries on the right of each."""
    with experiment.figure(path, columns=count, size=(3.2 * count, 3)) as axes:
        for index, axis in enumerate(np.atleast_1d(axes)):
            support, query = source.draw(tf.constant(index, tf.int64))
            rows = []
            for way in range(source.ways):
                own = support[0][way * source.shots:(way + 1) * source.shots][:shown]
                queries = query[0][way * source.queries:(way + 1) * source.queries][:shown]
                gap = np.full([28, 6], 0.5)
                rows.append(np.concatenate([*own.numpy()[..., 0], gap, *queries.numpy()[..., 0]], axis=1))
            axis.imshow(1 - np.concatenate(rows), cmap="gray")
            axis.set(title=f"Episode {index}: support | queries", xticks=[], yticks=[])
            axis.grid(False)


def main(_):
    experiment.require(matplotlib="examples")
    settings = experiment.settings(SETTINGS, QUICK)
    if settings["meta_steps"] % settings["steps_per_epoch"]:
        raise SystemExit(f"--meta_steps must be a multiple of --steps_per_epoch. Received: {settings['meta_steps']} "
                         f"and {settings['steps_per_epoch']}")
    output, data_dir = pathlib.Path(flags.FLAGS.output), flags.FLAGS.data_dir
    folder = experiment.Folder(output, settings)
    by_seed = {}
    for seed in experiment.seeds():
        logs = str(output / "tensorboard" / f"seed{seed}") if flags.FLAGS.tensorboard else None
        by_seed[seed] = folder.once(
            f"seed{seed}", lambda path: run_seed(
                settings, data_dir, seed, path, logs, output / f"seed{seed}.weights.h5"))
    print(f"\n{len(by_seed)} seed(s), {settings['test_episodes']} test episodes each: mean (least to greatest)\n"
          f"{table(settings, by_seed)}\nResults and plots: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": by_seed}))
    plot_curves(settings, by_seed, output / "omniglot.png")
    plot_episodes(sources(settings, data_dir, flags.FLAGS.seed)[2], output / "episodes.png")


if __name__ == "__main__":
    define_flags()
    app.run(main)

r"""Few-shot classification of Omniglot's characters by one of the learners of farhox.meta.

    python scripts/few_shot/omniglot.py --algorithm=maml --quick
    python scripts/few_shot/omniglot.py \
        --flagfile=scripts/few_shot/flags/omniglot_maml.cfg

Characters are split into 1,200 for meta-training, 100 for meta-validation and 323 for meta-test, with rotations as
classes of their own. Episode k of a seed is always the same, so that a run that was interrupted at any moment goes on
with the same command and ends with the same weights. Accuracies are means over test episodes with 95 % intervals, for
batch-norm statistics of the queries (transductive) and of the support set.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program
from _shared.omniglot_flags import QUICK, SETTINGS, define_flags


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import experiment, pictures
from _shared.omniglot_learner import compile_learner, make_learner, network, sources
from farhox import meta

NAMES = {"maml": "MAML", "fomaml": "FOMAML", "anil": "ANIL", "imaml": "iMAML", "reptile": "Reptile",
         "hyper_representation": "Hyper-representation", "joint": "Joint training", "protonet": "Prototypical network"}


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
    with pictures.figure(path, columns=2, size=(7.8, 3.4)) as (accuracy, loss):
        styles = pictures.line_styles(["validation_", ""])
        for i, run in enumerate(by_seed.values()):
            history = run["history"]
            steps = settings["steps_per_epoch"] * np.arange(1, len(history["accuracy"]) + 1)
            of_training = "loss" if settings["algorithm"] == "protonet" else "outer_loss"  # It has no inner one.
            for axis, key, scale in ((accuracy, "accuracy", 100), (loss, "loss", 1)):
                for part, style in styles.items():
                    name = f"{part}{key}" if part or key != "loss" else of_training
                    label = "meta-validation" if part else "meta-training"
                    axis.plot(steps, scale * np.array(history[name]), linewidth=1.2, label=None if i else label,
                              **style)
        shots = f"{settings['shots']} shot{'s' if settings['shots'] > 1 else ''}"
        accuracy.set(title=f"{NAMES[settings['algorithm']]}, {settings['ways']} ways, {shots}",
                     xlabel="Meta-steps", ylabel="Query accuracy, %")
        loss.set(xlabel="Meta-steps", ylabel="Query loss")
        pictures.logarithmic(loss)
        pictures.whole_numbers(accuracy, loss)
        pictures.legend_of_figure([accuracy], columns=2)


def plot_episodes(source, path, count=3, shown=5):
    """The first episodes of a source: support examples on the left, queries on the right of each."""
    with pictures.figure(path, columns=count, size=(3.2 * count, 3)) as axes:
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
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    if settings["meta_steps"] % settings["steps_per_epoch"]:
        raise SystemExit(f"--meta_steps must be a multiple of --steps_per_epoch. Received: {settings['meta_steps']} "
                         f"and {settings['steps_per_epoch']}")
    output, data_dir = pathlib.Path(flags.FLAGS.output), flags.FLAGS.data_dir
    folder = experiment.Folder(output, settings)
    by_seed = {}
    for seed in experiment_flags.seeds():
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
    program.run(main)

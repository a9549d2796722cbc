"""Few-shot regression of sinusoids: MAML beside joint training of one network on all tasks.

    python scripts/few_shot/sinusoid.py --quick
    python scripts/few_shot/sinusoid.py --num_seeds=3

A task is a curve y = a sin(x - b); a learner sees `shots` of its points, takes a few gradient steps and is judged by
its squared error elsewhere.

Reference: Finn et al., Model-agnostic meta-learning for fast adaptation of deep networks, 2017, section 5.1.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

ALGORITHMS = {"maml": "MAML", "fomaml": "FOMAML", "joint": "Joint training"}
SETTINGS = ("algorithms", "shots", "queries", "inner_learning_rate", "inner_steps", "meta_batch_size", "meta_steps",
            "outer_learning_rate", "units", "test_episodes")
QUICK = {"meta_steps": 600, "units": 40, "test_episodes": 100}
STEPS_PER_EPOCH = 200


def define_flags():
    experiment_flags.define_flags("results/sinusoid")
    program.define_names("algorithms", list(ALGORITHMS), ALGORITHMS, "Learners to compare.")
    flags.DEFINE_integer("shots", 10, "Points that a learner adapts to.", lower_bound=1)
    flags.DEFINE_integer("queries", 10, "Points that it is judged by in meta-training.", lower_bound=1)
    flags.DEFINE_float("inner_learning_rate", 0.01, "Learning rate of the inner steps.", lower_bound=0.0)
    flags.DEFINE_integer("inner_steps", 5, "Inner steps, in training and test.", lower_bound=1)
    flags.DEFINE_integer("meta_batch_size", 10, "Episodes in a meta-step.", lower_bound=1)
    flags.DEFINE_integer("meta_steps", 40000, f"Meta-steps, a multiple of {STEPS_PER_EPOCH}.", lower_bound=1)
    flags.DEFINE_float("outer_learning_rate", 1e-3, "Learning rate of Adam, which falls to zero.", lower_bound=0.0)
    flags.DEFINE_integer("units", 40, "Units of each of the two hidden layers.", lower_bound=1)
    flags.DEFINE_integer("test_episodes", 600, "Episodes of the test, a multiple of 10.", lower_bound=1)


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import experiment, pictures
from farhox import meta



def make_learner(algorithm, settings, seed):
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(settings["units"], activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input([1]), *hidden, keras.layers.Dense(1)])
    rate, steps, loss = settings["inner_learning_rate"], settings["inner_steps"], "mean_squared_error"
    if algorithm == "joint":
        learner = meta.JointTraining(model, rate, steps, loss=loss)
    else:
        learner = meta.MAML(model, rate, steps, first_order=algorithm == "fomaml", loss=loss)
    decay = keras.optimizers.schedules.CosineDecay(settings["outer_learning_rate"], settings["meta_steps"])
    learner.compile(keras.optimizers.Adam(decay), jit_compile=True)  # Small and dense: XLA is three times faster.
    return learner


def errors_by_step(learner, test, settings):
    """Squared error on the test episodes after 0, 1, ... gradient steps."""
    errors = []
    for steps in range(settings["inner_steps"] + 1):
        judge = meta.JointTraining(learner.model, settings["inner_learning_rate"] if steps else 0.0, max(steps, 1),
                                   loss="mean_squared_error")
        errors.append(judge.evaluate(test, settings["test_episodes"])["loss"])
    return errors


def run(algorithm, settings, seed, folder):
    train = meta.SinusoidEpisodes(settings["shots"], settings["queries"], seed)
    # Many points of each test curve; the same episodes for every learner and seed.
    test = meta.SinusoidEpisodes(settings["shots"], 100, seed=10**6)
    learner = make_learner(algorithm, settings, seed)
    history = experiment.fit_resumable(
        learner, train.dataset(settings["meta_batch_size"]), settings["meta_steps"], folder,
        steps_per_epoch=STEPS_PER_EPOCH)
    result = learner.evaluate(test, settings["test_episodes"])
    curves = []
    grid = np.linspace(-5, 5, 101, dtype="float32")[:, None]
    for index in range(3):
        support, _ = test.draw(tf.constant(index, tf.int64))
        amplitude, phase = test.curve(index)
        curves.append({
            "x": support[0].numpy()[:, 0].tolist(), "y": support[1].numpy()[:, 0].tolist(),
            "amplitude": amplitude, "phase": phase, "before": learner.model(grid).numpy()[:, 0].tolist(),
            "after": learner.predict(support, grid)[:, 0].tolist()})
    return {"test": result, "errors_by_step": errors_by_step(learner, test, settings), "curves": curves,
            "loss": history["outer_loss"], "time_before": history["time_before"]}


def table(by_seed, settings):
    rows = []
    for algorithm in settings["algorithms"]:
        runs = [runs[algorithm] for runs in by_seed.values()]
        rows.append([ALGORITHMS[algorithm],
                     experiment.mean_and_range([run["errors_by_step"][0] for run in runs]),
                     experiment.mean_and_range([run["test"]["loss"] for run in runs], "{:.3f}"),
                     experiment.mean_and_range([run["test"]["loss_interval"] for run in runs], "{:.3f}"),
                     experiment.mean_and_range([run["cpu_seconds"] for run in runs], "{:.0f}")])
    return experiment.markdown_table(
        ["", "error before", f"after {settings['inner_steps']} steps", "95 % interval, ±", "CPU seconds"], rows)


def plot(by_seed, settings, path):
    """Error by gradient step, and curves before and after adaptation."""
    first = next(iter(by_seed.values()))
    shown = [name for name in ("maml", "joint") if name in first] or list(first)[:2]
    count = 1 + len(shown)
    with pictures.figure(path, columns=count, size=(2.9 * count, 3.8)) as (error, *curves):
        styles, lines = pictures.point_styles(ALGORITHMS), pictures.line_styles(ALGORITHMS)
        for algorithm in settings["algorithms"]:
            values = np.array([runs[algorithm]["errors_by_step"] for runs in by_seed.values()])
            error.errorbar(np.arange(values.shape[1]), values.mean(0),
                           [values.mean(0) - values.min(0), values.max(0) - values.mean(0)], capsize=3,
                           label=ALGORITHMS[algorithm], **styles[algorithm], linestyle=lines[algorithm]["linestyle"])
        error.set(title=f"New tasks, {settings['shots']} points", xlabel="Gradient step", ylabel="Mean squared error")
        pictures.logarithmic(error)
        pictures.whole_numbers(error)
        pictures.legend_below(error)
        grid = np.linspace(-5, 5, 101)
        for axis, algorithm in zip(curves, shown):
            curve = first[algorithm]["curves"][0]
            axis.plot(grid, curve["amplitude"] * np.sin(grid - curve["phase"]), color="black", linewidth=1,
                      label="task")
            axis.plot(curve["x"], curve["y"], "k^", markersize=5, label="support points")
            axis.plot(grid, curve["before"], color=pictures.GREY, linestyle=":", label="before")
            axis.plot(grid, curve["after"], color=pictures.ORANGE, linestyle="--", label="after")
            axis.set(title=f"{ALGORITHMS[algorithm]}, one task", xlabel="x", ylabel="y", xticks=range(-4, 5, 2))
            pictures.legend_below(axis, columns=2)


def main(_):
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    if settings["meta_steps"] % STEPS_PER_EPOCH:
        raise SystemExit(f"--meta_steps must be a multiple of {STEPS_PER_EPOCH}. Received: {settings['meta_steps']}")
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    by_seed = {seed: {algorithm: folder.once(
        f"{algorithm}_seed{seed}", lambda path: run(algorithm, settings, seed, path))
        for algorithm in settings["algorithms"]} for seed in experiment_flags.seeds()}
    print(f"\n{len(by_seed)} seed(s): mean (least to greatest)\n{table(by_seed, settings)}\n"
          f"Results and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": by_seed}))
    plot(by_seed, settings, output / "sinusoid.png")


if __name__ == "__main__":
    program.run(main)

"""A learning rate for every step: a schedule learned for a convolutional net, saved, and replayed in plain Keras.

    python scripts/hyperparameters/learn_schedule.py --quick
    python scripts/hyperparameters/learn_schedule.py --num_seeds=3

Every hyper-iteration trains the net from new initial weights on batches drawn anew, and moves the T learning rates of
its T steps along the hypergradient of the validation loss. The result is written as the JSON of a plain Keras schedule
(schedule_seed0.json). Then it is read back and trains new nets, with initial weights and batches it was not learned on,
in `keras.Model.fit` without farhox; constant rates train the very same nets.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program

SIZES = (5000, 5000)  # Training and validation examples.
SETTINGS = ("dataset", "filters", "inner_steps", "batch_size", "hyper_iterations", "initial_rate", "momentum",
            "outer_learning_rate", "constant_rates", "replays")
QUICK = {"filters": ["8", "8"], "inner_steps": 40, "hyper_iterations": 20, "initial_rate": 0.02,
         "outer_learning_rate": 0.1, "constant_rates": ["0.02", "0.05", "0.1"], "replays": 1}


def define_flags():
    experiment_flags.define_flags("results/learn_schedule")
    flags.DEFINE_enum("dataset", "fashion_mnist", ["mnist", "fashion_mnist"], "Data set of TFDS.")
    flags.DEFINE_list("filters", ["8", "16"], "Filters of the convolutions, each with strides of 2.")
    flags.DEFINE_integer("inner_steps", 150, "T, the training steps and the rates of the schedule.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Examples in an inner batch.", lower_bound=1)
    flags.DEFINE_integer("hyper_iterations", 120, "Updates of the schedule.", lower_bound=1)
    flags.DEFINE_float("initial_rate", 0.05, "Learning rate of all steps to begin with.")
    flags.DEFINE_float("momentum", 0.9, "Inner momentum.", 0.0, 1.0)
    flags.DEFINE_float("outer_learning_rate", 0.03,
                       "Learning rate of Adam on the logarithms of the rates; it decays to zero.")
    flags.DEFINE_list("constant_rates", ["0.01", "0.02", "0.03", "0.04", "0.05", "0.06", "0.08", "0.1"],
                      "Constant rates to compare with.")
    flags.DEFINE_integer("replays", 5, "Nets to train with each schedule, with new initial weights and batches.",
                         lower_bound=1)


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np
import tensorflow as tf

from _shared import data_sets, experiment, pictures
import farhox


def build_model(filters):
    return keras.Sequential([
        keras.Input([28, 28, 1]),
        *[keras.layers.Conv2D(int(count), 3, strides=2, activation="tanh") for count in filters],
        keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")])


def dynamics(schedule, momentum):
    """The optimizer of the replay.

    Where rates vary, Keras' momentum, a sum of steps, is not that of `farhox.Momentum`, a sum of gradients.
    """
    return farhox.KerasDynamics(keras.optimizers.SGD(momentum=momentum), learning_rate=schedule)


def learn(parts, settings, seed, folder):
    """The learned schedule, as the JSON value of a Keras schedule, with its rates and the history."""
    train, validation, _ = parts
    keras.utils.set_random_seed(seed)
    schedule = farhox.LearnedSchedule(settings["inner_steps"], initial=settings["initial_rate"], name="schedule")
    model = build_model(settings["filters"])
    problem = farhox.supervised_problem(
        model, dynamics=dynamics(schedule, settings["momentum"]), outer_variables=[schedule])
    dataset = farhox.bilevel_dataset(
        train, validation, settings["inner_steps"], batch_size=settings["batch_size"], seed=seed)
    optimizer = farhox.HyperOptimizer(problem, farhox.ReverseHG())
    # Each hypergradient is that of one start and one order of the batches: small steps at the end average many.
    decay = keras.optimizers.schedules.CosineDecay(settings["outer_learning_rate"], settings["hyper_iterations"])
    optimizer.compile(keras.optimizers.Adam(decay), metrics=["accuracy"])

    def draw_initial_weights(i):
        # A schedule learned from one start would be the best for that start alone.
        keras.utils.set_random_seed(10_000 * (seed + 1) + i)
        model.set_weights(build_model(settings["filters"]).get_weights())

    history = experiment.fit_resumable(
        optimizer, dataset, settings["hyper_iterations"], folder, prepare=draw_initial_weights)
    return {"schedule": keras.optimizers.schedules.serialize(schedule.to_keras()), "rates": schedule.numpy().tolist(),
            "time_before": history.pop("time_before"),
            "history": {name: history[name] for name in ("outer_loss", "inner_loss", "accuracy")}}


def replay(schedules, parts, settings, seed):
    """Trains a new net with each schedule in plain Keras; all begin with the same weights and see the same batches.

    Args:
        schedules: Dictionary, name to a float or a Keras schedule.

    Returns:
        Dictionary, name to {"validation_loss", "validation_accuracy", "test_loss", "test_accuracy"}.
    """
    train, validation, test = parts
    results = {}
    for name, schedule in schedules.items():
        keras.utils.set_random_seed(seed)
        model = build_model(settings["filters"])
        model.compile(keras.optimizers.SGD(schedule, settings["momentum"]), "sparse_categorical_crossentropy",
                      metrics=["accuracy"])
        batches = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[0]), seed).repeat().batch(
            settings["batch_size"]).take(settings["inner_steps"])
        model.fit(batches, shuffle=False, verbose=0)
        results[name] = {}
        for part, data in (("validation", validation), ("test", test)):
            values = model.evaluate(*data, batch_size=1000, verbose=0, return_dict=True)
            results[name].update({f"{part}_{metric}": float(values[metric]) for metric in ("loss", "accuracy")})
    return results


def run_seed(folder, settings, data_dir, seed, saved):
    """What was learned, and the replays of it and of constant rates, means over the replays."""
    parts = data_sets.images(settings["dataset"], data_dir, SIZES, seed)
    learned = folder.once(f"seed{seed}_learned", lambda path: learn(parts, settings, seed, path))
    experiment.write_json(saved, learned["schedule"])

    def compare(_):
        # From the file, as somebody else would read it.
        schedules = {"learned": keras.optimizers.schedules.deserialize(json.loads(saved.read_text()))}
        schedules.update({rate: float(rate) for rate in settings["constant_rates"]})
        # Seeds that the schedule was not learned with.
        runs = [replay(schedules, parts, settings, 1000 * (seed + 1) + i) for i in range(settings["replays"])]
        return {"replays": {name: {key: float(np.mean([run[name][key] for run in runs])) for key in runs[0][name]}
                            for name in schedules}}

    replays = folder.once(f"seed{seed}_replays", compare)
    best = min(settings["constant_rates"], key=lambda rate: replays["replays"][rate]["validation_loss"])
    return {**learned, **replays, "best_constant": best, "seconds": learned["seconds"],
            "replay_seconds": replays["seconds"]}


def table(by_seed):
    runs = list(by_seed.values())
    rows = []
    for label, name in (("learned schedule", lambda run: "learned"),
                        ("best constant rate", lambda run: run["best_constant"])):
        values = [run["replays"][name(run)] for run in runs]
        row = [label]
        for key, scale, form in (("validation_loss", 1, "{:.4f}"), ("test_loss", 1, "{:.4f}"),
                                 ("test_accuracy", 100, "{:.2f}")):
            row.append(experiment.mean_and_range([scale * value[key] for value in values], form))
        rows.append(row)
    return experiment.markdown_table(["", "validation loss", "test loss", "test accuracy, %"], rows)


def plot(by_seed, settings, path):
    """The schedules, the validation loss while they were learned, and the validation loss of constant rates."""
    styles = pictures.line_styles(by_seed)
    with pictures.figure(path, columns=3, size=(8.7, 3.8)) as (rates, progress, constant):
        for seed, run in by_seed.items():
            rates.plot(np.arange(len(run["rates"])), run["rates"], label=f"seed {seed}", linewidth=1, **styles[seed])
            losses = run["history"]["outer_loss"]
            progress.plot(np.arange(1, len(losses) + 1), losses, label=f"seed {seed}", linewidth=1, **styles[seed])
        rates.axhline(settings["initial_rate"], color=pictures.BLACK, linewidth=1, linestyle=":", label="start")
        rates.set(title="Learned schedule", xlabel="Inner step", ylabel="Learning rate", ylim=(0, None))
        progress.set(title="While learning", xlabel="Hyper-iteration", ylabel="Validation loss")
        names = sorted(settings["constant_rates"], key=float)
        values = np.array([[run["replays"][name]["validation_loss"] for name in names] for run in by_seed.values()])
        constant.errorbar([float(name) for name in names], values.mean(0),
                          [values.mean(0) - values.min(0), values.max(0) - values.mean(0)], color=pictures.ORANGE,
                          marker="o", capsize=3, label="constant rate")
        learned = [run["replays"]["learned"]["validation_loss"] for run in by_seed.values()]
        constant.axhline(np.mean(learned), color=pictures.BLUE, linestyle="--", label="learned schedule")
        constant.axhspan(min(learned), max(learned), color=pictures.BLUE, alpha=0.15, linewidth=0)
        constant.set(title="Replays in plain Keras", xlabel="Constant learning rate", ylabel="Validation loss")
        pictures.logarithmic(constant, "x")
        pictures.whole_numbers(rates, progress)
        for axis in (rates, progress, constant) if len(by_seed) > 1 else (rates, constant):
            pictures.legend_below(axis)


def main(_):
    program.require(matplotlib="examples")
    settings = experiment_flags.settings(SETTINGS, QUICK)
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    by_seed, files = {}, []
    for seed in experiment_flags.seeds():
        files.append(output / f"schedule_seed{seed}.json")
        by_seed[seed] = run_seed(folder, settings, flags.FLAGS.data_dir, seed, files[-1])
    print(f"\n{settings['dataset']}, {settings['inner_steps']} steps, {len(by_seed)} seed(s) of {settings['replays']} "
          f"replays: mean (least to greatest)\n{table(by_seed)}\nSchedules: {', '.join(file.name for file in files)}. "
          f"Results and plot: {output.resolve()}")
    short = {seed: {key: value for key, value in run.items() if key != "schedule"} for seed, run in by_seed.items()}
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": short}))
    plot(by_seed, settings, output / "learn_schedule.png")


if __name__ == "__main__":
    program.run(main)

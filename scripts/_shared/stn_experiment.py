"""What the experiments with self-tuning networks share: trainings that are all alike, searches made of them, results.

A training takes --steps gradient steps on batches that the seed decides. After every --evaluate_every of them the
validation loss is computed, and the result is the test loss of the weights with the least one. One self-tuned training
is compared with --baseline:

- `grid`, `random`, `tpe`: searches by Optuna. Each of --trials plain trainings has one value of every hyperparameter,
  and the same initial weights and batches as the self-tuned one.
- `fixed`: plain trainings from other initial weights, on other batches: with the schedule that the self-tuned training
  found, with its final values, with the values it started from, and with the best values of the searches.

Curves are over gradient steps, those of the hyperparameters among them, and over CPU seconds. A killed program goes on
where it was.
"""

import itertools
import math
import pathlib

import numpy as np
from absl import flags

from _shared import experiment, experiment_flags, pictures, program
from _shared.stn_flags import SEARCHES
from _shared.stn_training import PlainTrainer, self_tune

FIXED = {"schedule": "schedule of STN, replayed", "final": "final values of STN, fixed",
         "start": "values of the start, fixed", "search": "best values of the searches, fixed"}


def search(task, trainer, settings, seed, sampler, folder):
    """Trainings with the values that a sampler of Optuna draws.

    Returns:
        List of what `fit` returns for each, with its "values".
    """
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if sampler == "grid":
        points = 2
        while math.prod(len(entry.grid(points)) for entry in task.ranges.values()) <= settings["trials"]:
            points += 1
        made = optuna.samplers.GridSampler(
            {name: entry.grid(points) for name, entry in task.ranges.items()}, seed=3 * seed)
    else:
        # A seed of its own: the estimator's first trials are random, and would be those of the random search.
        made = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}[sampler](
            seed=3 * seed + 1 + (sampler == "tpe"))
    study, runs = optuna.create_study(sampler=made), []
    for i in range(settings["trials"]):
        trial = study.ask()
        values = {name: entry.suggest(trial, name) for name, entry in task.ranges.items()}
        runs.append(folder.once(f"seed{seed}_{sampler}_{i:02d}", lambda path: {
            "values": values, **trainer.train(seed, path, values)}))
        study.tell(trial, loss_of(runs[-1]))
    return runs


def loss_of(run):
    """The least validation loss of a training; infinite if it never had a finite one."""
    return math.inf if run["best_loss"] is None else run["best_loss"]


def run_seed(task, settings, baselines, seed, folder):
    """The self-tuned training of a seed, and its baselines.

    Returns:
        Dictionary: "stn", a training; "searches", by name lists of trainings; "fixed", by name trainings.
    """
    tuned = folder.once(f"seed{seed}_stn", lambda path: self_tune(task, settings, seed, path))
    trainer = PlainTrainer(task, settings)
    searches = {name: search(task, trainer, settings, seed, name, folder) for name in SEARCHES if name in baselines}
    fixed = {}
    if "fixed" in baselines:
        schedule = tuned["schedule"]
        choices = {"schedule": {"schedule": schedule},
                   "final": {"values": {name: values[-1] for name, values in schedule["values"].items()}},
                   "start": {"values": {name: entry.start for name, entry in task.ranges.items()}}}
        if searches:
            best = min((run for runs in searches.values() for run in runs), key=loss_of)
            choices["search"] = {"values": best["values"]}
        for name, choice in choices.items():
            # The searches chose the values that suit this seed's weights and batches: others are fair to all. What the
            # best values of the searches are depends on which have run.
            tag = name if name != "search" else "_".join(["search", *searches])
            fixed[name] = folder.once(f"seed{seed}_fixed_{tag}", lambda path: {
                **choice, **trainer.train(seed + 10_000, path, **choice)})
    return {"stn": tuned, "searches": searches, "fixed": fixed}


def best_so_far(runs):
    """CPU seconds and least validation loss until then, over trainings one after the other."""
    losses, seconds, before = [], [], 0.0
    for run in runs:
        losses += [math.inf if loss is None else loss for loss in run["losses"]]
        seconds += [before + second for second in run["cpu_times"]]
        before += run["cpu_times"][-1]
    return np.array(seconds), np.minimum.accumulate(losses)


def steps_per_training(settings):
    """Gradient steps of a self-tuned training, those of the hyperparameters among them."""
    every, training = settings["evaluate_every"], settings["training_steps"]
    return settings["steps"] // every * (every + every // training * settings["validation_steps"])


def summaries(by_seed, settings):
    """What the table says: a list of (label, trainings of the seeds, gradient steps, CPU seconds of the seeds)."""
    results = list(by_seed.values())
    tuned = [result["stn"] for result in results]
    rows = [("Self-tuning network", tuned, steps_per_training(settings), [run["cpu_times"][-1] for run in tuned])]
    for name in results[0]["searches"]:
        searches = [result["searches"][name] for result in results]
        seconds = [sum(run["cpu_times"][-1] for run in runs) for runs in searches]
        steps = settings["trials"] * settings["steps"]
        rows.append((f"{SEARCHES[name]}, best by validation loss", [min(runs, key=loss_of) for runs in searches],
                     steps, seconds))
        rows.append((f"{SEARCHES[name]}, best by test loss", [min(runs, key=_test_loss) for runs in searches],
                     steps, seconds))
    for name in results[0]["fixed"]:
        runs = [result["fixed"][name] for result in results]
        rows.append((FIXED[name], runs, settings["steps"], [run["cpu_times"][-1] for run in runs]))
    return rows


def _test_loss(run):
    return math.inf if run["test_loss"] is None else run["test_loss"]


def table(rows):
    cells = []
    for label, runs, steps, seconds in rows:
        cells.append([
            label, experiment.mean_and_range([loss_of(run) for run in runs], "{:.4f}"),
            experiment.mean_and_range([_test_loss(run) for run in runs], "{:.4f}"),
            experiment.mean_and_range([100 * run["test_accuracy"] for run in runs]), str(steps),
            experiment.mean_and_range(seconds, "{:.0f}")])
    return experiment.markdown_table(
        ["", "best validation loss", "test loss", "test accuracy, %", "gradient steps", "CPU seconds"], cells)


def plot(by_seed, task, settings, path):
    """Best validation loss against time and steps, hyperparameters, and validation loss of fixed values."""
    first_seed, first = next(iter(by_seed.items()))
    every, steps = settings["evaluate_every"], settings["steps"]
    with pictures.figure(path, rows=2, columns=2, size=(7.8, 7.6)) as (time_axis, step_axis, values_axis, fixed):
        styles = pictures.line_styles(["stn", *first["searches"]])
        for name in styles:
            label = "Self-tuning network" if name == "stn" else SEARCHES[name]
            for result in by_seed.values():
                runs = [result["stn"]] if name == "stn" else result["searches"][name]
                seconds, losses = best_so_far(runs)
                share = steps_per_training(settings) / steps if name == "stn" else 1.0
                for axis, x in ((time_axis, seconds), (step_axis, share * every * np.arange(1, len(losses) + 1))):
                    axis.plot(x, losses, label=label, drawstyle="steps-post", **styles[name])
                label = None
        lowest = min(loss_of(run) for result in by_seed.values() for run in (
            result["stn"], *result["fixed"].values(), *itertools.chain(*result["searches"].values())))
        limits = (0.95 * lowest, 2.0 * lowest)
        lines = f", {len(by_seed)} seeds" if len(by_seed) > 1 else ""
        for axis, x in ((time_axis, "CPU seconds"), (step_axis, "Gradient steps")):
            axis.set(title=f"Best so far{lines}", xlabel=x, ylabel="Validation loss", ylim=limits)
            pictures.logarithmic(axis, "x")
            pictures.legend_below(axis)
        schedule = first["stn"]["schedule"]
        styles = pictures.line_styles(schedule["values"])
        for name, values in schedule["values"].items():
            entry = task.ranges[name]
            values_axis.plot(schedule["steps"], 100 * (np.array(values) - entry.low) / (entry.high - entry.low),
                             label=name, **styles[name])
        values_axis.set(title=f"Hyperparameters, seed {first_seed}", xlabel="Training steps",
                        ylabel="Value, % of its range")
        pictures.legend_below(values_axis, columns=2)
        styles = pictures.line_styles(["stn", *first["fixed"]])
        for name in styles:
            curves = [[math.nan if loss is None else loss for loss in run["losses"]] for run in (
                result["stn"] if name == "stn" else result["fixed"][name] for result in by_seed.values())]
            fixed.plot(every * np.arange(1, len(curves[0]) + 1), np.mean(curves, axis=0),
                       label="Self-tuning network" if name == "stn" else FIXED[name], **styles[name])
        fixed.set(title="Single trainings" + (", means of the seeds" if len(by_seed) > 1 else ""),
                  xlabel="Training steps", ylabel="Validation loss", ylim=limits)
        pictures.whole_numbers(values_axis, fixed)
        pictures.legend_below(fixed)


def main(name, settings, make_task):
    """Runs a script.

    Args:
        name: Of the script.
        settings: Dictionary of the flags that the trainings depend on.
        make_task: Function of the settings and a seed that returns a `Task`.
    """
    if settings["steps"] % settings["evaluate_every"]:
        raise SystemExit("--steps must be a multiple of --evaluate_every. Received: "
                             f"{settings['steps']} and {settings['evaluate_every']}")
    baselines = flags.FLAGS.baseline
    program.require(matplotlib="examples", **({"optuna": "search"} if set(baselines) & set(SEARCHES) else {}))
    output = pathlib.Path(flags.FLAGS.output)
    folder = experiment.Folder(output, settings)
    by_seed = {}
    for seed in experiment_flags.seeds():
        task = make_task(settings, seed)
        by_seed[seed] = run_seed(task, settings, baselines, seed, folder)
    rows = summaries(by_seed, settings)
    print(f"\n{settings['steps']} steps per training, {len(by_seed)} seed(s): mean (least to greatest)\n{table(rows)}\n"
          f"Results and plot: {output.resolve()}")
    experiment.write_json(output / "results.json", experiment.rounded({"settings": settings, "seeds": by_seed}))
    plot(by_seed, task, settings, output / f"{name}.png")

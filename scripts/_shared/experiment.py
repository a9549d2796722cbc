"""What the experiments share: images of TFDS, runs that go on after an interruption, results."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import keras
import numpy as np

from _shared import program
from farhox.callbacks import Resumable, Resume
from farhox.training.progress import WIDTH, line

# For the environment of a process whose memory is measured: what is freed is not kept for reuse.
MEMORY_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}

# These change where and how often something runs, not what one run is.
_NOT_SETTINGS = ("data_dir", "output", "seed", "num_seeds", "quick")


class Folder:
    """The folder of an experiment: one JSON file per finished run, so that what is done is not done again.

    Args:
        path: The folder; made if it is not there.
        settings: Dictionary of what the runs depend on, kept beside them.

    Raises:
        SystemExit: If the folder holds runs of other settings.
    """

    def __init__(self, path, settings):
        self.path = pathlib.Path(path)
        self.settings = settings
        self.runs = self.path / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        file = self.runs / "settings.json"
        settings = {name: value for name, value in settings.items() if name not in _NOT_SETTINGS}
        if not file.exists():
            write_json(file, settings)
        elif (others := json.loads(file.read_text())) != json.loads(json.dumps(settings)):
            differ = sorted(name for name in {**others, **settings} if others.get(name) != settings.get(name))
            raise SystemExit(f"{self.path} holds runs with other values of {', '.join(differ)}: give another --output, "
                             f"or delete {self.runs} to start anew.")

    def done(self, name):
        """The result of a run that is finished, or None."""
        file = self.runs / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def once(self, name, function):
        """The result of a run: that on disk, or else what `function(folder of the run)` returns, a JSON value.

        A result has the time it took under "seconds" (of the clock) and "cpu_seconds" (of all cores together), without
        interruptions. A function that goes on after one says under "time_before" what `fit_resumable` gives it.
        """
        file = self.runs / f"{name}.json"
        if (result := self.done(name)) is not None:
            return result
        print(f"\n{name}", flush=True)
        start = clocks()
        folder = self.runs / name
        folder.mkdir(exist_ok=True)
        with program.ending_in_one_line(f"The same command goes on with {name}."):
            result = function(folder)
        before = result.pop("time_before", {})
        for clock, now in clocks().items():
            result[clock] = round(before.get(clock, 0.0) + now - start[clock], 2)
        write_json(file, result)
        shutil.rmtree(folder)  # The state of a run is of no use when it is finished.
        return json.loads(file.read_text())


def fit_resumable(optimizer, dataset, hyper_iterations, folder, observe=None, prepare=None, save_every=10.0,
                  steps_per_epoch=1, callbacks=()):
    """`HyperOptimizer.fit` for a number of hyper-iterations; after an interruption it goes on where it was.

    The data go on too: an interrupted run ends with the same numbers as one that was not interrupted.

    Args:
        optimizer: A compiled `HyperOptimizer`.
        dataset: Elements (inner_batches, outer_batch), deterministic. It is repeated as often as needed.
        hyper_iterations: Positive int.
        folder: Folder for the state of the run.
        observe: Callable without arguments that returns a dictionary of floats, added to each hyper-iteration's logs.
        prepare: Callable of the index of a hyper-iteration, called before it.
        save_every: Float, seconds between two saved states.
        steps_per_epoch: Positive int that divides `hyper_iterations`. History, `observe` and `prepare` then count
            epochs of so many hyper-iterations.
        callbacks: Further Keras callbacks.

    Returns:
        History: a dictionary of lists with one entry per epoch, and "time_before", the seconds and CPU seconds that
        earlier processes needed for their part of it.
    """
    epochs = hyper_iterations // steps_per_epoch
    unit = "hyper-iteration" if steps_per_epoch == 1 else "epoch"
    # Reading thousands of epochs again takes longer than leaving elements out.
    resume = Resume(folder, seconds=save_every, replay=False)
    run = _Run(epochs, resume.initial_epoch, unit, observe, prepare)
    # By default one epoch is one hyper-iteration, so that logs are not means over several.
    history = optimizer.fit(
        dataset.repeat().skip(resume.initial_epoch * steps_per_epoch), epochs=epochs, verbose=0,
        steps_per_epoch=steps_per_epoch, callbacks=[run, *callbacks, resume])
    return {**history.history, "time_before": run.time_before}


class _Run(keras.callbacks.Callback, Resumable):
    """Calls `prepare` and `observe`, counts the time, and shows a progress bar."""

    def __init__(self, epochs, done, unit, observe, prepare):
        super().__init__()
        self.epochs, self.unit, self.observe, self.prepare = epochs, unit, observe, prepare
        self.time_before, self._start = {}, clocks()
        self._bar = ProgressBar(epochs, unit, done)
        if done:
            print(f"Goes on after {done} of {epochs} {unit}s", flush=True)

    def on_epoch_begin(self, epoch, logs=None):
        if self.prepare is not None:
            self.prepare(epoch)

    def on_epoch_end(self, epoch, logs=None):
        # What is added here is in the history too.
        logs.update(self.observe() if self.observe is not None else {})
        self._bar.update(epoch + 1, logs)

    def resume_state(self):
        return {clock: self.time_before.get(clock, 0.0) + now - self._start[clock] for clock, now in clocks().items()}

    def resume_from(self, state):
        self.time_before = state


def clocks():
    """Seconds of the clock and CPU seconds of this process, to be subtracted from later ones."""
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def cost_of_steps(run, steps):
    """Time of a step, and its memory in a process with `MEMORY_GIVEN_BACK` (on Linux).

    Args:
        run: Callable, a number of steps; called once before anything is measured.
        steps: Positive int.

    Returns:
        Dictionary of "seconds_per_step" (CPU seconds) and "step_mb", the peak of resident memory within a step above
        what is there between steps.
    """
    run(1)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # From now on the peak is counted anew.
    between = _memory_in_use("VmRSS")
    start = time.process_time()
    run(steps)
    seconds = time.process_time() - start
    return {"seconds_per_step": seconds / steps, "step_mb": (_memory_in_use("VmHWM") - between) / 1024}


def measured_apart(file, case):
    """What a script, called with --case, prints as JSON: in a new process, whose memory is not that of what ran before.

    Args:
        file: The script's file.
        case: JSON value, what is measured.
    """
    process = subprocess.run([sys.executable, os.path.abspath(file), f"--case={json.dumps(case)}"],
                             stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **MEMORY_GIVEN_BACK})
    return json.loads(process.stdout.splitlines()[-1])


def _memory_in_use(kind):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind))


class ProgressBar:
    """One line of at most 80 columns that is written anew; where that cannot be, a line from time to time.

    Args:
        steps: Positive int.
        unit: Str, what a step is.
        done: Int, steps of earlier processes.
    """

    def __init__(self, steps, unit, done=0):
        self.steps, self.unit, self._first = steps, unit, done
        self._began, self._shown, self._length = time.monotonic(), -math.inf, 0
        self._on_screen = sys.stdout.isatty()

    def update(self, done, values):
        """Shows that so many steps are done, and as many of the values by name as fit."""
        now = time.monotonic()
        if done < self.steps and now - self._shown < (0.1 if self._on_screen else 10.0):
            return
        self._shown = now
        seconds = now - self._began
        left = seconds / max(done - self._first, 1) * (self.steps - done)
        bar = "".join("━" if 10 * done >= i * self.steps else "─" for i in range(1, 11))
        head = f"{bar} {done}/{self.steps} {self.unit}s, {seconds:.0f}s" + (f" + {left:.0f}s" if left else "")
        text = line(head, values)
        before = f"\r{' ' * self._length}\r" if self._length else ""
        stays = done >= self.steps or not self._on_screen
        self._length = 0 if stays else len(text)
        print(before + text, end="\n" if stays else "", flush=True)


def write_json(path, value):
    """Writes a file of JSON in one step: it is there whole or not at all. Lists of numbers take one line."""
    text = re.sub(r"\[[^][{}\"]*\]", lambda match: " ".join(match[0].split()), json.dumps(value, indent=1))
    part = pathlib.Path(f"{path}.part")
    part.write_text(text + "\n")
    os.replace(part, path)


def rounded(value, digits=6):
    """A JSON value with six significant digits, for results that people read."""
    if isinstance(value, dict):
        return {name: rounded(entry, digits) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def mean_and_range(values, form="{:.2f}"):
    """`mean (least to greatest)`, or the value alone if there is one."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form} ({form} to {form})".format(float(np.mean(values)), min(values), max(values))


def markdown_table(header, rows):
    """A table in Markdown with padded columns, to be read on a screen of 80 columns as well.

    Where its rows are longer it is turned, and where that does not help either its columns are in several tables.
    """
    turned = [list(column) for column in zip(header, *rows)]
    for first, *others in ([header, *rows], turned):
        if _width(text := _table(first, others)) <= WIDTH:
            return text
    # Each of them begins with as many columns as it takes to tell the rows apart.
    keys = next((n for n in range(1, len(header)) if len({tuple(row[:n]) for row in rows}) == len(rows)), 1)
    parts = [turned[:keys + 1]]
    for column in turned[keys + 1:]:
        longer = [*parts[-1], column]
        if _width(_table(*_rows(longer))) <= WIDTH:
            parts[-1] = longer
        else:
            parts.append([*turned[:keys], column])
    return "\n\n".join(_table(*_rows(part)) for part in parts)


def _rows(columns):
    header, *rows = map(list, zip(*columns))
    return header, rows


def _width(text):
    return len(text.split("\n")[0])


def _table(header, rows):
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])

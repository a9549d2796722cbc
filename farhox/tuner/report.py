"""What a tuner says: the table, a line per epoch, the results, the picture. Lines of at most 80 columns."""

import dataclasses
import importlib.util
import os
import sys
import textwrap
from typing import Any

import numpy as np
import tensorflow as tf

from farhox._core.types import Logs
from farhox.tuner import tunables

_WIDTH = 80


def write(text: str) -> None:
    """Writes lines to the screen."""
    sys.stdout.write(text + "\n")


def number(value: Any) -> str:
    """A number in at most eight characters, the mean of an array, "off" for None."""
    if value is None:
        return "off"
    if np.ndim(value):
        return f"mean {number(float(np.mean(value)))}"
    text = f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def switched_off(row: Any, sweeps: bool, online: bool) -> Any:
    """The row with what is switched off fixed."""
    if row.tuned and row.kind.route == tunables.SWEEP and not sweeps:
        return dataclasses.replace(row, tuned=False, reason="the sweep is off")
    if row.tuned and row.kind.route != tunables.SWEEP and not online:
        return dataclasses.replace(row, tuned=False, reason="online tuning is off")
    return row


def table(rows: Any, sweeps: bool) -> Any:
    """The table of hyperparameters."""
    del sweeps
    lines = [("hyperparameter", "where", "value", "range", "route", "tuned or fixed")]
    for row in rows:
        reason = row.reason or {"sweep": "found by the sweep", "path": "follows hypergradients",
                                "response": "follows the response"}[row.kind.route]
        state = f"tuned, {reason}" if row.tuned else f"fixed, {reason}" if row.hyperparameter is not None else reason
        interval = "" if row.hyperparameter is None else f"{number(row.low)} to {number(row.high)}"
        lines.append((row.name, row.where, number(row.value()), interval, row.route, state))
    return _columns(lines, (16, 12, 8, 13, 8, 18))


def results(rows: Any, before: Any, after: Any) -> Any:
    """The values at the start and at the best epoch."""
    lines = [("hyperparameter", "where", "start", "best", "route")]
    lines += [(row.name, row.where, number(before[row.name]), number(after[row.name]), row.route) for row in rows]
    return _columns(lines, (24, 24, 10, 10, 8))


def epoch_line(epoch: int, epochs: int, logs: Logs, seconds: float) -> str:
    """One line on an epoch, of the values that fit; dots where there are more."""
    line, left_out = f"epoch {epoch + 1}/{epochs} {seconds:.0f} s", False
    for name, value in logs.items():
        part = f"  {name} {number(value)}"
        if len(line) + len(part) > _WIDTH - 4:
            left_out = True
        else:
            line += part
    return f"{line} ..." if left_out else line


def wrapped(lines: list[str]) -> list[str]:
    """Lines broken at 80 columns."""
    return [part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  ")]


def plot(history: Any, rows: Any, objective: Any, path: Any) -> None:
    """Writes the picture of a run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plot needs the package matplotlib, which is not installed: pip install 'farhox[plots]'")
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    del objective
    names = [row.name for row in rows if row.name in history[0]] or ["learning_rate"]
    figure = Figure(figsize=(8, 1.8 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names):
        values = np.concatenate([entry[name] for entry in history])
        values = values.reshape(len(values), -1)
        axis.plot(np.arange(len(values)), values)
        if next(row for row in rows if row.name == name).kind.log if rows else True:
            axis.set_yscale("log")
            # Without those of its own, which stand at all of two to nine where a decade is not full.
            steps = (1.0, 2.0, 3.0, 5.0) if values.max() < 20 * values.min() else (1.0,)
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel(name.replace("_", " ").capitalize())
    axes[-1].set_xlabel("Training step")
    figure.savefig(path)


def write_hparams(log_dir: Any, values: Any, scalars: Logs, step: int) -> None:
    """Writes a run for TensorBoard's HParams plugin: numbers by name, and what came of them."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("write_hparams needs the package tensorboard, which is not installed: "
                          "pip install 'farhox[tensorboard]'")
    from tensorboard.plugins.hparams import api

    writer = tf.summary.create_file_writer(os.fspath(log_dir))
    with writer.as_default():
        api.hparams(values)
        for name, value in scalars.items():
            tf.summary.scalar(name, value, step=step)
    writer.close()


def _columns(lines, widths):
    """Lines in columns of at most these widths; what does not fit goes on below."""
    text = []
    for line in lines:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(line, widths)]
        for index in range(max(map(len, cells))):
            parts = [(cell[index] if index < len(cell) else "").ljust(width) for cell, width in zip(cells, widths)]
            text.append(" ".join(parts).rstrip())
    return "\n".join(text)

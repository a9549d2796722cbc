"""Plots of what was learned: response surface, schedules, example weights, hypergradients per method.

Functions return matplotlib's axes or figures; they show nothing and write nothing. matplotlib is imported when the
first of them is called: it is part of the extra `examples`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from farhox._core.sums import sums_as_written
from farhox._core.types import Array, Batch, InnerBatches
from farhox.data.batches import as_inner_batches
from farhox.insight.diagnostics import HypergradientComparison
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.bilevel import BilevelProblem

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00"
_SERIES = [(color, line) for line in ("-", "--") for color in (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE)]
_GREY = "#bbbbbb"
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.alpha": 0.3,
    "font.size": 10, "axes.titlesize": 11, "legend.framealpha": 1.0, "legend.edgecolor": "none"}


@sums_as_written()
def outer_loss_grid(problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch,
                    x: tuple[OuterVariable, Array], y: tuple[OuterVariable, Array]) -> np.ndarray:
    """The outer objective after the inner training for each pair of values of two hyperparameters; no derivative.

    Args:
        problem: A `BilevelProblem`, also one `over_episodes`.
        inner_batches: T inner batches.
        outer_batch: The outer batch.
        x: Pair (scalar `Hyperparameter` of the problem, its values in natural units).
        y: The same of another one.

    Returns:
        Array [len(y values), len(x values)]. The hyperparameters keep the values they had.

    Raises:
        TypeError: If `x` or `y` is not such a pair.
        ValueError: If x and y are the same hyperparameter, one is not of the problem, or a value is out of bounds.
    """
    (across, x_values), (up, y_values) = _checked_axis("x", x, problem), _checked_axis("y", y, problem)
    if across is up:
        raise ValueError(f"x and y must be two hyperparameters. Received {across.name!r} twice")

    # The data are arguments, which a graph does not copy.
    @tf.function(autograph=False)
    def loss(inner_batches, outer_batch):
        return problem.evaluate(inner_batches, outer_batch).outer_loss

    data = as_inner_batches(inner_batches), tf.nest.map_structure(tf.convert_to_tensor, outer_batch)
    before = across.variable.numpy(), up.variable.numpy()
    losses = np.empty([len(y_values), len(x_values)])
    try:
        for row, y_value in enumerate(y_values):
            up.assign(y_value)
            for column, x_value in enumerate(x_values):
                across.assign(x_value)
                losses[row, column] = loss(*data)
    finally:
        # The unconstrained values: the way through natural units would round them.
        across.variable.assign(before[0])
        up.variable.assign(before[1])
    return losses


def response_surface(problem: BilevelProblem, inner_batches: InnerBatches, outer_batch: Batch,
                     x: tuple[OuterVariable, Array], y: tuple[OuterVariable, Array],
                     trajectory: Mapping[str, Array] | None = None, losses: Array = None, axes: Any = None) -> Any:
    """The outer loss as a function of two hyperparameters, and the way that they went on it.

    An axis is logarithmic where its values are geometrically spaced. Colours are on a logarithmic scale, and stop at
    the 90th percentile where some of the trainings are far worse than the others; trainings with a loss that is not
    finite are left grey.

    Args:
        problem, inner_batches, outer_batch, x, y: As for `outer_loss_grid`.
        trajectory: Dictionary with a list of values under each of the two names: `HyperparameterTrace.history`, what
            `read_trace` returns, or the `history` of what `fit` returns. Default: none is drawn.
        losses: What `outer_loss_grid` returned, so that it is not computed again. Default: it is computed.
        axes: matplotlib axes to draw on; default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError, ValueError: As `outer_loss_grid`; a ValueError too if no loss is finite, `losses` does not have the
            shape of the grid, there are fewer than two values on an axis, or the trajectory lacks a name.
    """
    pyplot = _pyplot()
    pairs = [_checked_axis("x", x, problem), _checked_axis("y", y, problem)]
    names = [hyperparameter.name for hyperparameter, _ in pairs]
    x_values, y_values = [values for _, values in pairs]
    if min(len(x_values), len(y_values)) < 2:
        raise ValueError("A surface needs at least two values on each axis. "
                         f"Received: {len(x_values)} of {names[0]!r} and {len(y_values)} of {names[1]!r}")
    missing = [] if trajectory is None else [name for name in names if name not in trajectory]
    if missing:
        raise ValueError(f"The trajectory must have values of {names}. Received: {sorted(trajectory or {})}")
    if losses is None:
        losses = outer_loss_grid(problem, inner_batches, outer_batch, x, y)
    losses = np.ma.masked_invalid(losses)
    if losses.shape != (len(y_values), len(x_values)):
        raise ValueError(f"losses must have shape {(len(y_values), len(x_values))}. Received shape: {losses.shape}")
    if losses.count() == 0:
        raise ValueError("A surface needs a finite loss. Received none: choose values where training does not diverge.")
    with pyplot.rc_context(_STYLE):
        axes = _new_axes(pyplot, (5.6, 4.2)) if axes is None else axes
        levels, norm, extend = _levels(losses.compressed())
        filled = axes.contourf(x_values, y_values, losses, levels=levels, norm=norm, extend=extend, cmap="viridis")
        bar = axes.figure.colorbar(filled, ax=axes, label="Outer loss")
        ticks = _round_numbers(levels[0], levels[-1])
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
        for scale, values in ((axes.set_xscale, x_values), (axes.set_yscale, y_values)):
            if _geometric(values):
                scale("log")
        # What is not finite shows the ground.
        axes.set(xlabel=names[0], ylabel=names[1], facecolor=_GREY, xlim=(x_values[0], x_values[-1]),
                 ylim=(y_values[0], y_values[-1]), title="Outer loss after the inner training")
        if trajectory is not None:
            way = [np.asarray(trajectory[name], "float64") for name in names]
            axes.plot(*way, color="white", linewidth=4, solid_capstyle="round")  # An edge, on any ground.
            axes.plot(*way, color="black", linewidth=1.5, marker=".", markersize=5, label="way of the hyperparameters")
            axes.plot(way[0][:1], way[1][:1], "o", color="white", markeredgecolor="black", markersize=9, label="start",
                      linestyle="none")
            axes.plot(way[0][-1:], way[1][-1:], "*", color=_ORANGE, markeredgecolor="black", markersize=15, label="end",
                      linestyle="none")
        if np.any(losses.mask):
            axes.fill([], [], color=_GREY, label="not finite")
        if axes.get_legend_handles_labels()[1]:
            # Below, where it hides nothing.
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, handletextpad=0.5)
    return axes


def schedules(learned: Any, history: Array = None, ylabel: str = "value", axes: Any = None) -> Any:
    """Values by inner step.

    Args:
        learned: A `LearnedSchedule`, or a dictionary from labels to schedules or arrays [steps].
        history: Array [records, steps], earlier values, drawn thin from light to dark: the entry of the schedule's name
            in `HyperparameterTrace.history`. Default: none.
        ylabel: What the values are.
        axes: matplotlib axes to draw on; default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no schedule, or an array has another number of axes.
    """
    pyplot = _pyplot()
    if not isinstance(learned, dict):
        learned = {learned.name if isinstance(learned, OuterVariable) else "learned": learned}
    series = {label: _natural(values) for label, values in learned.items()}
    if not series or any(values.ndim != 1 for values in series.values()):
        raise ValueError("Schedules must be arrays [steps], at least one. Received shapes: "
                         f"{ {label: values.shape for label, values in series.items()} }")
    history = None if history is None else np.asarray(history)
    if history is not None and history.ndim != 2:
        raise ValueError(f"history must be an array [records, steps]. Received shape: {history.shape}")
    with pyplot.rc_context(_STYLE):
        axes = _new_axes(pyplot, (5.6, 3.4)) if axes is None else axes
        older: Any = [] if history is None else history
        for i, values in enumerate(older):
            shade = 0.75 - 0.45 * i / max(1, len(older) - 1)
            _staircase(axes, values, color=str(shade), linewidth=0.8,
                       label="while it was learned, light to dark" if i + 1 == len(older) else None)
        for (label, values), (color, line) in zip(series.items(), itertools.cycle(_SERIES)):
            _staircase(axes, values, color=color, linestyle=line, linewidth=2, label=label)
        axes.set(xlabel="Inner step", ylabel=ylabel, title="Learned schedule" + "s" * (len(series) > 1))
        axes.set_ylim(bottom=0.0)
        axes.margins(x=0.0)
        axes.grid(True)
        axes.legend(fontsize=8)
    return axes


def example_weights(weights: Array, flipped: Array = None, initial: float | None = None, axes: Any = None) -> Any:
    """Histogram of the weights of examples.

    Args:
        weights: An `ExampleWeights`, or an array [examples].
        flipped: Bool array [examples], True where the label is known to be wrong. Default: unknown.
        initial: Float, the weight that all of them had at the start, drawn as a line. Default: none.
        axes: matplotlib axes to draw on; default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an array has another shape.
    """
    pyplot = _pyplot()
    weights, flipped = _checked_weights(weights, flipped)
    with pyplot.rc_context(_STYLE):
        axes = _new_axes(pyplot, (5.2, 3.4)) if axes is None else axes
        parts, colors, labels = [weights], [_BLUE], ["examples"]
        if flipped is not None:
            parts, colors = [weights[~flipped], weights[flipped]], [_BLUE, _ORANGE]
            labels = [f"right label ({np.sum(~flipped)})", f"wrong label ({np.sum(flipped)})"]
        # A thin edge and, for wrong labels, hatches: the parts are told apart without colours.
        bars = axes.hist(parts, bins=np.linspace(0.0, max(1.0, float(np.max(weights))), 26), color=colors, label=labels,
                         stacked=True, edgecolor="white", linewidth=0.4)[2]
        if flipped is not None:
            for bar in bars[1]:
                bar.set_hatch("////")
        if initial is not None:
            axes.axvline(initial, color="black", linestyle="--", linewidth=1, label="start of all weights")
        axes.set(title="Learned example weights", xlabel="Weight", ylabel="Training examples")
        axes.margins(x=0.0)
        axes.grid(True, axis="y")
        if len(axes.get_legend_handles_labels()[1]) > 1:
            # Below, where it hides nothing.
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, handletextpad=0.5)
    return axes


def suspicious_examples(weights: Array, images: Array, labels: Array, flipped: Array = None, count: int = 10,
                        columns: int = 5, class_names: Sequence[Any] | None = None) -> Any:
    """Pictures of the examples with the lowest weights, lowest first, under the labels that they have.

    Args:
        weights: An `ExampleWeights`, or an array [examples].
        images: Array [examples, height, width] or [examples, height, width, 1 or 3]; three channels in [0, 1] or bytes.
        labels: Integer array [examples].
        flipped: Bool array [examples], True where the label is known to be wrong: titles then say so, in
            colour where it is right after all. Default: unknown.
        count: Positive int, pictures.
        columns: Positive int, pictures in a row.
        class_names: List of names by label. Default: the numbers.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an array has another shape, or `count` or `columns` is not positive.
    """
    pyplot = _pyplot()
    weights, flipped = _checked_weights(weights, flipped)
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) != len(weights) or images.ndim not in (3, 4) or labels.shape != weights.shape:
        raise ValueError(f"images and labels must have one entry for each of the {len(weights)} weights, images "
                         f"[examples, height, width(, channels)]. Received shapes: {images.shape}, {labels.shape}")
    if count < 1 or columns < 1:
        raise ValueError(f"count and columns must be positive. Received: count={count}, columns={columns}")
    chosen = np.argsort(weights, kind="stable")[:count]
    rows = math.ceil(len(chosen) / columns)
    gray = images.ndim == 3 or images.shape[-1] == 1
    with pyplot.rc_context(_STYLE):
        figure, grid = pyplot.subplots(rows, columns, figsize=(1.4 * columns, 1.8 * rows + 0.4), squeeze=False,
                                       layout="constrained")
        for cell in grid.flat:
            cell.set_axis_off()
        for cell, i in zip(grid.flat, chosen):
            image = images[i].reshape(images.shape[1:3]) if gray else images[i]
            cell.imshow(image, cmap="gray" if gray else None)
            name = labels[i] if class_names is None else class_names[int(labels[i])]
            known = "" if flipped is None else " (wrong)" if flipped[i] else " (right)"
            cell.set_title(f"label {name}{known}\nweight {weights[i]:.2g}", fontsize=9,
                           color=_VERMILION if flipped is not None and not flipped[i] else "black")
        figure.suptitle("Training examples with the lowest weights", fontsize=11)
    return figure


def hypergradients(comparison: HypergradientComparison, figure: Any = None) -> Any:
    """Norm of the hypergradient by each method, and its cosine to that of the first one.

    Args:
        comparison: What `compare_hypergradients` returned. Methods that could not compute it are said to be so.
        figure: matplotlib figure to draw on; default: a new one.

    Returns:
        The figure, with two axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `comparison` is no `HypergradientComparison`.
    """
    pyplot = _pyplot()
    if not isinstance(comparison, HypergradientComparison):
        raise TypeError(f"comparison must come from farhox.compare_hypergradients. Received: {comparison!r}")
    reports = comparison.reports
    with pyplot.rc_context(_STYLE):
        if figure is None:
            figure = pyplot.figure(figsize=(8.0, 1.2 + 0.4 * len(reports)), layout="constrained")
        norms, cosines = figure.subplots(1, 2, sharey=True)
        norms.set_yticks(range(len(reports)), [report.name for report in reports])
        norms.invert_yaxis()
        for axes, attribute, color, form in ((norms, "norm", _BLUE, "{:.3g}"), (cosines, "cosine", _ORANGE, "{:.4f}")):
            values = [getattr(report, attribute) for report in reports]
            known = [(i, value) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
            bars = axes.barh([i for i, _ in known], [value for _, value in known], color=color, height=0.6)
            axes.bar_label(bars, [form.format(value) for _, value in known], padding=3, fontsize=8)
            for i, value in enumerate(values):
                if i not in dict(known):
                    axes.annotate("cannot compute it" if value is None else "not defined", (0, i), (3, 0), va="center",
                                  textcoords="offset points", fontsize=8, style="italic")
            axes.axvline(0.0, color="black", linewidth=0.8)
            axes.grid(True, axis="x")
        norms.set(title="Norm of the hypergradient", xlabel="norm")
        norms.margins(x=0.2)
        lowest = min([report.cosine for report in reports if report.cosine is not None], default=0.0)
        limits = (-1.5, 1.5) if lowest < 0 else (0.0, 1.25)
        cosines.set(title=f"Cosine to {reports[0].name}", xlabel="cosine", xlim=limits)
        cosines.tick_params(axis="y", left=False)
        cosines.set_xticks([-1, -0.5, 0, 0.5, 1] if lowest < 0 else [0, 0.25, 0.5, 0.75, 1])
    return figure


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("farhox.plots needs matplotlib, which is not installed: "
                          "pip install 'farhox[plots]'") from error
    return pyplot


def _new_axes(pyplot, size):
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _staircase(axes, values, **style):
    # The value of the last step lasts as long as that of any other.
    axes.step(np.arange(len(values) + 1), np.append(values, values[-1]), where="post", **style)


def _checked_axis(name, pair, problem):
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"problem must be a farhox.BilevelProblem. Received: {problem!r}")
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], OuterVariable) or (
            pair[0].variable.shape != ()):
        raise TypeError(f"{name} must be a pair (scalar farhox.Hyperparameter, values). Received: {pair!r}")
    hyperparameter, values = pair[0], np.asarray(pair[1], "float64")
    if not any(hyperparameter is entry for entry in problem.hyperparameters):
        raise ValueError(f"{name} must name a hyperparameter of the problem. Received: {hyperparameter!r}")
    if values.ndim != 1 or not np.all(np.diff(values) > 0):
        raise ValueError(f"The values of {hyperparameter.name!r} must be a list that increases. Received: {values}")
    return hyperparameter, values


def _checked_weights(weights, flipped):
    weights = _natural(weights)
    if weights.ndim != 1 or not len(weights):
        raise ValueError(f"weights must be an array [examples]. Received shape: {weights.shape}")
    if flipped is None:
        return weights, None
    flipped = np.asarray(flipped)
    if flipped.shape != weights.shape or flipped.dtype != bool:
        raise ValueError(f"flipped must be a bool array of shape {weights.shape}. "
                         f"Received: {flipped.dtype} of shape {flipped.shape}")
    return weights, flipped


def _natural(values):
    return values.numpy() if isinstance(values, OuterVariable) else np.asarray(values)


def _geometric(values):
    """Whether values are evenly spaced on a logarithmic axis better than on a linear one."""
    if len(values) < 3 or values[0] <= 0:
        return False
    return np.ptp(np.diff(np.log(values))) < 1e-3 * np.mean(np.diff(np.log(values)))


def _levels(losses):
    """Borders of the colours, matplotlib's norm for them, and which ends are open."""
    from matplotlib import colors
    low, high = float(np.min(losses)), float(np.max(losses))
    cap = float(np.percentile(losses, 90))
    extend = "neither"
    if high - low > 3 * (cap - low) > 0:
        high, extend = cap, "max"
    if high == low:
        high = low + max(abs(low), 1.0) * 1e-3  # A flat surface has one colour.
    if low > 0:
        return np.geomspace(low, high, 21), colors.LogNorm(low, high), extend
    return np.linspace(low, high, 21), colors.Normalize(low, high), extend


def _round_numbers(low, high):
    """A few numbers between two, such as a person would write on an axis."""
    from matplotlib import ticker
    if low > 0 and high > 20 * low:
        ticks = ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=9).tick_values(low, high)
    else:
        ticks = ticker.MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [tick for tick in ticks if low <= tick <= high]

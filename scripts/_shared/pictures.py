"""The look of all plots: told apart without colours, readable at half their size, ticks that a person would choose."""

import contextlib

import numpy as np

# Those of Okabe and Ito, which people tell apart whatever colours they see.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
GREY, BLACK = "#6b7280", "#000000"
_COLORS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, BLACK, GREY)
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1)), (0, (3, 3)))
_MARKERS = "os^Dv*PX"


@contextlib.contextmanager
def figure(path, rows=1, columns=1, size=(5.2, 3.4)):
    """Axes of a figure that is saved as a PNG file at the end: a flat array of them if there are several."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
             "font.size": 10, "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 9,
             "legend.handlelength": 3.0}
    with plt.rc_context(style):
        made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        yield np.ravel(axes) if rows * columns > 1 else axes
        made.savefig(path, dpi=150)
        plt.close(made)


def line_styles(names):
    """Colour and dashes of each line by its name: different in both."""
    return {name: {"color": _COLORS[i % len(_COLORS)], "linestyle": _DASHES[i % len(_DASHES)]}
            for i, name in enumerate(names)}


def point_styles(names):
    """Colour and marker of each series of points by its name: different in both."""
    return {name: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
            for i, name in enumerate(names)}


def legend_below(axis, columns=1):
    """The legend of some axes under them, where it covers nothing."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns)


def legend_of_figure(axes, columns):
    """One legend for several axes under all of them; the names of the first axes that have a line of that name."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    axes[0].figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def whole_numbers(*axes):
    """Ticks of the x axes at whole numbers."""
    for axis in axes:
        axis.xaxis.set_major_locator(_at_whole_numbers())


def whole_numbers_of_y(axis):
    """Ticks of the y axis at whole numbers."""
    axis.yaxis.set_major_locator(_at_whole_numbers())


def logarithmic(axis, which="y"):
    """A logarithmic axis of data that are drawn already, with ticks at round numbers, written as people write them."""
    from matplotlib import ticker
    axis.set(**{f"{which}scale": "log"})
    own = axis.yaxis if which == "y" else axis.xaxis
    low, high = sorted(own.get_view_interval())
    if high < 2 * low:
        own.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 8 * low else (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
        own.set_major_locator(ticker.LogLocator(subs=steps))
    own.set_minor_locator(ticker.NullLocator())
    own.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _at_whole_numbers():
    from matplotlib import ticker
    return ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10])

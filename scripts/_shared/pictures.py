"""The look of all plots."""

import contextlib

import numpy as np

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563a8", "#d9772b", "#2f8f5b", "#8256a8", "#6b7280"


@contextlib.contextmanager
def figure(path, rows=1, columns=1, size=(5.2, 3.4)):
    """Axes of a figure that is saved as a PNG file at the end: a flat array of them if there are several."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
             "font.size": 10, "axes.titlesize": 11, "legend.framealpha": 1.0, "legend.edgecolor": "none"}
    with plt.rc_context(style):
        made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        yield np.ravel(axes) if rows * columns > 1 else axes
        made.savefig(path, dpi=110)
        plt.close(made)

"""farhox.plots: what the pictures show, read back from matplotlib's artists, and the pictures of the documentation."""

import pathlib
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from problems import variable

import farhox
from farhox import plots
from farhox.insight.diagnostics import HypergradientComparison, MethodReport

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
START, STEPS = 3.0, 4


@pytest.fixture(autouse=True)
def pictures(monkeypatch, tmp_path):
    """No function shows a picture or writes a file; figures are closed."""
    monkeypatch.chdir(tmp_path)

    def show(*unused, **also_unused):
        raise AssertionError("a plot was shown")

    monkeypatch.setattr(pyplot, "show", show)
    yield
    assert list(tmp_path.iterdir()) == []
    pyplot.close("all")


def quadratic(offset=0.0):
    """Inner (w - target)^2 / 2, outer (w - goal)^2 / 2 + offset, gradient descent with a rate."""
    w = variable(START)
    rate = farhox.Hyperparameter(0.3, low=0.0, log=True, name="rate", dtype="float64")
    target = farhox.Hyperparameter(0.5, name="target", dtype="float64")
    problem = farhox.BilevelProblem(
        lambda batch: (w - target()) ** 2 / 2, lambda goal: (w - goal) ** 2 / 2 + offset, [w], [rate, target],
        farhox.GradientDescent(rate))
    return problem, rate, target


def quadratic_loss(rate, target, goal=1.0):
    return (target + (1 - rate) ** STEPS * (START - target) - goal) ** 2 / 2


DATA = np.zeros(STEPS), np.float64(1.0)
RATES, TARGETS = np.geomspace(0.01, 1.0, 5), np.linspace(-1.0, 2.0, 4)


def surface(problem, rate, target, **arguments):
    return plots.response_surface(problem, *DATA, x=(rate, RATES), y=(target, TARGETS), **arguments)


def weights_and_labels():
    """Twelve weights, of which the last four are low and wrong, but for the very last."""
    weights = np.array([0.9, 0.8, 0.95, 0.7, 0.85, 0.6, 0.75, 0.65, 0.04, 0.03, 0.02, 0.01])
    return weights, np.arange(12) % 10, (weights < 0.1) & (np.arange(12) < 11)


def comparison():
    reports = [MethodReport("reverse", norm=2.0, cosine=1.0), MethodReport("last step", norm=0.5, cosine=-0.25),
               MethodReport("implicit", error="It cannot see 'rate'."),
               MethodReport("zero", norm=0.0, cosine=float("nan"))]
    return HypergradientComparison(reports)


def test_grid_is_the_closed_form_and_hyperparameters_stay_as_they_were():
    problem, rate, target = quadratic()
    before = rate.variable.numpy(), target.variable.numpy()
    losses = plots.outer_loss_grid(problem, *DATA, x=(rate, RATES), y=(target, TARGETS))
    np.testing.assert_allclose(losses, quadratic_loss(RATES[None], TARGETS[:, None]), rtol=1e-10)
    assert (rate.variable.numpy(), target.variable.numpy()) == before


def test_grid_of_episodes_is_the_mean_over_them():
    problem, rate, target = quadratic()
    losses = plots.outer_loss_grid(
        problem.over_episodes(), np.zeros([2, STEPS]), np.array([1.0, 2.0]), x=(rate, RATES), y=(target, TARGETS))
    grid = RATES[None], TARGETS[:, None]
    np.testing.assert_allclose(losses, (quadratic_loss(*grid) + quadratic_loss(*grid, goal=2.0)) / 2, rtol=1e-10)


def test_hyperparameters_stay_as_they_were_when_a_value_is_refused():
    problem, rate, target = quadratic()
    before = rate.variable.numpy(), target.variable.numpy()
    with pytest.raises(ValueError, match="'rate'.*strictly between its bounds"):
        plots.outer_loss_grid(problem, *DATA, x=(rate, [-1.0, 1.0]), y=(target, TARGETS))
    assert (rate.variable.numpy(), target.variable.numpy()) == before


def test_surface_has_the_way_of_the_hyperparameters_from_start_to_end():
    problem, rate, target = quadratic()
    way = {"rate": [0.1, 0.2, 0.3], "target": np.array([0.0, 0.5, 1.0])}
    axes = surface(problem, rate, target, trajectory=way)
    drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    whole = np.stack([way["rate"], way["target"]], 1)
    np.testing.assert_array_equal(drawn["way of the hyperparameters"], whole)
    np.testing.assert_array_equal(drawn["start"], whole[:1])
    np.testing.assert_array_equal(drawn["end"], whole[-1:])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["way of the hyperparameters", "start", "end"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rate", "target")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert (axes.get_xlim(), axes.get_ylim()) == ((0.01, 1.0), (-1.0, 2.0))
    assert axes.figure.axes[1].get_ylabel() == "Outer loss"


@pytest.mark.parametrize("losses, low, high, extend, ticks", [
    (np.arange(1.0, 21.0).reshape(4, 5), 1.0, 20.0, "neither", ["5", "10", "15", "20"]),
    (np.arange(-5.0, 15.0).reshape(4, 5), -5.0, 14.0, "neither", ["-5", "0", "5", "10"]),
    (np.append(np.arange(1.0, 20.0), 1e6).reshape(4, 5), 1.0, 18.1, "max", ["5", "10", "15"]),
    (np.full([4, 5], 2.0), 2.0, 2.002, "neither", ["2", "2.0005", "2.001", "2.0015", "2.002"])],
                         ids=["positive", "negative", "far worse", "flat"])
def test_colours_cover_the_losses_that_are_given_and_stand_beside_round_numbers(losses, low, high, extend, ticks):
    problem, rate, target = quadratic()
    filled = surface(problem, rate, target, losses=losses).collections[0]
    np.testing.assert_allclose((filled.levels[0], filled.levels[-1]), (low, high))
    assert filled.extend == extend
    assert [text.get_text() for text in filled.colorbar.ax.get_yticklabels()] == ticks


def test_losses_that_are_not_finite_are_left_grey_and_named():
    problem, rate, target = quadratic()
    losses = np.ones([4, 5])
    losses[0, -2:] = np.nan, np.inf
    losses[1, 0] = 2.0
    axes = surface(problem, rate, target, losses=losses)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["not finite"]
    assert axes.collections[0].levels[-1] == 2.0
    assert surface(problem, rate, target, losses=np.ones([4, 5])).get_legend() is None


def test_schedule_is_a_staircase_whose_last_step_has_a_length():
    schedule = farhox.LearnedSchedule(3, [0.1, 0.3, 0.2], name="rate")
    history = np.array([[0.1, 0.1, 0.1], [0.1, 0.2, 0.2]])
    axes = plots.schedules(schedule, history=history, ylabel="Learning rate")
    *earlier, last = axes.get_lines()
    np.testing.assert_allclose(last.get_xydata(), [[0, 0.1], [1, 0.3], [2, 0.2], [3, 0.2]], rtol=1e-6)
    assert last.get_drawstyle() == "steps-post" and last.get_label() == "rate"
    np.testing.assert_array_equal([line.get_ydata()[:3] for line in earlier], history)
    assert axes.get_xlabel() == "Inner step" and axes.get_ylabel() == "Learning rate"


def test_several_schedules_can_be_told_apart():
    axes = plots.schedules({f"layer {i}": np.full(4, float(i)) for i in range(10)})
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"layer {i}" for i in range(10)]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == 10


def test_histogram_counts_right_and_wrong_labels():
    weights, _, flipped = weights_and_labels()
    axes = plots.example_weights(weights, flipped=flipped, initial=0.5)
    right, wrong = [sum(bar.get_height() for bar in group) for group in axes.containers]
    assert (right, wrong) == (9, 3)
    assert all(bar.get_hatch() for bar in axes.containers[1]) and not axes.containers[0][0].get_hatch()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "right label (9)", "wrong label (3)", "start of all weights"]
    assert axes.get_lines()[0].get_xdata() == [0.5, 0.5]


def test_histogram_of_unknown_labels_has_every_example():
    axes = plots.example_weights(farhox.ExampleWeights(40, initial=0.3))
    assert sum(bar.get_height() for bar in axes.containers[0]) == 40 and axes.get_legend() is None


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_lowest_weights_come_first_with_label_and_picture(shape):
    weights, labels, flipped = weights_and_labels()
    images = np.random.default_rng(0).uniform(size=(12, 4, 5, *shape))
    figure = plots.suspicious_examples(weights, images, labels, flipped=flipped, count=4, columns=3)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [
        "label 1 (right)\nweight 0.01", "label 0 (wrong)\nweight 0.02", "label 9 (wrong)\nweight 0.03",
        "label 8 (wrong)\nweight 0.04"]
    for axes, i in zip(shown, [11, 10, 9, 8]):
        np.testing.assert_array_equal(axes.images[0].get_array(), images[i] if shape == (3,) else images[i][..., 0]
                                      if shape else images[i])


def test_pictures_have_names_of_classes_and_are_no_more_than_there_are():
    weights, labels, _ = weights_and_labels()
    names = ["zero", "one", *"23456789"]
    figure = plots.suspicious_examples(weights, np.zeros([12, 2, 2]), labels, count=50, class_names=names)
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(titles) == 12 and titles[:2] == ["label one\nweight 0.01", "label zero\nweight 0.02"]


def test_bars_are_norm_and_cosine_of_each_method():
    norms, cosines = plots.hypergradients(comparison()).axes
    assert [label.get_text() for label in norms.get_yticklabels()] == ["reverse", "last step", "implicit", "zero"]
    assert [bar.get_width() for bar in norms.patches] == [2.0, 0.5, 0.0]
    assert [bar.get_width() for bar in cosines.patches] == [1.0, -0.25]
    assert [text.get_text() for text in norms.texts] == ["2", "0.5", "0", "cannot compute it"]
    assert [text.get_text() for text in cosines.texts] == ["1.0000", "-0.2500", "cannot compute it", "not defined"]
    assert cosines.get_title() == "Cosine to reverse" and cosines.get_xlim()[0] < -1


def test_given_axes_and_figures_are_drawn_on():
    problem, rate, target = quadratic()
    weights, _, _ = weights_and_labels()
    figure, grid = pyplot.subplots(1, 3)
    assert surface(problem, rate, target, losses=np.ones([4, 5]), axes=grid[0]) is grid[0]
    assert plots.schedules(np.ones(3), axes=grid[1]) is grid[1]
    assert plots.example_weights(weights, axes=grid[2]) is grid[2]
    other = pyplot.figure()
    assert plots.hypergradients(comparison(), figure=other) is other


CALLS = {
    "response_surface": lambda **more: surface(*quadratic(), **{"losses": np.ones([4, 5]), **more}),
    "schedules": lambda **more: plots.schedules(**{"learned": np.ones(3), **more}),
    "example_weights": lambda **more: plots.example_weights(**{"weights": np.ones(3), **more}),
    "suspicious_examples": lambda **more: plots.suspicious_examples(
        **{"weights": np.ones(3), "images": np.ones([3, 2, 2]), "labels": np.arange(3), **more}),
    "hypergradients": lambda **more: plots.hypergradients(**{"comparison": comparison(), **more})}


@pytest.mark.parametrize("name", CALLS)
def test_missing_matplotlib_is_an_import_error_that_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*farhox\[plots\]"):
        CALLS[name]()


@pytest.mark.slow
def test_farhox_is_imported_where_matplotlib_is_missing():
    code = "import sys; sys.modules['matplotlib'] = None; import farhox"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("name, more, message", [
    ("response_surface", {"losses": np.ones([5, 4])}, r"losses must have shape \(4, 5\)"),
    ("response_surface", {"losses": np.full([4, 5], np.nan)}, "needs a finite loss"),
    ("response_surface", {"trajectory": {"rate": [0.1]}}, r"trajectory must have values of \['rate', 'target'\]"),
    ("schedules", {"learned": {}}, "at least one"),
    ("schedules", {"learned": np.ones([2, 3])}, r"must be arrays \[steps\]"),
    ("schedules", {"history": np.ones(3)}, r"history must be an array \[records, steps\]"),
    ("example_weights", {"weights": np.ones([3, 1])}, r"weights must be an array \[examples\]"),
    ("example_weights", {"weights": np.ones(0)}, r"weights must be an array \[examples\]"),
    ("example_weights", {"flipped": np.ones(3)}, "flipped must be a bool array"),
    ("suspicious_examples", {"flipped": np.ones(2, bool)}, "flipped must be a bool array"),
    ("suspicious_examples", {"images": np.ones([2, 2, 2])}, "one entry for each of the 3 weights"),
    ("suspicious_examples", {"images": np.ones([3, 4])}, "one entry for each of the 3 weights"),
    ("suspicious_examples", {"labels": np.ones(4)}, "one entry for each of the 3 weights"),
    ("suspicious_examples", {"count": 0}, "count and columns must be positive"),
    ("suspicious_examples", {"columns": 0}, "count and columns must be positive")])
def test_arguments_that_do_not_fit_are_value_errors(name, more, message):
    with pytest.raises(ValueError, match=message):
        CALLS[name](**more)


def test_a_comparison_of_something_else_is_a_type_error():
    with pytest.raises(TypeError, match="compare_hypergradients"):
        CALLS["hypergradients"](comparison=[1.0, 2.0])


def test_surface_needs_two_values_on_each_axis():
    problem, rate, target = quadratic()
    with pytest.raises(ValueError, match="at least two values on each axis"):
        plots.response_surface(problem, *DATA, x=(rate, [0.1]), y=(target, TARGETS))


@pytest.mark.parametrize("x, error, message", [
    (lambda rate, target: rate, TypeError, "x must be a pair"),
    (lambda rate, target: (0.1, RATES), TypeError, "x must be a pair"),
    (lambda rate, target: (farhox.Hyperparameter([0.1, 0.2]), RATES), TypeError, "x must be a pair"),
    (lambda rate, target: (farhox.Hyperparameter(0.1), RATES), ValueError, "a hyperparameter of the problem"),
    (lambda rate, target: (target, RATES), ValueError, "Received 'target' twice"),
    (lambda rate, target: (rate, RATES[::-1]), ValueError, "must be a list that increases"),
    (lambda rate, target: (rate, 0.1), ValueError, "must be a list that increases")])
def test_axes_of_a_grid_are_two_scalar_hyperparameters_of_the_problem(x, error, message):
    problem, rate, target = quadratic()
    with pytest.raises(error, match=message):
        plots.outer_loss_grid(problem, *DATA, x=x(rate, target), y=(target, TARGETS))


def test_pictures_of_the_page_are_what_its_code_saves_and_are_small():
    text = (DOCS / "plots.md").read_text(encoding="utf-8")
    shown = re.findall(r'src="images/([^"]+)"', text)
    assert shown == re.findall(r'savefig\("([^"]+)"', text)
    assert max((DOCS / "images" / name).stat().st_size for name in shown) < 150_000

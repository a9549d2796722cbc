"""The experiments of scripts/: each runs in its --quick setting on real images, and what they share keeps its word."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from script_files import SCRIPTS, given_flags, import_script, script_path

import farhox

EXPERIMENTS = ["clean_labels", "cross_domain", "learn_schedule", "reverse_training", "tune_learning_rates",
               "weigh_noisy_labels"]
needs_data = pytest.mark.skipif(
    "FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")


@pytest.fixture
def load(monkeypatch):
    """Imports a script by its name."""
    return lambda name: import_script(name, monkeypatch)


def run_quick(name, output, *arguments):
    command = [sys.executable, str(script_path(name)), "--quick", f"--output={output}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "\n| " in run.stdout
    return json.loads((output / "results.json").read_text())


@needs_data
@pytest.mark.slow
def test_learned_weights_find_wrong_labels_and_come_near_the_oracle(tmp_path):
    results = run_quick("clean_labels", tmp_path)
    runs = results["seeds"]["0"]
    assert results["best"] == "budget 1500"
    learned = runs["budget 1500"]
    assert learned["f1"] > 0.85 and learned["sum"] < 1500.01
    assert runs["baseline"]["test_accuracy"] < runs["oracle"]["test_accuracy"] - 0.01
    assert learned["test_accuracy"] > runs["baseline"]["test_accuracy"] + 0.01
    assert learned["test_accuracy"] > runs["oracle"]["test_accuracy"] - 0.015


@needs_data
@pytest.mark.slow
def test_example_weights_the_rate_and_the_decay_are_learned_along_one_training(tmp_path):
    results = run_quick(
        "clean_labels", tmp_path, "--online", "--tune_training", "--model=mlp", "--train_examples=600",
        "--validation_examples=200", "--budgets=400", "--batch_size=50", "--inner_steps=12", "--hyper_iterations=20",
        "--learning_rate=0.03", "--weight_decay=0.001", "--outer_learning_rate=0.1")
    learned = results["seeds"]["0"]["budget 400"]
    history = learned["history"]
    assert learned["f1"] > 0.5 and learned["sum"] < 400.01
    assert len(set(history["learning_rate"])) == len(set(history["weight_decay"])) == 20
    assert learned["training"]["learning_rate"] == pytest.approx(history["learning_rate"][-1] * 400 / 600, rel=1e-4)
    assert learned["training"]["weight_decay"] == pytest.approx(history["weight_decay"][-1] * 600 / 400, rel=1e-4)
    ends = {name: np.mean(history[name][-5:]) for name in ("baseline", "test_accuracy", "oracle")}
    assert ends["baseline"] + 0.02 < ends["test_accuracy"] < ends["oracle"] + 0.02


@needs_data
@pytest.mark.slow
def test_hypergradients_tune_a_network_with_the_gradient_steps_of_black_box_searches(tmp_path):
    results = run_quick("tune_learning_rates", tmp_path)
    runs = results["seeds"]["0"]
    assert set(runs) == {"batch", "rtho", "warm_restart", "random", "tpe", "untuned"}
    assert len({run["steps"] * len(run["losses"]) for run in runs.values()}) == 1
    for name, value in runs["untuned"]["values"].items():
        assert len(set(value)) == 1 and value[0] == runs["random"]["values"][name][0]
    for method in ("batch", "rtho", "warm_restart"):
        assert runs[method]["best_loss"] < 0.6 * runs[method]["losses"][0]
        assert 0.0 < results["share_of_steps"][method][0] <= 1.0
        assert runs[method]["test_accuracy"] > 0.7
        assert runs[method]["best_loss"] < runs["untuned"]["losses"][0]
    # All begin with the same training: the same net, batches and hyperparameters.
    for method in runs:
        assert runs[method]["losses"][0] == pytest.approx(runs["batch"]["losses"][0], rel=1e-4)


@needs_data
@pytest.mark.slow
def test_a_learned_schedule_is_saved_and_replayed_in_keras_without_farhox(tmp_path):
    results = run_quick("learn_schedule", tmp_path)
    run = results["seeds"]["0"]
    losses = run["history"]["outer_loss"]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    assert run["replays"]["learned"]["validation_loss"] < run["replays"]["0.02"]["validation_loss"]
    code = ("import json, sys, keras; schedule = keras.optimizers.schedules.deserialize(json.load(open(sys.argv[1]))); "
            "assert 'farhox' not in sys.modules; print([float(schedule(t)) for t in range(40)])")
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "schedule_seed0.json")],
                             capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    np.testing.assert_allclose(json.loads(process.stdout), run["rates"], rtol=1e-5)


def small_optimizer():
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 3)).astype("float32")
    y = x @ np.ones([3, 1], "float32")
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    rate = farhox.Hyperparameter(0.01, low=0.0, log=True, name="learning_rate")
    problem = farhox.supervised_problem(
        model, loss="mean_squared_error", dynamics=farhox.GradientDescent(rate), outer_variables=[rate])
    optimizer = farhox.HyperOptimizer(problem, farhox.ForwardHG(), online=True)
    optimizer.compile(keras.optimizers.Adam(0.1))
    # Two elements, so that going on in the middle of the data matters.
    return optimizer, farhox.bilevel_dataset((x[:20], y[:20]), (x[20:], y[20:]), 2, batch_size=5)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_numbers_of_one_that_was_not(load, tmp_path, capsys):
    experiment = load("experiment")
    whole = experiment.fit_resumable(*small_optimizer(), 9, tmp_path / "whole", observe=None)
    seen = []

    def interrupt():
        seen.append(0)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return {}

    prepared = []

    with pytest.raises(KeyboardInterrupt):
        experiment.fit_resumable(
            *small_optimizer(), 9, tmp_path / "parts", observe=interrupt, prepare=prepared.append, save_every=0.0)
    assert farhox.callbacks.Resume(tmp_path / "parts").initial_epoch == 5
    capsys.readouterr()
    parts = experiment.fit_resumable(
        *small_optimizer(), 9, tmp_path / "parts", prepare=prepared.append, save_every=0.0)
    said = capsys.readouterr().out
    assert "Goes on after 5 of 9 hyper-iterations" in said and "9/9" in said and "1/9" not in said
    assert prepared == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert len(parts["outer_loss"]) == 9 and parts["time_before"]["seconds"] > 0
    assert {name: parts[name] for name in parts if name != "time_before"} == {
        name: whole[name] for name in whole if name != "time_before"}
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert experiment.fit_resumable(*small_optimizer(), 9, tmp_path / "parts")["outer_loss"] == whole["outer_loss"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_where_nothing_is_trained_ends_with_one_line(load, tmp_path, capsys, number, code):
    folder = load("experiment").Folder(tmp_path, {})
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as raised:
        folder.once("seed0", lambda path: signal.raise_signal(number))
    assert raised.value.code == code and signal.getsignal(number) is before
    assert capsys.readouterr().err == f"\nStopped by {number.name}. The same command goes on with seed0.\n"


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_told_to_stop_saves_its_state_and_ends_with_one_line(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, str(script_path("sinusoid")), f"--output={tmp_path}", "--algorithms=fomaml",
         "--meta_steps=200000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    states = tmp_path / "runs" / "fomaml_seed0"
    while not list(states.glob("*.farhox")):
        assert process.poll() is None
        time.sleep(0.05)
    told, before = time.monotonic(), farhox.callbacks.Resume(states).initial_epoch
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == code and time.monotonic() - told < 10.0
    assert errors.count(f"Stopped by {number.name}. The state after") == 1 and "Traceback" not in errors
    assert farhox.callbacks.Resume(states).initial_epoch >= before


@pytest.mark.parametrize("on_screen", [True, False])
def test_progress_is_one_line_of_eighty_columns(load, monkeypatch, capsys, on_screen):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_screen)
    bar = load("experiment").ProgressBar(40, "hyper-iteration", done=20)
    values = {"inner_loss": 0.123456, "outer_loss": 1e-7, **{f"hyperparameter_{i}": 123.456 for i in range(9)}}
    for done in range(21, 41):
        bar.update(done, values)
    written = capsys.readouterr().out
    lines = written.split("\n")
    assert lines[-1] == "" and len(lines) == (2 if on_screen else 3)
    shown = [text for part in lines for text in part.split("\r") if text.strip()]
    assert max(map(len, shown)) <= 80 and "40/40 hyper-iterations, 0s - outer_loss: 1e-07" in shown[-1]
    assert shown[0].startswith("━━━━━───── 21/40")


def test_a_table_that_is_too_wide_is_turned_or_in_parts(load):
    table = load("experiment").markdown_table
    assert table(["", "a"], [["first", "1"], ["second", "22"]]).split("\n") == [
        "|        | a  |", "| ------ | -- |", "| first  | 1  |", "| second | 22 |"]
    names = [f"accuracy of part {i}" for i in range(6)]
    assert table(["", *names], [["first", *"123456"]]).split("\n")[:3] == [
        "|                    | first |", "| ------------------ | ----- |", "| accuracy of part 0 | 1     |"]
    first, second = table(["", *names], [[f"row {i}", *"123456"] for i in range(20)]).split("\n\n")
    assert max(map(len, (first + "\n" + second).split("\n"))) <= 80
    assert first.split("\n")[21].split() == "| row 19 | 1 | 2 | 3 |".split()
    assert second.split("\n")[21].split() == "| row 19 | 4 | 5 | 6 |".split()
    first, second = table(["", "", *names[:4]], [["task", f"row {i}", *"1234"] for i in range(20)]).split("\n\n")
    assert second.split("\n")[21].split() == "| task | row 19 | 4 |".split()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak of memory in use")
def test_memory_of_a_step_is_what_it_has_at_a_time_above_what_stays(load):
    stays = []

    def run(steps):
        for _ in range(steps):
            stays[:] = [np.ones(4 * 2**20)]
            np.ones(8 * 2**20).sum()

    cost = load("experiment").cost_of_steps(run, 2)
    assert 60 < cost["step_mb"] < 110 and 0 < cost["seconds_per_step"] < 5


def test_a_finished_run_is_not_done_again(load, tmp_path):
    experiment = load("experiment")
    folder = experiment.Folder(tmp_path, {"inner_steps": 3})
    first = folder.once("run", lambda path: {"loss": 0.5, "time_before": {"seconds": 60.0, "cpu_seconds": 90.0}})
    assert first["loss"] == 0.5 and first["seconds"] >= 60.0 and first["cpu_seconds"] >= 90.0
    again = experiment.Folder(tmp_path, {"inner_steps": 3}).once("run", lambda path: pytest.fail("it ran again"))
    assert again == first


def test_a_folder_with_runs_of_other_settings_is_an_error_that_names_them(load, tmp_path):
    experiment = load("experiment")
    experiment.Folder(tmp_path, {"inner_steps": 3, "momentum": 0.9})
    with pytest.raises(SystemExit, match="holds runs with other values of inner_steps: give another --output"):
        experiment.Folder(tmp_path, {"inner_steps": 4, "momentum": 0.9})


@pytest.mark.parametrize("package, extra", [("matplotlib", "examples"), ("optuna", "search")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(load, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"needs the package {package}.*pip install '\.\[{extra}\]'"):
        load("program").require(**{package: extra})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_importing_an_experiment_defines_no_flag(load, name):
    from absl import flags
    assert not set(load(name).SETTINGS) & set(flags.FLAGS)


@pytest.mark.parametrize("file", sorted(SCRIPTS.glob("*/flags/*.cfg")), ids=lambda file: file.stem)
def test_a_flag_file_is_understood_by_its_script(load, file):
    script = max((path.stem for path in file.parents[1].glob("*.py") if file.stem.startswith(path.stem)), key=len)
    with given_flags(load(script).define_flags, f"--flagfile={file}") as values:
        given = re.findall(r"^--(\w+)=", file.read_text(), flags=re.M)
        assert given and all(values[name].present for name in given)
        assert values.output == f"results/{file.stem}"


def test_precision_and_recall_count_weights_next_to_zero(load):
    weights, flipped = np.array([0.0, 5e-4, 1e-2, 0.0, 0.9]), np.array([True, True, True, False, False])
    found = load("clean_labels").find_flipped(weights, flipped)
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    assert load("clean_labels").find_flipped(np.ones(5), flipped) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.slow
def test_a_schedule_is_learned_with_the_dynamics_that_replay_it(load, tmp_path):
    script = load("learn_schedule")
    random = np.random.default_rng(0)
    part = random.random((64, 28, 28, 1)).astype("float32"), random.integers(0, 10, 64)
    settings = {"filters": ["2"], "inner_steps": 4, "batch_size": 64, "hyper_iterations": 2, "initial_rate": 0.05,
                "momentum": 0.9, "outer_learning_rate": 0.5, "replays": 1}
    learned = script.learn((part, part, part), settings, 0, tmp_path)
    assert len(set(learned["rates"])) == 4
    # The third hyper-iteration would start from these weights; with full batches their order does not matter.
    schedule = keras.optimizers.schedules.deserialize(learned["schedule"])
    replayed = script.replay({"learned": schedule}, (part, part, part), settings, 10_002)["learned"]
    keras.utils.set_random_seed(10_002)
    model = script.build_model(settings["filters"])
    rates = farhox.LearnedSchedule(4, initial=learned["rates"])
    problem = farhox.supervised_problem(model, dynamics=script.dynamics(rates, 0.9), outer_variables=[rates])
    farhox.HyperOptimizer(problem).train_inner(farhox.repeat(part, 4))
    loss = keras.losses.sparse_categorical_crossentropy(part[1], model(part[0]))
    assert replayed["validation_loss"] == pytest.approx(float(np.mean(loss)), rel=1e-5)


def test_a_search_by_layer_has_a_rate_and_a_strength_for_each_layer(load):
    names = list(load("tune_learning_rates").ranges({"per_layer": True, "units": ["8"]}))
    assert names == ["learning_rate_1", "learning_rate_2", "momentum", "l2_strength_1", "l2_strength_2"]


def test_steps_to_a_loss_count_gradient_steps_and_failed_trials_never_reach_it(load):
    tune = load("tune_learning_rates")
    run = {"steps": 10, "losses": [None, 3.0, 4.0, 1.0, 2.0]}
    steps, losses = tune.best_so_far(run)
    np.testing.assert_array_equal(steps, [10, 20, 30, 40, 50])
    np.testing.assert_array_equal(losses, [math.inf, 3.0, 3.0, 1.0, 1.0])
    assert [tune.steps_to_reach(run, loss) for loss in (3.0, 1.5, 0.5)] == [20, 40, None]


def test_shares_compare_with_the_best_black_box_of_the_same_seed(load):
    searches = {"batch": {"steps": 10, "losses": [3.0, 1.0, 0.5, 0.5]}, "random": {"best_loss": 2.0},
                "tpe": {"best_loss": 1.0}}
    other = {"batch": {"steps": 10, "losses": [3.0, 3.0, 3.0, 3.0]}, "random": {"best_loss": 2.0},
             "tpe": {"best_loss": 2.5}}
    assert load("tune_learning_rates").shares({0: searches, 1: other}, 40) == {"batch": [0.5, None]}


def test_tables_and_ranges_read_well(load):
    experiment = load("experiment")
    assert experiment.mean_and_range([1.0, 2.0, 6.0], "{:.1f}") == "3.0 (1.0 to 6.0)"
    assert experiment.mean_and_range([0.25]) == "0.25"
    assert experiment.markdown_table(["a", "long"], [["value", "b"]]) == (
        "| a     | long |\n| ----- | ---- |\n| value | b    |")
    assert experiment.rounded({"a": [1.23456789, 2], "b": None}) == {"a": [1.23457, 2], "b": None}


@pytest.mark.parametrize("low, high", [(0.117, 0.49), (0.43, 0.7), (0.05, 0.3), (0.43, 2.4), (0.04, 0.8), (1e-4, 0.3)])
def test_logarithmic_axes_have_a_few_round_numbers_on_them(low, high, monkeypatch, tmp_path):
    pictures = import_script("pictures", monkeypatch)
    with pictures.figure(tmp_path / "picture.png") as axis:
        axis.plot([0, 1], [low, high])
        pictures.logarithmic(axis)
        ends = axis.get_ylim()
        shown = [tick for tick in axis.get_yticks() if ends[0] <= tick <= ends[1]]
        assert 3 <= len(shown) <= 6 and max(low / shown[0], shown[0] / low) < 2.1
        assert all(len(axis.yaxis.get_major_formatter()(tick).strip("0.").replace(".", "")) <= 2 for tick in shown)

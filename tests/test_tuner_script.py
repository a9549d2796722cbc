"""tune_model.py and tune_many.py: what a run holds, what a budget pays for, and their --quick forms."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from script_files import import_script, script_path

import farhox


@pytest.fixture
def script(monkeypatch):
    return import_script("tune_model", monkeypatch)


@pytest.fixture
def many(monkeypatch):
    return import_script("tune_many", monkeypatch)


def test_a_budget_pays_for_the_first_runs_and_validation_chooses_among_them(script):
    runs = [{"cpu_seconds": 10.0, "validation_loss": v, "test_loss": t}
            for v, t in ((0.5, 0.6), (None, None), (0.3, 0.45), (0.2, 0.2))]
    assert script.best_within(runs, 30.0) == runs[2]
    assert script.best_within(runs, 39.0) == runs[2] and script.best_within(runs, 40.0) == runs[3]
    assert script.best_within(runs, 1.0) == runs[0]  # The first run is had in any case.
    assert script.best_within(runs[1:2], 100.0) is None
    tuned = [{"cpu_seconds": 2.0}, {"cpu_seconds": 6.0}]
    tpe = {"trials": [{"spent": 15.0, "validation_loss": 0.5, "test_loss": 0.5},
                      {"spent": 100.0, "validation_loss": 0.1, "test_loss": 0.1}]}
    assert script.found_by_searches({"tuner": tuned, "annealed": runs, "tpe": tpe}) == {
        "random, 1 x": 0.6, "tpe, 1 x": 0.5, "random, 10 x": 0.2, "tpe, 10 x": 0.5}
    assert script.found_by_searches({"tuner": tuned, "annealed": runs[:2], "random": runs}) == {
        "random, 1 x": 0.6, "random, 10 x": 0.2}
    # What has not spent ten times the seconds has no result for them.
    assert script.found_by_searches({"tuner": tuned, "annealed": runs[:2]}) == {"random, 1 x": 0.6}


def test_starts_are_the_same_in_every_process_and_within_their_ranges(script):
    for task in script.TASKS.values():
        assert task.draw(3) == task.draw(3) != task.draw(4)
        for index in range(50):
            for name, value in task.draw(index).items():
                low, high, _ = task.ranges()[name]
                assert low <= value <= high


def test_the_cosine_is_that_of_the_tuner(script):
    cosine = script.searches.Cosine(0.4, 10)
    expected = [0.4] * 7 + [0.2 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    np.testing.assert_allclose([float(cosine(step)) for step in range(10)], expected, rtol=1e-5)


def test_the_tuner_and_the_searches_of_many_have_the_same_hyperparameters(many):
    task = many.ManyTask(8)
    start, ranges = task.start(), task.ranges()
    assert start.keys() == ranges.keys() and len(ranges) == 21
    assert all(low < start[name] < high for name, (low, high, _) in ranges.items())
    model = task.model(start, seed=0)
    tuned = [row for row in farhox.Tuner(model, granularity="layer")._rows if row.tuned]
    assert sorted(row.value() for row in tuned) == pytest.approx(sorted(start.values()), rel=1e-5)
    four = [row.name for row in farhox.Tuner(model, tune=[*many.FOUR, "learning_rate"])._rows if row.tuned]
    assert sorted(four) == sorted([*many.FOUR, "learning_rate"])


def test_a_search_of_many_has_what_it_found_in_the_seconds_of_its_budget(many):
    trials = [{"spent": spent, "validation_loss": loss, "test_loss": loss}
              for spent, loss in ((8.0, 0.9), (20.0, 0.5), (31.0, 0.3))]
    runs = {"layers": {"cpu_seconds": 10.0}, "tpe, 1": {"trials": trials}, "tpe, 2.5": {"trials": trials}}
    assert many.best_of("tpe, 1", runs)["test_loss"] == 0.9
    assert many.best_of("tpe, 2.5", runs)["test_loss"] == 0.5
    assert many.best_of("layers", runs) == runs["layers"]


@pytest.mark.slow
def test_the_quick_form_of_many_runs_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(script_path("tune_many")), "--quick", f"--output={tmp_path}"]
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr
        assert "| tuner, all" in run.stdout
    assert "seed0_layers" not in run.stdout  # Was done before.
    runs = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]
    assert set(runs) == {"layers", "four", "annealed", "random, 0.3", "tpe, 0.3"}
    assert len(runs["layers"]["paths"]) == 21 and len(runs["four"]["paths"]) == 5
    assert (tmp_path / "tune_many.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_quick_form_runs_all_methods_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(script_path("tune_model")), "--quick", f"--output={tmp_path}"]
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr
        assert "| digits | Tuner" in run.stdout
    assert "digits_seed0_tuner_0" not in run.stdout  # Was done before.
    results = json.loads((tmp_path / "results.json").read_text())
    runs = results["tasks"]["digits"]
    assert set(runs) == {"tuner", "untuned", "annealed", "averaged", "random", "tpe", "hyperband"}
    assert all(run["test_loss"] < 1.0 for run in runs["tuner"])
    assert (tmp_path / "tune_model.png").read_bytes()[:4] == b"\x89PNG"

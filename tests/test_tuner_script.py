"""tune_model.py: what a run holds, what a budget pays for, and its --quick form."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from script_files import import_script, script_path


@pytest.fixture
def script(monkeypatch):
    return import_script("tune_model", monkeypatch)


def test_a_budget_pays_for_the_first_runs_and_validation_chooses_among_them(script):
    runs = [{"cpu_seconds": 10.0, "validation_loss": v, "test_loss": t}
            for v, t in ((0.5, 0.6), (None, None), (0.3, 0.45), (0.2, 0.2))]
    assert script.best_within(runs, 30.0) == 0.45
    assert script.best_within(runs, 39.0) == 0.45 and script.best_within(runs, 40.0) == 0.2
    assert script.best_within(runs, 1.0) == 0.6  # The first run is had in any case.
    assert script.best_within(runs[1:2], 100.0) is None
    tuned = [{"cpu_seconds": 2.0}, {"cpu_seconds": 6.0}]
    tpe = {"trials": [{"spent": 15.0, "validation_loss": 0.5, "test_loss": 0.5},
                      {"spent": 100.0, "validation_loss": 0.1, "test_loss": 0.1}]}
    assert script.searches({"tuner": tuned, "annealed": runs, "tpe": tpe}) == {
        "random, 1 x": 0.6, "tpe, 1 x": 0.5, "random, 10 x": 0.2, "tpe, 10 x": 0.5}
    # What has not spent ten times the seconds has no result for them.
    assert script.searches({"tuner": tuned, "annealed": runs[:2]}) == {"random, 1 x": 0.6}


def test_starts_are_the_same_in_every_process_and_within_their_ranges(script):
    for task in script.TASKS.values():
        assert task.draw(3) == task.draw(3) != task.draw(4)
        for index in range(50):
            for name, value in task.draw(index).items():
                low, high, _ = task.ranges()[name]
                assert low <= value <= high


def test_the_cosine_is_that_of_the_tuner(script):
    cosine = script.Cosine(0.4, 10)
    expected = [0.4] * 7 + [0.2 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    np.testing.assert_allclose([float(cosine(step)) for step in range(10)], expected, rtol=1e-5)


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
    assert set(runs) == {"tuner", "untuned", "annealed", "averaged", "tpe"}
    assert all(run["test_loss"] < 1.0 for run in runs["tuner"])
    assert (tmp_path / "tune_model.png").read_bytes()[:4] == b"\x89PNG"

"""The script of thousands of hyperparameters: both methods agree on each of its problems, and what it draws."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from script_files import given_flags, import_script, script_path


@pytest.fixture
def reverse(monkeypatch):
    return import_script("reverse_training", monkeypatch)


def settings_of(script):
    with given_flags(script.define_flags) as values:
        settings = {name: values[name].value for name in script.SETTINGS}
    return {**settings, **script.QUICK, "inner_steps": 4, "batch_size": 5, "units": 3, "hyper_iterations": 2}


def random_parts(name):
    """Training, validation and test data as the script loads them, of fewer pixels."""
    random = np.random.default_rng(0)
    if name == "ties":
        present = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], "float32")
        y = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2]])
        weights = np.array([[1, 1, 1, 1, 0, 0], [1] * 6], "float32")
        return [(random.random((2, 6, 9)).astype("float32"), y, weights, present) for _ in range(3)]
    return [(random.random((30, 9)).astype("float32"), np.arange(30) % 10) for _ in range(3)]


@pytest.mark.one_case
@pytest.mark.parametrize("name", ["l2", "ties", "scales", "rates", "momenta", "images"])
def test_hypergradients_of_an_experiment_are_the_same_by_both_methods_and_it_learns(
        name, reverse, tmp_path, monkeypatch):
    monkeypatch.setattr(reverse, "load", lambda *_: random_parts(name))
    settings = settings_of(reverse)
    result = reverse.learn(name, settings, None, 0, tmp_path)
    if name == "momenta":
        assert set(result["methods"]) == {"reverse"}
    else:
        assert result["methods"]["difference"] < 1e-4
        assert result["methods"]["reversible"]["stored_mb"] < result["methods"]["reverse"]["stored_mb"]
    numbers = {"rates": 16, "momenta": 32, "scales": 8, "l2": 90, "images": 90, "ties": 2}
    assert result["hyperparameters"] == numbers[name]
    assert len(result["validation_losses"]) == 2 and reverse.best_fixed(result) in result["fixed"]
    for key, value in result["start"].items():
        assert np.isfinite(value) and np.isfinite(result["end"][key])
    start = {"rates": 0.03, "momenta": 0.03, "scales": 0.3, "l2": 1e-3, "images": 0.0, "ties": 1e-3}[name]
    assert np.any(np.abs(np.array(next(iter(result["values"].values()))) - start) > 1e-6)
    json.dumps(result)


@pytest.mark.slow
def test_tables_and_pictures_are_made_of_the_results(reverse, tmp_path):
    losses = {"validation_loss": 0.5, "test_loss": 0.6, "test_accuracy": 0.8}
    run = {"hyperparameters": 7840, "weights": 7850, "start": losses, "end": losses, "fixed": {"one": losses},
           "methods": {"reverse": {"stored_mb": 6.0, "cpu_seconds": 1.0}}}
    values = {"rates": {"rate_1": [0.1, 0.2]}, "momenta": {"rate_1": [0.1, 0.2], "momentum_1": [0.9, 0.8]},
              "l2": {"l2": np.full((784, 10), 1e-3)}, "images": {"pixels": np.eye(10, 784)},
              "ties": {f"ties_{i}": [1e-3 * i for i, _ in enumerate(itertools.combinations(range(3), 2), 1)]
                       for i in (1, 2)}}
    runs = {name: {**run, "values": value} for name, value in values.items()}
    measured = {"rows": [{"method": "ReverseHG", "steps": 10, "cpu_seconds": 1.0, "stored_mb": 5.0}]}
    assert "7,840" in reverse.table(runs) and "6.00" in reverse.method_table(runs)
    reverse.plot(runs, measured, {"alphabets": 3}, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.skipif("FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")
@pytest.mark.slow
def test_quick_run_learns_measures_and_draws(tmp_path):
    run = subprocess.run([sys.executable, str(script_path("reverse_training")), "--quick", f"--output={tmp_path}"],
                         capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 6 and len(results["measured"]["rows"]) == 6
    assert len(list(tmp_path.glob("*.png"))) == 4

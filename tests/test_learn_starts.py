"""learn_starts.py: networks that are trained at once, what of runs is told, and its --quick form."""

import json
import math
import subprocess
import sys

import keras
import numpy as np
import pytest
from script_files import import_script, script_path


@pytest.fixture
def stacked(monkeypatch):
    return import_script("stacked_training", monkeypatch)


def test_networks_that_are_trained_at_once_end_as_those_that_keras_trains_alone(stacked):
    configurations = [{"learning_rate": 0.1, "momentum": 0.8, "l2": 1e-2}, {"learning_rate": 0.4, "momentum": 0.0,
                                                                           "l2": 1e-6}]
    draw = np.random.default_rng(0)
    (x, test_x), (y, test_y) = draw.normal(size=(2, 24, 5)).astype("float32"), np.arange(48).reshape(2, 24) % 3
    training = stacked.StackedTraining(configurations, 4, 6, steps=4, batch_size=8)  # Room for six classes, three used.
    found = training.losses((x, y), (test_x, test_y), seed=3)
    random = np.random.default_rng(3)
    indices = np.concatenate([random.permutation(24) for _ in range(2)])[:32].reshape(4, 8)
    kernels = [random.uniform(-1, 1, shape) for shape in ((5, 4), (4, 6))]
    for configuration, loss in zip(configurations, found):
        penalty = keras.regularizers.L2(configuration["l2"])
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(4, "relu", kernel_regularizer=penalty),
                                  keras.layers.Dense(6, kernel_regularizer=penalty)])
        model.set_weights([kernels[0] * math.sqrt(6 / 8), np.zeros(4), kernels[1] * math.sqrt(6 / 7),
                           np.where(np.arange(6) < 3, 0.0, -1e9)])
        model.compile(keras.optimizers.SGD(configuration["learning_rate"], configuration["momentum"]),
                      keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
        for batch in indices:
            model.train_on_batch(x[batch], y[batch])
        expected = model.loss(test_y, model(test_x))
        assert loss == pytest.approx(min(float(expected), math.log(3)), rel=1e-4)
    assert min(found) < math.log(3) - 0.01  # Not chance alone.


def test_configurations_fill_the_space_evenly(stacked):
    found = stacked.spread_configurations(64)
    values = np.array([list(entry.values()) for entry in found])
    assert len(np.unique(values[:, 0])) == 64
    for column, (name, (low, high)) in zip(values.T, stacked.SPACE.items()):
        units = (column - low) / (high - low) if name == "momentum" else np.log(column / low) / np.log(high / low)
        assert np.histogram(units, bins=8, range=(0, 1))[0].min() >= 5


def test_tables_of_results_say_where_a_run_came_to_what_the_middle_reached(monkeypatch):
    script = import_script("learn_starts", monkeypatch)
    run = {"test_loss": 1.0, "validation_loss": [3.0, 2.0, 1.5], "steps_of_epoch": 10}
    better = {"test_loss": 0.5, "validation_loss": [1.5, 1.2, 1.0], "steps_of_epoch": 10}
    assert script.steps_to(better, 1.5) == 10 and script.steps_to(run, 1.2) is None
    rows = script.tuning_rows({"a": {"middle": run, "symbolic": better}, "b": {"middle": better, "symbolic": run}})
    assert rows == [["middle", "0.750", "-", "30 (2 of 2)"], ["symbolic", "0.750", "1 of 2", "10 (1 of 2)"]]
    runs = [{"regrets": {"portfolio": [0.5, 0.25, 0.25], "middle": [0.5, None, None]}},
            {"regrets": {"portfolio": [0.7, 0.25, 0.25], "middle": [0.5, None, None]}}]
    assert script.regret_rows(runs) == [["portfolio", "0.600 (0.500 to 0.700)", "0.250", "0.250"],
                                        ["middle", "0.500", "-", "-"]]


@pytest.mark.slow
def test_the_quick_form_measures_compares_tunes_and_goes_on_where_it_was(tmp_path):
    import os
    if not os.environ.get("FARHOX_DATA_DIR"):
        pytest.skip("no data sets of TFDS")
    command = [sys.executable, str(script_path("learn_starts")), "--quick", f"--output={tmp_path}"]
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert run.returncode == 0, run.stderr
        assert "| portfolio " in run.stdout and "| middle, sweep " in run.stdout
    assert "alphabet_0" not in run.stdout  # Was done before.
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["regrets"]["omniglot"][0]["formulas"]) == {"learning_rate", "momentum", "l2"}
    assert (tmp_path / "learn_starts.png").exists() and (tmp_path / "table.json").exists()

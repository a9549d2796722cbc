"""Scripts of EvoGrad's applications: noisy labels by a weight net, classes of another domain."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from script_files import given_flags, import_script, script_path

needs_data = pytest.mark.skipif(
    "FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")


@pytest.fixture
def weigh(monkeypatch):
    return import_script("weigh_noisy_labels", monkeypatch)


@pytest.fixture
def cross(monkeypatch):
    return import_script("cross_domain", monkeypatch)


def quick_settings(script, **changed):
    """The settings that --quick gives, and some others."""
    with given_flags(script.define_flags) as values:
        settings = {name: values[name].value for name in script.SETTINGS}
    return {**settings, **script.QUICK, **changed}


def random_images(count):
    return np.random.default_rng(0).random((count, 28, 28, 1)).astype("float32"), np.arange(count) % 10


def test_a_wrong_label_is_one_of_two_of_its_class(weigh):
    y = np.arange(2000) % 10
    given, flipped = weigh.flip_two(y, 0.4, np.random.default_rng(0))
    assert flipped.sum() == 800 and np.all((given != y) == flipped)
    others = [np.unique(given[flipped & (y == k)], return_counts=True) for k in range(10)]
    assert all(len(labels) == 2 and counts.min() > 0.3 * counts.sum() for labels, counts in others)


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["evograd", "exact", "baseline", "oracle"])
def test_a_weight_net_is_trained_beside_the_classifier(weigh, method, tmp_path):
    settings = quick_settings(weigh, steps=4, evaluations=2, batch_size=10)
    (x, y), clean = random_images(40), random_images(20)
    given, flipped = weigh.flip_two(y, 0.4, np.random.default_rng(0))
    result = weigh.train(((x, given, flipped), clean, clean), "2-3", method, settings, 0, tmp_path)
    assert len(result["on_the_way"]) == 2 and 0.0 <= result["test_accuracy"] <= 1.0
    if method in ("exact", "evograd"):
        keras.utils.set_random_seed(0)
        weigh.compiled_model("2-3", settings)
        start = weigh.build_weight_net()(np.array(result["weights"]["loss"])[:, None])[:, 0]
        assert np.max(np.abs(result["weights"]["weight"] - start)) > 0
    json.dumps(result)


def test_tables_and_pictures_of_noisy_labels_are_made_of_the_results(weigh, tmp_path):
    settings = quick_settings(weigh, steps=10)
    run = {"test_accuracy": 0.75, "on_the_way": [0.5, 0.7]}
    learned = {**run, "weights": {"loss": [0.0, 1.0], "weight": [0.9, 0.1]}, "wrong_to_right": 0.25}
    by_seed = {0: {f"4-8 {method}": learned if method in ("exact", "evograd") else run for method in weigh.METHODS}}
    costs = {f"4-8 {method}": {"parameters": 6794, "seconds_per_step": 0.005, "step_mb": 1.5}
             for method in ("baseline", "exact", "evograd")}
    text = weigh.table(by_seed, costs, settings) + weigh.cost_table(costs)
    assert "75.0" in text and "0.25" in text and "6,794" in text and text.count("5.0 ") >= 7
    weigh.plot(by_seed, costs, settings, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def random_domains(cross):
    random = np.random.default_rng(0)
    return {name: [random.integers(0, 256, (12, 28, 28, 1)).astype("uint8") for _ in range(6)]
            for name in cross.DOMAINS}


def test_a_pair_of_episodes_is_of_two_domains(cross):
    settings = quick_settings(cross, steps=30)
    domains = [[np.full((12, 28, 28, 1), value, "uint8")] * 6 for value in (0, 1, 2)]
    seen, unseen = cross.training_episodes(domains, settings, 0)
    assert seen.shape == unseen.shape == (30, 5, 10, 28, 28, 1)
    pairs = {(first.min(), second.max()) for first, second in zip(seen, unseen)}
    assert pairs == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_strengths_move_where_they_are_learned_and_each_training_starts_anew(cross, tmp_path):
    settings = quick_settings(cross, steps=2, test_episodes=2, blocks=1, filters=2, queries=2, shots=2)
    trainings = cross.Trainings(settings)
    domains = random_domains(cross)
    results = [trainings.train(domains, "digits", method, 0, tmp_path / str(i))
               for i, method in enumerate(["evograd", "off", "fixed", "evograd"])]
    for kind, value in cross.INITIAL.items():
        learned, off, fixed, again = (np.array(result["strengths"][f"{kind}_1"]) for result in results)
        start = cross.softplus(value)
        assert np.all(np.abs(learned - start) > 1e-3) and np.all(off < 2e-6)
        np.testing.assert_allclose(fixed, start, rtol=1e-6)
        np.testing.assert_array_equal(again, learned)
    assert results[3]["accuracy"] == results[0]["accuracy"] and np.isfinite(results[1]["last_loss"])


def test_tables_and_pictures_of_domains_are_made_of_the_results(cross, tmp_path):
    settings = quick_settings(cross, blocks=1)
    run = {"accuracy": 0.75, "interval": 0.02, "strengths": {"scale_1": [0.5], "shift_1": [0.25]}}
    by_seed = {0: {f"digits {method}": run for method in cross.METHODS}}
    measured = {"rows": [{"filters": 4, "method": "exact", "parameters": 1234, "seconds_per_step": 0.005,
                          "step_mb": 1.5}]}
    assert "75.0" in cross.table(by_seed, settings) and "1,234" in cross.cost_table(measured)
    cross.plot(by_seed, measured, settings, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["weigh_noisy_labels", "cross_domain"])
def test_quick_run_measures_and_draws(name, tmp_path):
    run = subprocess.run([sys.executable, str(script_path(name)), "--quick", f"--output={tmp_path}"],
                         capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["measured"]["rows"] if name == "cross_domain" else results["costs"].values()
    assert len(rows) == 3 and all(row["seconds_per_step"] > 0 and row["step_mb"] >= 0 for row in rows)

"""The scripts of meta-learning: every algorithm runs, a killed run ends with the weights of one that was not."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[1] / "scripts"
needs_data = pytest.mark.skipif(
    "FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")
TINY = ["--quick", "--filters=4", "--meta_steps=8", "--steps_per_epoch=2", "--validation_episodes=10",
        "--test_episodes=10"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Keras' folder with Omniglot's small images, read once for all tests."""
    return {**os.environ, "KERAS_HOME": str(tmp_path_factory.mktemp("keras"))}


def start(script, output, environment, *flags):
    return subprocess.Popen([sys.executable, str(SCRIPTS / f"{script}.py"), f"--output={output}", *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


@needs_data
@pytest.mark.parametrize("algorithm", ["maml", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "fomaml", "anil", "imaml", "reptile", "hyper_representation", "joint", "protonet"))])
def test_every_algorithm_trains_and_is_judged_on_omniglot(algorithm, tmp_path, cache):
    text = finish(start("omniglot", tmp_path, cache, f"--algorithm={algorithm}", *TINY))
    assert f"| {algorithm}" in text
    results = json.loads((tmp_path / "results.json").read_text())
    run = results["seeds"]["0"]
    forms = {"support statistics"} if algorithm == "protonet" else {"transductive", "support statistics"}
    assert set(run["test"]) == forms
    for form, result in run["test"].items():
        assert result["episodes"] == 10 and result["transductive"] == (form == "transductive")
        assert 0.0 < result["accuracy"] < 1.0 and result["accuracy_interval"] > 0.0
    assert len(run["history"]["validation_accuracy"]) == 4 and np.all(np.isfinite(run["history"]["loss"]))
    for name in ("omniglot.png", "episodes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(algorithm, tmp_path, cache):
    flags = [f"--algorithm={algorithm}", "--inner_batch_size=3", "--save_every=0", *TINY]
    finish(start("omniglot", tmp_path / "whole", cache, *flags))
    process = start("omniglot", tmp_path / "killed", cache, *flags)
    state = tmp_path / "killed" / "runs" / "seed0" / "state.json"
    while not state.exists() or json.loads(state.read_text())["done"] < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    finish(start("omniglot", tmp_path / "killed", cache, *flags))
    whole, killed = (read_weights(tmp_path / name / "seed0.weights.h5") for name in ("whole", "killed"))
    assert set(whole) == set(killed) and len(whole) > 10
    for name in whole:
        np.testing.assert_array_equal(whole[name], killed[name], err_msg=name)


def read_weights(path):
    """All arrays of a file of weights by their path."""
    import h5py
    arrays = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return arrays


def test_maml_is_trained_and_compared_on_sinusoids(tmp_path):
    text = finish(start("sinusoid", tmp_path, None, "--quick", "--algorithms=maml,joint", "--meta_steps=300"))
    assert "| MAML" in text and "| Joint training" in text
    runs = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]
    maml, joint = runs["maml"], runs["joint"]
    assert len(maml["errors_by_step"]) == 6
    assert maml["errors_by_step"][5] == pytest.approx(maml["test"]["loss"], rel=1e-4)
    assert maml["test"]["loss"] < joint["test"]["loss"] and maml["loss"][-1] < maml["loss"][0]
    assert (tmp_path / "sinusoid.png").read_bytes().startswith(b"\x89PNG")


def test_meta_steps_that_make_no_whole_epochs_are_refused(tmp_path):
    process = start("omniglot", tmp_path, None, "--meta_steps=5", "--steps_per_epoch=2")
    assert "must be a multiple of --steps_per_epoch. Received: 5 and 2" in process.communicate()[1]
    assert process.returncode != 0

"""The scripts of meta-learning: every algorithm runs, a killed run ends with the weights of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from script_files import import_script, script_path

import farhox
from farhox import meta

needs_data = pytest.mark.skipif(
    "FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")
TINY = ["--quick", "--filters=4", "--meta_steps=8", "--steps_per_epoch=2", "--validation_episodes=10",
        "--test_episodes=10"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Keras' folder with Omniglot's small images, read once for all tests."""
    return {**os.environ, "KERAS_HOME": str(tmp_path_factory.mktemp("keras"))}


def load(name, monkeypatch):
    """A script as a module."""
    return import_script(name, monkeypatch)


def start(script, output, environment, *flags):
    return subprocess.Popen([sys.executable, str(script_path(script)), f"--output={output}", *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


@pytest.mark.parametrize("algorithm, loss", [("protonet", "loss"), ("maml", "outer_loss")])
def test_curves_are_drawn_of_the_loss_that_a_learner_has(algorithm, loss, tmp_path, monkeypatch):
    history = {"accuracy": [0.5, 0.6], loss: [1.0, 0.8], "validation_accuracy": [0.4, 0.5],
               "validation_loss": [1.1, 1.0]}
    load("omniglot", monkeypatch).plot_curves(
        {"algorithm": algorithm, "ways": 5, "shots": 1, "steps_per_epoch": 10}, {0: {"history": history}},
        tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [
    "maml", "fomaml", "anil", "imaml", "reptile", "hyper_representation", "joint", "protonet"])
def test_every_algorithm_trains_and_is_judged_on_omniglot(algorithm, tmp_path, cache):
    flags = [f"--algorithm={algorithm}", "--inner_learning_rate=0.1", "--greatest_inner_learning_rate=0.1001"]
    text = finish(start("omniglot", tmp_path, cache, *flags, "--normalize_features", *TINY))
    assert f"| {algorithm}" in text
    results = json.loads((tmp_path / "results.json").read_text())
    run = results["seeds"]["0"]
    forms = {"support statistics"} if algorithm == "protonet" else {"transductive", "support statistics"}
    assert set(run["test"]) == forms
    for form, result in run["test"].items():
        assert result["episodes"] == 10 and result["transductive"] == (form == "transductive")
        assert 0.0 < result["accuracy"] < 1.0 and result["accuracy_interval"] > 0.0
    losses = run["history"]["loss" if algorithm == "protonet" else "outer_loss"]
    assert len(run["history"]["validation_accuracy"]) == len(losses) == 4 and np.all(np.isfinite(losses))
    if algorithm == "hyper_representation":
        assert np.max(run["history"]["inner_learning_rate"]) <= 0.1001
    for name in ("omniglot.png", "episodes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(algorithm, tmp_path, cache):
    flags = [f"--algorithm={algorithm}", "--inner_batch_size=3", "--save_every=0", *TINY]
    finish(start("omniglot", tmp_path / "whole", cache, *flags))
    process = start("omniglot", tmp_path / "killed", cache, *flags)
    states = tmp_path / "killed" / "runs" / "seed0"
    while not (states / "state-00000002.farhox").exists():
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


@needs_data
@pytest.mark.slow
def test_hypergradients_of_more_steps_come_nearer_to_the_exact_one(tmp_path, cache):
    text = finish(start("effect_of_inner_steps", tmp_path, cache, "--quick"))
    assert "| exact" in text and "| residual" in text
    run = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]
    distances = [run["hypergradients"][str(steps)]["distance"] for steps in (1, 2, 4, 8, 16)]
    assert distances == sorted(distances, reverse=True)
    for name in ("1", "16", "exact"):
        assert len(run[name]["test_accuracy"]) == 11
        assert run[name]["validation_loss"][-1] < run[name]["validation_loss"][0]
    assert set(run["residual"]) >= {"parameters", "validation_accuracy", "test"}
    assert (tmp_path / "effect_of_inner_steps.png").read_bytes().startswith(b"\x89PNG")


def test_ridge_hypergradient_is_that_of_long_training(monkeypatch):
    script = load("effect_of_inner_steps", monkeypatch)
    random = np.random.default_rng(0)
    train, validation = ((random.normal(size=[12, 4]).astype("float32") / 2,
                          random.normal(size=[12, 3]).astype("float32")) for _ in range(2))
    problem = script.ridge_problem(4, 3, 0.5, 0.5)
    exact = script.RidgeHG(0.5).compute(problem, farhox.repeat(train, 1), validation)
    long = farhox.ReverseHG().compute(problem, farhox.repeat(train, 100), validation)
    np.testing.assert_allclose(exact.gradients[0], long.gradients[0], atol=1e-6)
    np.testing.assert_allclose(exact.outer_loss, long.outer_loss, rtol=1e-5)


@needs_data
@pytest.mark.slow
def test_sums_of_gradients_and_inner_mini_batches_are_compared(tmp_path, cache):
    text = finish(start("first_order_study", tmp_path, cache, "--quick", "--meta_steps=10"))
    assert "| g1+g2+g3+g4" in text and "| with replacement" in text and "FOMAML, separate tail" in text
    runs = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]
    assert len(runs) == 7 + 3 * (1 + 1 + 1)
    assert all(0.0 < run["test"]["accuracy"] < 1.0 for run in runs.values())
    assert (tmp_path / "first_order_study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_mini_batches_come_from_the_pool_and_the_tail(replacement, separate, monkeypatch):
    script = load("first_order_study", monkeypatch)
    element = script.mini_batches({"ways": 2, "pool": 6, "tail": 2}, 4, 4, replacement, separate, seed=1)
    pool, tail = (tf.range(count)[None] + start for count, start in ((12, 0), (4, 12)))
    episodes = meta.Episode((pool, pool), (tail, tail))
    (x, y), _ = element(tf.constant(3, tf.int64), episodes)
    assert x.shape == (1, 4, 4)
    np.testing.assert_array_equal(x, y)
    drawn = x.numpy()[0]
    assert np.all(drawn[:3] < 12) and (set(drawn[3]) == {12, 13, 14, 15} if separate else np.all(drawn[3] < 12))
    assert (len(set(drawn[:3].ravel())) == 12) != replacement
    np.testing.assert_array_equal(x, element(tf.constant(3, tf.int64), episodes)[0][0])
    assert not np.array_equal(x, element(tf.constant(4, tf.int64), episodes)[0][0])


@pytest.mark.slow
def test_maml_is_trained_and_compared_on_sinusoids(tmp_path):
    text = finish(start("sinusoid", tmp_path, None, "--quick", "--algorithms=maml,joint", "--meta_steps=400"))
    assert "| MAML" in text and "| Joint training" in text
    runs = json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]
    maml, joint = runs["maml"], runs["joint"]
    assert len(maml["errors_by_step"]) == 6
    assert maml["errors_by_step"][5] == pytest.approx(maml["test"]["loss"], rel=1e-4)
    assert maml["test"]["loss"] < joint["test"]["loss"] and maml["loss"][-1] < maml["loss"][0]
    assert (tmp_path / "sinusoid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_meta_steps_that_make_no_whole_epochs_are_refused(tmp_path):
    process = start("omniglot", tmp_path, None, "--meta_steps=5", "--steps_per_epoch=2")
    assert "must be a multiple of --steps_per_epoch. Received: 5 and 2" in process.communicate()[1]
    assert process.returncode != 0

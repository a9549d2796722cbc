"""The quickstart script, which is the first thing a newcomer runs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from script_files import given_flags, import_script, script_path


@pytest.fixture
def quickstart(monkeypatch):
    return import_script("quickstart", monkeypatch)


def what_it_wrote(output, shown, hyper_iterations):
    """The results in the folder `output`, after checks that hold for every length."""
    results = json.loads((output / "results.json").read_text())
    history = results["history"]
    assert len(history["learning_rate"]) == len(history["l2_strength"]) == hyper_iterations
    for name in ("untuned", "tuned", "clean_only"):
        assert f"{results[name]:.1%}" in shown
    for name in ("hyper_iterations.png", "example_weights.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    return results


def test_a_short_run_lowers_the_outer_loss_and_writes_what_it_found(quickstart, tmp_path, capsys):
    with given_flags(quickstart.define_flags, f"--output={tmp_path}", "--hyper_iterations=3", "--inner_steps=10"):
        quickstart.main(None)
    results = what_it_wrote(tmp_path, capsys.readouterr().out, 3)
    assert results["history"]["outer_loss"][-1] < results["history"]["outer_loss"][0]


@pytest.mark.slow
def test_the_tuned_model_beats_the_untuned_one_and_comes_near_the_clean_one(tmp_path):
    command = [sys.executable, str(script_path("quickstart")), f"--output={tmp_path}", "--hyper_iterations=30",
               "--inner_steps=60"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = what_it_wrote(tmp_path, run.stdout, 30)
    assert results["tuned"] > results["untuned"] + 0.02
    assert results["tuned"] > results["clean_only"] - 0.03
    assert results["precision"] > 0.8 and results["recall"] > 0.9
    assert results["history"]["outer_loss"][-1] < 0.7 * results["history"]["outer_loss"][0]


def test_flipped_labels_are_all_wrong_and_as_many_as_asked_for(quickstart):
    y = np.random.default_rng(0).integers(0, 10, 200)
    noisy, flipped = quickstart.flip_labels(y, 0.3, np.random.default_rng(1))
    assert np.sum(flipped) == 60
    np.testing.assert_array_equal(noisy != y, flipped)
    assert set(np.unique(noisy)) <= set(range(10))


def test_precision_and_recall_count_the_weights_that_have_fallen(quickstart):
    weights, flipped = np.array([0.1, 0.2, 0.4, 0.5, 0.9]), np.array([True, True, False, True, False])
    assert quickstart.find_flipped(weights, flipped) == (2 / 3, 2 / 3)
    assert quickstart.find_flipped(np.ones(5), flipped) == (0.0, 0.0)


def test_parts_of_the_digits_are_disjoint_and_hold_all_of_them(quickstart):
    parts = quickstart.load("digits", None, np.random.default_rng(0))
    assert [len(x) for x, _ in parts] == [600, 700, 497]
    assert all(x.dtype == np.float32 and 0.0 <= x.min() and x.max() <= 1.0 for x, _ in parts)
    images = np.concatenate([x for x, _ in parts])
    again = np.concatenate([x for x, _ in quickstart.load("digits", None, np.random.default_rng(1))])
    assert not np.array_equal(images, again)
    np.testing.assert_array_equal(np.sort(images.sum(axis=1)), np.sort(again.sum(axis=1)))


@pytest.mark.slow
@pytest.mark.skipif("FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")
def test_images_of_tfds_keep_their_test_set(quickstart, monkeypatch):
    try:
        from tensorflow_datasets import builder as builder_of
    except ImportError as error:
        pytest.skip(f"tensorflow-datasets is not installed, or does not work beside this TensorFlow: {error}")
    monkeypatch.setitem(quickstart.SIZES, "mnist", (300, 200, 50))
    folder = os.environ["FARHOX_DATA_DIR"]
    train, validation, test = quickstart.load("mnist", folder, np.random.default_rng(0))
    assert [x.shape for x, _ in (train, validation, test)] == [(300, 784), (200, 784), (10000, 784)]
    builder = builder_of("mnist", data_dir=folder)
    first = {split: builder.as_dataset(split=f"{split}[:200]", batch_size=-1) for split in ("train", "test")}
    np.testing.assert_array_equal(test[0][:200], first["test"]["image"].numpy().reshape(200, -1) / np.float32(255.0))
    np.testing.assert_array_equal(test[1][:200], first["test"]["label"].numpy())
    assert not np.array_equal(train[1][:200], first["train"]["label"].numpy())


def test_a_missing_package_is_named_with_the_command_that_installs_it(quickstart, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"needs the package matplotlib.*pip install '\.\[examples\]'"):
        quickstart.main(None)


def test_importing_the_script_defines_no_flag(quickstart):
    from absl import flags
    assert not {"dataset", "hyper_iterations", "inner_steps"} & set(flags.FLAGS)

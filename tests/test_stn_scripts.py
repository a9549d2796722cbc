"""The experiments with self-tuning networks: each runs in its --quick setting, and what they share keeps its word."""

import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from absl import flags
from script_files import import_script, script_path

import farhox

EXPERIMENTS = ["stn_fashion_mnist", "stn_text", "stn_cifar10"]
needs_data = pytest.mark.skipif(
    "FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")
SETTINGS = {
    "train_examples": 40, "validation_examples": 24, "steps": 8, "evaluate_every": 2, "batch_size": 8,
    "learning_rate": 0.1, "hyper_learning_rate": 0.1, "scale_learning_rate": 0.1, "entropy_weight": 1e-3,
    "initial_scale": 0.5, "warmup_steps": 2, "training_steps": 2, "validation_steps": 1, "method": "stn", "trials": 4}


@pytest.fixture
def load(monkeypatch):
    """Imports a script by its name."""
    return lambda name: import_script(name, monkeypatch)


@pytest.fixture
def task(load):
    """A small dense network with dropout and a discrete hyperparameter, on random data."""
    stn_training = load("stn_training")
    from farhox import stn
    random = np.random.default_rng(0)
    parts = tuple((random.random((size, 6, 6, 1)).astype("float32"), random.integers(0, 3, size))
                  for size in (40, 24, 30))

    def build(h):
        return keras.Sequential([
            keras.Input([6, 6, 1]), stn.Cutout(h["length"]), keras.layers.Flatten(), keras.layers.Dense(8, "relu"),
            stn.Dropout(h["rate"]), keras.layers.Dense(3)])

    ranges = {"rate": stn_training.Range(0.1, 0.0, 0.9), "length": stn_training.Range(1.5, 0.0, 4.0, True)}
    return stn_training.Task(ranges, build, parts, lambda: keras.optimizers.SGD(0.1, momentum=0.9))


def run(script, output, *arguments):
    return subprocess.run([sys.executable, str(script_path(script)), f"--output={output}", *arguments],
                          capture_output=True, text=True, timeout=600)


def check(process, script, output, baselines):
    assert process.returncode == 0, process.stderr
    assert "| Self-tuning network" in process.stdout
    assert (output / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((output / "results.json").read_text())
    result = results["seeds"]["0"]
    assert set(result["searches"]) == set(baselines) - {"fixed"}
    assert all(len(runs) == results["settings"]["trials"] for runs in result["searches"].values())
    runs = [result["stn"], *(run for runs in result["searches"].values() for run in runs), *result["fixed"].values()]
    rounds = results["settings"]["steps"] // results["settings"]["evaluate_every"]
    for entry in runs:
        assert len(entry["losses"]) == len(entry["cpu_times"]) == rounds and np.all(np.isfinite(entry["losses"]))
        assert entry["best_loss"] == min(entry["losses"]) and math.isfinite(entry["test_loss"])
    return result


@needs_data
@pytest.mark.slow
def test_dropout_and_augmentation_are_tuned_on_fashion_mnist_and_compared_with_searches(tmp_path):
    baselines = ["grid", "random", "tpe", "fixed"]
    result = check(run("stn_fashion_mnist", tmp_path, "--quick", f"--baseline={','.join(baselines)}"),
                   "stn_fashion_mnist", tmp_path, baselines)
    assert set(result["fixed"]) == {"schedule", "final", "start", "search"}
    schedule = result["stn"]["schedule"]
    assert all(values[0] != values[-1] for values in schedule["values"].values())
    assert result["fixed"]["final"]["values"] == {name: values[-1] for name, values in schedule["values"].items()}
    best = min((run for runs in result["searches"].values() for run in runs), key=lambda run: run["best_loss"])
    assert result["fixed"]["search"]["values"] == best["values"]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("flags_", [["--level=characters", "--baseline=tpe,fixed"],
                                    ["--level=words", "--baseline=random", "--method=delta"]])
def test_rates_of_a_language_model_are_tuned_on_characters_and_words(flags_, tmp_path):
    baselines = next(flag for flag in flags_ if flag.startswith("--baseline=")).partition("=")[2].split(",")
    check(run("stn_text", tmp_path, "--quick", *flags_), "stn_text", tmp_path, baselines)


@pytest.mark.slow
def test_a_language_model_reads_a_folder_of_penn_treebank(tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"ptb.{part}.txt").write_text(" the cat <unk> on the mat \n a dog sat \n" * 40)
    check(run("stn_text", tmp_path / "out", "--quick", f"--folder={tmp_path}", "--baseline=grid"),
          "stn_text", tmp_path / "out", ["grid"])


@pytest.mark.slow
def test_the_fifteen_hyperparameters_of_the_paper_are_tuned_on_images_like_those_of_cifar10(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import stn_cifar10, tensorflow_datasets as tfds\n"
            "with tfds.testing.mock_data(num_examples=400):\n"
            "    stn_cifar10.define_flags(); stn_cifar10.program.run(stn_cifar10.main)")
    command = [sys.executable, "-c", code, str(script_path("stn_cifar10").parent), "--quick", f"--output={tmp_path}",
               "--baseline=random,fixed"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    result = check(process, "stn_cifar10", tmp_path, ["random", "fixed"])
    assert len(result["stn"]["schedule"]["values"]) == 15


class Interrupted(keras.callbacks.Callback):
    """Ends the process' part of a training after some epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.left = epochs

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.left:
            raise KeyboardInterrupt


def without_times(result):
    return {name: value for name, value in result.items() if name not in ("cpu_times", "time_before")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stn", pytest.param("delta", marks=pytest.mark.slow)])
def test_an_interrupted_self_tuned_training_ends_with_the_numbers_of_one_that_was_not(
        load, task, method, monkeypatch, tmp_path):
    stn_training = load("stn_training")
    settings = {**SETTINGS, "method": method}
    whole = stn_training.self_tune(task, settings, 3, tmp_path / "whole")
    fit = stn_training.fit
    monkeypatch.setattr(stn_training, "fit", lambda *arguments, **others: fit(
        *arguments, callbacks=[Interrupted(2)], **others))
    with pytest.raises(KeyboardInterrupt):
        stn_training.self_tune(task, settings, 3, tmp_path / "parts", save_every=0.0)
    assert farhox.callbacks.Resume(tmp_path / "parts").initial_epoch == 2
    monkeypatch.setattr(stn_training, "fit", fit)
    parts = stn_training.self_tune(task, settings, 3, tmp_path / "parts", save_every=0.0)
    assert parts["time_before"]["seconds"] > 0.0
    assert without_times(parts) == without_times(whole)
    assert len(set(whole["losses"])) == 4 and whole["schedule"]["steps"] == list(range(9))


@pytest.mark.slow
def test_an_interrupted_plain_training_ends_with_the_numbers_of_one_that_was_not(load, task, monkeypatch, tmp_path):
    stn_training = load("stn_training")
    values = {"rate": 0.3, "length": 2.5}
    trainer = stn_training.PlainTrainer(task, SETTINGS)
    whole = trainer.train(3, tmp_path / "whole", values)
    fit = stn_training.fit
    monkeypatch.setattr(stn_training, "fit", lambda *arguments, **others: fit(
        *arguments, **{**others, "callbacks": [Interrupted(3)], "save_every": 0.0}))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(3, tmp_path / "parts", values)
    monkeypatch.setattr(stn_training, "fit", fit)
    parts = stn_training.PlainTrainer(task, SETTINGS).train(3, tmp_path / "parts", values)
    assert without_times(parts) == without_times(whole)


@pytest.mark.slow
def test_trainings_of_one_network_do_not_know_of_each_other(load, task, tmp_path):
    stn_training = load("stn_training")
    trainer = stn_training.PlainTrainer(task, SETTINGS)
    first, other, again = (trainer.train(seed, tmp_path / str(i), {"rate": rate, "length": 1.5})
                           for i, (seed, rate) in enumerate([(3, 0.3), (4, 0.8), (3, 0.3)]))
    assert without_times(first) == without_times(again) and first["losses"] != other["losses"]


@pytest.mark.slow
def test_a_constant_schedule_trains_as_fixed_values_do(load, task, tmp_path):
    stn_training = load("stn_training")
    trainer = stn_training.PlainTrainer(task, SETTINGS)
    fixed = trainer.train(3, tmp_path / "fixed", {"rate": 0.25, "length": 2.5})
    schedule = {"steps": [0, 4], "values": {"rate": [0.25, 0.25], "length": [2.5, 2.5]}}
    assert without_times(trainer.train(3, tmp_path / "schedule", schedule=schedule)) == without_times(fixed)
    schedule["values"]["rate"] = [0.25, 0.85]
    changed = trainer.train(3, tmp_path / "changed", schedule=schedule)
    assert changed["losses"][:2] == fixed["losses"][:2] and changed["losses"][2:] != fixed["losses"][2:]


@pytest.mark.slow
def test_the_test_loss_is_that_of_the_weights_with_the_least_validation_loss(load, task, tmp_path):
    stn_training = load("stn_training")
    # All parts are the same examples. The loss goes down for two evaluations and up after them.
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.01, 30.0])
    task = stn_training.Task(task.ranges, task.build, (task.parts[1],) * 3, lambda: keras.optimizers.SGD(rate))
    result = stn_training.PlainTrainer(task, SETTINGS).train(3, tmp_path, {"rate": 0.01, "length": 0.5})
    assert result["best"] == 1
    assert result["test_loss"] == pytest.approx(min(result["losses"]), rel=1e-5)
    assert result["test_loss"] < 0.9 * result["losses"][-1]


def test_the_order_of_examples_goes_on_where_it_was_and_passes_over_all_of_them(load):
    order = load("stn_training").example_order
    whole = order(10, 0, 9, 4, seed=5)
    np.testing.assert_array_equal(np.concatenate([order(10, 0, 2, 4, 5), order(10, 2, 3, 4, 5), order(10, 5, 4, 4, 5)]),
                                  whole)
    for i in range(3):
        assert sorted(whole[10 * i:10 * (i + 1)]) == list(range(10))
    assert list(whole[:10]) != list(whole[10:20]) and list(order(10, 0, 9, 4, seed=6)) != list(whole)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_a_search_goes_on_with_the_values_it_would_have_drawn(load, task, sampler, tmp_path):
    stn_experiment, experiment = load("stn_experiment"), load("experiment")

    class Trainer:
        trained = 0

        def train(self, seed, folder, values):
            self.trained += 1
            return {"best_loss": None if self.trained == 2 else (values["rate"] - 0.4) ** 2}

    settings, folder = {**SETTINGS, "trials": 6}, experiment.Folder(tmp_path, SETTINGS)
    trainer = Trainer()
    whole = stn_experiment.search(task, trainer, settings, 1, sampler, folder)
    assert trainer.trained == 6 and len({json.dumps(run["values"]) for run in whole}) == 6
    for run_ in whole:
        assert 0.0 < run_["values"]["rate"] < 0.9 and run_["values"]["length"] in (0.5, 1.5, 2.5, 3.5)
    for file in sorted((tmp_path / "runs").glob("*_0[3-5].json")):
        file.unlink()
    again = stn_experiment.search(task, trainer, settings, 1, sampler, folder)
    assert [run["values"] for run in again] == [run["values"] for run in whole]
    assert stn_experiment.loss_of(whole[1]) == math.inf


def test_curves_and_table_count_all_trainings_of_a_search(load):
    stn_experiment = load("stn_experiment")
    runs = [{"losses": [3.0, 2.0], "cpu_times": [1.0, 2.0], "best_loss": 2.0, "test_loss": 2.5, "test_accuracy": 0.5},
            {"losses": [None, 1.5], "cpu_times": [2.0, 5.0], "best_loss": 1.5, "test_loss": 2.7, "test_accuracy": 0.6}]
    seconds, losses = stn_experiment.best_so_far(runs)
    np.testing.assert_array_equal(seconds, [1.0, 2.0, 4.0, 7.0])
    np.testing.assert_array_equal(losses, [3.0, 2.0, 2.0, 1.5])
    result = {"stn": runs[0], "searches": {"random": runs}, "fixed": {"final": runs[1]}}
    settings = {**SETTINGS, "trials": 2}
    rows = stn_experiment.summaries({0: result, 1: result}, settings)
    assert [(label, [run["test_loss"] for run in chosen], *rest) for label, chosen, *rest in rows] == [
        ("Self-tuning network", [2.5, 2.5], 12, [2.0, 2.0]),
        ("Random search, best by validation loss", [2.7, 2.7], 16, [7.0, 7.0]),
        ("Random search, best by test loss", [2.5, 2.5], 16, [7.0, 7.0]),
        (stn_experiment.FIXED["final"], [2.7, 2.7], 8, [5.0, 5.0])]
    assert "1.5000 (1.5000 to 1.5000)" in stn_experiment.table(rows)


def test_texts_become_windows_with_the_next_token_as_target(load, tmp_path):
    data_sets = load("data_sets")
    texts, vocabulary = data_sets.encode([list("aababcaab"), list("abxc")], 3)
    assert vocabulary == 3
    np.testing.assert_array_equal(texts[0], [0, 0, 1, 0, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(texts[1], [0, 1, 2, 2])
    x, y = data_sets.windows(texts[0], 4, 9)
    np.testing.assert_array_equal(x, [[0, 0, 1, 0], [1, 2, 0, 0]])
    np.testing.assert_array_equal(y, [[0, 1, 0, 1], [2, 0, 0, 1]])
    with pytest.raises(SystemExit, match="must have more than --window tokens. Received: 4 and 4"):
        data_sets.windows(texts[1], 4, 9)


def test_a_folder_without_all_three_texts_is_an_error_that_names_the_missing_ones(load, tmp_path):
    data_sets = load("data_sets")
    (tmp_path / "ptb.train.txt").write_text("a b")
    with pytest.raises(SystemExit, match=r"Missing in .*: ptb.valid.txt, ptb.test.txt"):
        data_sets.read_texts("words", tmp_path, None)


def test_the_plain_language_model_is_the_self_tuning_one_with_closed_gates(load):
    from farhox import stn
    stn_text = load("stn_text")
    h = {name: entry.hyperparameter(name) for name, entry in stn_text.RANGES.items()}
    model = stn_text.build(11, 4, 5, h)
    # Embedding, and kernel, recurrent kernel and bias of two layers; the output has no weights of its own.
    assert len(model.trainable_variables) == 7 and model.output.shape == (None, 5, 11)
    tokens = np.arange(10).reshape(2, 5)
    before = np.asarray(model(tokens))
    for name, entry in stn_text.RANGES.items():
        h[name].assign(0.9 * entry.high)
    np.testing.assert_array_equal(model(tokens), before)
    tuned = stn.SelfTuningModel(stn_text.open_gates(model, list(h.values())), list(h.values()))
    assert len(tuned.trainable_variables) > 7 + 7
    np.testing.assert_array_equal(tuned(tokens), before)
    assert "none" in stn.summary(tuned).splitlines()[-1]


def test_steps_that_make_no_whole_rounds_are_refused(load):
    with pytest.raises(SystemExit, match="--steps must be a multiple of --evaluate_every. Received: 10 and 4"):
        load("stn_experiment").main("script", {"steps": 10, "evaluate_every": 4}, lambda *_: pytest.fail("it went on"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_importing_an_experiment_defines_no_flag(load, name):
    assert not set(load(name).SETTINGS) & set(flags.FLAGS)

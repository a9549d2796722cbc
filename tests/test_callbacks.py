"""HyperparameterTrace: what it records, where it puts it, and files that go on after an interruption."""

import functools
import importlib.util
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import variable

import farhox
from farhox.callbacks import HyperparameterTrace, Resume, read_trace

PER_EPOCH = 4


@functools.cache
def traced(goal, **compiled):
    """What `new` makes, and the values of all its variables."""
    made = new(goal, **compiled)
    everything = [*made[0].variables, *made[0].optimizer.variables]
    return made, [(own, own.numpy()) for own in everything]


def make(goal=1.0, **compiled):
    """One of each kind for all tests, which is traced once, at its initial values."""
    made, initial = traced(goal, **compiled)
    for own, value in initial:
        own.assign(value)
    made[0].reset_metrics()
    return made


def new(goal=1.0, **compiled):
    """A quadratic with a scalar, a small and a large array, and a plain scalar variable as outer variables."""
    w, shift = variable(np.linspace(1.0, 2.0, 20)), variable(0.5, name="shift")
    rate = farhox.Hyperparameter(0.1, low=0.0, high=1.0, name="rate", dtype="float64")
    pair = farhox.Hyperparameter([0.2, 0.4], low=0.0, name="pair", dtype="float64")
    weights = farhox.ExampleWeights(20, name="weights", dtype="float64")
    problem = farhox.BilevelProblem(
        lambda scale: scale * keras.ops.sum(weights.natural_value() * (w - shift) ** 2) + keras.ops.sum(pair()) * w[0],
        lambda scale: keras.ops.sum((w - goal) ** 2), [w], [rate, pair, weights, shift], farhox.GradientDescent(rate))
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile(keras.optimizers.Adam(0.1), **compiled)
    return optimizer, {"rate": rate, "pair": pair, "weights": weights}, shift


def fit(optimizer, callbacks, epochs=3):
    scales = tf.constant(np.random.default_rng(0).uniform(0.5, 1.5, (PER_EPOCH, 3)))
    data = tf.data.Dataset.from_tensor_slices((scales, tf.ones([PER_EPOCH], "float64")))
    optimizer.fit(data, epochs=epochs, verbose=0, callbacks=callbacks)


class Interrupt(keras.callbacks.Callback):
    """Ends the run in the middle of an epoch, as a crash would."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch, self.now = epoch, False

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch == self.epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now and batch == 1:
            raise InterruptedError


def test_record_k_holds_the_natural_values_after_k_hyper_iterations():
    trace = HyperparameterTrace()
    fit(make()[0], [trace])
    optimizer, named, shift = make()
    scales = np.random.default_rng(0).uniform(0.5, 1.5, (PER_EPOCH, 3))
    assert sorted(trace.history) == sorted(["hyper_iteration", "shift", *named])
    np.testing.assert_array_equal(trace.history["hyper_iteration"], np.arange(13))
    for k in range(13):
        for name, entry in named.items():
            np.testing.assert_allclose(trace.history[name][k], entry.numpy(), rtol=1e-9)
        np.testing.assert_allclose(trace.history["shift"][k], shift.numpy(), rtol=1e-9)
        optimizer.step(tf.constant(scales[k % PER_EPOCH]), tf.constant(1.0, "float64"))


def test_file_has_the_scalars_of_the_history_to_the_last_bit(tmp_path):
    trace = HyperparameterTrace(tmp_path / "trace.csv")
    fit(make()[0], [trace])
    found, history = read_trace(tmp_path / "trace.csv"), trace.history
    assert list(found) == ["hyper_iteration", "rate", "pair[0]", "pair[1]", "weights_mean", "shift"]
    for name in ("hyper_iteration", "rate", "shift"):
        np.testing.assert_array_equal(found[name], history[name])
    np.testing.assert_array_equal(np.stack([found["pair[0]"], found["pair[1]"]], 1), history["pair"])
    np.testing.assert_allclose(found["weights_mean"], history["weights"].mean(1), rtol=1e-12)


@pytest.mark.one_case
@pytest.mark.parametrize("every, compiled, expected", [
    (1, {}, range(13)), (5, {}, [0, 5, 10]), ("epoch", {}, [0, 4, 8, 12]),
    (1, {"steps_per_execution": 2}, range(0, 13, 2)), (3, {"steps_per_execution": 2}, [0, 4, 8, 12])])
def test_every_says_how_many_hyper_iterations_lie_between_records(every, compiled, expected):
    trace = HyperparameterTrace(every=every)
    fit(make(**compiled)[0], [trace])
    np.testing.assert_array_equal(trace.history["hyper_iteration"], list(expected))


@pytest.mark.slow
@pytest.mark.parametrize("trace_first", [True, False])
@pytest.mark.parametrize("every, save_freq", [(3, "epoch"), (1, 3)])
def test_resumed_file_is_that_of_a_run_that_was_not_interrupted(tmp_path, every, save_freq, trace_first):
    def run(name, extra=()):
        callbacks = [HyperparameterTrace(tmp_path / name, every=every),
                     keras.callbacks.BackupAndRestore(tmp_path / f"backup_{name}", save_freq=save_freq)]
        optimizer = new()[0]  # Keras' callback leaves its mark on a model.
        fit(optimizer, [*(callbacks if trace_first else callbacks[::-1]), *extra])
        return optimizer

    with pytest.raises(InterruptedError):
        run("resumed", [Interrupt(2)])
    interrupted = read_trace(tmp_path / "resumed")["hyper_iteration"]
    resumed = run("resumed")
    counts = read_trace(tmp_path / "resumed")["hyper_iteration"]
    np.testing.assert_array_equal(counts, np.unique(counts))
    # With save_freq in hyper-iterations Keras begins the interrupted epoch anew from its middle: 9 + 4.
    assert counts[-1] <= resumed.hyper_iterations == (12 if save_freq == "epoch" else 13)
    assert set(interrupted[:-2]) <= set(counts)
    if save_freq == "epoch":
        run("whole")
        assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("every, save_every", [
    (3, 2), pytest.param(1, "epoch", marks=pytest.mark.slow), pytest.param("epoch", 1, marks=pytest.mark.slow)])
def test_file_of_a_run_that_resume_goes_on_with_is_that_of_one_that_was_not_interrupted(tmp_path, every, save_every):
    def run(name, extra=()):
        fit(make()[0], [HyperparameterTrace(tmp_path / name, every=every),
                        Resume(tmp_path / f"states_{name}", every=save_every), *extra])

    with pytest.raises(InterruptedError):
        run("resumed", [Interrupt(2)])
    run("resumed")
    run("whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.one_case
@pytest.mark.parametrize("damage", [
    lambda text: text[:text.rindex(",") + 4],  # The process ended while it wrote a line,
    lambda text: "".join(text.splitlines(True)[:-1])])  # or between the backup and the record.
def test_record_that_was_cut_off_is_made_again(tmp_path, damage):
    file = tmp_path / "trace.csv"
    optimizer = make()[0]
    fit(optimizer, [HyperparameterTrace(file, every="epoch")], epochs=2)
    before = file.read_bytes().decode()
    file.write_bytes(damage(before).encode())
    fit(optimizer, [HyperparameterTrace(file, every="epoch")], epochs=1)
    after = file.read_bytes().decode()
    assert after.startswith(before)
    np.testing.assert_array_equal(read_trace(file)["hyper_iteration"], [0, 4, 8, 12])


def test_file_cut_off_in_its_first_line_is_begun_anew(tmp_path):
    (tmp_path / "trace.csv").write_text("hyper_iter")
    fit(make()[0], [HyperparameterTrace(tmp_path / "trace.csv")], epochs=1)
    np.testing.assert_array_equal(read_trace(tmp_path / "trace.csv")["hyper_iteration"], np.arange(5))


@pytest.mark.slow
def test_second_fit_goes_on_and_a_new_run_starts_anew(tmp_path):
    trace = HyperparameterTrace(tmp_path / "trace.csv")
    optimizer, named, _ = make()
    fit(optimizer, [trace], epochs=1)
    fit(optimizer, [trace], epochs=1)
    for counts in (trace.history["hyper_iteration"], read_trace(tmp_path / "trace.csv")["hyper_iteration"]):
        np.testing.assert_array_equal(counts, np.arange(9))
    other, named, _ = make()
    named["rate"].assign(0.3)
    fit(other, [HyperparameterTrace(tmp_path / "trace.csv")], epochs=1)
    found = read_trace(tmp_path / "trace.csv")
    np.testing.assert_array_equal(found["hyper_iteration"], np.arange(5))
    np.testing.assert_allclose(found["rate"][0], 0.3)


@pytest.mark.slow
def test_skipped_updates_count_as_hyper_iterations():
    optimizer, _, _ = make(goal=float("nan"))
    assert optimizer.hyper_iterations == farhox.HyperOptimizer(optimizer.problem).hyper_iterations == 0
    trace = HyperparameterTrace()
    fit(optimizer, [trace], epochs=1)
    np.testing.assert_array_equal(trace.history["hyper_iteration"], np.arange(5))
    assert np.ptp(trace.history["rate"]) == 0 and optimizer.hyper_iterations == 4


@pytest.mark.slow
def test_tensorboard_has_scalars_and_histograms_of_arrays(tmp_path):
    trace = HyperparameterTrace(log_dir=tmp_path, every=2)
    fit(make()[0], [trace], epochs=1)
    scalars, histograms = {}, {}
    for path in pathlib.Path(tmp_path).iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                tensor = tf.make_ndarray(value.tensor)
                (scalars if tensor.ndim == 0 else histograms).setdefault(value.tag, {})[event.step] = tensor
    assert sorted(scalars) == [f"hyperparameters/{name}"
                               for name in ("pair[0]", "pair[1]", "rate", "shift", "weights_mean")]
    assert sorted(histograms) == ["hyperparameters/pair", "hyperparameters/weights"]
    for k, count in enumerate([0, 2, 4]):
        np.testing.assert_allclose(scalars["hyperparameters/rate"][count], trace.history["rate"][k], rtol=1e-6)
        # Rows of a histogram are (left end, right end, number of entries).
        assert histograms["hyperparameters/weights"][count][:, 2].sum() == 20


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "batch", None])
def test_every_must_be_a_positive_integer_or_epoch(every):
    with pytest.raises(ValueError, match='every must be a positive integer or "epoch"'):
        HyperparameterTrace(every=every)


def test_other_models_are_refused():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", "mean_squared_error")
    with pytest.raises(TypeError, match="needs a farhox.HyperOptimizer"):
        model.fit(np.ones([2, 2]), np.ones([2, 1]), callbacks=[HyperparameterTrace()], verbose=0)


def test_problem_without_hyperparameters_is_refused():
    w, many = variable(1.0), variable([1.0, 2.0])
    problem = farhox.BilevelProblem(
        lambda scale: scale * keras.ops.sum((w - many) ** 2), lambda scale: w ** 2, [w], [many])
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile("adam")
    with pytest.raises(ValueError, match="needs a problem with hyperparameters"):
        fit(optimizer, [HyperparameterTrace()])


def test_files_of_something_else_are_left_as_they_are(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("age,height\n3,99\n")
    with pytest.raises(ValueError, match="csv_path must be a new file or the trace of the same"):
        fit(make()[0], [HyperparameterTrace(file)])
    with pytest.raises(ValueError, match="begins with the column hyper_iteration"):
        read_trace(file)
    assert file.read_text() == "age,height\n3,99\n"


def test_missing_tensorboard_is_an_import_error_when_it_is_asked_for(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    HyperparameterTrace(csv_path="trace.csv")
    with pytest.raises(ImportError, match=r"pip install 'farhox\[tensorboard\]'"):
        HyperparameterTrace(log_dir="logs")

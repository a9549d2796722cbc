"""Tuner: a run that is interrupted ends as one that was not, and what it must not be given."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(120, 4)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype("int64")
EPOCHS = 5
# The run of `tune`, in a process that kills itself at the end of an epoch.
KILLED = """
import os, signal, sys
import keras
import test_tuner_resuming
class Kill(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
test_tuner_resuming.tune(sys.argv[1], [Kill()])
"""


class Stop(keras.callbacks.Callback):
    """Ends the program in an epoch, or sends itself a signal."""

    def __init__(self, epoch, number=None):
        super().__init__()
        self.epoch, self.number = epoch, number

    def on_train_batch_end(self, batch, logs=None):
        if self._epoch == self.epoch and batch == 0:
            if self.number is not None:
                os.kill(os.getpid(), self.number)
                return
            raise InterruptedError

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch


def tune(folder=None, callbacks=(), stream=False, epochs=EPOCHS):
    """A small tuned run; returns the tuner and its history."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(6, activation="tanh", kernel_regularizer="l2"),
                              keras.layers.Dropout(0.2), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    train = (X[:80], Y[:80])
    if stream:
        train = tf.data.Dataset.from_tensor_slices(train).shuffle(80, seed=3).batch(8)
    tuner = farhox.Tuner(model)
    callbacks = [*callbacks, keras.callbacks.EarlyStopping("val_loss", patience=9)]
    if folder is not None:
        callbacks.append(farhox.callbacks.Resume(folder))
    history = tuner.fit(train, batch_size=None if stream else 8, epochs=epochs, validation_data=(X[80:], Y[80:]),
                        verbose=0, callbacks=callbacks)
    return tuner, history.history


def check_same(found, expected):
    """Up to rounding: a graph that is traced anew may add up in another order."""
    for value, other in zip(found[0].get_model().get_weights(), expected[0].get_model().get_weights(), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    assert list(found[1]) == list(expected[1]) and found[0].notes == expected[0].notes
    for name, values in expected[1].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-5)
    for name, values in expected[0].get_schedule().items():
        np.testing.assert_allclose(found[0].get_schedule()[name], values, rtol=1e-5)


@pytest.fixture(scope="module")
def whole():
    return tune()


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights_and_history(whole, tmp_path):
    with pytest.raises(InterruptedError):
        tune(tmp_path, [Stop(2)])
    check_same(tune(tmp_path), whole)
    # It is finished: nothing is trained, and all of it is there.
    check_same(tune(tmp_path, [Stop(0)]), whole)


@pytest.mark.slow
def test_a_signal_waits_for_the_end_of_the_epoch_and_the_run_goes_on(whole, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        tune(tmp_path, [Stop(1, signal.SIGTERM)])
    assert stopped.value.code == 143 and "The state after 2 epochs is saved in" in capfd.readouterr().err
    check_same(tune(tmp_path), whole)


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was(tmp_path):
    with pytest.raises(InterruptedError):
        tune(tmp_path, [Stop(2)], stream=True)
    check_same(tune(tmp_path, stream=True), tune(stream=True))


@pytest.mark.slow
def test_a_process_that_is_killed_is_gone_on_with(whole, tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=900,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])})
    assert process.returncode == -signal.SIGKILL, process.stderr
    check_same(tune(tmp_path), whole)


def test_states_that_do_not_fit_are_refused(tmp_path):
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2, activation="softmax", kernel_regularizer="l2")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    tuner = farhox.Tuner(model, sweep=False)

    def fit(callbacks):
        tf.config.run_functions_eagerly(True)
        try:
            return tuner.fit(X, Y, validation_data=(X, Y), batch_size=60, verbose=0, callbacks=callbacks)
        finally:
            tf.config.run_functions_eagerly(False)

    with pytest.raises(ValueError, match="One Resume restores a run. Received: 2"):
        fit([farhox.callbacks.Resume(tmp_path / "a"), farhox.callbacks.Resume(tmp_path / "b")])
    with pytest.raises(ValueError, match="is saved at the end of epochs"):
        fit([farhox.callbacks.Resume(tmp_path / "a", every=3)])
    model.fit(X, Y, verbose=0, callbacks=[farhox.callbacks.Resume(tmp_path / "keras")])
    with pytest.raises(ValueError, match="which is of no Tuner"):
        fit([farhox.callbacks.Resume(tmp_path / "keras")])
    fit([farhox.callbacks.Resume(tmp_path / "tuner")])
    tuner = farhox.Tuner(model, sweep=False, tune=["learning_rate"])
    with pytest.raises(ValueError, match="A state must be of the same model and hyperparameters"):
        fit([farhox.callbacks.Resume(tmp_path / "tuner")])

"""Executions of `fit`: several hyper-iterations with one set of logs, as those of Keras' own loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_identical

import farhox
from farhox.training import executions

X = np.random.default_rng(0).normal(size=(11, 1, 8, 3)).astype("float32")


class Stepped(farhox.HyperOptimizer):
    """One whose steps are its own, so that Keras' loop runs them."""

    def train_step(self, data):
        return super().train_step(data)


class Seen(keras.callbacks.Callback):
    """The logs after each execution."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append((batch, dict(logs)))


def made(kind=farhox.HyperOptimizer, steps=1, online=True, method=None, scale=1.0, **settings):
    keras.utils.set_random_seed(0)
    rate, strength = (farhox.Hyperparameter(0.1, low=0.0, log=True, name=name) for name in ("rate", "strength"))
    model = keras.Sequential([
        keras.Input([3]), keras.layers.Dense(2, kernel_regularizer=farhox.L1L2(l2=strength))])
    outer, fixed = ([strength], [rate]) if method else ([rate, strength], [])
    problem = farhox.supervised_problem(model, "mse", farhox.Momentum(rate, 0.5), outer, fixed=fixed)
    optimizer = kind(problem, method, online=online)
    optimizer.compile(keras.optimizers.Adam(0.02), metrics=["mae"], steps_per_execution=steps, **settings)
    data = tf.data.Dataset.from_tensor_slices(((X, X[..., :2]), (scale * X[:, 0], X[:, 0, :, 1:])))
    return optimizer, data


def fitted(optimizer, data):
    seen = Seen()
    history = optimizer.fit(data, epochs=2, verbose=0, callbacks=[seen]).history
    return seen.logs, history, [variable.numpy() for variable in [*optimizer.variables, *optimizer.optimizer.variables]]


@pytest.mark.filterwarnings("ignore:Implicit hypergradients")
@pytest.mark.parametrize("steps, settings", [
    (4, {}), *(pytest.param(steps, settings, marks=pytest.mark.slow) for steps, settings in (
        (1, {}), (50, {}), (4, dict(online=False)), (4, dict(jit_compile=True)), (4, dict(jit_compile="auto")))),
    (4, dict(method=farhox.ImplicitHG(farhox.linear_solvers.ConjugateGradient(max_steps=2))))])
def test_an_execution_does_what_keras_own_loop_does(steps, settings):
    logs, history, values = fitted(*made(steps=steps, **settings))
    expected_logs, expected_history, expected = fitted(*made(Stepped, steps, **settings))
    # Of 11 elements none is left out and none is read twice.
    assert [batch for batch, _ in logs] == [batch for batch, _ in expected_logs]
    exact = not settings.get("jit_compile")
    for (_, one), (_, other) in zip(logs, expected_logs):
        assert list(one) == list(other)
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=0 if exact else 1e-4)
    assert list(history) == list(expected_history)
    if exact:
        assert_identical(values, expected)


def test_steps_of_ones_own_are_run_by_keras(monkeypatch):
    taken = []
    monkeypatch.setattr(executions, "in_one_execution", lambda *arguments: taken.append(arguments))
    for kind, settings in ((Stepped, {}), (farhox.HyperOptimizer, dict(run_eagerly=True))):
        optimizer, data = made(kind, **settings)
        optimizer.fit(data.take(1), verbose=0)
    assert not taken and not executions.is_suited(optimizer, farhox.HyperOptimizer.train_step)


@pytest.mark.parametrize("steps", [1, 4])
def test_skips_within_an_execution_are_counted_and_undone(steps):
    optimizer, data = made(steps=steps)
    bad = X[:, 0].copy()
    bad[[2, 3, 7]] = np.nan
    data = tf.data.Dataset.from_tensor_slices(((X, X[..., :2]), (bad, X[:, 0, :, 1:])))
    history = optimizer.fit(data, verbose=0).history
    skipped, rest = history["skipped_updates"], made()[0]
    assert skipped == [3] and int(optimizer.optimizer.iterations.numpy()) == 8
    # Beside the inner steps, which go on, an update that is skipped is one that never was.
    rest.compile(keras.optimizers.Adam(0.02))
    for index in range(11):
        state = [variable.numpy() for variable in [*rest.problem.outer_variables, *rest.optimizer.variables]]
        rest.step((X[index], X[index][..., :2]), (X[index, 0], X[index, 0, :, 1:]))
        if index in (2, 3, 7):
            for variable, value in zip([*rest.problem.outer_variables, *rest.optimizer.variables], state):
                variable.assign(value)
    np.testing.assert_allclose(optimizer.problem.outer_variables[0], rest.problem.outer_variables[0], rtol=1e-6)


def test_too_many_skips_in_a_row_stop_training_at_the_end_of_their_execution():
    optimizer, data = made(steps=4, scale=np.nan)
    with pytest.raises(RuntimeError, match="updates in a row were skipped.*array 1 at index"):
        optimizer.fit(data.repeat(20), verbose=0)
    assert int(optimizer._watch.skipped.numpy()) < 20 * len(X)


def test_compiled_hyper_iterations_are_traced_once():
    optimizer, data = made(steps=4)
    calls, train = [], optimizer._hyper_iteration
    optimizer._hyper_iteration = lambda *arguments: calls.append(1) or train(*arguments)
    optimizer.fit(data, epochs=2, verbose=0)
    optimizer.fit(data, verbose=0)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("steps", [1, 4])
def test_nothing_is_counted_at_the_end_of_data_of_unknown_length(steps):
    optimizer, data = made(steps=steps)
    optimizer.fit(data.filter(lambda *_: True), verbose=0)
    assert int(optimizer.optimizer.iterations.numpy()) == len(X) == float(optimizer._measures.outer_loss.count)

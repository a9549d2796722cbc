"""BestModel: the best hyper-iteration, and the file of the model trained with it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox


def quadratic(online=False):
    """Inner (w - lam)^2, outer w^2: the outer loss of lam after enough steps is lam^2."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False)])
    w, lam = model.trainable_variables[0], farhox.Hyperparameter(1.0, name="lam")
    problem = farhox.BilevelProblem(
        lambda _: keras.ops.sum((w - lam()) ** 2), lambda _: keras.ops.sum(w ** 2), [w], [lam],
        dynamics=farhox.GradientDescent(0.5), model=model)
    optimizer = farhox.HyperOptimizer(problem, online=online)
    # The third update overshoots: 1 -> 0.6 -> 0.2 -> -0.2 would, with a fixed step, end further away.
    optimizer.compile(keras.optimizers.SGD(0.0))
    return optimizer, lam, farhox.repeat(tf.zeros([1]), 3)


class Path(keras.callbacks.Callback):
    """Sets lam before each hyper-iteration."""

    def __init__(self, lam, values):
        super().__init__()
        self.lam, self.values = lam, list(values)

    def on_train_batch_begin(self, batch, logs=None):
        self.lam.assign(self.values.pop(0))


@pytest.mark.one_case
@pytest.mark.parametrize("online", [False, True])
def test_the_best_hyper_iteration_is_kept_and_the_model_trained_with_it_written(tmp_path, online):
    optimizer, lam, batches = quadratic(online)
    best = farhox.callbacks.BestModel(str(tmp_path / "best.keras"), None if online else batches)
    data = tf.data.Dataset.from_tensors((batches, tf.zeros([1]))).repeat(2)
    optimizer.fit(data, epochs=2, verbose=0, callbacks=[Path(lam, [1.0, 0.25, -0.5, 2.0]), best])
    assert best.loss == pytest.approx(0.0625, rel=1e-5) and best.hyper_iteration == 1
    assert best.values == {"lam": 0.25} and best.outer == [np.float32(0.25)]
    model = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_allclose(model.get_weights(), [[[0.25]]], rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["best.keras"]
    if not online:  # Training the file's model has left the start alone.
        assert optimizer.problem.model.get_weights()[0] != np.float32(0.25)


@pytest.mark.slow
def test_a_value_of_the_logs_can_be_monitored():
    optimizer, lam, batches = quadratic()
    best = farhox.callbacks.BestModel(monitor="val_loss", mode="max")
    data = (batches, tf.zeros([1]))
    optimizer.fit(data, epochs=3, verbose=0, validation_data=data, callbacks=[Path(lam, [1.0, 3.0, 2.0]), best])
    assert best.loss == pytest.approx(9.0, rel=1e-5) and best.values == {"lam": 3.0}
    with pytest.raises(ValueError, match="monitor must be a value in the logs of an epoch.*Received: 'no'"):
        optimizer.fit(data, verbose=0, callbacks=[farhox.callbacks.BestModel(monitor="no")])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='path must end in ".keras"'):
        farhox.callbacks.BestModel("best.h5")
    with pytest.raises(ValueError, match='mode must be "min" or "max"'):
        farhox.callbacks.BestModel(mode="auto")
    optimizer, _, batches = quadratic()
    with pytest.raises(ValueError, match="needs data to train the model on"):
        optimizer.fit((batches, tf.zeros([1])), verbose=0, callbacks=[farhox.callbacks.BestModel("best.keras")])
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="needs a farhox.HyperOptimizer"):
        model.fit(np.zeros([1, 1]), np.zeros([1, 1]), verbose=0, callbacks=[farhox.callbacks.BestModel()])

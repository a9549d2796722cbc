"""Trainings that are interrupted: of every kind of model, small, and the same in each process that makes them."""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

import farhox
from farhox import meta, stn
from farhox.callbacks import Resume

EPOCHS = 3
X = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")
Y = (X.sum(1) > 0).astype("int64")


def network(dropout=0.0, l2=None):
    layers = [keras.layers.Dense(4, "tanh", kernel_regularizer=None if l2 is None else farhox.L1L2(l2=l2)),
              keras.layers.Dropout(dropout), keras.layers.Dense(2, "softmax")]
    return keras.Sequential([keras.Input([3]), *layers])


def hyper_optimizer(method, online):
    rate = farhox.Hyperparameter(0.1, low=0.0, name="rate")
    l2 = farhox.Hyperparameter(0.01, low=0.0, name="l2")
    model = network(0.2, l2)
    implicit = isinstance(method, farhox.ImplicitHG)
    problem = farhox.supervised_problem(
        model, dynamics=farhox.Momentum(0.1 if implicit else rate, 0.5),
        outer_variables=[l2] if implicit else [rate, l2])
    optimizer = farhox.HyperOptimizer(problem, method, online=online)
    optimizer.compile(keras.optimizers.Adam(0.05), metrics=["accuracy"])
    return optimizer


def hyper_iterations():
    """Three hyper-iterations in an epoch, in an order that is another in each."""
    data = farhox.bilevel_dataset((X, Y), (X[::-1].copy(), Y[::-1].copy()), 2, batch_size=2, outer_batch_size=5)
    return {"x": data}


def learner(kind):
    made = (meta.MAML(network(), 0.1, 2) if kind == "maml" else
            meta.Reptile(network(), farhox.GradientDescent(0.1), inner_steps=2, batch_size=2))
    made.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    return made


def episodes():
    images = np.random.default_rng(1).normal(size=(30, 3)).astype("float32")
    source = meta.ClassificationEpisodes(images, np.repeat(np.arange(5), 6), ways=2, shots=2, queries=2)
    return {"x": source.dataset(2), "steps_per_epoch": 3}


def self_tuning(method):
    rate = farhox.Hyperparameter(0.2, low=0.0, high=0.9, name="dropout")
    body = keras.Sequential([keras.Input([3]), keras.layers.Dense(4, "tanh"), stn.Dropout(rate), keras.layers.Dense(2)])
    model = stn.SelfTuningModel(stn.convert(body), [rate], method=method)
    model.compile("adam", keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01),
                  keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def arrays():
    return {"x": X, "y": Y, "batch_size": 5, "validation_data": (X, Y)}


def plain():
    model = network(0.3)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)
    return model


def shuffled_batches():
    """Four batches for epochs of three, so that the places where epochs and passes over the data begin are others."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(12, seed=1).batch(3)
    return {"x": data, "validation_data": (X, Y), "steps_per_epoch": 3}


RUNS = {
    "reverse": (lambda: hyper_optimizer(farhox.ReverseHG(), False), hyper_iterations),
    "forward online": (lambda: hyper_optimizer(farhox.ForwardHG(), True), hyper_iterations),
    "implicit warm": (lambda: hyper_optimizer(farhox.ImplicitHG(farhox.ConjugateGradient(3), damping=0.1), False),
                      hyper_iterations),
    "maml": (lambda: learner("maml"), episodes),
    "reptile": (lambda: learner("reptile"), episodes),
    "stn": (lambda: self_tuning("stn"), arrays),
    "delta": (lambda: self_tuning("delta"), arrays),
    "plain": (plain, shuffled_batches),
}


def make(name):
    keras.utils.set_random_seed(0)
    return RUNS[name][0]()


def fit(name, model, directory=None, callbacks=(), epochs=EPOCHS, **resume):
    """Runs a training to its end; returns its whole history."""
    keras.utils.set_random_seed(0)
    arguments = RUNS[name][1]()
    plateau = keras.callbacks.ReduceLROnPlateau("loss", mode="min", factor=0.5, patience=1, min_delta=0.05)
    stop = keras.callbacks.EarlyStopping("loss", mode="min", patience=99, restore_best_weights=True)
    # Before those that it resumes, on purpose: their order has no influence.
    resume = [] if directory is None else [Resume(directory, **resume)]
    return model.fit(epochs=epochs, verbose=0, callbacks=[*resume, plateau, stop, *callbacks], **arguments)


def all_variables(model):
    optimizers = [entry for entry in vars(model).values() if isinstance(entry, keras.optimizers.Optimizer)]
    return [*model.variables, *(variable for entry in optimizers for variable in entry.variables)]


def values(model):
    """The values of all variables of a model and its optimizers, as bytes."""
    return [keras.ops.convert_to_numpy(variable).tobytes() for variable in all_variables(model)]


class Begun(keras.callbacks.Callback):
    """Says when the second step begins that is no repetition: what comes before takes longer than all of them."""

    steps = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.steps += 1
        if self.steps == 2:
            print("begun", flush=True)


def main(name, directory, result, epochs):
    model = make(name)
    history = fit(name, model, directory, [Begun()], int(epochs), every=1)
    part = pathlib.Path(f"{result}.part")
    part.write_text(outcome(model, history))
    part.rename(result)


def outcome(model, history):
    return repr((history.history, history.epoch, values(model)))


if __name__ == "__main__":
    main(*sys.argv[1:])

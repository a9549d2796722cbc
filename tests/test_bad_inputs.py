"""What people give by mistake to the public entry points, and the error that each mistake gets: type and words."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import stn
from farhox.data import k_fold_dataset
from farhox.training import OptimizerGroups

X, Y = np.arange(24.0).reshape(8, 3).astype("float32") / 24, np.arange(8) % 3
BATCH = X, Y
INNER = farhox.repeat(BATCH, 2)
EXAMPLES = tf.data.Dataset.from_tensor_slices(BATCH)
MODEL = keras.Sequential([keras.Input([3]), keras.layers.Dense(3, "softmax")])
RATE = farhox.Hyperparameter(0.1, low=0.0, name="rate")
PROBLEM = farhox.supervised_problem(MODEL, dynamics=farhox.GradientDescent(RATE), outer_variables=[RATE])
OPTIMIZER = farhox.HyperOptimizer(PROBLEM)
OPTIMIZER.compile("sgd", run_eagerly=True)
REVERSE = farhox.ReverseHG()
LOSS = keras.losses.SparseCategoricalCrossentropy()
RAGGED = tf.ragged.constant([[1.0], [1.0, 2.0]])
SPARSE = tf.sparse.from_dense(X)
NAN = np.where(X == 0, np.nan, X)
LABELS_OUT = np.where(Y == 2, 3, Y)


def objective(batch):
    return LOSS(batch[1], MODEL(batch[0]))


def bilevel(**arguments):
    return farhox.BilevelProblem(**{
        "inner_objective": objective, "outer_objective": objective, "inner_variables": MODEL.trainable_variables,
        "outer_variables": [RATE], "dynamics": farhox.GradientDescent(RATE), **arguments})


def supervised(model=MODEL, **arguments):
    return farhox.supervised_problem(model, **{"outer_variables": [RATE], **arguments})


def data(train=BATCH, validation=BATCH, inner_steps=2, **arguments):
    return farhox.bilevel_dataset(train, validation, inner_steps, **arguments)


def fit(x, **arguments):
    return OPTIMIZER.fit(x, verbose=0, **arguments)


def compute(inner=INNER, outer=BATCH, method=REVERSE, problem=PROBLEM):
    return method.compute(problem, inner, outer)


def uncompiled():
    return farhox.HyperOptimizer(PROBLEM)


def stateful():
    return keras.Sequential([keras.Input([4, 3], batch_size=8), keras.layers.SimpleRNN(2, stateful=True),
                             keras.layers.Dense(3, "softmax")])


def self_tuning():
    return keras.Sequential([keras.Input([3]), stn.Dense(3, RATE)])


def generator():
    yield BATCH


ROWS = [
    # bilevel_dataset, k_fold_dataset
    (lambda: data(train=None), TypeError, "train must be a nest of arrays"),
    (lambda: data(train=generator()), TypeError, "train must be a nest of arrays"),
    (lambda: data(train="train.csv"), ValueError, "All arrays of train must have the same number of examples"),
    (lambda: data(train=object()), TypeError, "train must be a nest of arrays"),
    (lambda: data(train=3.0), ValueError, "All arrays of train"),
    (lambda: data(train=()), ValueError, "All arrays of train"),
    (lambda: data(train=(X, Y[:4])), ValueError, r"same number of examples. Received lengths: \[8, 4\]"),
    (lambda: data(train=(X[:0], Y[:0])), ValueError, "at least one example"),
    (lambda: data(train=(NAN, Y)), ValueError, r"train must hold finite numbers.*array 1 at index \[0, 0\]"),
    (lambda: data(validation=(NAN, Y)), ValueError, "validation must hold finite numbers"),
    (lambda: data(train=(RAGGED, Y[:2])), TypeError, "train"),
    (lambda: data(train=(SPARSE, Y)), TypeError, "train"),
    (lambda: data(train=EXAMPLES.repeat()), ValueError, "must be finite"),
    (lambda: data(train=EXAMPLES.batch(4), batch_size=2), ValueError, "batch_size"),
    (lambda: data(train=EXAMPLES.take(0)), ValueError, "at least one example"),
    (lambda: data(inner_steps=None), ValueError, "inner_steps must be a positive integer"),
    (lambda: data(inner_steps="2"), ValueError, "inner_steps must be a positive integer"),
    (lambda: data(inner_steps=2.0), ValueError, "inner_steps must be a positive integer"),
    (lambda: data(batch_size=0), ValueError, "batch_size must be a positive integer"),
    (lambda: data(batch_size=9), ValueError, "batch_size must not exceed"),
    (lambda: data(batch_size=2, seed="0"), ValueError, "seed must be an integer"),
    (lambda: k_fold_dataset(BATCH, 1, 2), ValueError, "folds"),
    (lambda: k_fold_dataset(BATCH, 9, 2), ValueError, "at least one example per fold"),
    (lambda: k_fold_dataset(None, 2, 2), TypeError, "data must be a nest of arrays"),
    # repeat, stack, gather
    (lambda: farhox.repeat(BATCH, 0), ValueError, "inner steps must be a positive integer"),
    (lambda: farhox.repeat(BATCH, None), ValueError, "inner steps must be a positive integer"),
    (lambda: farhox.repeat(None, 2), TypeError, "A batch must be a nest of arrays"),
    (lambda: farhox.repeat(generator(), 2), TypeError, "A batch must be a nest of arrays"),
    (lambda: farhox.repeat(EXAMPLES, 2), TypeError, "A batch must be a nest of arrays"),
    (lambda: farhox.repeat((RAGGED, Y[:2]), 2), TypeError, "A batch must be a nest of arrays.*RaggedTensor"),
    (lambda: farhox.repeat((SPARSE, Y), 2), TypeError, "A batch must be a nest of arrays.*SparseTensor"),
    (lambda: farhox.stack([]), ValueError, "at least one batch"),
    (lambda: farhox.stack(None), TypeError, "batches must be a list"),
    (lambda: farhox.stack([BATCH, (X[:4], Y[:4])]), ValueError, "same shapes"),
    (lambda: farhox.stack([BATCH, X]), ValueError, "same structure"),
    (lambda: farhox.stack([BATCH, None]), ValueError, "same structure"),
    (lambda: farhox.stack(EXAMPLES.batch(4).repeat()), ValueError, "finite"),
    (lambda: farhox.gather(BATCH, [0, 1]), ValueError, r"indices must have shape \[T, batch\]"),
    (lambda: farhox.gather(BATCH, [[0, 8]]), ValueError, "from 0 to the number of examples"),
    (lambda: farhox.gather(BATCH, [[0.0, 1.0]]), TypeError, "indices must be integers"),
    (lambda: farhox.gather(BATCH, None), TypeError, "indices must be a nest of arrays.*NoneType"),
    (lambda: farhox.gather((X, Y[:4]), [[0]]), ValueError, "same number of examples"),
    (lambda: farhox.gather(3.0, [[0]]), ValueError, "leading axis of examples"),
    (lambda: farhox.gather(None, [[0]]), TypeError, "data must be a nest of arrays"),
    # BilevelProblem
    (lambda: bilevel(inner_objective=None), TypeError, "inner_objective must be a callable"),
    (lambda: bilevel(outer_objective="mse"), TypeError, "outer_objective must be a callable"),
    (lambda: bilevel(inner_variables=None), TypeError, "inner_variables must be a list"),
    (lambda: bilevel(inner_variables=[]), ValueError, "inner_variables must not be empty"),
    (lambda: bilevel(inner_variables=MODEL), TypeError, "inner_variables must be a list"),
    (lambda: bilevel(inner_variables=MODEL.layers), TypeError, "inner_variables must hold keras.Variables"),
    (lambda: bilevel(outer_variables=RATE), TypeError, "outer_variables must be a list"),
    (lambda: bilevel(outer_variables=[0.1]), TypeError, "outer_variables must hold keras.Variables"),
    (lambda: bilevel(outer_variables=[RATE, RATE]), ValueError, "must not name a variable twice"),
    (lambda: bilevel(outer_variables=["rate"]), TypeError, "outer_variables must hold"),
    (lambda: bilevel(fixed=[0.1]), TypeError, "fixed must hold"),
    (lambda: bilevel(dynamics="sgd"), TypeError, "dynamics must be one of farhox' dynamics"),
    (lambda: bilevel(dynamics=keras.optimizers.SGD()), TypeError, r"KerasDynamics\(optimizer\)"),
    (lambda: bilevel(proximal="1"), TypeError, "proximal must be a float"),
    (lambda: bilevel(proximal=float("nan")), ValueError, "proximal must be finite"),
    (lambda: bilevel(stop_tolerance=0), ValueError, "stop_tolerance must be a positive number"),
    (lambda: bilevel(state_variables=MODEL.trainable_variables), ValueError, "must not be an inner or an outer"),
    # supervised_problem
    (lambda: supervised(None), TypeError, "model must be a keras.Model"),
    (lambda: supervised(MODEL.layers[0]), TypeError, "model must be a keras.Model"),
    (lambda: supervised(keras.Sequential([keras.layers.Dense(2)])), ValueError, "must be built"),
    (lambda: supervised(loss="no_such_loss"), ValueError, "no_such_loss"),
    (lambda: supervised(loss=3), TypeError, "loss must be the name of a Keras loss"),
    (lambda: supervised(outer_loss=3), TypeError, "loss must be the name of a Keras loss"),
    (lambda: supervised(outer_variables=RATE), TypeError, "outer_variables must be a list"),
    (lambda: supervised(outer_variables=None), TypeError, "outer_variables must be a list"),
    (lambda: supervised(representation=MODEL.layers[0]), TypeError, "representation must be a list"),
    (lambda: supervised(representation=["dense"]), ValueError, "must hold layers of the model"),
    (lambda: supervised(example_weights=np.ones(8)), TypeError, "must be a farhox.ExampleWeights"),
    (lambda: supervised(class_weights={0: 1.0}), TypeError, "class_weights must be a farhox.Hyperparameter"),
    (lambda: supervised(class_weights=RATE), ValueError, r"must have shape \[classes\]"),
    (lambda: supervised(outer_call=3), TypeError, "outer_call must be a callable"),
    (lambda: supervised(stateful()), ValueError, "stateful"),
    (lambda: supervised(self_tuning()), ValueError, "SelfTuningModel"),
    # compute
    (lambda: compute(inner=BATCH), ValueError, r"no axis T|farhox.repeat\(batch, steps\)"),
    (lambda: compute(inner=None), (TypeError, ValueError), "inner_batches must be"),
    (lambda: compute(inner=generator()), TypeError, "inner_batches must be"),
    (lambda: compute(inner=EXAMPLES), TypeError, "inner_batches must be"),
    (lambda: compute(inner=()), ValueError, "at least one tensor"),
    (lambda: compute(inner=(X[None], Y[None, :4])), (ValueError, tf.errors.InvalidArgumentError),
     "(?i)shape|incompatible|size"),
    (lambda: compute(inner=farhox.repeat((X, LABELS_OUT), 2)), (ValueError, tf.errors.InvalidArgumentError),
     "Labels must be integers from 0"),
    (lambda: compute(inner=farhox.repeat(X, 2)), ValueError, r"A batch must be a tuple \(x, y\)"),
    (lambda: compute(outer=None), (TypeError, ValueError), "outer_batch must be|A batch must be"),
    (lambda: compute(outer=X), ValueError, r"A batch must be a tuple \(x, y\)"),
    (lambda: compute(outer=(X, LABELS_OUT)), (ValueError, tf.errors.InvalidArgumentError), "Labels must be integers"),
    (lambda: compute(outer=(X, Y, Y)), ValueError, "must be floating-point"),
    (lambda: compute(problem=MODEL), TypeError, "problem must be a farhox.BilevelProblem"),
    (lambda: compute(problem=None), TypeError, "problem must be a farhox.BilevelProblem"),
    # HyperOptimizer
    (lambda: farhox.HyperOptimizer(MODEL), TypeError, "problem must be a farhox.BilevelProblem"),
    (lambda: farhox.HyperOptimizer(PROBLEM, "reverse"), TypeError, "hypergradient must be one of farhox' methods"),
    (lambda: farhox.HyperOptimizer(PROBLEM, farhox.ReverseHG), TypeError, "hypergradient must be one of"),
    (lambda: uncompiled().compile("adam", loss="mse"), ValueError, "takes no loss"),
    (lambda: uncompiled().compile("no_such_optimizer"), ValueError, "no_such_optimizer"),
    (lambda: uncompiled().compile(farhox.Adam()), TypeError,
     r"optimizer must be an optimizer of Keras: write keras.optimizers.Adam\(...\). Adam is inner dynamics of farhox"),
    (lambda: uncompiled().compile(farhox.Momentum), TypeError, r"write keras.optimizers.SGD\(...\)"),
    (lambda: farhox.KerasDynamics(farhox.GradientDescent()), TypeError, r"write keras.optimizers.SGD\(...\)"),
    (lambda: OptimizerGroups(farhox.Adam(), []), TypeError, r"write keras.optimizers.Adam\(...\)"),
    (lambda: farhox.meta.PrototypicalNetwork(MODEL, 3).compile(farhox.Adam()), TypeError,
     r"write keras.optimizers.Adam\(...\)"),
    *((lambda name=name: stn.SelfTuningModel(self_tuning()).compile(**{"loss": "mse", name: farhox.Adam()}), TypeError,
       rf"{name} must be an optimizer of Keras: write keras.optimizers.Adam\(...\)")
      for name in ("optimizer", "hyper_optimizer", "scale_optimizer")),
    (lambda: uncompiled().step(INNER, BATCH), ValueError, "must be compiled"),
    (lambda: fit(BATCH), ValueError, r"bilevel_dataset|farhox.repeat"),
    (lambda: fit(None), ValueError, "Data must be a tf.data.Dataset of pairs"),
    (lambda: fit(X, y=Y), (TypeError, ValueError), "Data must be|pairs"),
    (lambda: fit(EXAMPLES), ValueError, r"bilevel_dataset|farhox.repeat"),
    (lambda: fit(EXAMPLES.batch(4)), ValueError, r"bilevel_dataset|farhox.repeat"),
    (lambda: fit(generator()), ValueError, "Data must be a tf.data.Dataset of pairs"),
    (lambda: fit([INNER, BATCH, BATCH]), ValueError, "Data must be"),
    (lambda: fit(data().take(0)), ValueError, "at least one pair"),
    (lambda: fit(data().repeat()), ValueError, "steps_per_epoch"),
    (lambda: OPTIMIZER.evaluate(data().repeat(), verbose=0), ValueError, "steps"),
    (lambda: fit((farhox.repeat((X, LABELS_OUT), 2), BATCH)), ValueError, "Labels must be integers from 0"),
    (lambda: fit(data(index=True)), ValueError, "needs supervised_problem"),
    (lambda: OPTIMIZER.train_inner(BATCH), ValueError, r"farhox.repeat\(batch, steps\)"),
    (lambda: OPTIMIZER.train_inner(None), (TypeError, ValueError), "inner_batches must be"),
    (lambda: OPTIMIZER.save("model.keras"), ValueError, "save_weights"),
]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_a_mistake_gets_an_error_that_says_what_to_give(row):
    give, error, words = ROWS[row]
    with pytest.raises(error, match=words):
        give()

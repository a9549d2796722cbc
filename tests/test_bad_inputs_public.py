"""What people give by mistake to the public names of every room, and the error that each mistake gets.

The mistakes with data, dynamics, episodes, exports and self-tuning layers have tables of their own.
"""

import functools
import importlib
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import callbacks, hypergradients, insight, linear_solvers, losses, meta, plots, stn, training

HP, NAN, INF = farhox.Hyperparameter, float("nan"), float("inf")
X, Y = np.arange(24.0).reshape(8, 3).astype("float32") / 24, np.arange(8) % 3
BATCH = X, Y
INNER = farhox.repeat(BATCH, 2)
EXAMPLES = tf.data.Dataset.from_tensor_slices(BATCH)
MODEL, PLAIN = (keras.Sequential([keras.Input([3]), keras.layers.Dense(3, "softmax")]) for _ in range(2))
RATE, OTHER = HP(0.1, low=0.0, name="rate"), HP(0.1, low=0.0, name="other")
PROBLEM = farhox.supervised_problem(MODEL, dynamics=farhox.GradientDescent(RATE), outer_variables=[RATE])
OPT = farhox.HyperOptimizer(PROBLEM)
OPT.compile("sgd")
PLAIN.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
EPISODES = meta.ClassificationEpisodes(
    np.random.default_rng(0).random((36, 3)).astype("float32"), np.repeat(np.arange(6), 6), ways=3, shots=2, queries=2)


def compute(method):
    return method.compute(PROBLEM, INNER, BATCH)


def begin(callback, model=OPT):
    callback.set_model(model)
    callback.on_train_begin()


def tuner(**arguments):
    return farhox.Tuner(PLAIN, **arguments)


@functools.cache
def learner():
    made = meta.MAML(MODEL, 0.1, 1)
    made.compile("sgd")
    return made


def self_tuning(optimizer="sgd", hyper_optimizer="sgd", **optimizers):
    network = keras.Sequential([keras.Input([3]), stn.Dense(3, [HP(0.1, name="strength")])])
    stn.SelfTuningModel(network, method="delta").compile(
        optimizer, hyper_optimizer=hyper_optimizer, loss="mse", **optimizers)


def distributed(model=None, meta_batch_size=2, meta_steps=3, folder="never_made", **arguments):
    return meta.fit_distributed(model or learner(), EPISODES, meta_batch_size, meta_steps, folder, **arguments)


ROWS = [
    (lambda: HP(None), TypeError, "The value of 'hyperparameter' must be a number or an array of"),
    (lambda: HP("0.1"), TypeError, "The value of 'hyperparameter' must be a number or an array of"),
    (lambda: HP(NAN), ValueError, "The value of 'hyperparameter' must be finite and strictly"),
    (lambda: HP(0.1, low="0"), ValueError, "low must be a finite number or None"),
    (lambda: HP(2.0, low=0.0, high=1.0), ValueError, "The value of 'hyperparameter' must be finite and strictly"),
    (lambda: HP(0.1, log=True), ValueError, "log=True needs low=0.0 and no high bound"),
    (lambda: HP(0.1, name=3), TypeError, "name must be a string"),
    (lambda: HP(0.1, dtype="int32"), ValueError, "The dtype of 'hyperparameter' must be floating-point"),
    (lambda: HP(0.5, low=1.0, high=0.0), ValueError, "low must be less than high"),
    (lambda: HP(["a"]), TypeError, "The value of 'hyperparameter' must be a number or an array of"),
    (lambda: HP(True), TypeError, "The value of 'hyperparameter' must be a number or an array of"),
    (lambda: HP(0.1, low=0.0).assign(NAN), ValueError, "The value of 'hyperparameter' must be finite and strictly"),
    (lambda: HP(0.1).assign([1.0, 2.0]), ValueError, r"A value for 'hyperparameter' must have shape \(\)"),
    (lambda: HP(0.1, low=0.0).assign(-1.0), ValueError, "The value of 'hyperparameter' must be finite and strictly"),
    (lambda: HP(0.1).assign("0.1"), TypeError, "The value of 'hyperparameter' must be a number or an array of"),
    (lambda: float(HP([0.1, 0.2])), TypeError, "Only a scalar can become a float"),
    (lambda: farhox.ExampleWeights(None), ValueError, "num_examples must be a positive integer"),
    (lambda: farhox.ExampleWeights(0), ValueError, "num_examples must be a positive integer"),
    (lambda: farhox.ExampleWeights(3.5), ValueError, "num_examples must be a positive integer"),
    (lambda: farhox.ExampleWeights(4, initial=1.0), ValueError, "The initial weight must be strictly between 0 and 1"),
    (lambda: farhox.ExampleWeights(4, budget=-1), ValueError, "budget must be a positive finite number"),
    (lambda: farhox.ExampleWeights(4, budget=NAN), ValueError, "budget must be a positive finite number"),
    (lambda: farhox.ExampleWeights(4, budget="2"), ValueError, "budget must be a positive finite number"),
    (lambda: farhox.ExampleWeights(4)([0.5]), TypeError, "indices of 'example_weights' must be integers"),
    (lambda: farhox.ExampleWeights([1,2]), ValueError, "num_examples must be a positive integer"),
    (lambda: farhox.ExampleWeights(4, initial=NAN), ValueError, "initial must be a finite number"),
    (lambda: farhox.ExampleWeights(4, initial="half"), ValueError, "initial must be a finite number"),
    (lambda: farhox.LearnedSchedule(0), ValueError, "steps must be a positive integer"),
    (lambda: farhox.LearnedSchedule(3, initial=-1.0), ValueError,
     "The initial value of a schedule must be positive, a number or"),
    (lambda: farhox.LearnedSchedule(3, initial=[0.1, 0.2]), ValueError,
     "The initial value of a schedule must be positive, a number or"),
    (lambda: farhox.LearnedSchedule(None), ValueError, "steps must be a positive integer"),
    (lambda: farhox.LearnedSchedule(3, initial=NAN), ValueError,
     "The initial value of a schedule must be positive, a number or"),
    (lambda: farhox.LearnedSchedule(3, initial="a"), TypeError,
     "The value of 'schedule' must be a number or an array of"),
    (lambda: hypergradients.ReverseHG(truncation=-1), ValueError, "truncation must be a non-negative integer or None"),
    (lambda: hypergradients.ReverseHG(truncation=1.5), ValueError, "truncation must be a non-negative integer or None"),
    (lambda: hypergradients.ReverseHG(checkpoint_every=0), ValueError,
     "checkpoint_every must be a positive integer, 'sqrt', 'memory' or None"),
    (lambda: hypergradients.ReverseHG(checkpoint_every="all"), ValueError,
     "checkpoint_every must be a positive integer, 'sqrt', 'memory' or None"),
    (lambda: hypergradients.ReverseHG(memory=-5), ValueError,
     "memory must be a non-negative integer, a number of bytes, or"),
    (lambda: hypergradients.ReverseHG(step_weights=(0.5, 0.6)), ValueError,
     "step_weights must be a tuple of non-negative numbers that sum"),
    (lambda: hypergradients.ReverseHG(step_weights="late"), ValueError,
     "step_weights must be a tuple of non-negative numbers that sum"),
    (lambda: hypergradients.ReverseHG(step_weights=(1.0,), truncation=1), ValueError,
     "step_weights are over all inner steps and cannot come with a"),
    (lambda: hypergradients.ReverseHG(truncation=True), ValueError,
     "truncation must be a non-negative integer or None"),
    (lambda: hypergradients.ImplicitHG("cg"), TypeError, "linear_solver must be one of farhox' solvers, for example"),
    (lambda: hypergradients.ImplicitHG(linear_solvers.ConjugateGradient), TypeError,
     "linear_solver must be one of farhox' solvers, for example"),
    (lambda: hypergradients.ImplicitHG(damping=-1), ValueError, "damping must be a non-negative finite number"),
    (lambda: hypergradients.ImplicitHG(damping=NAN), ValueError, "damping must be a non-negative finite number"),
    (lambda: hypergradients.ImplicitHG(system="hessian"), ValueError, 'system must be "objective", "dynamics" or None'),
    (lambda: hypergradients.ImplicitHG(system_batch=3), TypeError,
     "system_batch must be a callable outer batch -> inner batch"),
    (lambda: hypergradients.ForwardHG().compute(MODEL, INNER, BATCH), TypeError,
     "problem must be a farhox.BilevelProblem"),
    (lambda: hypergradients.DartsHG(epsilon=-1), ValueError, "epsilon must be a positive finite number"),
    (lambda: hypergradients.DartsHG(NAN), ValueError, "epsilon must be a positive finite number"),
    (lambda: hypergradients.EvoGradHG(perturbations=1), ValueError,
     "perturbations must be an integer of at least 2, because a"),
    (lambda: hypergradients.EvoGradHG(sigma=0.0), ValueError, "sigma must be a positive finite number"),
    (lambda: hypergradients.EvoGradHG(temperature=-1), ValueError, "temperature must be a positive finite number"),
    (lambda: hypergradients.EvoGradHG(seed="a"), ValueError, "seed must be an integer"),
    (lambda: hypergradients.ReversibleHG(fractional_bits=0), ValueError,
     "fractional_bits must be an integer from 10 to 52"),
    (lambda: hypergradients.ReptileHG(step_weights=[1]), TypeError, "step_weights must be a tuple of numbers or None"),
    (lambda: hypergradients.ObjectivesHG("r", []), TypeError,
     r"hypergradient must be a method for one inner training, for example farhox.ReverseHG\(\)"),
    (lambda: hypergradients.ObjectivesHG(hypergradients.ReverseHG(), None), TypeError,
     r"objectives must be a list of pairs \(outer objective, list of"),
    (lambda: hypergradients.ObjectivesHG(hypergradients.ReverseHG(), [(1,2)]), TypeError,
     r"objectives must be a list of pairs \(outer objective, list of"),
    (lambda: hypergradients.EpisodesHG(None), TypeError, "hypergradient must be a method for one episode, for example"),
    (lambda: linear_solvers.ConjugateGradient(0), ValueError,
     "ConjugateGradient: max_steps must be a positive integer"),
    (lambda: linear_solvers.ConjugateGradient(tolerance=-1), ValueError,
     "ConjugateGradient: tolerance must be a non-negative number or"),
    (lambda: linear_solvers.ConjugateGradient(tolerance=NAN), ValueError,
     "ConjugateGradient: tolerance must be a non-negative number or"),
    (lambda: linear_solvers.ConjugateGradient(tolerance="small"), ValueError,
     "ConjugateGradient: tolerance must be a non-negative number or"),
    (lambda: linear_solvers.NormalConjugateGradient(max_steps=1.5), ValueError,
     "NormalConjugateGradient: max_steps must be a positive integer"),
    (lambda: linear_solvers.Neumann(0), ValueError, "Neumann: max_steps must be a positive integer"),
    (lambda: linear_solvers.Neumann(step_size=-0.1), ValueError,
     "Neumann: step_size must be positive or None, or a callable"),
    (lambda: linear_solvers.Neumann(step_size=NAN), ValueError,
     "Neumann: step_size must be positive or None, or a callable"),
    (lambda: linear_solvers.Neumann(power_steps=0), ValueError, "Neumann: power_steps must be a positive integer"),
    (lambda: linear_solvers.FixedPoint(0), ValueError, "FixedPoint: max_steps must be a positive integer"),
    (lambda: linear_solvers.FixedPoint(tolerance=-1), ValueError,
     "FixedPoint: tolerance must be a non-negative number or a"),
    (lambda: linear_solvers.GMRES(0), ValueError, "GMRES: max_steps must be a positive integer"),
    (lambda: linear_solvers.GMRES(tolerance=NAN), ValueError,
     "GMRES: tolerance must be a non-negative number or a callable"),
    (lambda: linear_solvers.Nystrom(0), ValueError, "Nystrom: rank must be a positive integer"),
    (lambda: linear_solvers.Nystrom(5, -1.0), ValueError, "Nystrom: rho must be a positive finite number"),
    (lambda: linear_solvers.Nystrom(5, NAN), ValueError, "Nystrom: rho must be a positive finite number"),
    (lambda: linear_solvers.Direct(0), ValueError, "Direct: max_dimension must be a positive integer"),
    (lambda: linear_solvers.Neumann(step_size=INF), ValueError,
     "Neumann: step_size must be positive or None, or a callable"),
    (lambda: linear_solvers.ConjugateGradient(tolerance=INF), ValueError,
     "ConjugateGradient: tolerance must be a non-negative number or"),
    (lambda: insight.check_hypergradient(PROBLEM, INNER, BATCH, "reverse"), TypeError,
     "A method must be one of farhox' hypergradients, for example"),
    (lambda: insight.check_hypergradient(MODEL, INNER, BATCH, hypergradients.ReverseHG()), TypeError,
     "problem must be a farhox.BilevelProblem"),
    (lambda: insight.check_hypergradient(PROBLEM, None, BATCH, hypergradients.ReverseHG()), TypeError,
     r"inner_batches must be a nest of arrays such as \(x, y\)"),
    (lambda: insight.compare_hypergradients(PROBLEM, INNER, BATCH, []), ValueError,
     "compare_hypergradients needs at least one method"),
    (lambda: insight.compare_hypergradients(PROBLEM, INNER, BATCH, ["r"]), TypeError,
     "A method must be one of farhox' hypergradients, for example"),
    (lambda: insight.compare_hypergradients(PROBLEM, INNER, BATCH, [hypergradients.ReverseHG()], repeats=0), ValueError,
     "repeats must be a positive integer"),
    (lambda: insight.compare_hypergradients(None, INNER, BATCH, [hypergradients.ReverseHG()]), TypeError,
     "problem must be a farhox.BilevelProblem"),
    (lambda: insight.health(PROBLEM, INNER, BATCH, "r"), TypeError,
     "hypergradient must be a method for one inner problem, for"),
    (lambda: insight.health(MODEL, INNER, BATCH, hypergradients.ReverseHG()), TypeError,
     "problem must be a farhox.BilevelProblem"),
    (lambda: insight.health(PROBLEM, INNER, BATCH, hypergradients.EpisodesHG(hypergradients.ReverseHG())), TypeError,
     "hypergradient must be a method for one inner problem, for"),
    (lambda: callbacks.Resume("run", every=0), ValueError,
     'every, where it is not "epoch", must be a positive integer'),
    (lambda: callbacks.Resume("run", every="step"), ValueError,
     'every, where it is not "epoch", must be a positive integer'),
    (lambda: callbacks.Resume("run", seconds=-1), ValueError, "seconds must be a non-negative finite number"),
    (lambda: callbacks.Resume("gs://bucket/run"), ValueError, "States are saved in a folder of a file system of this"),
    (lambda: callbacks.Resume("run", seconds=NAN), ValueError, "seconds must be a non-negative finite number"),
    (lambda: callbacks.HyperparameterTrace(every=0), ValueError, 'every must be a positive integer or "epoch"'),
    (lambda: callbacks.HyperparameterTrace(every="step"), ValueError, 'every must be a positive integer or "epoch"'),
    (lambda: begin(callbacks.HyperparameterTrace(), PLAIN), TypeError,
     "A HyperparameterTrace needs a farhox.HyperOptimizer, which"),
    (lambda: callbacks.BestModel("best.h5"), ValueError, 'path must end in ".keras"'),
    (lambda: callbacks.BestModel(mode="least"), ValueError, 'mode must be "min" or "max"'),
    (lambda: begin(callbacks.BestModel(), PLAIN), TypeError, "A BestModel needs a farhox.HyperOptimizer"),
    (lambda: begin(callbacks.BestModel("best.keras")), ValueError,
     "A BestModel with a path needs data to train the model on:"),
    (lambda: plots.outer_loss_grid(PROBLEM, INNER, BATCH, (RATE, [0.1, 0.2]), (RATE, [0.1, 0.2])), ValueError,
     "x and y must be two hyperparameters"),
    (lambda: plots.outer_loss_grid(PROBLEM, INNER, BATCH, (OTHER, [0.1, 0.2]), (RATE, [0.1, 0.2])), ValueError,
     "x must name a hyperparameter of the problem"),
    (lambda: plots.outer_loss_grid(PROBLEM, INNER, BATCH, (RATE, [0.2, 0.1]), (RATE, [0.1, 0.2])), ValueError,
     "The values of 'rate' must be a list that increases"),
    (lambda: plots.outer_loss_grid(PROBLEM, INNER, BATCH, RATE, RATE), TypeError,
     r"x must be a pair \(scalar farhox.Hyperparameter, values\)"),
    (lambda: plots.response_surface(PROBLEM, INNER, BATCH, (RATE, [0.1]), (RATE, [0.1])), ValueError,
     "A surface needs at least two values on each axis"),
    (lambda: plots.schedules({}), ValueError, r"Schedules must be arrays \[steps\], at least one"),
    (lambda: plots.schedules({"a": np.ones((2, 2))}), ValueError, r"Schedules must be arrays \[steps\], at least one"),
    (lambda: plots.schedules(np.ones(3), history=np.ones(3)), ValueError,
     r"history must be an array \[records, steps\]"),
    (lambda: plots.example_weights(np.ones((2,2))), ValueError, r"weights must be an array \[examples\]"),
    (lambda: plots.example_weights(np.ones(3), flipped=np.ones(2, bool)), ValueError,
     r"flipped must be a bool array of shape \(3,\)"),
    (lambda: plots.suspicious_examples(np.ones(3), np.ones((2, 4, 4)), np.ones(3)), ValueError,
     "images and labels must have one entry for each of the 3"),
    (lambda: plots.suspicious_examples(np.ones(3), np.ones((3, 4, 4)), np.ones(3), count=0), ValueError,
     "count and columns must be positive"),
    (lambda: plots.hypergradients("a"), TypeError, "comparison must come from farhox.compare_hypergradients"),
    (lambda: plots.hypergradients(None), TypeError, "comparison must come from farhox.compare_hypergradients"),
    (lambda: plots.example_weights([]), ValueError, r"weights must be an array \[examples\]"),
    (lambda: farhox.Tuner(None), TypeError, "A Tuner needs a functional or Sequential keras.Model"),
    (lambda: farhox.Tuner("m"), TypeError, "A Tuner needs a functional or Sequential keras.Model"),
    (lambda: farhox.Tuner(MODEL), ValueError, "The model must be compiled with an optimizer and a loss"),
    (lambda: farhox.Tuner(keras.Sequential([keras.layers.Dense(3)])), ValueError,
     "The model must be built: give it a keras.Input, or call it"),
    (lambda: tuner(objective="val_f2"), ValueError, "objective must be a value that validation gives: val_loss,"),
    (lambda: tuner(objective=3), TypeError, "objective must be a name, a Keras loss or a Keras metric"),
    (lambda: tuner(tune=["no_such"]), ValueError, "Names must be hyperparameters of the model"),
    (lambda: tuner(tune="learning_rate"), TypeError, "tune must be a list of names of hyperparameters"),
    (lambda: tuner(fix=["no_such"]), ValueError, "Names must be hyperparameters of the model"),
    (lambda: tuner(ranges={"learning_rate": 3}), ValueError,
     r"A range must be a pair \(low, high\) with 0 <= low < high"),
    (lambda: tuner(ranges=[1, 2]), TypeError, r"ranges must be a dictionary from names to pairs \(low, high\)"),
    (lambda: tuner(ranges={"learning_rate": (NAN, 1.0)}), ValueError,
     r"A range must be a pair \(low, high\) with 0 <= low < high"),
    (lambda: tuner(ranges={"learning_rate": (1.0, 0.1)}), ValueError,
     r"A range must be a pair \(low, high\) with 0 <= low < high"),
    (lambda: tuner(ranges={"x": (0.1, 1.0)}), ValueError, "Names must be hyperparameters of the model"),
    (lambda: tuner(start={"x": 0.1}), ValueError, "Names must be hyperparameters of the model"),
    (lambda: tuner(start={"learning_rate": NAN}), ValueError,
     "The value of 'learning_rate' must be in its range from 1e-07"),
    (lambda: tuner(start=[0.1]), TypeError, "start must be a dictionary from names to values,"),
    (lambda: tuner(start={"learning_rate": "a"}), TypeError, "A value to start from must be a number"),
    (lambda: tuner(start={"learning_rate": -0.1}), ValueError,
     "The value of 'learning_rate' must be in its range from -0.01"),
    (lambda: tuner(granularity="weight"), ValueError, 'granularity must be "global" or "layer"'),
    (lambda: tuner(annealing=2.0), ValueError, "annealing must be a number from 0.0 to 1.0"),
    (lambda: tuner(annealing=NAN), ValueError, "annealing must be a number from 0.0 to 1.0"),
    (lambda: tuner(truncation=0), ValueError, "truncation must be a positive integer"),
    (lambda: tuner(outer_rate=0.0), ValueError, "outer_rate must be a positive finite number"),
    (lambda: tuner(seed="a"), ValueError, "seed must be an integer"),
    (lambda: tuner().fit(X, Y), ValueError, "A Tuner tunes hyperparameters on validation data"),
    (lambda: tuner().fit(X, Y, validation_data=BATCH, epochs=0), ValueError, "epochs must be a positive integer"),
    (lambda: tuner().fit(X, Y[:4], validation_data=BATCH), ValueError,
     "All arrays of train must have the same number of examples"),
    (lambda: tuner().fit(X * NAN, Y, validation_data=BATCH), ValueError, "train must hold finite numbers"),
    (lambda: tuner().fit(X, Y, validation_data=BATCH, batch_size=0), ValueError,
     "batch_size must be a positive integer"),
    (lambda: tuner().fit(EXAMPLES.batch(4).repeat(), validation_data=BATCH), ValueError,
     "The number of batches in an epoch must be known"),
    (lambda: tuner().fit(X, Y, sample_weight=np.ones(3), validation_data=BATCH), ValueError,
     "All arrays of train must have the same number of examples"),
    (lambda: tuner().fit(X, Y, validation_data=BATCH, callbacks=[keras.callbacks.ReduceLROnPlateau()]), ValueError,
     "The tuner sets the learning rate and its states itself, so"),
    (lambda: tuner().fit(X, Y, validation_data=(X * NAN, Y)), ValueError, "validation must hold finite numbers"),
    (lambda: tuner().fit(X, Y, validation_data=BATCH, steps_per_epoch=0), ValueError,
     "steps_per_epoch must be a positive integer"),
    (lambda: tuner().fit(EXAMPLES.batch(4), validation_data=BATCH, batch_size=4), ValueError,
     "Batches of a data set have a size already"),
    (lambda: tuner().get_model(), ValueError, r"The tuner must have run: call fit\(\) first"),
    (lambda: training.OptimizerGroups("sgd", []), TypeError, "Every optimizer must be a keras.optimizers.Optimizer"),
    (lambda: training.OptimizerGroups(keras.optimizers.SGD(), None), TypeError,
     r"groups must be a list of pairs \(optimizer, list of outer"),
    (lambda: training.OptimizerGroups(keras.optimizers.SGD(), [3]), TypeError,
     r"groups must be a list of pairs \(optimizer, list of outer"),
    (lambda: (lambda o: training.OptimizerGroups(o, [(o, [RATE])]))(keras.optimizers.SGD()), ValueError,
     "Every group needs an optimizer of its own"),
    (lambda: training.OptimizerGroups(keras.optimizers.SGD(), [(keras.optimizers.SGD(), [RATE, RATE])]), ValueError,
     "A variable must be in one group"),
    (lambda: distributed(meta_batch_size=0), ValueError, "meta_batch_size must be a positive integer"),
    (lambda: distributed(PLAIN), TypeError, "fit_distributed takes a farhox.meta.Learner and a"),
    (lambda: meta.SinusoidEpisodes(0, 5), ValueError, "shots must be a positive integer"),
    (lambda: meta.SinusoidEpisodes("5", 5), ValueError, "shots must be a positive integer"),
    (lambda: meta.evaluate_episodes(learner(), None, 3), TypeError,
     "Episodes must come from a farhox.meta.EpisodeSource, for"),
    (lambda: meta.evaluate_episodes(learner(), EPISODES, 0), ValueError,
     "The number of episodes must be a positive integer"),
    (lambda: meta.mean_and_interval([]), ValueError, "values must be a list of at least one number"),
    (lambda: meta.mean_and_interval(None), ValueError, "values must be a list of at least one number"),
    (lambda: meta.HyperRepresentation(MODEL, "dense"), TypeError, "body must be a keras.Model and head a keras.Layer"),
    (lambda: meta.IMAML(MODEL, proximal=-1.0), ValueError, "proximal must be positive"),
    (lambda: meta.IMAML(MODEL, proximal="a"), TypeError, "proximal must be a float, a farhox.Hyperparameter or None"),
    (lambda: meta.JointTraining(None), TypeError, "model must be a keras.Model"),
    (lambda: meta.JointTraining(MODEL, evaluation_steps=0), ValueError, "evaluation_steps must be a positive integer"),
    (lambda: meta.split_classes(X, Y, [9, 9]), ValueError,
     "sizes must be numbers of classes, no more in all than there"),
    (lambda: meta.with_rotations(X, Y), ValueError, r"images must have shape \[examples, height, width, channels\]"),
    (lambda: meta.residual_body((3,)), ValueError, r"input_shape must be \(height, width, channels\)"),
    (lambda: stn.Conv1D(4, 3, [0.3]), TypeError, "hyperparameters of 'conv1d.*' must be farhox.Hyperparameter"),
    (lambda: stn.Conv3D(4, 3, []), ValueError, "'conv3d.*' needs at least one hyperparameter to respond to"),
    (lambda: stn.DepthwiseConv2D(3, None), TypeError, "hyperparameters of 'depthwise_conv2d.*' must be a list of"),
    (lambda: stn.SeparableConv2D(4, 3, "h"), TypeError, "hyperparameters of 'separable_conv2d.*' must be a list of"),
    (lambda: stn.EinsumDense("ab,bc->ac", 3, [0.1]), TypeError, "hyperparameters of 'einsum_dense.*' must be"),
    (lambda: stn.GRUCell(3, None), TypeError, "hyperparameters of 'gru_cell.*' must be a list of"),
    (lambda: stn.LSTMCell(3, [RATE], dropout=2.0), ValueError,
     "dropout must stay between 0.0 and 1.0: give a hyperparameter"),
    (lambda: stn.RandomContrast(-0.1), ValueError, "factor of 'random_contrast.*' must stay between 0.0 and 1.0:"),
    (lambda: stn.RandomSaturation(NAN), ValueError, "factor of 'random_saturation.*' must stay between 0.0 and 1.0:"),
    (lambda: stn.SpatialDropout1D(1.5), ValueError, "rate of 'spatial_dropout1d.*' must stay between 0.0 and 1.0:"),
    (lambda: stn.SpatialDropout3D("a"), TypeError, "rate of 'spatial_dropout3d.*' must be a number or a"),
    (lambda: stn.TrainingDraws(MODEL), ValueError, "TrainingDraws needs a model with self-tuning layers, which"),
    (lambda: HP([]), ValueError, "must have at least one entry"),
    (lambda: farhox.ExampleWeights(4)([9]), ValueError, "must be from 0 to 3"),
    (lambda: farhox.ExampleWeights(4)(None), TypeError, "must be integers. Received: None"),
    (lambda: losses.WorstGroupLoss("mse", 0), ValueError, "num_groups must be a positive integer"),
    (lambda: losses.WorstGroupLoss("mse", 2, temperature=-1.0), ValueError, "temperature must be a positive"),
    (lambda: losses.EqualizedOddsLoss("mse", 2, weight=NAN), ValueError, "weight must be a non-negative"),
    (lambda: losses.SoftAUC()(Y, tf.constant(X)), ValueError, "predictions of one output"),
    (lambda: losses.SoftF1()(Y, tf.constant(X[0])), ValueError, "predictions of one output"),
    (lambda: compute(hypergradients.ImplicitHG()), ValueError, "(?s)depends on 'rate'.*allow_unused=True"),
    (lambda: compute(hypergradients.InitialHG()), ValueError, "InitialHG sees initial values"),
    (lambda: compute(hypergradients.ReversibleHG()), ValueError, "undoes farhox.Momentum without nesterov"),
    (lambda: insight.compare_hypergradients(PROBLEM, INNER, BATCH, hypergradients.ReverseHG()), TypeError,
     "methods must be a list or a dictionary"),
    (lambda: insight.compare_hypergradients(PROBLEM, INNER, BATCH, None), TypeError,
     "methods must be a list or a dictionary"),
    (lambda: callbacks.Resume(None), ValueError, "directory must be the path of a folder"),
    (lambda: callbacks.Resume(""), ValueError, "directory must be the path of a folder"),
    (lambda: plots.outer_loss_grid(None, INNER, BATCH, (RATE, [0.1, 0.2]), (OTHER, [0.1, 0.2])), TypeError,
     "problem must be a farhox.BilevelProblem"),
    (lambda: plots.response_surface(MODEL, INNER, BATCH, (RATE, [0.1, 0.2]), (OTHER, [0.1, 0.2])), TypeError,
     "problem must be a farhox.BilevelProblem"),
    (lambda: tuner().fit(None, validation_data=BATCH), ValueError, "training data must be arrays"),
    (lambda: tuner().fit(X, Y, validation_data="validation"), ValueError, "validation_data must be a pair of arrays"),
    (lambda: tuner().fit(X, Y, validation_data=(X[:0], Y[:0])), ValueError, "with at least one example"),
    (lambda: tuner().fit(EXAMPLES, validation_data=BATCH), ValueError, "must be batches of examples"),
    (lambda: tuner().fit(X, Y, validation_data=EXAMPLES), ValueError, "must be batches of examples"),
    (lambda: distributed(folder=None), TypeError, "folder must be the path of a folder"),
    (lambda: distributed(meta_steps=0), ValueError, "meta_steps must be a positive integer"),
    (lambda: distributed(meta_batch_size="2"), ValueError, "meta_batch_size must be a positive integer"),
    (lambda: distributed(save_every=-1), ValueError, "save_every must be a non-negative"),
    (lambda: distributed(report=3), TypeError, "report must be a callable"),
    (lambda: farhox.HyperOptimizer(PROBLEM).compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())),
     ValueError, "optimizer must take gradients as they are.*inner_optimizer"),
    (lambda: farhox.HyperOptimizer(PROBLEM).compile(keras.optimizers.SGD(loss_scale_factor=8.0)), ValueError,
     "hypergradients are not scaled.*loss_scale_factor=8.0"),
    (lambda: training.OptimizerGroups(keras.optimizers.SGD(), [(keras.optimizers.SGD(loss_scale_factor=8.0), [RATE])]),
     ValueError, "hypergradients are not scaled"),
    (lambda: self_tuning(hyper_optimizer=keras.optimizers.SGD(loss_scale_factor=8.0)), ValueError,
     "hyper_optimizer must take gradients as they are"),
    (lambda: self_tuning(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), response_optimizer="sgd"),
     ValueError, "Where the loss is scaled, response_optimizer must be left out"),
    (lambda: meta.CAVIA(MODEL), ValueError, "CAVIA needs a context"),
    (lambda: meta.TaskContext(0), ValueError, "size must be a positive integer"),
    (lambda: meta.MetaCurvature(None), TypeError, "model must be a keras.Model"),
    (lambda: meta.PreconditionedDescent(-1.0, []), ValueError, "learning_rate must be finite and at least"),
    (lambda: meta.MAMLPlusPlus(MODEL, inner_steps=0), ValueError, "inner_steps must be a positive integer"),
    (lambda: meta.RidgeNetwork(None, 3), TypeError, "embedding must be a keras.Model"),
    (lambda: meta.SupportVectorNetwork(MODEL, 3, cost=-1.0), ValueError, "cost must be a positive"),
    (lambda: meta.StepBatchNormalization(0), ValueError, "steps must be a positive integer"),
    (lambda: meta.TaskEpisodes([], shots=0), ValueError, "shots must be a positive integer"),
    (lambda: meta.TaskEpisodes([BATCH], queries=2), ValueError, "queries needs shots"),
    (lambda: meta.episode_problem(None), TypeError, "model must be a keras.Model"),
    (lambda: stn.TrainingDraws(None), TypeError, "needs a built keras.Model"),
]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_a_mistake_gets_an_error_that_says_the_rule(row):
    give, error, words = ROWS[row]
    with pytest.raises(error, match=words):
        give()


@pytest.mark.parametrize("text, words", [
    ("a,b\n1,2\n", "begins with the column hyper_iteration"), ("", "begins with the column hyper_iteration"),
    ("hyper_iteration,rate\n1,0.1\n2\n", r"entry for each of its 2 columns.*with 1 in line 3")])
def test_a_file_that_is_no_trace_is_named(text, words, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){words}") as raised:
        callbacks.read_trace(path)
    assert str(path) in str(raised.value)


# Classes to derive from, what is made by farhox alone, and layers that share the checks of those in a table.
WITHOUT_ARGUMENTS_OF_USERS = {
    "BestConfigurations", "EmbeddingLearner", "Memory", "StartComparison", "identity_factors",
    "HyperGradientResult", "SingleHyperGradient", "HyperGradient", "result", "InnerDynamics", "InnerState", "Penalty",
    "LinearOperator", "LinearSolution", "LinearSolver", "OuterLoss", "OuterVariable", "value_of", "Resumable",
    "EpisodeSource", "SelfTuning", "SelfTuningParts", "Response", "PerturbationLayer", "ServedModel", "is_chief",
    "load_omniglot"}
SHARED_CHECKS = {"Conv2D", "Conv2DTranspose", "GroupQueryAttention"}


def test_every_public_name_is_in_a_table():
    tables = "".join(path.read_text() for pattern in ("test_bad_inputs*.py", "test_starts_*.py", "test_feature_tr*.py")
                     for path in sorted(pathlib.Path(__file__).parent.glob(pattern)))
    tables = tables[:tables.index("WITHOUT_ARGUMENTS")] + tables[tables.index("def test_every_public"):]
    rooms = [farhox, *(importlib.import_module(f"farhox.{name}") for name in (
        "callbacks", "constraints", "data", "dynamics", "export", "hypergradients", "insight", "linear_solvers",
        "losses", "meta", "outer", "plots", "problem", "starts", "stn", "training"))]
    names = {name for room in rooms for name in room.__all__ if callable(getattr(room, name))}
    missing = {name for name in names if not re.search(rf"\b{name}\b", tables)}
    assert missing <= WITHOUT_ARGUMENTS_OF_USERS | SHARED_CHECKS, missing

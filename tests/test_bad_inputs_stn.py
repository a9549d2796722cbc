"""What self-tuning networks say to inputs they cannot use: one table over all entry points."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import stn

K = keras.layers


def rate(initial=0.3, low=0.0, high=0.9, **arguments):
    return farhox.Hyperparameter(initial, low=low, high=high, **{"name": "rate", **arguments})


def data(number=6):
    return np.ones((number, 4), "float32"), np.zeros(number, "int32")


def plain():
    return keras.Sequential([keras.Input((4,)), K.Dropout(0.2, name="drop"), K.Dense(3, name="dense")])


@pytest.fixture(scope="module")
def compiled():
    model = made()
    model.compile("sgd", "adam", loss="sparse_categorical_crossentropy")
    return model


def made(**arguments):
    return stn.SelfTuningModel(keras.Sequential([keras.Input((4,)), stn.Dense(3, [rate()], name="first")]), **arguments)


def config_of(layer, **changes):
    return type(layer).from_config({**layer.get_config(), **changes})


def dataset(*parts):
    return tf.data.Dataset.from_tensors(parts)


NAN, INF = float("nan"), float("inf")

WITHOUT_MODEL = {
    "convert: None": (lambda: stn.convert(None), TypeError, "stn.convert needs a functional or Sequential"),
    "convert: a layer": (lambda: stn.convert(K.Dense(3)), TypeError, "stn.convert needs a functional or Sequential"),
    "convert: a number as hyperparameter": (lambda: stn.convert(plain(), 0.3),
        TypeError, "must be a list of farhox.Hyper"),
    "convert: a list of numbers": (lambda: stn.convert(plain(), [0.3]),
        TypeError, "must be farhox.Hyperparameter objects"),
    "convert: an empty list": (lambda: stn.convert(plain(), []), ValueError, "at least one hyperparameter"),
    "convert: one twice": (lambda: stn.convert(plain(), (lambda h: [h, h])(rate())), ValueError,
                           "must be different objects"),
    "convert: a string as twins": (lambda: stn.convert(plain(), [rate()], twins="Dense"),
        TypeError, "twins must be a dict"),
    "convert: a list as strengths": (lambda: stn.convert(plain(), strengths=[rate()]),
        TypeError, "strengths must be a dict"),
    "convert: a layer that is not there": (lambda: stn.convert(plain(), strengths={"dropout_7": rate()}), ValueError,
                                           "Received: 'dropout_7', of which there are 0"),
    "convert: a strength of a dense layer": (lambda: stn.convert(plain(), strengths={"dense": rate()}), TypeError,
                                             "Strengths are those of dropout, noise and augmentation"),
    "convert: a number as strength": (lambda: stn.convert(plain(), strengths={"drop": "0.3"}), TypeError,
                                      "rate of 'drop' must be a number or a farhox.Hyperparameter"),
    "with_strengths: None": (lambda: stn.with_strengths(None, {}),
        TypeError, "stn.with_strengths needs a functional or Sequential"),
    "with_strengths: a list": (lambda: stn.with_strengths(plain(), [rate()]), TypeError, "strengths must be a dict"),
    "with_strengths: a layer that is not there": (lambda: stn.with_strengths(plain(), {"dropout_7": rate()}),
                                                  ValueError, "Received: 'dropout_7', of which there are 0"),
    "with_strengths: a number in a string": (lambda: stn.with_strengths(plain(), {"drop": "0.3"}), TypeError,
                                             "rate of 'drop' must be a number or a farhox.Hyperparameter"),
    "bake: None": (lambda: stn.bake(None), TypeError, "stn.bake needs a functional"),
    "summary: a layer": (lambda: stn.summary(K.Dense(3)), TypeError, "stn.summary needs a keras.Model"),
    "strengths_of: a list": (lambda: stn.strengths_of([K.Dropout(0.3)]),
        TypeError, "stn.strengths_of needs a keras.Model"),
    "dropout: NaN": (lambda: stn.Dropout(NAN), ValueError, "rate of .* must stay between 0.0 and 1.0"),
    "dropout: negative": (lambda: stn.Dropout(-0.1), ValueError, "rate of .* must stay between 0.0 and 1.0"),
    "dropout: above one": (lambda: stn.SpatialDropout2D(1.1), ValueError, "rate of .* must stay between 0.0 and 1.0"),
    "dropout: a bool": (lambda: stn.AlphaDropout(True), TypeError, "rate of .* must be a number"),
    "dropout: a hyperparameter without a bound": (lambda: stn.GaussianDropout(rate(high=None)),
        ValueError, "must stay betw"),
    "dropout: one that may be negative": (lambda: stn.Dropout(rate(low=-0.5)),
        ValueError, "must stay between 0.0 and 1.0"),
    "dropout: an array": (lambda: stn.Dropout(rate([0.1, 0.2])), ValueError, "must be a scalar hyperparameter"),
    "dropout: a noise shape": (lambda: stn.Dropout(0.3, noise_shape="all"), ValueError, "noise_shape"),
    "dropout: a noise shape of size zero": (lambda: stn.AlphaDropout(0.3, noise_shape=(None, 0)),
        ValueError, r"noise_shape must be None or a tuple of positive integers and None. Received: \(None, 0\)"),
    "dropout: from_config": (lambda: config_of(stn.Dropout(0.3), rate=1.5), ValueError, "rate of .* must stay between"),
    "noise: infinite": (lambda: stn.GaussianNoise(INF), ValueError, "stddev of .* must stay between"),
    "noise: from_config": (lambda: config_of(stn.GaussianNoise(0.3), stddev=NAN), ValueError, "stddev of .* must stay"),
    "scale: negative": (lambda: stn.RandomScale(-1.0), ValueError, "scale of .* must stay between"),
    "activity: negative": (lambda: stn.ActivityRegularization(l2=-1e-3), ValueError, "l2 of .* must stay between"),
    "activity: NaN": (lambda: stn.ActivityRegularization(temporal=NAN), ValueError, "temporal of .* must stay between"),
    "images: a factor of two": (lambda: stn.RandomTranslation(2.0),
        ValueError, "height_factor of .* between 0.0 and 1.0"),
    "images: values the wrong way round": (lambda: stn.RandomBrightness(0.1, (1, 0)),
        ValueError, "value_range must be two"),
    "images: one value": (lambda: stn.RandomHue(0.1, 255), ValueError, "value_range must be two finite numbers"),
    "images: a data format": (lambda: stn.Cutout(3, data_format="last"), ValueError, 'must be "channels_last"'),
    "images: another layer": (lambda: stn.Augmentation(K.Dropout(0.1), factor=0.1), TypeError, "layer must be one of"),
    "images: from_config": (lambda: config_of(stn.RandomRotation(0.1), factor=-1.0),
        ValueError, "factor of .* must stay"),
    "smoothing: above one": (lambda: stn.LabelSmoothing(1.5), ValueError, "smoothing must stay between 0.0 and 1.0"),
    "smoothing: from_config": (lambda: config_of(stn.LabelSmoothing(0.1), smoothing=NAN),
        ValueError, "smoothing must stay"),
    "layer: dropout of words": (lambda: stn.Embedding(5, 3, [rate()], dropout=1.5),
        ValueError, "dropout of .* must stay"),
    "layer: dropout of a cell": (lambda: stn.LSTM(3, [rate()], dropout=1.5),
        ValueError, "dropout must stay between"),
    "layer: recurrent dropout": (lambda: stn.GRU(3, [rate()], recurrent_dropout=NAN),
        ValueError, "recurrent_dropout must"),
    "layer: DropConnect": (lambda: stn.GRU(3, [rate()], recurrent_dropconnect=-1.0), ValueError, "must stay between"),
    "layer: a reference of NaN": (lambda: stn.Dense(3, [rate()], reference=[NAN]),
        ValueError, "must be a finite number"),
    "layer: from_config": (lambda: config_of(stn.Dense(3, [rate()]), reference=[1.0, 2.0]),
        TypeError, "one number for each"),
    "layer: no hyperparameters": (lambda: stn.MultiHeadAttention(2, 3), TypeError, "hyperparameters"),
    "initializer: no inputs": (lambda: stn.gates.FanInUniform(0), ValueError, "fan_in must be a positive integer"),
    "model: None": (lambda: stn.SelfTuningModel(None), TypeError, "needs a built keras.Model"),
    "model: nothing responds": (lambda: stn.SelfTuningModel(plain()),
        ValueError, "needs a model with self-tuning layers"),
    "model: a scale of NaN": (lambda: made(initial_scale=NAN),
        ValueError, "initial_scale must be a positive finite number"),
    "model: a negative entropy": (lambda: made(entropy_weight=-1.0),
        ValueError, "entropy_weight must be a non-negative"),
    "model: half a step": (lambda: made(training_steps=1.5), ValueError, "training_steps must be a positive integer"),
    "model: no validation": (lambda: made(validation_steps=0),
        ValueError, "validation_steps must be a positive integer"),
    "model: a method": (lambda: made(method="Delta"), ValueError, "method must be one of"),
    "model: no skips": (lambda: made(max_skipped_updates=0),
        ValueError, "max_skipped_updates must be a positive integer"),
    "model: one_draw": (lambda: made(one_draw=[0.3]), TypeError, "must be farhox.Hyperparameter objects"),
    "compile: no loss": (lambda: made().compile("sgd"), ValueError, "must be compiled with a loss"),
    "compile: a list of losses": (lambda: made().compile("sgd", loss=["mse"]), TypeError, "A loss must be the name"),
    "compile: a hyperparameter as rate": (lambda: made().compile(keras.optimizers.SGD(rate()), loss="mse"), ValueError,
                                          "settings of optimizer must not be hyperparameters"),
    "fit: not compiled": (lambda: made().fit(*data(), validation_data=data()),
        ValueError, "must be compiled before fit"),
    "recorder: every": (lambda: stn.ScheduleRecorder(every=0), ValueError, "every must be a positive integer"),
    "replay: without values": (lambda: stn.ScheduleReplay({"steps": [0]}, [rate()]),
        ValueError, 'must have "steps", and'),
    "replay: of other lengths": (lambda: stn.ScheduleReplay({"steps": [0, 1], "values": {"rate": [0.1]}}, [rate()]),
        ValueError, "missing or of other lengths"),
    "replay: of another name": (lambda: stn.ScheduleReplay({"steps": [0], "values": {"r": [0.1]}}, [rate()]),
        ValueError, "must be in the schedule"),
}

IN_FIT = {
    "no targets": ((data()[0],), {}, "The training data must be a tf.data.Dataset"),
    "a string": (("data",), {}, "The training data must be a tf.data.Dataset"),
    "other lengths": ((data(6)[0], data(5)[1]), {}, "one entry per example each. Received lengths"),
    "no examples": (data(0), {}, "The training data must have an example"),
    "a batch of zero": (data(), {"batch_size": 0}, "batch_size must be a positive integer"),
    "a batch of less": (data(), {"batch_size": -3}, "batch_size must be a positive integer"),
    "targets twice": ((dataset(*data()), data()[1]), {}, "must hold targets and sample weights itself"),
    "weights besides a data set": ((dataset(*data()),), {"sample_weight": np.ones(6)}, "must hold targets and sample"),
    "no batches": ((dataset(*data()).take(0),), {}, "The training data must have a batch"),
    "no validation batches": (data(), {"validation_data": dataset(*data()).take(0)},
        "validation_data must have a batch"),
    "without end": ((dataset(*data()).repeat(),), {}, "The training data must end, or have a number"),
    "validation without end": (data(), {"validation_data": dataset(*data()).repeat()},
        "validation_data must end, or have a number"),
    "class weights": (data(), {"class_weight": {0: 2.0}}, "takes no class_weight"),
    "a split": (data(), {"validation_split": 0.1}, "takes no validation_split"),
    "no validation data": (data(), {"validation_data": None}, "on validation data. Received: validation_data=None"),
    "other structure": ((dataset(*data(), np.ones(6)),), {}, "must have the same structure and types"),
    "batches that are not pairs": ((dataset(data()[0]),), {}, "must be a tuple \\(x, y\\)"),
}


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_what_cannot_be_used_is_refused_with_a_rule(name):
    make, error, rule = WITHOUT_MODEL[name]
    with pytest.raises(error, match=rule):
        make()


@pytest.mark.parametrize("name", IN_FIT)
def test_data_that_cannot_be_used_are_refused_before_a_step_is_taken(name, compiled):
    arguments, named, rule = IN_FIT[name]
    before = compiled.model.get_weights()
    with pytest.raises(ValueError, match=rule):
        compiled.fit(*arguments, **{"validation_data": data(), "verbose": 0, **named})
    assert all(np.array_equal(one, other) for one, other in zip(before, compiled.model.get_weights()))


@pytest.mark.parametrize("batch, rule", [
    (data()[0], "must be a tuple"), ((data()[0],), "of length 1"), ((*data(), 1, 2), "of length 4"),
    ((data(6)[0], data(5)[1]), "cannot be split into examples"), ((data()[0], 1.0), "cannot be split into examples")])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_batches_by_hand_must_be_examples_with_targets(step, batch, rule, compiled):
    with pytest.raises(ValueError, match=rule):
        getattr(compiled, step)(batch)


@pytest.mark.parametrize("text", ["", "{", json.dumps([1]), json.dumps({"steps": [], "values": {}})])
def test_a_damaged_file_of_a_schedule_is_named(text, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="A schedule must .*schedule.json"):
        stn.ScheduleReplay(path, [rate()])

"""Schedules of self-tuning models: what is recorded, and that plain training replays it step by step."""

import json

import keras
import numpy as np
import pytest

import farhox
from farhox import stn

K = keras.layers


def data(examples=24):
    random = np.random.default_rng(0)
    return random.normal(size=(examples, 4)).astype("float32"), random.integers(0, 3, examples)


class Watch(keras.callbacks.Callback):
    """Values of hyperparameters that each training step sees."""

    def __init__(self, hyperparameters):
        super().__init__()
        self.hyperparameters, self.seen = hyperparameters, []

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append([entry.numpy().tolist() for entry in self.hyperparameters])


def network():
    rate = farhox.Hyperparameter(0.3, low=0.0, high=0.9, name="rate")
    decay = farhox.Hyperparameter(0.01, low=0.0, log=True, name="decay")
    return rate, decay, keras.Sequential([
        keras.Input((4,)), stn.Dropout(rate), K.Dense(3, kernel_regularizer=farhox.L1L2(l2=decay))])


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def recorded(path=None, **arguments):
    rate, decay, net = network()
    model = stn.SelfTuningModel(stn.convert(net))
    model.compile("sgd", keras.optimizers.Adam(0.1), loss=LOSS)
    recorder, watch = stn.ScheduleRecorder(path=path, **arguments), Watch([rate, decay])
    model.fit(*data(), batch_size=4, epochs=2, validation_data=data(), callbacks=[recorder, watch], verbose=0)
    return recorder, watch, net, [rate, decay]


def test_plain_training_replays_the_values_that_every_training_step_had(tmp_path):
    path = tmp_path / "schedule.json"
    recorder, watch, net, hyperparameters = recorded(path)
    # Training steps 0, 1, validation, 2, 3, validation, ...: 12 training steps of 18.
    expected = [values for step, values in enumerate(watch.seen) if step % 3 != 2]
    assert len(expected) == 12 and len({tuple(values) for values in expected}) == 6
    assert json.loads(path.read_text()) == recorder.schedule

    replay, again = stn.ScheduleReplay(path, hyperparameters), Watch(hyperparameters)
    hyperparameters[0].assign(0.8)
    net.compile("sgd", LOSS)
    net.fit(*data(), batch_size=4, epochs=2, callbacks=[replay, again], verbose=0)
    np.testing.assert_allclose(again.seen, expected, rtol=1e-5)
    net.fit(*data(), batch_size=4, epochs=1, callbacks=[replay], verbose=0)
    np.testing.assert_allclose(hyperparameters[0].numpy(), recorder.schedule["values"]["rate"][-1], rtol=1e-5)


@pytest.mark.slow
def test_records_are_made_every_so_many_training_steps_and_go_on_with_training():
    recorder, _, _, _ = recorded(every=5)
    assert recorder.schedule["steps"] == [0, 5, 10]
    assert [len(values) for values in recorder.schedule["values"].values()] == [3, 3]


def test_a_value_that_was_rounded_to_its_bound_is_replayed():
    rate, decay, net = network()
    schedule = {"steps": [0, 2], "values": {"rate": [0.0, 0.9], "decay": [0.0, 0.5]}}
    watch = Watch([rate, decay])
    net.compile("sgd", LOSS)
    net.fit(*data(12), batch_size=4, callbacks=[stn.ScheduleReplay(schedule, [rate, decay]), watch], verbose=0)
    np.testing.assert_allclose(watch.seen, [[0.0, 0.0], [0.0, 0.0], [0.9, 0.5]], atol=1e-5)


@pytest.mark.parametrize("make, rule", [
    (lambda rate, net: stn.ScheduleRecorder(every=0), "every must be a positive integer"),
    (lambda rate, net: net.fit(*data(), callbacks=[stn.ScheduleRecorder()], verbose=0), "needs a SelfTuningModel"),
    (lambda rate, net: stn.ScheduleReplay({"steps": [0], "values": {"other": [1.0]}}, [rate]),
     "in the schedule, which has \\['other'\\]. Received: rate"),
    (lambda rate, net: stn.ScheduleReplay({"steps": [0], "values": {"rate": [1.0]}}, [
        rate, farhox.Hyperparameter(1.0, name="rate")]), "must have different names"),
])
def test_schedules_refuse_what_they_cannot_record_or_replay(make, rule):
    rate, _, net = network()
    net.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=rule):
        make(rate, net)

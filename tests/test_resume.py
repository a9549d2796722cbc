"""Resume: a training that was interrupted ends with the weights and the history of one that was not, bit for bit."""

import signal
import threading

import keras
import numpy as np
import pytest
import resumable_runs
import tensorflow as tf
from resumable_runs import all_variables, fit, make, values

from farhox.callbacks import Resumable, Resume


class Fails(Exception):
    pass


class Stop(keras.callbacks.Callback):
    """Ends `fit` with an error, or with something else that happens, before the step with a number."""

    def __init__(self, step, happens=None):
        super().__init__()
        self.left, self.happens = step, happens

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left == -1:
            if self.happens is None:
                raise Fails
            self.happens()


def dense(*layers, **compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([3]), *layers, keras.layers.Dense(2, "softmax")])
    model.compile(**{"optimizer": "adam", "loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"],
                     "run_eagerly": True, **compiled})
    model.optimizer.build(model.trainable_variables)
    return model


def batches(size=3):
    return tf.data.Dataset.from_tensor_slices((resumable_runs.X, resumable_runs.Y)).batch(size)


@pytest.fixture(scope="module")
def traced():
    """One model per kind for all tests of this file, with its initial values."""
    made = {}

    def of(name):
        if name not in made:
            model = make(name)
            fit(name, model, epochs=1)
            fresh = make(name)
            # Metrics have their variables now; the values are those of the start.
            made[name] = model, [keras.ops.convert_to_numpy(variable) for variable in all_variables(fresh)]
        model, initial = made[name]
        for variable, value in zip(all_variables(model), initial, strict=True):
            variable.assign(value)
        return model

    return of


@pytest.mark.filterwarnings("ignore:Implicit hypergradients were taken far")
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("name, every, step", [
    ("reverse", 1, 4),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("implicit warm", 2, 7), ("stn", 1, 6), ("reptile", "epoch", 4), ("plain", 1, 5),
        ("forward online", "epoch", 7), ("maml", 1, 6), ("delta", "epoch", 8)))])
def test_a_training_that_failed_goes_on_to_the_weights_and_the_history_of_one_that_did_not(
        traced, tmp_path, name, every, step):
    model = traced(name)
    whole = fit(name, model)
    expected = values(model)
    with pytest.raises(Fails):
        fit(name, traced(name), tmp_path, [Stop(step)], every=every)
    traced(name)
    resumed = fit(name, model, tmp_path, every=every)
    assert values(model) == expected
    assert resumed.history == whole.history and resumed.epoch == whole.epoch == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 2


def interrupted(tmp_path, step=5, callbacks=(), epochs=3, data=None, make=dense, **resume):
    """Runs a training that fails before a step, and goes on with a new model; returns it and its history."""
    for stop in ([Stop(step)], []):
        model = make()
        try:
            history = model.fit(batches() if data is None else data(), epochs=epochs, verbose=0, callbacks=[
                *(made() for made in callbacks), Resume(tmp_path, **resume), *stop])
        except Fails:
            assert stop
    return model, history


def whole(callbacks=(), epochs=3, data=None, make=dense):
    model = make()
    return model, model.fit(batches() if data is None else data(), epochs=epochs, verbose=0,
                            callbacks=[made() for made in callbacks])


def assert_same(a, b):
    (model, history), (other, others) = a, b
    assert values(model) == values(other)
    assert history.history == others.history and history.epoch == others.epoch


@pytest.mark.one_case
@pytest.mark.parametrize("every, seconds", [
    (3, 0.0), pytest.param(1, 1000.0, marks=pytest.mark.slow), pytest.param(1, 0.0, marks=pytest.mark.slow),
    pytest.param("epoch", 0.0, marks=pytest.mark.slow)])
def test_how_often_a_state_is_saved_has_no_influence_on_the_result(tmp_path, every, seconds):
    def make():
        return dense(keras.layers.Dropout(0.5, seed=1))

    assert_same(interrupted(tmp_path, every=every, seconds=seconds, make=make), whole(make=make))


@pytest.mark.slow
def test_states_are_saved_as_often_as_said(tmp_path):
    numbers = {}
    for name, arguments in {"epoch": {}, "three": {"every": 3}, "late": {"seconds": 1000.0}}.items():
        dense().fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path / name, **arguments)])
        numbers[name] = sorted(int(path.name[6:14]) for path in (tmp_path / name).iterdir())
    # Of 12 steps those after 3, 6, 9, 12; the end of an epoch is not one of them. The end is always saved.
    assert numbers == {"epoch": [2, 3], "three": [4, 5], "late": [1]}


@pytest.mark.slow
@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 5])
def test_several_steps_in_one_execution_are_resumed(tmp_path, step):
    def make():
        return dense(steps_per_execution=3, run_eagerly=False)

    # Seven batches: executions of 3, 3 and 1.
    assert_same(interrupted(tmp_path, step, every=1, data=lambda: batches(2).take(7), epochs=2, make=make),
                whole(data=lambda: batches(2).take(7), epochs=2, make=make))


@pytest.mark.slow
def test_data_of_unknown_length_are_read_again_to_their_place(tmp_path):
    def data():
        return batches().filter(lambda x, y: True).shuffle(4, seed=3)

    with pytest.warns(UserWarning, match="ran out of data"):
        assert_same(interrupted(tmp_path, 6, every=1, data=data), whole(data=data))


@pytest.mark.slow
def test_arrays_that_fit_shuffles_and_cuts_for_validation_are_resumed(tmp_path):
    def run(stop, *resume):
        model = dense(run_eagerly=True)
        return model, model.fit(resumable_runs.X, resumable_runs.Y, epochs=3, verbose=0, batch_size=4,
                                validation_split=0.25, callbacks=[*resume, *stop])

    with pytest.raises(Fails):
        run([Stop(4)], Resume(tmp_path))
    assert_same(run([], Resume(tmp_path)), run([]))


@pytest.mark.slow
def test_without_replay_data_are_given_from_the_initial_epoch_on(tmp_path):
    def run(resume, *stop):
        model, data = dense(), batches().shuffle(4, seed=0).repeat()
        return model, model.fit(data.skip(3 * resume.initial_epoch), steps_per_epoch=3, epochs=3, verbose=0,
                                callbacks=[resume, *stop])

    with pytest.raises(Fails):
        run(Resume(tmp_path, every=2, replay=False), Stop(8))
    resume = Resume(tmp_path, every=2, replay=False)
    assert resume.initial_epoch == 2
    assert_same(run(resume), run(Resume(tmp_path / "other")))


def test_a_finished_training_is_restored_and_not_done_again(tmp_path):
    first = dense()
    history = first.fit(batches(), epochs=2, verbose=0, callbacks=[Resume(tmp_path)])
    second = dense()
    again = second.fit(batches(), epochs=2, verbose=0, callbacks=[Resume(tmp_path), Stop(0)])
    assert_same((second, again), (first, history))
    # The next fit without Resume begins at its beginning; with Resume more epochs go on.
    assert second.fit(batches(), epochs=1, verbose=0).epoch == [0]
    assert dense().fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path)]).epoch == [0, 1, 2]


class Scores(keras.callbacks.Callback):
    """Makes the monitored value what a list says."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = self.scores[epoch]


@pytest.mark.slow
def test_early_stopping_stops_where_it_would_have_and_restores_the_best_weights(tmp_path):
    def callbacks():
        return [lambda: Scores([3.0, 1.0, 2.0, 2.0, 2.0, 0.0]),
                lambda: keras.callbacks.EarlyStopping("score", patience=3, mode="min", restore_best_weights=True)]

    expected = whole(callbacks(), epochs=6)
    assert expected[1].epoch == [0, 1, 2, 3, 4]
    assert_same(interrupted(tmp_path, 13, callbacks(), epochs=6), expected)
    # It is finished: a third run trains nothing.
    assert_same(interrupted(tmp_path, 0, callbacks(), epochs=6), expected)


@pytest.mark.slow
def test_plateaus_and_the_best_checkpoint_are_counted_on(tmp_path):
    def callbacks(path):
        return [lambda: Scores([1.0, 2.0, 2.0, 1.5, 2.0]),
                lambda: keras.callbacks.ReduceLROnPlateau("score", mode="min", patience=2, factor=0.1, cooldown=2),
                lambda: keras.callbacks.ModelCheckpoint(path, "score", mode="min", save_best_only=True,
                                                        save_weights_only=True)]

    expected = whole(callbacks(tmp_path / "whole.weights.h5"), epochs=5)
    found = interrupted(tmp_path / "run", 9, callbacks(tmp_path / "best.weights.h5"), epochs=5)
    assert_same(found, expected)
    assert found[1].history["learning_rate"][-1] < found[1].history["learning_rate"][0]
    best = dense()
    best.load_weights(tmp_path / "best.weights.h5")
    other = dense()
    other.load_weights(tmp_path / "whole.weights.h5")
    np.testing.assert_array_equal(best.get_weights()[0], other.get_weights()[0])


class Counter(keras.callbacks.Callback, Resumable):
    def __init__(self):
        super().__init__()
        self.steps, self.begun, self.array = 0, [], np.zeros(2, "float32")

    def on_epoch_begin(self, epoch, logs=None):
        self.begun.append(epoch)

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        self.array[0] += batch

    def resume_state(self):
        return {"steps": self.steps, "begun": self.begun, "array": self.array}

    def resume_from(self, state):
        self.steps, self.begun, self.array = state["steps"], state["begun"], state["array"]


def test_a_callback_of_ones_own_hears_of_each_step_once_and_goes_on_with_its_state(tmp_path):
    made = []

    def counter():
        made.append(Counter())
        return made[-1]

    interrupted(tmp_path, 6, [counter], every=1)
    whole([counter])
    assert [(entry.steps, entry.begun, entry.array.tolist()) for entry in made[1:]] == [
        (12, [0, 1, 2], [18.0, 0.0])] * 2


@pytest.mark.one_case
@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_is_obeyed_at_the_end_of_the_batch_with_the_state_saved(tmp_path, capsys, number, code):
    model = dense()
    with pytest.raises(KeyboardInterrupt) as raised:
        model.fit(batches(), epochs=3, verbose=0, callbacks=[
            Resume(tmp_path), Stop(6, lambda: signal.raise_signal(number))])
    assert isinstance(raised.value, SystemExit) and raised.value.code == code
    line, = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line == (f"Stopped by {number.name}. The state after 1 epochs and 3 batches of the next is saved in "
                    f"{tmp_path / 'state-00000002.farhox'}: start the program again to go on.")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    model = dense()
    history = model.fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path)])
    assert_same((model, history), whole())


@pytest.mark.slow
def test_a_signal_between_epochs_or_while_data_are_read_again_loses_nothing(tmp_path):
    class Signal(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        dense().fit(batches(), epochs=3, verbose=0, callbacks=[Signal(), Resume(tmp_path)])
    before = sorted(tmp_path.iterdir())
    resume = Resume(tmp_path)
    assert resume.initial_epoch == 1
    with pytest.raises(KeyboardInterrupt):
        model = dense()
        model.fit(batches(), epochs=3, verbose=0, callbacks=[resume, WhileReading(resume)])
    assert sorted(tmp_path.iterdir()) == before
    # The model trains again, rather than reads.
    assert model.fit(batches(), epochs=1, verbose=0).history["loss"]
    model = dense()
    history = model.fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path)])
    assert_same((model, history), whole())


class WhileReading(keras.callbacks.Callback):
    """Sends a signal once Resume has begun to read: it goes before this one's other hooks."""

    def __init__(self, resume):
        super().__init__()
        self.resume = resume

    def on_train_begin(self, logs=None):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_second_signal_and_one_after_a_training_that_failed_are_obeyed_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    steps = []
    with pytest.raises(KeyboardInterrupt):
        dense().fit(batches(), verbose=0, callbacks=[
            Resume(tmp_path), Stop(2, twice), keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: steps.append(batch))])
    assert steps == [0, 1]
    with pytest.raises(Fails):
        dense().fit(batches(), verbose=0, callbacks=[Resume(tmp_path), Stop(2)])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_signals_are_left_alone(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(
        dense().fit(batches(), verbose=0, callbacks=[Resume(tmp_path)])))
    thread.start()
    thread.join()
    assert done[0].epoch == [0] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_an_error_while_data_are_read_again_leaves_a_model_that_trains(tmp_path):
    with pytest.raises(Fails):
        dense().fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path), Stop(6)])

    class Broken(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            raise Fails

    model = dense()
    with pytest.raises(Fails):
        model.fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path), Broken()])
    before = values(model)
    model.fit(batches(), epochs=1, verbose=0)
    assert values(model) != before


def test_what_does_not_fit_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match='every, where it is not "epoch", must be a positive integer. Received: 0'):
        Resume(tmp_path, every=0)
    with pytest.raises(ValueError, match="seconds must be a non-negative finite number. Received: -1"):
        Resume(tmp_path, seconds=-1)
    with pytest.raises(ValueError, match="a file system of this machine.* Received: 'gs://bucket/run'"):
        Resume("gs://bucket/run")
    with pytest.raises(ValueError, match="is a callback of fit"):
        Resume(tmp_path).on_train_begin()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(ValueError, match="only callback that restores a run. Received also: BackupAndRestore"):
        dense().fit(batches(), verbose=0, callbacks=[Resume(tmp_path), backup])
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    unbuilt.compile("sgd", "mse")
    with pytest.raises(ValueError, match="needs a model that is built"):
        unbuilt.fit(batches(), verbose=0, callbacks=[Resume(tmp_path)])

    with pytest.raises(Fails):
        dense().fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path, every=1), Stop(7)])
    with pytest.raises(ValueError, match="saved after 3 batches of epoch 1. Received data with 2 batches"):
        dense().fit(batches().take(2), epochs=3, verbose=0, callbacks=[Resume(tmp_path)])
    with pytest.raises(ValueError, match=r"same model: name.*state-00000007.farhox with .*/kernel', \[3, 2\]"):
        dense(keras.layers.Dense(4)).fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path)])
    with pytest.raises(ValueError, match="(?i)with .'adam/iteration.* in the place of .'sgd/iteration.* of the opt"):
        dense(optimizer="sgd").fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path)])
    other = dense()
    other.second = keras.optimizers.SGD()
    with pytest.raises(ValueError, match=r"same model and optimizers.*with \['model', 'optimizer'\] for"):
        other.fit(batches(), epochs=3, verbose=0, callbacks=[Resume(tmp_path)])


def orders_of(data, epochs=3, **arguments):
    """The order of the examples in each epoch of Keras' `fit`."""
    orders = []

    class Reads(keras.Model):
        def train_step(self, data):
            orders.append(data[0].numpy().tolist())
            return {"loss": tf.constant(0.0)}

    model = Reads()
    model.built = True
    model.compile("sgd", run_eagerly=True)
    model.fit(*data, epochs=epochs, verbose=0, **arguments)
    return orders


@pytest.mark.slow
def test_fit_of_arrays_with_a_seed_has_one_order_in_all_epochs():
    orders = orders_of((np.arange(8), np.arange(8)), batch_size=8)
    assert orders[0] == orders[1] == orders[2] != list(range(8))


@pytest.mark.slow
def test_fit_of_a_data_set_that_shuffles_itself_moves_on_by_two_orders_in_an_epoch():
    def data():
        return tf.data.Dataset.range(8).map(lambda i: (i, i)).shuffle(8, seed=1).batch(8)

    shuffled = data()
    alone = [next(iter(shuffled))[0].numpy().tolist() for _ in range(5)]
    assert orders_of((data(),)) == alone[::2]


def test_a_file_of_weights_holds_no_state_of_seed_generators(tmp_path):
    first, second = (keras.Sequential([keras.Input([3]), keras.layers.Dropout(0.5, seed=1)]) for _ in range(2))
    first(resumable_runs.X, training=True)
    first.save_weights(tmp_path / "x.weights.h5")
    second.load_weights(tmp_path / "x.weights.h5")
    assert [int(model.layers[0].seed_generator.state[1]) for model in (first, second)] == [1, 0]

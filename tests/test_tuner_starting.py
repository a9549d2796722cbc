"""A tuner whose start is learned: values come from the rule when there are data, and lie in their ranges."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.starts import StartRule
from farhox.tuner.starting import assign, examples_of

pytestmark = pytest.mark.usefixtures("eagerly")

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(60, 4)).astype("float32"), np.arange(60) % 3


class Rule(StartRule):
    """Suggests values for the examples that it was asked with, and keeps them."""

    def __init__(self, values, space):
        self.values, self._space, self.asked = values, space, []

    @property
    def space(self):
        return self._space

    def fit(self, table):
        raise NotImplementedError

    def unfitted(self):
        raise NotImplementedError

    def suggest(self, dataset, count=1):
        self.asked.append(dataset)
        return [self.values]


SPACE = {"learning_rate": (1e-3, 1.0), "l2": (0.0, 8.0), "momentum": (0.0, 0.9)}


def network():
    model = keras.Sequential([
        keras.Input([4]), keras.layers.Dense(4, "relu", kernel_regularizer="l2"), keras.layers.Dense(3)])
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fitted(rule, x=X, y=Y, **options):
    tuner = farhox.Tuner(network(), start=rule, sweep=False, online=False, annealing=0.0, guard=False)
    tuner.fit(x, y, epochs=1, validation_data=(X, Y), verbose=0, **options)
    return tuner


def test_a_rule_is_asked_for_the_training_data_when_the_tuner_is_fitted():
    rule = Rule({"learning_rate": 0.25, "l2": 7.0, "momentum": 0.0}, SPACE)
    tuner = farhox.Tuner(network(), start=rule, sweep=False, online=False, annealing=0.0, guard=False)
    before = tuner.get_hyperparameters()
    assert before["learning_rate"] == pytest.approx(1e-3 ** 0.5) and before["l2"] == pytest.approx(4.0)
    tuner.fit(X, Y, batch_size=30, epochs=1, validation_data=(X, Y), verbose=0)
    ((x, y),) = rule.asked
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    values = tuner.get_hyperparameters()
    # An L2 strength of 7 is beyond the range of the kind, but not of the rule. A momentum of 0 is the end of its range.
    assert (values["learning_rate"], values["l2"]) == (pytest.approx(0.25), pytest.approx(7.0))
    assert values["momentum"] == pytest.approx(0.0, abs=2e-3)
    np.testing.assert_allclose(tuner.get_schedule()["learning_rate"], 0.25, rtol=1e-5)
    assert any(note.startswith("start, learned from earlier data sets: learning_rate 0.25") for note in tuner.notes)


def test_what_a_rule_says_beyond_its_own_space_is_taken_to_the_end_of_the_range():
    tuner = fitted(Rule({"learning_rate": 1e9, "l2": 0.0, "momentum": 0.5}, SPACE), batch_size=60)
    values = tuner.get_hyperparameters()
    assert values["learning_rate"] == pytest.approx(100.0) and values["l2"] == pytest.approx(1e-8)


def test_learned_rules_are_starts():
    table = farhox.starts.PriorEvaluations(
        {"learning_rate": (1e-3, 1.0)}, [(X, Y), (2 * X, Y), (3 * X, Y)],
        [{"learning_rate": rate} for rate in (0.01, 0.1, 1.0)], [[0, 1, 0], [0, 1, 0.5], [0, 1, 0.2]])
    encoder = farhox.starts.DatasetEncoder(
        size=2, units=4, rows=4, features=2, classes=2, steps=1, batch_size=2).fit(table)
    rule = farhox.starts.SymbolicDefaults(population=5, generations=1, trees=2).fit(table)
    rule._fitted["trees"]["learning_rate"] = ("/", "m", ("*", "n", 0.5))
    for start in (encoder, rule):
        tuner = farhox.Tuner(network(), start=start)
        assert assign(tuner._rows, start.start(*examples_of((X, Y), None))).endswith("learning_rate 0.1")
        assert tuner.get_hyperparameters()["learning_rate"] == pytest.approx(0.1)


def trials(values):
    """What has these values: as a trial of Optuna, HyperParameters and a trial of KerasTuner, and a rule."""
    parameters = types.SimpleNamespace(values=values)
    return [types.SimpleNamespace(params=values, values=[0.5]), parameters,
            types.SimpleNamespace(hyperparameters=parameters), Rule(values, dict.fromkeys(values, (0.0, 1.0)))]


def test_names_of_a_trial_or_a_rule_that_the_model_has_not_are_named_and_none_that_it_has_is_an_error():
    for start in trials({"units": 0.5, "l2": 0.5, "layers": 0.5}):
        with pytest.warns(UserWarning, match="no hyperparameters of the model are passed by: units, layers. The model "
                                             "has .*, l2, learning_rate, momentum") as said:
            tuner = farhox.Tuner(network(), start=start)
        (where,) = [warning.filename for warning in said if "passed by" in str(warning.message)]
        assert where == __file__
        assert tuner.get_hyperparameters()["l2"] == pytest.approx(0.5)
    for start, come in [(start, "units") for start in trials({"units": 0.5})] + [
            (start, "none") for start in trials({})]:
        with pytest.raises(ValueError, match="to start from must know a hyperparameter of the model: .*, l2, "
                                             f"learning_rate, momentum, .*. Received: a (trial|rule) for {come}$"):
            farhox.Tuner(network(), start=start)
    (hyperband, *_) = trials({"tuner/epochs": 3, "l2": 0.5})[1:]  # What KerasTuner notes for itself is no name.
    assert farhox.Tuner(network(), start=hyperband).get_hyperparameters()["l2"] == pytest.approx(0.5)
    with pytest.raises(TypeError, match="A value to start from must be a number. Received: l2='small'"):
        farhox.Tuner(network(), start=trials({"l2": "small"})[0])


class Batches(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return 3

    def __getitem__(self, index):
        return X[20 * index:20 * index + 20], Y[20 * index:20 * index + 20]


def test_examples_of_streams_are_those_of_an_epoch():
    stream = tf.data.Dataset.from_tensor_slices((X, Y)).batch(20)
    for data, steps, count in ((stream, None, 60), (stream.repeat(), 2, 40), (Batches(), None, 60), (Batches(), 1, 20),
                               ((X, Y), None, 60), ((X, Y, np.ones(60)), None, 60)):
        x, y = examples_of(data, steps)
        np.testing.assert_array_equal(x, X[:count])
        np.testing.assert_array_equal(y, Y[:count])


def test_what_cannot_be_a_start_is_an_error_that_names_the_rule():
    stream = tf.data.Dataset.from_tensor_slices((X, Y)).batch(20)
    for call, error, message in (
            (lambda: farhox.Tuner(network(), start=farhox.starts.SymbolicDefaults()), ValueError,
             "The rule must have learned from a table"),
            (lambda: farhox.Tuner(network(), start=farhox.starts.DatasetEncoder(steps=1)), ValueError,
             "The encoder must have learned from a table"),
            (lambda: farhox.Tuner(network(), start=3), TypeError, "or a farhox.starts.StartRule. Received: 3"),
            (lambda: examples_of(({"a": X}, Y), None), TypeError, "one input and one target, as arrays"),
            (lambda: examples_of(stream.map(lambda x, y: ((x, x), y)), None), TypeError, "one input and one target"),
            (lambda: examples_of(stream.take(0), None), ValueError, "there must be some. Received: none")):
        with pytest.raises(error, match=message):
            call()

"""Copies of models, as `adapt` returns them: weights of their own, tables and statistics kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from farhox import meta
from farhox._core.copies import copy_of

TEXTS = np.array([["a b"], ["b c"], ["c d"]])


def sequential(*layers, shape=(4,), dtype="float32"):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def on_text(layer):
    layer.adapt(TEXTS)
    return sequential(layer, keras.layers.Dense(3), shape=[1], dtype="string")


def normalization():
    layer = keras.layers.Normalization()
    layer.adapt(5 * np.random.default_rng(0).random((20, 4)))
    return sequential(sequential(layer, keras.layers.Dense(3)), keras.layers.Dropout(0.5))


def operations():
    inputs = keras.Input([4])
    shared = keras.layers.Dense(4)
    return keras.Model(inputs, keras.ops.tanh(shared(shared(inputs))))


@pytest.mark.one_case
@pytest.mark.parametrize("model, inputs", [
    (on_text(keras.layers.TextVectorization(max_tokens=9, output_mode="tf_idf")), TEXTS),
    (on_text(keras.layers.StringLookup(output_mode="multi_hot")), TEXTS),
    (normalization(), np.ones([2, 4], "float32")), (operations(), np.ones([2, 4], "float32"))],
    ids=["text", "lookup", "normalization", "operations"])
def test_a_copy_computes_the_same_with_weights_of_its_own(model, inputs, tmp_path):
    inputs, copy = tf.constant(inputs), copy_of(model)
    expected = model(inputs).numpy()
    np.testing.assert_array_equal(copy(inputs), expected)
    copy.save(tmp_path / "copy.keras")
    for variable in copy.trainable_variables:
        variable.assign(variable + 1)
    np.testing.assert_array_equal(model(inputs), expected)
    assert not np.array_equal(copy(inputs), expected)
    model.save(tmp_path / "model.keras")
    try:
        keras.models.load_model(tmp_path / "model.keras")
    except ValueError as error:
        pytest.skip(f"This Keras cannot load what it saved of the model itself: {error}")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "copy.keras")(inputs), expected)


class OfItsOwn(keras.Model):
    def __init__(self, width=2, **settings):
        super().__init__(**settings)
        self.dense = keras.layers.Dense(width)

    def call(self, inputs):
        return self.dense(inputs)

    def build_from_config(self, config):
        del config


class WithoutConfiguration(OfItsOwn):
    def __init__(self, width):
        super().__init__(width)


@pytest.mark.parametrize("make, received", [
    (OfItsOwn, "a copy with 0 of 2 variables"), (WithoutConfiguration, "[^$]*WithoutConfiguration")])
def test_a_model_that_keras_cannot_make_again_is_an_error(make, received):
    model = make(2)
    model(np.zeros([1, 3], "float32"))
    message = f"must be one that Keras can make again: {make.__name__} [^$]*Received:?\\s+{received}"
    with pytest.raises(ValueError, match=message):
        copy_of(model)


@pytest.mark.slow
def test_learners_adapt_to_texts():
    labels = np.repeat(np.arange(6), 6)
    texts = np.array([f"word{label} the" for label in labels])[:, None]
    words = keras.layers.TextVectorization(max_tokens=50, output_mode="multi_hot")
    words.adapt(texts)
    support, query = meta.ClassificationEpisodes(texts, labels, ways=3, shots=2, queries=4).draw(tf.constant(0))
    model = sequential(words, keras.layers.Dense(3, "softmax"), shape=[1], dtype="string")
    learner = meta.MAML(model, 0.5, 3)
    np.testing.assert_allclose(learner.adapt(support)(query[0]), learner.predict(support, query[0]), rtol=1e-5)
    reference = meta.PrototypicalNetwork(on_text(keras.layers.TextVectorization(output_mode="multi_hot")), 3)
    np.testing.assert_allclose(
        reference.adapt(support)(query[0]), reference.predict(support, query[0]), rtol=1e-4, atol=1e-6)

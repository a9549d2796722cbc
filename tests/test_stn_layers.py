"""Self-tuning layers: what they compute for each example, their size, and that they are Keras layers in full."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stn_cases import (
    LAYERS,
    PLAIN,
    TOKENS,
    gated,
    hyperparameters,
    inputs,
    layer_and_input,
    layers_of_each_kind,
    with_draws,
)

import farhox
from farhox import stn
from farhox._core import autodiff, functional

DRAWS = np.random.default_rng(5).normal(size=(4, 3))


def plain_twin(name, layer, weights):
    """The Keras layer with the given weights, from the configuration of the self-tuning one."""
    twin = layer.to_keras()
    assert type(twin) is type(layer).plain is PLAIN[name] and "farhox" not in str(twin.get_config())
    twin(inputs(LAYERS[name][1]))
    twin.set_weights(weights)
    return twin


@layers_of_each_kind
def test_each_example_is_computed_with_the_weights_of_its_own_draw(name, float64):
    layer, x = layer_and_input(name)
    outputs = with_draws(layer, x, tf.constant(DRAWS))
    for i, draw in enumerate(DRAWS):
        gates = draw @ gated(layer).gate.kernel.numpy()
        weights, start = [], 0
        for weight, hyper_weight, axes, _ in gated(layer)._elementary.values():
            shape = [size if axis in axes else 1 for axis, size in enumerate(weight.shape)]
            size = int(np.prod(shape))
            weights.append(weight.numpy() + gates[start:start + size].reshape(shape) * hyper_weight.numpy())
            start += size
        expected = plain_twin(name, layer, weights)(x[i:i + 1])
        np.testing.assert_allclose(outputs[i:i + 1], expected, rtol=0, atol=1e-12)
    assert not np.allclose(outputs, layer(x))


@layers_of_each_kind
def test_outside_of_training_weights_are_those_of_the_current_hyperparameters(name, float64):
    layer, x = layer_and_input(name)
    current = np.concatenate([np.ravel(entry.variable.numpy()) for entry in gated(layer).hyperparameters])
    np.testing.assert_allclose(layer(x), with_draws(layer, x, tf.constant(np.tile(current, [4, 1]))), atol=1e-12)
    np.testing.assert_allclose(layer(x), with_draws(layer, x, tf.constant(current[np.newaxis])), atol=1e-12)
    before = np.asarray(layer(x))
    gated(layer).hyperparameters[0].assign(0.8)
    assert not np.allclose(layer(x), before)


def test_gates_measure_from_the_reference(float64):
    reference = [0.5, -1.0, 2.0]
    layer, x = layer_and_input("dense", reference=reference)
    current = np.concatenate([np.ravel(entry.variable.numpy()) for entry in layer.hyperparameters])
    np.testing.assert_allclose(layer(x), with_draws(layer, x, tf.constant([current - reference])), atol=1e-12)
    assert layer.get_config()["reference"] == reference


@layers_of_each_kind
def test_centred_gates_are_closed_at_the_current_hyperparameters(name, float64):
    layer, x = layer_and_input(name, centred=True)
    np.testing.assert_allclose(layer(x), with_draws(layer, x, tf.zeros([1, 3], tf.float64)), atol=0)
    elementary = [weight.numpy() for weight in gated(layer).elementary_weights().values()]
    np.testing.assert_allclose(layer(x), plain_twin(name, layer, elementary)(x), atol=1e-12)


@pytest.mark.parametrize("name, kernels, biases", [
    # (inputs of a unit, units) of every kernel, and units with a bias; Eq. 11 with n = 3.
    ("dense", [(4, 3)], 3),
    ("dense_on_steps", [(3, 3)], 0),
    ("conv1d", [(3 * 3, 4)], 4),
    ("conv2d", [(3 * 3 * 4, 4)], 4),
    ("conv2d_groups", [(2 * 3 * 2, 6)], 6),
    ("depthwise", [(3 * 3, 8)], 8),
    ("conv3d", [(2 * 2 * 2 * 2, 2)], 2),
    ("transpose", [(3 * 3 * 4, 3)], 3),
    ("separable", [(2 * 2, 8), (8, 3)], 3),
    ("embedding", [(11, 4)], 0),
    ("lstm", [(3, 16), (4, 16)], 16),
    ("gru", [(3, 12), (4, 12)], 24),
    ("gru_before", [(3, 12), (4, 12)], 12),
])
def test_number_of_parameters_is_that_of_equation_11(name, kernels, biases):
    layer, _ = layer_and_input(name)
    n = 3
    expected = sum(units * (2 * fan_in + n) for fan_in, units in kernels) + biases * (2 + n)
    assert layer.count_params() == expected
    assert sum(int(tf.size(v)) for v in layer.trainable_variables) == expected


@pytest.mark.parametrize("make, shape, limits", [
    (lambda h: stn.Dense(50, h), (400,), {"kernel": 1 / 20, "bias": 1 / 20}),
    (lambda h: stn.Conv2D(50, 5, h), (5, 5, 16), {"kernel": 1 / 20, "bias": 1 / 20}),
    (lambda h: stn.Conv1D(50, 4, h, groups=2), (4, 200), {"kernel": 1 / 20, "bias": 1 / 20}),
    (lambda h: stn.DepthwiseConv2D(10, h), (10, 10, 60), {"kernel": 1 / 10, "bias": 1 / 10}),
    (lambda h: stn.Embedding(100, 50, h), (5,), {"embeddings": 0.1}),
    (lambda h: stn.LSTM(64, h, unit_forget_bias=False), (3, 100),
     {"kernel": 0.1, "recurrent_kernel": 1 / 8, "bias": 1 / 8}),
])
def test_weights_start_as_in_the_paper_and_hyper_weights_differ_from_elementary_ones(make, shape, limits):
    layer = make(hyperparameters())
    layer.build((None, *shape))
    layer = gated(layer)
    for name, limit in limits.items():
        for weight in (getattr(layer, name), getattr(layer, f"hyper_{name}")):
            largest = np.max(np.abs(weight.numpy()))
            assert 0.9 * limit < largest <= limit
        assert not np.allclose(getattr(layer, name), getattr(layer, f"hyper_{name}"))
    assert 0.009 < np.std(layer.gate.kernel.numpy()) < 0.011


@pytest.mark.filterwarnings("ignore:Layer 'flatten")
@layers_of_each_kind
def test_layers_come_back_from_configuration_and_from_a_saved_model_with_shared_hyperparameters(name, tmp_path):
    layer, x = layer_and_input(name)
    again = type(layer).from_config(layer.get_config())
    assert again.get_config()["gate_initializer"] == layer.get_config()["gate_initializer"]
    again(x)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(again(x), layer(x))

    model = keras.Sequential([keras.Input(x.shape[1:], dtype=str(x.dtype)), layer, keras.layers.Flatten(),
                              stn.Dense(2, gated(layer).hyperparameters)])
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded(x), model(x))
    first, last = gated(loaded.layers[0]).hyperparameters, loaded.layers[-1].hyperparameters
    assert [entry.name for entry in first] == ["rate", "strengths"]
    assert all(one is other for one, other in zip(first, last))


@layers_of_each_kind
def test_shapes_are_known_before_and_after_and_half_precision_is_used(name):
    layer, x = layer_and_input(name, dtype="mixed_float16")
    outputs = layer(x)
    assert outputs.dtype == tf.float16
    assert tuple(layer.compute_output_shape((4, *x.shape[1:]))) == tuple(outputs.shape)
    drawn = with_draws(layer, x, tf.constant(DRAWS, tf.float32))
    assert drawn.dtype == tf.float16 and drawn.shape == outputs.shape
    full, _ = layer_and_input(name)
    full.set_weights(layer.get_weights())
    np.testing.assert_allclose(with_draws(full, x, tf.constant(DRAWS, tf.float32)), drawn, atol=0.05)
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}


@pytest.mark.parametrize("make, shape", [
    (lambda h: stn.Conv2D(4, 3, h, data_format="channels_first"), (4, 6, 5)),
    (lambda h: stn.DepthwiseConv2D(3, h, data_format="channels_first"), (4, 6, 5)),
    (lambda h: stn.Conv1D(4, 3, h, data_format="channels_first"), (3, 7)),
])
def test_gates_are_on_the_channels_of_channels_first_layers(make, shape):
    # Convolutions with channels first need a GPU; the sizes of gates and outputs do not.
    layer = make(hyperparameters())
    layer.build((None, *shape))
    outputs = tf.zeros([2, *layer.compute_output_shape((2, *shape))[1:]])
    gates = stn.self_tuning.on_axes(tf.zeros([2, outputs.shape[1]]), outputs.shape.rank, [1])
    assert gates.shape == [2, outputs.shape[1]] + [1] * (outputs.shape.rank - 2)


def test_masks_pass_through_embedding_and_lstm(float64):
    hyper = hyperparameters()
    model = keras.Sequential([keras.Input((5,), dtype="int32"), stn.Embedding(11, 4, hyper, mask_zero=True),
                              stn.LSTM(3, hyper)])
    x = np.array([[4, 2, 7, 0, 0], [1, 5, 0, 0, 0]])
    np.testing.assert_allclose(model(x)[:1], model(x[:1, :3]), atol=1e-14)
    np.testing.assert_allclose(model(x)[1:], model(x[1:, :2]), atol=1e-14)


def test_regularizers_see_the_weights_as_they_respond(float64):
    layer, x = layer_and_input("dense", kernel_regularizer=farhox.L1L2(l2=0.25), bias_regularizer=farhox.L1L2(l1=0.5))
    layer(x)
    weights = layer.realized_weights()
    expected = [0.25 * np.sum(weights["kernel"] ** 2), 0.5 * np.sum(np.abs(weights["bias"]))]
    np.testing.assert_allclose(layer.losses, expected, rtol=1e-12)
    assert not np.isclose(expected[0], 0.25 * np.sum(layer.kernel.numpy() ** 2))


def test_lstm_regularizers_are_added_once_per_call(float64):
    layer, x = layer_and_input("lstm", recurrent_regularizer=farhox.L1L2(l1=0.1))
    layer(x)
    expected = 0.1 * np.sum(np.abs(layer.cell.realized_weights()["recurrent_kernel"]))
    np.testing.assert_allclose(layer.losses, [expected], rtol=1e-12)


@pytest.mark.one_case
@pytest.mark.parametrize("cell, layer", [(stn.LSTMCell, "lstm"), (stn.GRUCell, "gru")])
def test_a_cell_in_an_rnn_of_keras_computes_what_the_layer_does(cell, layer, float64):
    own, x = layer_and_input(layer)
    rnn = keras.layers.RNN(cell(4, hyperparameters()), return_sequences=own.return_sequences)
    rnn(x)
    rnn.set_weights(own.get_weights())
    np.testing.assert_allclose(rnn(x), own(x), atol=1e-14)


@pytest.mark.parametrize("arguments", [{"kernel_regularizer": farhox.L1L2(0.1)}, {"recurrent_dropconnect": 0.5}])
def test_a_cell_alone_refuses_what_is_done_once_for_all_steps(arguments):
    rnn = keras.layers.RNN(stn.GRUCell(4, hyperparameters(), **arguments))
    with pytest.raises(ValueError, match="must be in a layer of its kind"):
        rnn(inputs((7, 3)), training=True)


@pytest.mark.one_case
@pytest.mark.parametrize("name", ["lstm", "gru", "gru_before"])
def test_dropconnect_draws_one_mask_of_recurrent_weights_per_call(name, float64):
    # A rate near 1 leaves next to nothing of the recurrent weights, so that steps do not know of each other.
    layer, x = layer_and_input(name, recurrent_dropconnect=farhox.Hyperparameter(
        1 - 1e-12, low=0.0, high=1.0, name="connect"), seed=0)
    assert gated(layer).hyperparameters_with_one_draw[0].name == "connect"
    alone = type(layer).from_config(layer.get_config())
    alone(x)
    alone.set_weights(layer.get_weights())
    alone.cell.recurrent_kernel.assign(0 * alone.cell.recurrent_kernel)
    alone.cell.hyper_recurrent_kernel.assign(0 * alone.cell.hyper_recurrent_kernel)
    np.testing.assert_allclose(with_draws(layer, x, tf.constant(DRAWS), training=True),
                               with_draws(alone, x, tf.constant(DRAWS)), atol=1e-14)
    np.testing.assert_array_equal(layer(x), layer(x))

    everything = type(layer).from_config({**layer.get_config(), "recurrent_dropconnect": 1.0})
    assert np.all(np.isfinite(everything(x, training=True)))
    same = np.tile(DRAWS[:1], [4, 1])
    layer.cell.recurrent_dropconnect = 0.5
    repeated = np.tile(x[:1], [4, 1, 1])
    outputs = np.asarray(with_draws(layer, repeated, tf.constant(same), training=True))
    np.testing.assert_allclose(outputs, np.tile(outputs[:1], [4] + [1] * (outputs.ndim - 1)), atol=1e-14)
    assert not np.allclose(layer(repeated, training=True), layer(repeated, training=True))


def test_embedding_dropout_drops_the_same_words_in_the_whole_batch_and_keeps_the_mean():
    layer = stn.Embedding(2000, 1, hyperparameters(), dropout=farhox.Hyperparameter(0.25, low=0.0, high=1.0))
    words = np.tile(np.arange(2000), [3, 1])
    kept = np.asarray(layer(words, training=True)) / np.asarray(layer(words))
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_allclose(np.unique(np.round(kept, 5)), [0.0, np.round(4 / 3, 5)])
    assert abs(np.mean(kept == 0) - 0.25) < 0.04


@pytest.mark.one_case
@pytest.mark.parametrize("name", ["dense", "conv2d", "depthwise", "transpose", "separable", "einsum", "embedding",
                                  "lstm", "gru"])
def test_forward_product_in_the_draws_is_the_derivative_of_finite_differences(name, float64):
    layer, x = layer_and_input(name)
    tangent = np.random.default_rng(9).normal(size=DRAWS.shape)

    def outputs(draws):
        return [with_draws(layer, x, draws[0])]

    _, (product,), _ = autodiff.forward_product(
        lambda draws: (outputs(draws), []), [tf.constant(DRAWS)], [tf.constant(tangent)])
    step = 1e-6
    difference = (outputs([DRAWS + step * tangent])[0] - outputs([DRAWS - step * tangent])[0]) / (2 * step)
    np.testing.assert_allclose(product, difference, atol=1e-8)


@pytest.mark.parametrize("make, error, rule", [
    (lambda: stn.Dense(3, []), ValueError, "needs at least one hyperparameter"),
    (lambda: stn.Dense(3, 0.1), TypeError, "must be a list of farhox.Hyperparameter"),
    (lambda: stn.Dense(3, [0.1], name="first"), TypeError, "'first'.*must be farhox.Hyperparameter objects"),
    (lambda: stn.Dense(3, hyperparameters()[:1] * 2), ValueError, "must be different objects"),
    (lambda: stn.Dense(3, hyperparameters(), reference=[1.0]), ValueError, "one number for each of the 3 entries"),
    (lambda: layer_and_input("dense")[0].enable_lora(2), ValueError, "cannot have LoRA weights"),
    (lambda: stn.LSTM(3, hyperparameters(), recurrent_dropconnect=1.5), ValueError, "must stay between 0.0 and 1.0"),
    (lambda: stn.Embedding(3, 2, hyperparameters(), dropout="0.1"), TypeError, "must be a number or a farhox.Hyper"),
])
def test_layers_refuse_what_they_cannot_respond_to(make, error, rule):
    with pytest.raises(error, match=rule):
        make()


@pytest.mark.parametrize("arguments, value", [
    ({"low": 0.0, "high": 0.9}, 0.9), ({"low": -1.0}, 3.0), ({"high": 2.0, "discrete": True}, [0.5, 1.5]), ({}, -4.0),
    ({"low": 0.0, "log": True}, 1e-30),
])
def test_hyperparameters_come_back_from_their_configuration_bit_for_bit(arguments, value):
    entry = farhox.Hyperparameter(np.asarray(value) - 0.1 if value == 0.9 else value, name="it", **arguments)
    if value == 0.9:
        entry.variable.assign(40.0)  # The natural value is rounded to the bound.
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(entry))
    np.testing.assert_array_equal(again.variable, entry.variable)
    assert again.get_config() == entry.get_config() and again.name == "it"
    np.testing.assert_array_equal(again(), entry())


def test_an_embedding_is_also_the_output_with_its_elementary_table(float64):
    layer = stn.Embedding(11, 4, hyperparameters(), gate_initializer="ones", dropout=0.5)
    layer(inputs(TOKENS))
    features = inputs((7, 4))
    expected = features @ layer.embeddings.numpy().T
    np.testing.assert_allclose(layer(features, reverse=True, training=True), expected, atol=1e-12)
    draws = [(layer.gate.input_of_gates.variable, tf.constant(DRAWS))]
    logits = functional.call(lambda: layer(features, reverse=True), bindings=[], draws=draws).value
    np.testing.assert_allclose(logits, expected, atol=1e-12)
    tokens = keras.Input(TOKENS)
    model = keras.Model(tokens, layer(layer(tokens), reverse=True))
    assert model.output.shape == (None, *TOKENS, 11)
    again = keras.models.Model.from_config(model.get_config())
    again.set_weights(model.get_weights())
    x = inputs(TOKENS)
    np.testing.assert_allclose(again(x), model(x), atol=1e-12)
    with pytest.raises(ValueError, match="plain twin. Received: 'embedding.*', called with reverse=True"):
        stn.bake(model)


def test_an_embedding_with_a_mask_is_no_output():
    layer = stn.Embedding(5, 3, hyperparameters(), mask_zero=True)
    for features in (keras.Input([3]), np.zeros([2, 3], "float32")):
        with pytest.raises(ValueError, match="must not mask zeros .* Received: 'embedding.*' with mask_zero=True"):
            layer(features, reverse=True)

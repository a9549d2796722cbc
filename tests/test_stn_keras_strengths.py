"""Keras' own dropout, noise and augmentation layers with a strength per example, and back with the strengths found."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import stn
from farhox._core import functional

K = keras.layers
IMAGES, STEPS, VIDEO = (9, 8, 3), (7, 5), (3, 4, 5, 2)
STRENGTHS = np.array([0.05, 0.2, 0.4, 0.8])
# Name: (layer, shape of an example, strengths of it).
LAYERS = {
    "dropout": (lambda: K.Dropout(0.4, seed=1), IMAGES, {"rate": 0.4}),
    "dropout_noise_shape": (lambda: K.Dropout(0.4, noise_shape=(None, 1, None), seed=1), STEPS, {"rate": 0.4}),
    "spatial_1d": (lambda: K.SpatialDropout1D(0.4, seed=1), STEPS, {"rate": 0.4}),
    "spatial_2d": (lambda: K.SpatialDropout2D(0.4, data_format="channels_first", seed=1), IMAGES, {"rate": 0.4}),
    "spatial_3d": (lambda: K.SpatialDropout3D(0.4, seed=1), VIDEO, {"rate": 0.4}),
    "noise": (lambda: K.GaussianNoise(0.3, seed=1), STEPS, {"stddev": 0.3}),
    "gaussian_dropout": (lambda: K.GaussianDropout(0.4, seed=1), STEPS, {"rate": 0.4}),
    "alpha_dropout": (lambda: K.AlphaDropout(0.4, noise_shape=(None, 1, None), seed=1), STEPS, {"rate": 0.4}),
    "rotation": (lambda: K.RandomRotation((-0.1, 0.2), "nearest", seed=1), IMAGES, {"factor": 0.2}),
    "translation": (lambda: K.RandomTranslation(0.1, (-0.3, 0.15), "wrap", seed=1), IMAGES,
                    {"height_factor": 0.1, "width_factor": 0.3}),
    "zoom": (lambda: K.RandomZoom((0.1, 0.2), fill_value=3.0, fill_mode="constant", seed=1), IMAGES,
             {"height_factor": 0.2}),
    "zoom_both": (lambda: K.RandomZoom(0.2, 0.3, seed=1), IMAGES, {"height_factor": 0.2, "width_factor": 0.3}),
    "contrast": (lambda: K.RandomContrast(0.3, seed=1), IMAGES, {"factor": 0.3}),
    "brightness": (lambda: K.RandomBrightness(0.3, seed=1), IMAGES, {"factor": 0.3}),
}
if "RandomErasing" in dir(K):  # Keras 3.8 has none.
    LAYERS["erasing"] = (lambda: K.RandomErasing(0.7, fill_value=0.0, seed=1), IMAGES, {"factor": 0.7})


def examples(shape, batch=4):
    return np.random.default_rng(0).uniform(0, 255, (batch, *shape)).astype("float32")


def sequential(*layers, shape=IMAGES, **arguments):
    return keras.Sequential([keras.Input(shape), *layers, K.Flatten(), K.Dense(2)], **arguments)


def converted_layer(name):
    """The layer in a converted model, and the hyperparameters of its arguments."""
    make, shape, _ = LAYERS[name]
    model = sequential(make(), shape=shape)
    strengths = stn.strengths_of(model)
    return stn.convert(model, strengths=strengths).layers[0], strengths[model.layers[0]]


# One of each way to draw: a share of entries, noise, a map of pixels, a value of pixels.
every_layer = pytest.mark.parametrize("name", [
    name if name in ("dropout", "noise", "rotation", "contrast") else pytest.param(name, marks=pytest.mark.slow)
    for name in LAYERS])


@every_layer
def test_a_converted_layer_draws_what_the_layer_of_keras_draws_and_each_example_by_its_own_strength(name):
    make, shape, expected = LAYERS[name]
    layer, strengths = converted_layer(name)
    assert {argument: round(float(entry), 6) for argument, entry in strengths.items()} == expected
    x = examples(shape)
    np.testing.assert_allclose(layer(x, training=True), make()(x, training=True), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(layer(x, training=False), x)

    # One draw for all examples, each with its own strength.
    values = STRENGTHS * (0.9 if "rate" in expected or "stddev" in expected else 1.0)
    layer, strengths = converted_layer(name)
    draws = [(entry.variable, entry._unconstrained(values, entry.name)) for entry in strengths.values()]
    each = functional.call(lambda: layer(x, training=True), bindings=[], draws=draws).value
    for i, value in enumerate(values):
        layer, strengths = converted_layer(name)
        for entry in strengths.values():
            entry.assign(value)
        plain = layer.to_keras()
        np.testing.assert_allclose(each[i], plain(x, training=True)[i], rtol=1e-4, atol=2e-2)
    assert not np.allclose(each, x)


@every_layer
def test_baking_gives_back_the_layer_of_keras_with_the_strengths_found_and_all_other_settings(name, tmp_path):
    make, shape, expected = LAYERS[name]
    model = sequential(make(), shape=shape)
    strengths = stn.strengths_of(model)
    converted = stn.convert(model, strengths=strengths)
    start = stn.bake(converted)
    for entry in strengths[model.layers[0]].values():
        entry.assign(0.5)
    baked = stn.bake(converted)
    assert "farhox" not in json.dumps(baked.get_config(), default=str)
    before, after = model.layers[0].get_config(), baked.layers[0].get_config()
    assert type(baked.layers[0]) is type(model.layers[0])
    assert {key for key in before if before[key] != after[key]} == set(expected)
    for key in expected:
        largest = np.max(np.abs(before[key]))
        np.testing.assert_allclose(after[key], np.array(before[key]) * 0.5 / largest, rtol=1e-6)
    np.testing.assert_allclose([np.max(np.abs(start.layers[0].get_config()[key])) for key in expected],
                               list(expected.values()), rtol=1e-5)
    x = examples(shape)
    np.testing.assert_allclose(baked(x, training=False), model(x, training=False), rtol=1e-4, atol=1e-3)

    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert json.dumps(loaded.layers[0].to_keras().get_config()) == json.dumps(after)
    first = stn.gates.as_hyperparameters(loaded.layers[-1].hyperparameters, "test")[0]
    assert any(value is first for value in vars(loaded.layers[0]).values())


WITH_RATES = {
    "attention": (lambda: K.MultiHeadAttention(2, 3, dropout=0.4, seed=1), ["dropout"]),
    "group_query": (lambda: K.GroupQueryAttention(4, 2, 1, dropout=0.4, seed=1), ["dropout"]),
    "lstm": (lambda: K.LSTM(3, dropout=0.4, seed=1), ["dropout"]),
    "gru_states": (lambda: K.GRU(3, recurrent_dropout=0.4, return_sequences=True, seed=1), ["recurrent_dropout"]),
    "lstm_both": (lambda: K.LSTM(3, dropout=0.4, recurrent_dropout=0.2, seed=1), ["dropout", "recurrent_dropout"]),
}


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("name", WITH_RATES)
def test_attention_and_recurrent_layers_drop_out_with_a_rate_per_example_and_come_back_with_it(name, tmp_path):
    make, arguments = WITH_RATES[name]

    def model_of():
        keras.utils.set_random_seed(3)
        inputs = keras.Input(STEPS)
        layer = make()
        return keras.Model(inputs, layer(inputs, inputs) if "lstm" not in name and "gru" not in name else layer(inputs))

    def converted_of():
        model = model_of()
        strengths = stn.strengths_of(model)
        (layer, given), = strengths.items()
        assert list(given) == arguments and given[arguments[0]].name == f"{layer.name}_{arguments[0]}"
        return model, stn.convert(model, strengths=strengths), given

    x = examples(STEPS) / 255
    model, converted, given = converted_of()
    if name in ("attention", "group_query"):  # Recurrent layers have masks of their own.
        np.testing.assert_allclose(converted(x, training=True), model(x, training=True), atol=1e-5)
    values = STRENGTHS * 0.9
    _, converted, given = converted_of()
    draws = [(entry.variable, entry._unconstrained(values, entry.name)) for entry in given.values()]
    draws += [(layer.gate.input_of_gates.variable, np.zeros([1, len(given)])) for layer in converted._flatten_layers()
              if isinstance(layer, stn.SelfTuning)]
    each = functional.call(lambda: converted(x, training=True), bindings=[], draws=draws).value
    for i, value in enumerate(values):
        _, converted, given = converted_of()
        for entry in given.values():
            entry.assign(value)
        np.testing.assert_allclose(each[i], converted(x, training=True)[i], atol=1e-5)
    assert not np.allclose(each, converted(x), atol=1e-2)
    layer = stn.bake(converted).layers[-1]
    assert type(layer) is type(model.layers[-1])
    assert [getattr(layer, argument) for argument in arguments] == pytest.approx([0.72] * len(arguments))
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x), converted(x), atol=1e-6)
    assert stn.bake(loaded).layers[-1].get_config() == layer.get_config()


def test_layers_with_rates_must_respond_and_cells_with_them_be_in_a_layer_of_their_kind():
    model = keras.Sequential([keras.Input(STEPS), K.LSTM(3, dropout=0.2)])
    strengths = stn.strengths_of(model)
    with pytest.raises(ValueError, match="must become a self-tuning one. Received: 'lstm.*', which twins leaves"):
        stn.convert(model, strengths=strengths, twins={K.LSTM: None})
    rate = farhox.Hyperparameter(0.2, low=0.0, high=0.9)
    with pytest.raises(ValueError, match="a hyperparameter as dropout must be in a layer of its kind"):
        K.RNN(stn.GRUCell(3, [rate], dropout=rate))(examples(STEPS), training=True)
    assert stn.strengths_of(keras.Sequential([keras.Input(STEPS), K.LSTM(3)])) == {}


def nested():
    block = keras.Sequential([keras.Input((4,)), K.Dense(4), K.Dropout(0.2, name="inner")], name="block")
    return keras.Sequential([keras.Input((4,)), K.Dropout(0.5, name="first"), block, K.GaussianNoise(0.0, name="noise"),
                             K.Dropout(0.95, name="much"), K.Dense(2)])


def test_strengths_are_those_of_each_layer_or_one_for_a_class_and_some_can_be_left_out():
    model = nested()
    strengths = stn.strengths_of(model, skip=["much"])
    assert {layer.name: {key: (entry.name, round(float(entry), 4), entry.low, entry.high)
                         for key, entry in given.items()} for layer, given in strengths.items()} == {
        "first": {"rate": ("first_rate", 0.5, 0.0, 0.9)}, "inner": {"rate": ("inner_rate", 0.2, 0.0, 0.9)},
        "noise": {"stddev": ("noise_stddev", 0.02, 0.0, None)}}
    assert stn.strengths_of(model)[model.get_layer("much")]["rate"].high == 0.975
    shared = stn.strengths_of(model, shared=True, skip=[model.get_layer("much")])
    kinds = {id(entry): entry for given in shared.values() for entry in given.values()}.values()
    assert [(entry.name, round(float(entry), 4)) for entry in kinds] == [
        ("Dropout_rate", 0.35), ("GaussianNoise_stddev", 0.02)]
    converted = stn.convert(model, strengths=shared)
    assert converted.layers[0].rate is converted.layers[1].layers[1].rate
    # By name, one hyperparameter for all arguments, and flips stay.
    images = sequential(K.RandomFlip(seed=0), K.RandomTranslation(0.2, 0.1, name="move"))
    move = farhox.Hyperparameter(0.1, low=0.0, high=0.5, name="move")
    converted = stn.convert(images, strengths={"move": move})
    assert type(converted.layers[0]) is K.RandomFlip
    assert converted.layers[1].height_factor is converted.layers[1].width_factor is move
    other = farhox.Hyperparameter(1.0, name="other")
    with pytest.warns(UserWarning, match="reads the hyperparameter 'move'"):
        stn.SelfTuningModel(stn.convert(images, [other], strengths={"move": move}))


def test_layers_of_a_model_read_strengths_and_hypergradients_along_the_path_reach_those_of_dropout_and_noise(tmp_path):
    keras.utils.set_random_seed(0)
    block = keras.Sequential([keras.Input((4,)), K.Dense(4), K.BatchNormalization(), K.Dropout(0.2, name="inner")])
    model = keras.Sequential([keras.Input((4,)), K.GaussianNoise(0.3, name="noise"), block, K.Dense(2, name="head")])
    strengths = stn.strengths_of(model)
    network = stn.with_strengths(model, strengths)
    data = np.random.default_rng(0).normal(size=(16, 4)).astype("float32"), np.arange(16) % 2
    np.testing.assert_array_equal(network(data[0]), model(data[0]))
    assert network.layers[-1] is not model.layers[-1] and type(network.layers[-1]) is K.Dense
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rates = [entry for given in strengths.values() for entry in given.values()]
    problem = farhox.BilevelProblem(
        lambda batch: loss(batch[1], network(batch[0], training=True)),
        lambda batch: loss(batch[1], network(batch[0], training=False)), network.trainable_variables, rates,
        state_variables=network.non_trainable_variables, dynamics=farhox.KerasDynamics(keras.optimizers.SGD(0.5)))
    optimizer = farhox.HyperOptimizer(problem, farhox.ReverseHG())
    optimizer.compile(keras.optimizers.Adam(0.1))
    before = [float(rate) for rate in rates]
    optimizer.step(farhox.repeat(data, 3), data)
    found = [float(rate) for rate in rates]
    assert all(abs(new - old) > 1e-3 for new, old in zip(found, before))
    baked = stn.bake(network)
    assert type(baked.layers[0]) is K.GaussianNoise and baked.layers[0].stddev == pytest.approx(found[0])
    assert baked.layers[1].layers[-1].rate == pytest.approx(found[1])
    baked.save(tmp_path / "baked.keras")
    assert b"farhox" not in (tmp_path / "baked.keras").read_bytes()


@pytest.mark.slow
def test_an_unmodified_model_is_tuned_and_comes_back_without_farhox():
    keras.utils.set_random_seed(0)
    model = sequential(K.RandomFlip(seed=0), K.RandomTranslation(0.2, 0.1, name="move"),
                       K.RandomContrast(0.2, name="contrast"), K.Conv2D(4, 3), K.BatchNormalization(), K.ReLU(),
                       K.SpatialDropout2D(0.3, name="channels"), K.Flatten(), K.Dropout(0.5, name="drop"))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    strengths = stn.strengths_of(model)
    smoothing = farhox.Hyperparameter(0.05, low=0.0, high=0.5, name="label_smoothing")
    tuned = {id(entry): entry for given in strengths.values() for entry in given.values()}.values()
    network = stn.convert(model, [*tuned, smoothing], strengths=strengths)
    self_tuning = stn.SelfTuningModel(network, warmup_steps=1)
    self_tuning.compile("sgd", keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1), validation_loss=model.loss,
                        loss=stn.LabelSmoothing(smoothing, loss=model.loss))
    data = examples(IMAGES, 16), np.arange(16) % 2
    history = self_tuning.fit(*data, validation_data=data, batch_size=8, epochs=4, verbose=0).history
    names = ["move_height_factor", "move_width_factor", "contrast_factor", "channels_rate", "drop_rate",
             "label_smoothing"]
    assert [entry.name for entry in self_tuning.hyperparameters] == names
    assert all(len(set(history[name])) > 1 for name in names) and history["skipped_updates"][-1] == 0
    baked = stn.bake(self_tuning)
    assert [type(layer) for layer in baked.layers] == [type(layer) for layer in model.layers]
    assert baked.get_layer("drop").rate == pytest.approx(history["drop_rate"][-1], rel=1e-6)
    assert "farhox" not in json.dumps(baked.get_config(), default=str)
    np.testing.assert_allclose(
        baked(data[0], training=False), self_tuning(data[0], training=False), rtol=1e-3, atol=1e-2)


def test_contrast_goes_one_way_in_keras_and_both_in_farhox_and_a_rotation_needs_single_precision():
    assert K.RandomContrast(0.2).factor == (0.0, 0.2)
    assert stn.Augmentation(K.RandomContrast(0.2), factor=0.4).to_keras().factor == pytest.approx((0.0, 0.4))
    x = np.array([[[[0.0], [200.0]]]] * 400, "float32")
    spread = np.ptp(np.asarray(stn.RandomContrast(0.2, (-1e3, 1e3), seed=0)(x, training=True)), axis=(1, 2, 3)) / 200
    assert 0.8 <= spread.min() < 0.81 and 1.19 < spread.max() <= 1.2001
    keras.config.set_floatx("float64")
    try:
        for layer in (K.RandomRotation(0.1), stn.RandomRotation(0.1)):
            with pytest.raises(tf.errors.InvalidArgumentError):
                layer(examples(IMAGES).astype("float64"), training=True)
    finally:
        keras.config.set_floatx("float32")


@pytest.mark.one_case
@pytest.mark.parametrize("loss, targets", [
    (keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), "one_hot"),
    (keras.losses.CategoricalCrossentropy(), "one_hot"),
    (keras.losses.CategoricalFocalCrossentropy(from_logits=True), "one_hot"),
    (keras.losses.BinaryCrossentropy(from_logits=True), "binary"),
    (keras.losses.BinaryFocalCrossentropy(), "binary"),
])
def test_the_label_smoothing_of_a_loss_of_keras_is_that_of_each_example(loss, targets):
    random = np.random.default_rng(0)
    shape = (4, 3) if targets == "one_hot" else (4, 1)
    logits = random.normal(size=shape).astype("float32")
    y = np.eye(3, dtype="float32")[[0, 2, 1, 1]] if targets == "one_hot" else np.array([[0], [1], [1], [0]], "float32")
    predictions = logits if loss.get_config()["from_logits"] else 1 / (1 + np.exp(-logits))
    smoothing = farhox.Hyperparameter(0.2, low=0.0, high=1.0, name="smoothing")
    own = stn.LabelSmoothing(smoothing, loss=loss)
    draws = [(smoothing.variable, smoothing._unconstrained(STRENGTHS, "smoothing"))]
    values = functional.call(lambda: own.call(y, predictions), bindings=[], draws=draws).value
    for i, value in enumerate(STRENGTHS):
        plain = type(loss).from_config({**loss.get_config(), "label_smoothing": float(value)})
        np.testing.assert_allclose(values[i], plain(y[i:i + 1], predictions[i:i + 1]), rtol=1e-5)
    back = own.to_keras()
    assert type(back) is type(loss) and back.get_config() == {**loss.get_config(), "label_smoothing": float(smoothing)}
    again = keras.losses.deserialize(keras.losses.serialize(own))
    np.testing.assert_allclose(again(y, predictions), back(y, predictions), rtol=1e-5)


def test_a_sparse_loss_is_smoothed_and_comes_back_as_it_was():
    loss, smoothing = keras.losses.SparseCategoricalCrossentropy(), farhox.Hyperparameter(0.2, low=0.0, high=1.0)
    probabilities = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], "float32")
    own = stn.LabelSmoothing(smoothing, loss=loss)
    plain = keras.losses.CategoricalCrossentropy(label_smoothing=0.2)
    np.testing.assert_allclose(own([2, 0], probabilities), plain(np.eye(3)[[2, 0]], probabilities), rtol=1e-5)
    assert own.to_keras().get_config() == loss.get_config()


@pytest.mark.parametrize("make, error, rule", [
    (lambda: stn.strengths_of(K.Dense(3)), TypeError, "stn.strengths_of needs a keras.Model"),
    (lambda: stn.strengths_of(nested(), skip=["none"]), ValueError, "Received: 'none', of which there are 0"),
    (lambda: stn.convert(nested(), strengths=[1]), TypeError, "strengths must be a dictionary"),
    (lambda: stn.convert(nested(), strengths={"first_": farhox.Hyperparameter(0.1, low=0.0, high=0.5)}), ValueError,
     "must be in .* once"),
    (lambda: stn.convert(sequential(K.RandomFlip(name="flip")), strengths={
        "flip": farhox.Hyperparameter(0.1, low=0.0, high=0.5)}),
            TypeError, "Strengths are those of dropout.*Received: <Rand"),
    (lambda: stn.convert(nested(), strengths={"first": {"ratio": farhox.Hyperparameter(0.1)}}), ValueError,
     "strengths of 'first' must be among \\['rate'\\]. Received: \\['ratio'\\]"),
    (lambda: stn.convert(nested(), strengths={"first": farhox.Hyperparameter(0.1)}),
     ValueError, "rate of 'first' must stay"),
    (lambda: stn.with_strengths(nested(), {"first_": farhox.Hyperparameter(0.1, low=0.0, high=0.5)}), ValueError,
     "must be in .* once"),
    (lambda: stn.with_strengths(nested().layers[1].layers[0], {}), TypeError, "stn.with_strengths needs a functional"),
    (lambda: stn.with_strengths(keras.Sequential([keras.Input(STEPS), K.LSTM(3, dropout=0.2, name="steps")]),
                                {"steps": farhox.Hyperparameter(0.1, low=0.0, high=0.5)}), ValueError,
     "need stn.convert. Received: 'steps'"),
    (lambda: stn.Augmentation(K.RandomFlip(), factor=0.1), TypeError, "layer must be one of RandomRotation"),
    (lambda: stn.Augmentation(K.RandomZoom(0.1), width_factor=0.1), ValueError, "must be among \\['height_factor'\\]"),
    (lambda: stn.Augmentation(K.RandomZoom(0.1)), ValueError, "must be among .*Received: \\[\\]"),
    (lambda: stn.Augmentation(K.RandomZoom(0.1), height_factor=1.0),
     ValueError, "height_factor of .* between 0.0 and 0.99"),
    (lambda: stn.LabelSmoothing(0.1, loss=keras.losses.MeanSquaredError()), TypeError, "smoothed in cross-entropies"),
    (lambda: stn.LabelSmoothing(0.1, loss=keras.losses.SparseCategoricalCrossentropy(ignore_class=0)), ValueError,
     "must not leave out a class"),
])
def test_strengths_that_a_model_has_not_are_refused(make, error, rule):
    with pytest.raises(error, match=rule):
        make()

"""Conversion to self-tuning layers and back: identity with zero gates, exact baking, what stays, what is refused."""

import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

import farhox
from farhox import stn

K = keras.layers


def rate(name="rate"):
    return farhox.Hyperparameter(0.3, low=0.0, high=0.9, name=name)


def mobile():
    """Depthwise and pointwise convolutions with batch normalisation, as in MobileNet."""
    inputs = keras.Input((16, 16, 3))
    x = K.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = K.ReLU(6.0)(K.BatchNormalization()(x))
    for filters in (8, 12):
        x = K.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False)(x)
        x = K.Conv2D(filters, 1, use_bias=False)(K.ReLU(6.0)(K.BatchNormalization()(x)))
    return keras.Model(inputs, K.Dense(5)(K.GlobalAveragePooling2D()(x)))


def residual():
    """Additions by layer and by operator, a shared layer, groups, a nested model."""
    inputs = keras.Input((8, 8, 3))
    shared = K.Conv2D(6, 3, padding="same", activation="relu")
    x = K.Conv2D(6, 3, padding="same", groups=3)(inputs)
    x = K.Add()([x, shared(x)])
    x = x + keras.ops.relu(shared(x))
    block = keras.Sequential([keras.Input((8, 8, 6)), K.Conv2D(4, 3), K.Flatten()], name="block")
    return keras.Model(inputs, K.Dense(2)(block(x)))


def recurrent():
    return keras.Sequential([
        keras.Input((7,), dtype="int32"), K.Embedding(20, 6, mask_zero=True), K.LSTM(5, return_sequences=True),
        K.GRU(4, return_sequences=True, reset_after=False), K.Bidirectional(K.GRU(4)), K.Dense(3)])


def attention():
    inputs = keras.Input((6, 4))
    x = K.Conv1D(8, 3, padding="causal")(inputs)
    x = K.LayerNormalization()(x + K.MultiHeadAttention(2, 4, name="attention")(x, x))
    return keras.Model(inputs, K.Dense(2)(K.TimeDistributed(K.Dense(4), name="steps")(x)))


MODELS = {"mobile": mobile, "residual": residual, "recurrent": recurrent, "attention": attention}


def built(name):
    """A model whose weights are no longer those of its initializers, and inputs."""
    model, random = MODELS[name](), np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(random.uniform(0, 0.3, variable.shape))
    shape = (3, *model.input_shape[1:])
    x = random.integers(0, 20, shape) if name == "recurrent" else random.normal(size=shape).astype("float32")
    return model, x


def open_gates(model):
    for layer in model._flatten_layers():
        if isinstance(layer, stn.gates.Gate):
            layer.kernel.assign(np.random.default_rng(1).normal(size=layer.kernel.shape) * 0.2)


@pytest.mark.one_case
@pytest.mark.parametrize("name", MODELS)
def test_convert_then_bake_with_zero_gates_is_the_identity(name):
    model, x = built(name)
    converted = stn.convert(model, [rate()])
    baked = stn.bake(converted)
    np.testing.assert_allclose(converted(x), model(x), atol=1e-6)
    np.testing.assert_allclose(baked(x), model(x), atol=1e-6)
    assert baked.count_params() == model.count_params() < converted.count_params()


@pytest.mark.one_case
@pytest.mark.parametrize("name", MODELS)
def test_baked_models_have_the_outputs_at_the_current_hyperparameters(name):
    model, x = built(name)
    hyperparameter = rate()
    converted = stn.convert(model, [hyperparameter])
    open_gates(converted)
    hyperparameter.assign(0.77)
    baked = stn.bake(converted)
    np.testing.assert_allclose(baked(x), converted(x), rtol=1e-6, atol=1e-6)
    assert not np.allclose(baked(x), model(x), atol=1e-3)
    before = np.asarray(baked(x))
    open_gates(converted)
    hyperparameter.assign(0.1)
    np.testing.assert_array_equal(baked(x), before)


def test_a_converted_model_is_a_copy():
    model, x = built("mobile")
    before = np.asarray(model(x))
    converted = stn.convert(model, [rate()])
    for variable in converted.variables:
        variable.assign(variable + 1 if "float" in variable.dtype else variable)
    np.testing.assert_array_equal(model(x), before)


def test_a_baked_model_needs_no_farhox_and_keeps_the_strengths_keras_has(tmp_path):
    dropout, noise, weights = rate("dropout"), rate("noise"), farhox.Hyperparameter(0.01, low=0.0, name="weights")
    images = keras.Sequential([
        keras.Input((8, 8, 3)), stn.RandomTranslation(rate("move")), stn.RandomHue(0.1),
        stn.RandomSaturation(0.2), stn.GaussianNoise(noise), K.Conv2D(4, 3, kernel_regularizer=farhox.L1L2(l2=weights)),
        K.Flatten(), stn.Dropout(dropout), K.Dense(2)])
    converted = stn.convert(images)
    open_gates(converted)
    dropout.assign(0.6)
    baked = stn.bake(converted)
    kinds = {type(layer).__name__: layer for layer in baked.layers}
    assert abs(kinds["Dropout"].rate - 0.6) < 1e-6 and abs(kinds["GaussianNoise"].stddev - 0.3) < 1e-6
    assert "Identity" in kinds
    assert abs(float(kinds["Conv2D"].kernel_regularizer.l2) - 0.01) < 1e-6
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(baked(x), converted(x), atol=1e-6)

    baked.save(tmp_path / "baked.keras")
    assert "farhox" not in zipfile.ZipFile(tmp_path / "baked.keras").read("config.json").decode()


@pytest.mark.slow
def test_a_process_without_farhox_loads_a_baked_model(tmp_path):
    converted = stn.convert(keras.Sequential([
        keras.Input((8, 8, 3)), stn.RandomTranslation(rate("move")), stn.RandomHue(0.1), K.Conv2D(4, 3), K.Flatten(),
        stn.Dropout(rate("dropout")), K.Dense(2)]))
    open_gates(converted)
    baked, path = stn.bake(converted), tmp_path / "baked.keras"
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    baked.save(path)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.asarray(baked(x)))
    code = (f"import sys, keras, numpy as np\nm = keras.models.load_model(r'{path}')\n"
            f"d = m(np.load(r'{tmp_path / 'x.npy'}')) - np.load(r'{tmp_path / 'y.npy'}')\n"
            "sys.exit('farhox' in sys.modules or float(np.abs(d).max()) > 1e-6)")
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_bake_takes_a_self_tuning_model():
    model, x = built("residual")
    hyperparameter = rate()
    tuned = stn.SelfTuningModel(stn.convert(model, [hyperparameter]), [hyperparameter])
    open_gates(tuned)
    np.testing.assert_allclose(stn.bake(tuned)(x), tuned(x), rtol=1e-6, atol=1e-6)


def test_hyperparameters_of_layers_regularizers_and_cells_are_found_and_perturbing_layers_shared():
    drop, weights = rate("drop"), farhox.Hyperparameter(0.01, low=0.0, name="weights")
    model = keras.Sequential([keras.Input((4,)), stn.Dropout(drop),
                              K.Dense(3, kernel_regularizer=farhox.L1L2(l2=weights)), K.Dense(2)])
    converted = stn.convert(model)
    assert [entry.name for entry in converted.layers[-1].hyperparameters] == ["drop", "weights"]
    assert converted.layers[0] is model.layers[0]
    assert converted.layers[1].kernel_regularizer.l2 is weights
    assert converted.layers[1].hyperparameters[0] is drop


def test_layers_without_a_twin_keep_weights_and_learned_strengths():
    weights = farhox.Hyperparameter(0.01, low=0.0, name="weights")
    model = keras.Sequential([
        keras.Input((4,)), K.Dense(3), K.LayerNormalization(gamma_regularizer=farhox.L1L2(weights)), K.Dense(2)])
    model.layers[1].gamma.assign([1.0, 2.0, 3.0])
    converted = stn.convert(model)
    assert converted.layers[1].gamma_regularizer.l1 is weights
    assert converted.layers[1] is not model.layers[1]
    np.testing.assert_array_equal(converted.layers[1].gamma, [1.0, 2.0, 3.0])


def test_the_summary_names_what_does_not_respond_and_the_hyperparameters():
    converted = stn.convert(attention(), [rate()])
    text = stn.summary(converted)
    assert "respond: layer_normalization" in text and "steps (TimeDistributed)" in text and "attention" not in text
    assert "rate = 0.3" in text and "Self-tuning layers: 6" in text
    assert "Hyperparameters: none" in stn.summary(attention())
    lines = []
    stn.SelfTuningModel(converted).summary(print_fn=lambda line, line_break=True: lines.append(line))
    assert text in lines


def test_the_summary_of_a_self_tuning_model_is_shown_like_that_of_keras(capsys):
    tuned = stn.SelfTuningModel(stn.convert(attention(), [rate()]))
    tuned.summary()
    assert "Layers whose weights do not respond: layer_normalization" in capsys.readouterr().out


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


class OwnDense(K.Dense):
    pass


def test_a_subclass_of_a_layer_stays_as_it_is():
    model = keras.Sequential([keras.Input((4,)), OwnDense(3, name="own"), K.Dense(2)])
    converted = stn.convert(model, [rate()])
    assert type(converted.layers[0]) is OwnDense and "own (OwnDense)" in stn.summary(converted)


def quantised():
    model = keras.Sequential([keras.Input((4,)), K.Dense(3, name="small"), K.Dense(2)])
    model.layers[0].quantize("int8")
    return model


@pytest.mark.parametrize("make, error, rule", [
    (Subclassed, TypeError, "needs a functional or Sequential"),
    (lambda: keras.Sequential([K.Dense(3)], name="unbuilt"), ValueError, "needs a built model.*'unbuilt'"),
    (lambda: keras.Sequential([keras.Input((4,)), K.Dense(3, lora_rank=1, name="adapted")]), ValueError,
     "'adapted', which has LoRA weights"),
    (quantised, ValueError, "'small', which is quantised to int8"),
    (lambda: stn.convert(keras.Sequential([keras.Input((4,)), K.Dense(3, name="twice")]), [rate()]), ValueError,
     "'twice', which responds to hyperparameters already"),
])
def test_what_cannot_be_converted_is_an_error_that_names_it(make, error, rule):
    with pytest.raises(error, match=rule):
        stn.convert(make(), [rate()])


def test_conversion_needs_hyperparameters():
    with pytest.raises(ValueError, match="'plain', in which no layer reads one"):
        stn.convert(keras.Sequential([keras.Input((4,)), K.Dense(3)], name="plain"))


@pytest.mark.parametrize("make, error, rule", [
    (Subclassed, TypeError, "stn.bake needs a functional"),
    (lambda: keras.Sequential([K.Dense(3)]), ValueError, "stn.bake needs a built model"),
])
def test_what_cannot_be_baked_is_an_error(make, error, rule):
    with pytest.raises(error, match=rule):
        stn.bake(make())

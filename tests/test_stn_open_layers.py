"""Self-tuning layers are open: attention by its parts, layers of your own by twins; what cannot be baked is refused."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from stn_cases import LAYERS, PLAIN, VARIANTS, gated, hyperparameters, inputs, layer_and_input

import farhox
from farhox import stn
from farhox._core import functional
from farhox.stn.plain_twins import perturbing_twins, self_tuning_twins

K = keras.layers
SEQUENCE = (5, 6)
# Keras 3.8 has no gates.
GATE = {"use_gate": True} if "use_gate" in inspect.signature(K.MultiHeadAttention.__init__).parameters else {}
ATTENTION = {
    "attention": (lambda **k: K.MultiHeadAttention(2, 3, value_dim=4, **GATE, **k)),
    "attention_output": (lambda **k: K.MultiHeadAttention(2, 3, output_shape=(2, 4), use_bias=False, **k)),
    "group_query": (lambda **k: K.GroupQueryAttention(4, 4, 2, **k)),
    "group_query_gate": (lambda **k: K.GroupQueryAttention(3, 2, 1, **GATE, **k)),
}


def attention_model(name, **arguments):
    inputs = keras.Input(SEQUENCE)
    x = K.Dense(6, "tanh")(inputs)
    return keras.Model(inputs, ATTENTION[name](**arguments)(x, inputs))


def rate(name="rate", value=0.3):
    return farhox.Hyperparameter(value, low=0.0, high=0.9, name=name)


def open_gates(model, seed=1):
    random = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, stn.gates.Gate):
            layer.kernel.assign(random.normal(size=layer.kernel.shape))


def at_draws(model, x, draws):
    """The outputs while all gates see a row of draws per example, or one row for all."""
    bindings = [(layer.gate.input_of_gates.variable, tf.constant(draws)) for layer in model._flatten_layers()
                if isinstance(layer, stn.SelfTuning)]
    return functional.call(lambda: model(x), bindings=[], draws=bindings).value


@pytest.mark.parametrize("name", [*(
    pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in LAYERS), *ATTENTION])
def test_a_converted_layer_with_closed_gates_is_its_plain_twin(name, float64):
    if name in ATTENTION:
        model, shape = attention_model(name), SEQUENCE
    else:
        layer, _ = layer_and_input(name)
        shape = LAYERS[name][1]
        x = inputs(shape)
        model = keras.Sequential([keras.Input(shape, dtype=str(x.dtype)), layer.to_keras()])
    random = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    converted, x = stn.convert(model, [rate()]), inputs(shape)
    kinds = {type(layer) for layer in converted.layers} & {getattr(stn, kind) for kind in stn.__all__}
    assert kinds and not any(type(layer) in PLAIN.values() for layer in converted.layers)
    np.testing.assert_allclose(converted(x), model(x), rtol=0, atol=1e-12)
    baked = stn.bake(converted)
    assert [(type(layer), layer.get_config()) for layer in baked.layers if not isinstance(layer, K.InputLayer)] == [
        (type(layer), layer.get_config()) for layer in model.layers if not isinstance(layer, K.InputLayer)]
    np.testing.assert_allclose(baked(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.one_case
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_computes_each_example_with_the_projections_of_its_own_draw(name, float64):
    model = stn.convert(attention_model(name), hyperparameters())
    open_gates(model)
    x, draws = inputs(SEQUENCE), np.random.default_rng(5).normal(size=(4, 3))
    outputs = at_draws(model, x, draws)
    for i in range(4):
        np.testing.assert_allclose(outputs[i:i + 1], at_draws(model, x[i:i + 1], draws[i:i + 1]), rtol=0, atol=1e-12)
    assert not np.allclose(outputs[0], at_draws(model, x, draws[1:2])[0], atol=1e-3)
    entry = next(iter(gated(model.layers[1]).hyperparameters))
    entry.assign(0.7)
    np.testing.assert_allclose(stn.bake(model)(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [
    "einsum", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "attention", "transpose", "separable", "conv3d", "group_query"))])
def test_gradients_of_elementary_and_hyper_weights_and_gates_are_those_of_finite_differences(name, float64):
    if name in ATTENTION:
        model, shape = stn.convert(attention_model(name), hyperparameters()), SEQUENCE
    else:
        shape = LAYERS[name][1]
        model = keras.Sequential([keras.Input(shape), LAYERS[name][0](hyperparameters())])
    open_gates(model)
    x, draws = inputs(shape, 3), np.random.default_rng(5).normal(size=(3, 3))
    variables, random = model.trainable_variables, np.random.default_rng(2)
    directions = [random.normal(size=v.shape) for v in variables]

    def value(tensors):
        bindings = [(layer.gate.input_of_gates.variable, tf.constant(draws)) for layer in model._flatten_layers()
                    if isinstance(layer, stn.SelfTuning)]
        result = functional.call(lambda: model(x), bindings=list(zip(variables, tensors)), draws=bindings)
        return tf.reduce_sum(tf.sin(result.value))

    values = [tf.convert_to_tensor(v) for v in variables]
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = value(values)
    gradients = tape.gradient(total, values)
    for gradient, direction, index in zip(gradients, directions, range(len(values))):
        moved = [[v + sign * 1e-6 * direction if i == index else v for i, v in enumerate(values)] for sign in (1, -1)]
        difference = float(value(moved[0]) - value(moved[1])) / 2e-6
        np.testing.assert_allclose(float(tf.reduce_sum(gradient * direction)), difference, rtol=1e-6, atol=1e-7)


@keras.saving.register_keras_serializable(package="tests")
class Scale(K.Layer):
    """A layer of a user's, with a weight that responds, one that does not, and a regularizer."""

    def __init__(self, regularizer=None, **kwargs):
        super().__init__(**kwargs)
        self.regularizer = keras.regularizers.get(regularizer)

    def build(self, input_shape):
        self.factors = self.add_weight(shape=(input_shape[-1],), initializer="ones", regularizer=self.regularizer)
        self.offset = self.add_weight(shape=(), initializer="zeros")

    def call(self, inputs):
        return inputs * self.factors + self.offset

    def get_config(self):
        return {**super().get_config(), "regularizer": keras.regularizers.serialize(self.regularizer)}


@keras.saving.register_keras_serializable(package="tests")
class SelfTuningScale(stn.SelfTuning, Scale):
    plain = Scale
    gate_axes = {"factors": (-1,)}

    def call(self, inputs):
        return self.response().linear("factors", lambda factors: inputs * factors) + self.offset


@keras.saving.register_keras_serializable(package="tests")
class Block(K.Layer):
    """A layer of a user's that is made of others."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first, self.last = K.Dense(units, "tanh"), Scale()

    def build(self, input_shape):
        self.first.build(input_shape)
        self.last.build((None, self.units))
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros")

    def call(self, inputs):
        return self.last(self.first(inputs)) + self.bias

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests")
class SelfTuningBlock(stn.SelfTuningParts, Block):
    plain = Block
    parts = {"first": stn.Dense, "last": SelfTuningScale}


def own_model(strength=0.1):
    return keras.Sequential([keras.Input((4,)), Scale(farhox.L1L2(strength)), Block(3, name="block"), K.Dense(2)])


TWINS = {Scale: SelfTuningScale, Block: SelfTuningBlock}


@pytest.mark.filterwarnings("ignore:The l1 strength")
def test_layers_of_your_own_become_self_tuning_by_twins_and_plain_again(float64, tmp_path):
    strength = farhox.Hyperparameter(0.1, low=0.0, name="strength")
    model = own_model(strength)
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    x = random.normal(size=(3, 4))
    hyper = [strength, rate()]
    converted = stn.convert(model, hyper, twins=TWINS)
    np.testing.assert_allclose(converted(x), model(x), rtol=0, atol=1e-12)
    assert len([layer for layer in converted._flatten_layers() if isinstance(layer, stn.SelfTuning)]) == 4
    open_gates(converted)
    draws = random.normal(size=(3, 2))
    for i in range(3):
        np.testing.assert_allclose(at_draws(converted, x, draws)[i], at_draws(converted, x[i:i + 1], draws[i:i + 1])[0],
                                   rtol=0, atol=1e-12)
    # The regularizer has the model's own hyperparameter, and sees the response.
    converted(x)
    response = converted.layers[0].realized_weights()["factors"]
    np.testing.assert_allclose(converted.losses, [float(strength) * np.sum(np.abs(response))], rtol=1e-12)
    hyper[1].assign(0.7)
    converted.save(tmp_path / "own.keras")
    loaded = keras.models.load_model(tmp_path / "own.keras")
    np.testing.assert_allclose(loaded(x), converted(x), rtol=0, atol=1e-12)
    baked = stn.bake(converted)
    np.testing.assert_allclose(baked(x), converted(x), rtol=0, atol=1e-12)
    assert [type(layer) for layer in baked.layers] == [Scale, Block, K.Dense]
    assert isinstance(baked.layers[0].regularizer, keras.regularizers.L1L2)
    assert type(baked.layers[1].first) is K.Dense
    left = stn.convert(model, hyper, twins={K.Dense: None, Scale: SelfTuningScale})
    assert [type(layer) for layer in left.layers] == [SelfTuningScale, Block, K.Dense]


@pytest.mark.slow
def test_attention_and_own_layers_tune_train_and_come_back_from_a_saved_model(tmp_path):
    keras.utils.set_random_seed(0)
    drop = rate("drop")
    inputs_ = keras.Input(SEQUENCE)
    x = stn.Dropout(drop, seed=0)(K.GroupQueryAttention(4, 2, 1)(inputs_, inputs_))
    x = Scale()(K.MultiHeadAttention(2, 3, kernel_regularizer="l2")(x, x))
    plain = keras.Model(inputs_, K.Dense(2)(K.Flatten()(x)))
    model = stn.SelfTuningModel(stn.convert(plain, gate_initializer="ones", twins=TWINS))
    model.compile("sgd", "adam", "adam", loss="mse", run_eagerly=True)
    batch = inputs(SEQUENCE, 6).astype("float32"), np.ones((6, 2), "float32")
    before = [v.numpy() for v in model._network.response]
    model.training_step(batch)
    still = {v.path.split("/", 1)[1] for old, v in zip(before, model._network.response) if np.allclose(old, v)}
    assert still == {"key/hyper_bias"}  # Softmax takes no notice of it.
    value = float(drop)
    model.validation_step(batch)
    assert float(drop) != value and len(model._network.gated) == 4 + 4 + 1 + 1
    # Attention answers for the regularizers of its parts.
    model(batch[0])
    assert len(model.model.losses) == 4
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(batch[0]), model(batch[0]), atol=1e-6)
    np.testing.assert_allclose(stn.bake(loaded)(batch[0]), model(batch[0]), atol=1e-5)
    assert "Layers whose weights do not respond: scale" in stn.summary(model)


@pytest.mark.one_case
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_attention_runs_in_half_precision(policy):
    model = stn.convert(attention_model("attention", dtype=policy), hyperparameters())
    open_gates(model)
    x, draws = inputs(SEQUENCE).astype("float32"), np.random.default_rng(5).normal(size=(4, 3)).astype("float32")
    full = stn.convert(attention_model("attention"), hyperparameters())
    full.set_weights(model.get_weights())
    outputs = at_draws(model, x, 0.1 * draws)
    assert outputs.dtype == policy.removeprefix("mixed_")
    np.testing.assert_allclose(tf.cast(outputs, "float32"), at_draws(full, x, 0.1 * draws), atol=0.06)


class Subclass(stn.Dense):
    pass


class Undeclared(stn.SelfTuning, Scale):
    gate_axes = {"factors": (-1,)}


class Odd(stn.SelfTuning, Scale):
    """A twin with a weight that its plain layer has not."""

    plain = Scale
    gate_axes = {"factors": (-1,)}

    def build(self, input_shape):
        super().build(input_shape)
        self.more = self.add_weight(shape=(2,), initializer="zeros")


def sequential(layer, shape=(4,)):
    return keras.Sequential([keras.Input(shape), layer])


@pytest.mark.parametrize("make, rule", [
    (lambda: sequential(Subclass(3, [rate()], name="own")),
     "'own' of the class Subclass, which has no `plain` of its own"),
    (lambda: sequential(Undeclared(hyperparameters=[rate()])), "of the class Undeclared, which has no `plain`"),
    (lambda: sequential(K.TimeDistributed(stn.Dense(3, [rate()], name="inner"), name="steps"), (5, 4)),
     "'steps' \\(TimeDistributed\\), which holds 'inner' \\(Dense\\)"),
    (lambda: sequential(K.RNN(stn.LSTMCell(3, [rate()], name="cell")), (5, 4)), "\\(RNN\\), which holds 'cell'"),
    (lambda: sequential(K.TimeDistributed(stn.Dropout(rate(), name="drop")), (5, 4)),
     "which holds 'drop' \\(Dropout\\)"),
])
def test_what_has_no_plain_twin_is_refused_by_name_when_baking(make, rule):
    with pytest.raises(ValueError, match=rule):
        stn.bake(make())


def test_layers_in_wrappers_keep_the_hyperparameters_they_read():
    drop = rate("drop")
    model = keras.Sequential([keras.Input((5, 4)), K.TimeDistributed(stn.Dropout(drop)), K.Dense(2)])
    converted = stn.convert(model)
    assert converted.layers[0].layer.rate is drop is converted.layers[1].hyperparameters[0]
    with pytest.raises(ValueError, match="which responds to hyperparameters already"):
        stn.convert(sequential(K.TimeDistributed(stn.Dense(3, [rate()])), (5, 4)), [rate()])


@pytest.mark.parametrize("twins, error, rule", [
    ([Scale], TypeError, "twins must be a dictionary"),
    ({"Scale": SelfTuningScale}, TypeError, "keys of twins must be classes of Keras layers. Received: 'Scale'"),
    ({Scale: Scale}, TypeError, "values of twins must be None or classes with stn.SelfTuning"),
    ({Scale: stn.Dense}, ValueError, "Dense with plain = .*Dense'> for Scale"),
    ({Scale: Undeclared}, ValueError, "Undeclared with plain = None for Scale"),
    ({Scale: Odd}, ValueError, "must have the weights of its plain twin besides.*class Odd"),
])
def test_twins_that_are_none_are_refused(twins, error, rule):
    with pytest.raises(error, match=rule):
        stn.convert(sequential(Scale()), [rate()], twins=twins)


@pytest.mark.parametrize("equation, output", [("abc,cd->bad", (4, 2)), ("abc,acd->abd", (5, 2))])
def test_an_einsum_layer_without_an_axis_of_examples_in_front_is_refused(equation, output):
    with pytest.raises(ValueError, match="must leave the first axis of its inputs.*Received: equation="):
        stn.EinsumDense(equation, output, [rate()]).build((4, 5, 6))


class OwnDense(stn.SelfTuning, K.Dense):
    """A twin of a layer that farhox has one for."""

    plain = K.Dense
    gate_axes = {"kernel": (-1,), "bias": (-1,)}


def test_layers_become_those_of_farhox_for_each_that_names_them_and_those_of_others_only_when_asked():
    dense = keras.Sequential([keras.Input([4]), K.Dense(3)])
    assert type(stn.convert(dense, [rate()]).layers[0]) is stn.Dense
    assert type(stn.convert(dense, [rate()], twins={K.Dense: OwnDense}).layers[0]) is OwnDense
    assert set(self_tuning_twins()) == {
        K.Dense, K.Embedding, K.Conv1D, K.Conv2D, K.Conv3D, K.Conv2DTranspose, K.DepthwiseConv2D, K.SeparableConv2D,
        K.LSTM, K.GRU, K.EinsumDense, K.MultiHeadAttention, K.GroupQueryAttention}
    assert set(perturbing_twins()) == {
        K.Dropout, K.SpatialDropout1D, K.SpatialDropout2D, K.SpatialDropout3D, K.GaussianNoise, K.GaussianDropout,
        K.AlphaDropout}

"""The self-tuning model: exact responses, exact gradients of hyperparameters, no other ones, `fit`, saving, errors."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from stn_cases import with_draws

import farhox
from farhox import stn

K = keras.layers
# Six equally likely points with the first five moments of the standard normal distribution.
NORMAL = np.sqrt(3.0) * np.array([-1.0, 0.0, 0.0, 0.0, 0.0, 1.0])[:, np.newaxis]
ONES = np.ones((6, 1)), np.zeros((6, 1))


def linear_response(loss, hyperparameter, method, units=1, rate=0.1):
    """A model whose weights are w(u) = elementary + gate(u) * hyper, on the input 1."""
    layer = stn.Dense(units, [hyperparameter], use_bias=False)
    model = stn.SelfTuningModel(keras.Sequential([keras.Input([1]), layer]), method=method)
    model.compile(keras.optimizers.SGD(rate), "sgd", loss=loss)
    return model, layer


def training(model, noise=NORMAL):
    """A function that starts anew at a scale of the draws and takes a number of training steps, all in one graph."""
    x, y, noise = (tf.constant(part) for part in (*ONES, noise))
    start = [(v, v.numpy()) for v in model.model.trainable_variables]

    @tf.function(autograph=False)
    def run(steps):
        def step(i):
            model._updates.training(x, y, None, noise)
            return i + 1

        return tf.while_loop(lambda i: i < steps, step, [0])

    def train(steps, scale=0.5):
        for variable, value in start:
            variable.assign(value)
        model.draws.raw_scales.assign(np.full(model.draws.raw_scales.shape, np.log(np.expm1(scale))))
        run(tf.constant(steps))

    return train


def slopes(layer):
    """dw / du of a layer of one input, [units, n]."""
    return (layer.gate.kernel.numpy() * layer.hyper_kernel.numpy()).T


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_gate_learns_the_exact_jacobian_of_a_quadratic_problem_whatever_the_scale(method, float64):
    """f = a/2 w^2 - b w u has the response w = (b / a) u."""
    u = farhox.Hyperparameter(1.0, name="u")
    model, layer = linear_response(lambda y, w: w[:, 0] ** 2 - 3 * w[:, 0] * u(), u, method)
    train = training(model)
    for scale in (0.3, 1.0):
        train(1500, scale)
        np.testing.assert_allclose(slopes(layer), [[1.5]], rtol=1e-8)
        np.testing.assert_allclose(layer.kernel, [[1.5 if method == "delta" else 0.0]], atol=1e-8)
        np.testing.assert_allclose(model(np.ones((1, 1))), [[1.5]], rtol=1e-8)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_gates_learn_the_exact_jacobian_of_a_quadratic_problem_in_several_dimensions(method, float64):
    """f = w'A w / 2 - w'B u has the response w = A^-1 B u (Theorem 3)."""
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -2.0, 0.5], [0.3, 0.4, 1.5]])
    u = farhox.Hyperparameter([0.5, -1.0, 0.2], name="u")

    def loss(y, w):
        return (0.5 * tf.reduce_sum(w * tf.matmul(w, a), axis=1)
                - tf.reduce_sum(w * tf.linalg.matmul(u(), b, transpose_b=True), axis=1))

    model, layer = linear_response(loss, u, method, units=2)
    training(model, np.sqrt(3.0) * np.concatenate([np.eye(3), -np.eye(3)]))(3000)
    np.testing.assert_allclose(slopes(layer), np.linalg.solve(a, b), atol=1e-8)
    np.testing.assert_allclose(model(np.ones((1, 1)))[0], np.linalg.solve(a, b @ u.numpy()), atol=1e-8)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_bias_of_the_response_vanishes_with_the_scale_as_predicted_and_delta_has_none(method, float64):
    """f = (w - 1)^2 / 2 + u w^2 / 2 at u = 1: m = 1 / (2 - scale^2 / 2), slope -m / 2; without bias 1/2 and -1/4."""
    u = farhox.Hyperparameter(1.0, name="u")
    model, layer = linear_response(
        lambda y, w: 0.5 * (w[:, 0] - 1) ** 2 + 0.5 * u() * w[:, 0] ** 2, u, method, rate=0.5)
    layer.hyper_kernel.assign([[1.0]])  # The slope is a product, and learned slowly where both factors are small.
    train = training(model)
    for scale in (0.5, 0.25, 0.125):
        train(2000, scale)
        value = 0.5 if method == "delta" else 1 / (2 - scale ** 2 / 2)
        np.testing.assert_allclose(model(np.ones((1, 1))), [[value]], rtol=1e-6)
        np.testing.assert_allclose(slopes(layer), [[-value / 2]], rtol=1e-5)


def digits_like(examples=24, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(examples, 8)).astype(keras.config.floatx()), random.integers(0, 3, examples)


def network(batch_norm=False):
    """A network with a dropout rate, a discrete number of holes and a strength of weights."""
    rate = farhox.Hyperparameter(0.2, low=0.0, high=0.9, name="dropout")
    holes = farhox.Hyperparameter(1.5, low=0.0, high=4.0, discrete=True, name="holes")
    decay = farhox.Hyperparameter(0.01, low=0.0, log=True, name="decay")
    model = keras.Sequential([
        keras.Input((8,)), K.Reshape((2, 4, 1)), stn.Cutout(1, holes, seed=0), K.Flatten(),
        K.Dense(6, "tanh", kernel_regularizer=farhox.L1L2(l2=decay)), *([K.BatchNormalization()] if batch_norm else []),
        stn.Dropout(rate, seed=1), K.Dense(3)])
    return model, [rate, holes, decay]


def self_tuning(method="stn", scale_optimizer="adam", batch_norm=False, optimizer=None, metrics=None, **arguments):
    plain, hyperparameters = network(batch_norm)
    converted = stn.convert(plain, gate_initializer=keras.initializers.RandomNormal(stddev=0.3, seed=0))
    model = stn.SelfTuningModel(converted, hyperparameters, method=method, **arguments)
    model.compile(optimizer or keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01), scale_optimizer,
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=metrics)
    return model


@tf.custom_gradient
def never_differentiated(value):
    def fail(upstream):
        raise RuntimeError("differentiated")
    return value, fail


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_training_loss_is_never_differentiated_with_respect_to_a_hyperparameter(method, monkeypatch):
    natural = farhox.Hyperparameter.natural_value
    monkeypatch.setattr(farhox.Hyperparameter, "natural_value", lambda self: never_differentiated(natural(self)))
    model, (x, y) = self_tuning(method), digits_like()
    noise = model.draws.noise(24)
    variables = [entry.variable.value for entry in model.hyperparameters]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(variables)
        step = model._steps.training(x, y, None, noise)
        parts = [step.loss, *tf.nest.flatten([step.general, step.response])]
    assert [tape.gradient(part, variables) for part in parts] == [[None] * 3] * len(parts)
    # The guard is no dead letter: a derivative of the value does end there.
    with pytest.raises(RuntimeError, match="differentiated"), tf.GradientTape() as tape:
        tape.watch(variables)
        tape.gradient(model.hyperparameters[0](), variables[0])
    validation = model._steps.validation(x, y, None, noise)
    assert all(float(tf.abs(gradient)) > 0 for gradient in validation.hyperparameters)


def logits_of(model, x, gates, relative=False):
    """The network in inference as its gated layers one after another, for gates in the order of the model's."""
    gated = [layer for layer in model.model.layers if isinstance(layer, stn.Dense)]
    gates = np.take(gates, model.draws.columns_of(gated[0].hyperparameters), axis=1)
    gates = gates - gated[0].gate.input_of_gates.reference if relative else gates
    return np.asarray(with_draws(gated[1], with_draws(gated[0], x, gates), gates))


def validation_value(model, x, y, u, scales, noise):
    """The validation loss minus the weighted entropy, written out: gates at u + scales * noise."""
    logits = logits_of(model, x, u + scales * noise, relative=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, logits)
    return float(loss) - model.entropy_weight * np.sum(np.log(scales * np.sqrt(2 * np.pi * np.e)))


@pytest.mark.one_case
@pytest.mark.parametrize("perturbed", [True, False])
def test_gradients_of_hyperparameters_and_scales_are_those_of_finite_differences_through_the_gates(perturbed, float64):
    model, (x, y) = self_tuning(entropy_weight=0.1), digits_like()
    noise = np.random.default_rng(2).normal(size=(24, 3))
    step = model._steps.validation(x, y, None, tf.constant(noise) if perturbed else None)
    u = np.array([entry.variable.numpy() for entry in model.hyperparameters])
    raw = model.draws.raw_scales.numpy()

    def value(u, raw):
        return validation_value(model, x, y, u, np.log1p(np.exp(raw)), noise if perturbed else 0 * noise)

    moves = 1e-6 * np.eye(3)
    expected = [(value(u + move, raw) - value(u - move, raw)) / 2e-6 for move in moves]
    np.testing.assert_allclose(step.hyperparameters, expected, atol=1e-8)
    if perturbed:
        expected = [(value(u, raw + move) - value(u, raw - move)) / 2e-6 for move in moves]
        np.testing.assert_allclose(step.raw_scales, expected, atol=1e-8)
    else:
        assert step.raw_scales is None


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("compiled", [False, True])
def test_delta_takes_the_network_linearised_in_the_gates(compiled, float64):
    """Predictions y(0) + J d, against finite differences of the network in its gates, and so for the gradients."""
    model, (x, y) = self_tuning("delta", entropy_weight=0.0), digits_like()
    noise = np.random.default_rng(2).normal(size=(24, 3))
    scales = model.draws.scales().numpy()

    def logits(gates):
        return logits_of(model, x, gates)

    def linear(difference):
        return logits(0 * noise) + (logits(1e-5 * difference) - logits(-1e-5 * difference)) / 2e-5

    def loss(difference):
        return float(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, linear(difference)))

    function = model._steps.validation
    function = tf.function(function, autograph=False) if compiled else function
    step = function(tf.constant(x), tf.constant(y), None, tf.constant(noise))
    np.testing.assert_allclose(step.loss, loss(scales * noise), atol=1e-9)
    expected = [(loss(scales * noise + move) - loss(scales * noise - move)) / 2e-3 for move in 1e-3 * np.eye(3)]
    np.testing.assert_allclose(step.hyperparameters, expected, atol=1e-6)
    # Without noise the value is that of the elementary weights and the derivative that of the gates at zero.
    step = function(tf.constant(x), tf.constant(y), None)
    np.testing.assert_allclose(step.loss, loss(0 * noise), atol=1e-9)
    expected = [(loss(0 * noise + move) - loss(0 * noise - move)) / 2e-3 for move in 1e-3 * np.eye(3)]
    np.testing.assert_allclose(step.hyperparameters, expected, atol=1e-6)


@pytest.mark.slow
def test_delta_trains_recurrent_networks_inside_a_graph():
    rate = farhox.Hyperparameter(0.2, low=0.0, high=0.9, name="dropout")
    net = keras.Sequential([keras.Input((4, 3)), stn.Dropout(rate), stn.LSTM(5, [rate]), K.Dense(2)])
    model = stn.SelfTuningModel(net, method="delta")
    model.compile("sgd", "adam", "adam", loss="mse")
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("float32")
    y, noise = np.ones((6, 2), "float32"), np.ones((6, 1), "float32")
    eager, compiled = [function(tf.constant(x), tf.constant(y), None, tf.constant(noise)) for function in (
        model._steps.validation, tf.function(model._steps.validation, autograph=False))]
    np.testing.assert_allclose(eager.hyperparameters, compiled.hyperparameters, rtol=1e-4)
    before = [v.numpy() for v in model._network.response]
    model.training_step((x, y))
    assert all(not np.allclose(old, v) for old, v in zip(before, model._network.response))


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_a_training_step_moves_weights_and_statistics_and_a_validation_step_hyperparameters_alone(method):
    model, batch = self_tuning(method, batch_norm=True), digits_like()

    def changed(step):
        before = {v.path: v.numpy() for v in model.variables}
        step(batch)
        return {v.path for v in model.variables if not np.array_equal(before[v.path], v.numpy())}

    tuned = {v.path for v in [*model.draws.variables_of, model.draws.raw_scales]}
    others = {v.path for metric in model.metrics for v in metric.variables} | {
        model.draws.seed_generator.state.path, *(v.path for v in model.guard.variables)}
    trained = changed(model.training_step) - others
    everything = {v.path for v in model.model.variables}
    assert trained >= {v.path for v in model.model.trainable_variables}
    assert trained <= everything and any("moving_mean" in path for path in trained)
    assert {path for path in trained if "seed" in path}
    assert changed(model.validation_step) - others == tuned


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_compiled_steps_trace_once_and_do_what_eager_ones_do(method, float64):
    results = []
    for eager in (True, False):
        keras.utils.set_random_seed(0)
        model, batch = self_tuning(method), digits_like()
        model.run_eagerly = eager
        noise = np.random.default_rng(0).normal(size=(24, 3))
        losses = [float(step(batch, noise)) for _ in range(3) for step in (model.training_step, model.validation_step)]
        results.append(losses + [float(entry.numpy()) for entry in model.hyperparameters])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-9)
    assert [function.experimental_get_tracing_count() for function in model._functions.values()] == [1, 1]


def test_fit_alternates_steps_and_logs_hyperparameters_in_natural_units():
    model, data = self_tuning(metrics=["accuracy"], training_steps=3, validation_steps=2, warmup_steps=4), digits_like()
    history = model.fit(*data, batch_size=4, epochs=3, validation_data=digits_like(10, 1), verbose=0).history
    # 6 training batches an epoch: validation steps after the 3rd and the 6th, the first of them within warm-up.
    assert int(model.optimizer.iterations.numpy()) == 18
    assert int(model.hyper_optimizer.iterations.numpy()) == int(model.scale_optimizer.iterations.numpy()) == 10
    assert set(history) == {"loss", "outer_loss", "inner_loss", "skipped_updates", "accuracy", "val_loss",
                            "val_accuracy", "dropout", "holes", "decay"}
    assert history["loss"] == history["outer_loss"] != history["inner_loss"]
    for entry in model.hyperparameters:
        assert np.isclose(history[entry.name][-1], entry.numpy(), rtol=1e-5)
    assert all(np.isfinite(values).all() for values in history.values())
    result = model.evaluate(*digits_like(10, 1), verbose=0, return_dict=True)
    assert set(result) == {"loss", "accuracy"}
    np.testing.assert_allclose(result["loss"], history["val_loss"][-1], rtol=1e-5)


@pytest.mark.slow
def test_fit_takes_datasets_with_batches_of_other_sizes_and_sample_weights():
    model = self_tuning(training_steps=1)
    x, y = digits_like()
    weights = np.ones(24, "float32")
    train = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(8, drop_remainder=True)
    validation = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(5, drop_remainder=True)
    model.fit(train, epochs=2, validation_data=validation, verbose=0)
    assert int(model.hyper_optimizer.iterations.numpy()) == 6
    model.fit(x, y, sample_weight=weights, validation_data=(x, y, weights), batch_size=24, verbose=0)
    assert int(model.hyper_optimizer.iterations.numpy()) == 7


def test_training_and_validation_losses_can_differ(float64):
    """A training loss that reads a hyperparameter, a validation loss that does not; layers add to the first alone."""
    weight = farhox.Hyperparameter(0.5, low=0.0, name="weight")
    net = keras.Sequential([keras.Input((2,)), stn.Dense(1, [weight], kernel_regularizer=farhox.L1L2(l2=0.25))])
    model = stn.SelfTuningModel(net)
    model.compile("sgd", "adam", loss=lambda y, p: weight() * (y - p)[:, 0] ** 2, validation_loss="mae")
    x, y = np.ones((4, 2)), np.full((4, 1), 3.0)
    prediction, kernel = net(x).numpy()[0, 0], net.layers[0].realized_weights()["kernel"].numpy()
    loss = model.training_step((x, y), np.zeros((4, 1)))
    np.testing.assert_allclose(loss, 0.5 * (3 - prediction) ** 2 + 0.25 * np.sum(kernel ** 2), rtol=1e-6)
    prediction = net(x).numpy()[0, 0]
    np.testing.assert_allclose(model.validation_step((x, y)), abs(3 - prediction), rtol=1e-6)
    prediction = net(x).numpy()[0, 0]
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), abs(3 - prediction), rtol=1e-6)


def test_hyperparameters_of_weights_have_one_draw_per_batch():
    model = self_tuning()
    noise = model.draws.noise(5).numpy()
    assert len(set(noise[:, 2])) == 1 and len(set(noise[:, 0])) == len(set(noise[:, 1])) == 5
    connect, words, own = (farhox.Hyperparameter(0.2, low=0.0, high=0.9, name=name) for name in "abc")
    net = keras.Sequential([keras.Input((4,), dtype="int32"), stn.Embedding(5, 3, [connect, words, own], dropout=words),
                            stn.LSTM(3, [connect, words, own], recurrent_dropconnect=connect)])
    assert stn.SelfTuningModel(net).draws._one_draw == [True, True, False]
    assert stn.SelfTuningModel(net, one_draw=[own]).draws._one_draw == [True, True, True]


def test_a_discrete_hyperparameter_moves_and_is_used_floored():
    holes = farhox.Hyperparameter(1.5, low=0.0, high=4.0, discrete=True, name="holes")
    seen = []

    class Count(K.Layer):
        def call(self, inputs):
            seen.append(holes())
            return inputs

    net = keras.Sequential([keras.Input((2,)), Count(), stn.Dense(1, [holes])])
    model = stn.SelfTuningModel(net, initial_scale=2.0)
    model.compile("sgd", keras.optimizers.SGD(0.1), loss="mse")
    model.run_eagerly = True
    batch = np.ones((50, 2), "float32"), np.ones((50, 1), "float32")
    model.training_step(batch)
    assert seen[-1].shape == [50] and set(seen[-1].numpy()) == {0.0, 1.0, 2.0, 3.0}
    before = float(holes.natural_value())
    model.validation_step(batch)
    assert float(holes.natural_value()) != before


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_a_saved_model_goes_on_where_it_stopped(method, tmp_path):
    model, (x, y) = self_tuning(method, metrics=["accuracy"], warmup_steps=1), digits_like()
    model.run_eagerly = True  # Tracing would take longer than the steps.
    for step in (model.training_step, model.validation_step) * 2:
        step((x, y))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = True
    assert loaded.get_config()["method"] == method
    for one, other in zip(model.hyperparameters, loaded.hyperparameters):
        assert one is not other and np.array_equal(one.variable.numpy(), other.variable.numpy())
    assert {id(e) for layer in loaded._network.gated for e in layer.hyperparameters} == {
        id(e) for e in loaded.hyperparameters}
    np.testing.assert_array_equal(loaded(x), model(x))
    # Keras does not save where the random numbers of layers were.
    for one, other in zip(model.non_trainable_variables, loaded.non_trainable_variables):
        if "seed" in one.path:
            other.assign(one)
    batch, noise = (x, y), np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
    for step in ("training_step", "validation_step", "training_step"):
        np.testing.assert_allclose(getattr(loaded, step)(batch, noise), getattr(model, step)(batch, noise), rtol=1e-5)
    for one, other in zip(model.hyperparameters, loaded.hyperparameters):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6)
    assert set(loaded.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "accuracy"}


@pytest.mark.slow
def test_a_model_trains_in_half_precision_with_a_scaled_loss():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = self_tuning(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    finally:
        keras.config.set_dtype_policy("float32")
    data = digits_like()
    history = model.fit(*data, epochs=3, batch_size=8, validation_data=data, verbose=0).history
    assert history["inner_loss"][-1] < history["inner_loss"][0] < 3


@pytest.mark.slow
def test_scales_follow_the_entropy_and_stay_without_an_optimizer():
    model, batch = self_tuning(entropy_weight=100.0), digits_like()
    before = model.draws.scales().numpy()
    np.testing.assert_allclose(before, 0.5, rtol=1e-5)
    model.validation_step(batch)
    assert np.all(model.draws.scales().numpy() > before)
    model = self_tuning(scale_optimizer=None)
    model.validation_step(batch)
    np.testing.assert_array_equal(model.draws.scales().numpy(), before)


def test_a_hyperparameter_that_nothing_reads_is_an_error_that_names_it():
    idle = farhox.Hyperparameter(0.5, name="idle")
    model = stn.SelfTuningModel(keras.Sequential([keras.Input((8,)), stn.Dense(3, [idle])]))
    model.compile("sgd", "adam", loss="sparse_categorical_crossentropy")
    x, y = digits_like()
    with pytest.raises(ValueError, match="'idle' without any"):
        model.fit(x, y, validation_data=(x, y), verbose=0)


def plain():
    return keras.Sequential([keras.Input((8,)), K.Dense(3)], name="plain")


def tuned(**arguments):
    hyperparameter = farhox.Hyperparameter(0.5, name="inside")
    net = keras.Sequential([keras.Input((8,)), stn.Dense(3, [hyperparameter], name="first")])
    return stn.SelfTuningModel(net, **arguments)


@pytest.mark.parametrize("make, error, rule", [
    (lambda: stn.SelfTuningModel(K.Dense(3)), TypeError, "needs a built keras.Model"),
    (lambda: stn.SelfTuningModel(plain()), ValueError, "'plain' without any"),
    (lambda: tuned(hyperparameters=[farhox.Hyperparameter(1.0, name="other")]), ValueError,
     "layer 'first' with 'inside', which is none of \\['other'\\]"),
    (lambda: tuned(method="exact"), ValueError, "method must be one of"),
    (lambda: tuned(training_steps=0), ValueError, "training_steps must be a positive integer"),
    (lambda: tuned(warmup_steps=-1), ValueError, "warmup_steps must be a non-negative integer"),
    (lambda: tuned(initial_scale=0.0), ValueError, "initial_scale must be a positive"),
    (lambda: tuned().compile("sgd", "adam"), ValueError, "must be compiled with a loss"),
    (lambda: tuned().compile("sgd", "adam", loss=3), TypeError, "A loss must be the name"),
    (lambda: tuned().compile("sgd", "adam", loss="mse", response_optimizer="sgd"), ValueError, "Only method=\"delta\""),
    (lambda: tuned().training_step(digits_like()), ValueError, "must be compiled before training_step"),
    (lambda: tuned().fit(*digits_like(), validation_data=digits_like()), ValueError, "compiled before fit"),
])
def test_models_refuse_what_they_cannot_tune(make, error, rule):
    with pytest.raises(error, match=rule):
        make()


@pytest.mark.parametrize("arguments, rule", [
    ({}, "on validation data. Received: validation_data=None"),
    ({"validation_data": 3}, "validation_data must be a tf.data.Dataset"),
    ({"validation_data": (np.ones((4, 8)), np.ones(3))}, "one entry per example each. Received lengths"),
    ({"validation_data": tf.data.Dataset.from_tensors(np.ones((4, 8)))}, "must be a tuple \\(x, y\\)"),
    ({"validation_data": tf.data.Dataset.from_tensors((np.ones((4, 8)), 1.0))}, "cannot be split into examples"),
    ({"validation_data": tf.data.Dataset.from_tensors((np.ones((4, 8)), np.ones((4, 3)), np.ones(4)))},
     "the same structure and types"),
])
def test_fit_refuses_data_that_cannot_be_used_or_split(arguments, rule):
    model = self_tuning()
    with pytest.raises(ValueError, match=rule):
        model.fit(*digits_like(), verbose=0, **arguments)


def test_a_batch_by_hand_must_have_one_leading_axis():
    with pytest.raises(ValueError, match="cannot be split into examples"):
        self_tuning().training_step((np.ones((4, 8)), np.ones(3)))


def test_a_single_batch_of_keras_is_refused():
    with pytest.raises(ValueError, match="step by step with training_step"):
        self_tuning().train_on_batch(*digits_like())


def test_several_replicas_are_refused():
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = self_tuning()
    with pytest.raises(ValueError, match="trains on one replica"):
        model.fit(*digits_like(), validation_data=digits_like(), verbose=0)

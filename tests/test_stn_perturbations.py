"""Perturbing layers: one strength per example, what Keras computes at one strength, derivatives, saving."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import stn
from farhox._core import functional
from farhox.stn.strengths import kept

RANDOM = np.random.default_rng(0)
STRENGTHS = np.array([0.05, 0.2, 0.4, 0.8])


def hyperparameter(high=1.0, initial=0.2, name="strength", **arguments):
    return farhox.Hyperparameter(initial, low=0.0, high=high, name=name, **arguments)


def unconstrained(entry, values):
    return entry._unconstrained(np.asarray(values, float), entry.name)


def perturbed(layer, entry, x, values):
    """The outputs in training when every example has its own value of a hyperparameter."""
    return np.asarray(functional.call(
        lambda: layer(x, training=True), bindings=[], draws=[(entry.variable, unconstrained(entry, values))]).value)


def images(batch=4, size=9, seed=0, high=255.0):
    return np.random.default_rng(seed).uniform(0, high, (batch, size, size, 3)).astype("float32")


LAYERS = {
    "dropout": lambda s: stn.Dropout(s, seed=1),
    "spatial_dropout": lambda s: stn.Dropout(s, noise_shape=(None, 1, 1, None), seed=1),
    "noise": lambda s: stn.GaussianNoise(s, seed=1),
    "scale": lambda s: stn.RandomScale(s, seed=1),
    "brightness": lambda s: stn.RandomBrightness(s, seed=1),
    "contrast": lambda s: stn.RandomContrast(s, seed=1),
    "saturation": lambda s: stn.RandomSaturation(s, seed=1),
    "hue": lambda s: stn.RandomHue(s, seed=1),
    "translation": lambda s: stn.RandomTranslation(s, seed=1),
    "rotation": lambda s: stn.RandomRotation(s, seed=1),
}


def strength_of(name):
    return hyperparameter(0.5 if name == "hue" else 1.0)


@pytest.mark.parametrize("name", LAYERS)
def test_an_example_with_its_own_strength_is_perturbed_as_by_that_strength_for_all(name):
    # Random numbers depend on the seed and the shape of the batch alone.
    entry, x = strength_of(name), images()
    values = STRENGTHS * (0.5 if name == "hue" else 1.0)
    each = perturbed(LAYERS[name](entry), entry, x, values)
    for i, value in enumerate(values):
        same = np.asarray(LAYERS[name](float(value))(x, training=True))
        np.testing.assert_allclose(each[i], same[i], rtol=1e-4, atol=1e-3)
    assert len({round(float(np.abs(example - image).mean()), 3) for example, image in zip(each, x)}) > 1


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_happens_outside_of_training_nor_at_strength_zero(name):
    entry, x = strength_of(name), images()
    layer = LAYERS[name](entry)
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_allclose(LAYERS[name](0.0)(x, training=True), x, atol=2e-2, rtol=1e-4)
    assert layer.compute_output_shape(x.shape) == x.shape
    assert not np.allclose(layer(x, training=True), layer(x, training=True), atol=1e-3)


def layer_of_keras(kind, *arguments, **settings):
    layer = getattr(keras.layers, kind)(*arguments, seed=1, **settings)
    name = "factor" if hasattr(layer, "factor") or kind == "RandomRotation" else "height_factor"
    return lambda s: stn.Augmentation(layer, **{name: s})


DERIVATIVES = {
    **{name: make for name, make in LAYERS.items() if "dropout" not in name},
    "dropout by a factor": lambda s: stn.GaussianDropout(s, seed=1),
    "L2": lambda s: stn.ActivityRegularization(l2=s),
    **{f"translation, {mode}": layer_of_keras("RandomTranslation", 0.1, 0.3, mode) for mode in (
        "constant", "nearest", "wrap", "reflect")},
    "zoom": layer_of_keras("RandomZoom", (0.1, 0.2), fill_value=0.4, fill_mode="constant"),
    "to the nearest pixel": layer_of_keras("RandomRotation", 0.1, interpolation="nearest"),
}


# One of each way: noise, what moves pixels at two borders, what has no derivative.
@pytest.mark.parametrize("name", [
    name if name in ("noise", "rotation", "translation, wrap", "hue", "to the nearest pixel") else
    pytest.param(name, marks=pytest.mark.slow) for name in DERIVATIVES])
def test_a_differentiable_layer_has_an_exact_hypergradient_and_another_is_refused(name):
    keras.utils.set_random_seed(0)
    entry = hyperparameter(0.5 if name == "hue" else 0.9)
    layer = DERIVATIVES[name](entry)
    before = [keras.layers.Conv2D(3, 1)] if name in ("L2", "noise", "zoom") else []
    network = keras.Sequential([keras.Input([9, 9, 3]), *before, layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    x = np.random.default_rng(0).uniform(size=(3, 6, 9, 9, 3)).astype("float32")
    data, validation = (x, x.mean((2, 3, 4))[..., np.newaxis]), (x[0], np.ones([6, 1], "float32"))

    def loss(batch, training):
        return tf.reduce_mean(tf.square(batch[1] - network(batch[0], training=training))) + sum(network.losses)

    problem = farhox.BilevelProblem(
        lambda batch: loss(batch, True), lambda batch: loss(batch, False), network.trainable_variables, [entry],
        state_variables=network.non_trainable_variables, dynamics=farhox.GradientDescent(0.01))
    if not layer.differentiable:
        with pytest.raises(ValueError, match="needs the derivative of every operation"):
            farhox.ReverseHG().compute(problem, data, validation)
        return
    u, ends = entry.variable.numpy(), []
    for step in (4e-3, -4e-3):
        entry.variable.assign(u + step)
        ends.append(float(problem.evaluate(data, validation).outer_loss))
    entry.variable.assign(u)
    expected = (ends[0] - ends[1]) / 8e-3
    for method in (farhox.ReverseHG(), farhox.ForwardHG()):
        found = float(method.compute(problem, data, validation).gradients[0])
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("kind", [stn.Dropout, stn.AlphaDropout])
@pytest.mark.parametrize("stop_gradient, method", [
    ("exact", farhox.ReverseHG), ("tensorflow", farhox.ReverseHG), ("exact", farhox.ForwardHG)])
def test_the_hypergradient_of_a_rate_is_that_of_the_mean_over_masks(kind, stop_gradient, method):
    # All masks of three inputs in one batch, as often as they are drawn. After a step the outer objective is quadratic
    # in each entry of a mask, so that the mean over them is exact.
    rate = farhox.Hyperparameter(0.3, low=0.0, high=0.9, name="rate", dtype="float64")
    layer = kind(rate, dtype="float64")
    layer.build([8, 3])
    keeps = np.array([[i >> j & 1 for j in range(3)] for i in range(8)], "float64")
    layer.uniform = lambda shape, inputs: tf.constant(np.where(keeps, 0.95, 0.0))  # Kept at any rate, or dropped.
    x, target, direction = np.array([0.5, -1.0, 2.0]), 0.7, np.array([1.0, 2.0, -0.5])
    start, step = np.array([0.2, 0.4, -0.3]), 0.1
    weights = keras.Variable(start, dtype="float64")

    def chances(p):
        return np.prod(np.where(keeps, 1.0 - p, p), axis=1)

    def inner(batch):
        inputs = layer(tf.tile(batch[0][tf.newaxis], [8, 1]), training=True)
        errors = tf.linalg.matvec(inputs, tf.convert_to_tensor(weights)) - batch[1]
        return tf.reduce_sum(chances(0.3) * tf.square(errors))

    problem = farhox.BilevelProblem(
        inner, lambda batch: tf.reduce_sum(batch * tf.convert_to_tensor(weights)), [weights], [rate],
        dynamics=farhox.GradientDescent(step), stop_gradient=stop_gradient)
    result = method().compute(problem, (x[np.newaxis], np.array([target])), direction)

    def outer(p):
        """The mean of the outer objective over masks after the step, written down by itself."""
        if kind is stn.Dropout:
            inputs = x * keeps / (1.0 - p)
        else:
            least = -1.7580993408473766
            scale = 1.0 / np.sqrt((1.0 - p) * (1.0 + p * least ** 2))
            inputs = scale * (x * keeps + least * (1.0 - keeps)) - scale * least * p
        gradient = 2.0 * (chances(p) * (inputs @ start - target)) @ inputs
        return direction @ (start - step * gradient)

    slope = 0.9 * (0.3 / 0.9) * (1.0 - 0.3 / 0.9)  # Of the rate with respect to its variable.
    expected = slope * (outer(0.3 + 1e-5) - outer(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(float(result.gradients[0]), expected, rtol=1e-7)


def test_a_mask_that_keeps_or_drops_all_has_a_finite_derivative():
    for rate, uniform, expected in ((0.0, 0.5, -0.5), (1.0, 0.5, -0.5)):
        rate = tf.constant(rate)
        with tf.GradientTape() as tape:
            tape.watch(rate)
            mask = kept(tf.fill([3], uniform), rate)
        np.testing.assert_allclose(mask, 1.0 - rate)
        np.testing.assert_allclose(tape.gradient(mask, rate), 3 * expected)


@pytest.mark.one_case
@pytest.mark.parametrize("name", LAYERS)
def test_perturbing_layers_come_back_from_a_saved_model_and_share_hyperparameters(name, tmp_path):
    entry = strength_of(name)
    model = keras.Sequential([keras.Input((9, 9, 3)), LAYERS[name](entry), LAYERS[name](entry)])
    model.save(tmp_path / "model.keras")
    first, second = keras.models.load_model(tmp_path / "model.keras").layers
    held = [[value for value in vars(layer).values() if isinstance(value, farhox.Hyperparameter)]
            for layer in (first, second)]
    assert held[0][0] is held[1][0] and held[0][0].name == "strength"
    assert first.get_config()["seed"] == 1
    x = images(seed=3)
    np.testing.assert_array_equal(first(x, training=True), LAYERS[name](entry)(x, training=True))


@pytest.mark.parametrize("name, plain", [
    ("dropout", keras.layers.Dropout(0.2, seed=2)),
    ("noise", keras.layers.GaussianNoise(0.2, seed=2)),
    ("brightness", keras.layers.RandomBrightness(0.2, seed=2)),
    ("contrast", keras.layers.RandomContrast((0.2, 0.2), seed=2)),
    ("hue", keras.layers.RandomHue(0.4, seed=2)),  # Keras' factor 1 is half a turn.
    ("translation", keras.layers.RandomTranslation(0.2, 0.2, fill_mode="constant", seed=2)),
    ("rotation", keras.layers.RandomRotation(0.2, fill_mode="constant", seed=2)),
])
def test_perturbations_are_as_strong_as_those_of_keras(name, plain):
    """The mean change of many images, ours against Keras'."""
    x = images(batch=1500, size=4)
    changes = [np.abs(np.asarray(layer(x, training=True)) - x).mean()
               for layer in (LAYERS[name](strength_of(name)), plain)]
    np.testing.assert_allclose(changes[0], changes[1], rtol=0.08)


def test_a_quarter_turn_is_a_quarter_turn():
    x = images(batch=3)
    turned = np.concatenate([
        stn.Augmentation(keras.layers.RandomRotation((bound, bound), fill_mode="constant"), factor=abs(bound))(
            x[i:i + 1], training=True) for i, bound in enumerate([0.25, -0.25, 0.5])])
    options = {+1: np.rot90(x[0]), -1: np.rot90(x[0], -1)}
    way = min(options, key=lambda k: np.abs(options[k] - turned[0]).max())
    np.testing.assert_allclose(turned[0], options[way], atol=1e-2)
    np.testing.assert_allclose(turned[1], np.rot90(x[1], -way), atol=1e-2)
    np.testing.assert_allclose(turned[2], np.rot90(x[2], 2), atol=1e-2)


def test_each_example_loses_its_own_share_to_dropout_and_keeps_its_mean():
    entry, x = hyperparameter(), np.ones((4, 20000), "float32")
    dropped = perturbed(stn.Dropout(entry), entry, x, STRENGTHS)
    np.testing.assert_allclose((dropped == 0).mean(axis=1), STRENGTHS, atol=0.02)
    np.testing.assert_allclose(dropped.mean(axis=1), 1.0, atol=0.05)


def test_dropout_with_a_noise_shape_drops_the_same_features_at_all_steps():
    dropped = np.asarray(stn.Dropout(hyperparameter(), noise_shape=(None, 1, None))(np.ones((3, 5, 50)), training=True))
    np.testing.assert_array_equal(dropped, np.repeat(dropped[:, :1], 5, axis=1))
    assert 0 < (dropped == 0).mean() < 1


def test_the_scale_of_an_example_is_between_its_bounds_and_reaches_near_both():
    entry, x = hyperparameter(high=None), np.ones((4000, 2), "float32")
    scaled = perturbed(stn.RandomScale(entry), entry, x, np.full(4000, 0.5))
    assert np.all((scaled >= 1 / 1.5 - 1e-6) & (scaled <= 1.5 + 1e-6))
    assert scaled.min() < 0.68 and scaled.max() > 1.48
    np.testing.assert_array_equal(scaled[:, 0], scaled[:, 1])


@pytest.mark.parametrize("data_format, shape", [("channels_last", (4, 20, 30, 2)), ("channels_first", (4, 2, 20, 30))])
def test_cutout_sets_squares_of_the_floored_length_to_zero(data_format, shape):
    length = hyperparameter(high=10.0, initial=2.0, discrete=True, name="length")
    layer = stn.Cutout(length, 1, data_format=data_format, seed=0)
    cut = perturbed(layer, length, np.ones(shape, "float32"), [0.7, 1.2, 2.99, 5.5]) == 0
    cut = cut[:, 0] if data_format == "channels_first" else cut[..., 0]
    for example, side in zip(cut, [0, 1, 2, 5]):
        rows, columns = np.flatnonzero(example.any(axis=1)), np.flatnonzero(example.any(axis=0))
        assert len(rows) <= side and len(columns) <= side and example.sum() == len(rows) * len(columns)
        assert all(np.diff(indices).max(initial=1) == 1 for indices in (rows, columns))
    sizes = [np.asarray(stn.Cutout(6, 1, seed=s)(np.ones((1, 40, 40, 1), "float32"), training=True) == 0).sum()
             for s in range(20)]
    assert max(sizes) == 36


def test_cutout_makes_the_floored_number_of_holes_of_each_example():
    holes = hyperparameter(high=4.0, initial=2.0, discrete=True, name="holes")
    # Far apart on so large an image, single pixels hardly ever meet.
    cut = perturbed(stn.Cutout(1, holes, seed=0), holes, np.ones((4, 200, 200, 1), "float32"), [0.5, 1.9, 2.1, 3.99])
    np.testing.assert_array_equal((cut == 0).sum(axis=(1, 2, 3)), [0, 1, 2, 3])


def test_activity_regularization_weighs_each_example_in_training_alone():
    l2, temporal = hyperparameter(high=None, name="l2"), hyperparameter(high=None, name="temporal")
    layer = stn.ActivityRegularization(l1=0.5, l2=l2, temporal=temporal)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")

    def penalty():
        layer(x, training=True)
        return tf.add_n(layer.losses)

    weights = np.array([0.1, 2.0])
    value = functional.call(penalty, bindings=[], draws=[
        (l2.variable, unconstrained(l2, weights)), (temporal.variable, unconstrained(temporal, weights[::-1]))]).value
    expected = (0.5 * np.mean(np.abs(x)) + np.mean(weights * np.mean(x ** 2, axis=(1, 2)))
                + np.mean(weights[::-1] * np.mean(np.diff(x, axis=1) ** 2, axis=(1, 2))))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(layer(x), x)
    again = stn.ActivityRegularization.from_config(layer.get_config())
    assert again.l1 == 0.5 and again.l2.name == "l2"
    again(x)
    assert again.losses == []


@pytest.mark.parametrize("sparse", [True, False])
def test_labels_are_smoothed_example_by_example(sparse):
    smoothing = hyperparameter(name="smoothing")
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(4, 6, 3)).astype("float32"), random.integers(0, 3, (4, 6))
    one_hot = np.eye(3, dtype="float32")[labels]
    loss = stn.LabelSmoothing(smoothing, sparse=sparse, reduction=None)
    targets = labels if sparse else one_hot
    values = functional.call(lambda: loss(targets, logits), bindings=[], draws=[
        (smoothing.variable, unconstrained(smoothing, STRENGTHS))]).value
    for i, value in enumerate(STRENGTHS):
        plain = keras.losses.CategoricalCrossentropy(True, label_smoothing=value, reduction=None)
        np.testing.assert_allclose(values[i], plain(one_hot[i], logits[i]), rtol=1e-5)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    np.testing.assert_allclose(again(targets, logits), loss(targets, logits), rtol=1e-6)
    if sparse:
        np.testing.assert_allclose(loss(labels[..., np.newaxis], logits), loss(labels, logits), rtol=1e-6)


@pytest.mark.parametrize("make, error, rule", [
    (lambda: stn.Dropout(1.5), ValueError, "rate of 'dropout.*' must stay between 0.0 and 1.0"),
    (lambda: stn.Dropout(farhox.Hyperparameter(0.5, low=0.0)), ValueError, "must stay between"),
    (lambda: stn.Dropout("0.5"), TypeError, "must be a number or a farhox.Hyperparameter"),
    (lambda: stn.Dropout(hyperparameter(initial=[0.1, 0.2])), ValueError, "must be a scalar hyperparameter"),
    (lambda: stn.GaussianNoise(-0.1), ValueError, "stddev of"),
    (lambda: stn.RandomHue(hyperparameter()), ValueError, "between 0.0 and 0.5"),
    (lambda: stn.Cutout(hyperparameter(high=5.0)), ValueError, "length of .* counts.*discrete=True"),
    (lambda: stn.Cutout(3, hyperparameter(high=None, discrete=True)), ValueError, "needs a hyperparameter with a high"),
    (lambda: stn.LabelSmoothing(hyperparameter(high=None)), ValueError, "smoothing must stay between 0.0 and 1.0"),
])
def test_strengths_out_of_range_are_refused(make, error, rule):
    with pytest.raises(error, match=rule):
        make()

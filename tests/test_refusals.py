"""What has no exact hypergradient is refused by name; what looks as if it had none and has one is exact."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable
from unrolled import finite_differences

import farhox

layers = keras.layers
R = np.random.default_rng(0)
IMAGES = R.random((2, 6, 5, 3))


class Function(layers.Layer):
    def __init__(self, function):
        super().__init__(name="own")
        self.function = function

    def call(self, x):
        return tf.cast(self.function(x), x.dtype)


def rate_problem(function, loss=None):
    """One rate and a small convolution in front of a function of [2, 6, 5, 3]."""
    keras.utils.set_random_seed(0)
    rate = farhox.Hyperparameter(0.5, low=0.0, log=True, name="rate")
    model = keras.Sequential([keras.Input([6, 5, 3]), layers.Conv2D(3, 1), Function(function)])
    return farhox.supervised_problem(
        model, loss or (lambda target, prediction: tf.reduce_mean(tf.square(tf.tanh(prediction) - 0.3))),
        dynamics=farhox.GradientDescent(rate), outer_variables=[rate])


def as_float32(function):
    return lambda x: function(tf.cast(x, tf.float32))


BOXES = [[0.0, 0.0, 1.0, 1.0], [0.1, 0.0, 0.8, 1.0]]


@pytest.mark.parametrize("function, kind", [
    (as_float32(tf.nn.lrn), "LRNGrad at .*own"),
    (lambda x: tf.image.crop_and_resize(as_float32(tf.identity)(x), BOXES, [0, 1], [4, 4]), "CropAndResizeGradImage"),
    (lambda x: tf.nn.max_pool_with_argmax(x, 2, 2, "SAME")[0], "MaxPoolGradWithArgmax"),
    (lambda x: tf.nn.dilation2d(x, tf.zeros([2, 2, 3], x.dtype), [1] * 4, "SAME", "NHWC", [1] * 4),
     "Dilation2DBackprop"),
    (lambda x: tf.math.igamma(tf.nn.sigmoid(x) + 1.0, tf.nn.sigmoid(x)), "IgammaGradA"),
    (lambda x: tf.image.adjust_saturation(tf.nn.sigmoid(x), 0.5), "AdjustSaturation"),
    (lambda x: tf.image.adjust_hue(tf.nn.sigmoid(x), 0.1), "AdjustHue"),
    (lambda x: x + tf.image.hsv_to_rgb(tf.nn.sigmoid(x)), "HSVToRGB .* as a constant"),
    (lambda x: x + tf.sparse.to_dense(tf.sparse.add(tf.sparse.from_dense(x[0, 0]), tf.sparse.from_dense(x[1, 0]))),
     "SparseAddGrad .* as a constant"),
    (lambda x: tf.math.betainc(tf.nn.sigmoid(x), tf.nn.sigmoid(x), tf.nn.sigmoid(x)), "Betainc .* its input 0"),
    (lambda x: x + tf.raw_ops.LinSpace(start=x[0, 0, 0, 0], stop=x[1, 0, 0, 0], num=3), "LinSpace .* as a constant"),
], ids=["lrn", "crop", "argmax", "dilation", "igamma", "saturation", "hue", "hsv", "sparse", "betainc", "linspace"])
def test_operations_without_the_derivatives_that_are_needed_are_named(function, kind, float64):
    problem = rate_problem(function)
    with pytest.raises(ValueError, match=f"A hypergradient needs the derivative of every operation.*{kind}"):
        farhox.ReverseHG().compute(problem, farhox.repeat((IMAGES, np.zeros(2)), 2), (IMAGES, np.zeros(2)))


def test_a_loss_that_tensorflow_differentiates_once_only_is_named(float64):
    rate = farhox.Hyperparameter(0.05, low=0.0, log=True, name="rate")
    model = keras.Sequential([keras.Input([6, 3]), layers.Dense(4)])
    problem = farhox.supervised_problem(
        model, keras.losses.CTC(), dynamics=farhox.GradientDescent(rate), outer_variables=[rate])
    batch = R.normal(size=(2, 6, 3)), np.array([[1, 2], [3, 1]], "int32")
    with pytest.raises(ValueError, match="TensorFlow has none for a part of the operation .*ctc"):
        farhox.ReverseHG().compute(problem, farhox.repeat(batch, 2), batch)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.hypergradients.ForwardHG()], ids=["reverse", "forward"])
def test_masks_of_minus_infinity_leave_the_second_derivative_finite(method, float64):
    """The third example has no partner of its class: the logarithm of zero, which the loss masks."""
    keras.utils.set_random_seed(0)
    rate = farhox.Hyperparameter(0.5, low=0.0, log=True, name="rate")
    model = keras.Sequential([keras.Input([5]), layers.Dense(3), layers.UnitNormalization()])
    problem = farhox.supervised_problem(
        model, keras.losses.Circle(), dynamics=farhox.GradientDescent(rate), outer_variables=[rate])
    batch = R.normal(size=(4, 5)), np.array([0, 1, 2, 0])
    report = farhox.check_hypergradient(problem, farhox.repeat(batch, 2), batch, method)
    assert report.maximum_error < 1e-6


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["CONSTANT", "REFLECT", "WRAP", "NEAREST"])
@pytest.mark.parametrize("interpolation", ["NEAREST", "BILINEAR"])
def test_what_moves_pixels_goes_back_by_its_adjoint(mode, interpolation):
    """<A x, u> = <x, A'u> for transformations that enlarge, shrink, turn, tilt and leave the image."""
    random = np.random.default_rng(1)
    transforms = random.normal(size=(6, 8)) * [0.4, 0.3, 5.0, 0.3, 0.4, 5.0, 0.02, 0.02] + [1, 0, 0, 0, 1, 0, 0, 0]
    images, cotangent = random.random((6, 5, 4, 2)), random.random((6, 4, 6, 2))

    @tf.function(autograph=False)
    def both(images, cotangent):
        graph = tf.compat.v1.get_default_graph()
        with graph.gradient_override_map({"ImageProjectiveTransformV3": "FarhoxImageProjectiveTransform"}):
            moved = tf.raw_ops.ImageProjectiveTransformV3(
                images=images, transforms=tf.constant(transforms, tf.float32), output_shape=[4, 6], fill_value=0.0,
                interpolation=interpolation, fill_mode=mode)
        return moved, tf.gradients(moved, images, cotangent)[0]

    moved, back = both(tf.constant(images), tf.constant(cotangent))
    assert float(tf.reduce_sum(moved)) > 1.0
    np.testing.assert_allclose(np.sum(moved * cotangent), np.sum(images * back), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("make", [
    lambda: layers.RandomZoom((-0.4, -0.3), seed=1), lambda: layers.RandomTranslation(0.4, 0.4, "wrap", seed=3)],
    ids=["zoom", "translation"])
def test_learned_images_are_exact_through_layers_that_move_pixels(make, float64):
    """In the inner objective and in the outer one."""
    keras.utils.set_random_seed(0)
    layer, images = make(), farhox.Hyperparameter(R.random((2, 6, 6, 1)), name="images")
    kernel = keras.Variable(R.normal(size=(36, 1)), name="kernel")

    def loss(shift):
        seen = tf.reshape(layer(images(), training=True), [2, 36])
        return tf.reduce_mean(tf.square(seen @ tf.convert_to_tensor(kernel) - shift))

    problem = farhox.BilevelProblem(
        loss, loss, [kernel], [images], farhox.GradientDescent(0.02), state_variables=layer.non_trainable_variables)
    shift = np.array([[1.0], [-1.0]])
    report = farhox.check_hypergradient(problem, farhox.repeat(shift, 1), 2 * shift, farhox.ReverseHG(), step_size=1e-2,
                                        max_entries=5)
    assert report.maximum_error < 1e-4  # Keras' weights of pixels are float32, hence the wide step.


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.hypergradients.ForwardHG()], ids=["reverse", "forward"])
def test_rematerialised_layers_run_as_they_are(method, float64):
    def hypergradient(mode, own=False):
        keras.utils.set_random_seed(1)
        rate = farhox.Hyperparameter(0.1, low=0.0, log=True, name="rate")
        with keras.RematScope(mode=mode):
            model = keras.Sequential([
                keras.Input([3]), layers.Dense(4, activation="tanh"), layers.BatchNormalization(), layers.Dense(1)])
        dense, norm, last = model.layers
        hidden = tf.recompute_grad(lambda x: tf.tanh(x @ dense.kernel + dense.bias)) if own else dense

        def loss(batch):
            return tf.reduce_mean(tf.square(last(norm(hidden(batch[0]), training=True)) - batch[1]))

        problem = farhox.BilevelProblem(
            loss, loss, model.trainable_variables, [rate], farhox.GradientDescent(rate),
            state_variables=model.non_trainable_variables)
        batch = IMAGES[0].reshape(-1, 3), IMAGES[1, :, :, :1].reshape(-1, 1)
        return method.compute(problem, farhox.repeat(batch, 2), batch).gradients

    plain = hypergradient(None)
    assert_close(hypergradient("full"), plain, 1e-12)
    assert_close(hypergradient("activations"), plain, 1e-12)
    assert_close(hypergradient(None, own=True), plain, 1e-12)


def traced(function, *shapes):
    """A `ConcreteFunction`, whose Python function cannot be called again."""
    return tf.function(function).get_concrete_function(*[tf.TensorSpec(shape, "float64") for shape in shapes])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("function, words", [
    (lambda w, s: s * tf.reduce_sum(tf.stop_gradient(w) * w**2), "StopGradient.*leaves a part out.*'[^']*' calls"),
    (lambda w, s: s * tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(w), w)),
     "SoftmaxCrossEntropyWithLogits.*leaves a part out"),
    (lambda w, s: s * tf.reduce_sum(w**2) * tf.random.normal([], dtype="float64"), "RandomStandardNormal.*draws from"),
    (lambda w, s: s * tf.reduce_sum(tf.numpy_function(np.sin, [w], "float64")) + tf.reduce_sum(w**2),
     "PyFunc.*calls Python")], ids=["stop", "labels", "draw", "python"])
def test_what_a_function_that_was_traced_before_hides_is_refused(function, words, nested):
    w, strength = variable([0.7, -0.4], name="w"), variable(0.3, name="strength")
    call = traced(function, [2], [])
    if nested:
        inside = call
        call = traced(lambda w, s: tf.cond(s > 0, lambda: inside(w, s), lambda: s * tf.reduce_sum(w)), [2], [])
    problem = farhox.BilevelProblem(
        lambda _: call(w.value, strength.value), lambda _: tf.reduce_sum(w**2), [w], [strength],
        farhox.GradientDescent(0.1))
    with pytest.raises(ValueError, match=words):
        farhox.ReverseHG().compute(problem, farhox.repeat(tf.zeros([1]), 2), tf.zeros([1]))


def test_a_function_that_was_traced_before_is_exact_where_no_rule_is_needed(float64):
    w, strength = variable([0.7, -0.4], name="w"), variable(0.3, name="strength")
    penalty = traced(lambda w, s: s * tf.reduce_sum(tf.tanh(w)**2 * w), [2], [])
    teacher = traced(lambda x: tf.stop_gradient(tf.sin(x)) * 2.0, [2])  # Nothing that is learned passes it.
    stopped = traced(lambda w, s: s * tf.reduce_sum(tf.stop_gradient(w) * w), [2], [])

    def problem(loss, **arguments):
        return farhox.BilevelProblem(loss, lambda _: tf.reduce_sum(w**2), [w], [strength], farhox.GradientDescent(0.1),
                                     **arguments)

    ones = tf.ones([2], "float64")
    batches = farhox.repeat(ones, 3), ones
    own = problem(lambda x: penalty(w.value, strength.value) + tf.reduce_sum((w - teacher(x))**2))
    assert_close(farhox.ReverseHG().compute(own, *batches).gradients, finite_differences(own, *batches), 1e-7)
    # As a constant the stopped factor is no reason to refuse: g = s c with c = w, so dw_1/ds = -0.1 w.
    as_constant = problem(lambda _: stopped(w.value, strength.value), stop_gradient="tensorflow")
    one_step = farhox.repeat(ones, 1), ones
    expected = np.sum(2 * np.array([0.7, -0.4]) * (1 - 0.03) * -0.1 * np.array([0.7, -0.4]))
    assert_close(farhox.ReverseHG().compute(as_constant, *one_step).gradients, [expected], 1e-6)


def test_a_reversed_gradient_by_a_stop_has_the_hypergradient_of_the_training_that_happens(float64):
    w, strength = variable([0.7, -0.4], name="w"), variable(0.3, name="strength")

    def reversed_gradient(x):
        return -strength * x + tf.stop_gradient(x + strength * x)

    problem = farhox.BilevelProblem(
        lambda x: tf.reduce_sum(tf.tanh(reversed_gradient(tf.convert_to_tensor(w))) ** 2) + tf.reduce_sum((w - x) ** 2),
        lambda x: tf.reduce_sum(w**2), [w], [strength], farhox.GradientDescent(0.1))
    arguments = problem, farhox.repeat(tf.ones([2]), 3), tf.ones([2])
    assert_close(farhox.ReverseHG().compute(*arguments).gradients, finite_differences(*arguments), 1e-7)


def test_a_custom_gradient_is_obeyed_where_variables_are_arguments_and_refused_where_they_are_hidden(float64):
    w = keras.Variable(np.ones(1), name="w")
    rate = farhox.Hyperparameter(0.1, low=0.0, log=True, name="rate")

    @tf.custom_gradient
    def hidden(x):
        return x * w, lambda upstream: upstream

    @tf.custom_gradient
    def clipped(x, weight):
        return x * weight, lambda upstream: (upstream, tf.clip_by_value(upstream * x, -1.0, 1.0))

    def problem(loss):
        return farhox.BilevelProblem(loss, lambda _: tf.reduce_sum(w**2), [w], [rate], farhox.GradientDescent(rate))

    one = np.ones(1)
    with pytest.raises(ValueError, match="variables must be passed to it. 'hidden' reads w"):
        farhox.ReverseHG().compute(problem(lambda x: tf.reduce_sum(hidden(x)**2)), farhox.repeat(one, 2), one)
    with pytest.warns(UserWarning, match="gives 'clipped' counts as its derivative.*write it with tf.stop_gradient"):
        result = farhox.ReverseHG().compute(
            problem(lambda x: tf.reduce_sum(clipped(x, tf.convert_to_tensor(w))**2)), farhox.repeat(one, 2), one)
    # The clipped gradient is 1 in both steps: w_2 = 1 - 2 rate, and d w_2^2 / d log(rate) = -4 rate w_2.
    assert_close(result.gradients, [-0.4 * 0.8], 1e-12)


def drop_problem(perturbed, fixed=False):
    """A rate that `perturbed(hidden activations, rate)` reads in training; weights of two dense layers."""
    rate = farhox.Hyperparameter(0.3, low=0.0, high=0.9, name="rate")
    hidden, head = layers.Dense(5), layers.Dense(1)
    hidden.build([None, 4])
    head.build([None, 5])

    def loss(batch):
        return tf.reduce_mean(tf.square(head(perturbed(hidden(batch[0]), rate())) - batch[1]))

    speed = farhox.Hyperparameter(0.1, low=0.0, log=True, name="learning_rate")
    return farhox.BilevelProblem(
        loss, lambda batch: tf.reduce_mean(tf.square(head(hidden(batch[0])) - batch[1])),
        hidden.trainable_variables + head.trainable_variables, [speed] if fixed else [rate, speed],
        fixed=[rate] if fixed else [], dynamics=farhox.GradientDescent(speed))


def with_a_mask_of_its_own_derivative(x, rate):
    @tf.custom_gradient
    def mask(rate):
        keeps = tf.cast(tf.random.stateless_uniform(tf.shape(x), [1, 2]) >= rate, x.dtype)
        return keeps, lambda upstream: -tf.reduce_sum(upstream)
    return x * mask(rate)


DRAWS = {
    "dropout": lambda x, rate: tf.nn.experimental.stateless_dropout(x, rate, seed=[1, 2]),
    "skipped": lambda x, rate: tf.where(
        1.0 - rate > 2.0 * tf.random.stateless_uniform([tf.shape(x)[0], 1], [1, 2]) - 0.5, x, tf.zeros_like(x)),
    "normal": lambda x, rate: x * tf.cast(tf.random.stateless_normal([5], [1, 2]) < rate, x.dtype),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("method", [farhox.ReverseHG, farhox.ForwardHG])
def test_a_draw_that_is_compared_with_an_outer_variable_is_refused(name, method):
    data = R.normal(size=(2, 3, 4)).astype("float32"), np.ones([2, 3, 1], "float32")
    with pytest.raises(ValueError, match="is compared with an outer variable has no derivative.* depends on rate"):
        method().compute(drop_problem(DRAWS[name]), data, (data[0][0], data[1][0]))
    # What is fixed needs no derivative.
    result = method().compute(drop_problem(DRAWS[name], fixed=True), data, (data[0][0], data[1][0]))
    assert np.all(np.isfinite(result.gradients))


@pytest.mark.filterwarnings("ignore:The gradient that tf.custom_gradient gives")
@pytest.mark.parametrize("perturbed", [
    lambda x, rate: tf.where(tf.random.stateless_normal([3, 5], [1, 2]) * x > rate, x, rate * tf.ones_like(x)),
    lambda x, rate: tf.nn.experimental.stateless_dropout(x, 0.2, seed=[1, 2]) * rate,
    with_a_mask_of_its_own_derivative], ids=["activations", "constant rate", "custom gradient"])
def test_other_comparisons_are_not_refused(perturbed):
    data = R.normal(size=(2, 3, 4)).astype("float32"), np.ones([2, 3, 1], "float32")
    result = farhox.ReverseHG().compute(drop_problem(perturbed), data, (data[0][0], data[1][0]))
    assert np.all(np.isfinite(result.gradients)) and float(result.gradients[0]) != 0.0

"""The protocol of outer variables: a user's own one as a setting, values read as those of a Keras variable."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from unrolled import finite_differences

import farhox
from farhox import meta, stn

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=[6, 3])
Y = np.array([0, 1, 2, 3, 1, 0])
DATA = farhox.repeat((X, Y), 3), (GENERATOR.normal(size=[5, 3]), np.array([3, 2, 1, 0, 0]))


class Decaying(farhox.OuterVariable):
    """exp(u) 0.5^step, written with Keras' own operations."""

    def __init__(self, initial, name="decaying"):
        super().__init__(np.log(initial), name, "float64", low=0.0)

    def natural_value(self):
        return keras.ops.exp(self.variable)

    def value(self, step=None):
        decay = 1.0 if step is None else 0.5 ** tf.cast(step, "float64")
        return self.natural_value() * decay


@keras.saving.register_keras_serializable("tests")
class Own(farhox.OuterVariable):
    """What a `Hyperparameter` is with `log=True`, or with two bounds, written anew with its operations."""

    def __init__(self, initial, high=None, name="own", dtype="float64"):
        share = initial if high is None else initial / high
        u = np.log(initial) if high is None else np.log(share) - np.log1p(-share)
        super().__init__(u, name, dtype, low=0.0, high=high)
        self.log = high is None

    def natural_value(self):
        u = tf.convert_to_tensor(self.variable)
        return tf.exp(u) if self.high is None else self.high * tf.sigmoid(u)

    def get_config(self):
        return {"initial": self.numpy().tolist(), "high": self.high, "name": self.name, "dtype": self.variable.dtype}


def plain(initial, high=None, name="own", dtype="float64"):
    """The `Hyperparameter` that `Own` is to be told from by nothing."""
    return farhox.Hyperparameter(np.float64(initial), low=0.0, high=high, log=high is None, name=name, dtype=dtype)


def classifier(regularizer=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input([3], dtype="float64"), keras.layers.Dense(
        4, "softmax", kernel_regularizer=regularizer, dtype="float64")])


def every_setting(make):
    """Hypergradients of a hyperparameter in every place that takes one."""
    rate, momentum, decay, strength, proximal = make(0.3), make(0.7, 1.0), make(0.01), make(0.02), make(0.1)
    weights = make(np.array([0.5, 2.0, 1.0, 3.0]))
    problem = farhox.supervised_problem(
        classifier(farhox.L1L2(l2=strength)), proximal=proximal, class_weights=weights,
        dynamics=farhox.KerasDynamics(
            keras.optimizers.SGD(), learning_rate=rate, momentum=momentum, weight_decay=decay),
        outer_variables=[rate, momentum, decay, strength, proximal, weights])
    return farhox.ReverseHG().compute(problem, *DATA).gradients


def own_dynamics(make):
    """Derivatives of a step of each of farhox' dynamics with respect to its settings."""
    rates, momentum, strength = [make(0.3), make(0.2)], make(0.7, 1.0), make(0.03)
    variables = [keras.Variable([0.5, -1.0], dtype="float64"), keras.Variable(2.0, dtype="float64")]
    values, gradients = [tf.convert_to_tensor(v) for v in variables], [tf.constant([0.3, -0.2], tf.float64)] * 2
    found = []
    for dynamics in (
            farhox.Momentum(rates, momentum, nesterov=True), farhox.Adam(rates[0], beta_1=momentum),
            farhox.dynamics.BacktrackingGradientDescent(rates[1]),
            farhox.dynamics.ProximalGradient(rates[0], farhox.dynamics.L1(strength))):
        more = [lambda w: tf.reduce_sum(w[0] ** 2)] if dynamics.needs_objective else []
        with tf.GradientTape() as tape:
            slots = tf.nest.map_structure(lambda m: m + 0.1 if m.dtype.is_floating else m,
                                          dynamics.initial_slots(values))
            new, _ = dynamics.bound_to(variables).update(
                gradients, values, slots, tf.constant(2, tf.int64), *more)
        own = [entry.variable.value for entry in (*rates, momentum, strength)]
        found += new + [part for part in tape.gradient(new, own) if part is not None]
    assert len(found) == 4 * 2 + 3 + 2 + 1 + 2
    return found


def self_tuned(make):
    """Where two updates of a self-tuning network take a rate of dropout and a strength of L2."""
    keras.utils.set_random_seed(0)
    tuned = [make(0.3, 0.9, "dropout", "float32"), make(0.01, None, "strength", "float32")]
    network = keras.Sequential([keras.Input([3]), stn.Dense(5, tuned, kernel_regularizer=farhox.L1L2(l2=tuned[1])),
                                stn.Dropout(tuned[0], seed=1), stn.Dense(4, tuned, activation="softmax")])
    model = stn.SelfTuningModel(network, one_draw=[tuned[1]])
    model.compile("sgd", keras.optimizers.SGD(0.5), loss="sparse_categorical_crossentropy", run_eagerly=True)
    for _ in range(2):
        model.training_step((X.astype("float32"), Y))
        model.validation_step((X.astype("float32"), Y))
    return [entry.variable for entry in tuned]


@pytest.mark.one_case
@pytest.mark.parametrize("use", [own_dynamics, every_setting, self_tuned], ids=lambda use: use.__name__)
def test_an_own_outer_variable_is_told_from_a_hyperparameter_by_no_bit(use):
    own, same = use(Own), use(plain)
    assert len(own) == len(same) and all(np.any(keras.ops.convert_to_numpy(value) != 0) for value in own)
    for one, other in zip(own, same):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other))


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("learner, setting", [
    (meta.MAML, "inner_learning_rate"), (meta.ANIL, "inner_learning_rate"), (meta.IMAML, "proximal")])
def test_an_own_outer_variable_is_learned_by_learners(learner, setting):
    own = Own(0.3, dtype="float32")
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2), keras.layers.Dense(4, "softmax")])
    problem = learner(model, **{setting: own}).problem
    assert problem.hyperparameters == [own]
    assert own is (problem.proximal if setting == "proximal" else problem.dynamics.learning_rate)


class TwiceSchedules(keras.optimizers.SGD):
    """Asks, as Adafactor does, whether the learning rate is a schedule."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, 2 * learning_rate if callable(self._learning_rate) else learning_rate)


@pytest.mark.parametrize("changes", [False, True])
def test_an_optimizer_is_told_whether_an_own_outer_variable_is_a_schedule(changes):
    rate, w = Own(0.25), keras.Variable([0.5, -1.0], dtype="float64")
    rate.changes_with_step = changes
    dynamics = farhox.KerasDynamics(TwiceSchedules(), learning_rate=rate).bound_to([w])
    values = [tf.convert_to_tensor(w)]
    new, _ = dynamics.update([tf.constant([1.0, 2.0], tf.float64)], values, dynamics.initial_slots(values),
                             tf.constant(0, tf.int64))
    np.testing.assert_allclose(w - new[0], np.array([1.0, 2.0]) * (0.5 if changes else 0.25), rtol=1e-6)


# A Keras optimizer computes with rates in float32, which finite differences show.
@pytest.mark.one_case
@pytest.mark.parametrize("dynamics, tolerance", [
    (farhox.GradientDescent, 1e-8), (farhox.Momentum, 1e-8),
    (lambda rate: farhox.KerasDynamics(keras.optimizers.SGD(), learning_rate=rate), 1e-4)],
    ids=["GradientDescent", "Momentum", "KerasDynamics"])
def test_an_own_outer_variable_is_a_learning_rate_with_a_value_for_each_step(dynamics, tolerance):
    rate = Decaying(0.4)
    problem = farhox.supervised_problem(classifier(), dynamics=dynamics(rate), outer_variables=[rate])
    gradients = farhox.ReverseHG().compute(problem, *DATA).gradients
    assert abs(gradients[0].numpy()) > 1e-4
    assert_close(gradients, finite_differences(problem, *DATA), tolerance)
    schedule = farhox.LearnedSchedule(3, [0.4, 0.2, 0.1], dtype="float64")
    same = farhox.supervised_problem(classifier(), dynamics=dynamics(schedule), outer_variables=[schedule])
    parts = farhox.ReverseHG().compute(same, *DATA).gradients[0]
    np.testing.assert_allclose(gradients[0], np.sum(parts), rtol=1e-10)


@pytest.mark.slow
def test_an_own_outer_variable_is_a_proximal_strength_and_a_weight_of_classes():
    strength, weights = Decaying(0.3), Decaying([0.5, 2.0, 1.0, 3.0], "weights")
    problem = farhox.supervised_problem(
        classifier(), dynamics=farhox.GradientDescent(0.5), outer_variables=[strength], proximal=strength,
        class_weights=weights)
    gradients = farhox.ReverseHG().compute(problem, *DATA).gradients
    assert [v is w.variable for v, w in zip(problem.outer_variables, (strength, weights))] == [True, True]
    assert all(np.all(np.abs(gradient) > 1e-7) for gradient in gradients)
    assert_close(gradients, finite_differences(problem, *DATA), 1e-7)


def test_an_own_outer_variable_is_tuned_and_logged_in_natural_units_by_fit():
    rate = Decaying(0.4)
    problem = farhox.supervised_problem(classifier(), dynamics=farhox.GradientDescent(rate), outer_variables=[rate])
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    history = optimizer.fit(DATA, epochs=1, verbose=0).history
    np.testing.assert_allclose(history["decaying"], [np.exp(rate.variable.numpy())], rtol=1e-6)
    assert history["decaying"] != [pytest.approx(0.4, rel=1e-4)]


@pytest.mark.parametrize("take, error, rule", [
    (lambda entry: farhox.GradientDescent(entry), TypeError, "learning_rate must be a float"),
    (lambda entry: farhox.Momentum(0.1, momentum=entry), TypeError, "momentum must be a float"),
    (lambda entry: farhox.supervised_problem(classifier(), outer_variables=[entry], proximal=entry), TypeError,
     "proximal must be a float"),
    (lambda entry: farhox.supervised_problem(classifier(), class_weights=entry), TypeError,
     "class_weights must be"),
    (lambda entry: entry.value(), TypeError, r"asked for by their index, example_weights\(indices\)")])
def test_weights_of_examples_are_no_setting(take, error, rule):
    with pytest.raises(error, match=rule):
        take(farhox.ExampleWeights(4))


def test_a_schedule_is_no_strength_that_does_not_change():
    schedule = farhox.LearnedSchedule(3)
    with pytest.raises(ValueError, match="has a value at each inner step"):
        schedule.value()
    with pytest.raises(TypeError, match="proximal must be a float"):
        farhox.supervised_problem(classifier(), outer_variables=[schedule], proximal=schedule)


def test_an_own_outer_variable_is_saved_where_it_says_how_and_an_error_says_so_elsewhere(tmp_path):
    model = classifier(farhox.L1L2(l2=Own(0.25)))
    model.save(tmp_path / "model.keras")
    strength = keras.models.load_model(tmp_path / "model.keras").layers[0].kernel_regularizer.l2
    assert isinstance(strength, Own) and strength.numpy() == pytest.approx(0.25, rel=1e-15)
    with pytest.raises(NotImplementedError, match="Decaying must have get_config and be registered"):
        classifier(farhox.L1L2(l2=Decaying(0.25))).save(tmp_path / "other.keras")


def test_an_outer_variable_that_does_not_say_how_it_is_set_is_refused_where_it_is_set():
    with pytest.raises(NotImplementedError, match=r"Decaying must have a method assign\(value\)"):
        Decaying(0.4).assign(0.1)


# ---- as a keras.Variable

def test_a_scalar_becomes_a_float_and_formats_itself():
    rate = farhox.Hyperparameter(0.12345, low=0.0, log=True, name="rate")
    assert float(rate) == pytest.approx(0.12345, rel=1e-6)
    assert f"{rate:.3f}" == format(rate, ".3f") == "0.123"
    assert f"{rate}" == repr(rate)
    with pytest.raises(TypeError, match=r"Only a scalar can become a float. Received 'rates' of shape \(2,\)"):
        float(farhox.Hyperparameter([0.1, 0.2], name="rates"))


ARITHMETIC = [
    lambda h, x: h + x, lambda h, x: x + h, lambda h, x: h - x, lambda h, x: x - h, lambda h, x: h * x,
    lambda h, x: x * h, lambda h, x: h / x, lambda h, x: x / h, lambda h, x: h ** x, lambda h, x: x ** h,
    lambda h, x: h // x, lambda h, x: x // h, lambda h, x: h % x, lambda h, x: x % h,
    lambda h, x: -h, lambda h, x: +h, lambda h, x: abs(h), lambda h, x: round(h, 1), lambda h, x: int(h),
    lambda h, x: keras.ops.multiply(h, x), lambda h, x: tf.multiply(h, x)]
COMPARISONS = [
    lambda h, x: h < x, lambda h, x: x < h, lambda h, x: h <= x, lambda h, x: x <= h, lambda h, x: h > x,
    lambda h, x: x > h, lambda h, x: h >= x, lambda h, x: x >= h, lambda h, x: h == x, lambda h, x: x == h,
    lambda h, x: h != x, lambda h, x: x != h]


@pytest.mark.parametrize("other", [2.0, np.float64(2.0), np.array([1.0, 2.0]), tf.constant(2.0, tf.float64),
                                   keras.Variable(2.0, dtype="float64")],
                         ids=["float", "numpy scalar", "array", "tensor", "variable"])
def test_arithmetic_is_that_of_a_keras_variable_with_the_value_in_natural_units(other):
    parameter = farhox.Hyperparameter(2.3, low=0.0, dtype="float64")
    variable = keras.Variable(2.3, dtype="float64")
    for operation in ARITHMETIC:
        np.testing.assert_allclose(operation(parameter, other), operation(variable, other), rtol=1e-12)
    for value in (2.0, 2.3):
        parameter, variable = (made(value, dtype="float64") for made in (farhox.Hyperparameter, keras.Variable))
        for operation in COMPARISONS:
            np.testing.assert_array_equal(operation(parameter, other), operation(variable, other))
    parameter = farhox.Hyperparameter(0.3, dtype="float64")
    np.testing.assert_allclose(parameter * farhox.Hyperparameter(2.0, dtype="float64"), 0.6, rtol=1e-12)


def test_a_matrix_is_multiplied_from_both_sides():
    matrix = farhox.Hyperparameter([[1.0, 2.0], [3.0, 4.0]], dtype="float64")
    other = np.array([[0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_array_equal(matrix @ tf.constant(other), matrix.numpy() @ other)
    np.testing.assert_array_equal(other @ matrix, other @ matrix.numpy())


def test_two_outer_variables_are_equal_where_they_are_the_same_and_no_truth_is_silent():
    one, other = farhox.Hyperparameter(0.3), farhox.Hyperparameter(0.3)
    assert one == one and one != other and not one == other and one is not None and one != "0.3"
    assert {one: 1, other: 2}[other] == 2 and other not in [one]
    with pytest.raises(TypeError, match="An outer variable is not a boolean"):
        bool(one)


def test_arithmetic_and_tensorflow_operations_are_differentiable_in_the_unconstrained_variable():
    strength = farhox.Hyperparameter(0.3, low=0.0, log=True, dtype="float64")
    w = keras.Variable(2.0, dtype="float64")
    problem = farhox.BilevelProblem(
        lambda batch: (strength * w ** 2 + tf.multiply(strength, w)) ** (strength / strength) - -strength + abs(
            strength), lambda batch: w.value ** 2, [w], [strength],
        farhox.GradientDescent(0.1))
    result = farhox.ReverseHG().compute(problem, farhox.repeat(np.zeros(1), 1), np.zeros(1))
    w_1 = 2.0 - 0.1 * (2 * 0.3 * 2.0 + 0.3)
    np.testing.assert_allclose(result.gradients[0], 2 * w_1 * -0.1 * (2 * 2.0 + 1.0) * 0.3, rtol=1e-12)


# ---- what a type can hold

@pytest.mark.parametrize("make, rule", [
    (lambda: farhox.Hyperparameter(1e300), "hold its value. Received"),
    (lambda: farhox.Hyperparameter(1e-50, low=0.0, high=1.0), "strictly between its bounds low=0.0 and high=1.0"),
    (lambda: farhox.Hyperparameter(1e-50, low=0.0, log=True), "strictly between its bounds low=0.0 and high=None"),
    (lambda: farhox.Hyperparameter(1.0 - 1e-9, low=0.0, high=1.0), "strictly between its bounds"),
    (lambda: farhox.Hyperparameter(1e8 + 1.0, low=1e8), "strictly between its bounds"),
    (lambda: farhox.Hyperparameter(-1e8 - 1.0, high=-1e8), "strictly between its bounds"),
    (lambda: farhox.Hyperparameter(1e-9, low=0.0, dtype="float16"), "'hyperparameter', float16, must"),
    (lambda: farhox.Hyperparameter(1e5, dtype="float16"), "'hyperparameter', float16, must be able to hold its value"),
    (lambda: farhox.Hyperparameter(0.5, low=1e-50, high=1.0), "hold its bounds. Received: low=1e-50"),
    (lambda: farhox.Hyperparameter(1.0, high=1e39), "hold its bounds. Received: high=1e[+]39"),
    (lambda: farhox.Hyperparameter(1.0 + 1e-9, low=1.0, high=1.0 + 2e-9), "tell its bounds apart"),
    (lambda: farhox.ExampleWeights(3, initial=1.0 - 1e-9), "'example_weights', float32, must be able to hold"),
    (lambda: farhox.LearnedSchedule(3, 1e300), "'schedule', float32, must be able to hold"),
    (lambda: farhox.LearnedSchedule(3, [1.0, 1e-60, 1.0]), "'schedule', float32, must be able to hold"),
], ids=range(14))
def test_what_the_type_cannot_hold_is_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def test_what_a_wider_type_holds_is_accepted_there():
    assert farhox.Hyperparameter(1e300, dtype="float64").numpy() == 1e300
    assert farhox.Hyperparameter(1e-50, low=0.0, high=1.0, dtype="float64").numpy() == pytest.approx(1e-50, rel=1e-9)
    assert farhox.Hyperparameter(1e-3, low=0.0, high=1.0, dtype="float16").numpy() == pytest.approx(1e-3, rel=1e-2)


def test_assign_refuses_what_the_type_cannot_hold_and_keeps_the_value():
    rate = farhox.Hyperparameter(0.1, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="strictly between its bounds"):
        rate.assign(1.0 - 1e-9)
    assert rate.numpy() == pytest.approx(0.1)


@pytest.mark.parametrize("value", [float("nan"), [0.1, float("inf")]])
def test_a_configuration_with_a_value_that_is_not_finite_is_refused(value):
    config = {**farhox.Hyperparameter(0.1).get_config(), "unconstrained": value}
    with pytest.raises(ValueError, match="unconstrained value of 'hyperparameter' must be finite"):
        farhox.Hyperparameter.from_config(config)


def test_a_configuration_with_a_large_bound_comes_back():
    for arguments in ({"low": 1e20}, {"high": -1e20}):
        parameter = farhox.Hyperparameter(5e20 if "low" in arguments else -5e20, **arguments)
        assert farhox.Hyperparameter.from_config(parameter.get_config()).numpy() == parameter.numpy()


@pytest.mark.parametrize("arguments", [{"initial": "half"}, {"initial": [0.5, 0.5]}, {"budget": "1"}, {"budget": True}])
def test_weights_of_examples_refuse_what_is_not_a_number(arguments):
    with pytest.raises(ValueError, match="must be a (positive )?finite number"):
        farhox.ExampleWeights(2, **arguments)


def test_names_must_be_strings():
    with pytest.raises(TypeError, match="name must be a string. Received: None"):
        farhox.Hyperparameter(0.1, name=None)

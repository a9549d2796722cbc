"""Outer variables in natural units: bounds, inverses, derivatives, example weights, schedules."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox

BOUNDS = {
    "none": {},
    "low": {"low": -1.0},
    "high": {"high": 3.0},
    "both": {"low": -1.0, "high": 3.0},
    "log": {"low": 0.0, "log": True},
}
VALUES = {
    "none": [-1e6, -0.5, 0.0, 2.0],
    "low": [-1 + 1e-9, -0.5, 0.0, 50.0, 1e6],
    "high": [-1e6, -50.0, 0.0, 3 - 1e-9],
    "both": [-1 + 1e-9, -0.5, 0.0, 2.0, 3 - 1e-9],
    "log": [1e-30, 1e-3, 1.0, 1e30],
}
bounds = pytest.mark.parametrize("kind", list(BOUNDS))


def hyperparameter(kind, initial, **arguments):
    return farhox.Hyperparameter(initial, dtype="float64", **BOUNDS[kind], **arguments)


@bounds
def test_initial_value_comes_back_in_natural_units(kind):
    for value in VALUES[kind]:
        np.testing.assert_allclose(hyperparameter(kind, value).numpy(), value, rtol=1e-12, atol=1e-15)


@bounds
def test_assigned_array_comes_back_in_natural_units(kind):
    value = np.array(VALUES[kind])
    parameter = hyperparameter(kind, np.full(value.shape, 0.5))
    parameter.assign(value)
    np.testing.assert_allclose(parameter.numpy(), value, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(parameter.numpy(), parameter().numpy())


@bounds
def test_value_stays_within_its_bounds_whatever_the_outer_optimizer_does(kind):
    parameter = hyperparameter(kind, 0.5)
    for unconstrained in (-30.0, -1.0, 1.0, 30.0):
        parameter.variable.assign(unconstrained)
        value = parameter.numpy()
        assert parameter.low is None or value > parameter.low
        assert parameter.high is None or value < parameter.high


@bounds
def test_value_is_differentiable_in_the_unconstrained_variable(kind):
    parameter = hyperparameter(kind, 0.7)
    with tf.GradientTape() as tape:
        point = tf.convert_to_tensor(parameter.variable)
        tape.watch(point)
        with keras.StatelessScope([(parameter.variable, point)]):
            value = parameter()
    derivative = tape.gradient(value, point).numpy()
    start, step = parameter.variable.numpy(), 1e-5
    values = []
    for sign in (1, -1):
        parameter.variable.assign(start + sign * step)
        values.append(parameter.numpy())
    np.testing.assert_allclose(derivative, (values[0] - values[1]) / (2 * step), rtol=1e-8)


def test_bounds_maps_are_the_documented_ones():
    u = 0.3
    expected = {
        "none": u, "low": -1 + np.log1p(np.exp(u)), "high": 3 - np.log1p(np.exp(u)), "both": -1 + 4 / (1 + np.exp(-u)),
        "log": np.exp(u)}
    for kind, value in expected.items():
        parameter = hyperparameter(kind, 0.5)
        parameter.variable.assign(u)
        np.testing.assert_allclose(parameter.numpy(), value, rtol=1e-14)


def test_discrete_hyperparameter_is_floored_where_it_is_used_and_has_no_derivative():
    parameter = farhox.Hyperparameter(2.75, low=0.0, high=4.0, discrete=True, dtype="float64")
    with tf.GradientTape() as tape:
        point = tf.convert_to_tensor(parameter.variable)
        tape.watch(point)
        with keras.StatelessScope([(parameter.variable, point)]):
            value = parameter()
    assert value.numpy() == 2.0
    assert tape.gradient(value, point) is None
    np.testing.assert_allclose(parameter.numpy(), 2.75, rtol=1e-14)


def test_variable_has_the_type_asked_for_and_the_name():
    parameter = farhox.Hyperparameter(0.1, name="rate")
    assert parameter.variable.dtype == keras.config.floatx()
    assert parameter.variable.name == parameter.name == "rate"
    assert parameter.variable.trainable
    assert farhox.Hyperparameter(1, dtype="float64").variable.dtype == "float64"


def test_repr_shows_natural_units():
    assert repr(farhox.Hyperparameter(0.25, low=0.0, name="rate")) == "<Hyperparameter 'rate', value=0.25>"
    assert repr(farhox.ExampleWeights(3)) == "<ExampleWeights 'example_weights', shape=(3,)>"


@pytest.mark.parametrize("initial, arguments, rule", [
    (0.5, {"low": 1.0, "high": 0.0}, "low must be less than high"),
    (0.5, {"low": 0.5, "high": 0.5}, "low must be less than high"),
    (0.5, {"low": "0"}, "low must be a finite number or None"),
    (0.5, {"high": float("inf")}, "high must be a finite number or None"),
    (0.5, {"high": True}, "high must be a finite number or None"),
    (0.5, {"log": True}, "log=True needs low=0.0"),
    (0.5, {"low": 0.1, "log": True}, "log=True needs low=0.0"),
    (0.5, {"low": 0.0, "high": 1.0, "log": True}, "log=True needs low=0.0"),
    (-0.5, {"low": 0.0}, "strictly between its bounds"),
    (0.0, {"low": 0.0}, "strictly between its bounds"),
    (1.0, {"high": 1.0}, "strictly between its bounds"),
    ([0.5, 2.0], {"low": 0.0, "high": 1.0}, "strictly between its bounds"),
    (float("nan"), {}, "must be finite"),
    (float("inf"), {}, "must be finite"),
    (0.5, {"dtype": "int32"}, "must be floating-point"),
])
def test_hyperparameter_refuses_values_and_bounds_that_do_not_fit(initial, arguments, rule):
    with pytest.raises(ValueError, match=rule):
        farhox.Hyperparameter(initial, **arguments)


@pytest.mark.parametrize("initial", ["0.1", None, True, [[1.0], [1.0, 2.0]], 1j, object()])
def test_hyperparameter_refuses_what_is_not_a_number(initial):
    with pytest.raises(TypeError, match="must be a number or an array of numbers"):
        farhox.Hyperparameter(initial)


def test_assign_refuses_other_shapes_values_outside_the_bounds_and_other_things():
    parameter = farhox.Hyperparameter([0.1, 0.2], low=0.0, name="rates")
    for value, error, rule in [([0.1], ValueError, "'rates' must have shape"), (0.1, ValueError, "must have shape"),
                               ([0.1, -0.1], ValueError, "strictly between"), ("ab", TypeError, "must be a number")]:
        with pytest.raises(error, match=rule):
            parameter.assign(value)
    np.testing.assert_allclose(parameter.numpy(), [0.1, 0.2], rtol=1e-6)


def test_example_weights_start_at_the_initial_value_and_follow_their_indices():
    weights = farhox.ExampleWeights(5, initial=0.25, dtype="float64")
    np.testing.assert_allclose(weights.numpy(), np.full(5, 0.25), rtol=1e-14)
    weights.variable.assign([0.0, 1.0, 2.0, 3.0, 4.0])
    chosen = weights(np.array([3, 0, 3])).numpy()
    np.testing.assert_allclose(chosen, 1 / (1 + np.exp(-np.array([3.0, 0.0, 3.0]))), rtol=1e-14)
    np.testing.assert_allclose(farhox.ExampleWeights(4).numpy(), np.full(4, 0.5))


def test_a_budget_is_spread_over_the_examples_and_kept_by_the_outer_optimizer():
    weights = farhox.ExampleWeights(6, budget=3.0, dtype="float64")
    np.testing.assert_array_equal(weights.numpy(), np.full(6, 0.5))
    keras.optimizers.SGD(1.0).apply(
        [tf.constant([2.0, 1.0, 0.1, -0.1, -1.0, -2.0], tf.float64)], [weights.variable])
    values = weights.numpy()
    assert np.all(values >= 0) and np.all(values <= 1) and values.sum() <= 3.0 + 1e-12
    np.testing.assert_array_equal(values[[0, 1, 4, 5]], [0.0, 0.0, 1.0, 1.0])
    np.testing.assert_array_equal(weights(np.array([5, 0])).numpy(), [1.0, 0.0])
    np.testing.assert_array_equal(farhox.ExampleWeights(2, budget=5.0).numpy(), [1.0, 1.0])


@pytest.mark.parametrize("arguments, rule", [
    ((0,), "num_examples must be a positive integer"),
    ((2.0,), "num_examples must be a positive integer"),
    ((True,), "num_examples must be a positive integer"),
    ((3, 0.0), "strictly between 0 and 1"),
    ((3, 1.0), "strictly between 0 and 1"),
    ((3, None, 0.0), "budget must be a positive finite number"),
    ((3, None, float("nan")), "budget must be a positive finite number"),
    ((3, 0.5, 1.0), "within the budget"),
    ((3, -0.1, 1.0), "within the budget"),
])
def test_example_weights_refuse_values_out_of_range(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        farhox.ExampleWeights(*arguments)


def test_example_weights_refuse_indices_that_are_not_integers():
    with pytest.raises(TypeError, match="must be integers"):
        farhox.ExampleWeights(3)(tf.constant([0.0, 1.0]))


def test_schedule_gives_the_value_of_each_step_and_the_last_one_beyond_the_end():
    schedule = farhox.LearnedSchedule(3, initial=[0.3, 0.2, 0.1], dtype="float64")
    values = [schedule(tf.constant(step, tf.int64)).numpy() for step in range(5)]
    np.testing.assert_allclose(values, [0.3, 0.2, 0.1, 0.1, 0.1], rtol=1e-14)
    np.testing.assert_allclose(schedule.numpy(), [0.3, 0.2, 0.1], rtol=1e-14)
    np.testing.assert_allclose(farhox.LearnedSchedule(2, 0.5).numpy(), [0.5, 0.5])


@pytest.mark.parametrize("arguments, error, rule", [
    ((0,), ValueError, "steps must be a positive integer"),
    ((1.5,), ValueError, "steps must be a positive integer"),
    ((2, 0.0), ValueError, "must be positive"),
    ((2, [0.1, -0.1]), ValueError, "must be positive"),
    ((2, [0.1, 0.1, 0.1]), ValueError, "one per step"),
    ((2, float("inf")), ValueError, "must be positive"),
    ((2, "fast"), TypeError, "must be a number"),
])
def test_schedule_refuses_values_out_of_range(arguments, error, rule):
    with pytest.raises(error, match=rule):
        farhox.LearnedSchedule(*arguments)


@pytest.mark.parametrize("values, pieces", [
    ([0.3], 2), ([0.2, 0.2, 0.2], 2), ([0.3, 0.2, 0.1], 3), ([0.1, 0.1, 0.4, 0.4, 0.4, 0.2], 3)])
def test_exported_schedule_has_the_value_of_each_step_bit_for_bit(values, pieces):
    schedule = farhox.LearnedSchedule(len(values), values)
    exported = schedule.to_keras()
    assert len(exported.values) == pieces
    for step in range(len(values) + 3):
        assert exported(step).numpy() == schedule(tf.constant(step)).numpy()


def test_exported_schedule_is_a_plain_keras_object():
    exported = farhox.LearnedSchedule(4, [0.4, 0.3, 0.2, 0.1]).to_keras()
    config = keras.optimizers.schedules.serialize(exported)
    assert config["module"] == "keras.optimizers.schedules" and config["registered_name"] is None
    restored = keras.optimizers.schedules.deserialize(config)
    np.testing.assert_array_equal([restored(step) for step in range(4)], [exported(step) for step in range(4)])


WITHOUT_FARHOX = """
import sys
sys.modules["farhox"] = None
import keras, numpy as np, tensorflow as tf
model, data = keras.saving.load_model(sys.argv[1]), np.load(sys.argv[2])
model.fit(tf.data.Dataset.from_tensor_slices((data["x"], data["y"])), shuffle=False, verbose=0)
model.save_weights(sys.argv[3])
"""


@pytest.mark.slow
def test_plain_keras_training_with_the_exported_schedule_repeats_the_inner_training_without_farhox(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=[6, 8, 3]).astype("float32")
    y = generator.integers(0, 4, size=[6, 8])
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(5, "tanh"), keras.layers.Dense(4, "softmax")])
    schedule = farhox.LearnedSchedule(6, initial=[0.5, 0.05, 0.4, 0.3, 0.01, 0.6])
    problem = farhox.supervised_problem(model, dynamics=farhox.GradientDescent(schedule), outer_variables=[schedule])
    inner = farhox.ReverseHG().compute(problem, (x, y), (x[0], y[0])).state.variables

    model.compile(keras.optimizers.SGD(schedule.to_keras()), "sparse_categorical_crossentropy")
    files = [str(tmp_path / name) for name in ("model.keras", "data.npz", "trained.weights.h5")]
    model.save(files[0])
    np.savez(files[1], x=x, y=y)
    subprocess.run([sys.executable, "-c", WITHOUT_FARHOX, *files], check=True, timeout=120)
    model.load_weights(files[2])
    for variable, tensor in zip(model.trainable_variables, inner):
        np.testing.assert_allclose(variable.numpy(), tensor.numpy(), rtol=1e-5, atol=1e-6)

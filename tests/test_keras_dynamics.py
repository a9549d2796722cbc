"""Keras optimizers as inner dynamics: the path of `optimizer.apply`, hypergradients of every float setting."""

import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable
from unrolled import finite_differences

import farhox
from farhox._core import exact
from farhox._core.step_graph import StepGraph
from farhox.dynamics.keras_optimizers import learnable_settings

OPTIMIZERS = keras.optimizers
STEPS = 4
# Optimizers that the oldest Keras farhox runs with does not have.
NEWER = ("Muon", "ScheduleFreeAdamW", "MultiOptimizer")


def needed(name):
    """Marks a test that is left out where Keras has no optimizer of this name."""
    return pytest.mark.skipif(name not in dir(OPTIMIZERS), reason=f"Keras {keras.__version__} has no {name}")


def needs(name, *values):
    """A case of a test with the same mark."""
    return pytest.param(*(values or [name]), marks=needed(name))


# Settings at which every one of them has an effect in a few steps.
ADAM = {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 0.02, "weight_decay": 0.1}


def by_path(variable):
    return MEMBERS["kernel" if "kernel" in variable.path else "bias"]


MEMBERS = {"kernel": OPTIMIZERS.Adam(**ADAM), "bias": OPTIMIZERS.SGD(0.2, momentum=0.5)}
CASES = {
    "SGD": lambda: OPTIMIZERS.SGD(0.2, weight_decay=0.1),
    "SGD momentum": lambda: OPTIMIZERS.SGD(0.2, momentum=0.7),
    "SGD nesterov": lambda: OPTIMIZERS.SGD(0.2, momentum=0.7, nesterov=True, weight_decay=0.1),
    "Adam": lambda: OPTIMIZERS.Adam(**{**ADAM, "weight_decay": None}),
    "Adam amsgrad": lambda: OPTIMIZERS.Adam(**ADAM, amsgrad=True),
    "AdamW": lambda: OPTIMIZERS.AdamW(**ADAM),
    "RMSprop": lambda: OPTIMIZERS.RMSprop(0.05, rho=0.8, epsilon=0.02, weight_decay=0.1),
    "RMSprop centered": lambda: OPTIMIZERS.RMSprop(0.02, rho=0.8, momentum=0.6, epsilon=0.02, centered=True),
    "Adagrad": lambda: OPTIMIZERS.Adagrad(0.1, initial_accumulator_value=0.2, epsilon=0.1, weight_decay=0.1),
    "Adadelta": lambda: OPTIMIZERS.Adadelta(0.8, rho=0.7, epsilon=0.02, weight_decay=0.1),
    "Adafactor": lambda: OPTIMIZERS.Adafactor(
        0.2, epsilon_1=0.01, epsilon_2=0.3, clip_threshold=0.4, weight_decay=0.1),
    "Adamax": lambda: OPTIMIZERS.Adamax(**ADAM),
    "Nadam": lambda: OPTIMIZERS.Nadam(**ADAM),
    "Ftrl": lambda: OPTIMIZERS.Ftrl(
        0.3, initial_accumulator_value=0.2, l1_regularization_strength=0.02, l2_regularization_strength=0.1,
        l2_shrinkage_regularization_strength=0.1, beta=0.2, weight_decay=0.1),
    "Lion": lambda: OPTIMIZERS.Lion(0.02, weight_decay=0.1),
    "Lamb": lambda: OPTIMIZERS.Lamb(**ADAM),
    "Muon": lambda: OPTIMIZERS.Muon(
        0.05, adam_beta_1=0.8, adam_beta_2=0.9, adam_weight_decay=0.2, epsilon=0.02, weight_decay=0.1, momentum=0.7,
        adam_lr_ratio=0.8),
    "ScheduleFreeAdamW": lambda: OPTIMIZERS.ScheduleFreeAdamW(**ADAM, warmup_steps=3),
    "MultiOptimizer": lambda: OPTIMIZERS.MultiOptimizer(by_path),
    "MultiOptimizer map": lambda: OPTIMIZERS.MultiOptimizer(OPTIMIZERS.OptimizerMap(
        OPTIMIZERS.RMSprop(0.05), {".*bias": OPTIMIZERS.SGD(0.2)})),
}
CASES = {name: make for name, make in CASES.items()
         if name.split()[0] not in NEWER or name.split()[0] in dir(OPTIMIZERS)}


@keras.saving.register_keras_serializable("farhox_tests")
class SignedMomentum(OPTIMIZERS.Optimizer):
    """An optimizer as a user writes it: a slot, a counter of its own, settings compared and used in Python."""

    def __init__(self, learning_rate=0.1, decay=0.8, power=0.5, start=0.3, name="signed_momentum", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.decay = decay
        self.power = power
        self.start = start

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.averages = [self.add_variable_from_reference(
            own, name="average", initializer=keras.initializers.Constant(self.start)) for own in variables]
        self.anchors = [self.add_variable_from_reference(own, name="anchor") for own in variables]
        for anchor, own in zip(self.anchors, variables):
            self.assign(anchor, keras.ops.copy(own))
        self.total = self.add_variable((), name="total", dtype=variables[0].dtype)

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        average = self.averages[index]
        if self.decay > 0:
            gradient = (1 - self.decay) * gradient + average * self.decay
        average.assign(gradient)
        self.total.assign_add(keras.ops.sum(keras.ops.square(gradient)))
        size = (gradient ** 2) ** self.power / (1 + self.total)
        pull = 0.1 * (variable - self.anchors[index])
        self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * (
            keras.ops.sign(gradient) * size + pull))

    def get_config(self):
        return {**super().get_config(), "decay": self.decay, "power": self.power, "start": self.start}


CASES["a user's subclass"] = lambda: SignedMomentum(0.2, weight_decay=0.1, clipnorm=0.3)


def small_model(dtype="float64", constrained=False):
    """Two layers; the first input is always zero, and so are the gradients of its weights."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([
        keras.Input((3,)), keras.layers.Dense(3, activation="tanh", dtype=dtype, name="first"),
        keras.layers.Dense(2, dtype=dtype, name="second")])
    if constrained:
        model.layers[0].kernel.constraint = keras.constraints.MaxNorm(1.0)
        model.layers[1].kernel.constraint = keras.constraints.NonNeg()
    random = np.random.default_rng(1)
    x = random.normal(size=(STEPS, 6, 3)) * [0.0, 1.0, 1.0]
    y = np.stack([np.sin(2 * x[..., 1]), x[..., 1] * x[..., 2]], -1)
    batches = tf.constant(x, dtype), tf.constant(y, dtype)
    return model, batches, (batches[0][-1] + 0.5, batches[1][-1])


def small_problem(dynamics, outer_variables, dtype="float64", dead=True, constrained=False):
    """Mean square error; with `dead`, one more inner variable that always has a gradient of zero.

    Returns:
        Problem, inner batches, outer batch.
    """
    model, inner_batches, outer_batch = small_model(dtype, constrained)
    unused = variable(np.zeros(2), dtype, "unused_bias")

    def loss(batch):
        return keras.ops.mean(keras.ops.square(model(batch[0]) + 0 * unused - batch[1]))

    inner = model.trainable_variables + ([unused] if dead else [])
    return farhox.BilevelProblem(loss, loss, inner, outer_variables, dynamics), inner_batches, outer_batch


def learned(optimizer, dtype="float64"):
    """One outer variable for each learnable setting of the optimizer, at its value there."""
    config, settings = optimizer.get_config(), {}
    for name in learnable_settings(optimizer):
        value = config[name] if name in config else None
        if value is not None and value < 0:
            settings[name] = variable(value, dtype, name)
        elif value:
            settings[name] = farhox.Hyperparameter(value, low=0.0, log=True, name=name, dtype=dtype)
    return settings


def keras_path(optimizer, problem, inner_batches):
    """The inner variables after each step of `optimizer.apply` on the variables themselves, which are changed."""
    path, outer = [], problem.outer_values()
    inner_gradients = tf.function(lambda *given: problem.inner_gradients(*given)[2], autograph=False)
    for t in range(len(inner_batches[0])):
        values = [tf.convert_to_tensor(own) for own in problem.inner_variables]
        gradients = inner_gradients(values, [], outer, tf.nest.map_structure(lambda x: x[t], inner_batches))
        optimizer.apply(gradients, problem.inner_variables)
        path.append([own.numpy() for own in problem.inner_variables])
    return path


def farhox_path(problem, inner_batches):
    state, path = problem.initial_state(), []
    step = tf.function(lambda *given: problem.step(*given).state, autograph=False)
    for t in range(len(inner_batches[0])):
        batch = tf.nest.map_structure(lambda x: x[t], inner_batches)
        state = step(state, problem.outer_values(), batch)
        path.append([value.numpy() for value in state.variables])
    return path


def assert_same_path(make_optimizer, tolerance=1e-14, **arguments):
    problem, inner_batches, _ = small_problem(
        farhox.KerasDynamics(make_optimizer()), [farhox.Hyperparameter(0.1)], **arguments)
    actual = farhox_path(problem, inner_batches)
    expected = keras_path(make_optimizer(), problem, inner_batches)
    for ours, theirs in zip(actual, expected):
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return expected


def test_every_optimizer_that_keras_exports_is_in_the_table():
    exported = {name for name in dir(OPTIMIZERS) if isinstance(getattr(OPTIMIZERS, name), type)}
    abstract_or_refused = {"Optimizer", "OptimizerMap", "LossScaleOptimizer"}
    assert exported - abstract_or_refused == {type(make()).__name__ for make in CASES.values()} - {"SignedMomentum"}


# Each of these is another one with a setting left out, or has an update like that of another one.
SIMPLER = {"SGD", "SGD momentum", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Lion", "Lamb",
           "MultiOptimizer map"}


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow) if case in SIMPLER else case for case in CASES])
def test_the_path_is_that_of_apply_on_the_model(case, float64):
    path = assert_same_path(CASES[case])
    assert all(np.all(np.isfinite(value)) for values in path for value in values)


# One that nobody has seen before; the paths of all are compared with Keras'.
DIFFERENTIATED = {"a user's subclass"}


@pytest.mark.parametrize("case", [
    case if case in DIFFERENTIATED else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES if "Multi" not in case])
def test_hypergradients_of_all_settings_equal_finite_differences_with_zero_gradients(case, float64):
    optimizer = CASES[case]()
    settings = learned(optimizer)
    assert "learning_rate" in settings
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(optimizer, **settings), list(settings.values()))
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    expected = finite_differences(problem, inner_batches, outer_batch)
    for name, gradient, difference in zip(settings, gradients, expected):
        assert abs(difference) > 1e-6, name
        np.testing.assert_allclose(gradient, difference, rtol=1e-6, atol=1e-10, err_msg=name)


# Of the ways to divide by a root of what may be zero.
AT_ZERO = {"Adam amsgrad"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    case if case in AT_ZERO else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_zero_gradients_give_finite_hypergradients_in_float32_with_keras_own_settings(case):
    optimizer = type(CASES[case]())() if "Multi" not in case else CASES[case]()
    if case == "Adafactor":  # Its derivative at a gradient of zero is of the order of 1 / sqrt(epsilon_1).
        optimizer = OPTIMIZERS.Adafactor(epsilon_1=1e-10)
    strength = farhox.Hyperparameter(0.1, low=0.0)
    model, inner_batches, outer_batch = small_model("float32")
    unused = variable(np.zeros(2), "float32")

    def outer_objective(batch):
        return keras.ops.mean(keras.ops.square(model(batch[0]) + unused - batch[1]))

    def inner_objective(batch):
        # The penalty on the last bias, which starts at zero, has a gradient of zero in the first step.
        return strength() * (outer_objective(batch) + keras.ops.sum(model.layers[1].bias ** 2)) + 0 * unused[0]

    inner = model.trainable_variables + [unused]
    dynamics = farhox.KerasDynamics(optimizer, learning_rate=(rate := farhox.Hyperparameter(0.01, low=0.0, log=True)))
    problem = farhox.BilevelProblem(inner_objective, outer_objective, inner, [strength, rate, *inner], dynamics)
    result = farhox.ReverseHG().compute(problem, tf.nest.map_structure(lambda x: 0 * x, inner_batches), outer_batch)
    assert result.diagnostics["finite"]
    assert all(np.all(np.isfinite(gradient)) for gradient in result.gradients)


OPTIONS = {
    "clipnorm": {"clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.02},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "moving averages written back": {"use_ema": True, "ema_momentum": 0.6, "ema_overwrite_frequency": 2},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "accumulation and averages": {"gradient_accumulation_steps": 2, "use_ema": True, "ema_momentum": 0.6,
                                  "ema_overwrite_frequency": 1},
}


def optimizer_with(options):
    return OPTIMIZERS.SGD(0.5, momentum=0.7, weight_decay=0.1, **OPTIONS[options])


@pytest.mark.parametrize("options", [
    option if option in ("clipnorm", "accumulation and averages") else pytest.param(option, marks=pytest.mark.slow)
    for option in OPTIONS])
def test_what_apply_does_besides_its_update_is_part_of_the_path(options, float64):
    path = assert_same_path(lambda: optimizer_with(options))
    problem, inner_batches, _ = small_problem(farhox.GradientDescent(0.1), [farhox.Hyperparameter(0.1)])
    plain = keras_path(OPTIMIZERS.SGD(0.5, momentum=0.7, weight_decay=0.1), problem, inner_batches)
    assert np.max(np.abs(path[-1][0] - plain[-1][0])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_hypergradients_of_the_options_equal_finite_differences(options, float64):
    optimizer = optimizer_with(options)
    settings = learned(optimizer)
    assert options not in ("clipnorm", "clipvalue", "global_clipnorm") or options in settings
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(optimizer, **settings), list(settings.values()))
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    expected = finite_differences(problem, inner_batches, outer_batch)
    assert all(abs(difference) > 1e-6 for difference in expected)
    assert_close(gradients, expected, 1e-6)


@pytest.mark.one_case
@pytest.mark.parametrize("multiple", [False, needs("MultiOptimizer", True)])
def test_training_ends_as_fit_does_with_averages_written_back(multiple):
    def make():
        averaging = {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2}
        if not multiple:
            return OPTIMIZERS.SGD(0.2, momentum=0.5, **averaging)
        members = OPTIMIZERS.SGD(0.2, **averaging), OPTIMIZERS.Adam(0.1)
        return OPTIMIZERS.MultiOptimizer(lambda variable: members["bias" in variable.path])

    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    weights = {}
    for by_farhox in (True, False):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        if by_farhox:
            problem = farhox.supervised_problem(
                model, "mse", farhox.KerasDynamics(make()), outer_variables=[farhox.Hyperparameter(0.1)])
            optimizer = farhox.HyperOptimizer(problem)
            optimizer.train_inner(farhox.repeat((x, x[:, :1]), 5))
        else:
            model.compile(make(), "mse")
            model.fit(x, x[:, :1], batch_size=16, epochs=5, shuffle=False, verbose=0)
        weights[by_farhox] = model.get_weights()
    for ours, fitted in zip(weights[True], weights[False]):
        np.testing.assert_allclose(ours, fitted, rtol=1e-6)


@pytest.mark.slow
def test_a_global_clipping_norm_gives_finite_hypergradients_where_all_gradients_are_zero(float64):
    settings = {"global_clipnorm": farhox.Hyperparameter(0.1, low=0.0), "learning_rate": farhox.Hyperparameter(0.1)}
    problem, (x, y), outer_batch = small_problem(
        farhox.KerasDynamics(OPTIMIZERS.SGD(), **settings), list(settings.values()))
    at_rest = x, tf.zeros_like(y)  # The second layer is zero, and so is the loss.
    for own in problem.inner_variables[2:]:
        own.assign(keras.ops.zeros_like(own))
    gradients = farhox.ReverseHG().compute(problem, at_rest, outer_batch).gradients
    assert_close(gradients, [np.zeros(()), np.zeros(())], 0.0)


def test_constraints_of_the_inner_variables_are_applied_after_each_step(float64):
    path = assert_same_path(lambda: OPTIMIZERS.SGD(0.5), constrained=True)
    plain = assert_same_path(lambda: OPTIMIZERS.SGD(0.5))
    assert np.min(path[-1][2]) == 0.0 and np.min(plain[-1][2]) < 0.0
    assert np.max(np.linalg.norm(path[-1][0], axis=0)) <= 1.0 + 1e-6 < np.max(np.linalg.norm(plain[-1][0], axis=0))


@pytest.mark.slow
def test_constraints_hold_under_dynamics_of_farhox_and_are_differentiated(float64):
    """Those of Keras are the reference: same path, same hypergradient, and that of finite differences."""
    gradients = []
    for make in (lambda rate: farhox.KerasDynamics(OPTIMIZERS.SGD(), learning_rate=rate), farhox.GradientDescent):
        rate = variable(0.5, name="rate")
        problem, inner_batches, outer_batch = small_problem(make(rate), [rate], constrained=True)
        path = farhox_path(problem, inner_batches)
        assert np.min(path[-1][2]) == 0.0 and np.max(np.linalg.norm(path[-1][0], axis=0)) <= 1.0 + 1e-6
        for hypergradient in (farhox.ReverseHG(), farhox.ForwardHG()):
            gradients.append(hypergradient.compute(problem, inner_batches, outer_batch).gradients)
    for other in gradients[1:]:
        assert_close(other, gradients[0], 1e-10)
    check = farhox.check_hypergradient(problem, inner_batches, outer_batch, farhox.ReverseHG())
    assert check.maximum_error < 1e-6


@pytest.mark.one_case
@pytest.mark.parametrize("make", [
    lambda: OPTIMIZERS.AdamW(**ADAM), needs("Muon", lambda: OPTIMIZERS.Muon(0.05, weight_decay=0.5))],
    ids=["AdamW", "Muon"])
@pytest.mark.parametrize("names", [["bias"], ["first"], ["bias$"]], ids=["by name", "by layer", "by its end"])
def test_variables_excluded_from_weight_decay_are_those_of_keras(make, names, float64):
    def excluding():
        optimizer = make()
        optimizer.exclude_from_weight_decay(var_names=names)
        return optimizer

    assert_same_path(excluding)


def test_variables_excluded_from_weight_decay_by_object_are_those_of_keras(float64):
    optimizer = OPTIMIZERS.AdamW(**ADAM)
    problem, inner_batches, _ = small_problem(farhox.GradientDescent(), [farhox.Hyperparameter(0.1)])
    optimizer.exclude_from_weight_decay(var_list=[problem.inner_variables[2]])
    dynamics = farhox.KerasDynamics(optimizer).bound_to(problem.inner_variables)
    values = [tf.convert_to_tensor(own) for own in problem.inner_variables]
    zeros = [tf.zeros_like(value) for value in values]
    decayed, _ = dynamics.update(zeros, values, dynamics.initial_slots(values), tf.constant(0, tf.int64))
    factors = [np.max(np.abs(new)) / np.max(np.abs(old)) for new, old in zip(decayed[:3:2], values[:3:2])]
    np.testing.assert_allclose(factors, [1 - 0.05 * 0.1, 1.0], rtol=1e-8)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("schedule", [
    lambda: OPTIMIZERS.schedules.ExponentialDecay(0.3, 2, 0.5), lambda: lambda: 0.25], ids=["schedule", "callable"])
def test_learning_rates_of_every_kind_stay_the_optimizers_own(schedule, float64):
    assert_same_path(lambda: OPTIMIZERS.SGD(schedule(), momentum=0.5))
    assert_same_path(lambda: OPTIMIZERS.Adafactor(schedule()))


@pytest.mark.slow
def test_a_schedule_as_setting_is_the_schedule_as_argument(float64):
    schedule = OPTIMIZERS.schedules.ExponentialDecay(0.5, 2, 0.25)
    for kind in (OPTIMIZERS.SGD, OPTIMIZERS.Adafactor):  # Adafactor treats a schedule in another way than a number.
        problem, inner_batches, _ = small_problem(
            farhox.KerasDynamics(kind(), learning_rate=schedule), [farhox.Hyperparameter(0.1)])
        actual = farhox_path(problem, inner_batches)[-1]
        assert_close(actual[:4], keras_path(kind(schedule), problem, inner_batches)[-1][:4], 1e-14)


def test_float_settings_replace_those_of_the_optimizer(float64):
    problem, inner_batches, _ = small_problem(
        farhox.KerasDynamics(OPTIMIZERS.SGD(), learning_rate=0.3, momentum=0.6, weight_decay=0.1, clipnorm=0.4),
        [farhox.Hyperparameter(0.1)])
    actual = farhox_path(problem, inner_batches)[-1]
    optimizer = OPTIMIZERS.SGD(0.3, momentum=0.6, weight_decay=0.1, clipnorm=0.4)
    assert_close(actual[:4], keras_path(optimizer, problem, inner_batches)[-1][:4], 1e-14)


def test_a_float_out_of_the_optimizers_range_is_its_own_error():
    with pytest.raises(ValueError, match="momentum"):
        small_problem(farhox.KerasDynamics(OPTIMIZERS.SGD(), momentum=1.5), [farhox.Hyperparameter(0.1)])


def test_rates_of_all_kinds_in_a_list_beside_a_momentum_that_starts_at_zero_equal_finite_differences(float64):
    momentum, schedule = variable(0.0, name="momentum"), farhox.LearnedSchedule(STEPS, 0.3)
    rates = [farhox.Hyperparameter(0.1, low=0.0, log=True), 0.2, schedule, farhox.Hyperparameter(np.full(2, 0.4))]
    learned = [momentum, rates[0], schedule, rates[3]]
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(OPTIMIZERS.SGD(), learning_rate=rates, momentum=momentum), learned, dead=False)
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    assert_close(gradients, finite_differences(problem, inner_batches, outer_batch), 1e-8)
    assert np.all(np.abs(gradients[2]) > 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda **settings: farhox.KerasDynamics(OPTIMIZERS.SGD(momentum=0.5), **settings),
    needs("MultiOptimizer", lambda **settings: farhox.KerasDynamics(CASES["MultiOptimizer"](), **settings))],
    ids=["SGD", "MultiOptimizer"])
def test_a_list_of_learning_rates_gives_each_inner_variable_its_own(make, float64):
    rates = [farhox.Hyperparameter(rate, low=0.0, log=True) for rate in (0.1, 0.2, 0.3)]
    rates += [farhox.Hyperparameter(np.full(2, 0.4))]  # One rate per entry of the last bias.
    problem, inner_batches, outer_batch = small_problem(make(learning_rate=rates), rates, dead=False)
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    assert_close(gradients, finite_differences(problem, inner_batches, outer_batch), 1e-8)


def test_weight_decay_uses_the_learning_rate_of_its_variable(float64):
    dynamics = farhox.KerasDynamics(OPTIMIZERS.SGD(weight_decay=0.5), learning_rate=[0.1, 0.2])
    own = [variable(1.0), variable(1.0)]
    values = [tf.convert_to_tensor(v) for v in own]
    dynamics = dynamics.bound_to(own)
    new, _ = dynamics.update(
        [tf.zeros_like(v) for v in values], values, dynamics.initial_slots(values), tf.constant(0, tf.int64))
    assert_close(new, [0.95, 0.9], 1e-15)


def test_a_list_of_learning_rates_must_have_one_entry_per_inner_variable():
    with pytest.raises(ValueError, match="one entry per inner variable.*2 entries for 4"):
        small_problem(farhox.KerasDynamics(OPTIMIZERS.SGD(), learning_rate=[0.1, 0.2]), [farhox.Hyperparameter(0.1)],
                      dead=False)


@pytest.mark.slow
@needed("MultiOptimizer")
def test_settings_of_a_multi_optimizer_hold_for_all_its_optimizers(float64):
    settings = {name: farhox.Hyperparameter(0.1, low=0.0, log=True) for name in ("learning_rate", "weight_decay")}
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(CASES["MultiOptimizer"](), **settings), list(settings.values()))
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    assert_close(gradients, finite_differences(problem, inner_batches, outer_batch), 1e-7)
    with pytest.raises(ValueError, match="Those of SGD are.*Received: beta_1"):
        small_problem(farhox.KerasDynamics(CASES["MultiOptimizer"](), beta_1=0.5), [farhox.Hyperparameter(0.1)])


@pytest.mark.slow
def test_a_momentum_can_be_learned_from_zero_and_through_a_schedule(float64):
    momentum = variable(0.0, name="momentum")
    schedule = farhox.LearnedSchedule(STEPS, 0.3)
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(OPTIMIZERS.SGD(0.2), momentum=momentum, learning_rate=schedule), [momentum, schedule])
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    assert_close(gradients, finite_differences(problem, inner_batches, outer_batch), 1e-8)
    assert np.all(np.abs(gradients[1]) > 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Adam", needs("ScheduleFreeAdamW"), "a user's subclass"])
def test_learned_initial_values_reach_slots_that_start_from_them(case, float64):
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(CASES[case]()), [farhox.Hyperparameter(0.1)], dead=False)
    model_variables = problem.inner_variables
    problem = farhox.BilevelProblem(problem._inner_objective, problem._outer_objective, model_variables,
                                    model_variables[1:], farhox.KerasDynamics(CASES[case]()))
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    assert_close(gradients, finite_differences(problem, inner_batches, outer_batch), 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Adam", *(
    pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "Adam" and "Multi" not in case),
    pytest.param("gradient accumulation", marks=pytest.mark.slow)])
def test_forward_and_reverse_mode_agree(case, float64):
    optimizer = optimizer_with(case) if case in OPTIONS else CASES[case]()
    settings = learned(optimizer)
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(optimizer, **settings), list(settings.values()))
    reverse = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    forward = tf.function(farhox.ForwardHG().compute, autograph=False)(problem, inner_batches, outer_batch).gradients
    assert_close(forward, reverse, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case if case == "SGD nesterov" else pytest.param(case, marks=pytest.mark.slow)
                                  for case in [*CASES, *OPTIONS]])
def test_hypergradients_under_xla_equal_those_without(case, float64):
    optimizer = optimizer_with(case) if case in OPTIONS else CASES[case]()
    settings = {"learning_rate": farhox.Hyperparameter(0.1)} if "Multi" in case else learned(optimizer)
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(optimizer, **settings), list(settings.values()))
    eager = farhox.ReverseHG().compute(problem, inner_batches, outer_batch)
    compiled = tf.function(
        lambda: farhox.ReverseHG().compute(problem, inner_batches, outer_batch), autograph=False, jit_compile=True)()
    assert_close(compiled.gradients, eager.gradients, 1e-9)
    assert_close(compiled.state.variables[:4], eager.state.variables[:4], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    farhox.Adam, pytest.param(lambda rate, beta_1: farhox.KerasDynamics(
        OPTIMIZERS.Adam(), learning_rate=rate, beta_1=beta_1), marks=pytest.mark.slow)], ids=["farhox", "Keras"])
def test_gradients_that_are_zero_have_the_same_hypergradient_under_xla_as_in_a_graph(make, float64):
    rates = [farhox.Hyperparameter(0.05, low=0.0), farhox.Hyperparameter(0.9, low=0.0, high=1.0)]
    problem, inner_batches, outer_batch = small_problem(make(*rates), rates)
    batches = [x[:2] for x in inner_batches]
    graph, xla = (tf.function(
        lambda: farhox.ReverseHG().compute(problem, batches, outer_batch).gradients, autograph=False,
        jit_compile=jit_compile)() for jit_compile in (False, True))
    assert np.all(np.isfinite(graph)) and np.all(np.abs(graph) > 0)
    assert_close(xla, graph, 1e-9)


@pytest.mark.slow
def test_inner_training_goes_on_from_a_state(float64):
    dynamics = farhox.KerasDynamics(CASES["Nadam"]())
    problem, inner_batches, outer_batch = small_problem(dynamics, [farhox.Hyperparameter(0.1)])
    whole = farhox_path(problem, inner_batches)[-1]
    state = problem.initial_state()
    for part in (slice(0, 1), slice(1, STEPS)):
        for t in range(STEPS)[part]:
            state = problem.step(state, problem.outer_values(), [x[t] for x in inner_batches]).state
        state = tf.nest.map_structure(tf.identity, state)
    assert state.step == STEPS
    assert_close(state.variables[:4], whole[:4], 0.0)


@pytest.mark.slow
def test_the_users_optimizer_is_not_changed(float64):
    optimizer = CASES["a user's subclass"]()
    before = {name: value for name, value in vars(optimizer).items()}
    settings = learned(optimizer)
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(optimizer, **settings), list(settings.values()))
    farhox.ReverseHG().compute(problem, inner_batches, outer_batch)
    assert vars(optimizer) == before and not optimizer.built and len(optimizer.variables) == 2
    # A built and used optimizer starts anew inside.
    optimizer.apply([keras.ops.ones_like(own) for own in problem.inner_variables], problem.inner_variables)
    again = small_problem(farhox.KerasDynamics(optimizer), [farhox.Hyperparameter(0.1)])[0]
    optimizer.decay = 0.1
    actual = farhox_path(again, inner_batches)[-1]
    assert_close(actual[:4], keras_path(CASES["a user's subclass"](), again, inner_batches)[-1][:4], 1e-14)


@pytest.mark.slow
def test_first_order_stops_the_gradient_through_the_inner_gradient(float64):
    optimizer, rate = OPTIMIZERS.SGD(momentum=0.5), farhox.Hyperparameter(0.2)
    gradients = {}
    for name, dynamics in (("keras", farhox.KerasDynamics(optimizer, first_order=True, learning_rate=rate)),
                           ("ours", farhox.Momentum(rate, 0.5, first_order=True)),
                           ("whole", farhox.KerasDynamics(optimizer, learning_rate=rate))):
        problem, inner_batches, outer_batch = small_problem(dynamics, [rate])
        gradients[name] = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    assert_close(gradients["keras"], gradients["ours"], 1e-12)
    assert abs(gradients["keras"][0] - gradients["whole"][0]) > 1e-4


@pytest.mark.slow
def test_the_sign_of_lion_hides_what_acts_through_the_inner_gradient(float64):
    scale, rate = farhox.Hyperparameter(1.0), farhox.Hyperparameter(0.02)
    model, inner_batches, outer_batch = small_model()

    def loss(batch):
        return keras.ops.mean(keras.ops.square(model(batch[0]) - batch[1]))

    problem = farhox.BilevelProblem(
        lambda batch: scale() * loss(batch) + scale() * keras.ops.sum(model.layers[0].kernel ** 2), loss,
        model.trainable_variables, [scale, rate], farhox.KerasDynamics(OPTIMIZERS.Lion(), learning_rate=rate))
    gradients = farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients
    expected = finite_differences(problem, inner_batches, outer_batch)
    assert gradients[0] == 0.0 and expected[0] == 0.0
    assert_close(gradients[1:], expected[1:], 1e-8)


@pytest.mark.slow
@needed("ScheduleFreeAdamW")
def test_beta_1_has_no_effect_in_schedule_free_adamw_on_tensorflow(float64):
    # Should a new Keras change this, its beta_1 can be learned: see _WITHOUT_DERIVATIVE.
    first, second = (assert_same_path(lambda: OPTIMIZERS.ScheduleFreeAdamW(0.05, beta_1=beta))[-1]
                     for beta in (0.5, 0.9))
    assert_close(first[:4], second[:4], 1e-7)


@pytest.mark.parametrize("optimizer, setting", [
    ("Lion", "beta_1"), ("Lion", "beta_2"), needs("ScheduleFreeAdamW", "ScheduleFreeAdamW", "beta_1")])
def test_a_setting_without_derivative_cannot_be_learned(optimizer, setting):
    optimizer = getattr(OPTIMIZERS, optimizer)
    with pytest.raises(ValueError, match=f"must have a derivative.*{setting}.*farhox.Momentum"):
        farhox.KerasDynamics(optimizer(), **{setting: farhox.Hyperparameter(0.5)})
    farhox.KerasDynamics(optimizer(), **{setting: 0.5})


@pytest.mark.parametrize("setting, value", [
    ("nesterov", True), ("nesterov", 0.5), ("momemtum", 0.5), ("name", "sgd"), ("use_ema", True),
    ("gradient_accumulation_steps", 2), ("loss_scale_factor", 2.0), ("ema_momentum", 0.5)])
def test_what_is_not_a_float_setting_is_refused_with_those_that_are(setting, value):
    with pytest.raises(ValueError, match=f"clipvalue, global_clipnorm, learning_rate, momentum, weight_decay. "
                                         f"Received: {setting}"):
        farhox.KerasDynamics(OPTIMIZERS.SGD(), **{setting: value})


def test_only_one_kind_of_clipping_is_accepted():
    with pytest.raises(ValueError, match="At most one of clipnorm.*Received: clipnorm, clipvalue"):
        farhox.KerasDynamics(OPTIMIZERS.SGD(clipvalue=1.0), clipnorm=farhox.Hyperparameter(1.0))


@pytest.mark.parametrize("setting", ["learning_rate", "momentum"])
def test_what_is_not_a_setting_is_refused_by_name(setting):
    with pytest.raises(TypeError, match=f"{setting} must be a float"):
        farhox.KerasDynamics(OPTIMIZERS.SGD(), **{setting: "fast"})


@pytest.mark.parametrize("optimizer", ["adam", OPTIMIZERS.Adam, OPTIMIZERS.Optimizer(0.1)],
                         ids=["name", "class", "abstract"])
def test_what_is_not_an_optimizer_is_refused(optimizer):
    with pytest.raises(TypeError, match="must be an instance of a subclass of keras.optimizers.Optimizer"):
        farhox.KerasDynamics(optimizer)


@pytest.mark.parametrize("optimizer, match", [
    (lambda: OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.SGD()), "inner_optimizer"),
    (lambda: OPTIMIZERS.SGD(loss_scale_factor=8.0), "loss_scale_factor=8.0"),
    (lambda: OPTIMIZERS.SGD(use_ema=True), "ema_overwrite_frequency"),
], ids=["LossScaleOptimizer", "loss_scale_factor", "use_ema"])
def test_what_inner_training_has_no_place_for_is_refused_with_an_alternative(optimizer, match):
    with pytest.raises(ValueError, match=match):
        farhox.KerasDynamics(optimizer())


def test_a_subclass_that_cannot_be_copied_is_refused():
    class Forgetful(SignedMomentum):
        def get_config(self):
            config = super().get_config()
            del config["power"]
            return config

    class Positional(SignedMomentum):
        def __init__(self, extent):
            super().__init__()

    class Failing(SignedMomentum):
        def get_config(self):
            raise NotImplementedError("no configuration")

    farhox.KerasDynamics(Forgetful())
    for optimizer, reason in ((Forgetful(power=0.7), "get_config.. does not return power"),
                              (Positional(3), "from_config.get_config... failed with TypeError"),
                              (Failing(), "get_config.. failed with NotImplementedError")):
        with pytest.raises(ValueError, match=f"must be copyable.*{reason}"):
            farhox.KerasDynamics(optimizer)


class Variant(SignedMomentum):
    """Does one thing that it should not, each time it is asked to."""

    def __init__(self, fault="none", **kwargs):
        super().__init__(**kwargs)
        self.fault = fault
        self.__dict__["_untracked"] = [variable(0.0, name="untracked")]

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        if self.fault == "own variable":
            self.extra = keras.Variable(float(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(self.start))))

    def update_step(self, gradient, variable, learning_rate):
        if self.fault == "stray":
            self._untracked[0].assign_add(1.0)
        if self.fault == "compares" and self.decay > 0.5:
            gradient = 2 * gradient
        if self.fault == "float":
            gradient = gradient * float(self.decay)
        super().update_step(gradient, variable, learning_rate)

    def get_config(self):
        return {**super().get_config(), "fault": self.fault}


class Precomputing(SignedMomentum):
    """Reads one of its settings in the constructor only."""

    def __init__(self, scale=0.5, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale
        self.half = scale / 2

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(self.half * gradient, variable, learning_rate)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


@pytest.mark.parametrize("fault, error, match", [
    ("stray", ValueError, "nothing but the variables it updates and its own slots. Variant assigned .*untracked"),
    ("compares", TypeError, "compared in Python with anything but zero.*'decay'.*0.5"),
    ("float", TypeError, "Only a float can be used as one in Python.*'decay'"),
])
def test_optimizer_code_that_hides_a_setting_or_a_slot_is_an_error(fault, error, match):
    problem, inner_batches, outer_batch = small_problem(
        farhox.KerasDynamics(Variant(fault), decay=(decay := farhox.Hyperparameter(0.5))), [decay])
    with pytest.raises(error, match=match):
        farhox.ReverseHG().compute(problem, inner_batches, outer_batch)


def test_slots_that_depend_on_a_setting_must_be_made_with_add_variable():
    with pytest.raises(ValueError, match="must be made in `build` with self.add_variable.*Variant"):
        small_problem(farhox.KerasDynamics(Variant("own variable"), start=(start := farhox.Hyperparameter(0.5))),
                      [start])


def test_dynamics_run_in_a_problem_only():
    dynamics = farhox.KerasDynamics(OPTIMIZERS.SGD())
    with pytest.raises(ValueError, match="must be bound to Keras variables"):
        dynamics.initial_slots([tf.zeros(2)])


@pytest.mark.slow
def test_a_setting_that_the_update_does_not_read_is_named(float64):
    unread = farhox.Hyperparameter(0.5, name="unread")
    problem, inner_batches, outer_batch = small_problem(farhox.KerasDynamics(Precomputing(), scale=unread), [unread])
    with pytest.raises(ValueError, match="'unread'"):
        farhox.ReverseHG().compute(problem, inner_batches, outer_batch)


ROOTS = {
    "sqrt": lambda x: tf.sqrt(x),
    "keras sqrt": lambda x: keras.ops.sqrt(x),
    "keras norm": lambda x: keras.ops.norm(x),
    "keras power": lambda x: keras.ops.power(x, 0.5),
    "power": lambda x: x ** 0.3,
    "pow with a tensor": lambda x: tf.pow(x, tf.constant([0.5, 0.0, 0.25])),
    "discarded quotient": lambda x: tf.where(x > 0, 2.0 / x + x / x, x),
    "discarded keras quotient": lambda x: keras.ops.minimum(keras.ops.divide(x + 1.0, x), 3.0),
    "discarded rsqrt": lambda x: tf.minimum(keras.ops.rsqrt(x), 3.0),
}


@pytest.mark.parametrize("root", ROOTS)
def test_roots_powers_and_quotients_are_finite_at_zero_and_unchanged_elsewhere(root):
    def update(inputs):
        with exact.finite_roots():
            return [ROOTS[root](inputs[0])]

    def derivative(x):
        graph = StepGraph(update, [x])
        cotangents = graph.placeholders(graph.outputs)
        products = graph.pullback(graph.outputs, graph.inputs, cotangents)
        ones = [tf.ones(output.shape) for output in graph.outputs]
        return graph.run([*graph.outputs, *products], [(graph.inputs[0], x), *zip(cotangents, ones)])

    zero, positive = tf.zeros(3), tf.constant([0.5, 1.0, 2.0])
    assert np.all(np.isfinite(derivative(zero)[1]))
    with tf.GradientTape() as tape:
        tape.watch(positive)
        value = ROOTS[root](positive)
    assert_close(derivative(positive), [value, tape.gradient(value, positive)], 1e-6)


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "keras_optimizers.md"
IN_EVERY_OPTIMIZER = {"learning_rate", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm"}


def test_the_page_lists_what_can_be_learned_in_every_optimizer():
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text().split("## Every option")[0], re.MULTILINE))
    kinds = {type(make()) for name, make in CASES.items() if "Multi" not in name} - {SignedMomentum}
    assert set(table) - {name for name in NEWER if name not in dir(OPTIMIZERS)} == {kind.__name__ for kind in kinds}
    for kind in kinds:
        assert set(re.findall(r"`(\w+)`", table[kind.__name__])) | IN_EVERY_OPTIMIZER == set(learnable_settings(kind()))

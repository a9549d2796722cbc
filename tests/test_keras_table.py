"""Every optimizer of Keras with every option that changes its update, against `fit`: the same bits, or refused by name.

The outcomes are the table of the page on Keras optimizers.
"""

import pathlib

import keras
import numpy as np
import pytest

import farhox

OPTIMIZERS = keras.optimizers
STEPS = 5
SAME, REFUSED, NONE = "same", "refused", ""
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "keras_optimizers.md"
# Settings at which a few steps show a difference.
KINDS = {
    "SGD": {"learning_rate": 0.1}, "RMSprop": {"learning_rate": 0.05}, "Adam": {"learning_rate": 0.05},
    "AdamW": {"learning_rate": 0.05}, "Adadelta": {"learning_rate": 0.8}, "Adagrad": {"learning_rate": 0.1},
    "Adamax": {"learning_rate": 0.05}, "Adafactor": {"learning_rate": 0.1}, "Nadam": {"learning_rate": 0.05},
    "Ftrl": {"learning_rate": 0.1}, "Lion": {"learning_rate": 0.02}, "Lamb": {"learning_rate": 0.05},
    "Muon": {"learning_rate": 0.05}, "ScheduleFreeAdamW": {"learning_rate": 0.05},
    "MultiOptimizer": {}, "LossScaleOptimizer": {}}
# What every optimizer takes.
OPTIONS = {
    "alone": {},
    "schedule": {"learning_rate": lambda: OPTIMIZERS.schedules.ExponentialDecay(0.1, 2, 0.5)},
    "callable rate": {"learning_rate": lambda: lambda: 0.05},
    "clipnorm": {"clipnorm": 0.1}, "clipvalue": {"clipvalue": 0.05}, "global_clipnorm": {"global_clipnorm": 0.1},
    "weight_decay": {"weight_decay": 0.1}, "excluded": {"weight_decay": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "use_ema": {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2},
    "use_ema at the end": {"use_ema": True, "ema_momentum": 0.7},
    "loss_scale_factor": {"loss_scale_factor": 4.0},
    "mixed_float16": {}, "mixed_bfloat16": {}, "bfloat16": {}}
# Options of their own.
OWN = {
    "SGD": {"momentum": {"momentum": 0.9}, "nesterov": {"momentum": 0.9, "nesterov": True}},
    "RMSprop": {"momentum": {"momentum": 0.5}, "centered": {"centered": True}},
    "Adam": {"amsgrad": {"amsgrad": True}}, "AdamW": {"amsgrad": {"amsgrad": True}},
    "Adafactor": {"relative_step": {"relative_step": False}},
    "Muon": {"nesterov": {"nesterov": False}, "adam_weight_decay": {"adam_weight_decay": 0.1},
             "exclude_layers": {"exclude_layers": ["last"]}},
    "ScheduleFreeAdamW": {"warmup_steps": {"warmup_steps": 3}},
    "Ftrl": {"l1 and l2": {"l1_regularization_strength": 0.05, "l2_regularization_strength": 0.1}}}
ALWAYS_REFUSED = {"LossScaleOptimizer": "inner_optimizer"}
REFUSED_OPTIONS = {"use_ema at the end": "ema_overwrite_frequency", "loss_scale_factor": "loss_scale_factor=4.0"}
# In pure bfloat16 these divide by 1 - beta_2^t, which rounds to zero.
NEVER_MOVE_IN_BFLOAT16 = ("Adam", "AdamW", "Lamb", "MultiOptimizer", "Muon", "Nadam", "ScheduleFreeAdamW")


def outcome(kind, option):
    """What the table says of a cell."""
    if option not in OPTIONS and option not in OWN.get(kind, {}):
        return NONE
    refused = kind in ALWAYS_REFUSED or option in REFUSED_OPTIONS or (
        option == "bfloat16" and kind in NEVER_MOVE_IN_BFLOAT16)
    return REFUSED if refused else SAME


def made(kind, option):
    """An optimizer with an option."""
    arguments = {**KINDS[kind], **OPTIONS.get(option, {}), **OWN.get(kind, {}).get(option, {})}
    arguments = {name: value() if callable(value) else value for name, value in arguments.items()}
    if kind == "LossScaleOptimizer":
        return OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.SGD(0.1))
    if kind == "MultiOptimizer":
        arguments = {"learning_rate": 0.05, **arguments}
        members = [excluding(OPTIMIZERS.Adam(**arguments), option), excluding(OPTIMIZERS.SGD(**arguments), option)]
        return OPTIMIZERS.MultiOptimizer(lambda variable: members["bias" in variable.path])
    return excluding(getattr(OPTIMIZERS, kind)(**arguments), option)


def excluding(optimizer, option):
    if option == "excluded":
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def small_model(option):
    keras.utils.set_random_seed(0)
    dtype = option if "16" in option else "float32"
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(2, "tanh", name="first", dtype=dtype),
                             keras.layers.Dense(2, name="last", dtype=dtype)])


def data():
    random = np.random.default_rng(0)
    return random.normal(size=(8, 3)).astype("float32"), random.normal(size=(8, 2)).astype("float32")


def fitted(kind, option):
    model = small_model(option)
    x, y = data()
    model.compile(made(kind, option), "mse", run_eagerly=True, auto_scale_loss=False)
    model.fit(x, y, batch_size=8, epochs=STEPS, shuffle=False, verbose=0)
    return [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]


def trained(kind, option):
    model = small_model(option)
    problem = farhox.supervised_problem(
        model, "mse", farhox.KerasDynamics(made(kind, option)), outer_variables=[farhox.Hyperparameter(0.1)])
    state = problem.initial_state()
    for _ in range(STEPS):
        state = problem.step(state, problem.outer_values(), data()).state
    return [keras.ops.convert_to_numpy(v) for v in problem.dynamics.finished(state.variables, state.slots)]


CELLS = [(kind, option) for kind in KINDS for option in [*OPTIONS, *OWN.get(kind, {})] if kind in dir(OPTIMIZERS)]
# What is refused takes no time; of the others one optimizer with an option of its own and one with what all have.
FAST = {(kind, option) for kind in ("SGD", "LossScaleOptimizer") for option in REFUSED_OPTIONS} | {
    ("Adam", "bfloat16"), ("AdamW", "excluded"), ("SGD", "mixed_bfloat16")}


def test_every_optimizer_that_keras_exports_is_in_the_table():
    exported = {name for name in dir(OPTIMIZERS) if isinstance(getattr(OPTIMIZERS, name), type)}
    assert exported - {"Optimizer", "OptimizerMap"} <= set(KINDS)


@pytest.mark.parametrize("kind, option", [
    cell if cell in FAST else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS])
def test_an_optimizer_with_an_option_is_that_of_fit_bit_for_bit_or_refused_by_name(kind, option):
    if outcome(kind, option) == REFUSED:
        words = ALWAYS_REFUSED.get(kind) or REFUSED_OPTIONS.get(option) or "never moves a variable of type bfloat16"
        with pytest.raises(ValueError, match=words):
            trained(kind, option)
        return
    for ours, fits in zip(trained(kind, option), fitted(kind, option)):
        np.testing.assert_array_equal(ours, fits)


def table():
    """The table of the page: a row per optimizer, a column per option of all, and one for its own."""
    lines = ["| optimizer | " + " | ".join(OPTIONS) + " | of its own |", "| --- |" + " --- |" * (len(OPTIONS) + 1)]
    for kind in KINDS:
        own = ", ".join(f"{option}: {outcome(kind, option)}" for option in OWN.get(kind, {}))
        cells = [outcome(kind, option) for option in OPTIONS]
        lines.append(f"| `{kind}` | " + " | ".join([*cells, own]).rstrip() + " |")
    return "\n".join(lines)


def test_the_page_has_the_table_of_these_tests():
    assert table() in PAGE.read_text()

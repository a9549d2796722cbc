"""Self-tuning models never make an update that is not finite, log what was measured alone, and say what never tunes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import stn

K = keras.layers


def hyperparameter(name="dropout", initial=0.2, **bounds):
    return farhox.Hyperparameter(initial, **(bounds or {"low": 0.0, "high": 0.9}), name=name)


def examples(number=20, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=[number, 4]).astype("float32"), random.integers(0, 3, number)


def tuned(rate, method="stn", compile=None, loss=None, **arguments):
    network = keras.Sequential([keras.Input([4]), K.Dense(5, "relu"), stn.Dropout(rate), K.Dense(3)])
    keras.utils.set_random_seed(0)
    model = stn.SelfTuningModel(stn.convert(network, gate_initializer="ones"), method=method, **arguments)
    model.compile(**{"optimizer": keras.optimizers.SGD(0.1, momentum=0.9), "hyper_optimizer": "adam",
                     "scale_optimizer": "adam", "run_eagerly": True, **(compile or {})},
                  loss=loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def kept(model):
    """What an update changes: weights, statistics, hyperparameters, scales, slots."""
    optimizers = [model.optimizer, model.hyper_optimizer, model.scale_optimizer, model.response_optimizer]
    variables = [*model.model.variables, *model.draws.variables_of, model.draws.raw_scales]
    return [v.numpy() for v in variables + [v for each in optimizers if each is not None for v in each.variables]]


def same(first, second):
    return all(np.array_equal(one, other, equal_nan=True) for one, other in zip(first, second, strict=True))


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["stn", "delta"])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_step_on_data_that_hold_nan_keeps_weights_hyperparameters_and_slots_and_is_counted(step, method):
    rate = hyperparameter()
    model, (x, y) = tuned(rate, method), examples()
    for good in (model.training_step, model.validation_step):
        good((x, y))
    before = kept(model)
    x[3, 0] = np.nan
    assert np.isnan(getattr(model, step)((x, y)))
    assert same(before, kept(model)) and int(model.guard.skipped.numpy()) == 1
    getattr(model, step)(examples())
    assert not same(before, kept(model)) and int(model.guard.skipped.numpy()) == 1
    assert all(np.all(np.isfinite(value)) for value in kept(model))
    assert int(model.guard._in_a_row[step.partition("_")[0]].numpy()) == 0


@pytest.mark.one_case
@pytest.mark.parametrize("compile, step, cause", [
    ({"optimizer": keras.optimizers.SGD(float("inf"))}, "training_step", "the weights after an update"),
    ({"hyper_optimizer": keras.optimizers.SGD(1e30)}, "validation_step", "the hyperparameter 'noise'"),
    ({"scale_optimizer": keras.optimizers.SGD(float("nan"))}, "validation_step", "the scales of the draws"),
])
def test_an_update_that_a_variable_or_its_natural_value_does_not_survive_is_taken_back_with_its_slots(
        compile, step, cause):
    noise = hyperparameter("noise", 0.3, low=0.0, log=True)
    network = keras.Sequential([keras.Input([4]), K.Dense(5, "relu"), stn.GaussianNoise(noise), K.Dense(3)])
    model = stn.SelfTuningModel(stn.convert(network, gate_initializer="ones"), max_skipped_updates=1)
    model.compile(**{"optimizer": "sgd", "hyper_optimizer": "adam", "scale_optimizer": "adam", "run_eagerly": True,
                     **compile}, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    if "hyper_optimizer" in compile:
        # A gradient that makes the logarithm large, and the natural value infinite.
        steps = model._steps.validation
        object.__setattr__(model._steps, "validation", lambda *arguments: steps(*arguments)._replace(
            hyperparameters=[tf.constant(-1.0)]))
    before = kept(model)
    getattr(model, step)(examples())
    assert same(before, kept(model))
    with pytest.raises(RuntimeError, match=f"1 {step.partition('_')[0]} steps in a row .*At the last one: {cause}"):
        model.guard.raise_if_diverged()


@pytest.mark.slow
def test_fit_keeps_good_values_and_ends_with_an_error_that_names_what_is_not_finite():
    rate = hyperparameter()
    model, (x, y) = tuned(rate, compile={"run_eagerly": False}, max_skipped_updates=4), examples()
    x[3, 0] = np.nan
    history = model.fit(x, y, validation_data=examples(8), epochs=2, batch_size=5, shuffle=False, verbose=0).history
    assert history["skipped_updates"] == [1, 2] and np.all(np.isfinite(history["inner_loss"]))
    before = kept(model)
    with pytest.raises(RuntimeError, match="4 training steps in a row .*At the last one: the training "
                       r"loss, .*in array 1 at index \[0, 0\] of the training batch: mend them"):
        model.fit(x * np.nan, y, validation_data=examples(8), batch_size=4, verbose=0)
    assert np.array_equal(before[0], kept(model)[0])
    # A run goes on after the cause was removed.
    model.fit(*examples(), validation_data=examples(8), batch_size=10, verbose=0)
    assert int(model.guard.skipped.numpy()) == 6


@pytest.mark.slow
def test_what_was_not_measured_has_no_entry_in_the_logs():
    model, data = tuned(hyperparameter(), warmup_steps=3), examples()
    stop = keras.callbacks.EarlyStopping("outer_loss", mode="min", patience=2)
    with pytest.warns(UserWarning, match="metric `outer_loss` which is not available"):
        history = model.fit(*data, validation_data=examples(8), epochs=5, batch_size=10, verbose=0,
                            callbacks=[stop]).history
    assert len(history["inner_loss"]) == 5 and len(history["outer_loss"]) == 4
    assert history["outer_loss"] == history["loss"] and min(history["outer_loss"]) > 0.5
    # The third epoch of one step is a validation step.
    model = tuned(hyperparameter(), compile={"metrics": ["accuracy"]})
    data = tf.data.Dataset.from_tensors(data)
    first = model.fit(data, validation_data=data, epochs=1, steps_per_epoch=1, verbose=0).history
    assert "inner_loss" in first and "accuracy" in first and "outer_loss" not in first
    names = {"inner_loss": 1.0, "accuracy": 0.0, "loss": 1.0, "outer_loss": 1.0, "dropout": 0.2, "skipped_updates": 0}
    model.reset_metrics()
    model._outer_loss.update_state(1.0)
    assert set(model._measured(names)) == {"loss", "outer_loss", "dropout", "skipped_updates"}


def test_a_hyperparameter_that_is_read_and_that_nobody_tunes_is_named_in_a_warning():
    rate, smoothing, decay = hyperparameter(), hyperparameter("smoothing"), hyperparameter("decay", 0.1, low=0.0)
    network = keras.Sequential([
        keras.Input([4]), K.Dense(5, kernel_regularizer=farhox.L1L2(l2=decay)), stn.Dropout(rate), K.Dense(3)])
    with pytest.warns(UserWarning) as record:
        model = stn.SelfTuningModel(stn.convert(network, [smoothing]))
    assert [str(warning.message)[:60] for warning in record if warning.category is UserWarning] == [
        "A layer of the network reads the hyperparameter 'decay', whi",
        "A layer of the network reads the hyperparameter 'dropout', w"]
    model = tuned(rate)
    with pytest.warns(UserWarning, match="The training loss reads the hyperparameter 'smoothing', which this"):
        model.compile("sgd", "adam", loss=stn.LabelSmoothing(smoothing))


def test_a_hyperparameter_that_no_layer_responds_to_is_refused():
    rate, other = hyperparameter(), hyperparameter("other")
    network = stn.convert(keras.Sequential([keras.Input([4]), stn.Dropout(rate), K.Dense(3)]))
    with pytest.raises(ValueError, match="must have a layer that responds to it.* Received: 'other' without any"):
        stn.SelfTuningModel(network, [rate, other])


@pytest.mark.parametrize("make", [
    lambda h: {"optimizer": keras.optimizers.AdamW(weight_decay=h)},
    lambda h: {"optimizer": keras.optimizers.SGD(learning_rate=lambda: h())},
    lambda h: {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(weight_decay=h))},
    lambda h: {"hyper_optimizer": keras.optimizers.Adam(clipnorm=h)},
    lambda h: {"scale_optimizer": keras.optimizers.Adam(h)},
])
def test_a_hyperparameter_as_a_setting_of_an_optimizer_is_refused_by_name(make):
    rate = hyperparameter()
    setting = make(rate)
    with pytest.raises(ValueError, match=f"settings of {next(iter(setting))} must not be .*Received: 'dropout' in"):
        tuned(rate, compile=setting)


def test_averages_of_weights_are_refused_by_name():
    with pytest.raises(ValueError, match="must not average its variables. Received: SGD with use_ema=True"):
        tuned(hyperparameter(), compile={"optimizer": keras.optimizers.SGD(use_ema=True)})


@pytest.mark.one_case
@pytest.mark.parametrize("file", ["model.weights.h5", "model.keras"])
def test_weights_come_back_by_name_with_the_state_of_the_draws_and_never_into_another_place(file, tmp_path):
    def model(order):
        rate, noise = hyperparameter(), hyperparameter("noise", 0.3)
        network = keras.Sequential([keras.Input([4]), stn.GaussianNoise(noise), stn.Dropout(rate), K.Dense(3)])
        hyperparameters = [rate, noise] if order == "ab" else [noise, rate]
        made = stn.SelfTuningModel(stn.convert(network, hyperparameters), hyperparameters)
        made.compile("sgd", "adam", loss="mse")
        return made

    saved = model("ab")
    saved.hyperparameters[0].assign(0.7)
    saved.draws.noise(3)
    saved.save(tmp_path / file) if file.endswith("keras") else saved.save_weights(tmp_path / file)
    again = model("ab")
    again.load_weights(tmp_path / file)
    assert [entry.numpy() for entry in again.hyperparameters] == [entry.numpy() for entry in saved.hyperparameters]
    np.testing.assert_array_equal(again.draws.noise(3), saved.draws.noise(3))
    with pytest.raises(ValueError, match=r"in the same order. Received: \['dropout', 'noise'\] in the file, \['noise'"):
        model("ba").load_weights(tmp_path / file)

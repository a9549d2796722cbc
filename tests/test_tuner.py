"""Tuner: what it finds, what it trains, what it gives back."""

import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.tuner import report
from farhox.tuner.losses import Losses
from farhox.tuner.rate import Rate, read_sweep
from farhox.tuner.rate_search import RateSearch
from farhox.tuner.training import Guard, Round, Training
from farhox.tuner.tunables import Choice

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(240, 6)).astype("float32")
Y = (X[:, 0] * X[:, 1] + 0.3 * RANDOM.normal(size=240) > 0).astype("int64")
TRAIN, VALIDATION = (X[:160], Y[:160]), (X[160:], Y[160:])


def network(optimizer=None, loss=None, metrics=("accuracy",), l2=(1e-3, 1e-3), name="network"):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input([6]), keras.layers.Dense(8, activation="tanh", kernel_regularizer=keras.regularizers.L2(l2[0])),
        keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(l2[1]))], name=name)
    for layer, own in zip(model.layers, ("first", "second")):
        layer.name = own
    model.compile(optimizer or keras.optimizers.SGD(0.02, momentum=0.95),
                  loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=list(metrics))
    return model


@pytest.fixture(scope="module")
def fitted():
    model = network()
    weights = model.get_weights()
    tuner = farhox.Tuner(model)
    history = tuner.fit(*TRAIN, batch_size=16, epochs=6, validation_data=VALIDATION, verbose=0)
    return model, weights, tuner, history


def test_the_model_given_is_not_changed(fitted):
    model, weights, _, _ = fitted
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)
    assert model.layers[0].kernel.regularizer.get_config()["l2"] == pytest.approx(1e-3)


def test_the_best_model_is_plain_and_gives_the_best_validation_value(fitted, tmp_path):
    _, _, tuner, history = fitted
    model = tuner.get_model()
    values = history.history["val_loss"]
    epoch = int(np.argmin(values))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert float(loss(VALIDATION[1], model.predict(VALIDATION[0], verbose=0))) == pytest.approx(values[epoch], rel=1e-5)
    chosen = tuner.get_hyperparameters()
    assert chosen["l2"] == pytest.approx(history.history["l2"][epoch]) != 1e-3
    config = model.layers[0].get_config()["kernel_regularizer"]
    assert config["module"] == "keras.regularizers" and config["config"]["l2"] == pytest.approx(chosen["l2"])
    # Penalties of the tuned strengths are in what a Keras user sees.
    penalty = sum(chosen["l2"] * float(np.sum(layer.kernel.numpy() ** 2)) for layer in model.layers)
    evaluated = model.evaluate(*VALIDATION, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(values[epoch] + penalty, rel=1e-5)
    assert evaluated["accuracy"] == pytest.approx(history.history["val_accuracy"][epoch])
    assert model.optimizer.momentum == pytest.approx(0.9) == chosen["momentum"]
    model.save(tmp_path / "best.keras")
    assert b"farhox" not in (tmp_path / "best.keras").read_bytes()
    again = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_array_equal(again.get_weights()[0], model.get_weights()[0])


def test_tables_say_where_and_why_in_80_columns(fitted, capsys):
    _, _, tuner, _ = fitted
    tuner.summary()
    tuner.results_summary()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for part in ("learning_rate", "found by", "l2", "first,", "second", "off: is None", "sweep: ", "heats: rate",
                 "annealing: ", "guard: never fired", "online: l2 0.001 -> ", "Best epoch"):
        assert part in text
    assert any(line.startswith("momentum") and "fixed" in line for line in text.splitlines())


@pytest.mark.slow
def test_a_plain_keras_training_with_the_schedule_gives_the_same_weights(eagerly):
    # Full batches, so that both see the same data.
    tuner = farhox.Tuner(network(), online=False, sweep=False)
    tuner.fit(*TRAIN, batch_size=160, epochs=12, validation_data=VALIDATION, verbose=0)
    rates = tuner.get_schedule()["learning_rate"]
    assert rates.shape == (12,) and rates[0] == rates[8] > 3 * rates[-1]
    plain = network(keras.optimizers.SGD(0.1, momentum=float(tuner.get_schedule()["momentum"][0])))
    plain.fit(*TRAIN, batch_size=160, epochs=12, shuffle=False, verbose=0, callbacks=[
        keras.callbacks.LearningRateScheduler(lambda epoch: float(rates[epoch]))])
    for expected, value in zip(plain.get_weights(), tuner._network.model.get_weights()):
        np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-6)


def test_hyperparameters_follow_the_hypergradient_of_the_last_step(eagerly):
    # One round by hand: w' = w - rate (g + 2 l2 w), so dE/dlog(l2) = -2 rate l2 w . dE/dw'.
    tuner = farhox.Tuner(network(keras.optimizers.SGD(0.05)), sweep=False, guard=False, annealing=0.0)
    training = Training(tuner._network, tuner._model.optimizer, tuner._rows, 1, 0.3)
    training.rate.train(1, 0.0)
    copy = network(keras.optimizers.SGD(0.05))
    result = training._engine.step(farhox.repeat(TRAIN, 1), VALIDATION)
    kernels = [layer.kernel.numpy() for layer in copy.layers]
    copy.train_on_batch(*TRAIN)
    with tf.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(VALIDATION[1], copy(VALIDATION[0]))
    gradients = tape.gradient(loss, [layer.kernel for layer in copy.layers])
    expected = sum(-2 * 0.05 * 1e-3 * np.sum(w * g.numpy()) for w, g in zip(kernels, gradients))
    np.testing.assert_allclose(result.gradients[0], expected, rtol=1e-4)
    # Adam's first step, of size .3 in the logarithm.
    after = tuner.get_hyperparameters()["l2"]
    assert np.log(after / 1e-3) == pytest.approx(-0.3 * np.sign(expected), rel=1e-3)


@pytest.mark.slow
def test_layers_have_hyperparameters_of_their_own_when_asked():
    tuner = farhox.Tuner(network(l2=(1e-3, 1e-2)), granularity="layer")
    assert tuner.get_hyperparameters()["first.l2"] == pytest.approx(1e-3)
    assert tuner.get_hyperparameters()["second.l2"] == pytest.approx(1e-2)
    shared = farhox.Tuner(network(l2=(1e-3, 1e-2)))
    (row,) = [row for row in shared._rows if row.name == "l2"]
    np.testing.assert_allclose(row.ratios, [10 ** -0.5, 10 ** 0.5], rtol=1e-6)
    # Strengths keep their proportions, in training and in the plain model.
    kernels = [layer.kernel for layer in shared._network.model.layers]
    np.testing.assert_allclose(sum(map(float, shared._network.model.losses)),
                               sum(s * np.sum(k.numpy() ** 2) for s, k in zip((1e-3, 1e-2), kernels)), rtol=1e-5)


def test_settings_are_found_for_every_optimizer_and_start_turns_them_on():
    found = {row.name: row for row in farhox.Tuner(network(keras.optimizers.AdamW(1e-3, weight_decay=0.01)))._rows}
    assert found["weight_decay"].tuned and found["weight_decay"].value() == pytest.approx(0.01)
    assert not found["beta_1"].tuned and found["clipnorm"].value() is None
    started = farhox.Tuner(network(keras.optimizers.Adam(1e-3)), start={"clipnorm": 1.0, "learning_rate": 0.1},
                           tune=["clipnorm", "beta_1"], ranges={"clipnorm": (0.5, 2.0)})
    found = {row.name: row for row in started._rows}
    assert found["clipnorm"].tuned and found["clipnorm"].value() == pytest.approx(1.0)
    assert found["beta_1"].tuned and found["beta_1"].value() == pytest.approx(0.9)
    assert not found["l2"].tuned and found["l2"].reason == "not in tune"
    assert found["learning_rate"].value() == pytest.approx(0.1)
    low, high = found["clipnorm"].hyperparameter.variable.constraint.get_config().values()
    np.testing.assert_allclose(np.exp([low, high]), [0.5, 2.0])


@pytest.mark.slow
def test_hyperparameters_never_leave_their_ranges(eagerly):
    tuner = farhox.Tuner(network(), ranges={"l2": (9e-4, 1.1e-3)}, sweep=False, outer_rate=3.0)
    tuner.fit(*TRAIN, batch_size=40, epochs=4, validation_data=VALIDATION, verbose=0)
    values = tuner.get_schedule()["l2"]
    assert values.min() >= 9e-4 * (1 - 1e-5) and values.max() <= 1.1e-3 * (1 + 1e-5)
    assert len(set(values)) > 1


@pytest.mark.slow
def test_trials_of_other_tools_are_starts():
    optuna = pytest.importorskip("optuna")
    trial = optuna.trial.create_trial(
        value=0.1, params={"learning_rate": 0.03, "l2": 2e-4, "units": 64}, distributions={
            "learning_rate": optuna.distributions.FloatDistribution(0.01, 1.0),
            "l2": optuna.distributions.FloatDistribution(1e-5, 1.0),
            "units": optuna.distributions.IntDistribution(1, 128)})

    keras_tuner = pytest.importorskip("keras_tuner")
    parameters = keras_tuner.HyperParameters()
    parameters.Fixed("l2", 2e-4)
    parameters.values["tuner/epochs"] = 3  # As Hyperband does.
    for start in (trial, parameters, keras_tuner.engine.trial.Trial(parameters), {"l2": 2e-4}):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tuner = farhox.Tuner(network(), start=start)
        assert any("passed by: units" in str(warning.message) for warning in said) == (start is trial)
        assert tuner.get_hyperparameters()["l2"] == pytest.approx(2e-4)


def test_a_users_own_hyperparameters_are_tuned_as_they_are(eagerly):
    strength = farhox.Hyperparameter(1e-3, low=0.0, log=True, name="strength")
    model = keras.Sequential([keras.Input([6]), *(keras.layers.Dense(
        n, kernel_regularizer=farhox.L1L2(l2=strength)) for n in (4, 2))])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tuner = farhox.Tuner(model, start={"strength": 2e-3}, sweep=False)
    (row,) = [row for row in tuner._rows if row.name == "strength"]
    assert row.tuned and row.hyperparameter is strength and len(row.places) == 2
    tuner.fit(*TRAIN, batch_size=40, epochs=2, validation_data=VALIDATION, verbose=0)
    assert strength.numpy() != pytest.approx(2e-3)
    config = tuner.get_model().layers[0].get_config()["kernel_regularizer"]
    assert config["module"] == "keras.regularizers"
    assert config["config"]["l2"] == pytest.approx(tuner.get_hyperparameters()["strength"])


@pytest.mark.slow
def test_a_metric_that_counts_chooses_the_epoch_and_the_loss_leads_there(eagerly):
    tuner = farhox.Tuner(network(), objective="val_accuracy", sweep=False)
    history = tuner.fit(*TRAIN, batch_size=40, epochs=4, validation_data=VALIDATION, verbose=0).history
    assert "which counts and has no derivative" in tuner.notes[0]
    accuracy = tuner.get_model().evaluate(*VALIDATION, verbose=0, return_dict=True)["accuracy"]
    assert accuracy == pytest.approx(max(history["val_accuracy"]))


def test_a_keras_loss_or_smooth_metric_as_objective_is_followed():
    one_hot = keras.utils.to_categorical(Y, 2).astype("float32")
    model = network(loss=keras.losses.CategoricalCrossentropy(from_logits=True), metrics=["mse"])
    for objective, name in ((keras.losses.MeanSquaredError(name="squares"), "val_squares"), ("mse", "val_mse")):
        tuner = farhox.Tuner(model, objective=objective)
        batch = (VALIDATION[0], one_hot[160:])
        expected = np.mean((model.predict(batch[0], verbose=0) - batch[1]) ** 2)
        assert float(tuner._network.outer_objective(batch)) == pytest.approx(expected, rel=1e-5)
        values = tuner._network.evaluate(tf.data.Dataset.from_tensor_slices(batch).batch(80))
        assert values[name] == pytest.approx(expected, rel=1e-5)


def test_smoothing_and_weights_of_classes_are_those_of_keras():
    targets = keras.utils.to_categorical(Y[:20], 2).astype("float32")
    predictions = RANDOM.normal(size=(20, 2)).astype("float32")
    smoothed = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)
    losses = Losses(network(loss=smoothed), Choice(None, None, None, None, "global"))
    np.testing.assert_allclose(losses.training(targets, predictions), smoothed(targets, predictions), rtol=1e-5)
    plain = keras.losses.CategoricalCrossentropy(from_logits=True)
    np.testing.assert_allclose(losses.validation(targets, predictions), plain(targets, predictions), rtol=1e-5)
    fixed = Losses(network(loss=smoothed), Choice(None, ["label_smoothing"], None, None, "global"))
    np.testing.assert_allclose(fixed.validation(targets, predictions), smoothed(targets, predictions), rtol=1e-5)
    binary = keras.losses.BinaryCrossentropy(label_smoothing=0.2)
    one = keras.Sequential([keras.Input([6]), keras.layers.Dense(1, activation="sigmoid")])
    one.compile("sgd", binary)
    chances = tf.sigmoid(predictions[:, :1])
    np.testing.assert_allclose(
        Losses(one, Choice(None, None, None, None, "global")).training(targets[:, :1], chances),
        binary(targets[:, :1], chances), rtol=1e-5)
    weighed = Losses(network(), Choice(["class_weights"], None, None, {"class_weights": [0.5, 3.0]}, "global"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    np.testing.assert_allclose(
        weighed.training(Y[:20], predictions),
        loss(Y[:20], predictions, sample_weight=np.where(Y[:20] == 1, 3.0, 0.5)), rtol=1e-5)
    np.testing.assert_allclose(weighed.validation(Y[:20], predictions), loss(Y[:20], predictions), rtol=1e-5)


@pytest.mark.slow
def test_losses_of_several_outputs_are_those_of_keras():
    inputs = keras.Input([6])
    outputs = {"a": keras.layers.Dense(2, name="a")(inputs), "b": keras.layers.Dense(1, name="b")(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"},
                  loss_weights={"a": 0.3, "b": 2.0})
    targets, predictions = {"a": Y[:20], "b": X[:20, :1]}, model(X[:20])
    losses = Losses(model, Choice(None, None, None, None, "global"))
    expected = model.compute_loss(X[:20], targets, predictions)
    np.testing.assert_allclose(losses.training(targets, predictions), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.validation(targets, predictions), expected, rtol=1e-5)
    assert [(row.name, row.value(), row.tuned) for row in losses.found] == [
        ("loss_weight.a", pytest.approx(0.3), False), ("loss_weight.b", pytest.approx(2.0), False)]


@pytest.mark.slow
def test_the_schedule_of_an_optimizer_stays_and_is_scaled(eagerly):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    tuner = farhox.Tuner(
        network(keras.optimizers.SGD(schedule)), online=False, sweep=False, start={"learning_rate": 2.0})
    tuner.fit(*TRAIN, batch_size=40, epochs=4, validation_data=VALIDATION, verbose=0)
    factor = tuner.get_hyperparameters()["learning_rate"]
    assert factor == pytest.approx(2.0)
    np.testing.assert_allclose(
        tuner.get_schedule()["learning_rate"], factor * 0.1 * 0.5 ** (np.arange(16) / 10), rtol=1e-5)


@pytest.mark.slow
def test_streams_and_callbacks_work_as_in_fit(eagerly):
    train = tf.data.Dataset.from_tensor_slices(TRAIN).shuffle(160).batch(16)
    validation = tf.data.Dataset.from_tensor_slices(VALIDATION).batch(16)
    tuner = farhox.Tuner(network(), sweep=False)
    history = tuner.fit(train, validation_data=validation, epochs=50, verbose=0, callbacks=[
        keras.callbacks.EarlyStopping("loss", patience=0, min_delta=0.2)])
    assert 1 < len(history.epoch) < 50
    assert tuner.get_schedule()["l2"].shape == (10 * len(history.epoch),)


@pytest.mark.slow
def test_a_start_that_diverges_is_brought_back(eagerly):
    tuner = farhox.Tuner(network(keras.optimizers.SGD(1e4)), sweep=False, online=False, annealing=0.0)
    tuner.fit(*TRAIN, batch_size=40, epochs=4, validation_data=VALIDATION, verbose=0)
    assert tuner.get_hyperparameters()["learning_rate"] < 1e4
    assert any(note.startswith("guard: training loss") for note in tuner.notes)


def test_the_guard_goes_back_from_a_rise_and_from_what_is_not_finite():
    losses, kept = (1.0, 0.8, 0.6, 0.7, 2.0, 0.9, 0.6, float("nan")), []
    guard = Guard("initial", window=2)
    seen = []
    for index, loss in enumerate(losses):
        seen.append(guard.watch(Round(loss, 1.2, loss, np.isfinite(loss)), lambda: index))
        kept.append(guard.good)
    assert seen == [False, False, False, False, True, False, False, True] and guard.fired == 2
    assert kept == [0, 1, 2, 3, 3, 3, 3, 3]  # Means of two: 1, .9, .7, .65, bad, .9, .75, bad.
    diverging = Guard("initial")
    assert diverging.watch(Round(9.0, 1.2, 1.0, True), lambda: "worse") and diverging.good == "initial"


def test_the_guard_starts_afresh_where_training_does_not_come_to_what_the_sweep_reached():
    guard, seen = Guard("initial", rounds=3), []
    guard.begin("initial", reached=0.5)
    for loss in (1.0, 0.9, 0.8, 1.0, 0.6, 0.4):
        seen.append(guard.watch(Round(loss, 1.2, loss, True), lambda: loss))
    assert seen == [False, False, True, False, False, False] and guard.good != "initial"
    held = Guard("initial", rounds=2)
    held.begin("initial", reached=0.5)
    assert [held.watch(Round(1.0, 1.2, 1.0, True), lambda: "worse") for _ in range(2)] == [False, True]
    assert held.good == "initial"


@pytest.mark.slow
def test_rates_are_cut_from_what_they_are_and_not_from_what_they_were(eagerly):
    tuner = farhox.Tuner(network(keras.optimizers.SGD(0.1)), sweep=False, online=False)
    training = Training(tuner._network, tuner._model.optimizer, tuner._rows, 1, 0.3)
    guard = Guard(training.state())
    for _ in range(2):
        tuner._go_back(training, guard, Round(9.0, 1.0, 9.0, True))
    assert float(training.rate_row.hyperparameter) == pytest.approx(0.1 * 0.3 ** 2)


def test_heats_go_on_below_while_the_lowest_rate_is_the_best_and_a_second_round_chooses_beside_the_best(monkeypatch):
    class Fake:
        """A training and a network of which nothing learns."""

        tuned = []

        def __init__(self, steps_follow_size=True):
            self.steps_follow_size = steps_follow_size

        def momentum(self):
            return 0.9

        def state(self):
            return None

        def restart(self, start):
            del start

        def evaluate(self, batches):
            del batches
            return {"val_loss": 2.3}

    def chosen(first, second, steps_follow_size=True):
        """Powers of 1 / 3 of the rates of both rounds of heats with these losses, and of the rate that is chosen."""
        tried, losses = [], iter([*first, *second])

        def heat(rate, steps):
            tried.append((steps, round(float(np.log(0.1 / rate) / np.log(3)), 3)))
            return next(losses)

        search = RateSearch(Fake(), Fake(steps_follow_size), None, None, 1000)
        monkeypatch.setattr(search, "heat", heat)
        power = round(float(np.log(0.1 / search.rate_of_heats(4.0)[0]) / np.log(3)), 3)
        assert [steps for steps, _ in tried] == [20] * len(first) + [60] * len(second)
        begin = 0.0 if steps_follow_size else 0.5  # Of optimizers that normalise the gradient.
        assert [power for _, power in tried[:len(first)]] == [begin + power for power in range(len(first))]
        return [power for _, power in tried[len(first):]], power

    assert chosen([0.5, 0.4, 0.6], [0.3, 0.2, 0.25]) == ([0.5, 1.0, 1.5], 1.0)
    assert chosen([0.4, 0.5, 0.6], [0.3, 0.2]) == ([0.0, 0.5], 0.5)
    assert chosen([0.5, 0.4, 0.3, 0.35], [0.1, 0.2, 0.2]) == ([1.5, 2.0, 2.5], 1.5)
    # Below a rate that has not trained, a quarter of it is the highest.
    assert chosen([2.31, 2.3, 2.3, 2.3, 0.9, 1.0], [0.5, 0.4]) == ([4.262, 4.762], 4.762)  # 3 + log 4 / log 3.
    assert chosen([2.2, 0.9, 1.0], [0.5, 0.6]) == ([1.262, 1.762], 1.262)
    assert chosen([2.2, 1.2, 0.9, 1.0], [0.5, 0.6, 0.7]) == ([1.5, 2.0, 2.5], 1.5)
    assert chosen([2.0, 0.9, 1.0], [0.5, 0.6, 0.7]) == ([0.5, 1.0, 1.5], 0.5)
    assert chosen([np.inf] * 7, [np.inf] * 3) == ([5.5, 6.0, 6.5], 6.5)
    assert chosen([0.4, 0.5], [0.3, 0.2], False) == ([0.5, 1.0], 1.0)
    assert chosen([0.5, 0.4, 0.45], [0.3, 0.2], False) == ([1.5, 2.0], 2.0)


@pytest.mark.parametrize("momentum, of_heats, of_training", [(0.95, 0.5, 0.9), (0.8, 0.5, 0.8), (0.3, 0.3, 0.3)])
def test_heats_have_a_lower_momentum_and_a_rate_of_the_same_effect(momentum, of_heats, of_training, monkeypatch):
    seen = []

    def heat(search, rate, steps):
        seen.append((search._training.momentum(), rate))
        return abs(np.log(rate) - np.log(seen[1][1] if len(seen) > 1 else 1.0))  # The second rate is the best.

    monkeypatch.setattr(RateSearch, "heat", heat)
    tuner = farhox.Tuner(network(keras.optimizers.SGD(0.1, momentum=momentum)), online=False)
    tuner.fit(*TRAIN, batch_size=16, epochs=1, validation_data=VALIDATION, verbose=0)
    assert [entry[0] for entry in seen] == pytest.approx([of_heats] * len(seen))
    chosen = seen[1][1] * (1 - of_training) / (1 - of_heats)
    assert tuner.get_schedule()["learning_rate"][0] == pytest.approx(chosen, rel=1e-4)
    assert tuner.get_hyperparameters()["momentum"] == pytest.approx(of_training)
    assert f"heats: rate {report.number(chosen)} of" in " ".join(tuner.notes)


def test_a_sweep_stops_where_the_smoothed_loss_has_risen():
    rates = np.geomspace(1e-4, 1.0, 9)
    still = read_sweep(rates, np.full(9, 2.0))
    assert not still.stopped and still.stop == 1.0
    risen = read_sweep(rates, [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 9.0, 9.0, 9.0], smoothing=0.0)
    assert risen.stopped and risen.stop == pytest.approx(rates[6])
    broken = read_sweep(rates[:3], [2.0, 1.0, float("inf")])
    assert broken.stopped and broken.stop == pytest.approx(rates[2])


def test_the_rate_sweeps_exponentially_and_ends_in_a_cosine():
    rate = Rate(farhox.Hyperparameter(0.4, low=0.0, log=True), None)
    rate.sweep(1e-3, 10.0, 5)
    np.testing.assert_allclose([float(rate(step)) for step in range(5)], np.geomspace(1e-3, 10.0, 5), rtol=1e-5)
    rate.train(10, 0.4)
    expected = [0.4] * 6 + [0.2 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    np.testing.assert_allclose([float(rate(step)) for step in range(10)], expected, rtol=1e-5)
    np.testing.assert_allclose(rate.at(np.arange(10)), expected, rtol=1e-5)


@pytest.mark.slow
def test_under_mixed_float16_the_loss_is_not_scaled_while_tuning_and_is_again_afterwards():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        tuner = farhox.Tuner(model)
        history = tuner.fit(*TRAIN, batch_size=16, epochs=2, validation_data=VALIDATION, verbose=0).history
        assert np.all(np.isfinite(history["val_loss"])) and any("loss scaling" in note for note in tuner.notes)
        best = tuner.get_model()
        assert isinstance(best.optimizer, keras.optimizers.LossScaleOptimizer)
        assert float(best.optimizer.inner_optimizer.learning_rate) == pytest.approx(
            tuner.get_hyperparameters()["learning_rate"])
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_line_of_an_epoch_has_80_columns():
    logs = {f"a_rather_long_name_{k}": 0.123456 for k in range(5)}
    assert len(report.epoch_line(99, 1000, logs, 12.3)) <= 80
    assert report.epoch_line(0, 3, {"loss": 0.12345}, 2.2) == "epoch 1/3 2 s  loss 0.123"
    # What does not fit makes room for what does.
    line = report.epoch_line(0, 3, {"loss": 0.12345, 80 * "a": 1.0, "l2": 1e-5}, 2.2)
    assert line == "epoch 1/3 2 s  loss 0.123  l2 1e-5 ..."


@pytest.mark.slow
def test_the_picture_is_written(fitted, tmp_path):
    pytest.importorskip("matplotlib")
    fitted[2].plot(tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").read_bytes()[:4] == b"\x89PNG"


def test_a_short_range_in_the_picture_of_the_tuner_has_more_than_one_tick(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    made = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda figure, path: made.append(figure))
    rows = [types.SimpleNamespace(name=name, kind=types.SimpleNamespace(log=True)) for name in ("learning_rate", "l2")]
    report.plot([{"learning_rate": np.geomspace(0.1, 1e-4, 9), "l2": np.geomspace(1e-2, 2.6e-3, 9)}], rows, None, "")
    rate, strength = made[0].axes
    assert (rate.get_ylabel(), strength.get_ylabel(), strength.get_xlabel()) == ("Learning rate", "L2", "Training step")
    low, high = strength.get_ylim()
    np.testing.assert_allclose([tick for tick in strength.get_yticks() if low <= tick <= high], [0.003, 0.005, 0.01])
    assert strength.yaxis.get_major_formatter()(0.003) == "0.003"


def test_tensorboard_shows_the_run_with_its_hyperparameters(fitted, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    tuner = fitted[2]
    tuner.write_hparams(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (content,) = [event for tag, event in events.summary_metadata.items() if "session_start_info" in tag]
    info = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content).session_start_info
    expected = {name: value for name, value in tuner.get_hyperparameters().items() if value is not None}
    assert {name: value.number_value for name, value in info.hparams.items()} == pytest.approx(expected)
    assert "val_loss" in events.Tags()["tensors"]


def test_values_go_to_optuna_and_kerastuner_and_come_back(fitted):
    optuna = pytest.importorskip("optuna")
    values = {name: value for name, value in fitted[2].get_hyperparameters().items() if value is not None}
    study = optuna.create_study()
    study.enqueue_trial(values)
    trial = study.ask()
    given = {name: trial.suggest_float(name, 1e-9, 10.0, log=True) for name in values}
    assert given == pytest.approx(values)
    study.tell(trial, 0.1)
    again = farhox.Tuner(network(), start=study.best_trial, tune=["l2"])
    assert again.get_hyperparameters()["l2"] == pytest.approx(values["l2"])
    keras_tuner = pytest.importorskip("keras_tuner")
    parameters = keras_tuner.HyperParameters()
    for name, value in values.items():
        parameters.Fixed(name, value)
    again = farhox.Tuner(network(), start=parameters)
    assert again.get_hyperparameters()["l2"] == pytest.approx(values["l2"])


@pytest.mark.parametrize("arguments, error, message", [
    ({"tune": "l2"}, TypeError, "tune must be a list of names"),
    ({"tune": ["l2"], "fix": ["l2"]}, ValueError, "tuned or fixed, not both"),
    ({"tune": ["depth"]}, ValueError, "Names must be hyperparameters of the model"),
    ({"tune": ["clipnorm"]}, ValueError, "needs a value to start from"),
    ({"granularity": "weight"}, ValueError, 'granularity must be "global" or "layer"'),
    ({"ranges": [("l2", 0, 1)]}, TypeError, "ranges must be a dictionary"),
    ({"ranges": {"l2": (1, 0)}}, ValueError, "A range must be a pair"),
    ({"ranges": {"l2": (0.1, 1)}}, ValueError, "must be in its range from 0.1 to 1 to start from"),
    ({"start": 3}, TypeError, "start must be a dictionary"),
    ({"start": {"l2": "small"}}, TypeError, "A value to start from must be a number"),
    ({"objective": "val_f1"}, ValueError, "objective must be a value that validation gives: val_loss, val_accuracy"),
    ({"objective": 3}, TypeError, "objective must be a name, a Keras loss or a Keras metric"),
    ({"objective": keras.metrics.Mean(name="mean")}, ValueError, "Whether a metric is to be large or small"),
    ({"annealing": 2.0}, ValueError, "annealing must be a number from 0"),
    ({"truncation": 0}, ValueError, "truncation must be a positive integer"),
    ({"outer_rate": -1}, ValueError, "outer_rate must be a positive finite number"),
])
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        farhox.Tuner(network(), **arguments)


def test_models_that_cannot_be_tuned_are_refused():
    class Own(keras.Model):
        pass

    with pytest.raises(TypeError, match="needs a functional or Sequential"):
        farhox.Tuner(Own())
    with pytest.raises(ValueError, match="must be built"):
        farhox.Tuner(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match="must be compiled"):
        farhox.Tuner(keras.Sequential([keras.Input([1]), keras.layers.Dense(1)]))
    model = network(keras.optimizers.SGD(0.0))
    with pytest.raises(ValueError, match="The learning rate must be positive"):
        farhox.Tuner(model)


def test_bad_data_are_refused(eagerly):
    tuner = farhox.Tuner(network())
    endless = tf.data.Dataset.from_tensor_slices(TRAIN).batch(16).repeat()
    for arguments, message in (
            ({"x": TRAIN}, "tunes hyperparameters on validation data"),
            ({"x": endless, "validation_data": VALIDATION}, "number of batches in an epoch must be known"),
            ({"x": endless, "validation_data": VALIDATION, "batch_size": 3}, "Batches of a data set have a size"),
            ({"x": TRAIN, "validation_data": endless.take(0)}, "validation_data must hold at least one batch"),
            ({"x": TRAIN, "validation_data": VALIDATION, "callbacks": [keras.callbacks.ReduceLROnPlateau()]},
             "sets the learning rate and its states itself")):
        with pytest.raises(ValueError, match=message):
            tuner.fit(**arguments)
    with pytest.raises(ValueError, match="call fit"):
        tuner.get_model()
    for train, validation in ((TRAIN[1] + 5, VALIDATION[1]), (TRAIN[1], VALIDATION[1] - 1)):
        with pytest.raises(ValueError, match=r"Labels must be integers from 0 to the number of classes - 1 \(1\)"):
            tuner.fit(TRAIN[0], train, validation_data=(VALIDATION[0], validation))
    nothing = farhox.Tuner(network(), sweep=False, guard=False)
    with pytest.raises(ValueError, match="must have a finite loss|NaN or infinity"):
        nothing.fit(TRAIN[0] * np.inf, TRAIN[1], validation_data=(VALIDATION[0] * np.inf, VALIDATION[1]), verbose=0)

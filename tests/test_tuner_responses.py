"""Tuner: dropout, noise and augmentation, in the same training as what gradients reach through the path."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_docs import README, blocks

import farhox
from farhox import stn
from farhox.tuner.beginnings import Beginnings
from farhox.tuner.training import Guard, Training

RANDOM = np.random.default_rng(0)
X = RANDOM.uniform(0, 255, size=(60, 8, 8, 3)).astype("float32")
Y = RANDOM.integers(0, 3, size=60)
TRAIN, VALIDATION = (X[:40], Y[:40]), (X[40:], Y[40:])


def network(rates=(0.2, 0.4), loss=None, head=keras.layers.Dense):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input([8, 8, 3]), keras.layers.RandomTranslation(0.1, 0.2, interpolation="nearest", name="move"),
        keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
        keras.layers.Flatten(), keras.layers.Dropout(rates[0], name="drop"),
        keras.layers.Dense(8, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-3), name="hidden"),
        keras.layers.Dropout(rates[1], name="drop_more"), head(3, name="head")])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9),
                  loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def rows_of(tuner):
    return {row.name: row for row in tuner._rows}


@pytest.mark.slow
def test_strengths_are_found_with_one_for_all_layers_or_one_each():
    shared = rows_of(farhox.Tuner(network()))
    assert shared["dropout_rate"].value() == pytest.approx(0.3) and shared["dropout_rate"].where == "drop, drop_more"
    assert shared["random_translation_height_factor"].value() == pytest.approx(0.1)
    assert {row.route for name, row in shared.items() if name.startswith("random")} == {"response"}
    assert shared["dropout_rate"].route == shared["l2"].route == "path" and shared["learning_rate"].route == "sweep"
    own = rows_of(farhox.Tuner(network(), granularity="layer", fix=["random_translation_width_factor"],
                               start={"drop.rate": 0.25}, ranges={"drop_more.rate": (0.3, 0.6)}))
    assert own["drop.rate"].value() == pytest.approx(0.25) and own["drop_more.rate"].value() == pytest.approx(0.4)
    assert not own["move.width_factor"].tuned and own["move.height_factor"].tuned
    u = own["drop_more.rate"].hyperparameter.variable
    for end, value in ((-9.0, 0.3), (9.0, 0.6)):
        keep = u.numpy()
        u.assign(u.constraint(tf.constant(end)))
        assert own["drop_more.rate"].value() == pytest.approx(value, rel=1e-4)
        u.assign(keep)


def test_what_is_fixed_stays_the_layer_of_keras_and_layers_respond_where_no_derivative_goes_along_the_path():
    def layers_of(tuner):
        return {layer.name: type(layer) for layer in tuner._network.model.layers}

    layers = layers_of(farhox.Tuner(network(), fix=["dropout_rate"]))
    assert layers["drop"] is keras.layers.Dropout and layers["move"] is stn.Augmentation
    assert layers["hidden"] is stn.Dense
    layers = layers_of(farhox.Tuner(
        network(), fix=["random_translation_height_factor", "random_translation_width_factor"]))
    assert layers["move"] is keras.layers.RandomTranslation and layers["drop"] is stn.Dropout
    assert layers["hidden"] is keras.layers.Dense
    plain = farhox.Tuner(network(), tune=["l2"])
    assert {type(layer).__module__.split(".")[0] for layer in plain._network.model.layers} == {"keras"}


@pytest.mark.slow
def test_one_round_moves_strengths_by_the_response_and_penalties_by_the_path():
    tuner = farhox.Tuner(network(), sweep=False, annealing=0.0, outer_rate=0.3)
    training = Training(tuner._network, tuner._model.optimizer, tuner._rows, 1, 0.3)
    training.rate.train(4, 0.0)
    # Gates that start at zero have no response yet.
    for variable in tuner._network.model.trainable_variables:
        if "gate" in variable.path:
            variable.assign(0.1 * RANDOM.normal(size=variable.shape))
    tf.config.run_functions_eagerly(True)
    result = training._engine.step(farhox.repeat(TRAIN, 2), VALIDATION)
    tf.config.run_functions_eagerly(False)
    # The strengths have the derivative of the validation loss through the gates, at the weights after the steps.
    entries = [row.hyperparameter for row in training.tuned]
    problem = training._engine.problem
    values = dict(zip(map(id, problem.outer_variables), result.gradients))
    before = {id(v): tf.identity(v) for v in problem.outer_variables}
    moved = {row.name: float(row.hyperparameter.variable) for row in training.tuned}
    assert len(entries) == 4 and all(np.isfinite(g) for g in result.gradients)
    # Back to where the gradient was taken: one Adam step of the size of its rate ago.
    for row in training.tuned:
        step = 0.1 if row.route == "response" else 0.3
        gradient = float(values[id(row.hyperparameter.variable)])
        before[row.name] = moved[row.name] + step * np.sign(gradient)
        row.hyperparameter.variable.assign(before[row.name])
    for row in training.tuned:
        if row.route == "response":
            with tf.GradientTape() as tape:
                loss = tuner._network.outer_objective(VALIDATION)
            expected = tape.gradient(loss, row.hyperparameter.variable.value)
            np.testing.assert_allclose(values[id(row.hyperparameter.variable)], expected, rtol=1e-3, atol=1e-7)
    assert before["l2"] == pytest.approx(np.log(1e-3), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layers, routes", [
    (lambda k: [k.RandomErasing(0.5), k.RandomZoom(0.1), k.Conv2D(4, 3), k.BatchNormalization(),
                k.SpatialDropout2D(0.2), k.Flatten()],
     {"random_erasing_factor": "response", "random_zoom_height_factor": "path", "spatial_dropout2_d_rate": "path"}),
    (lambda k: [k.Reshape((8, 24)), k.GRU(5, dropout=0.2), k.GaussianNoise(0.1)],
     {"gru_dropout": "response", "gaussian_noise_stddev": "path"})], ids=["images", "sequences"])
def test_strengths_with_and_without_a_derivative_are_tuned_in_one_training(layers, routes):
    if "random_erasing_factor" in routes and not hasattr(keras.layers, "RandomErasing"):
        pytest.skip("This Keras has no RandomErasing.")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input([8, 8, 3]), keras.layers.Rescaling(1 / 255), *layers(keras.layers), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tuner = farhox.Tuner(model)
    before = tuner.get_hyperparameters()
    assert {name: row.route for name, row in rows_of(tuner).items() if name in routes} == routes
    history = tuner.fit(*TRAIN, batch_size=5, epochs=4, validation_data=VALIDATION, verbose=0).history
    for name in routes:
        assert np.all(np.isfinite(history[name])) and history[name][-1] != pytest.approx(before[name], rel=1e-3)
    assert [type(layer) for layer in tuner.get_model().layers] == [type(layer) for layer in model.layers]


@pytest.mark.slow
def test_the_readmes_own_model_is_tuned_on_a_folder_of_images_and_plain(tmp_path, capsys, monkeypatch):
    pytest.importorskip("PIL")
    for label in range(3):  # Pictures of three classes, as a user has them on disk.
        (tmp_path / "photos" / f"class_{label}").mkdir(parents=True)
        for index in range(16):
            image = RANDOM.uniform(0, 90, size=(8, 8, 3))
            image[..., label] += 120
            keras.utils.save_img(tmp_path / "photos" / f"class_{label}" / f"{index}.png", image, scale=False)
    ((_, line, code),) = [block for block in blocks(README) if "farhox.Tuner(" in block[2]]
    assert len(code.splitlines()) <= 16 and len([line for line in code.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    page = {}
    exec(compile("\n" * line + code, str(README), "exec"), page)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 8 and max(map(len, lines)) <= 80 and lines[0].count("loss") == 2
    best, tuner, validation = page["best"], page["tuner"], page["validation"]
    values = tuner.get_hyperparameters()
    layers = {type(layer).__name__: layer for layer in best.layers}
    assert {type(layer).__module__.split(".")[0] for layer in best.layers} == {"keras"}
    assert layers["Dropout"].rate == pytest.approx(values["dropout_rate"])
    factor = layers["RandomTranslation"].get_config()["height_factor"]
    assert np.max(factor) == pytest.approx(values["random_translation_height_factor"])
    assert layers["Dense"].get_config()["kernel_regularizer"]["config"]["l2"] == pytest.approx(values["l2"])
    chances, labels = zip(*[(best(x, training=False), y) for x, y in validation])
    loss = float(keras.losses.SparseCategoricalCrossentropy()(np.concatenate(labels), np.concatenate(chances)))
    assert loss == pytest.approx(tuner._best["logs"]["val_loss"], rel=1e-4) and loss < np.log(3)
    best.save(tmp_path / "best.keras")
    assert b"farhox" not in (tmp_path / "best.keras").read_bytes()
    again = keras.models.load_model(tmp_path / "best.keras")
    x = next(iter(validation))[0]
    np.testing.assert_allclose(again.predict(x, verbose=0), best.predict(x, verbose=0), rtol=1e-5)


@pytest.mark.slow
def test_a_hyperparameter_in_a_self_tuning_layer_is_the_users_own():
    rate = farhox.Hyperparameter(0.3, low=0.0, high=0.9, name="rate")
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(4), stn.Dropout(rate), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    row = rows_of(farhox.Tuner(model))["rate"]
    assert row.hyperparameter is rate and row.route == "path" and row.tuned
    length = farhox.Hyperparameter(2.5, low=0.0, high=4.0, discrete=True, name="length")
    model = keras.Sequential([
        keras.Input([8, 8, 3]), stn.Cutout(length), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert rows_of(farhox.Tuner(model))["length"].route == "response"


def test_strengths_take_larger_steps_in_a_training_of_few_updates_and_wait_at_its_start():
    tuner = farhox.Tuner(network())
    training = Training(tuner._network, tuner._model.optimizer, tuner._rows, 1, 0.3)

    def rates(progress, updates):
        training.anneal_outer_rate(progress, updates)
        return float(training.outer_optimizer.learning_rate), float(training._response.learning_rate)

    for updates, faster in ((1000, 1.0), (100, 1.0), (50, 2.0), (10, 4.0)):
        np.testing.assert_allclose(rates(0.2, updates), [0.3 * 0.65, 0.1 * 0.65 * faster], rtol=1e-6)
    np.testing.assert_allclose(rates(0.05, 10), [0.3 * (1 - 0.7 / 8), 0.0], rtol=1e-6)


def beginnings_of(model, total=1000, **given):
    """`Beginnings` of a tuner of this model, and its tuned hyperparameters by name."""
    tuner = farhox.Tuner(model, **given)
    training = Training(tuner._network, tuner._model.optimizer, tuner._rows, 1, 0.3)
    return Beginnings(training, total), {row.name: row.hyperparameter for row in training.tuned}


def test_strengths_begin_at_a_third_where_training_makes_much_more_progress_so():
    beginnings, tuned = beginnings_of(network(), fix=["l2"])
    before = {name: float(entry.numpy()) for name, entry in tuned.items()}
    assert len(tuned) == 3

    def check(times):
        for name, entry in tuned.items():
            np.testing.assert_allclose(float(entry.numpy()), times * before[name], rtol=1e-5)

    beginnings.sweep()
    check(1 / 3)
    beginnings.heat(0.01)
    check(1 / 3)

    def progress(loss):
        check(1.0)  # It is made with the strengths of the start.
        return loss

    # The search has come from 2 to 1; a tenth of that is .1.
    assert beginnings.choose(lambda: progress(1.09), 0.01, 1.0, 2.0) == []
    check(1.0)
    notes = beginnings.choose(lambda: progress(1.11), 0.01, 1.0, 2.0)
    assert len(notes) == 1 and notes[0].startswith("strengths: a third")
    check(1 / 3)
    beginnings.choose(lambda: progress(np.inf), 0.01, 1.0, 2.0)
    check(1 / 3)


def dense(optimizer, l2=0.3):
    model = keras.Sequential([
        keras.Input([4]), keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(l2)), keras.layers.Dense(2)])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("optimizer, rate, expected", [
    (keras.optimizers.SGD(0.1, momentum=0.6), 0.05, {"l2": 1 / (2 * 0.05 / 0.4 * 1000)}),
    (keras.optimizers.SGD(0.1, weight_decay=2.0), 0.05, {"weight_decay": 1 / 50, "l2": 0.5 / 50}),
    # Of an optimizer that normalises the gradient, what an L2 penalty does has nothing to do with the rate.
    (keras.optimizers.AdamW(0.1, weight_decay=2.0), 0.005, {"weight_decay": 1 / 5, "l2": 0.3}),
    (keras.optimizers.AdamW(0.1, weight_decay=2.0), 1e-5, {"weight_decay": 20.0, "l2": 0.3}),  # The end of its range.
])
def test_decays_begin_where_they_fit_the_rate_and_the_steps(optimizer, rate, expected):
    beginnings, tuned = beginnings_of(dense(optimizer))
    before = {name: float(tuned[name].numpy()) for name in expected}
    beginnings.heat(rate)
    notes = beginnings.choose(lambda: 0.95, rate, 1.0, 2.0)
    assert [note.startswith("decays: begin at") for note in notes] == [True]
    for name, value in expected.items():
        np.testing.assert_allclose(float(tuned[name].numpy()), value, rtol=1e-5)
    # Those of the start make a tenth more progress.
    assert beginnings.choose(lambda: 0.89, rate, 1.0, 2.0)[0].startswith("decays: as at the start")
    for name, value in before.items():
        np.testing.assert_allclose(float(tuned[name].numpy()), value, rtol=1e-5)
    beginnings.sweep()
    for name in [name for name in expected if abs(expected[name] - before[name]) > 1e-3]:
        assert float(tuned[name].numpy()) < 1e-6


@pytest.mark.parametrize("with_own_strength, with_own_decay, kept", [
    (1.05, 0.98, "decays: begin"), (1.05, 0.94, "decays: as at the start"), (1.2, 0.95, "decays: begin")])
def test_each_of_the_last_heats_differs_in_one_thing_from_what_it_is_compared_with(
        with_own_strength, with_own_decay, kept):
    model = keras.Sequential([keras.Input([4]), keras.layers.Dropout(0.6), keras.layers.Dense(2)])
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=2.0),
                  keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    beginnings, tuned = beginnings_of(model)
    beginnings.sweep()
    beginnings.heat(0.002)  # The last heat of the search is of another rate than the best.
    losses, seen = [with_own_strength, with_own_decay], []

    def progress():
        seen.append((float(tuned["dropout_rate"].numpy()), float(tuned["weight_decay"].numpy())))
        return losses[len(seen) - 1]

    notes = beginnings.choose(progress, 0.01, 1.0, 2.0)
    kept_strength = 0.6 if with_own_strength < 1.1 else 0.2
    np.testing.assert_allclose(seen, [(0.6, 1 / 10), (kept_strength, 2.0)], rtol=1e-5)
    assert notes[-1].startswith(kept)


def test_what_the_guard_waits_for_has_the_penalties_that_training_begins_with(monkeypatch):
    reached = []

    class Waits(Guard):
        def begin(self, initial, reached_loss=None):
            if reached_loss is not None:
                reached.append((reached_loss, tuner._network.penalty()))
            super().begin(initial, reached_loss)

    monkeypatch.setattr("farhox.tuner.tuner.Guard", Waits)
    model = dense(keras.optimizers.SGD(0.1))
    model.layers[0].kernel.assign(np.full([4, 3], 30.0))
    tuner = farhox.Tuner(model)
    x, y = RANDOM.normal(size=(60, 4)).astype("float32"), RANDOM.integers(0, 2, 60)
    tuner.fit((x, y), validation_data=(x, y), epochs=2, verbose=0)
    [(loss, penalty)] = reached
    # The sweep went without a penalty to speak of: what it came to is above that of what it began with.
    assert 10.0 < penalty < loss


def test_of_a_schedule_the_rate_of_a_decay_is_the_mean():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([499.5], [0.03, 0.01])
    beginnings, tuned = beginnings_of(dense(keras.optimizers.AdamW(schedule, weight_decay=2.0)))
    beginnings.heat(0.5)
    np.testing.assert_allclose(float(tuned["weight_decay"].numpy()), 1 / (0.5 * 0.02 * 1000), rtol=1e-5)


def test_a_hyperparameter_of_the_users_own_begins_where_it_is():
    own = farhox.Hyperparameter(0.1, low=0.0, log=True, name="l2")
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, kernel_regularizer=farhox.L1L2(l2=own))])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    beginnings, tuned = beginnings_of(model)
    beginnings.sweep()
    beginnings.heat(0.5)
    assert tuned["l2"] is own and float(own.numpy()) == pytest.approx(0.1)


def test_a_decay_that_is_given_to_start_from_stays():
    beginnings, tuned = beginnings_of(dense(keras.optimizers.SGD(0.1)), start={"l2": 0.02})
    beginnings.sweep()
    beginnings.heat(0.05)
    assert beginnings.choose(lambda: 1.0, 0.05, 1.0, 2.0) == []
    np.testing.assert_allclose(float(tuned["l2"].numpy()), 0.02, rtol=1e-5)


def test_bad_strengths_are_refused():
    with pytest.raises(ValueError, match="must hold its value 0.3 and end at 0.9 at most"):
        farhox.Tuner(network(), ranges={"dropout_rate": (0.4, 0.6)})
    model = keras.Sequential([
        keras.Input([4, 4, 1]), keras.layers.RandomRotation(0.2, interpolation="nearest"),
        keras.layers.LayerNormalization()])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="is tuned by layers that respond to it"):
        farhox.Tuner(model)

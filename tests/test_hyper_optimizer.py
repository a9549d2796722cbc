"""HyperOptimizer: fit, step, evaluate and train_inner, Keras' callbacks, skipped updates, strategies, resuming."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

import farhox
from farhox.training.progress import Progress

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
TRAIN, VALIDATION = (X[:200], Y[:200]), (X[200:300], Y[200:300])


def make_model(normalized=False, hidden=False):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, activation="relu")] if hidden else []
    layers += [keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)] if normalized else []
    return keras.Sequential([keras.Input([64]), *layers, keras.layers.Dense(10, activation="softmax")])


def make(method=None, normalized=False, rate=0.1, optimizer=None, metrics=("accuracy",), compiled=None, **settings):
    """A HyperOptimizer that learns learning rate and momentum of a small network on digits."""
    learning_rate = farhox.Hyperparameter(rate, low=0.0, log=True, name="learning_rate")
    momentum = farhox.Hyperparameter(0.5, low=0.0, high=1.0, name="momentum")
    # One layer alone diverges at no rate: the derivative of its loss is bounded.
    problem = farhox.supervised_problem(
        make_model(normalized, hidden=rate > 1.0), dynamics=farhox.Momentum(learning_rate, momentum),
        outer_variables=[learning_rate, momentum])
    hyper_optimizer = farhox.HyperOptimizer(problem, method, **settings)
    hyper_optimizer.compile(optimizer or keras.optimizers.Adam(0.05), metrics=list(metrics), **(compiled or {}))
    return hyper_optimizer


def hyper_iterations(count, steps=3, train=TRAIN):
    """A fixed data set of `count` different hyper-iterations."""
    generator = np.random.default_rng(0)
    inner = farhox.gather(train, generator.integers(0, 200, (steps, 20)))
    indices = tf.constant(generator.integers(0, 200, (count, steps, 20)))
    return tf.data.Dataset.from_tensor_slices(indices).map(
        lambda chosen: (inner._replace(indices=chosen), tuple(tf.constant(part) for part in VALIDATION)))


def outer_of(hyper_optimizer):
    return [variable.numpy() for variable in hyper_optimizer.problem.outer_variables]


@pytest.fixture(scope="module")
def traced():
    """One optimizer for all tests that ask nothing special of it: traced once, at its initial values for each."""
    hyper_optimizer = make()
    everything = [*hyper_optimizer.variables, *hyper_optimizer.optimizer.variables]
    initial = [variable.numpy() for variable in everything]

    def fresh():
        hyper_optimizer.reset_metrics()
        for variable, value in zip(everything, initial):
            variable.assign(value)
        return hyper_optimizer

    return fresh


def test_one_step_of_fit_is_the_outer_optimizer_applied_to_the_hypergradient(traced):
    hyper_optimizer, data = traced(), hyper_iterations(1)
    pair = next(iter(data))
    gradients = farhox.ReverseHG().compute(hyper_optimizer.problem, *pair).gradients
    hyper_optimizer.fit(data, verbose=0)
    fitted = outer_of(hyper_optimizer)
    result = traced().step(*pair)
    np.testing.assert_array_equal(outer_of(hyper_optimizer), fitted)
    np.testing.assert_allclose(result.gradients, gradients, rtol=1e-4)
    traced()
    keras.optimizers.Adam(0.05).apply(gradients, hyper_optimizer.problem.outer_variables)
    np.testing.assert_allclose(fitted, outer_of(hyper_optimizer), rtol=1e-6)


def test_logs_hold_losses_metrics_natural_values_and_skips(traced):
    hyper_optimizer = traced()
    history = hyper_optimizer.fit(hyper_iterations(4), epochs=2, verbose=0).history
    assert set(history) == {"outer_loss", "inner_loss", "accuracy", "learning_rate", "momentum"}
    rate, momentum = hyper_optimizer.problem.hyperparameters
    assert history["learning_rate"][-1] == pytest.approx(float(rate.numpy()), rel=1e-6)
    assert history["momentum"][-1] == pytest.approx(float(momentum.numpy()), rel=1e-6)
    # Said once, and there for who asks by Keras' name; the same of a count that is zero.
    assert history["loss"] == history.get("loss") == history["outer_loss"]
    assert history["outer_loss"][1] < history["outer_loss"][0]
    assert history["skipped_updates"] == [0, 0] and history.get("no such", 3) == 3
    with pytest.raises(KeyError, match="no such"):
        history["no such"]


def test_arrays_and_equal_names_are_logged():
    w = keras.Variable(np.zeros(3), dtype="float32", name="w")
    small, twin = farhox.Hyperparameter([1.0, 2.0], name="p"), farhox.Hyperparameter(0.5, name="p")
    weights, plain = farhox.ExampleWeights(50), keras.Variable(2.0, name="plain")
    problem = farhox.BilevelProblem(
        lambda _: keras.ops.sum((w - small()[0] * twin()) ** 2) * small()[1] * plain * keras.ops.sum(weights([0])),
        lambda _: keras.ops.sum(w), [w], [small, twin, weights, plain], dynamics=farhox.GradientDescent(0.1))
    hyper_optimizer = farhox.HyperOptimizer(problem)
    hyper_optimizer.compile(keras.optimizers.SGD(0.0))
    logs = hyper_optimizer.fit((farhox.repeat(tf.zeros([1]), 2), tf.zeros([1])), verbose=0).history
    assert logs["p[0]"] == [1.0] and logs["p[1]"] == [2.0] and logs["p_1"] == [0.5]
    assert logs["example_weights_mean"] == [0.5] and logs["plain"] == [2.0]


def test_evaluate_returns_each_value_once_and_names_it(traced):
    hyper_optimizer, data = traced(), hyper_iterations(1)
    values = hyper_optimizer.evaluate(data, verbose=0)
    named = hyper_optimizer.evaluate(data, verbose=0, return_dict=True)
    assert hyper_optimizer.metrics_names == ["outer_loss", "inner_loss", "accuracy"]
    assert values == [named[name] for name in hyper_optimizer.metrics_names] and len(named) == 3
    assert named["loss"] == named["outer_loss"]
    online = make(online=True, metrics=())
    assert online.metrics_names == ["outer_loss"] and isinstance(online.evaluate(data, verbose=0), float)
    history = hyper_optimizer.fit(data, validation_data=data, verbose=0).history
    assert {name for name in history if name.startswith("val_")} == {"val_outer_loss", "val_inner_loss", "val_accuracy"}
    assert history["val_loss"] == history["val_outer_loss"]


@pytest.mark.slow
def test_callbacks_find_the_outer_loss_under_the_names_of_keras(traced):
    seen = {}
    traced().fit(hyper_iterations(1), validation_data=hyper_iterations(1), verbose=0, callbacks=[
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.update(logs))])
    assert seen["loss"] == seen["outer_loss"] and seen["val_loss"] == seen["val_outer_loss"]
    assert seen["skipped_updates"] == 0


@pytest.mark.one_case
@pytest.mark.parametrize("verbose", [1, 2])
def test_an_epoch_is_shown_in_one_line_of_80_columns(verbose, traced, capsys):
    hyper_optimizer, data = traced(), hyper_iterations(2)
    hyper_optimizer.fit(data, epochs=2, validation_data=data, verbose=verbose)
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(lines) == 2 and all(len(part) <= 80 for line in lines for part in line.split("\r"))
    assert lines[1].split("\r")[-1].startswith("Epoch 2/2 ")
    for name in ("outer_loss", "val_outer_loss", "accuracy"):
        assert lines[1].split("\r")[-1].count(f" {name}: ") == 1
    assert "skipped_updates" not in lines[1] and " loss: " not in lines[1]
    hyper_optimizer.evaluate(data, verbose=2)
    assert capsys.readouterr().out.startswith("Evaluation ")


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_the_line_of_an_epoch_is_written_anew_on_a_terminal_alone(on_a_terminal, capsys, monkeypatch):
    progress = Progress()
    progress.set_params({"verbose": 1, "epochs": 1, "steps": 2})
    monkeypatch.setattr("sys.stdout.isatty", lambda: on_a_terminal)
    progress.on_epoch_begin(0)
    progress.on_train_batch_end(0, {"outer_loss": 0.5})
    progress.on_epoch_end(0, {"outer_loss": 0.25})
    shown = capsys.readouterr().out
    assert ("outer_loss: 0.5" in shown) == ("\r" in shown) == on_a_terminal
    assert shown.endswith("outer_loss: 0.25\n")


def test_what_was_skipped_is_shown():
    from farhox.training.progress import line
    assert line("Epoch 1/1", {"outer_loss": 0.5, "loss": 0.5, "skipped_updates": 2.0}) == (
        "Epoch 1/1 - outer_loss: 0.5 - skipped_updates: 2")


def test_evaluate_changes_nothing_and_train_inner_keeps_the_result():
    hyper_optimizer = make(normalized=True)
    data = hyper_iterations(2)
    before = [variable.numpy() for variable in hyper_optimizer.variables]
    result = hyper_optimizer.evaluate(data, verbose=0, return_dict=True)
    model_variables = hyper_optimizer.problem.inner_variables + hyper_optimizer.problem.state_variables
    start = [variable.numpy() for variable in model_variables]
    inner_batches, outer_batch = next(iter(data))
    one = hyper_optimizer.evaluate((inner_batches, outer_batch), verbose=0, return_dict=True)
    losses = hyper_optimizer.train_inner(inner_batches)
    assert losses.shape == (3,) and 0 <= result["accuracy"] <= 1
    assert all(np.array_equal(a, b) for a, b in zip(before[:2], outer_of(hyper_optimizer)))
    assert any(not np.array_equal(a, v.numpy()) for a, v in zip(start, model_variables))
    outer = hyper_optimizer.problem.outer_values()
    trained = hyper_optimizer.problem.outer_loss(hyper_optimizer.problem.initial_state(), outer, outer_batch)
    assert float(trained) == pytest.approx(float(one["outer_loss"]), rel=1e-5)


def test_keras_callbacks_work_unchanged(traced, tmp_path):
    callbacks = keras.callbacks
    hyper_optimizer = traced()
    hyper_optimizer.optimizer.learning_rate.assign(0.0)
    history = hyper_optimizer.fit(hyper_iterations(2), epochs=6, verbose=0, callbacks=[
        callbacks.EarlyStopping("outer_loss", mode="min", patience=3, min_delta=1e-3),
        callbacks.ModelCheckpoint(tmp_path / "best.weights.h5", monitor="outer_loss", mode="min",
                                  save_best_only=True, save_weights_only=True),
        callbacks.CSVLogger(tmp_path / "log.csv"),
        callbacks.TensorBoard(tmp_path / "board"),
        callbacks.TerminateOnNaN(),
        callbacks.ReduceLROnPlateau("outer_loss", mode="min", factor=0.5, patience=1, min_delta=1e-3)])
    assert len(history.history["loss"]) == 4  # Nothing is learned, so patience ends it.
    assert (tmp_path / "best.weights.h5").exists() and any((tmp_path / "board").rglob("events*"))
    assert "learning_rate" in (tmp_path / "log.csv").read_text().splitlines()[0]
    assert float(hyper_optimizer.optimizer.learning_rate) == 0.0


@pytest.mark.slow
def test_reduce_on_plateau_acts_on_the_outer_optimizer(traced):
    hyper_optimizer = traced()
    hyper_optimizer.optimizer.learning_rate.assign(1e-6)
    hyper_optimizer.fit(hyper_iterations(1), epochs=4, verbose=0, callbacks=[
        keras.callbacks.ReduceLROnPlateau("outer_loss", mode="min", factor=0.5, patience=1, min_delta=1.0)])
    assert float(hyper_optimizer.optimizer.learning_rate) < 1e-6


def test_terminate_on_nan_hears_of_a_diverged_training(traced):
    hyper_optimizer = traced()
    kernel = hyper_optimizer.problem.inner_variables[0]
    kernel.assign(tf.fill(kernel.shape, 3e38))
    history = hyper_optimizer.fit(
        hyper_iterations(5), epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert len(history.epoch) == 1


@pytest.mark.slow
def test_online_training_with_statistics_that_was_interrupted_equals_one_that_was_not_bit_for_bit(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        hyper_optimizer = make(farhox.ReverseHG(truncation=2), normalized=True, online=True)
        hyper_optimizer.fit(hyper_iterations(2), epochs=4, verbose=0, callbacks=list(callbacks))
        return hyper_optimizer

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(farhox.callbacks.Resume(tmp_path), Interrupt())
    resumed = run(farhox.callbacks.Resume(tmp_path))
    for a, b in zip(whole.variables + whole.optimizer.variables, resumed.variables + resumed.optimizer.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def test_a_checkpoint_of_the_whole_optimizer_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="must have save_weights_only=True"):
        make().fit(hyper_iterations(1), verbose=0, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "x.keras")])


def test_a_callback_list_of_keras_is_taken_like_a_list(traced):
    seen = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    epochs = []
    traced().fit(hyper_iterations(1), verbose=0, callbacks=keras.callbacks.CallbackList([seen]))
    assert epochs == [0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Implicit hypergradients were taken far")
def test_warm_start_of_the_linear_solver_is_saved(tmp_path):
    def fresh():
        weights = farhox.ExampleWeights(200)
        problem = farhox.supervised_problem(make_model(), dynamics=farhox.GradientDescent(0.1), example_weights=weights)
        hyper_optimizer = farhox.HyperOptimizer(problem, farhox.ImplicitHG(farhox.ConjugateGradient(3), damping=0.1))
        hyper_optimizer.compile(keras.optimizers.Adam(0.1))
        return hyper_optimizer

    data = farhox.bilevel_dataset(TRAIN, VALIDATION, inner_steps=3, index=True)
    first, second = fresh(), fresh()
    first.fit(data, epochs=2, verbose=0)
    first.save_weights(tmp_path / "x.weights.h5")
    second.load_weights(tmp_path / "x.weights.h5")
    pair = next(iter(data))
    a, b = first.step(*pair), second.step(*pair)
    np.testing.assert_array_equal(a.carry[0], b.carry[0])
    np.testing.assert_array_equal(outer_of(first)[0], outer_of(second)[0])


@pytest.mark.slow
def test_real_time_forward_is_one_long_forward_computation_bit_for_bit():
    hyper_optimizer = make(farhox.ForwardHG(), optimizer=keras.optimizers.SGD(0.0), online=True)
    by_hand = make(farhox.ForwardHG())
    compute = tf.function(
        lambda inner, outer, *kept: farhox.ForwardHG().compute(by_hand.problem, inner, outer, *kept), autograph=False)
    state = by_hand.problem.initial_state()
    carry = farhox.ForwardHG().initial_carry(by_hand.problem)
    for inner_batches, outer_batch in hyper_iterations(3):
        online = hyper_optimizer.step(inner_batches, outer_batch)
        result = compute(inner_batches, outer_batch, state, carry)
        state, carry = result.state, result.carry
    for a, b in zip(tf.nest.flatten(online), tf.nest.flatten(result)):
        np.testing.assert_array_equal(a, b)
    assert int(state.step) == 9


def test_what_is_not_finite_never_reaches_the_outer_variables():
    hyper_optimizer = make(rate=1e30, max_skipped_updates=100, metrics=())
    before = outer_of(hyper_optimizer), [v.numpy() for v in hyper_optimizer.optimizer.variables]
    history = hyper_optimizer.fit(hyper_iterations(3), epochs=2, verbose=0).history
    assert history["skipped_updates"] == [3, 6]
    np.testing.assert_array_equal(outer_of(hyper_optimizer), before[0])
    for a, b in zip(before[1], hyper_optimizer.optimizer.variables):
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.slow
def test_a_skipped_update_leaves_the_online_state_as_it_was():
    hyper_optimizer = make(rate=1e30, online=True)
    before = [variable.numpy() for variable in hyper_optimizer.problem.inner_variables]
    result = hyper_optimizer.step(*next(iter(hyper_iterations(1))))
    assert not np.isfinite(result.outer_loss)
    for a, b in zip(before, hyper_optimizer.problem.inner_variables):
        np.testing.assert_array_equal(a, b.numpy())


def test_an_inner_state_that_is_not_finite_is_not_carried_on():
    w, u, lam = (keras.Variable(value, name=name) for value, name in ((1.0, "w"), (0.0, "u"), (1.0, "lam")))
    problem = farhox.BilevelProblem(
        lambda _: (w - lam) ** 2 + 3e38 * u, lambda _: w ** 2, [w, u], [lam], dynamics=farhox.GradientDescent(10.0))
    hyper_optimizer = farhox.HyperOptimizer(problem, online=True, max_skipped_updates=2)
    hyper_optimizer.compile(keras.optimizers.SGD(0.1))
    data = (farhox.repeat(tf.zeros([1]), 1), tf.zeros([1]))
    result = hyper_optimizer.step(*data)
    assert np.isfinite(result.outer_loss) and np.isfinite(result.inner_losses).all()
    assert not np.isfinite(result.state.variables[1])
    assert (w.numpy(), u.numpy(), lam.numpy()) == (1.0, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="one: the inner state that is carried on. Try"):
        hyper_optimizer.step(*data)


class Spoiled(farhox.ReverseHG):
    """A hypergradient that is not a number, of an inner training that is as it should be."""

    def _compute(self, *arguments):
        result = super()._compute(*arguments)
        return result._replace(gradients=[float("nan") * gradient for gradient in result.gradients])


def test_online_the_inner_training_goes_on_when_a_hypergradient_is_skipped():
    w, rate = keras.Variable(1.0, name="w"), keras.Variable(0.25, name="rate")
    problem = farhox.BilevelProblem(lambda _: (w - 3.0) ** 2, lambda _: w ** 2, [w], [rate],
                                    dynamics=farhox.GradientDescent(rate))
    spoiled = farhox.HyperOptimizer(problem, Spoiled(), online=True)
    spoiled.compile(keras.optimizers.SGD(0.1))
    for _ in range(2):
        spoiled.step(farhox.repeat(tf.zeros([1]), 3), tf.zeros([1]))
    # Each step halves the distance to 3.
    assert w.numpy() == 3.0 - 2.0 / 2 ** 6 and rate.numpy() == 0.25
    assert int(spoiled._watch.skipped.numpy()) == 2 and int(spoiled.kept_state().step) == 6


def small_bilevel(rate, **settings):
    """Inner (w - λ)^2 from w = 1 with λ = 3, outer w^2."""
    w, lam = keras.Variable(1.0, dtype="float64", name="w"), keras.Variable(3.0, dtype="float64", name="lam")
    problem = farhox.BilevelProblem(lambda _: (w - lam) ** 2, lambda _: w ** 2, [w], [lam],
                                    dynamics=farhox.GradientDescent(rate))
    hyper_optimizer = farhox.HyperOptimizer(problem, online=True, outer_first=True, **settings)
    hyper_optimizer.compile(keras.optimizers.SGD(0.125))  # A number that float32 has.
    return hyper_optimizer, w, lam


@pytest.mark.one_case
@pytest.mark.parametrize("method", [
    farhox.ReverseHG(), farhox.ForwardHG(warm_restart=True), farhox.hypergradients.DartsHG(epsilon=1.0)],
    ids=lambda method: type(method).__name__)
def test_outer_first_takes_the_steps_that_are_kept_with_the_new_outer_values(method):
    hyper_optimizer, w, lam = small_bilevel(0.25, hypergradient=method)
    for iteration in range(2):
        w_0, lam_0 = w.numpy(), lam.numpy()
        result = hyper_optimizer.step(farhox.repeat(tf.zeros([1]), 1), tf.zeros([1]))
        # The step halves the distance to λ, on which its end depends by one half.
        trial = (w_0 + lam_0) / 2
        np.testing.assert_allclose(lam.numpy(), lam_0 - 0.125 * 2 * trial / 2, rtol=1e-9)
        np.testing.assert_allclose(w.numpy(), (w_0 + lam.numpy()) / 2, rtol=1e-12)
        np.testing.assert_allclose(result.outer_loss, trial ** 2, rtol=1e-12)
        np.testing.assert_allclose(result.inner_losses, [(w_0 - lam.numpy()) ** 2], rtol=1e-12)
        assert int(hyper_optimizer.kept_state().step) == iteration + 1


def test_outer_first_an_update_under_which_the_training_diverges_is_taken_back_and_counts_as_skipped():
    w, lam = keras.Variable(1.0, name="w"), keras.Variable(1.0, name="lam")
    problem = farhox.BilevelProblem(lambda _: w / lam, lambda _: w ** 2, [w], [lam],
                                    dynamics=farhox.GradientDescent(1.0))
    # The step leads to w = 1 - 1 / λ = 0, where the hypergradient is 2 w / λ^2 = 0: weight decay alone takes λ to 0.
    hyper_optimizer = farhox.HyperOptimizer(problem, online=True, outer_first=True, max_skipped_updates=2)
    hyper_optimizer.compile(keras.optimizers.SGD(1.0, weight_decay=1.0))
    data = (farhox.repeat(tf.zeros([1]), 1), tf.zeros([1]))
    hyper_optimizer.step(*data)
    assert (w.numpy(), lam.numpy(), hyper_optimizer.hyper_iterations) == (1.0, 1.0, 1)
    with pytest.raises(RuntimeError, match="the inner objective, the inner state that is carried on. Try"):
        hyper_optimizer.step(*data)


def test_a_memory_that_is_lost_starts_anew_where_the_inner_training_goes_on():
    w, rate = keras.Variable(1.0, name="w"), keras.Variable(0.5, name="rate")
    problem = farhox.BilevelProblem(lambda _: (w - 3.0) ** 2, lambda _: w ** 2, [w], [rate],
                                    dynamics=farhox.GradientDescent(rate))
    hyper_optimizer = farhox.HyperOptimizer(problem, farhox.ForwardHG(), online=True)
    hyper_optimizer.compile(keras.optimizers.SGD(0.0))
    tangents = hyper_optimizer._carry[0]
    data = (farhox.repeat(tf.zeros([1]), 1), tf.zeros([1]))
    tangents.assign(tf.fill(tangents.shape, float("inf")))
    hyper_optimizer.step(*data)
    assert np.all(tangents.numpy() == 0.0) and int(hyper_optimizer.kept_state().step) == 1
    hyper_optimizer.step(*data)
    assert int(hyper_optimizer._watch.skipped.numpy()) == 1


def of_two_rates(optimizer, **settings):
    """A HyperOptimizer of a positive rate and a momentum between two bounds."""
    rate = farhox.Hyperparameter(0.1, low=0.0, log=True, name="rate")
    momentum = farhox.Hyperparameter(0.5, low=0.0, high=0.9, name="momentum")
    problem = farhox.supervised_problem(make_model(), dynamics=farhox.Momentum(rate, momentum),
                                        outer_variables=[rate, momentum] if settings.pop("both", True) else [momentum])
    hyper_optimizer = farhox.HyperOptimizer(problem, **settings)
    hyper_optimizer.compile(optimizer)
    return hyper_optimizer


@pytest.mark.one_case
@pytest.mark.parametrize("optimizer", [lambda: keras.optimizers.SGD(float("nan")), lambda: keras.optimizers.Adam(1e3)],
                         ids=["nan", "far"])
def test_an_update_that_would_lose_a_value_is_taken_back_with_the_slots(optimizer):
    hyper_optimizer = of_two_rates(optimizer(), max_skipped_updates=3)
    before = outer_of(hyper_optimizer), [v.numpy() for v in hyper_optimizer.optimizer.variables]
    history = hyper_optimizer.fit(hyper_iterations(2), verbose=0).history
    assert history["skipped_updates"] == [2] and hyper_optimizer.hyper_iterations == 2
    np.testing.assert_array_equal(outer_of(hyper_optimizer), before[0])
    for a, b in zip(before[1], hyper_optimizer.optimizer.variables):
        np.testing.assert_array_equal(a, b.numpy())
    with pytest.raises(RuntimeError, match="what the outer optimizer made of 'rate'.*, whose last good value is kept"):
        hyper_optimizer.fit(hyper_iterations(3), verbose=0)


def applied(hyper_optimizer, gradient):
    """One guarded update with this hypergradient; whether it stands."""
    return hyper_optimizer._guarded_update.apply(
        hyper_optimizer._updates, lambda: hyper_optimizer._updates.apply([gradient]))


@pytest.mark.one_case
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_value_at_its_bound_is_held_before_it_reported_and_can_come_back(jit_compile):
    hyper_optimizer = of_two_rates(keras.optimizers.SGD(1.0), both=False)
    momentum = hyper_optimizer.problem.hyperparameters[0]
    apply = tf.function(
        lambda gradient: applied(hyper_optimizer, gradient), autograph=False, jit_compile=jit_compile)
    for _ in range(3):  # Again and again: it does not creep on.
        assert apply(tf.constant(-1e4))
        assert momentum.numpy() == pytest.approx(0.9 * (1 - 2.0 ** -11.5), rel=1e-6)
    assert hyper_optimizer._guarded_update.held.numpy() == [1]
    with pytest.warns(RuntimeWarning, match=r"'momentum' to its bound \(1 of 1 entries\)"):
        hyper_optimizer.warn_once()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyper_optimizer.warn_once()
    # The derivative of the map is not zero there: gradients can take it back.
    with tf.GradientTape() as tape:
        value = momentum()
    assert tape.gradient(value, momentum.variable.value) > 1e-4
    assert apply(tf.constant(7.0)) and momentum.numpy() < 0.8
    assert hyper_optimizer._guarded_update.held.numpy() == [0]


@pytest.mark.parametrize("low, high, value, gradient", [
    (0.0, None, 1e-3, 1e4), (100.0, 101.0, 100.5, -1e4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (100.0, None, 100.5, 1e4), (None, 100.0, 99.5, 1e4), (100.0, 101.0, 100.5, 1e4)))])
def test_every_map_is_held_strictly_inside_its_bounds(low, high, value, gradient):
    entry = farhox.Hyperparameter([value, value], low=low, high=high, name="entry")
    w = keras.Variable(1.0, name="w")
    problem = farhox.BilevelProblem(lambda _: w ** 2 * keras.ops.sum(entry()), lambda _: w ** 2, [w], [entry])
    hyper_optimizer = farhox.HyperOptimizer(problem)
    hyper_optimizer.compile(keras.optimizers.SGD(1.0))
    # The second entry moves as it should.
    before = entry.variable.numpy()
    assert applied(hyper_optimizer, tf.constant([gradient, 0.25]))
    after = entry.numpy()
    assert low is None or np.all(after > low)
    assert high is None or np.all(after < high)
    assert abs(after[0] - value) > 1e-4 and entry.variable.numpy()[1] == before[1] - 0.25
    assert hyper_optimizer._guarded_update.held.numpy() == [1]


def test_weights_on_the_border_of_a_budget_are_not_held():
    weights = farhox.ExampleWeights(4, budget=2.0)
    w = keras.Variable(1.0, name="w")
    problem = farhox.BilevelProblem(lambda i: keras.ops.sum(weights(i)) * w ** 2, lambda _: w ** 2, [w], [weights])
    hyper_optimizer = farhox.HyperOptimizer(problem)
    hyper_optimizer.compile(keras.optimizers.SGD(1.0))
    assert applied(hyper_optimizer, tf.constant([9.0, -9.0, 0.0, 0.0]))
    assert weights.numpy()[0] == 0.0 and weights.numpy()[1] == 1.0
    assert hyper_optimizer._guarded_update.held.numpy() == [0]


def of_strengths(method, steps=20, shape=(64, 8)):
    keras.utils.set_random_seed(0)
    strength = farhox.Hyperparameter(np.full(shape, 1e-3), low=0.0, log=True, name="l2")
    model = keras.Sequential([keras.Input([64]), keras.layers.Dense(
        shape[1], "tanh", kernel_regularizer=farhox.L1L2(l2=strength)), keras.layers.Dense(10, "softmax")])
    problem = farhox.supervised_problem(model, dynamics=farhox.GradientDescent(0.1), outer_variables=[strength])
    hyper_optimizer = farhox.HyperOptimizer(problem, method, online=True)
    hyper_optimizer.compile(keras.optimizers.RMSprop(0.05))
    return hyper_optimizer, (farhox.repeat((X[:50], Y[:50]), steps), (X[50:100], Y[50:100]))


@pytest.mark.slow
def test_logs_of_implicit_methods_tell_of_the_linear_system_and_of_a_start_that_is_far_from_stationary():
    hyper_optimizer, data = of_strengths(farhox.ImplicitHG(), steps=3)
    with pytest.warns(RuntimeWarning, match="far from a stationary point.*stationarity_gap"):
        history = hyper_optimizer.fit(data, epochs=2, verbose=0).history
    assert {"solver_failed", "solver_residual", "inner_gradient_norm"} <= set(history)
    assert "stationarity_gap" not in history and max(history["solver_failed"]) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyper_optimizer.fit(data, verbose=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Implicit hypergradients were taken far:RuntimeWarning")
def test_the_defaults_of_implicit_differentiation_tune_thousands_of_strengths():
    """Most of the systems fail: solutions of theirs that were carried on grew to overflow within 70 iterations."""
    hyper_optimizer, data = of_strengths(farhox.ImplicitHG(), shape=(64, 50))
    for _ in range(150):
        result = hyper_optimizer.step(*data)
    assert result.outer_loss < 0.05


def test_train_inner_never_leaves_what_is_not_a_number_in_the_model():
    hyper_optimizer = make(rate=1e30, online=True)
    variables = hyper_optimizer.problem.inner_variables
    before = [variable.numpy() for variable in variables]
    with pytest.raises(RuntimeError, match="Inner training diverged: the inner objective at step [12] of 3.*as it was"):
        hyper_optimizer.train_inner(next(iter(hyper_iterations(1)))[0])
    for a, b in zip(before, variables):
        np.testing.assert_array_equal(a, b.numpy())


def test_a_trained_model_is_new_and_leaves_the_start_alone():
    hyper_optimizer = make(normalized=True)
    data = hyper_iterations(2)
    inner_batches, outer_batch = next(iter(data))
    model = hyper_optimizer.problem.model
    before = model.get_weights()
    trained = hyper_optimizer.trained_model(inner_batches)
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)
    # What `train_inner` makes of the model.
    hyper_optimizer.train_inner(inner_batches)
    for a, b in zip(trained.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(hyper_optimizer.predict(X[:5], verbose=0), trained.predict(X[:5], verbose=0), rtol=1e-6)
    # Of a whole data set it takes the inner batches one after the other.
    plain = make()
    both = plain.trained_model(data)
    indices = tf.concat([element[0].indices for element in data], axis=0)
    at_once = plain.trained_model(inner_batches._replace(indices=indices))
    for a, b in zip(both.get_weights(), at_once.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="must hold at least one pair"):
        plain.trained_model(data.take(0))


def test_summary_says_what_is_learned(capsys):
    hyper_optimizer = make()
    lines = []
    hyper_optimizer.summary(print_fn=lambda text, **_: lines.append(text))
    text = "\n".join(lines)
    assert "ReverseHG, dynamics Momentum, online=False" in text and "learning_rate = 0.1" in text
    assert "Inner variables: 2 with 650 entries" in text and "Total params: 650" in text
    hyper_optimizer.summary()
    assert "momentum = 0.5" in capsys.readouterr().out


def test_what_needs_a_model_says_so_where_the_problem_knows_none():
    w, lam = keras.Variable(1.0), keras.Variable(1.0)
    hyper_optimizer = farhox.HyperOptimizer(farhox.BilevelProblem(
        lambda _: (w - lam) ** 2, lambda _: w ** 2, [w], [lam]))
    for call in (lambda: hyper_optimizer.predict(X[:2]), lambda: hyper_optimizer.trained_model(tf.zeros([2, 1]))):
        with pytest.raises(ValueError, match="must know its Keras model"):
            call()


@pytest.mark.covering
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("use", ["fit", "step", "evaluate", "train_inner"])
def test_indices_out_of_range_are_an_error_also_where_xla_would_clamp_them(use, jit_compile):
    problem = farhox.supervised_problem(make_model(), dynamics=farhox.GradientDescent(0.1), outer_variables=[],
                                        example_weights=farhox.ExampleWeights(5))
    hyper_optimizer = farhox.HyperOptimizer(problem)
    hyper_optimizer.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
    data = farhox.bilevel_dataset((X[:20], Y[:20]), VALIDATION, 2, index=True)
    pair = next(iter(data))
    call = {"fit": lambda: hyper_optimizer.fit(data, verbose=0), "step": lambda: hyper_optimizer.step(*pair),
            "evaluate": lambda: hyper_optimizer.evaluate(data, verbose=0),
            "train_inner": lambda: hyper_optimizer.train_inner(pair[0])}[use]
    if not jit_compile:
        with pytest.raises(tf.errors.InvalidArgumentError, match="is not in"):
            call()
        return
    with pytest.raises(ValueError, match=r"number of example weights - 1 \(4 of 'example_weights'\).*from 0 to 19"):
        call()


def test_weights_of_indices_out_of_range_are_not_a_number_where_xla_drops_checks():
    weights = farhox.ExampleWeights(5)
    chosen = tf.function(weights, jit_compile=True, autograph=False)(tf.constant([0, 5, -1]))
    np.testing.assert_array_equal(np.isnan(chosen), [False, True, True])


@pytest.mark.slow
def test_fit_counts_skips_in_a_row_anew_once_the_cause_is_removed():
    hyper_optimizer = make(rate=1e30, max_skipped_updates=2, metrics=())
    with pytest.raises(RuntimeError, match="updates in a row were skipped"):
        hyper_optimizer.fit(hyper_iterations(2), verbose=0)
    hyper_optimizer.problem.hyperparameters[0].assign(0.1)
    history = hyper_optimizer.fit(hyper_iterations(2), verbose=0).history
    assert history["skipped_updates"] == [2]


@pytest.mark.slow
def test_step_stops_with_an_error_that_says_what_diverged():
    hyper_optimizer = make(rate=1e30, max_skipped_updates=3)
    with pytest.raises(RuntimeError, match="3 updates in a row were skipped.*the inner objective.*'learning_rate'"):
        for pair in hyper_iterations(3):
            hyper_optimizer.step(*pair)


@pytest.mark.slow
def test_fit_stops_with_an_error_that_says_what_diverged():
    message = "3 updates in a row were skipped.*the inner objective.*'learning_rate'.*smaller inner learning rate"
    with pytest.raises(RuntimeError, match=message):
        make(rate=1e30, max_skipped_updates=3, metrics=()).fit(hyper_iterations(5), verbose=0)


@pytest.mark.parametrize("where, words", [
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gathered", r"in array 1 at index \[150, 7\] of the inner batches"),
        ("stacked", r"in array 1 at index \[1, 4\] of the inner batches: mend them"),
        ("repeated", r"in array 1 at index \[3, 7\] of the inner batches"),
        ("outer", r"in array 1 at index \[99, 63\] of the outer batch"))),
    ("both", r"\[3, 7\] of the inner batches and in array 1 at index \[99, 63\] of the outer batch")])
def test_data_that_are_not_finite_are_named_with_their_place_when_training_stops(where, words):
    x, outer = X[:200].copy(), VALIDATION
    if where in ("outer", "both"):
        outer = (VALIDATION[0].copy(), VALIDATION[1])
        outer[0][99, 63] = np.inf
    if where == "stacked":
        x = x.reshape(2, 100, 64)
        x[1, 4, 0] = np.nan
        inner = x, Y[:200].reshape(2, 100)
    elif where == "gathered":
        x[150, 7] = np.nan
        inner = farhox.gather((x, Y[:200]), np.arange(200).reshape(2, 100))
    else:
        if where != "outer":
            x[3, 7] = np.nan
        inner = farhox.repeat((x, Y[:200]), 2)
    hyper_optimizer = make(max_skipped_updates=2, metrics=(), compiled={"run_eagerly": True})
    with pytest.raises(RuntimeError, match=f"2 updates in a row were skipped.*The data hold NaN or infinity.*{words}"):
        hyper_optimizer.fit((inner, outer), epochs=5, verbose=0)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("compiled", [
    {"steps_per_execution": 2}, {"run_eagerly": True}, {"jit_compile": True}], ids=lambda value: next(iter(value)))
def test_ways_to_run_give_the_same_result(compiled, traced):
    plain, other = traced(), make(metrics=(), compiled=compiled)
    plain.fit(hyper_iterations(4), verbose=0)
    other.fit(hyper_iterations(4), verbose=0)
    np.testing.assert_allclose(outer_of(other), outer_of(plain), rtol=1e-4)


def test_fit_traces_once():
    traces = []
    w, lam = (keras.Variable(1.0, name=name) for name in ("w", "lam"))

    def inner_objective(batch):
        traces.append(batch)
        return (w - lam) ** 2

    problem = farhox.BilevelProblem(inner_objective, lambda _: w ** 2, [w], [lam])
    hyper_optimizer = farhox.HyperOptimizer(problem)
    hyper_optimizer.compile(keras.optimizers.SGD(0.1))
    data = (farhox.repeat(tf.zeros([1]), 3), tf.zeros([1]))
    hyper_optimizer.fit(data, epochs=1, verbose=0)
    count = len(traces)
    hyper_optimizer.fit(data, epochs=5, verbose=0)
    hyper_optimizer.step(*data)
    after_step = len(traces)
    for _ in range(5):
        hyper_optimizer.step(*data)
    assert len(traces) == after_step and after_step == 2 * count


@pytest.mark.slow
def test_memory_stays_flat_over_hyper_iterations(traced):
    import psutil
    hyper_optimizer, pair = traced(), next(iter(hyper_iterations(1)))
    for _ in range(50):
        hyper_optimizer.step(*pair)
    before = psutil.Process().memory_info().rss
    for _ in range(200):
        hyper_optimizer.step(*pair)
    assert psutil.Process().memory_info().rss - before < 20 * 2 ** 20


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.skipif(farhox.data.datasets.KERAS_IS_OLD, reason="needs Keras 3.9")
@pytest.mark.parametrize("rate, outer_rate", [(0.1, 0.1), pytest.param(1e30, 0.1, marks=pytest.mark.slow),
                                               (0.1, float("nan"))],
                         ids=["update", "skip", "taken back"])
def test_replicas_apply_the_mean_of_their_hypergradients_and_lose_no_value(rate, outer_rate):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        mirrored = make(rate=rate, optimizer=keras.optimizers.SGD(outer_rate), metrics=())
    single = make(rate=rate, optimizer=keras.optimizers.SGD(0.1))
    expected, stands = outer_of(single), rate == outer_rate
    parts = [farhox.ReverseHG().compute(single.problem, *pair) for pair in hyper_iterations(2)]
    if stands:
        expected = [s - 0.1 * np.mean([part.gradients[i] for part in parts]) for i, s in enumerate(expected)]
    logs = mirrored.fit(hyper_iterations(2), verbose=0, steps_per_epoch=1).history
    np.testing.assert_allclose(outer_of(mirrored), expected, rtol=1e-5)
    if stands:
        mean = np.mean([part.outer_loss for part in parts])
        np.testing.assert_allclose(mirrored.last_outer_loss.numpy(), mean, rtol=1e-5)
    assert logs["skipped_updates"] == [not stands] and int(mirrored.optimizer.iterations.numpy()) == stands
    with pytest.raises(ValueError, match="needs one replica"):
        with strategy.scope():
            online = make(online=True)
        online.fit(hyper_iterations(2), verbose=0, steps_per_epoch=1)


def test_an_old_keras_is_told_that_it_cannot_train_on_several_replicas(monkeypatch):
    monkeypatch.setattr(farhox.data.datasets, "KERAS_IS_OLD", True)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        mirrored = make()
    with pytest.raises(ValueError, match="several replicas needs Keras 3.9 or newer. Received: 2 replicas"):
        mirrored.fit(hyper_iterations(2), verbose=0, steps_per_epoch=1)


@pytest.mark.slow
def test_weights_within_a_budget_are_projected_after_each_update():
    weights = farhox.ExampleWeights(200, budget=20.0)
    problem = farhox.supervised_problem(
        make_model(hidden=True), dynamics=farhox.GradientDescent(0.5), example_weights=weights)
    hyper_optimizer = farhox.HyperOptimizer(problem)
    hyper_optimizer.compile(keras.optimizers.Adam(0.05))
    hyper_optimizer.fit(farhox.bilevel_dataset(TRAIN, VALIDATION, 5, index=True), epochs=5, verbose=0)
    values = weights.numpy()
    assert values.sum() <= 20 * (1 + 1e-6) and values.min() == 0.0 and values.max() > 0.15


@pytest.mark.slow
def test_learned_initial_values_are_updated_in_the_model():
    model = make_model()
    problem = farhox.supervised_problem(model, dynamics=farhox.GradientDescent(0.1), learn_initialization=True)
    before = model.get_weights()
    hyper_optimizer = farhox.HyperOptimizer(problem)
    hyper_optimizer.compile(keras.optimizers.SGD(0.1))
    result = hyper_optimizer.step(*next(iter(hyper_iterations(1))))
    for a, b, gradient in zip(before, model.get_weights(), result.gradients):
        np.testing.assert_allclose(b, a - 0.1 * gradient.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_reset_starts_slots_steps_and_memory_anew():
    hyper_optimizer = make(farhox.ForwardHG(), online=True)
    pair = next(iter(hyper_iterations(1)))
    hyper_optimizer.step(*pair)
    hyper_optimizer.reset_inner_state()
    assert int(hyper_optimizer.step(*pair).state.step) == 3


def test_bad_input_is_refused():
    problem, data = make().problem, hyper_iterations(1)
    with pytest.raises(TypeError, match="problem must be a farhox.BilevelProblem"):
        farhox.HyperOptimizer(make_model())
    with pytest.raises(TypeError, match="must be one of farhox' methods"):
        farhox.HyperOptimizer(problem, "reverse")
    with pytest.raises(ValueError, match="max_skipped_updates must be a positive integer"):
        farhox.HyperOptimizer(problem, max_skipped_updates=0)
    with pytest.raises(ValueError, match="must be compiled"):
        farhox.HyperOptimizer(problem).step(*next(iter(data)))
    with pytest.raises(ValueError, match="takes no loss"):
        farhox.HyperOptimizer(problem).compile("adam", loss="mse")
    with pytest.raises(ValueError, match="objectives, which are Python code"):
        make().save("model.keras")
    with pytest.raises(ValueError, match="outer_first=True is an order of online training"):
        farhox.HyperOptimizer(problem, outer_first=True)
    with pytest.raises(ValueError, match="With outer_first=True the inner state that goes on"):
        farhox.HyperOptimizer(problem, farhox.ForwardHG(), online=True, outer_first=True)
    w, lam = keras.Variable(1.0), keras.Variable(1.0)
    bare = farhox.BilevelProblem(lambda _: (w - lam) ** 2, lambda _: w ** 2, [w], [lam])
    with pytest.raises(ValueError, match="Metrics need predictions"):
        farhox.HyperOptimizer(bare).compile("adam", metrics=["accuracy"])


@pytest.mark.one_case
@pytest.mark.parametrize("settings, what", [
    ({"learn_initialization": True}, "learned initial values"), ({"proximal": 1.0}, "a proximal term")])
def test_online_training_refuses_problems_whose_start_matters(settings, what):
    rate = farhox.Hyperparameter(0.1, low=0.0)
    problem = farhox.supervised_problem(
        make_model(), dynamics=farhox.GradientDescent(rate), outer_variables=[rate], **settings)
    with pytest.raises(ValueError, match=what):
        farhox.HyperOptimizer(problem, online=True)


@pytest.mark.parametrize("data, message", [
    (hyper_iterations(1).take(0), "at least one pair"),
    (tf.data.Dataset.from_tensors(tf.zeros([3])), "must be a pair"),
    (np.zeros(3), "must be a tf.data.Dataset of pairs"),
], ids=["empty", "no pairs", "array"])
def test_data_that_are_not_hyper_iterations_are_refused(data, message):
    for use in ("fit", "evaluate"):
        with pytest.raises(ValueError, match=message):
            getattr(make(), use)(data, verbose=0)


def saved(tmp_path, hyper_optimizer):
    path = str(tmp_path / "saved.weights.h5")
    hyper_optimizer.save_weights(path)
    return path


def test_weights_of_another_problem_are_refused_by_name_and_nothing_changes(tmp_path):
    path = saved(tmp_path, make())
    other = make()
    rate, momentum = other.problem.hyperparameters
    swapped = farhox.HyperOptimizer(farhox.supervised_problem(
        make_model(), dynamics=farhox.Momentum(rate, momentum), outer_variables=[momentum, rate]))
    swapped.compile("adam")
    before = [variable.numpy() for variable in swapped.variables]
    with pytest.raises(ValueError, match=r"saved.weights.h5'.*of \['learning_rate', 'momentum'\] for the outer "
                                         r"variables \['momentum', 'learning_rate'\]"):
        swapped.load_weights(path)
    for a, b in zip(before, swapped.variables):
        np.testing.assert_array_equal(a, b.numpy())
    other.load_weights(path)


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:len(data) // 2], "saved.weights.h5'"), (lambda data: b"", "saved.weights.h5'"),
    (lambda data: data.replace(b'"format": 1', b'"format": 9'), "saved.weights.h5': it was written by a later version"),
    (lambda data: data.replace(b'"format": 1', b'"format"; 1'), "saved.weights.h5': .*so it is damaged")],
    ids=["half", "empty", "later", "names"])
def test_a_file_of_weights_that_is_damaged_or_of_a_later_version_is_named(tmp_path, damage, message):
    hyper_optimizer = make()
    path = saved(tmp_path, hyper_optimizer)
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(damage(data))
    before = [variable.numpy() for variable in hyper_optimizer.variables]
    with pytest.raises(ValueError, match=message):
        hyper_optimizer.load_weights(path)
    for a, b in zip(before, hyper_optimizer.variables):
        np.testing.assert_array_equal(a, b.numpy())
    with pytest.raises(FileNotFoundError):
        hyper_optimizer.load_weights(str(tmp_path / "none.weights.h5"))


def test_labels_out_of_range_are_a_value_error_in_fit_and_step(traced):
    data = hyper_iterations(1, train=(TRAIN[0], np.full(200, 12)))
    message = r"Labels must be integers from 0 to the number of classes - 1.*12"
    with pytest.raises(ValueError, match=message):
        traced().fit(data, verbose=0)
    with pytest.raises(ValueError, match=message):
        traced().step(*next(iter(data)))


def two_rates(names, swap=False):
    first, second = (farhox.Hyperparameter(value, low=0.0, name=name) for value, name in zip((0.1, 0.9), names))
    w = keras.Variable(1.0, name="w")
    hyper_optimizer = farhox.HyperOptimizer(farhox.BilevelProblem(
        lambda batch: first() * w ** 2 + second() * w, lambda batch: w ** 2, [w],
        [second, first] if swap else [first, second]))
    hyper_optimizer.compile("adam")
    return hyper_optimizer


def test_weights_are_loaded_into_the_outer_variables_of_the_same_names_or_not_at_all(tmp_path):
    path = str(tmp_path / "a.weights.h5")
    saved = two_rates(["a", "b"])
    saved.problem.hyperparameters[0].assign(0.3)
    saved.save_weights(path)
    same = two_rates(["a", "b"])
    same.load_weights(path)
    assert outer_of(same) == outer_of(saved)
    for other in (two_rates(["a", "b"], swap=True), two_rates(["a", "c"])):
        before = outer_of(other)
        with pytest.raises(ValueError, match=r"same outer variables in the same order. .* of \['a', 'b'\] for"):
            other.load_weights(path)
        assert outer_of(other) == before


@pytest.mark.slow
def test_weights_that_were_saved_without_names_are_loaded_by_position(tmp_path, monkeypatch):
    path = str(tmp_path / "a.weights.h5")
    saved = two_rates(["a", "b"])
    with monkeypatch.context() as patch:
        patch.delattr(farhox.HyperOptimizer, "save_own_variables")
        saved.save_weights(path)
    same = two_rates(["a", "b"])
    same.problem.hyperparameters[0].assign(0.7)
    same.load_weights(path)
    assert outer_of(same) == outer_of(saved)

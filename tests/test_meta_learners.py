"""Few-shot learners: meta-gradients against closed forms and plain loops, adaptation, evaluation, batch norm."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from few_shot import images, network
from problems import assert_close
from unrolled import unrolled_hypergradient

import farhox
from farhox import meta
from farhox.hypergradients import ReptileHG
from farhox.linear_solvers import Direct


def scalar_model(value=1.0):
    """prediction = φ x, so that the squared error of (1, c) is ½ a (φ - c)^2 with a = 2."""
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[value]])])
    return model


def constant_episodes(*targets):
    """One episode per target c, support and query alike."""
    x, y = np.ones([len(targets), 2, 1]), np.array(targets, float).reshape([-1, 1, 1]) * np.ones([1, 2, 1])
    return meta.Episode((tf.constant(x), tf.constant(y)), (tf.constant(x), tf.constant(y)))


def meta_gradients(learner, episodes):
    """The gradients that `fit` would apply for one meta-batch."""
    data = learner._hyper_iteration_data(episodes, training=True)
    carry = learner._kept.carry_now()
    return learner.hypergradient.compute(learner.problem, *data, carry=carry).gradients


@pytest.mark.parametrize("make, expected", [
    (lambda model: meta.MAML(model, 0.1, 3, loss="mean_squared_error"), -1.048576),
    (lambda model: meta.MAML(model, 0.1, 3, first_order=True, loss="mean_squared_error"), -2.048),
    (lambda model: meta.Reptile(model, farhox.GradientDescent(0.1), 3, loss="mean_squared_error"), -0.976),
    (lambda model: meta.JointTraining(model, 0.1, loss="mean_squared_error"), -4.0),
], ids=["MAML", "FOMAML", "Reptile", "joint training"])
def test_meta_gradients_of_a_quadratic_are_those_of_the_closed_form(make, expected, float64):
    learner = make(scalar_model())
    gradients = meta_gradients(learner, constant_episodes(3.0))
    np.testing.assert_allclose(gradients[0], [[expected]], rtol=1e-12)


def test_adapted_weight_of_a_quadratic_is_that_of_the_closed_form(float64):
    learner = meta.MAML(scalar_model(), 0.1, 3, loss="mean_squared_error")
    episode = tf.nest.map_structure(lambda leaf: leaf[0], constant_episodes(3.0))
    np.testing.assert_allclose(learner.adapt(episode.support).get_weights()[0], [[1.976]], rtol=1e-12)
    np.testing.assert_allclose(learner.predict(episode.support, [[1.0], [2.0]]), [[1.976], [3.952]], rtol=1e-12)
    np.testing.assert_array_equal(learner.model.get_weights()[0], [[1.0]])


@pytest.mark.one_case
@pytest.mark.parametrize("steps", [60, 400])
def test_imaml_of_a_quadratic_is_that_of_the_closed_form_and_not_of_the_released_code(steps, float64):
    learner = meta.IMAML(scalar_model(), 0.1, steps, proximal=2.0,
                         loss=lambda targets, predictions: keras.ops.mean((predictions - targets) ** 2 / 2, axis=-1))
    episode = constant_episodes(3.0)
    adapted = (1.0 * 3.0 + 2.0 * 1.0) / (1.0 + 2.0)
    model = learner.adapt(tf.nest.map_structure(lambda leaf: leaf[0], episode.support))
    np.testing.assert_allclose(model.get_weights()[0], [[adapted]], rtol=1e-9)
    gradient = meta_gradients(learner, episode)[0].numpy().item()
    assert gradient == pytest.approx((adapted - 3.0) * 2.0 / 3.0, rel=1e-9)
    assert abs(gradient - (adapted - 3.0) * 0.48) > 0.2


@pytest.mark.slow
def test_damping_of_imaml_is_added_to_the_hessian(float64):
    learner = meta.IMAML(scalar_model(), 0.1, 400, proximal=2.0, damping=3.0,
                         loss=lambda targets, predictions: keras.ops.mean((predictions - targets) ** 2 / 2, axis=-1))
    adapted = (1.0 * 3.0 + 2.0 * 1.0) / (1.0 + 2.0)
    gradient = meta_gradients(learner, constant_episodes(3.0))[0].numpy().item()
    assert gradient == pytest.approx((adapted - 3.0) / (1.0 + (1.0 + 3.0) / 2.0), rel=1e-9)


@pytest.mark.slow
def test_reptile_settles_at_the_mean_of_equal_tasks():
    learner = meta.Reptile(scalar_model(), farhox.GradientDescent(0.1), 3, loss="mean_squared_error")
    learner.compile(keras.optimizers.SGD(0.5))
    episodes = tf.nest.map_structure(lambda leaf: tf.cast(leaf, tf.float32), constant_episodes(1.0, 2.0, 6.0))
    for _ in range(60):
        learner.step(*learner._hyper_iteration_data(episodes, training=True))
    np.testing.assert_allclose(learner.model.get_weights()[0], [[3.0]], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("make", [
    lambda model: meta.MAML(model, 0.3, 3),
    lambda model: meta.MAML(model, 0.3, 3, transductive=False),
    lambda model: meta.MAML(model, farhox.Hyperparameter(0.3, low=0.0, name="rate"), 3),
    lambda model: meta.MAML(model, 0.3, 3, learn_learning_rates=True),
    lambda model: meta.ANIL(model, inner_learning_rate=0.3, inner_steps=3),
    lambda model: meta.HyperRepresentation(
        keras.Sequential([keras.Input([6, 6, 1]), *model.layers[:-1]]), model.layers[-1], inner_steps=3),
], ids=["MAML", "support statistics", "learned rate", "Meta-SGD", "ANIL", "hyper-representation"])
def test_meta_gradients_equal_one_tape_over_a_plain_loop(make, float64):
    learner = make(network())
    _, episodes = images()
    parts = []
    for index in range(2):
        support, query = tf.nest.map_structure(lambda leaf: leaf[index], episodes)
        parts.append(unrolled_hypergradient(
            learner.problem, farhox.repeat(support, 3), ((support[0], query[0]), query[1])))
    expected = [np.mean(part, axis=0) for part in zip(*parts)]
    actual = tf.function(lambda: meta_gradients(learner, episodes), autograph=False)()
    assert all(np.any(part != 0) for part in expected[-2:])
    assert_close(actual, expected, 1e-8)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
def test_multi_step_loss_is_the_weighted_sum_of_the_losses_after_each_step(first_order, float64):
    weights = (0.2, 0.0, 0.8)
    learner = meta.MAML(scalar_model(), 0.1, 3, first_order, loss="mean_squared_error", step_weights=weights)
    shrinking = 0.8 ** np.arange(1, 4)  # The squared error has curvature 2.
    expected = np.sum(np.array(weights) * 2 * (1.0 - 3.0) * shrinking * (1.0 if first_order else shrinking))
    np.testing.assert_allclose(meta_gradients(learner, constant_episodes(3.0))[0], [[expected]], rtol=1e-12)


@pytest.mark.slow
def test_weights_of_steps_follow_a_schedule_of_the_meta_step():
    def weights(meta_step):
        first = tf.maximum(1.0 - tf.cast(meta_step, tf.float32) / 2, 0.0)
        return tf.stack([first, 1.0 - first])

    episodes = tf.nest.map_structure(lambda leaf: tf.cast(leaf, tf.float32), constant_episodes(1.0, 2.0))
    scheduled = meta.MAML(scalar_model(), 0.1, 2, step_weights=weights, loss="mean_squared_error")
    scheduled.compile(keras.optimizers.SGD(0.0))
    for expected in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (0.0, 1.0)):
        fixed = meta.MAML(scheduled.model, 0.1, 2, step_weights=expected, loss="mean_squared_error")
        assert_close(meta_gradients(scheduled, episodes), meta_gradients(fixed, episodes), 1e-6)
        scheduled.step(*scheduled._hyper_iteration_data(episodes, training=True))


@pytest.mark.slow
def test_imaml_solves_with_identity_plus_hessian_over_the_proximal_strength(float64):
    model = keras.Sequential([keras.Input([6, 6, 1]), keras.layers.Flatten(), keras.layers.Dense(2, "tanh"),
                              keras.layers.Dense(3, "softmax")])
    learner = meta.IMAML(model, 0.1, 300, proximal=2.0, linear_solver=Direct())
    _, episodes = images(episodes=1)
    support, query = tf.nest.map_structure(lambda leaf: leaf[0], episodes)
    adapted = learner.adapt(support)

    def loss(weights, batch):
        hidden = tf.tanh(tf.reshape(batch[0], [-1, 36]) @ weights[0] + weights[1])
        logits = hidden @ weights[2] + weights[3]
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits))

    shapes = [weight.shape for weight in adapted.get_weights()]
    flat = tf.concat([tf.reshape(weight, [-1]) for weight in adapted.get_weights()], axis=0)

    def unflat(vector):
        parts = tf.split(vector, [int(np.prod(shape)) for shape in shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes)]

    with tf.GradientTape() as outer_tape:
        outer_tape.watch(flat)
        with tf.GradientTape() as tape:
            tape.watch(flat)
            value = loss(unflat(flat), support)
        gradient = tape.gradient(value, flat)
    hessian = outer_tape.jacobian(gradient, flat)
    with tf.GradientTape() as tape:
        tape.watch(flat)
        value = loss(unflat(flat), query)
    at_query = tape.gradient(value, flat)
    expected = np.linalg.solve(np.eye(len(flat)) + hessian.numpy() / 2.0, at_query.numpy())
    assert_close([np.concatenate([np.ravel(g) for g in meta_gradients(learner, episodes)])], [expected], 1e-8)


@pytest.mark.slow
def test_episodes_of_many_sizes_are_predicted_with_two_traces():
    learner = meta.MAML(keras.Sequential([keras.Input([2]), keras.layers.Dense(4, activation="softmax")]))
    random = np.random.default_rng(0)
    for shots, queries in ((1, 3), (2, 4), (3, 5), (5, 1)):
        support = random.random((4 * shots, 2), dtype="float32"), np.repeat(np.arange(4), shots)
        assert learner.predict(support, random.random((queries, 2), dtype="float32")).shape == (queries, 4)
        assert learner.adapt(support).count_params() == 12
    assert learner._predict_function.experimental_get_tracing_count() == 2
    assert learner._adapt_function.experimental_get_tracing_count() == 2


@pytest.mark.slow
def test_fomaml_is_the_query_gradient_at_the_adapted_weights(float64):
    learner = meta.MAML(network(normalized=False), 0.3, 3, first_order=True)
    _, episodes = images(episodes=1)
    support, query = tf.nest.map_structure(lambda leaf: leaf[0], episodes)
    adapted = learner.adapt(support)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(query[1], adapted(query[0])))
    expected = tape.gradient(loss, [variable.value for variable in adapted.trainable_variables])
    assert_close(meta_gradients(learner, episodes), expected, 1e-8)


@pytest.mark.slow
def test_reptile_is_the_way_that_keras_training_goes():
    model, twin = network(), network()
    twin.set_weights(model.get_weights())
    learner = meta.Reptile(model, inner_steps=4)
    _, episodes = images()
    optimizer = keras.optimizers.Adam(1e-3, beta_1=0.0)
    optimizer.build(twin.trainable_variables)
    moved = []
    for index in range(2):
        twin.set_weights(model.get_weights())
        (x, y), _ = tf.nest.map_structure(lambda leaf: leaf[index], episodes)
        for _ in range(4):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, twin(x, training=True)))
            optimizer.apply(tape.gradient(loss, [v.value for v in twin.trainable_variables]), twin.trainable_variables)
        moved.append([a - b.numpy() for a, b in zip(
            [v.numpy() for v in model.trainable_variables], twin.trainable_variables)])
    expected = [np.mean(parts, axis=0) for parts in zip(*moved)]
    assert_close(meta_gradients(learner, episodes), expected, 2e-3)


@pytest.mark.slow
def test_slots_of_reptile_go_on_from_one_meta_step_to_the_next_and_into_the_evaluation():
    learner = meta.Reptile(network(), inner_steps=4, batch_size=2)
    source, _ = images()
    learner.compile(keras.optimizers.SGD(0.5), metrics=["accuracy"])
    learner.fit(source.dataset(2, count=6), verbose=0)
    assert int(learner._initial_state().step) == 24
    before = learner.evaluate(source, episodes=4, meta_batch_size=2)
    assert int(learner._initial_state().step) == 24
    learner.reset_inner_state()
    assert learner.evaluate(source, episodes=4, meta_batch_size=2)["loss"] != before["loss"]


@pytest.mark.slow
def test_step_weights_choose_the_steps_whose_way_counts(float64):
    def direction(weights):
        learner = meta.Reptile(scalar_model(), farhox.GradientDescent(0.1), 3, step_weights=weights,
                               loss="mean_squared_error")
        return meta_gradients(learner, constant_episodes(3.0))[0].numpy().item()

    assert direction((1, 1, 1)) == pytest.approx(-0.976)
    assert direction((0, 0, 1)) == pytest.approx(-0.2 * 2 * 0.64)
    assert direction((2, 0, 0)) == pytest.approx(-0.8)


@pytest.mark.covering
@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("momentum, dropout", [(0.99, 0.0), pytest.param(0.5, 0.3, marks=pytest.mark.slow)])
def test_queries_of_one_episode_depend_on_each_other_only_when_transductive(transductive, momentum, dropout):
    model = keras.Sequential([
        keras.Input([6, 6, 1]), keras.layers.Flatten(), keras.layers.Dense(4),
        keras.layers.BatchNormalization(momentum=momentum), keras.layers.Dropout(dropout),
        keras.layers.Dense(3, activation="softmax")])
    model.layers[2].moving_mean.assign([5.0, -5.0, 3.0, 1.0])  # Statistics that must not be used.
    learner = meta.MAML(model, 0.3, 2, transductive=transductive)
    _, episodes = images()
    support, (x, _) = tf.nest.map_structure(lambda leaf: leaf[0], episodes)
    changed = np.array(x)
    changed[0] += 1.0
    first, second = learner.predict(support, x), learner.predict(support, changed)
    assert not np.allclose(first[0], second[0])
    assert np.array_equal(first[1:], second[1:]) != transductive
    if dropout == 0.0 and not transductive:
        np.testing.assert_allclose(first, learner.adapt(support)(x), rtol=1e-4, atol=1e-6)
    if dropout == 0.0:
        model.layers[2].moving_mean.assign([0.0] * 4)
        np.testing.assert_array_equal(learner.predict(support, x), first)


@pytest.mark.slow
def test_training_and_evaluation_leave_no_trace_of_an_episode_in_the_model():
    learner = meta.MAML(network(), 0.3, 2)
    source, _ = images(episodes=2)
    learner.compile(keras.optimizers.SGD(0.0), metrics=["accuracy"])
    before = [variable.numpy() for variable in learner.model.variables]
    learner.fit(source.dataset(2, count=4), verbose=0)
    learner.evaluate(source, episodes=4, meta_batch_size=2)
    for a, b in zip(before, learner.model.variables):
        np.testing.assert_array_equal(a, b.numpy())


def test_no_episode_leaves_a_trace_in_another_one():
    learner = meta.MAML(network(), 0.3, 2)
    _, episodes = images(episodes=2)
    both = learner._judge(episodes)["loss"]
    support, query = tf.nest.map_structure(lambda leaf: tf.concat([tf.sin(leaf[:1]), leaf[1:]], 0) if
                                           leaf.dtype.is_floating else leaf, episodes)
    changed = learner._judge(meta.Episode(support, query))["loss"]
    assert both[0] != changed[0] and both[1] == changed[1]


OTHERS = [
    lambda model: meta.ANIL(model, inner_learning_rate=0.3, inner_steps=2), lambda model: meta.IMAML(model, 0.3, 4),
    lambda model: meta.JointTraining(model), lambda model: meta.HyperRepresentation(
        keras.Sequential([keras.Input([6, 6, 1]), *model.layers[:-1]]), keras.layers.Dense(3, activation="softmax"),
        inner_steps=3)]


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("make", OTHERS, ids=["anil", "imaml", "joint", "hyper-representation"])
def test_every_learner_takes_a_meta_step_and_adapts(make):
    learner = make(network())
    source, episodes = images(queries=4)
    learner.compile(keras.optimizers.SGD(0.1))
    assert learner.fit(source.dataset(2, count=2), verbose=0).history["skipped_updates"] == [0]
    support, query = tf.nest.map_structure(lambda leaf: leaf[0], episodes)
    assert learner.adapt(support)(query[0]).shape == (12, 3)


@pytest.mark.one_case
@pytest.mark.parametrize("make", [
    lambda model: meta.MAML(model, 0.3, 2), lambda model: meta.Reptile(model, inner_steps=4, batch_size=3),
    *(pytest.param(make, marks=pytest.mark.slow) for make in OTHERS)],
    ids=["maml", "reptile", "anil", "imaml", "joint", "hyper-representation"])
def test_every_learner_fits_evaluates_predicts_and_adapts(make, tmp_path):
    learner = make(network(normalized=False))
    source, episodes = images(queries=4)
    rate = 1.0 if isinstance(learner, meta.Reptile) else 0.05
    learner.compile(keras.optimizers.SGD(rate) if rate == 1.0 else keras.optimizers.Adam(rate), metrics=["accuracy"])
    history = learner.fit(source.dataset(2), epochs=2, steps_per_epoch=8, verbose=0,
                          validation_data=source.dataset(2, count=4)).history
    assert {"outer_loss", "inner_loss", "accuracy", "val_accuracy", "val_outer_loss"} <= set(history)
    assert history["skipped_updates"] == [0, 0]
    result = learner.evaluate(source, episodes=12, meta_batch_size=4)
    assert result["episodes"] == 12 and result["transductive"] is True
    if not isinstance(learner, meta.MAML):
        again = learner.evaluate(source, episodes=12, meta_batch_size=5)
        assert again["accuracy"] == result["accuracy"] and again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    support, query = tf.nest.map_structure(lambda leaf: leaf[0], episodes)
    predictions = learner.predict(support, query[0])
    assert predictions.shape == (12, 3)
    np.testing.assert_allclose(predictions.sum(-1), 1.0, rtol=1e-5)
    learner.adapt(support).save(tmp_path / "adapted.keras")
    loaded = keras.models.load_model(tmp_path / "adapted.keras")
    np.testing.assert_allclose(loaded(query[0]), learner.adapt(support)(query[0]), rtol=1e-6)


@pytest.mark.slow
def test_training_makes_a_better_learner():
    source, _ = images(queries=4)
    learner = meta.MAML(network(), 0.3, 2)
    learner.compile(keras.optimizers.Adam(0.01))
    before = learner.evaluate(source, episodes=20)
    learner.fit(source.dataset(4, start=100), epochs=1, steps_per_epoch=60, verbose=0)
    after = learner.evaluate(source, episodes=20)
    assert after["accuracy"] > before["accuracy"] + before["accuracy_interval"]


@pytest.mark.slow
def test_regression_is_judged_by_its_loss():
    source = meta.SinusoidEpisodes(shots=5, queries=7)
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    learner = meta.MAML(model, 0.01, 2, loss="mean_squared_error")
    result = learner.evaluate(source, episodes=10)
    assert set(result) == {"loss", "loss_interval", "episodes", "transductive"}
    errors = []
    for index in range(10):
        support, (x, y) = source.draw(tf.constant(index, tf.int64))
        errors.append(np.mean((learner.predict(support, x) - y) ** 2))
    assert result["loss"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert result["loss_interval"] == pytest.approx(1.96 * np.std(errors, ddof=1) / np.sqrt(10), rel=1e-4)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_episodes_of_a_source_and_those_of_a_users_data_set_train_alike(jit_compile):
    source, values = meta.SinusoidEpisodes(shots=3, queries=4), []
    for data in (source.dataset(2, count=4), source.dataset(2, count=4).map(lambda *parts: tuple(*parts))):
        learner = meta.MAML(keras.Sequential([keras.Input([1]), keras.layers.Dense(1, kernel_initializer="ones")]),
                            0.01, 1, loss="mean_squared_error")
        learner.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
        learner.fit(data, verbose=0)
        values.append([float(variable.numpy().sum()) for variable in learner.problem.outer_variables])
    assert values[0] == values[1] and values[0][1] != 0.0


def test_inner_batches_take_all_support_examples_before_any_comes_again():
    learner = meta.Reptile(network(), inner_steps=5, batch_size=4)
    learner.compile(keras.optimizers.SGD(1.0))
    support = (tf.reshape(tf.range(2 * 10), [2, 10]), tf.zeros([2, 10]))
    drawn = learner._inner_batches(support, 5, training=True)[0].numpy()
    assert drawn.shape == (2, 5, 4)
    flat = drawn.reshape(2, 20) - [[0], [10]]
    np.testing.assert_array_equal(flat[0], flat[1])
    assert sorted(flat[0][:10]) == sorted(flat[0][10:]) == list(range(10))
    assert not np.array_equal(drawn, learner._inner_batches(support, 5, training=False)[0])


@pytest.mark.parametrize("make, error, message", [
    (lambda m: meta.MAML(m, "fast"), TypeError, "inner_learning_rate must be a float or a farhox.Hyperparameter"),
    (lambda m: meta.MAML(m, farhox.Hyperparameter(0.1), learn_learning_rates=True), ValueError, "needs their common"),
    (lambda m: meta.MAML(m, 0.1, 0), ValueError, "inner_steps must be a positive integer. Received: 0"),
    (lambda m: meta.MAML(m, 0.1, 1, evaluation_steps=0), ValueError, "evaluation_steps must be a positive"),
    (lambda m: meta.MAML(m, 0.1, 2, step_weights=(0.5, 0.6)), ValueError, "step_weights must be a tuple of non-neg"),
    (lambda m: meta.Reptile(m, batch_size=0), ValueError, "batch_size must be a positive"),
    (lambda m: meta.ANIL(m, head=[keras.layers.Dense(3)]), ValueError, "head must hold layers of the model"),
    (lambda m: meta.IMAML(m, proximal=0.0), ValueError, "proximal must be positive"),
    (lambda m: meta.IMAML(m, damping=-1.0), ValueError, "damping must be a non-negative finite number. Received: -1.0"),
    (lambda m: meta.HyperRepresentation(keras.Sequential(m.layers), m.layers[-1]), ValueError, "body must be built"),
    (lambda m: meta.HyperRepresentation(m, "head"), TypeError, "body must be a keras.Model and head"),
    (lambda m: meta.HyperRepresentation(m, keras.layers.Dense(2), hypergradient=3), TypeError, "must be a method"),
])
def test_wrong_arguments_are_errors_that_state_the_rule(make, error, message):
    with pytest.raises(error, match=message):
        make(network())


def test_reptile_refuses_what_it_cannot_learn():
    rate = farhox.Hyperparameter(0.1, low=0.0, name="rate")
    problem = farhox.supervised_problem(network(), dynamics=farhox.GradientDescent(rate), outer_variables=[rate],
                                        learn_initialization=True)
    _, episodes = images()
    data = (farhox.data.batches.RepeatedBatch(episodes.support, tf.range(2)), episodes.query)
    with pytest.raises(ValueError, match="depends on .*rate.*initial values alone"):
        ReptileHG().compute(problem, *data)
    problem = farhox.supervised_problem(network(), learn_initialization=True)
    with pytest.raises(ValueError, match="one entry per inner step. Received: 3 entries for T=2"):
        ReptileHG((1, 1, 1)).compute(problem, *data)
    with pytest.raises(TypeError, match="tuple of numbers"):
        ReptileHG([1.0])

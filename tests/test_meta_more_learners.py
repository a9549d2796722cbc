"""Ridge heads, contexts, preconditioned gradients, MAML++: against closed forms and plain loops."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from test_meta_learners import meta_gradients

import farhox
from farhox import meta


def embedding():
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(4, "tanh")])


def classes(support=6, queries=5, ways=3):
    """A meta-batch of two classification tasks, float64."""
    random = np.random.default_rng(0)
    return meta.Episode(*[
        (tf.constant(random.normal(size=[2, n, 3])), tf.constant(np.tile(np.arange(n) % ways, (2, 1))))
        for n in (support, queries)])


def regression(support=4, queries=5):
    random = np.random.default_rng(1)
    return meta.Episode(*[(tf.constant(random.normal(size=[1, n, 3])), tf.constant(random.normal(size=[1, n, 2])))
                          for n in (support, queries)])


def test_a_ridge_network_predicts_with_the_solution_of_its_normal_equations(float64):
    learner = meta.RidgeNetwork(embedding(), 3, strength=0.5, scale=4.0)
    (x, y), (query, _) = classes()
    weights = tf.constant(np.random.default_rng(2).integers(0, 3, size=[2, 6]), tf.float64)
    for support in ((x, y), (x, y, weights)):
        for index in range(2):
            features, asked = (learner.embedding(part[index]).numpy() for part in (x, query))
            p = np.diag(np.ones(6) if len(support) == 2 else weights[index].numpy())
            w = np.linalg.solve(features.T @ p @ features + 0.5 * np.eye(4), features.T @ p @ np.eye(3)[y[index]])
            one = tuple(part[index] for part in support)
            expected = tf.nn.softmax(4.0 * asked @ w)
            np.testing.assert_allclose(learner.predict(one, query[index]), expected, rtol=1e-9)
            np.testing.assert_allclose(learner.adapt(one)(query[index]), expected, rtol=1e-9)


def support_vectors(x, y, weights, cost):
    """The kernel of the machine by a general solver of its dual problem, in float64."""
    optimize = pytest.importorskip("scipy.optimize")
    targets, bounds = np.eye(3)[y], cost * weights
    gram = x @ x.T
    upper = bounds[:, None] * targets

    def value(flat):
        duals = flat.reshape(upper.shape)
        return 0.5 * np.sum(duals * (gram @ duals)) - np.sum(duals * targets), (gram @ duals - targets).ravel()

    found = optimize.minimize(
        value, np.zeros(upper.size), jac=True, method="SLSQP", options={"maxiter": 1000, "ftol": 1e-15},
        constraints=[{"type": "eq", "fun": lambda flat: flat.reshape(upper.shape).sum(1),
                      "jac": lambda flat: np.kron(np.eye(len(x)), np.ones(3))},
                     {"type": "ineq", "fun": lambda flat: upper.ravel() - flat,
                      "jac": lambda flat: -np.eye(len(flat))}])
    return x.T @ found.x.reshape(upper.shape)


@pytest.mark.one_case
@pytest.mark.parametrize("cost", [0.1, 3.0])
def test_a_support_vector_network_predicts_with_the_solution_of_its_problem(cost, float64):
    learner = meta.SupportVectorNetwork(embedding(), 3, cost=cost, scale=4.0)
    (x, y), (query, _) = classes()
    weights = tf.constant(np.random.default_rng(2).integers(0, 3, size=[2, 6]), tf.float64)
    for support in ((x, y), (x, y, weights)):
        features, asked = (learner.embedding(part[1]).numpy() for part in (x, query))
        own = np.ones(6) if len(support) == 2 else weights[1].numpy()
        expected = tf.nn.softmax(4.0 * asked @ support_vectors(features, y[1].numpy(), own, cost))
        one = tuple(part[1] for part in support)
        np.testing.assert_allclose(learner.predict(one, query[1]), expected, atol=1e-5)
        np.testing.assert_allclose(learner.adapt(one)(query[1]), expected, atol=1e-5)


def test_the_gradient_through_a_support_vector_machine_is_that_of_its_solution(float64):
    learner = meta.SupportVectorNetwork(embedding(), 3, cost=1.0)
    (x, y), (query, targets) = classes()
    variables = learner.trainable_variables

    def loss():
        return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(targets, learner((x, y, query))))

    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, variables)
    random = np.random.default_rng(3)
    for variable_, gradient in zip(variables, gradients):
        direction = random.normal(size=variable_.shape)
        before, ends = variable_.numpy(), []
        for step in (1e-5, -1e-5):
            variable_.assign(before + step * direction)
            ends.append(float(loss()))
        variable_.assign(before)
        assert np.linalg.norm(gradient) > 1e-4
        assert np.sum(gradient * direction) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9)


@pytest.mark.one_case
@pytest.mark.parametrize("make", [meta.RidgeNetwork, meta.SupportVectorNetwork])
def test_a_head_in_closed_form_is_learned_through_saved_and_served(make, tmp_path):
    source = meta.ClassificationEpisodes(
        np.random.default_rng(0).normal(size=[40, 3]).astype("float32"), np.repeat(np.arange(5), 8), 3, 2, 3)
    learner = make(embedding(), 3)
    learner.compile(keras.optimizers.SGD(0.5), metrics=["accuracy"])
    learned = [learner.scale] if make is meta.SupportVectorNetwork else [learner.strength, learner.scale]
    assert len(learner.trainable_variables) == 2 + len(learned)
    learner.fit(source.dataset(2, count=4), verbose=0)
    assert all(float(number) != 1.0 for number in learned)
    learner.save_weights(tmp_path / "learner.weights.h5")
    again = make(embedding(), 3)
    again.load_weights(tmp_path / "learner.weights.h5")
    support, (query, _) = source.draw(0)
    expected = learner.predict(support, query)
    np.testing.assert_allclose(again.predict(support, query), expected, rtol=1e-6)
    farhox.export.saved_model(learner, tmp_path / "served")
    served = farhox.export.load(tmp_path / "served").predict(
        "adapt", support_inputs=support[0], support_labels=support[1], query_inputs=query)["probabilities"]
    np.testing.assert_allclose(served, expected, rtol=1e-5)


@pytest.mark.slow
def test_an_own_head_in_closed_form_is_a_learner(float64):
    class NearestMean(meta.EmbeddingLearner):
        def head(self, features, members):
            means = tf.linalg.matmul(features, members, transpose_a=True) / tf.reduce_sum(members, 1, keepdims=True)
            return 2 * means, -tf.reduce_sum(means ** 2, axis=1)

    own = NearestMean(embedding(), 3)
    reference = meta.PrototypicalNetwork(own.embedding, 3)
    (x, y), (query, _) = classes()
    support = x[0], y[0]
    np.testing.assert_allclose(own.predict(support, query[0]), reference.predict(support, query[0]), rtol=1e-9)


@pytest.mark.slow
def test_a_context_alone_adapts_and_starts_anew_for_each_task(float64):
    model = keras.Sequential([keras.Input([3]), meta.TaskContext(2), keras.layers.Dense(4, "tanh"),
                              keras.layers.Dense(2)])
    learner = meta.CAVIA(model, inner_learning_rate=0.3, inner_steps=2, loss="mean_squared_error")
    first, *rest = model.trainable_variables
    assert learner.problem.inner_variables == [first] and learner.problem.outer_variables == rest
    (x, y), (query, _) = tf.nest.map_structure(lambda leaf: leaf[0], tuple(regression()))
    context, (kernel, bias, out, out_bias) = tf.zeros([2], tf.float64), [w.numpy() for w in rest]

    def call(context, x):
        inputs = tf.concat([x, tf.broadcast_to(context, [len(x), 2])], -1)
        return tf.tanh(inputs @ kernel + bias) @ out + out_bias

    for _ in range(2):
        with tf.GradientTape() as tape:
            tape.watch(context)
            loss = tf.reduce_mean((call(context, x) - y) ** 2)
        context -= 0.3 * tape.gradient(loss, context)
    adapted = learner.adapt((x, y))
    np.testing.assert_allclose(adapted.trainable_variables[0], context, rtol=1e-9)
    np.testing.assert_allclose(learner.predict((x, y), query), call(context, query), rtol=1e-9)
    np.testing.assert_array_equal(first, [0.0, 0.0])
    for a, b in zip(adapted.trainable_variables[1:], rest):
        np.testing.assert_array_equal(a, b)


def test_a_preconditioned_step_multiplies_the_gradient_along_each_axis(float64):
    random = np.random.default_rng(0)
    w, g = random.normal(size=[2, 3, 4, 5]), random.normal(size=[2, 3, 4, 5])
    (factors,) = meta.identity_factors([keras.Variable(w)])
    assert [tuple(factor.shape) for factor in factors] == [(6, 6), (4, 4), (5, 5)]
    for factor in factors:
        factor.assign(random.normal(size=factor.shape))
    descent = meta.PreconditionedDescent(0.1, [factors])
    (new,), _ = descent.update([tf.constant(g)], [tf.constant(w)], [], tf.constant(0, tf.int64))
    turned = np.einsum("af,bi,co,fio->abc", *factors, g.reshape(6, 4, 5)).reshape(w.shape)
    np.testing.assert_allclose(new, w - 0.1 * turned, rtol=1e-9)


@pytest.mark.slow
def test_meta_curvature_starts_as_maml_and_its_matrices_are_learned_exactly(float64):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2, use_bias=False)])
    learner = meta.MetaCurvature(model, 0.1, 1, loss="mean_squared_error")
    weight, task = model.trainable_variables[0].numpy(), regression()
    learned = learner.problem.outer_variables
    assert {id(factor) for factor in learner.factors[0]} < {id(variable) for variable in learned}
    (x, y), (query, target) = tf.nest.map_structure(lambda leaf: leaf[0], tuple(task))
    values = [tf.constant(weight), tf.eye(3, dtype=tf.float64), tf.eye(2, dtype=tf.float64)]
    with tf.GradientTape() as outer:
        outer.watch(values)
        w, left, right = values
        gradient = 2 / tf.size(y, tf.float64) * tf.transpose(x) @ (x @ w - y)
        loss = tf.reduce_mean((query @ (w - 0.1 * left @ gradient @ tf.transpose(right)) - target) ** 2)
    found = {id(v): part for v, part in zip(learned, meta_gradients(learner, task))}
    assert_close([found[id(v)] for v in [model.trainable_variables[0], *learner.factors[0]]],
                 outer.gradient(loss, values), 1e-9)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("transductive", [True, False])
def test_maml_plus_plus_is_a_plain_loop_with_a_rate_a_loss_and_a_normalisation_of_each_step(transductive, float64):
    norm = meta.StepBatchNormalization(2, epsilon=0.1)
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4, use_bias=False), norm,
                              keras.layers.Activation("tanh"), keras.layers.Dense(2, use_bias=False)])
    learner = meta.MAMLPlusPlus(model, 0.3, 2, annealing_steps=10, loss="mean_squared_error", transductive=transductive)
    learner.compile(keras.optimizers.SGD(0.0))
    random = np.random.default_rng(3)
    for variable in (norm.gammas, norm.betas, *(rate.variable for rate in learner.rates)):
        variable.assign(variable + 0.3 * random.normal(size=variable.shape))
    w, v = (learner.problem.inner_variables[i].numpy() for i in (0, 1))
    values = [tf.constant(part) for part in (w, v, norm.gammas.numpy(), norm.betas.numpy(),
                                             *(rate.variable.numpy() for rate in learner.rates))]
    (x, y), (query, target) = tf.nest.map_structure(lambda leaf: leaf[0], tuple(regression()))
    with tf.GradientTape() as outer:
        outer.watch(values)
        w, v, gammas, betas, *rates = values
        total = 0.0
        for step, share in ((0, 0.5), (1, 0.5)):
            with tf.GradientTape() as tape:
                tape.watch([w, v])
                inner = tf.reduce_mean((_normalised(x @ w, x @ w, gammas[step], betas[step]) @ v - y) ** 2)
            of_w, of_v = tape.gradient(inner, [w, v])
            w, v = w - tf.exp(rates[0][step]) * of_w, v - tf.exp(rates[1][step]) * of_v
            used = query if transductive else x
            predictions = _normalised(query @ w, used @ w, gammas[step], betas[step]) @ v
            total += share * tf.reduce_mean((predictions - target) ** 2)
    learned = [*learner.problem.inner_variables, norm.gammas, norm.betas, *(rate.variable for rate in learner.rates)]
    found = dict(zip(map(id, learner.problem.outer_variables), meta_gradients(learner, regression())))
    assert_close([found[id(each)] for each in learned], outer.gradient(total, values), 1e-8)
    np.testing.assert_allclose(learner.predict((x, y), query), predictions, rtol=1e-9)
    if not transductive:
        np.testing.assert_allclose(learner.adapt((x, y))(query), predictions, rtol=1e-9)


def _normalised(values, used, gamma, beta):
    # Second derivatives of tf.nn.moments on a tape stop at its stop_gradient.
    mean = tf.reduce_mean(used, 0)
    variance = tf.reduce_mean((used - mean) ** 2, 0)
    return tf.tanh((values - mean) / tf.sqrt(variance + 0.1) * gamma + beta)


@pytest.mark.slow
def test_losses_of_early_steps_fade():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    learner = meta.MAMLPlusPlus(model, 0.1, 3, annealing_steps=4, loss="mean_squared_error")
    learner.compile(keras.optimizers.SGD(0.0))
    for iterations, expected in ((0, [1 / 3, 1 / 3, 1 / 3]), (2, [1 / 6, 1 / 6, 2 / 3]), (9, [0, 0, 1])):
        learner.optimizer.iterations.assign(iterations)
        weights = learner.hypergradient.step_weights()
        np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_layers_of_tasks_come_back_from_a_saved_model(tmp_path):
    model = keras.Sequential([keras.Input([3]), meta.TaskContext(2), meta.StepBatchNormalization(2),
                              keras.layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=[4, 3]).astype("float32")
    np.testing.assert_array_equal(again(x), model(x))


@pytest.mark.parametrize("make, error, message", [
    (lambda: meta.CAVIA(keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])), ValueError, "needs a context"),
    (lambda: meta.TaskContext(0), ValueError, "size must be a positive integer"),
    (lambda: meta.StepBatchNormalization(0), ValueError, "steps must be a positive integer"),
    (lambda: meta.RidgeNetwork(embedding(), 3, strength=-1.0), ValueError, "low"),
    (lambda: meta.SupportVectorNetwork(embedding(), 3, cost=0.0), ValueError, "cost must be a positive"),
    (lambda: meta.MAMLPlusPlus(embedding(), annealing_steps=0), ValueError, "annealing_steps must be a positive"),
    (lambda: meta.MAML(embedding(), dynamics=meta.PreconditionedDescent(0.1, [])), ValueError, "factors must have a"),
    (lambda: meta.PreconditionedDescent(-0.1, []), ValueError, "learning_rate must be"),
])
def test_wrong_arguments_are_errors_that_state_the_rule(make, error, message):
    with pytest.raises(error, match=message):
        make()

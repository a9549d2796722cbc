"""What of a learner is open: losses, further outer variables, conditions, dynamics, curvature, single variables."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable
from test_meta_learners import meta_gradients

import farhox
from farhox import meta

RATE, STEPS = 0.3, 2


@keras.saving.register_keras_serializable("test_meta_openings")
class Shift(keras.layers.Layer):
    """Adds a vector that belongs to a task."""

    def __init__(self, adapts=False, **kwargs):
        super().__init__(**kwargs)
        self.adapts = adapts

    def build(self, input_shape):
        self.shift = self.add_weight(shape=input_shape[-1:], initializer="zeros", trainable=self.adapts)

    def call(self, inputs):
        return inputs + self.shift

    def get_config(self):
        return {**super().get_config(), "adapts": self.adapts}


def network(adapts=False):
    """x -> tanh(x W + b + shift) V, W [3, 4], V [4, 2]."""
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(4), Shift(adapts), keras.layers.Activation("tanh"),
                             keras.layers.Dense(2, use_bias=False)])


def episode(support=4, queries=5):
    """A regression task with an axis of episodes, float64."""
    random = np.random.default_rng(0)
    parts = [(tf.constant(random.normal(size=[1, n, 3])), tf.constant(random.normal(size=[1, n, 2])))
             for n in (support, queries)]
    return meta.Episode(*parts)


def of_one(task):
    return tf.nest.map_structure(lambda leaf: leaf[0], tuple(task))


def squared(targets, predictions):
    return tf.reduce_mean((targets - predictions) ** 2, axis=-1)


def by_hand(weights, others, task, support_loss, shift_of, adapting=None, steps=STEPS):
    """Query loss, its gradients at weights and others, and predictions: MAML as a plain loop under one tape.

    Args:
        weights: [W, b, V] as arrays.
        others: List of further tensors that are learned.
        support_loss: Callable (others, y, predictions) -> scalar.
        shift_of: Callable (others, x, y) -> the vector of the task.
        adapting: Places of the weights that adapt; default: all.
    """
    (x, y), (query_x, query_y) = task
    weights, others = [tf.constant(w) for w in weights], [tf.convert_to_tensor(other) for other in others]
    adapting = range(len(weights)) if adapting is None else adapting
    with tf.GradientTape() as outer:
        outer.watch([weights, others])
        current = list(weights)

        def model(current, x):
            shift = shift_of(others, *task[0])
            return tf.tanh(x @ current[0] + current[1] + shift) @ current[2]

        for _ in range(steps):
            with tf.GradientTape() as tape:
                tape.watch(current)
                loss = support_loss(others, y, model(current, x))
            gradients = tape.gradient(loss, current)
            current = [w - RATE * g if i in adapting else w for i, (w, g) in enumerate(zip(current, gradients))]
        predictions = model(current, query_x)
        loss = tf.reduce_mean(squared(query_y, predictions))
    return loss, outer.gradient(loss, [*weights, *others]), predictions


def no_shift(others, x, y):
    return tf.zeros([4], tf.float64)


def learned_loss():
    """A network of two numbers that judges an example, and the same by hand."""
    net = keras.Sequential([keras.Input([4]), keras.layers.Dense(1, "softplus")])

    def loss(targets, predictions):
        return net(keras.ops.concatenate([targets - predictions, targets * predictions], axis=-1))[:, 0]

    def same(others, y, predictions):
        kernel, bias = others[:2]
        return tf.reduce_mean(tf.nn.softplus(tf.concat([y - predictions, y * predictions], -1) @ kernel + bias))

    return net, loss, same


@pytest.mark.one_case
@pytest.mark.parametrize("make", [
    lambda model, **more: meta.MAML(model, RATE, STEPS, loss=squared, **more),
    lambda model, **more: meta.ANIL(model, None, RATE, STEPS, loss=squared, **more)], ids=["MAML", "ANIL"])
def test_a_learned_support_loss_gets_the_gradient_of_a_plain_loop(make, float64):
    model, (net, loss, same) = network(), learned_loss()
    learner = make(model, support_loss=loss, outer_variables=net.trainable_variables)
    adapting = [2] if isinstance(learner, meta.ANIL) else None
    expected = by_hand(model.trainable_variables, net.trainable_variables, of_one(episode()), same, no_shift, adapting)
    found = dict(zip((id(v) for v in learner.problem.outer_variables), meta_gradients(learner, episode())))
    learned = [*model.trainable_variables, *net.trainable_variables]
    assert_close([found[id(v)] for v in learned], expected[1], 1e-9)
    assert float(learner._judge(episode())["loss"][0]) == pytest.approx(float(expected[0]), rel=1e-12)
    support, query = of_one(episode())
    assert_close([learner.predict(support, query[0]), learner.adapt(support)(query[0])], [expected[2]] * 2, 1e-9)


def conditioned():
    """A learner whose model is told the mean of a task's labels by a learned matrix, and the same by hand."""
    model, encoder = network(), keras.Sequential([keras.Input([2]), keras.layers.Dense(4, use_bias=False)])

    def condition(x, y, weights):
        mean = keras.ops.mean(y, axis=0) if weights is None else tf.reduce_sum(
            weights[:, None] * y, 0) / tf.reduce_sum(weights)
        model.layers[1].shift.assign(encoder(mean[None])[0])

    learner = meta.MAML(model, RATE, STEPS, loss=squared, condition=condition,
                        outer_variables=encoder.trainable_variables)
    return learner, encoder


@pytest.mark.slow
def test_a_condition_on_the_task_gets_the_gradient_of_a_plain_loop_and_stays_in_the_adapted_model(float64):
    learner, encoder = conditioned()
    expected = by_hand(
        learner.model.trainable_variables, encoder.trainable_variables, of_one(episode()),
        lambda others, y, predictions: tf.reduce_mean(squared(y, predictions)),
        lambda others, x, y: tf.linalg.matvec(others[0], tf.reduce_mean(y, 0), transpose_a=True))
    found = dict(zip((id(v) for v in learner.problem.outer_variables), meta_gradients(learner, episode())))
    assert_close([found[id(v)] for v in [*learner.model.trainable_variables, *encoder.trainable_variables]],
                 expected[1], 1e-9)
    support, query = of_one(episode())
    assert_close([learner.predict(support, query[0]), learner.adapt(support)(query[0])], [expected[2]] * 2, 1e-9)
    np.testing.assert_array_equal(learner.model.layers[1].shift, np.zeros(4))


@pytest.mark.slow
def test_a_condition_beside_a_bias_is_a_start_of_the_bias_for_each_task(float64):
    """The sum of both moves as one bias that starts there; so it does with slots of an optimizer."""
    for dynamics in (farhox.GradientDescent(RATE), farhox.Adam(RATE)):
        model = network()
        learner = meta.MAML(model, inner_steps=STEPS, loss=squared, dynamics=dynamics,
                            condition=lambda x, y, weights, to=model: to.layers[1].shift.assign(
                                keras.ops.concatenate([keras.ops.mean(y, axis=0), keras.ops.sum(x, axis=0)[:2]])))
        support, query = of_one(episode())
        start = tf.concat([tf.reduce_mean(support[1], 0), tf.reduce_sum(support[0], 0)[:2]], 0)
        told = learner.adapt(support)
        plain = network()
        plain.set_weights(model.get_weights())
        plain.layers[0].bias.assign_add(start)
        alone = meta.MAML(plain, inner_steps=STEPS, loss=squared, dynamics=dynamics).adapt(support)
        assert_close([told.layers[0].bias + told.layers[1].shift, told(query[0])],
                     [alone.layers[0].bias, alone(query[0])], 1e-9)
        assert np.linalg.norm(alone.layers[0].bias - model.layers[0].bias - start) > 1e-2


def test_each_of_several_starts_is_trained_as_if_it_were_alone(float64):
    keras.utils.set_random_seed(0)
    body = keras.layers.Dense(4, "tanh")
    heads = keras.layers.EinsumDense("bf,fsc->bsc", [3, 2])
    model = keras.Sequential([keras.Input([3]), body, heads])

    def each(y, predictions):
        return keras.ops.sum(squared(y[:, None], predictions), axis=1)

    def mean(y, predictions):
        return squared(y, keras.ops.mean(predictions, axis=1))

    problem = meta.episode_problem(model, mean, farhox.GradientDescent(RATE), representation=[body], support_loss=each)
    learner = meta.Learner(model, problem, farhox.hypergradients.EpisodesHG(farhox.ReverseHG()), STEPS, loss=mean,
                           support_loss=each)
    task = of_one(episode())
    weights, bias = tf.constant(body.kernel), tf.constant(body.bias)
    with tf.GradientTape() as outer:
        outer.watch([weights, bias])
        answers = []
        for start in tf.unstack(tf.constant(heads.kernel), axis=1):
            for _ in range(STEPS):
                with tf.GradientTape() as tape:
                    tape.watch(start)
                    loss = tf.reduce_mean(squared(task[0][1], tf.tanh(task[0][0] @ weights + bias) @ start))
                start -= RATE * tape.gradient(loss, start)
            answers.append(tf.tanh(task[1][0] @ weights + bias) @ start)
        loss = tf.reduce_mean(squared(task[1][1], sum(answers) / 3))
    assert_close(meta_gradients(learner, episode()), outer.gradient(loss, [weights, bias]), 1e-9)
    assert_close([learner.predict(task[0], task[1][0])], [np.stack(answers, axis=1)], 1e-9)
    assert np.abs(answers[0] - answers[1]).max() > 1e-2


@pytest.mark.slow
def test_what_is_open_trains_is_judged_saved_loaded_and_served(tmp_path):
    source = meta.SinusoidEpisodes(shots=3, queries=4)

    def learner():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(4), Shift(), keras.layers.Dense(1)])
        net = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, "softplus")])
        encoder = keras.Sequential([keras.Input([1]), keras.layers.Dense(4)])
        made = meta.MAML(
            model, 0.01, 2, loss="mean_squared_error", support_loss=lambda y, p: net(keras.ops.square(y - p))[:, 0],
            condition=lambda x, y, w: model.layers[1].shift.assign(encoder(keras.ops.mean(y, axis=0)[None])[0]),
            outer_variables=[*net.trainable_variables, *encoder.trainable_variables])
        made.compile(keras.optimizers.Adam(0.01))
        return made

    trained, again = learner(), learner()
    trained.fit(source.dataset(2, count=4), verbose=0)
    trained.save_weights(tmp_path / "learner.weights.h5")
    again.load_weights(tmp_path / "learner.weights.h5")
    for each in (trained, again):
        each.fit(source.dataset(2, start=each.episodes_seen, count=2), verbose=0)
    result = trained.evaluate(source, episodes=3)
    assert result == again.evaluate(source, episodes=3)
    # The count that data start at is read before a hyper-iteration moves it on.
    again.load_weights(tmp_path / "learner.weights.h5")
    again.fit(source.dataset(2, start=4, count=2), verbose=0)
    assert again.evaluate(source, episodes=3) == result
    support, query = source.draw(0)
    path = farhox.export.saved_model(trained, tmp_path / "served")
    served = farhox.export.load(path.parent).predict(
        "adapt", support_inputs=support[0], support_labels=support[1], query_inputs=query[0])["predictions"]
    for answer in (served, trained.adapt(support)(query[0])):
        np.testing.assert_allclose(answer, trained.predict(support, query[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("curvature", [None, lambda support, query: query, lambda support, query: tuple(
    tf.concat(pair, axis=1) for pair in zip(support, query))], ids=["support", "query", "both"])
def test_imaml_solves_with_the_curvature_of_the_examples_asked_for(curvature, float64):
    model, task = network(), episode()
    learner = meta.IMAML(model, 0.1, 3, proximal=2.0, linear_solver=farhox.linear_solvers.Direct(), batch_size=2,
                         loss=squared, curvature=curvature)
    learner.compile("sgd")
    query = of_one(task)[1]
    examples = of_one((curvature or (lambda support, query: support))(*task))
    state = learner.hypergradient.compute(learner.problem, *learner._hyper_iteration_data(task, training=True)).state
    shapes = [variable.shape for variable in model.trainable_variables]
    flat = tf.concat([tf.reshape(part[0], [-1]) for part in state.variables], axis=0)

    def loss(flat, part):
        w, b, v = (tf.reshape(piece, shape) for piece, shape in zip(
            tf.split(flat, [int(np.prod(shape)) for shape in shapes]), shapes))
        return tf.reduce_mean(squared(part[1], tf.tanh(part[0] @ w + b) @ v))

    with tf.GradientTape(persistent=True) as outer:
        outer.watch(flat)
        with tf.GradientTape() as tape:
            tape.watch(flat)
            value = loss(flat, examples)
        gradient = tape.gradient(value, flat)
        at_query = loss(flat, query)
    expected = np.linalg.solve(np.eye(len(flat)) + outer.jacobian(gradient, flat).numpy() / 2.0,
                               outer.gradient(at_query, flat).numpy())
    found = np.concatenate([np.ravel(g) for g in meta_gradients(learner, task)])
    assert_close([found], [expected], 1e-8)


@pytest.mark.slow
def test_a_system_on_other_examples_has_their_curvature_and_mixed_derivative():
    w, target = variable(3.0, name="w"), variable(0.5, name="target")
    problem = farhox.BilevelProblem(  # A batch holds (a, b): curvature mean(a), mixed derivative -mean(b).
        lambda batch: tf.reduce_mean(batch[:, 0] / 2 * keras.ops.square(w) - batch[:, 1] * target * w),
        lambda batch: keras.ops.square(w - batch["goal"]) / 2, [w], [target], farhox.GradientDescent(0.1))
    inner = farhox.repeat(np.array([[2.0, 1.0]]), 5)
    outer = {"goal": np.float64(1.0), "examples": np.array([[4.0, 3.0], [6.0, 3.0], [5.0, 0.0]])}
    method = farhox.ImplicitHG(farhox.linear_solvers.Direct(), system_batch=lambda batch: batch["examples"])
    result = method.compute(problem, inner, outer)
    end = 0.25 + (3.0 - 0.25) * 0.8 ** 5
    np.testing.assert_allclose(result.gradients[0], 2.0 / 5.0 * (end - 1.0), rtol=1e-12)


def test_single_variables_are_a_representation(float64):
    model, task = network(adapts=True), episode()
    context = model.layers[1].shift
    rest = [variable for variable in model.trainable_variables if variable is not context]
    problem = meta.episode_problem(model, squared, farhox.GradientDescent(RATE), representation=rest)
    assert problem.inner_variables == [context] and problem.outer_variables == rest
    learner = meta.Learner(model, problem, farhox.hypergradients.EpisodesHG(farhox.ReverseHG()), STEPS, loss=squared)
    weights = [variable.numpy() for variable in rest]
    (x, y), (query_x, query_y) = of_one(task)
    weights = [tf.constant(weight) for weight in weights]
    with tf.GradientTape() as outer:
        outer.watch(weights)
        shift = tf.zeros([4], tf.float64)
        for _ in range(STEPS):
            with tf.GradientTape() as tape:
                tape.watch(shift)
                loss = tf.reduce_mean(squared(y, tf.tanh(x @ weights[0] + weights[1] + shift) @ weights[2]))
            shift -= RATE * tape.gradient(loss, shift)
        loss = tf.reduce_mean(squared(query_y, tf.tanh(query_x @ weights[0] + weights[1] + shift) @ weights[2]))
    assert_close(meta_gradients(learner, task), outer.gradient(loss, weights), 1e-9)
    anil = meta.ANIL(model, [context, model.layers[3]])
    assert anil.problem.inner_variables == [context, model.layers[3].kernel]


@pytest.mark.slow
def test_targets_may_be_a_dictionary_for_a_loss_of_ones_own(float64):
    def gain(action, gains, logits):
        chosen = tf.gather(tf.nn.log_softmax(logits), tf.cast(action, tf.int32), batch_dims=1)
        return -gains * chosen

    random = np.random.default_rng(0)
    parts = [(random.normal(size=[n, 3]), random.integers(0, 2, n), random.normal(size=n)) for n in (4, 5, 6, 3)]
    model, made = network(), []
    for loss, pack in (
            (lambda y, logits: gain(y["action"], y["gain"], logits), lambda a, g: {"action": a, "gain": g}),
            (lambda y, logits: gain(y[:, 0], y[:, 1], logits), lambda a, g: np.stack([a, g], axis=1))):
        support, query, *other = [(x, pack(action, gains)) for x, action, gains in parts]
        episodes = next(iter(meta.TaskEpisodes([(support, query), tuple(other)]).dataset(2)))
        learner = meta.MAML(model, RATE, STEPS, loss=loss)
        made.append([*meta_gradients(learner, episodes), learner._judge(episodes)["loss"],
                     learner.predict(support, query[0]), learner.adapt(support)(query[0])])
    assert np.linalg.norm(made[0][0]) > 1e-3
    assert_close(made[0], made[1], 1e-9)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("freeze", ["layer", "variable"])
def test_frozen_layers_neither_adapt_nor_learn(freeze, float64):
    model = network()
    if freeze == "layer":
        model.layers[0].trainable = False
        learner = meta.MAML(model, RATE, STEPS, loss=squared)
    else:
        learner = meta.ANIL(model, [model.layers[3].kernel], RATE, STEPS, loss=squared)
    frozen = [variable.numpy() for variable in model.layers[0].variables]
    support, _ = of_one(episode())
    adapted = learner.adapt(support)
    for a, b in zip(frozen, adapted.layers[0].variables):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(adapted.layers[3].kernel, model.layers[3].kernel)
    assert len(learner.problem.outer_variables) == (1 if freeze == "layer" else 3)


@pytest.mark.one_case
@pytest.mark.parametrize("rates", [True, "positive"])
def test_learned_rates_are_positive_if_asked_for(rates):
    learner = meta.MAML(network(), 0.2, 1, loss=squared, learn_learning_rates=rates)
    assert [rate.low for rate in learner.problem.hyperparameters] == [None if rates is True else 0.0] * 3
    np.testing.assert_allclose(learner.problem.hyperparameters[0].numpy(), np.full([3, 4], 0.2), rtol=1e-6)


@pytest.mark.parametrize("make, error, message", [
    (lambda m: meta.MAML(m, condition="task"), TypeError, "condition must be a callable"),
    (lambda m: meta.MAML(m, dynamics=farhox.Adam(), first_order=True), ValueError, "are settings of gradient descent"),
    (lambda m: meta.MAML(m, learn_learning_rates="all"), ValueError, 'must be False, True or "positive"'),
    (lambda m: meta.MAML(m, support_loss=3), TypeError, "loss must be the name of a Keras loss"),
    (lambda m: meta.IMAML(m, curvature=2), TypeError, "curvature must be a callable"),
    (lambda m: meta.ANIL(m, head=[keras.Variable(0.0)]), ValueError, "head must hold layers of the model .* or train"),
    (lambda m: meta.episode_problem(m, representation=[m.layers[1].shift]), ValueError, "or trainable variables of it"),
    (lambda m: farhox.ImplicitHG(system_batch=3), TypeError, "system_batch must be a callable"),
    (lambda m: farhox.ImplicitHG(system="dynamics", system_batch=len), ValueError, "system_batch needs"),
])
def test_wrong_arguments_are_errors_that_state_the_rule(make, error, message):
    with pytest.raises(error, match=message):
        make(network())


def test_curvature_must_be_examples(float64):
    learner = meta.IMAML(network(), loss=squared, curvature=lambda support, query: query[0])
    with pytest.raises(ValueError, match="curvature must return a tuple of 2"):
        meta_gradients(learner, episode())

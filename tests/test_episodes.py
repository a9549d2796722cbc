"""EpisodesHG and k_fold_dataset: several inner problems that share the outer variables."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox.data import k_fold_dataset
from farhox.hypergradients import EpisodesHG, ReptileHG

EPISODES, STEPS = 3, 4


def make_problem(learned_bias):
    """Logistic regression in float64 with a learned rate and penalty, and perhaps a learned initial bias."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,), dtype="float64"),
                              keras.layers.Dense(3, activation="softmax", dtype="float64")])
    rate = farhox.Hyperparameter(0.3, low=0.0, name="rate", dtype="float64")
    penalty = farhox.Hyperparameter(0.1, low=0.0, name="penalty", dtype="float64")
    kernel, bias = model.trainable_variables
    loss = keras.losses.SparseCategoricalCrossentropy(dtype="float64")
    return farhox.BilevelProblem(
        lambda batch: loss(batch[1], model(batch[0], training=True)) + penalty() * keras.ops.sum(kernel ** 2),
        lambda batch: loss(batch[1], model(batch[0], training=False)),
        [kernel, bias], [rate, penalty] + [bias] * learned_bias, dynamics=farhox.Momentum(rate),
        outer_predictions=lambda batch: (batch[1], model(batch[0], training=False), None))


@pytest.fixture
def problem():
    return make_problem(learned_bias=True)


def examples(*shape):
    generator = np.random.default_rng(1)
    return generator.normal(size=(*shape, 5)), generator.integers(0, 3, size=shape)


def episode(nest, index):
    return tf.nest.map_structure(lambda leaf: leaf[index], nest)


INNER_BATCHES = {
    "stacked": (examples(EPISODES, STEPS, 6), episode),
    "repeated": (farhox.repeat(examples(EPISODES, 6), STEPS),
                 lambda batches, k: farhox.repeat(episode(batches.batch, k), STEPS)),
    "gathered": (farhox.gather(examples(20), np.random.default_rng(2).integers(0, 20, (EPISODES * STEPS, 6)))._replace(
        indices=tf.constant(np.random.default_rng(2).integers(0, 20, (EPISODES, STEPS, 6)))),
        lambda batches, k: farhox.gather(batches.data, batches.indices[k])),
}


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("kind", INNER_BATCHES)
@pytest.mark.parametrize("method", [farhox.ReverseHG(), farhox.ForwardHG()], ids=["reverse", "forward"])
def test_episodes_equal_the_mean_of_single_computations(problem, kind, method):
    inner, single = INNER_BATCHES[kind]
    outer = examples(EPISODES, 8)
    result = EpisodesHG(method).compute(problem, inner, outer)
    parts = [method.compute(problem, single(inner, k), episode(outer, k)) for k in range(EPISODES)]
    for i, gradient in enumerate(result.gradients):
        np.testing.assert_allclose(gradient, np.mean([part.gradients[i] for part in parts], axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.outer_loss, np.mean([part.outer_loss for part in parts]), rtol=1e-12)
    np.testing.assert_allclose(result.inner_losses, [part.inner_losses for part in parts], rtol=1e-12)
    np.testing.assert_allclose(
        result.state.variables[0], [part.state.variables[0] for part in parts], rtol=1e-12)


@pytest.mark.slow
def test_episodes_at_the_same_time_change_no_bit():
    problem, inner, outer = make_problem(learned_bias=False), INNER_BATCHES["stacked"][0], examples(EPISODES, 8)
    one, several = (farhox.ReverseHG().compute(problem.over_episodes(parallel_iterations=count), inner, outer)
                    for count in (1, 3))
    tf.nest.map_structure(np.testing.assert_array_equal, one, several)
    losses = []
    for count in (None, 2):
        for variable in problem.outer_variables:
            variable.assign(0.1)
        optimizer = farhox.HyperOptimizer(problem, EpisodesHG(farhox.ReverseHG()))
        optimizer.compile(keras.optimizers.SGD(0.1), parallel_iterations=count)
        assert optimizer.problem.parallel_iterations == (count or 1)
        losses.append(optimizer.fit((inner, outer), epochs=2, verbose=0).history["outer_loss"])
    assert losses[0] == losses[1] and losses[0][1] < losses[0][0]


def test_the_number_of_episodes_at_the_same_time_is_checked(problem):
    with pytest.raises(ValueError, match="parallel_iterations must be a positive integer"):
        problem.over_episodes(parallel_iterations=0)
    with pytest.raises(ValueError, match="parallel_iterations is for a problem over_episodes"):
        farhox.HyperOptimizer(problem).compile(parallel_iterations=2)


@pytest.mark.slow
def test_order_of_episodes_does_not_matter(problem):
    inner, outer = examples(EPISODES, STEPS, 6), examples(EPISODES, 8)
    method = EpisodesHG(farhox.ReverseHG())
    order = [2, 0, 1]
    first = method.compute(problem, inner, outer)
    second = method.compute(problem, episode(inner, order), episode(outer, order))
    for a, b in zip(first.gradients, second.gradients):
        np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.slow
def test_another_aggregation_replaces_the_mean(problem):
    inner, outer = examples(EPISODES, STEPS, 6), examples(EPISODES, 8)
    worst = EpisodesHG(farhox.ReverseHG(), aggregation=lambda values: tf.reduce_max(values, axis=0))
    losses = [farhox.ReverseHG().compute(problem, episode(inner, k), episode(outer, k)).outer_loss
              for k in range(EPISODES)]
    np.testing.assert_allclose(worst.compute(problem, inner, outer).outer_loss, np.max(losses), rtol=1e-13)


@pytest.mark.slow
def test_states_of_episodes_can_go_on():
    problem = make_problem(learned_bias=False)
    inner, outer = examples(EPISODES, 2 * STEPS, 6), examples(EPISODES, 8)
    method = EpisodesHG(farhox.ForwardHG())
    halves = [tf.nest.map_structure(lambda leaf: leaf[:, part], inner)
              for part in (slice(None, STEPS), slice(STEPS, None))]
    first = method.compute(problem, halves[0], outer)
    second = method.compute(problem, halves[1], outer, state=first.state, carry=first.carry)
    whole = method.compute(problem, inner, outer)
    for a, b in zip(second.gradients, whole.gradients):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.slow
def test_different_inner_problems_are_one_problem_with_a_sum():
    """Two inner problems of different size that share λ: the inner objectives add up, the outer ones are averaged."""
    a, b, lam = (keras.Variable(np.asarray(value), dtype="float64", name=name)
                 for name, value in (("a", 3.0), ("b", [1.0, -1.0]), ("lam", 0.5)))

    def single(w, scale):
        return (lambda _: scale * keras.ops.sum((w - lam) ** 2)), (lambda _: keras.ops.sum(w ** 2))

    (inner_a, outer_a), (inner_b, outer_b) = single(a, 0.5), single(b, 1.0)
    dynamics = farhox.GradientDescent(0.1)
    batches, outer_batch = farhox.repeat(tf.zeros([1]), 5), tf.zeros([1])
    joint = farhox.BilevelProblem(lambda x: inner_a(x) + inner_b(x), lambda x: 0.5 * (outer_a(x) + outer_b(x)),
                                  [a, b], [lam], dynamics=dynamics)
    parts = [farhox.BilevelProblem(inner, outer, [w], [lam], dynamics=dynamics)
             for inner, outer, w in ((inner_a, outer_a, a), (inner_b, outer_b, b))]
    expected = np.mean([farhox.ReverseHG().compute(p, batches, outer_batch).gradients[0] for p in parts])
    actual = farhox.ReverseHG().compute(joint, batches, outer_batch).gradients[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-13)


@pytest.mark.slow
def test_fit_trains_on_folds(problem):
    data = k_fold_dataset(examples(40), folds=4, inner_steps=STEPS, batch_size=6)
    optimizer = farhox.HyperOptimizer(problem, EpisodesHG(farhox.ReverseHG()))
    optimizer.compile(keras.optimizers.SGD(0.1), metrics=["accuracy"])
    history = optimizer.fit(data, epochs=3, verbose=0).history
    assert len(history["rate"]) == 3 and history["rate"][0] != history["rate"][-1]


@pytest.mark.slow
def test_an_evaluation_on_folds_is_that_of_each(problem):
    data = k_fold_dataset(examples(40), folds=4, inner_steps=STEPS, batch_size=6)
    optimizer = farhox.HyperOptimizer(problem, EpisodesHG(farhox.ReverseHG()))
    optimizer.compile(keras.optimizers.SGD(0.1), metrics=["accuracy"])
    result = optimizer.evaluate(data, return_dict=True, verbose=0)
    assert 0 <= result["accuracy"] <= 1
    inner, outer = next(iter(data))
    np.testing.assert_allclose(
        problem.over_episodes().evaluate(inner, outer).outer_loss,
        np.mean([problem.evaluate(
            farhox.gather(inner.data, inner.indices[k]), episode(outer, k)).outer_loss for k in range(4)]),
        rtol=1e-12)


def test_folds_are_disjoint_and_cover_the_data():
    x = np.arange(43.0)
    inner, outer = next(iter(k_fold_dataset((x,), folds=5, inner_steps=2)))
    assert outer[0].shape == (5, 8) and inner.indices.shape == (5, 2, 32)
    held_out = np.sort(outer[0].numpy().ravel())
    assert len(np.unique(held_out)) == 40
    for k in range(5):
        trained = set(x[inner.indices[k, 0].numpy()])
        assert trained.isdisjoint(outer[0][k].numpy()) and trained | set(outer[0][k].numpy()) == set(held_out)


@pytest.mark.parametrize("arguments, message", [
    ({"folds": 1}, "folds must be an integer of at least 2"),
    ({"inner_steps": 0}, "inner_steps must be an integer of at least 1"),
    ({"folds": 50}, "at least one example per fold"),
    ({"batch_size": 39}, "must not exceed the 20 training examples"),
])
def test_folds_refuse_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        k_fold_dataset(examples(40), **{"folds": 2, "inner_steps": 3, **arguments})


def test_episodes_refuse_bad_input():
    with pytest.raises(TypeError, match="method for one episode"):
        EpisodesHG("reverse")
    for method in (EpisodesHG(farhox.ReverseHG()), ReptileHG()):
        with pytest.raises(TypeError, match=f"{type(method).__name__} averages over episodes itself: use it as it is"):
            EpisodesHG(method)
    with pytest.raises(TypeError, match="aggregation must be a callable"):
        EpisodesHG(farhox.ReverseHG(), aggregation="mean")
    with pytest.raises(ValueError, match="Episodes start anew"):
        farhox.HyperOptimizer(make_problem(learned_bias=False), EpisodesHG(farhox.ReverseHG()), online=True)


@pytest.mark.slow
def test_every_method_serves_a_problem_over_episodes(problem):
    """The same as the method said to be one over episodes, with an aggregation of one's own."""
    inner, outer = next(iter(k_fold_dataset(examples(40), folds=3, inner_steps=STEPS, batch_size=6)))

    def worst(values):
        return tf.reduce_max(values, axis=0)

    over = problem.over_episodes(worst)
    losses = [problem.evaluate(farhox.gather(inner.data, inner.indices[k]), episode(outer, k)).outer_loss
              for k in range(3)]
    result = farhox.ReverseHG().compute(over, inner, outer)
    np.testing.assert_allclose(result.outer_loss, max(losses), rtol=1e-12)
    said = EpisodesHG(farhox.ReverseHG(), worst).compute(problem, inner, outer)
    tf.nest.map_structure(np.testing.assert_array_equal, result, said)
    assert farhox.ReverseHG().compute(problem.over_episodes(), inner, outer).outer_loss < result.outer_loss


@pytest.mark.slow
def test_an_evaluation_has_the_predictions_of_the_same_pass():
    calls = []
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2, activation="softmax")])

    def called(x):
        calls.append(1)
        return model(x, training=False)

    rate = farhox.Hyperparameter(0.1, low=0.0, name="rate")
    single = farhox.supervised_problem(
        model, dynamics=farhox.GradientDescent(rate), outer_variables=[rate], outer_call=called)
    x, y = np.random.default_rng(0).normal(size=(6, 3)).astype("float32"), np.arange(6) % 2
    evaluation = single.evaluate(farhox.repeat((x, y), 2), (x, y))
    assert len(calls) == 1
    targets, predictions, weights = evaluation.predictions
    np.testing.assert_array_equal(targets, y)
    assert weights is None
    chosen = predictions.numpy()[np.arange(6), y]
    np.testing.assert_allclose(evaluation.outer_loss, -np.mean(np.log(chosen)), rtol=1e-5)
    again = single.predictions(evaluation.state, (x, y))
    np.testing.assert_array_equal(again[1], predictions)


def test_what_a_method_needs_is_checked_when_the_optimizer_is_made(problem):
    class SingleLoop(farhox.hypergradients.SingleHyperGradient):
        needs_online = True

        def differentiate(self, training, outer_batch, carry):
            raise NotImplementedError

    with pytest.raises(ValueError, match="SingleLoop makes sense where the inner state goes on.*online=True"):
        farhox.HyperOptimizer(problem, SingleLoop())

"""Sample weights of episodes: padded tasks give the numbers of those that are not, losses are scaled by weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.trainers.compile_utils import get_metric

import farhox
from farhox import meta
from farhox.meta.accuracy import correct
from farhox.meta.weights import order_of_present, scaled

WAYS = 3


def network(normalized):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.BatchNormalization()] if normalized else []
    return keras.Sequential([
        keras.Input([4]), keras.layers.Dense(5), *layers, keras.layers.Activation("tanh"),
        keras.layers.Dense(WAYS, "softmax")])


def hyper_representation(model, **settings):
    body = keras.Sequential([keras.Input([4]), *model.layers[:-1]])
    return meta.HyperRepresentation(body, model.layers[-1], 0.3, 2, **settings)


def prototypical(model, transductive=True):
    return meta.PrototypicalNetwork(keras.Sequential([keras.Input([4]), *model.layers[:-1]]), WAYS)


def ridge(model):
    return meta.RidgeNetwork(keras.Sequential([keras.Input([4]), *model.layers[:-1]]), WAYS)


def support_vectors(model):
    return meta.SupportVectorNetwork(keras.Sequential([keras.Input([4]), *model.layers[:-1]]), WAYS)


LEARNERS = {
    "MAML": lambda model, **settings: meta.MAML(model, 0.3, 2, **settings),
    "FOMAML": lambda model, **settings: meta.MAML(model, 0.3, 2, first_order=True, **settings),
    "ANIL": lambda model, **settings: meta.ANIL(model, None, 0.3, 2, **settings),
    "IMAML": lambda model, **settings: meta.IMAML(model, 0.3, 3, **settings),
    "Reptile": lambda model, **settings: meta.Reptile(model, farhox.GradientDescent(0.3), 3, **settings),
    "Reptile in batches": lambda model, **settings: meta.Reptile(
        model, farhox.GradientDescent(0.3), 3, batch_size=4, **settings),
    "HyperRepresentation": hyper_representation,
    "JointTraining": lambda model, **settings: meta.JointTraining(model, 0.3, 2, **settings),
    "PrototypicalNetwork": prototypical,
    "RidgeNetwork": ridge,
    "SupportVectorNetwork": support_vectors,
}


def episodes(seed=0, count=2):
    """A meta-batch of weighted episodes of one size, float64."""
    random = np.random.default_rng(seed)

    def part(examples):
        y = np.stack([random.permutation(examples) % WAYS for _ in range(count)])
        x = random.normal(size=[count, examples, 4]) + np.eye(WAYS, 4)[y]
        return tf.constant(x), tf.constant(y), tf.ones([count, examples], tf.float64)

    return meta.Episode(part(6), part(9))


def padded(part, number):
    """The same with examples of weight zero behind, whose inputs are far away."""
    x, y, weights = part
    return (tf.concat([x, 50.0 + tf.zeros([x.shape[0], number, 4], x.dtype)], 1),
            tf.concat([y, tf.ones([y.shape[0], number], y.dtype)], 1),
            tf.concat([weights, tf.zeros([y.shape[0], number], weights.dtype)], 1))


def outcome(learner, element):
    """The meta-gradient of a meta-batch, its losses and accuracies."""
    if isinstance(learner, meta.EmbeddingLearner):
        inputs, targets, *weights = learner._as_keras(element)
        with tf.GradientTape() as tape:
            losses = keras.losses.SparseCategoricalCrossentropy()
            loss = losses(targets, learner(inputs, training=True), *weights)
        gradients = tape.gradient(loss, [variable.value for variable in learner.trainable_variables])
    else:
        data = learner._hyper_iteration_data(element, training=True)
        carry = learner._kept.carry_now()
        gradients = learner.hypergradient.compute(learner.problem, *data, carry=carry).gradients
    return {"gradient": np.concatenate([np.ravel(gradient) for gradient in gradients]), **learner._judge(element)}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12, err_msg=key)


# One that has no inner training.
QUICK = ("PrototypicalNetwork",)


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LEARNERS])
def test_padded_tasks_of_weight_zero_give_the_numbers_of_those_not_padded_times_the_weight(name, float64):
    learner = LEARNERS[name](network(normalized=True))
    learner.compile(keras.optimizers.SGD(1.0))
    plain = episodes()
    bare = plain if "batches" in name else meta.Episode(plain.support[:2], plain.query[:2])
    statistics = learner.get_weights()
    expected = outcome(learner, bare)
    assert np.linalg.norm(expected["gradient"]) > 0.01
    learner.set_weights(statistics)  # Those of a prototypical network move on.
    # Seven times the weight of all queries is seven times the loss.
    x, y, weights = padded(plain.query, 2)
    got = outcome(learner, meta.Episode(padded(plain.support, 3), (x, y, 7 * weights)))
    factor = 1 if "Reptile" in name else 7  # Reptile's direction does not look at queries.
    assert_same(got, {"loss": 7 * expected["loss"], "gradient": factor * expected["gradient"],
                      "accuracy": expected["accuracy"]})


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("name", ["MAML", "PrototypicalNetwork"])
def test_fit_evaluate_predict_and_adapt_know_what_is_padded(name, float64):
    plain = episodes()
    results = []
    for element in (meta.Episode(plain.support[:2], plain.query[:2]),
                    meta.Episode(padded(plain.support, 3), padded(plain.query, 2))):
        learner = LEARNERS[name](network(normalized=True), transductive=False)
        learner.compile(keras.optimizers.SGD(0.5), metrics=["accuracy"])
        data = tf.data.Dataset.from_tensors(element)
        logs = learner.fit(data, validation_data=data, verbose=0).history
        support, query = tf.nest.map_structure(lambda leaf: leaf[0].numpy(), tuple(element))
        adapted = learner.adapt(support)
        results.append({**logs, "trained": np.concatenate([np.ravel(w) for w in learner.get_weights()]),
                        "adapted": adapted(query[0][:4]), "predicted": learner.predict(support, query[0][:9])})
        assert {"accuracy", "val_accuracy"} <= set(logs)
    assert_same(*results)


def test_queries_of_weight_zero_have_no_loss_and_no_accuracy(float64):
    learner = LEARNERS["MAML"](network(normalized=True))
    x, y, weights = episodes().query
    judged = learner._judge(meta.Episode(episodes().support[:2], (x, y, 0 * weights)))
    np.testing.assert_array_equal(judged["loss"], 0.0)
    assert np.isnan(judged["accuracy"]).all()


def test_losses_that_are_sums_are_not_divided_by_the_number_of_queries(float64):
    weights = tf.constant([[1.0, 0.0, 3.0, 0.0]])
    np.testing.assert_allclose(scaled(weights, "mse"), [[2.0, 0.0, 6.0, 0.0]])
    np.testing.assert_allclose(scaled(weights, keras.losses.MeanSquaredError(reduction="sum")), weights)
    np.testing.assert_allclose(scaled(0 * weights, "mse"), 0 * weights)


@pytest.mark.slow
def test_inner_batches_hold_examples_of_any_weight_alone_each_before_any_comes_again():
    weights = tf.constant([[1.0, 0.0, 2.0, 1.0, 0.0], [0.0] * 4 + [1.0]])
    places = order_of_present(weights, 3, 2, tf.constant([0, 1], tf.int64)).numpy()
    assert sorted(places[0, :3]) == sorted(places[0, 3:]) == [0, 2, 3]
    np.testing.assert_array_equal(places[1], 4)


def test_weighted_statistics_need_batch_norm_of_one_replica(float64):
    model = keras.Sequential([keras.Input([4]), keras.layers.BatchNormalization(synchronized=True),
                              keras.layers.Dense(WAYS, "softmax")])
    with pytest.raises(ValueError, match="need batch-norm layers that are not synchronized"):
        meta.MAML(model)._judge(episodes())


@pytest.mark.parametrize("targets, predictions, expected", [
    ([1, 0, 1], [[0.9], [0.4], [0.2]], [1, 1, 0]),
    ([[1.0], [0.0], [1.0]], [[0.9], [0.4], [0.2]], [1, 1, 0]),
    ([1, 0, 1], [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], [1, 0, 1]),
    ([[1], [0], [1]], [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], [1, 0, 1]),
    ([[0.0, 1.0], [1.0, 0.0], [0.2, 0.8]], [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], [1, 0, 1])],
    ids=["binary", "binary column", "sparse", "sparse column", "categorical"])
def test_accuracy_is_resolved_by_shapes_as_by_keras(targets, predictions, expected):
    targets, predictions = tf.constant(targets), tf.constant(predictions)
    np.testing.assert_array_equal(correct(targets, predictions), expected)
    metric = get_metric("accuracy", targets, predictions)
    metric.update_state(targets, predictions)
    assert float(metric.result()) == pytest.approx(np.mean(expected))


@pytest.mark.slow
def test_one_sigmoid_and_one_hot_targets_have_their_accuracy_and_regression_has_none():
    def judged(outputs, activation, loss, targets):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(outputs, activation)])
        x = np.random.default_rng(0).normal(size=[1, 8, 2]).astype("float32")
        learner = meta.JointTraining(model, 0.1, 1, loss=loss)
        return learner._judge(meta.Episode((x, targets), (x, targets))), learner.predict((x[0], targets[0]), x[0])

    y = np.array([[0, 1, 1, 1, 0, 1, 1, 1]])
    values, predictions = judged(1, "sigmoid", "binary_crossentropy", y)
    assert values["accuracy"].numpy() == np.mean((predictions[:, 0] > 0.5) == y[0])
    values, predictions = judged(3, "softmax", "categorical_crossentropy", np.eye(3, dtype="float32")[y])
    assert values["accuracy"].numpy() == np.mean(predictions.argmax(-1) == y[0])
    assert set(judged(1, None, "mean_squared_error", y)[0]) == {"loss"}

"""farhox.losses: values against counts and closed forms in NumPy, groups, and their use as an outer objective."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from unrolled import finite_differences

import farhox
from farhox import losses

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=[12, 3])
LABELS, CLASSES = GENERATOR.integers(0, 2, 12), GENERATOR.integers(0, 3, 12)
GROUPS = np.array([0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 0, 1])
LOGITS = GENERATOR.normal(size=[12, 1])
P = 1 / (1 + np.exp(-LOGITS))
WEIGHTS = GENERATOR.uniform(size=12)
SOFTMAX = np.exp(logits := GENERATOR.normal(size=[12, 3])) / np.exp(logits).sum(axis=1, keepdims=True)


def value(loss, targets, predictions, extra=None):
    return loss(tf.constant(targets), tf.constant(predictions), None if extra is None else tf.constant(extra)).numpy()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_soft_auc_is_the_mean_logistic_loss_of_pairs_and_bounds_one_minus_auc(weights):
    pairs = [(i, j) for i in range(12) for j in range(12) if LABELS[i] == 1 and LABELS[j] == 0]
    of_pair = [1.0 if weights is None else weights[i] * weights[j] for i, j in pairs]
    margins = np.array([LOGITS[i, 0] - LOGITS[j, 0] for i, j in pairs])
    expected = np.average(np.log2(1 + np.exp(-margins)), weights=of_pair)
    np.testing.assert_allclose(value(losses.SoftAUC(), LABELS, P, weights), expected, rtol=1e-9)
    np.testing.assert_allclose(value(losses.SoftAUC(from_logits=True), LABELS[:, None], LOGITS, weights), expected,
                               rtol=1e-12)
    assert expected >= np.average(margins < 0, weights=of_pair)


def test_soft_auc_of_a_batch_of_one_class_is_zero_with_derivative_zero():
    scores = tf.constant(LOGITS)
    with tf.GradientTape() as tape:
        tape.watch(scores)
        loss = losses.SoftAUC(from_logits=True)(tf.ones([12], tf.int64), scores)
    assert loss.numpy() == 0.0
    np.testing.assert_array_equal(tape.gradient(loss, scores), np.zeros([12, 1]))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_soft_f1_of_sure_predictions_is_one_minus_the_f1_that_is_counted(weights):
    sure = (P > 0.5).astype(float)
    w = np.ones(12) if weights is None else weights
    hits = np.sum(w * (LABELS == 1) * sure[:, 0])
    expected = 1 - 2 * hits / np.sum(w * (LABELS + sure[:, 0]))
    np.testing.assert_allclose(value(losses.SoftF1(), LABELS, sure, weights), expected, rtol=1e-12)


@pytest.mark.parametrize("targets", [CLASSES, CLASSES[:, None], np.eye(3)[CLASSES]], ids=["[b]", "[b, 1]", "one-hot"])
def test_soft_f1_of_several_classes_is_the_mean_over_them(targets):
    truth = np.eye(3)[CLASSES]
    expected = 1 - np.mean(2 * np.sum(truth * SOFTMAX, axis=0) / np.sum(truth + SOFTMAX, axis=0))
    np.testing.assert_allclose(value(losses.SoftF1(), targets, SOFTMAX), expected, rtol=1e-12)
    np.testing.assert_allclose(value(losses.SoftF1(from_logits=True), targets, np.log(SOFTMAX)), expected, rtol=1e-12)


def group_losses():
    each = -np.log(SOFTMAX[np.arange(12), CLASSES])
    return np.array([each[GROUPS == group].mean() for group in range(3)])


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy",
                                  keras.losses.SparseCategoricalCrossentropy(dtype="float64")])
def test_the_worst_group_counts_alone_or_softly_and_absent_groups_do_not(loss):
    means = group_losses()
    for num_groups in (3, 5):
        hard = losses.WorstGroupLoss(loss, num_groups)
        np.testing.assert_allclose(value(hard, CLASSES, SOFTMAX, GROUPS), means.max(), rtol=1e-9)
        soft = losses.WorstGroupLoss(loss, num_groups, temperature=0.3)
        np.testing.assert_allclose(value(soft, CLASSES, SOFTMAX, GROUPS),
                                   0.3 * np.log(np.mean(np.exp(means / 0.3))), rtol=1e-9)


@pytest.mark.parametrize("targets, predictions", [(LABELS, P), (CLASSES, SOFTMAX)], ids=["binary", "classes"])
def test_equalized_odds_penalise_how_mean_probabilities_of_a_label_differ_between_groups(targets, predictions):
    name = "binary_crossentropy" if predictions is P else "sparse_categorical_crossentropy"
    distances = []
    for label in np.unique(targets):
        for group in range(3):
            cell = (targets == label) & (GROUPS == group)
            if cell.any():
                gap = predictions[cell].mean(axis=0) - predictions[targets == label].mean(axis=0)
                distances.append(np.sum(gap ** 2))
    shaped = targets[:, None].astype(float) if predictions is P else targets
    plain = np.mean(keras.losses.get(name)(shaped, predictions))
    loss = losses.EqualizedOddsLoss(name, 3, weight=2.0)
    np.testing.assert_allclose(value(loss, shaped, predictions, GROUPS), plain + 2.0 * np.mean(distances), rtol=1e-6)
    # Groups that differ in labels alone are not unequal in this sense.
    equal = np.where(targets[:, None] == 1, 0.8, 0.3)
    if predictions is P:
        loss = losses.EqualizedOddsLoss(name, 3, weight=1e6)
        plain = np.mean(keras.losses.binary_crossentropy(shaped, equal))
        np.testing.assert_allclose(value(loss, shaped, equal, GROUPS), plain, rtol=1e-6)


def test_groups_out_of_range_are_refused_eagerly_and_in_graphs_and_give_no_number_under_xla():
    loss = losses.WorstGroupLoss("sparse_categorical_crossentropy", 2)
    arguments = tf.constant(CLASSES), tf.constant(SOFTMAX), tf.constant(GROUPS)
    with pytest.raises(ValueError, match=r"Groups must be integers .* \(1\). Received groups from 0 to 2"):
        loss(*arguments)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Groups must be integers from 0"):
        tf.function(loss.__call__, autograph=False)(*arguments)
    assert np.isnan(tf.function(loss.__call__, autograph=False, jit_compile=True)(*arguments))
    with pytest.raises(ValueError, match="Groups must be integers .* Received dtype: float64"):
        value(loss, CLASSES, SOFTMAX, WEIGHTS)


@pytest.mark.parametrize("make, rule", [
    (lambda: losses.WorstGroupLoss("mse", 0), "num_groups must be a positive integer"),
    (lambda: losses.WorstGroupLoss("mse", 2, temperature=0.0), "temperature must be a positive"),
    (lambda: losses.WorstGroupLoss(keras.losses.MeanSquaredError("sum"), 2), 'must have the reduction "sum_over_batch'),
    (lambda: losses.EqualizedOddsLoss("mse", 2.0), "num_groups must be a positive integer"),
    (lambda: losses.EqualizedOddsLoss("mse", 2, weight=-1.0), "weight must be a non-negative"),
    (lambda: value(losses.SoftAUC(), CLASSES, SOFTMAX), r"shape \[batch, 1\]. Received shape: \(12, 3\)"),
    (lambda: value(losses.SoftF1(), LABELS, P[:, 0]), r"shape \[batch, classes\]. Received shape: \(12,\)"),
    (lambda: value(losses.SoftAUC(), CLASSES, P), r"Labels must be integers .* \(1\). Received labels from 0 to 2"),
])
def test_arguments_and_shapes_that_do_not_fit_are_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def make(outer_loss, units=3, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([3], dtype="float64"), keras.layers.Dense(
        units, "softmax" if units > 1 else "sigmoid", dtype="float64")])
    rate = farhox.Hyperparameter(0.3, low=0.0, dtype="float64", name="rate")
    loss = "sparse_categorical_crossentropy" if units > 1 else "binary_crossentropy"
    return farhox.supervised_problem(
        model, loss, farhox.GradientDescent(rate), [rate], outer_loss=outer_loss, **arguments)


@pytest.mark.one_case
@pytest.mark.parametrize("outer_loss, units, outer", [
    (losses.SoftAUC(), 1, (X, LABELS)), (losses.SoftF1(), 3, (X, CLASSES)), (losses.SoftF1(), 3, (X, CLASSES, WEIGHTS)),
    (losses.WorstGroupLoss("sparse_categorical_crossentropy", 3), 3, (X, CLASSES, GROUPS)),
    (losses.EqualizedOddsLoss("sparse_categorical_crossentropy", 3), 3, (X, CLASSES, GROUPS)),
    (keras.losses.SparseCategoricalCrossentropy(dtype="float64"), 3, (X, CLASSES)),
    (lambda y, p: keras.ops.mean(p ** 2, axis=-1), 3, (X, CLASSES))],
    ids=["AUC", "F1", "weighted F1", "worst group", "odds", "Keras", "callable"])
def test_the_hypergradient_of_an_outer_loss_equals_finite_differences(outer_loss, units, outer):
    problem = make(outer_loss, units)
    y = CLASSES if units == 3 else LABELS[:, None].astype(float)
    data = farhox.repeat((X, y), 3), outer
    expected = finite_differences(problem, *data)
    assert abs(expected[0]) > 1e-6
    assert_close(farhox.ReverseHG().compute(problem, *data).gradients, expected, 1e-7)


@pytest.mark.slow
def test_a_loss_over_groups_needs_the_group_in_the_outer_batch_and_leaves_metrics_alone():
    problem = make(losses.WorstGroupLoss("sparse_categorical_crossentropy", 3))
    with pytest.raises(ValueError, match=r"A batch must be a tuple \(x, y, group\)"):
        problem.outer_loss(problem.initial_state(), problem.outer_values(), (X, CLASSES))
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile("sgd", metrics=["accuracy"], run_eagerly=True)
    logs = optimizer.fit((farhox.repeat((X, CLASSES), 2), (X, CLASSES, GROUPS)), verbose=0).history
    assert 0.0 <= logs["accuracy"][0] <= 1.0

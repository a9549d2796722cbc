"""Keras models as bilevel problems: which losses, states and weights count where."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from unrolled import finite_differences

import farhox

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=[6, 3])
Y = np.array([0, 1, 2, 3, 1, 0])


def dense(units, **arguments):
    return keras.layers.Dense(units, dtype="float64", **arguments)


def make_model(*layers, inputs=(3,)):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(inputs, dtype="float64"), *layers])


def classifier(**arguments):
    return make_model(dense(5, activation="tanh", name="hidden", **arguments),
                      dense(4, activation="softmax", name="head"))


def make(model, **arguments):
    rate = farhox.Hyperparameter(0.1, low=0.0, dtype="float64", name="rate")
    fixed = [rate] if arguments.get("outer_variables") == [] else []
    return farhox.supervised_problem(model, **{
        "dynamics": farhox.GradientDescent(rate), "outer_variables": [rate], "fixed": fixed, **arguments})


def inner_loss(problem, batch=(X, Y)):
    state = problem.initial_state()
    return problem.inner_loss(state.variables, state.state_variables, problem.outer_values(), batch)[0].numpy()


def outer_loss(problem, batch=(X, Y)):
    return problem.outer_loss(problem.initial_state(), problem.outer_values(), batch).numpy()


def cross_entropies(model, x=X, y=Y, training=False):
    return -np.log(model(x, training=training).numpy()[np.arange(len(y)), y])


def test_both_objectives_are_the_mean_loss_of_the_model():
    model = classifier()
    expected = cross_entropies(model).mean()
    np.testing.assert_allclose(inner_loss(make(model)), expected, rtol=1e-12)
    np.testing.assert_allclose(outer_loss(make(model)), expected, rtol=1e-12)


@pytest.mark.parametrize("loss, targets, expected", [
    ("mse", np.ones([6, 4]), lambda p: np.mean((p - 1.0) ** 2)),
    (keras.losses.MeanAbsoluteError(dtype="float64"), np.ones([6, 4]), lambda p: np.mean(np.abs(p - 1.0))),
    (lambda y, p: keras.ops.max(keras.ops.abs(y - p), axis=-1), np.ones([6, 4]),
     lambda p: np.mean(np.max(1.0 - p, axis=-1))),
    ("categorical_crossentropy", np.eye(4)[Y], lambda p: -np.mean(np.log(p[np.arange(6), Y]))),
], ids=["name", "object", "callable", "one-hot"])
def test_losses_are_given_by_name_object_or_callable(loss, targets, expected):
    model = classifier()
    problem = make(model, loss=loss)
    np.testing.assert_allclose(inner_loss(problem, (X, targets)), expected(model(X).numpy()), rtol=1e-12)


def test_sample_weights_of_a_batch_count_as_in_keras():
    model = classifier()
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.0, 3.0])
    expected = np.mean(weights * cross_entropies(model))
    np.testing.assert_allclose(inner_loss(make(model), (X, Y, weights)), expected, rtol=1e-12)
    np.testing.assert_allclose(outer_loss(make(model), (X, Y, weights)), expected, rtol=1e-12)


# ---- losses that layers add

def test_kernel_regularizer_with_a_hyperparameter_counts_inside_only_and_is_learned():
    strength = farhox.Hyperparameter(0.3, low=0.0, dtype="float64", name="strength")
    model = classifier(kernel_regularizer=farhox.L1L2(l2=strength))
    problem = make(model, outer_variables=[strength], dynamics=farhox.GradientDescent(0.1))
    plain = cross_entropies(model).mean()
    kernel = model.get_layer("hidden").kernel.numpy()
    np.testing.assert_allclose(inner_loss(problem), plain + 0.3 * np.sum(kernel ** 2), rtol=1e-12)
    np.testing.assert_allclose(outer_loss(problem), plain, rtol=1e-12)
    # After one step from w: dE/dstrength = -0.1 * 2 kernel' dE/dkernel, times the slope of the softplus.
    result = farhox.ReverseHG().compute(problem, farhox.repeat((X, Y), 1), (X, Y))
    with tf.GradientTape() as tape:
        for v, tensor in zip(problem.inner_variables, result.state.variables):
            v.assign(tensor)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(Y, model(X)))
    slope = 1.0 - np.exp(-0.3)
    gradient = tape.gradient(loss, model.get_layer("hidden").kernel.value).numpy()
    np.testing.assert_allclose(result.gradients[0], -0.2 * np.sum(kernel * gradient) * slope, rtol=1e-9)


def test_activity_regularizer_counts_inside_only():
    model = classifier(activity_regularizer=lambda outputs: 0.2 * keras.ops.sum(keras.ops.square(outputs)))
    problem = make(model)
    plain = cross_entropies(model).mean()
    model(X)
    # Whether the sum is divided by the batch size depends on the release of Keras: its own value decides.
    (activity_loss,) = model.losses
    assert activity_loss > 0
    np.testing.assert_allclose(inner_loss(problem), plain + activity_loss, rtol=1e-12)
    np.testing.assert_allclose(outer_loss(problem), plain, rtol=1e-12)


def test_add_loss_counts_inside_only():
    class Penalty(keras.layers.Layer):
        def call(self, x):
            self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
            return x

    model = make_model(dense(4), Penalty(dtype="float64"), keras.layers.Softmax(dtype="float64"))
    problem = make(model)
    logits = model.layers[0](X).numpy()
    plain = cross_entropies(model).mean()
    np.testing.assert_allclose(inner_loss(problem), plain + 0.1 * np.mean(logits ** 2), rtol=1e-12)
    np.testing.assert_allclose(outer_loss(problem), plain, rtol=1e-12)


def test_losses_of_earlier_calls_do_not_add_up():
    model = classifier(activity_regularizer="l2")
    problem = make(model)
    first = inner_loss(problem)
    model(X)
    assert inner_loss(problem) == first


# ---- state variables

def test_batch_statistics_move_with_the_inner_state_and_not_in_the_model():
    layer = keras.layers.BatchNormalization(momentum=0.75, dtype="float64")
    problem = make(make_model(layer, dense(4, activation="softmax")))
    state = problem.step(problem.initial_state(), problem.outer_values(), (X, Y)).state
    assert [v.name for v in problem.state_variables] == ["moving_mean", "moving_variance"]
    np.testing.assert_allclose(state.state_variables[0], 0.25 * X.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(state.state_variables[1], 0.75 + 0.25 * X.var(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros(3))


@pytest.mark.parametrize("training", [False, True])
def test_outer_objective_uses_moving_statistics_unless_told_to_train(training):
    model = make_model(keras.layers.BatchNormalization(dtype="float64"), dense(4, activation="softmax"))
    problem = make(model, training_at_outer=training)
    expected = cross_entropies(model, training=training).mean()
    for v in model.non_trainable_variables:  # The call above moved them.
        v.assign(np.zeros(3) if v.name == "moving_mean" else np.ones(3))
    np.testing.assert_allclose(outer_loss(problem), expected, rtol=1e-12)
    assert abs(inner_loss(problem) - outer_loss(problem)) > 1e-3 or training


def test_dropout_seeds_move_with_the_inner_state_so_that_each_step_has_its_mask_again():
    model = make_model(dense(16), keras.layers.Dropout(0.5, seed=1, dtype="float64"), dense(4, activation="softmax"))
    problem = make(model)
    assert len(problem.state_variables) == 1 and not keras.backend.is_float_dtype(problem.state_variables[0].dtype)
    seed = problem.state_variables[0].numpy().copy()
    start, outer = problem.initial_state(), problem.outer_values()
    first = problem.step(start, outer, (X, Y))
    again = problem.step(start, outer, (X, Y))
    second = problem.step(start._replace(state_variables=first.state.state_variables), outer, (X, Y))
    assert first.loss.numpy() == again.loss.numpy()
    assert first.loss.numpy() != second.loss.numpy()
    np.testing.assert_array_equal(problem.state_variables[0].numpy(), seed)


def test_frozen_layers_are_neither_inner_nor_state():
    model = classifier()
    model.get_layer("hidden").trainable = False
    problem = make(model)
    assert [id(v) for v in problem.inner_variables] == [id(v) for v in model.get_layer("head").weights]
    assert problem.state_variables == []
    np.testing.assert_allclose(inner_loss(problem), cross_entropies(model).mean(), rtol=1e-12)


@pytest.mark.slow
def test_metrics_and_optimizer_of_a_compiled_model_play_no_part():
    model = make_model(keras.layers.BatchNormalization(dtype="float64"), dense(4, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(X, Y, verbose=0)
    problem = make(model)
    assert [v.name for v in problem.state_variables] == ["moving_mean", "moving_variance"]
    assert len(problem.inner_variables) == 4


# ---- who is inner and who is outer

def test_representation_layers_are_outer_and_the_rest_is_inner():
    model = classifier()
    hidden, head = model.get_layer("hidden"), model.get_layer("head")
    problem = make(model, representation=[hidden])
    assert [id(v) for v in problem.inner_variables] == [id(v) for v in head.weights]
    assert [id(v) for v in problem.outer_variables[1:]] == [id(v) for v in hidden.weights]
    gradients = farhox.ReverseHG().compute(problem, farhox.repeat((X, Y), 2), (X, Y)).gradients
    assert all(np.any(gradient.numpy() != 0.0) for gradient in gradients)


def test_a_layer_named_twice_in_the_representation_counts_once():
    model = classifier()
    hidden = model.get_layer("hidden")
    assert len(make(model, representation=[hidden, hidden]).outer_variables) == 3


def test_nested_models_lend_their_layers_to_the_representation():
    body = make_model(dense(5, activation="tanh"))
    model = make_model(body, dense(4, activation="softmax"))
    for representation in ([body], body.layers):
        problem = make(model, representation=representation)
        assert len(problem.outer_variables) == 3 and len(problem.inner_variables) == 2


def test_learned_initialization_makes_every_inner_variable_an_outer_one():
    model = classifier()
    problem = make(model, learn_initialization=True)
    assert [id(v) for v in problem.outer_variables[1:]] == [id(v) for v in problem.inner_variables]
    assert problem.learns_initialization
    # With no step that depends on it (rate 0) the hypergradient is the outer gradient at the initial value.
    problem = make(model, learn_initialization=True, dynamics=farhox.GradientDescent(0.0), outer_variables=[])
    gradients = farhox.ReverseHG().compute(problem, farhox.repeat((X, Y), 1), (X, Y)).gradients
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(Y, model(X)))
    for gradient, expected in zip(gradients, tape.gradient(loss, [v.value for v in model.trainable_variables])):
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-14)


def test_proximal_strength_reaches_the_problem():
    problem = make(classifier(), proximal=2.0)
    start = problem.initial_state()
    moved = [tensor + 0.1 for tensor in start.variables]
    count = sum(int(tf.size(tensor)) for tensor in moved)
    losses = [p.inner_loss(moved, [], p.outer_values(), (X, Y))[0].numpy() for p in (problem, make(classifier()))]
    np.testing.assert_allclose(losses[0] - losses[1], 0.01 * count, rtol=1e-10)


# ---- weights of examples and classes

def test_example_weights_multiply_the_losses_of_the_indexed_examples():
    model = classifier()
    weights = farhox.ExampleWeights(10, dtype="float64")
    weights.variable.assign(GENERATOR.normal(size=[10]))
    problem = make(model, example_weights=weights)
    index = np.array([9, 0, 3, 3, 5, 1])
    expected = np.mean(weights.numpy()[index] * cross_entropies(model))
    np.testing.assert_allclose(inner_loss(problem, (X, Y, index)), expected, rtol=1e-12)
    np.testing.assert_allclose(outer_loss(problem), cross_entropies(model).mean(), rtol=1e-12)


@pytest.mark.parametrize("key, make_weights", [
    ("example_weights", lambda: farhox.ExampleWeights(6)),
    ("class_weights", lambda: farhox.Hyperparameter(np.ones(4)))])
def test_weights_are_outer_variables_once_whether_named_there_or_not(key, make_weights):
    weights = make_weights()
    for outer_variables in ([], [weights]):
        problem = make(classifier(), outer_variables=outer_variables, **{key: weights})
        assert [id(v) for v in problem.outer_variables] == [id(weights.variable)]
        assert problem.hyperparameters == [weights]


CLASS_WEIGHTS = np.array([0.5, 2.0, 1.0, 3.0])


def class_weights():
    return farhox.Hyperparameter(CLASS_WEIGHTS, low=0.0, dtype="float64", name="class_weights")


@pytest.mark.one_case
@pytest.mark.parametrize("loss, targets", [
    ("sparse_categorical_crossentropy", Y), ("sparse_categorical_crossentropy", Y[:, None]),
    ("categorical_crossentropy", np.eye(4)[Y])], ids=["[batch]", "[batch, 1]", "one-hot"])
def test_class_weights_multiply_the_losses_of_their_class_inside_only(loss, targets):
    model = classifier()
    problem = make(model, loss=loss, class_weights=class_weights())
    losses = cross_entropies(model)
    np.testing.assert_allclose(inner_loss(problem, (X, targets)), np.mean(CLASS_WEIGHTS[Y] * losses), rtol=1e-12)
    np.testing.assert_allclose(outer_loss(problem, (X, targets)), losses.mean(), rtol=1e-12)


def test_class_weights_are_those_of_keras_fit():
    model = classifier()
    problem = make(model, class_weights=class_weights())
    model.compile("sgd", "sparse_categorical_crossentropy")
    expected = model.train_on_batch(X, Y, class_weight=dict(enumerate(CLASS_WEIGHTS)))
    model = classifier()  # The same seed: the weights before that step.
    problem = make(model, class_weights=class_weights())
    np.testing.assert_allclose(inner_loss(problem), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [[6], [6, 1]])
def test_binary_problems_have_two_class_weights(shape):
    model = make_model(dense(1, activation="sigmoid"))
    weights = farhox.Hyperparameter([0.5, 2.0], dtype="float64")
    labels = np.array([0, 1, 1, 0, 1, 0])
    p = model(X).numpy()[:, 0]
    losses = -np.where(labels == 1, np.log(p), np.log(1 - p))
    problem = make(model, loss="binary_crossentropy", class_weights=weights)
    np.testing.assert_allclose(
        inner_loss(problem, (X, labels.reshape(shape).astype(float))),
        np.mean(np.array([0.5, 2.0])[labels] * losses), rtol=1e-6)


@pytest.mark.slow
def test_class_weights_multiply_with_example_weights():
    model = classifier()
    examples = farhox.ExampleWeights(6, dtype="float64")
    examples.variable.assign(GENERATOR.normal(size=[6]))
    problem = make(model, example_weights=examples, class_weights=class_weights())
    expected = np.mean(examples.numpy() * CLASS_WEIGHTS[Y] * cross_entropies(model))
    np.testing.assert_allclose(inner_loss(problem, (X, Y, np.arange(6))), expected, rtol=1e-12)


@pytest.mark.slow
def test_hypergradient_of_class_weights_equals_finite_differences():
    weights = class_weights()
    problem = make(classifier(), class_weights=weights, outer_variables=[])
    data = farhox.repeat((X, Y), 4), (GENERATOR.normal(size=[5, 3]), np.array([3, 2, 1, 0, 0]))
    expected = finite_differences(problem, *data)
    assert np.all(np.abs(expected[0]) > 1e-6)
    assert_close(farhox.ReverseHG().compute(problem, *data).gradients, expected, 1e-8)


@pytest.mark.parametrize("given, error, rule", [
    (CLASS_WEIGHTS, TypeError, "must be a farhox.Hyperparameter"),
    (farhox.Hyperparameter(1.0), ValueError, r"must have shape \[classes\]. Received shape: \(\)"),
])
def test_class_weights_must_be_a_vector_of_hyperparameters(given, error, rule):
    with pytest.raises(error, match=rule):
        make(classifier(), class_weights=given)


def test_class_weights_must_have_one_entry_per_class():
    problem = make(classifier(), class_weights=farhox.Hyperparameter(np.ones(3)))
    with pytest.raises(ValueError, match=r"one entry for each of the 4 classes. Received shape: \(3,\)"):
        inner_loss(problem)


# ---- bad input

@pytest.mark.covering
@pytest.mark.parametrize("labels, came", [([0, 1, 2, 4, 0, 0], "from 0 to 4"), ([-1, 1, 2, 3, 0, 0], "from -1 to 3")])
@pytest.mark.parametrize("loss", [
    "sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy(dtype="float64")])
def test_labels_out_of_range_are_refused(loss, labels, came):
    problem = make(classifier(), loss=loss)
    for objective in (inner_loss, outer_loss):
        with pytest.raises(ValueError, match=rf"from 0 to the number of classes - 1 \(3\). Received labels {came}"):
            objective(problem, (X, np.array(labels)))


@pytest.mark.one_case
@pytest.mark.parametrize("captured", [False, True])
def test_labels_out_of_range_inside_a_graph_stop_it_with_the_same_rule(captured):
    problem = make(classifier())
    bad = np.array([0, 1, 2, 4, 0, 0])
    compiled = tf.function(
        lambda x, y: outer_loss_tensor(problem, x, tf.constant(bad) if captured else y), autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Labels must be integers from 0 to the number of classes"):
        compiled(tf.constant(X), tf.constant(bad))


def outer_loss_tensor(problem, x, y):
    return problem.outer_loss(problem.initial_state(), problem.outer_values(), (x, y))


@pytest.mark.one_case
@pytest.mark.parametrize("compiled", [True, False])
def test_one_bad_label_stops_a_hypergradient_eagerly_and_in_a_graph(compiled):
    problem = make(classifier())
    labels = np.stack([Y, Y, np.array([0, 1, 2, 4, 0, 0])])
    arguments = (tf.constant(np.stack([X] * 3)), tf.constant(labels)), (tf.constant(X), tf.constant(Y))

    def compute(inner_batches, outer_batch):
        return farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients

    if compiled:
        with pytest.raises(tf.errors.InvalidArgumentError, match="Labels must be integers from 0"):
            tf.function(compute, autograph=False)(*arguments)
        return
    with pytest.raises(ValueError, match="Received labels from 0 to 4"):
        compute(*arguments)


@pytest.mark.slow
def test_checking_labels_does_not_stand_in_the_way_of_xla():
    problem = make(classifier())

    def compute(inner_batches, outer_batch):
        return farhox.ReverseHG().compute(problem, inner_batches, outer_batch).gradients[0]

    arguments = farhox.repeat((X, Y), 3), (tf.constant(X), tf.constant(Y))
    compiled = tf.function(compute, autograph=False, jit_compile=True)
    np.testing.assert_allclose(compiled(*arguments), compute(*arguments), rtol=1e-12)


def test_eager_labels_may_be_captured_by_a_graph():
    model = classifier()
    problem, labels = make(model), tf.constant(Y)
    compiled = tf.function(lambda x: outer_loss_tensor(problem, x, labels), autograph=False)
    np.testing.assert_allclose(compiled(tf.constant(X)), cross_entropies(model).mean(), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_labels_of_every_type_are_checked_and_accepted(dtype):
    model = make_model(dense(300, activation="softmax"))
    problem, labels = make(model), np.array([0, 255, 254, 44, 45, 1])
    np.testing.assert_allclose(
        inner_loss(problem, (X, labels.astype(dtype))), cross_entropies(model, y=labels).mean(), rtol=1e-12)


def test_the_ignored_class_of_a_loss_is_no_label_out_of_range():
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1, dtype="float64")
    model = classifier()
    problem = make(model, loss=loss)
    labels = np.array([0, -1, 2, -1, 1, 0])
    np.testing.assert_allclose(inner_loss(problem, (X, labels)), loss(labels, model(X)), rtol=1e-12)
    with pytest.raises(ValueError, match="Received labels from -2 to 2"):
        inner_loss(problem, (X, np.array([0, -1, 2, -2, 1, 0])))


@pytest.mark.parametrize("batch, came", [
    ((X,), "tuple of length 1"), ((X, Y, Y, Y), "tuple of length 4"), (tf.constant(X), "EagerTensor")])
def test_batches_must_be_tuples_of_two_or_three(batch, came):
    with pytest.raises(ValueError, match=rf"A batch must be a tuple \(x, y\) or .* Received: {came}"):
        inner_loss(make(classifier()), batch)


def test_example_weights_need_the_index_in_the_batch():
    problem = make(classifier(), example_weights=farhox.ExampleWeights(6))
    with pytest.raises(ValueError, match=r"A batch must be a tuple \(x, y, index\).*index=True\) adds the index"):
        inner_loss(problem)


def trainable_nowhere():
    model = classifier()
    model.trainable = False
    return model


@pytest.mark.parametrize("model, arguments, error, rule", [
    (lambda: "model", {}, TypeError, "model must be a keras.Model"),
    (lambda: keras.Sequential([dense(4)], name="lazy"), {}, ValueError, "must be built.*unbuilt model 'lazy'"),
    (trainable_nowhere, {}, ValueError, "no trainable variable left"),
    (classifier, {"representation": ["hidden"]}, ValueError, "must hold layers of the model"),
    (classifier, {"representation": [dense(4)]}, ValueError, "must hold layers of the model"),
    (classifier, {"example_weights": np.ones(6)}, TypeError, "must be a farhox.ExampleWeights"),
    (classifier, {"loss": 1.0}, TypeError, "loss must be the name of a Keras loss"),
    (classifier, {"loss": None}, TypeError, "loss must be the name of a Keras loss"),
    (classifier, {"outer_variables": []}, ValueError, "outer_variables must not be empty"),
    (classifier, {"outer_variables": [tf.Variable(1.0)]}, TypeError, "must hold keras.Variables"),
])
def test_arguments_of_the_wrong_kind_are_refused(model, arguments, error, rule):
    with pytest.raises(error, match=rule):
        make(model(), **arguments)


def test_a_representation_that_holds_everything_leaves_nothing_to_train():
    model = classifier()
    with pytest.raises(ValueError, match="representation holds 4 of its 4 trainable variables"):
        make(model, representation=model.layers)

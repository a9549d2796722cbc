"""Losses of several outputs, a model's own loss, and what of a model can be trained: as in `compile` and `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=[8, 3])
A, B = GENERATOR.normal(size=[8, 2]), GENERATOR.integers(0, 4, size=[8])
WEIGHTS = GENERATOR.uniform(size=[8]), GENERATOR.uniform(size=[8])
SPARSE = "sparse_categorical_crossentropy"


def two_outputs(form):
    """A functional model of the outputs "a", a regression, and "b", a classification, in a list, dictionary or nest."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([3])
    a = keras.layers.Dense(2, name="a", kernel_regularizer="l2")(inputs)
    b = keras.layers.Dense(4, "softmax", name="b")(inputs)
    return keras.Model(inputs, form(a, b))


def as_list(a, b):
    return [a, b]


def as_dict(a, b):
    return {"b": b, "a": a}


def problem_of(model, loss, **arguments):
    rate = farhox.Hyperparameter(0.1, low=0.0, name="rate")
    return farhox.supervised_problem(model, loss, farhox.GradientDescent(rate), [rate], **arguments)


def losses_of(problem, batch):
    """The inner and the outer objective on a batch."""
    state, outer = problem.initial_state(), problem.outer_values()
    inner = problem.inner_loss(state.variables, state.state_variables, outer, batch)[0]
    return inner.numpy(), problem.outer_loss(state, outer, batch).numpy()


CASES = {
    "one loss for all": (as_list, "mse", None, [A, A @ np.ones([2, 4])], None),
    "a list": (as_list, ["mse", SPARSE], None, [A, B], None),
    "a list with weights": (as_list, ["mse", SPARSE], [0.5, 2.0], [A, B], None),
    "names for a list": (as_list, {"b": SPARSE, "a": "mse"}, {"b": 3.0, "a": 1.0}, [A, B], None),
    "names for targets": (as_list, {"b": SPARSE, "a": "mse"}, None, {"b": B, "a": A}, None),
    "None for an output": (as_list, [None, SPARSE], None, [A, B], None),
    "targets left out": (as_list, [None, SPARSE], None, [B], None),
    "one sample weight": (as_list, ["mse", SPARSE], [0.5, 2.0], [A, B], WEIGHTS[0]),
    "a list of sample weights": (as_list, ["mse", SPARSE], [0.5, 2.0], [A, B], list(WEIGHTS)),
    "a dictionary": (as_dict, {"a": "mse", "b": SPARSE}, {"a": 0.5, "b": 2.0}, {"a": A, "b": B}, None),
    "a part of a dictionary": (as_dict, {"b": SPARSE}, None, {"a": A, "b": B}, None),
    "a dictionary of sample weights": (
        as_dict, {"a": "mse", "b": SPARSE}, None, {"a": A, "b": B}, {"b": WEIGHTS[0], "a": WEIGHTS[1]}),
    "objects": (as_list, [keras.losses.Huber(), keras.losses.SparseCategoricalCrossentropy(ignore_class=0)], None,
                [A, B], None),
    "a callable": (as_list, [lambda y, p: keras.ops.max(keras.ops.abs(y - p), axis=-1), SPARSE], [1.0, 0.1], [A, B],
                   None),
    "nested": (lambda a, b: {"p": [a, b], "q": a}, {"p": ["mse", SPARSE], "q": "mae"}, None,
               {"p": [A, B], "q": A}, None),
    "a tuple": (lambda a, b: (a, b), ("mse", SPARSE), (0.5, 2.0), (A, B), None),
}


@pytest.mark.one_case
@pytest.mark.parametrize("case", CASES)
def test_losses_of_several_outputs_add_up_as_compile_and_evaluate_add_them(case, float64):
    form, loss, loss_weights, y, weights = CASES[case]
    model = two_outputs(form)
    batch = (X, y) if weights is None else (X, y, weights)
    inner, outer = losses_of(problem_of(model, loss, loss_weights=loss_weights), batch)
    model.compile("sgd", loss, loss_weights=loss_weights)
    expected = model.compute_loss(X, y, model(X), sample_weight=weights).numpy()
    # Losses that were made before floatx was float64 compute in float32.
    tolerance = 1e-7 if case == "objects" else 1e-12
    np.testing.assert_allclose(inner, expected, rtol=tolerance)
    (penalty,) = model.losses
    np.testing.assert_allclose(outer, expected - penalty, rtol=tolerance)
    if case in ("a list with weights", "a dictionary"):
        np.testing.assert_allclose(inner, model.evaluate(X, y, verbose=0, return_dict=True)["loss"], rtol=1e-12)


def test_a_model_that_returns_a_list_of_one_output_is_one_of_one_output(float64):
    inputs = keras.Input([3])
    for outputs in ([keras.layers.Dense(2)(inputs)], {"out": keras.layers.Dense(2)(inputs)}):
        model = keras.Model(inputs, outputs)
        expected = np.mean((keras.tree.flatten(model(X))[0].numpy() - A) ** 2)
        for y in (A, [A]):
            np.testing.assert_allclose(losses_of(problem_of(model, "mse"), (X, y))[1], expected, rtol=1e-12)


@pytest.mark.slow
def test_training_on_several_outputs_takes_the_steps_of_fit():
    form, loss, loss_weights, y, weights = CASES["a list of sample weights"]
    data = [part.astype("float32") if part.dtype == "float64" else part for part in (X, *y, *weights)]
    x, y, weights = data[0], data[1:3], data[3:]
    fitted, trained = two_outputs(form), two_outputs(form)
    fitted.compile(keras.optimizers.SGD(0.1), loss, loss_weights=loss_weights)
    # Keras' fit takes sample weights of a list as a list.
    fitted.fit(x, y, sample_weight=weights, batch_size=8, epochs=5, shuffle=False, verbose=0)
    problem = problem_of(trained, loss, loss_weights=loss_weights)
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.train_inner(farhox.repeat((x, y, weights), 5))
    for ours, expected in zip(trained.get_weights(), fitted.get_weights()):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_fit_reports_metrics_of_several_outputs():
    problem = problem_of(two_outputs(as_list), ["mse", SPARSE])
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile("sgd", metrics=[["mae"], ["accuracy"]], run_eagerly=True)
    logs = optimizer.fit((farhox.repeat((X, [A, B]), 2), (X, [A, B])), verbose=0).history
    values = [value for name, value in logs.items() if "accuracy" in name]
    assert len(values) == 1 and 0.0 <= values[0][0] <= 1.0 and any("mae" in name for name in logs)


@pytest.mark.parametrize("loss, arguments, y, rule", [
    (["mse", SPARSE], {}, A, r"targets must be given as the model's outputs are, .* \['a', 'b'\]. Received: "),
    (["mse", SPARSE], {}, [A], r"targets must be given.*Received: \['\*'\]"),
    (["mse", SPARSE], {}, {"a": A}, r"targets must be given.*Received: nothing for \['b'\]"),
    (["mse", SPARSE, "mse"], {}, [A, B], r"loss must be given as"),
    ({"a": "mse"}, {}, [A, B], r"loss must be given as the model's outputs are"),
    ({"a": "mse", "c": "mse"}, {}, [A, B], r"loss must be given as the model's outputs are"),
    (["mse", SPARSE], {"loss_weights": [1.0]}, [A, B], "loss_weights must be given as"),
    (["mse", SPARSE], {"class_weights": farhox.Hyperparameter(np.ones(4))}, [A, B], "one output, as in Keras"),
    (["mse", SPARSE], {"loss_weights": [1.0, float("nan")]}, [A, B], "loss_weights must be a finite number"),
    ({"a": "mse", "b": SPARSE}, {"loss_weights": [1.0, 2.0]}, [A, B], "loss_weights must be a dictionary"),
])
def test_what_does_not_fit_the_outputs_is_refused(loss, arguments, y, rule, float64):
    with pytest.raises(ValueError, match=rule):
        losses_of(problem_of(two_outputs(as_list), loss, **arguments), (X, y))


def test_at_least_one_output_needs_a_loss():
    with pytest.raises(TypeError, match="loss must be the name of a Keras loss"):
        problem_of(two_outputs(as_list), [None, None])


# ---- a model's own loss

class OwnLoss(keras.Sequential):
    """Ten times the squared error, the regularisation and a count of its calls."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.calls = keras.metrics.Sum(name="calls")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.calls.update_state(1.0)
        loss = keras.ops.mean((y_pred - y) ** 2, axis=-1)
        return 10.0 * keras.ops.mean(loss if sample_weight is None else loss * sample_weight) + sum(self.losses)


class WithoutTraining(keras.Sequential):
    """`compute_loss` without the argument `training`, on top of Keras' own."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 0.5 * super().compute_loss(x, y, y_pred, sample_weight)


def own(kind):
    keras.utils.set_random_seed(0)
    return kind([keras.Input([3]), keras.layers.Dense(4, "tanh", kernel_regularizer="l2"),
                 keras.layers.BatchNormalization(), keras.layers.Dense(2)])


def distiller():
    keras.utils.set_random_seed(0)
    student, teacher = (keras.Sequential([keras.Input([3]), keras.layers.Dense(4, activation)])
                        for activation in (None, "tanh"))
    model = keras.distillation.Distiller(
        teacher, student, distillation_losses=keras.distillation.LogitsDistillation(temperature=2.0),
        student_loss_weight=0.3)
    model.build([None, 3])
    return model


@pytest.mark.one_case
@pytest.mark.parametrize("make, y", [
    (lambda: own(OwnLoss), A), (lambda: own(WithoutTraining), A), (distiller, B)], ids=["own", "on top", "distiller"])
@pytest.mark.parametrize("weighted", [False, True])
def test_training_on_a_models_own_loss_takes_the_steps_of_fit(make, y, weighted):
    x, y = X.astype("float32"), y.astype("float32" if y.ndim == 2 else "int64")
    weights = (WEIGHTS[0].astype("float32"),) if weighted else ()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if y.ndim == 1 else "mse"
    fitted, trained = make(), make()
    for model in (fitted, trained):
        model.compile(keras.optimizers.SGD(0.05), loss)
    fitted.fit(x, y, sample_weight=weights[0] if weighted else None, batch_size=8, epochs=5,
               shuffle=False, verbose=0)
    problem = farhox.supervised_problem(
        trained, loss, farhox.GradientDescent(0.05), [farhox.Hyperparameter(0.1)])
    farhox.HyperOptimizer(problem).train_inner(farhox.repeat((x, y, *weights), 5))
    for ours, expected in zip(trained.get_weights(), fitted.get_weights()):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_hypergradient_goes_through_a_models_own_loss(float64):
    rate = farhox.Hyperparameter(0.05, low=0.0, log=True, name="rate")
    model = own(OwnLoss)
    problem = farhox.supervised_problem(model, None, farhox.GradientDescent(rate), [rate])
    data = farhox.repeat((X, A), 3), (X[:4], A[:4])
    gradient = farhox.ReverseHG().compute(problem, *data).gradients[0].numpy()
    values = []
    for factor in (np.exp(1e-5), np.exp(-1e-5)):
        rate.assign(0.05 * factor)
        values.append(problem.evaluate(*data).outer_loss.numpy())
    np.testing.assert_allclose(gradient, (values[0] - values[1]) / 2e-5, rtol=1e-6)
    assert model.calls.result() == 0.0


def test_the_outer_objective_of_a_model_with_its_own_loss_is_the_loss_given_or_its_own(float64):
    model = own(OwnLoss)
    error = np.mean((model(X).numpy() - A) ** 2)
    (penalty,) = model.losses
    np.testing.assert_allclose(losses_of(problem_of(model, "mse"), (X, A))[1], error, rtol=1e-12)
    np.testing.assert_allclose(losses_of(problem_of(model, None), (X, A))[1], 10 * error + penalty, rtol=1e-12)


@pytest.mark.parametrize("make, arguments, error, rule", [
    (lambda: own(keras.Sequential), {"loss": None}, TypeError, "only a model with its own compute_loss"),
    (lambda: own(OwnLoss), {"share_representation": True}, ValueError, "without a compute_loss of its own"),
])
def test_arguments_that_do_not_go_with_the_models_loss_are_refused(make, arguments, error, rule):
    with pytest.raises(error, match=rule):
        farhox.supervised_problem(make(), outer_variables=[farhox.Hyperparameter(0.1)], **arguments)


class Greedy(OwnLoss):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.layers[0].bias.assign(keras.ops.zeros([4]))
        return keras.ops.mean(y_pred)


class Silent(OwnLoss):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return None


@pytest.mark.parametrize("kind, rule", [
    (Greedy, "compute_loss may assign the model's statistics.*assigned '.*bias'"), (Silent, "must return the loss")])
def test_a_loss_that_assigns_weights_or_returns_nothing_is_refused(kind, rule):
    with pytest.raises(ValueError, match=rule):
        losses_of(problem_of(own(kind), "mse"), (X, A))


class OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def test_a_train_step_of_the_model_is_refused_by_name():
    with pytest.raises(ValueError, match="class OwnStep, which has its own train_step. .*BilevelProblem"):
        problem_of(own(OwnStep), "mse")


# ---- what of a model is trained

class Gate(keras.layers.Layer):
    def build(self, shape):
        self.alpha = self.add_weight(shape=(2,), initializer="zeros", name="alpha")

    def call(self, x):
        share = keras.ops.softmax(self.alpha)
        return share[0] * keras.ops.tanh(x) + share[1] * x


def gated():
    keras.utils.set_random_seed(0)
    gate = Gate()
    return keras.Sequential([keras.Input([3]), keras.layers.Dense(4), gate, keras.layers.Dense(2)]), gate.alpha


def test_a_weight_of_the_model_that_is_an_outer_variable_is_not_trained_inside(float64):
    model, alpha = gated()
    problem = farhox.supervised_problem(model, "mse", farhox.GradientDescent(0.1), [alpha])
    assert not any(v is alpha for v in problem.inner_variables) and len(problem.inner_variables) == 4
    assert [v is alpha for v in problem.outer_variables] == [True]
    gradients = farhox.ReverseHG().compute(problem, farhox.repeat((X, A), 3), (X, A)).gradients
    assert np.all(np.abs(gradients[0]) > 1e-6)


def test_with_learned_initial_values_a_named_weight_is_trained_inside_and_counts_once():
    model, alpha = gated()
    problem = farhox.supervised_problem(model, "mse", farhox.GradientDescent(0.1), [alpha], learn_initialization=True)
    assert any(v is alpha for v in problem.inner_variables) and len(problem.inner_variables) == 5
    assert len(problem.outer_variables) == 5 and problem.outer_variables[0] is alpha


def test_naming_every_weight_leaves_nothing_to_train_and_says_so():
    model, _ = gated()
    with pytest.raises(ValueError, match="outer_variables 5 more.* only with learn_initialization=True"):
        farhox.supervised_problem(model, "mse", outer_variables=model.trainable_variables)


def lora(model):
    model.layers[0].enable_lora(2)


def frozen(model):
    model.layers[0].trainable = False


def rebuilt(model):
    layer = model.layers[0]
    layer.built = False
    layer._tracker.unlock()
    layer._trainable_variables.clear()
    layer.build([None, 3])


@pytest.mark.parametrize("change, words", [
    (lora, r"No longer trainable: '.*kernel'. Trainable now: '.*lora_kernel_a'"),
    (frozen, r"No longer trainable: '.*kernel', '.*bias'. Trainable now: none"),
    (rebuilt, r"No longer trainable: '.*kernel', '.*bias'. Trainable now: '.*kernel', '.*bias'")])
def test_a_model_that_changed_after_the_problem_was_made_is_an_error_that_names_what_changed(change, words):
    model, _ = gated()
    problem = problem_of(model, "mse")
    change(model)
    with pytest.raises(ValueError, match=f"must stay as it was when the problem was made of it: .*{words}"):
        losses_of(problem, (X, A))


def test_a_change_after_the_first_training_is_an_error_too_though_nothing_is_traced_again():
    model, _ = gated()
    problem = problem_of(model, "mse")
    optimizer = farhox.HyperOptimizer(problem)
    optimizer.compile("sgd")
    batches = farhox.repeat((X.astype("float32"), A.astype("float32")), 2)
    optimizer.train_inner(batches)
    frozen(model)
    for use in (lambda: optimizer.train_inner(batches), lambda: optimizer.step(batches, (X, A)),
                lambda: optimizer.fit((batches, (X, A)), verbose=0),
                lambda: optimizer.evaluate((batches, (X, A)), verbose=0)):
        with pytest.raises(ValueError, match="No longer trainable"):
            use()


@pytest.mark.slow
def test_a_model_with_lora_weights_takes_the_steps_of_fit():
    x, y = X.astype("float32"), A.astype("float32")
    models = gated()[0], gated()[0]
    for model in models:
        lora(model)
        model.layers[0].lora_kernel_a.assign(np.full([3, 2], 0.3))
        model.compile(keras.optimizers.SGD(0.1), "mse")
    models[0].fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    problem = farhox.supervised_problem(models[1], "mse", farhox.GradientDescent(0.1), [farhox.Hyperparameter(0.1)])
    farhox.HyperOptimizer(problem).train_inner(farhox.repeat((x, y), 3))
    for ours, expected in zip(models[1].get_weights(), models[0].get_weights()):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantized_layers_are_refused_by_name(mode):
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(4, name="first"), keras.layers.Dense(2)])
    try:
        model.layers[0].quantize(mode)
    except ValueError as error:
        pytest.skip(f"This version of Keras has no {mode}: {error}")
    with pytest.raises(ValueError, match=r"Quantized layers have no derivative.*layers \['first'\]"):
        problem_of(model, "mse")


def test_a_layer_that_assigns_a_trained_weight_is_refused_with_what_to_do_instead():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input([3]), keras.layers.SpectralNormalization(keras.layers.Dense(2, name="normed"))])
    with pytest.raises(ValueError, match="assigned '.*normed/kernel', which it trains.*SpectralNorm.*constraint"):
        losses_of(problem_of(model, "mse"), (X, A))


# ---- labels and sample weights

CLASSIFIER = keras.Sequential([keras.Input([3]), keras.layers.Dense(4, "softmax")])


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("label", [1.5, float("nan"), 2.0000002])
def test_labels_that_are_not_whole_are_refused_eagerly_and_in_graphs_and_give_no_number_under_xla(label, mode):
    problem = problem_of(CLASSIFIER, SPARSE)
    labels = B.astype("float32")
    labels[2] = label
    x = tf.constant(X, tf.float32)

    def loss(y):
        return problem.outer_loss(problem.initial_state(), problem.outer_values(), (x, y))

    if mode == "eager":
        with pytest.raises(ValueError, match=r"Labels must be integers .* \(3\). Received a label that is not whole: "):
            loss(tf.constant(labels))
    elif mode == "graph":
        with pytest.raises(tf.errors.InvalidArgumentError, match="Received a label that is not whole"):
            tf.function(loss, autograph=False)(tf.constant(labels))
    else:
        compiled = tf.function(loss, autograph=False, jit_compile=True)
        assert np.isnan(compiled(tf.constant(labels)))
        np.testing.assert_allclose(compiled(tf.constant(B.astype("float32"))), loss(tf.constant(B)), rtol=1e-6)


@pytest.mark.slow
def test_fit_says_that_a_label_is_not_whole():
    optimizer = farhox.HyperOptimizer(problem_of(CLASSIFIER, SPARSE))
    optimizer.compile("sgd")
    x = X.astype("float32")
    with pytest.raises(ValueError, match=r"Labels must be integers .*not whole"):
        optimizer.fit((farhox.repeat((x, B + 0.5), 2), (x, B)), verbose=0)


def test_an_index_without_example_weights_is_refused_and_not_taken_for_sample_weights():
    problem = problem_of(CLASSIFIER, SPARSE)
    for objective in (0, 1):
        with pytest.raises(ValueError, match=r"third entry of a batch, must be floating-point. Received: int64. An"):
            if objective:
                problem.outer_loss(problem.initial_state(), problem.outer_values(), (X, B, np.arange(8)))
            else:
                losses_of(problem, (X, B, np.arange(8)))


@pytest.mark.slow
def test_soft_binary_labels_have_the_mean_weight_of_their_classes(float64):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, "sigmoid")])
    weights = farhox.Hyperparameter([0.5, 2.0])
    soft = WEIGHTS[0][:, None]
    p = model(X).numpy()
    losses = -(soft * np.log(p) + (1 - soft) * np.log(1 - p))
    inner = losses_of(problem_of(model, "binary_crossentropy", class_weights=weights), (X, soft))[0]
    np.testing.assert_allclose(inner, np.mean((0.5 + 1.5 * soft) * losses), rtol=1e-6)

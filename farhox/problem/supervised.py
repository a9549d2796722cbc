"""The bilevel problem of a Keras model, a loss and batches (x, y)."""

import contextlib

import keras
import tensorflow as tf
from keras.src.losses.losses import LossFunctionWrapper

from farhox.outer.hyperparameters import ExampleWeights, LearnedSchedule
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.bilevel import BilevelProblem

LABEL_RULE = "Labels must be integers from 0 to the number of classes - 1"


def supervised_problem(model, loss="sparse_categorical_crossentropy", dynamics=None, outer_variables=(),
                       representation=None, example_weights=None, learn_initialization=False, proximal=None,
                       training_at_outer=False, class_weights=None, stop_tolerance=None, outer_call=None,
                       share_representation=False, inner_context=contextlib.nullcontext):
    """A `BilevelProblem` for a Keras model: training loss inside, validation loss outside.

    The inner objective is the loss of `model(x, training=True)` on an inner batch plus the regularisation and activity
    losses that the model's layers add; the outer objective is the loss alone, of `model(x, training=training_at_outer)`
    on the outer batch. Batch-norm statistics and random seeds of the layers are part of the inner state.

    ```python
    learning_rate = farhox.Hyperparameter(0.1, low=0.0, log=True, name="learning_rate")
    problem = farhox.supervised_problem(
        model, loss="sparse_categorical_crossentropy",
        dynamics=farhox.GradientDescent(learning_rate), outer_variables=[learning_rate])
    ```

    Args:
        model: A built `keras.Model`.
        loss: Name of a Keras loss, `keras.losses.Loss`, or callable `(targets, predictions) -> [batch]`.
        dynamics: An `InnerDynamics`. Default: gradient descent with rate 0.01.
        outer_variables: List of outer variables as for `BilevelProblem`.
        representation: List of layers of the model whose weights are outer variables; the rest of the model is inner.
        example_weights: An `ExampleWeights`. Inner batches are then (x, y, index), and the inner loss is
            mean(weights(index) * losses). It is added to the outer variables if not named there.
        learn_initialization: Bool. The inner variables' initial values are outer variables too.
        proximal: Float or `Hyperparameter`, see `BilevelProblem`.
        training_at_outer: Bool, the `training` argument of the model in the outer objective.
        class_weights: A `Hyperparameter` of shape [classes]: the inner loss of an example is multiplied by the weight
            of its class, as with `class_weight` in Keras' `fit`. Labels are class numbers or one-hot. It is added to
            the outer variables if not named there.
        stop_tolerance: Positive float, see `BilevelProblem`.
        outer_call: Callable `x -> predictions` for outer batches (x, y), x being any nest. Default:
            `model(x, training=training_at_outer)`.
        share_representation: Bool. Where all inner steps have the same batch (`farhox.repeat`), compute its
            representation once instead of in each step, with `ReverseHG` and `ImplicitHG`. The model must be a
            `keras.Sequential` that begins with the layers of `representation`, which may hold batch norm, but no
            dropout or other layers with random numbers, and no masks. Inner training then leaves their moving
            statistics as they are.
        inner_context: Callable, the third part of an inner batch or None -> context manager, in which the model is
            called on that batch. Default: none.

    Returns:
        A `BilevelProblem`. Batches are (x, y) or, as in Keras, (x, y, sample_weight).

    Raises:
        TypeError: If the model is not a Keras model, `example_weights` not an `ExampleWeights`, `class_weights` not a
            `Hyperparameter`, or the loss or `outer_call` not one.
        ValueError: If the model is not built, has nothing left to train, `representation` names a layer that is not
            the model's, `class_weights` does not have one axis, or the representation cannot be shared. When called: if
            a batch is not a tuple as above, a label is out of range, or there is not one class weight per class.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. Received: {model!r} of type {type(model).__name__}")
    if not model.built or not model.weights:
        raise ValueError(f"The model must be built before a problem is made of it, so that its variables exist: call "
                         f"model.build(input_shape) or give it an Input. Received the unbuilt model {model.name!r}")
    if example_weights is not None and not isinstance(example_weights, ExampleWeights):
        raise TypeError(f"example_weights must be a farhox.ExampleWeights. Received: {example_weights!r}")
    if class_weights is not None and (isinstance(class_weights, (ExampleWeights, LearnedSchedule)) or not isinstance(
            class_weights, OuterVariable)):
        raise TypeError(f"class_weights must be a farhox.Hyperparameter. Received: {class_weights!r}")
    if class_weights is not None and len(class_weights.variable.shape) != 1:
        raise ValueError("class_weights must have shape [classes]. "
                         f"Received shape: {tuple(class_weights.variable.shape)}")
    if outer_call is not None and not callable(outer_call):
        raise TypeError(f"outer_call must be a callable x -> predictions. Received: {outer_call!r}")
    trainable = list(model.trainable_variables)
    shared = _representation_variables(model, representation or [])
    inner = [v for v in trainable if id(v) not in {id(s) for s in shared}]
    if not inner:
        raise ValueError(f"The model {model.name!r} has no trainable variable left for the inner problem: "
                         f"representation holds {len(shared)} of its {len(trainable)} trainable variables.")
    outer = list(outer_variables) + shared + (inner if learn_initialization else [])
    for weights in (example_weights, class_weights):
        if weights is not None and not any(entry is weights for entry in outer):
            outer.append(weights)
    loss_function = _loss(loss, inner)
    sparse = takes_class_numbers(loss_function)
    ignored = loss_function.get_config().get("ignore_class") if sparse else None

    def loss_value(targets, predictions, weights, by_class=None):
        if sparse:
            targets = _checked_labels(targets, predictions, ignored)
        if by_class is not None:
            of_class = _weights_of_classes(tf.convert_to_tensor(by_class.value()), targets, predictions)
            weights = of_class if weights is None else of_class * tf.cast(weights, of_class.dtype)
        return loss_function(targets, predictions, sample_weight=weights)

    first, last = _split(model, representation or []) if share_representation else (None, model)

    def unpacked(batch):
        return _unpacked(batch, "(x, y, index)" if example_weights is not None else None)

    def features(batch):
        x, *others = batch
        with inner_context(unpacked(batch)[2]):
            return (first(x, training=True), *others), first.losses

    def inner_objective(batch):
        batch, additions = batch if share_representation else (batch, [])
        x, y, extra = unpacked(batch)
        weights = extra if example_weights is None else example_weights(extra)
        with inner_context(extra):
            predictions = last(x, training=True)
        value = loss_value(y, predictions, weights, class_weights)
        for addition in [*additions, *last.losses]:
            value += tf.cast(addition, value.dtype)
        return value

    def outer_predictions(batch):
        x, y, weights = _unpacked(batch)
        return y, model(x, training=training_at_outer) if outer_call is None else outer_call(x), weights

    def outer_objective(batch):
        return loss_value(*outer_predictions(batch))

    return BilevelProblem(
        inner_objective, outer_objective, inner_variables=inner, outer_variables=outer, dynamics=dynamics,
        state_variables=_state_variables(model), proximal=proximal, outer_predictions=outer_predictions,
        stop_tolerance=stop_tolerance, features=features if share_representation else None)


def _state_variables(model):
    """Statistics and seeds: variables that are not trainable by nature, rather than frozen weights."""
    frozen = {id(v) for layer in model._flatten_layers() for v in layer._trainable_variables}
    return [v for v in model.non_trainable_variables if id(v) not in frozen]


def takes_class_numbers(loss):
    """Whether the targets of a loss are class numbers: sparse categorical cross-entropy in any of its forms."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    sparse = keras.losses.sparse_categorical_crossentropy
    return isinstance(loss, keras.losses.SparseCategoricalCrossentropy) or sparse in (loss, getattr(loss, "fn", None))


def _representation_variables(model, layers):
    own = {id(layer) for layer in model._flatten_layers()}
    variables, seen = [], set()
    for layer in layers:
        if not isinstance(layer, keras.Layer) or id(layer) not in own:
            raise ValueError(f"representation must hold layers of the model {model.name!r}. Received: {layer!r}")
        for variable in layer.trainable_variables:
            if id(variable) not in seen:
                seen.add(id(variable))
                variables.append(variable)
    return variables


def can_share_representation(layers):
    """Whether layers give the same representation of a batch at each inner step: no random numbers, no masks."""
    own = [own for layer in layers for own in layer._flatten_layers()]
    statistics = {id(v) for layer in own if isinstance(layer, keras.layers.BatchNormalization)
                  for v in layer.non_trainable_variables}
    steady = all(id(v) in statistics for layer in layers for v in _state_variables(layer))
    return steady and not any(isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
                              for layer in own)


def _split(model, representation):
    """The model's first layers, which are those of the representation, and the others: two models."""
    layers, count = model.layers, len(representation)
    ahead = isinstance(model, keras.Sequential) and 0 < count < len(layers) and all(
        a is b for a, b in zip(layers, representation))
    if not ahead or not can_share_representation(representation):
        raise ValueError(
            "share_representation needs a keras.Sequential that begins with the layers of the representation, without "
            f"random numbers and masks. Received: {type(model).__name__} {model.name!r} with the layers "
            f"{[layer.name for layer in layers]} and the representation {[layer.name for layer in representation]}")
    first = keras.Sequential([keras.Input(model.input_shape[1:], dtype=model.inputs[0].dtype), *layers[:count]])
    rest = keras.Input(first.output_shape[1:], dtype=first.outputs[0].dtype)
    return first, keras.Sequential([rest, *layers[count:]])


def _loss(loss, inner):
    if not isinstance(loss, (str, keras.losses.Loss)) and not callable(loss):
        raise TypeError(f"loss must be the name of a Keras loss, a keras.losses.Loss or a callable. Received: {loss!r}")
    loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        return loss
    # Keras' losses compute in floatx; a float64 model keeps its precision.
    dtype = "float64" if any(v.dtype == "float64" for v in inner) else None
    return LossFunctionWrapper(loss, dtype=dtype)


def _unpacked(batch, needed=None):
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or (needed and len(batch) != 3):
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"A batch must be a tuple {needed or '(x, y) or (x, y, sample_weight)'}. "
                         f"Received: {type(batch).__name__}{length}"
                         f"{'; farhox.bilevel_dataset(..., index=True) adds the index' if needed else ''}")
    return (*batch, None) if len(batch) == 2 else tuple(batch)


def _checked_labels(labels, predictions, ignored):
    """The labels, after checking their range: a ValueError where they are known, an assertion inside a graph."""
    classes = predictions.shape[-1]
    if classes is None:
        return labels
    labels = tf.convert_to_tensor(labels)
    numbers = tf.cast(labels, tf.int64)
    inside = (numbers >= 0) & (numbers < classes)
    if ignored is not None:
        inside |= numbers == ignored
    inside = tf.reduce_all(inside)
    low, high = tf.reduce_min(numbers), tf.reduce_max(numbers)
    if tf.executing_eagerly():
        if not inside:
            raise ValueError(f"{LABEL_RULE} ({classes - 1}). Received labels from {low.numpy()} to {high.numpy()}")
        return labels
    check = tf.debugging.Assert(inside, [f"{LABEL_RULE} ({classes - 1}). Received labels from", low, "to", high])
    with tf.control_dependencies([check]):
        return tf.identity(labels)


def _weights_of_classes(weights, targets, predictions):
    """The weight of each example's class; of a one-hot or soft label, the weights' mean under it."""
    classes = 2 if predictions.shape[-1] == 1 else predictions.shape[-1]
    if classes is not None and weights.shape[0] != classes:
        raise ValueError(f"class_weights must have one entry for each of the {classes} classes. "
                         f"Received shape: {tuple(weights.shape)}")
    targets = tf.convert_to_tensor(targets)
    same_rank = targets.shape.rank == predictions.shape.rank
    if same_rank and predictions.shape[-1] != 1 and targets.shape[-1] == predictions.shape[-1]:
        return tf.linalg.matvec(tf.cast(targets, weights.dtype), weights)
    labels = tf.squeeze(targets, -1) if same_rank and targets.shape[-1] == 1 else targets
    return tf.gather(weights, tf.cast(labels, tf.int32))

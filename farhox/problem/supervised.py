"""The bilevel problem of a Keras model, a loss and batches (x, y)."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox._core import functional
from farhox.dynamics.base import GradientDescent, InnerDynamics
from farhox.outer.hyperparameters import ExampleWeights, LearnedSchedule
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.keras_models import (
    check_examples,
    check_model,
    example_specs,
    has_own_loss,
    own_loss,
    state_variables,
)
from farhox.problem.losses import SupervisedLoss, checked_labels, takes_class_numbers, weights_of_classes
from farhox.problem.outer_losses import as_outer_loss, takes_groups
from farhox.problem.read import found_outer_variables
from farhox.problem.representation import representation_variables, split

INDEX_RULE = "Indices of examples must be from 0 to the number of example weights - 1"


def supervised_problem(model: keras.Model, loss: Any = "sparse_categorical_crossentropy",
                       dynamics: InnerDynamics | None = None,
                       outer_variables: str | Sequence[keras.Variable | OuterVariable] = (),
                       representation: Sequence[keras.Layer] | None = None,
                       example_weights: ExampleWeights | None = None, learn_initialization: bool = False,
                       proximal: float | OuterVariable | None = None, training_at_outer: bool = False,
                       class_weights: OuterVariable | None = None,
                       stop_tolerance: float | Callable[[tf.Tensor], Any] | None = None,
                       outer_call: Callable[..., Any] | None = None, share_representation: bool = False,
                       loss_weights: Sequence[float] | Mapping[str, float] | None = None, outer_loss: Any = None,
                       inner_context: Callable[..., Any] | None = None, fixed: Sequence[OuterVariable] | None = None,
                       example_batches: bool | None = None, allow_unused: bool = False) -> BilevelProblem:
    """A `BilevelProblem` for a Keras model: training loss inside, validation loss outside.

    The inner objective is the loss of `model(x, training=True)` on an inner batch plus the regularisation and activity
    losses that the model's layers add; the outer objective is the loss alone, of `model(x, training=training_at_outer)`
    on the outer batch. Batch-norm statistics and random seeds of the layers are part of the inner state.

    A model with a `compute_loss` of its own, `keras.distillation.Distiller` among them, is trained on that, as `fit`
    does; `loss` is then the outer objective alone.

    ```python
    learning_rate = farhox.Hyperparameter(0.1, low=0.0, log=True, name="learning_rate")
    problem = farhox.supervised_problem(
        model, loss="sparse_categorical_crossentropy",
        dynamics=farhox.GradientDescent(learning_rate), outer_variables=[learning_rate])
    ```

    Args:
        model: A built `keras.Model`.
        loss: Name of a Keras loss, `keras.losses.Loss`, or callable `(targets, predictions) -> [batch]`; of a model
            with several outputs one for all, or a list, dictionary or nest with one for each (None: no loss), as in
            `compile`. The losses of the outputs are added up. None: of a model with its own `compute_loss`, the outer
            objective is that too.
        dynamics: An `InnerDynamics`. Default: gradient descent with rate 0.01.
        outer_variables: List of outer variables as for `BilevelProblem`. Weights of the model that are named here are
            not trained inside, unless `learn_initialization` says so. Or "all": every hyperparameter that the layers,
            regularizers, losses and dynamics read but those in `fixed`.
        representation: List of layers and single variables of the model, which are outer; the rest of it is inner.
        example_weights: An `ExampleWeights`. Inner batches are then (x, y, index), and the inner loss is
            mean(weights(index) * losses). It is added to the outer variables if not named there.
        learn_initialization: Bool. The inner variables' initial values are outer variables too.
        proximal: Float or `Hyperparameter`, see `BilevelProblem`.
        training_at_outer: Bool, the `training` argument of the model in the outer objective.
        class_weights: A `Hyperparameter` of shape [classes]: the inner loss of an example is multiplied by the weight
            of its class, as with `class_weight` in Keras' `fit`. Labels are class numbers or one-hot. It is added to
            the outer variables if not named there.
        stop_tolerance: Positive float or callable, see `BilevelProblem`.
        outer_call: Callable `x -> predictions` for outer batches (x, y), x being any nest. Default:
            `model(x, training=training_at_outer)`.
        share_representation: Bool. Where all inner steps have the same batch (`farhox.repeat`), compute its
            representation once instead of in each step, with `ReverseHG` and `ImplicitHG`. The model must be a
            `keras.Sequential` that begins with the layers of `representation`, which may hold batch norm, but no
            dropout or other layers with random numbers, and no masks. Inner training then leaves their moving
            statistics as they are.
        loss_weights: Number for each of the losses, in the form of `loss`, as in `compile`. Default: 1.
        outer_loss: Loss of the outer objective, in the forms of `loss`, or one of `farhox.losses`: surrogates of AUC
            and F1, losses over groups. Default: `loss`.
        inner_context: Callable of an inner batch as (x, y, its third part or None) -> context manager, in which the
            model is called on that batch. Default: none.
        fixed: List of outer variables that are read and stay as they are, see `BilevelProblem`.
        example_batches: (inner batch, outer batch), arrays or `tf.TensorSpec`, for `outer_variables="all"`. Default:
            those of the model's inputs and outputs, for a functional model with one loss for all outputs.
        allow_unused: Bool, see `BilevelProblem`: for models with weights that their outputs do not depend on.

    Returns:
        A `BilevelProblem`. Batches are (x, y) or, as in Keras, (x, y, sample_weight) with floating-point weights, for
        several outputs in their form. Outer batches for a loss over groups are (x, y, group).

    Raises:
        TypeError: If the model is not a Keras model, `example_weights` not an `ExampleWeights`, `class_weights` not a
            `Hyperparameter`, or the loss or `outer_call` not one.
        ValueError: If the model is not built, has its own `train_step`, quantized layers or nothing left to train,
            `representation` names a part that is not the model's, `class_weights` does not have one axis, or the
            representation cannot be shared. When called: if a batch is not a tuple as above, a label is not a whole
            number or out of range, there is not one class weight per class, or other variables of the model are
            trainable than when the problem was made.
    """
    check_model(model)
    for name, given in (("outer_variables", outer_variables), ("representation", representation)):
        if not isinstance(given, (list, tuple, str)) and not (given is None and name == "representation"):
            raise TypeError(f"{name} must be a list. Received: {given!r} of type {type(given).__name__}")
    own = has_own_loss(model)
    _check_arguments(loss, example_weights, class_weights, outer_call, own, share_representation)
    trainable = list(model.trainable_variables)
    shared = representation_variables(model, representation or [])
    named = [] if learn_initialization or outer_variables == "all" else [
        entry for entry in outer_variables if isinstance(entry, keras.Variable)]
    inner = _without(trainable, shared + named)
    if not inner:
        raise ValueError(
            f"The model {model.name!r} has no trainable variable left for the inner problem: representation holds "
            f"{len(shared)} of its {len(trainable)} trainable variables, and outer_variables "
            f"{len(trainable) - len(shared)} more, which are trained inside only with learn_initialization=True."
            if named else f"The model {model.name!r} has no trainable variable left for the inner problem: "
            f"representation holds {len(shared)} of its {len(trainable)} trainable variables.")
    # Keras' losses compute in floatx; a float64 model keeps its precision.
    dtype = "float64" if any(v.dtype == "float64" for v in inner) else None
    names: Any = getattr(model, "output_names", None)  # Of a functional model.
    loss_value: Any = None if loss is None else SupervisedLoss(loss, loss_weights, names, dtype)
    outer_value: Any = loss_value if outer_loss is None else as_outer_loss(outer_loss, names, dtype)
    first: Any
    last: Any
    first, last = split(model, representation or []) if share_representation else (None, model)
    inner_context = (lambda *batch: contextlib.nullcontext()) if inner_context is None else inner_context

    def unpacked(batch):
        x, y, extra = _unpacked(batch, "(x, y, index)" if example_weights is not None else None)
        return x, y, _sample_weights(extra) if example_weights is None else extra

    def features(batch):
        x, *others = batch
        with inner_context(*unpacked(batch)):
            return (first(x, training=True), *others), first.losses

    def inner_objective(batch):
        batch, additions = batch if share_representation else (batch, [])
        x, y, extra = unpacked(batch)
        if not share_representation:
            check_examples(model, x)
        weights = extra if example_weights is None else example_weights(extra)
        by_class = None if class_weights is None else tf.convert_to_tensor(class_weights.value())
        with inner_context(x, y, extra):
            predictions = last(x, training=True)
        if own:
            if by_class is not None:
                of_class = weights_of_classes(by_class, y, predictions)
                weights = of_class if weights is None else of_class * tf.cast(weights, of_class.dtype)
            return own_loss(model, x, y, predictions, weights, training=True)
        value = loss_value(y, predictions, weights, by_class)
        for addition in [*additions, *last.losses]:
            value += tf.cast(addition, value.dtype)
        return value

    def outer_predictions(batch):
        x, y, extra = _unpacked(batch, "(x, y, group)" if takes_groups(outer_value) else None)
        if not takes_groups(outer_value):
            extra = _sample_weights(extra)
        return y, model(x, training=training_at_outer) if outer_call is None else outer_call(x), extra

    def outer_objective(batch):
        y, predictions, extra = functional.once(outer_predictions, batch)
        if outer_value is None:
            return own_loss(model, batch[0], y, predictions, extra, training=training_at_outer)
        return outer_value(y, predictions, extra)

    def for_metrics(batch):
        y, predictions, extra = functional.once(outer_predictions, batch)
        return y, predictions, None if takes_groups(outer_value) else extra

    if outer_variables == "all":
        dynamics = GradientDescent() if dynamics is None else dynamics
        batches = example_batches or example_specs(model, loss, example_weights is not None, takes_groups(outer_value))
        outer_variables = found_outer_variables(
            inner_objective, outer_objective, dynamics.bound_to(inner), inner, proximal,
            features if share_representation else None, batches, list(fixed or []), trainable)
    outer = list(outer_variables) + _without(shared, outer_variables)
    outer += _without(inner, outer_variables) if learn_initialization else []
    outer += _without([w for w in (example_weights, class_weights) if w is not None], outer)

    def check_data(inner_examples, outer_batch):
        outputs: Any = getattr(model, "outputs", None)  # Of a functional model.
        checks = []
        if loss is not None and not isinstance(loss, (list, tuple, dict)) and takes_class_numbers(loss) and len(
                outputs or []) == 1:
            ignored = keras.losses.get(loss).get_config().get("ignore_class") if isinstance(
                loss, keras.losses.Loss) else None
            checks += [checked_labels(batch[1], outputs[0], ignored) for batch in (inner_examples, outer_batch)
                       if isinstance(batch, (tuple, list)) and len(batch) > 1]
        if example_weights is not None and isinstance(inner_examples, (tuple, list)) and len(inner_examples) == 3:
            checks.append(_index_check(tf.convert_to_tensor(inner_examples[2]), example_weights))
        return checks

    return BilevelProblem(
        inner_objective, outer_objective, inner_variables=inner, outer_variables=outer, dynamics=dynamics,
        state_variables=state_variables(model), proximal=proximal, outer_predictions=for_metrics,
        stop_tolerance=stop_tolerance, features=features if share_representation else None,
        model=model, fixed=fixed, allow_unused=allow_unused, check_data=check_data)


def _check_arguments(loss, example_weights, class_weights, outer_call, own, share_representation):
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
    if loss is None and not own:
        raise TypeError("loss must be the name of a Keras loss, a keras.losses.Loss or a callable: only a model with "
                        "its own compute_loss can do without. Received: None")
    if own and share_representation:
        raise ValueError("share_representation needs a model without a compute_loss of its own, which may look at "
                         "anything.")


def _index_check(indices, example_weights):
    numbers = tf.cast(indices, tf.int64)
    low, high, count = tf.reduce_min(numbers), tf.reduce_max(numbers), example_weights.num_examples
    return tf.debugging.Assert((low >= 0) & (high < count), [
        f"{INDEX_RULE} ({count - 1} of {example_weights.name!r}). Received indices from", low, "to", high])


def _without(entries, others):
    return [entry for entry in entries if not any(entry is other for other in others)]


def _unpacked(batch: Any, needed=None):
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3) or (needed and len(batch) != 3):
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        if isinstance(batch, tf.Tensor):
            length = (f" of shape {tf.convert_to_tensor(batch).shape}. A hyper-iteration is (inner_batches, "
                      "outer_batch), as farhox.bilevel_dataset makes it, with inner_batches=farhox.repeat((x, y), "
                      "steps) for instance")
        advice = "; farhox.bilevel_dataset(..., index=True) adds the index" if needed == "(x, y, index)" else ""
        raise ValueError(f"A batch must be a tuple {needed or '(x, y) or (x, y, sample_weight)'}. "
                         f"Received: {type(batch).__name__}{length}{advice}")
    for leaf in (part for part in tf.nest.flatten(batch[0]) if tf.TensorShape(part.shape).rank is not None):
        if len(leaf.shape) == 0:
            raise ValueError("Each batch must have an axis of examples. Received a scalar for x: a hyper-iteration is "
                             "(inner_batches, outer_batch), with a leading axis T in inner_batches or "
                             "farhox.repeat(batch, steps) for the same batch in every step.")
    return (*batch, None) if len(batch) == 2 else tuple(batch)


def _sample_weights(weights):
    """The sample weights, which must not be integers: those are positions of examples more often than weights."""
    for leaf in tf.nest.flatten(weights):
        if leaf is not None and tf.as_dtype(leaf.dtype).is_integer:
            raise ValueError(
                "Sample weights, the third entry of a batch, must be floating-point. Received: "
                f"{tf.as_dtype(leaf.dtype).name}. An index of examples, as bilevel_dataset(index=True) adds it, needs "
                "supervised_problem(example_weights=farhox.ExampleWeights(...)).")
    return weights

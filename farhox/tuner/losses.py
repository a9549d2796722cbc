"""Training and validation losses of a compiled model, with label smoothing and weights that can be tuned."""

from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from farhox._core.types import Tensor
from farhox.outer.outer_variable import value_of
from farhox.problem.losses import FunctionLoss, checked_labels, takes_class_numbers, weights_of_classes
from farhox.tuner import tunables
from farhox.tuner.tunables import Place


class Losses:
    """The loss of a compiled Keras model as two functions: as it is trained on, and as it is validated on.

    In training the smoothing of labels and the weights of outputs and classes are those of hyperparameters. Validation
    knows neither smoothing nor weights of classes: with them in it the best smoothing would be the one that makes the
    task the easiest.

    Args:
        model: A compiled `keras.Model`.
        choice: A `Choice`.
        class_weight: Dictionary from classes to weights as in `fit`, or None.

    Attributes:
        found: List of `Tunable`.

    Raises:
        ValueError: If the model has no loss, or a loss is an object of the user's own for several outputs.
    """

    def __init__(self, model: keras.Model, choice: Any) -> None:
        if model.loss is None:
            raise ValueError(f"The model must be compiled with a loss. Received: {model.name!r} with loss=None")
        self._names, self._losses = _by_output(model)
        weights = model._compile_loss._user_loss_weights if model._compile_loss is not None else None
        self._weights = _weights_by_output(weights, self._names)
        self.found = []
        self._smoothing = self._of_smoothing(choice)
        self._loss_weights = self._of_outputs(choice)
        self._class_weights = self._of_classes(model, choice)

    def training(self, targets: Tensor, predictions: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss that the weights descend, a scalar."""
        total = 0.0
        for index, (loss, target, prediction, weight) in enumerate(self._parts(targets, predictions, sample_weight)):
            smoothing = self._smoothing.get(index)
            if smoothing is not None:
                loss, target = smoothing[1], _smoothed(target, prediction, smoothing[0])
            if self._class_weights is not None:
                of_class = weights_of_classes(
                    value_of(self._class_weights, dtype=prediction.dtype), target, prediction)
                weight = of_class if weight is None else of_class * tf.cast(weight, of_class.dtype)
            factor = self._weights[index]
            if self._loss_weights is not None:
                factor = self._loss_weights[index]
            value = loss(target, prediction, sample_weight=weight)  # Of half precision in single precision.
            total += value_of(factor, dtype=value.dtype) * value
        return total

    def validation(self, targets: Tensor, predictions: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss on validation data, a scalar: no smoothing that is tuned, no weights of classes, no penalties."""
        total = 0.0
        for index, (loss, target, prediction, weight) in enumerate(self._parts(targets, predictions, sample_weight)):
            smoothing = self._smoothing.get(index)
            loss = loss if smoothing is None else smoothing[1]
            total += self._weights[index] * loss(target, prediction, sample_weight=weight)
        return total

    def _parts(self, targets, predictions, sample_weight):
        """(loss, targets, predictions, weights of examples) of each output that has a loss; labels are checked."""
        if len(self._names) == 1 and not isinstance(predictions, (list, tuple, dict)):
            parts = [(self._losses[0], targets, predictions, sample_weight)]
        else:
            targets, predictions = (_flat(nest, self._names) for nest in (targets, predictions))
            weights = ([sample_weight] * len(self._names) if not isinstance(sample_weight, (list, tuple, dict))
                       else _flat(sample_weight, self._names))
            parts = [part for part in zip(self._losses, targets, predictions, weights) if part[0] is not None]
        parts = [(loss, target, tf.convert_to_tensor(prediction), weight) for loss, target, prediction, weight in parts]
        return [(loss, _checked(loss, target, prediction), prediction, weight)
                for loss, target, prediction, weight in parts]

    def _of_smoothing(self, choice):
        """(hyperparameter, loss without smoothing) of each output that has a smoothing, by index."""
        places = [(index, loss, float(loss.get_config()["label_smoothing"])) for index, loss in enumerate(self._losses)
                  if loss is not None and not isinstance(loss, FunctionLoss) and "label_smoothing" in loss.get_config()]
        if not places:
            return {}
        kind = tunables.LABEL_SMOOTHING
        row = choice.tunable(kind.name, kind, [Place(type(loss).__name__, value) for _, loss, value in places])
        self.found.append(row)
        if row.hyperparameter is None or not row.tuned:
            return {}
        return {index: (row.hyperparameter, type(loss).from_config({**loss.get_config(), "label_smoothing": 0.0}))
                for index, loss, _ in places}

    def _of_outputs(self, choice):
        if len(self._names) == 1:
            return None
        kind = tunables.LOSS_WEIGHTS
        rows = [choice.tunable(f"loss_weight.{name}", kind, [Place(name, weight)])
                for name, weight in zip(self._names, self._weights)]
        self.found += rows
        return [row.hyperparameter if row.hyperparameter is not None else 0.0 for row in rows]

    def _of_classes(self, model, choice):
        kind = tunables.CLASS_WEIGHTS
        if len(self._names) > 1 or kind.name not in {*(choice.tune or []), *choice.start}:
            return None
        classes = model.output_shape[-1]
        weights = [1.0] * (2 if classes == 1 else classes)
        row = choice.tunable(kind.name, kind, [Place(type(self._losses[0]).__name__, weights)])
        self.found.append(row)
        return row.hyperparameter


def as_loss(loss: Any) -> Any:
    """The name of a Keras loss, a loss or a function (targets, predictions) as a Keras loss."""
    loss = keras.losses.get(loss)
    return loss if isinstance(loss, keras.losses.Loss) or loss is None else FunctionLoss(loss)


def _by_output(model):
    """Names of the outputs, and the loss of each or None."""
    outputs = model._outputs_struct if isinstance(model, Functional) else None
    names = list(model.output_names) if isinstance(outputs, (list, tuple, dict)) else ["output"]
    loss = model.loss
    if isinstance(loss, dict):
        return names, [as_loss(loss.get(name)) for name in names]
    if isinstance(loss, (list, tuple)):
        return names, [as_loss(entry) for entry in loss]
    return names, [as_loss(loss) for _ in names]


def _weights_by_output(weights, names):
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, dict):
        return [float(weights.get(name, 1.0)) for name in names]
    return [float(weight) for weight in (weights if isinstance(weights, (list, tuple)) else [weights])]


def _flat(nest, names):
    return [nest.get(name) for name in names] if isinstance(nest, dict) else list(nest)


def _checked(loss, targets, predictions):
    """The targets, class numbers after a check that they are in range."""
    if not takes_class_numbers(loss):
        return targets
    ignored = None if isinstance(loss, FunctionLoss) else loss.get_config().get("ignore_class")
    return checked_labels(targets, predictions, ignored)


def _smoothed(targets, predictions, smoothing):
    """(1 - smoothing) targets + smoothing / classes; of one output, smoothing / 2."""
    targets = tf.cast(targets, predictions.dtype)
    classes = predictions.shape[-1]
    smoothing = value_of(smoothing, dtype=predictions.dtype)
    return (1.0 - smoothing) * targets + smoothing / (2 if classes == 1 else classes)

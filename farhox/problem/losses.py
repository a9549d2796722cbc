"""The loss of a supervised problem: one for every output of the model, added up as Keras adds them."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.losses import LossFunctionWrapper

from farhox._core import checks
from farhox._core.types import DType, Tensor

LABEL_RULE = "Labels must be integers from 0 to the number of classes - 1"


class SupervisedLoss:
    """`targets, predictions -> scalar`: the sum over the outputs of weight * mean loss, as in `keras.Model.compile`.

    Targets of a model with one output may be a dictionary of several entries for a loss of your own, which is given all
    of it, numbers as floats, as in Keras.

    Losses, loss weights, targets and sample weights are given as the model's outputs are: one entry, a list, a
    dictionary (by key, or by the name of an output), or nested. One loss alone is that of every output; one sample
    weight alone counts for every output; an output whose loss is None has none, and may have no targets.

    Args:
        loss: Name of a Keras loss, `keras.losses.Loss`, callable `(targets, predictions) -> [batch]`, or a nest of
            these.
        loss_weights: Number, or a nest with one for each loss. Default: 1 for all.
        output_names: List of the names of the model's outputs, or None.
        dtype: Type in which losses without one of their own are computed; default: that of Keras.

    Raises:
        TypeError: If a loss is not one.
        ValueError: If a weight is not a finite number.
    """

    def __init__(self, loss: Any, loss_weights: Sequence[float] | Mapping[str, float] | None = None,
                 output_names: Sequence[Any] | None = None, dtype: DType | None = None) -> None:
        self._losses = keras.tree.map_structure(
            lambda entry: _loss(entry, dtype), loss) if _is_nested(loss) else _loss(loss, dtype)
        if not any(entry is not None for entry in keras.tree.flatten(self._losses)):
            raise TypeError("loss must be the name of a Keras loss, a keras.losses.Loss or a callable. "
                            f"Received: {loss!r}")
        for weight in keras.tree.flatten(loss_weights):
            if weight is not None:
                checks.finite_number("Each of loss_weights", weight)
        if _is_nested(loss_weights) and isinstance(loss_weights, (list, tuple)) and isinstance(loss, dict):
            raise ValueError("loss_weights must be a dictionary where loss is one, since its entries have no order. "
                             f"Received: {loss_weights!r}")
        self._loss_weights = loss_weights
        self._names = output_names

    def __call__(self, targets: Any, predictions: Any, weights: Any = None, class_weights: Any = None) -> Tensor:
        """The total loss.

        Args:
            targets: Nest of tensors.
            predictions: Nest of tensors, the model's outputs.
            weights: Sample weights, a tensor for all outputs or one for each; None entries count as 1.
            class_weights: Tensor [classes], or None; for a model with one output.

        Raises:
            ValueError: If there is not one entry for each output, or a label is not an integer in range.
        """
        outputs = keras.tree.flatten(predictions)
        losses = self._spread("loss", self._losses, predictions, repeat=True)
        needed = [i for i, loss in enumerate(losses) if loss is not None]
        of_output: Any = [1.0] * len(outputs) if self._loss_weights is None else self._spread(
            "loss_weights", self._loss_weights, predictions, needed=needed)
        if len(outputs) == 1 and isinstance(targets, dict) and len(targets) > 1 and _is_own(losses[0]):
            targets = [targets]
        else:
            targets = self._spread("targets", self._all_targets(targets, losses, needed), predictions, needed=needed)
        weights = self._spread("sample_weight", weights, predictions, repeat=True)
        if class_weights is not None and len(outputs) > 1:
            raise ValueError("class_weights need a model with one output, as in Keras. "
                             f"Received predictions for {len(outputs)} outputs.")
        values = [
            tf.convert_to_tensor(_value(loss, y, output, sample_weight, class_weights)) * float(factor)
            for loss, y, output, sample_weight, factor in zip(losses, targets, outputs, weights, of_output)
            if loss is not None]
        widest = max((value.dtype for value in values), key=lambda dtype: dtype.size)
        return values[0] if len(values) == 1 else tf.add_n([tf.cast(value, widest) for value in values])

    def _all_targets(self, targets, losses, needed):
        """Of a list that leaves out the targets of outputs without a loss, one with None in their places."""
        if not isinstance(targets, (list, tuple)) or len(targets) != len(needed) or len(targets) == len(losses):
            return targets
        entries = [None] * len(losses)
        for i, entry in zip(needed, targets):
            entries[i] = entry
        return entries

    def _spread(self, what, given, predictions, repeat=False, needed=()):
        """One entry of `given` for each output, in the order in which outputs are flattened."""
        count = len(keras.tree.flatten(predictions))
        if not _is_nested(given) and (repeat or count == 1):
            return [given] * count
        entries = [None] * count
        positions = keras.tree.pack_sequence_as(predictions, list(range(count)))
        fits = self._fill(entries, given, positions, complete=what == "loss")
        missing = [self._name(i) for i in needed if entries[i] is None]
        if not fits or missing:
            received = f"nothing for {missing}" if fits else (
                keras.tree.map_structure(lambda _: "*", given) if _is_nested(given) else type(given).__name__)
            outputs = sorted(predictions) if isinstance(predictions, dict) else [self._name(i) for i in range(count)]
            raise ValueError(f"{what} must be given as the model's outputs are, one for each of the outputs {outputs}. "
                             f"Received: {received}")
        return entries

    def _fill(self, entries, given, positions, complete):
        """Writes the parts of `given` at the positions of their outputs; False where they do not fit."""
        if not _is_nested(positions):
            if _is_nested(given):
                parts = list(given.values()) if isinstance(given, dict) else list(given)
                known = not isinstance(given, dict) or self._names is None or list(given) == list(self._names)
                if len(parts) != 1 or _is_nested(parts[0]) or not known:
                    return False
                given = parts[0]
            entries[positions] = given
            return True
        if isinstance(given, dict) and isinstance(positions, dict):
            pairs = [(part, positions.get(key)) for key, part in given.items()]
            fits = set(given) <= set(positions)
        elif isinstance(given, dict):
            places = dict(zip(self._names or (), keras.tree.flatten(positions)))
            pairs = [(part, places.get(name)) for name, part in given.items()]
            fits = set(given) == set(places) if complete else set(given) <= set(places)
        elif isinstance(given, (list, tuple)):
            same = not isinstance(positions, dict) and len(given) == len(positions)
            places = list(positions) if same else keras.tree.flatten(positions)
            pairs, fits = list(zip(given, places)), len(given) == len(places)
        else:
            return False
        return fits and all(self._fill(entries, part, place, complete) for part, place in pairs)

    def _name(self, index):
        return self._names[index] if self._names is not None and index < len(self._names) else index


def takes_class_numbers(loss: Any) -> bool:
    """Whether the targets of a loss are class numbers: sparse categorical cross-entropy in any of its forms."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    sparse = keras.losses.sparse_categorical_crossentropy
    return isinstance(loss, keras.losses.SparseCategoricalCrossentropy) or sparse in (loss, getattr(loss, "fn", None))


def checked_labels(labels: Any, predictions: Any, ignored: int | None = None) -> Any:
    """The labels, after checking that they are whole numbers in range.

    Where values are known the error is a ValueError, inside a graph an assertion. XLA drops assertions: there a label
    that is not whole is put out of range too, and Keras' loss of a label out of range is not a number.
    """
    classes = predictions.shape[-1]
    labels = tf.convert_to_tensor(labels)
    numbers = tf.cast(labels, tf.int64)
    inside = numbers >= 0 if classes is None else (numbers >= 0) & (numbers < classes)
    if ignored is not None:
        inside |= numbers == ignored
    rule = f"{LABEL_RULE}{'' if classes is None else f' ({classes - 1})'}."
    whole = tf.constant(True)
    if not labels.dtype.is_integer:
        are_whole = tf.cast(numbers, labels.dtype) == labels
        whole, inside = tf.reduce_all(are_whole), inside | tf.logical_not(are_whole)
        outside = classes if classes is not None else numbers.dtype.max
        labels_out = tf.where(are_whole, numbers, outside + 1 if outside == ignored else outside)
        fraction = tf.reshape(labels, [-1])[tf.argmin(tf.reshape(tf.cast(are_whole, tf.int32), [-1]))]
        if tf.executing_eagerly() and not whole:
            raise ValueError(f"{rule} Received a label that is not whole: {fraction.numpy()}")
    inside = tf.reduce_all(inside)
    low, high = tf.reduce_min(numbers), tf.reduce_max(numbers)
    if tf.executing_eagerly():
        if not inside:
            raise ValueError(f"{rule} Received labels from {low.numpy()} to {high.numpy()}")
        return labels
    checked = [tf.debugging.Assert(inside, [f"{rule} Received labels from", low, "to", high])]
    if not labels.dtype.is_integer:
        checked.insert(0, tf.debugging.Assert(whole, [f"{rule} Received a label that is not whole:", fraction]))
        labels = labels_out
    with tf.control_dependencies(checked):
        return tf.identity(labels)


def _is_nested(nest):
    return isinstance(nest, (list, tuple, dict))


def _loss(loss, dtype):
    if loss is None:
        return None
    if not isinstance(loss, (str, keras.losses.Loss)) and not callable(loss):
        raise TypeError(f"loss must be the name of a Keras loss, a keras.losses.Loss or a callable. Received: {loss!r}")
    loss = keras.losses.get(loss)
    return loss if isinstance(loss, keras.losses.Loss) else FunctionLoss(loss, dtype=dtype)


class FunctionLoss(LossFunctionWrapper):
    """A loss that is a function; of a dictionary of targets Keras would fit each entry to the predictions."""

    def call(self, y_true, y_pred):
        return self.fn(y_true, y_pred) if isinstance(y_true, dict) else super().call(y_true, y_pred)


def _is_own(loss):
    """Whether a loss is a user's, which knows what to make of a dictionary of targets for one output."""
    written = loss.fn if isinstance(loss, FunctionLoss) else type(loss)
    return not (getattr(written, "__module__", None) or "").startswith("keras.")


def _value(loss, targets, predictions, weights, class_weights):
    """The loss of one output, a scalar."""
    if takes_class_numbers(loss):
        targets = checked_labels(targets, predictions, loss.get_config().get("ignore_class"))
    if class_weights is not None:
        of_class = weights_of_classes(class_weights, targets, predictions)
        weights = of_class if weights is None else of_class * tf.cast(weights, of_class.dtype)
    return loss(targets, predictions, sample_weight=weights)


def weights_of_classes(weights: Any, targets: Any, predictions: Any) -> Tensor:
    """The weight of each example's class; of a one-hot or soft label, the weights' mean under it.

    Raises:
        ValueError: If there is not one weight for each class.
    """
    classes = 2 if predictions.shape[-1] == 1 else predictions.shape[-1]
    if classes is not None and weights.shape[0] != classes:
        raise ValueError(f"class_weights must have one entry for each of the {classes} classes. "
                         f"Received shape: {tuple(weights.shape)}")
    targets = tf.convert_to_tensor(targets)
    same_rank = targets.shape.rank == predictions.shape.rank
    if same_rank and predictions.shape[-1] != 1 and targets.shape[-1] == predictions.shape[-1]:
        return tf.linalg.matvec(tf.cast(targets, weights.dtype), weights)
    labels = tf.squeeze(targets, -1) if same_rank and targets.shape[-1] == 1 else targets
    if predictions.shape[-1] == 1 and not targets.dtype.is_integer:
        positive = tf.cast(labels, weights.dtype)
        return weights[0] + (weights[1] - weights[0]) * positive
    return tf.gather(weights, tf.cast(labels, tf.int32))

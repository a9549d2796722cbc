"""Outer losses for what is wanted in the end: smooth surrogates of AUC and F1, and losses over groups of examples.

What is counted, as ranks, decisions and the worst group's accuracy are, has no derivative. Each loss here has one, and
is small where the count is good.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import DType, Tensor
from farhox.problem.losses import SupervisedLoss, checked_labels

GROUP_RULE = "Groups must be integers from 0 to the number of groups - 1"


class OuterLoss(abc.ABC):
    """A loss `(targets, predictions, extra) -> scalar` of the outer batch of `supervised_problem`.

    Attributes:
        takes_groups: Bool, whether `extra`, the third entry of an outer batch, is the group of each example; else it is
            a sample weight, or None.
    """

    takes_groups = False

    @abc.abstractmethod
    def __call__(self, targets: Tensor, predictions: Tensor, extra: Any = None) -> Tensor:
        """The loss, a scalar tensor.

        Args:
            targets: Tensor [batch] or [batch, 1] of labels, or one-hot.
            predictions: Tensor [batch, classes], or [batch, 1] of a binary model.
            extra: Sample weights or groups, a tensor [batch].
        """


@dataclasses.dataclass(frozen=True, eq=False)
class SoftAUC(OuterLoss):
    """An upper bound of 1 - AUC of a binary model: the logistic loss of every pair of a positive and a negative.

    mean over pairs of log2(1 + exp(s_negative - s_positive)), with s the logits. A pair in the wrong order counts at
    least 1. Without a pair, in a batch of one class, it is zero.

    Args:
        from_logits: Bool. Predictions are logits and not probabilities.

    Reference:
        [Yan et al., 2003](https://dl.acm.org/doi/10.5555/3041838.3041945), surrogates of the Wilcoxon statistic.
    """

    from_logits: bool = False

    def __call__(self, targets: Tensor, predictions: Tensor, extra: Any = None) -> Tensor:
        predictions = _matrix("SoftAUC", predictions, binary=True)
        scores = predictions[:, 0]
        if not self.from_logits:
            scores = _logit(scores)
        labels = tf.cast(_labels(targets, predictions), scores.dtype)
        weights = tf.ones_like(scores) if extra is None else tf.cast(tf.reshape(extra, [-1]), scores.dtype)
        positive, negative = weights * labels, weights * (1.0 - labels)
        logarithms = tf.nn.softplus(scores[tf.newaxis, :] - scores[:, tf.newaxis])
        losses = logarithms / tf.math.log(tf.constant(2.0, scores.dtype))
        pairs = positive[:, tf.newaxis] * negative[tf.newaxis, :]
        return tf.math.divide_no_nan(tf.reduce_sum(pairs * losses), tf.reduce_sum(pairs))


@dataclasses.dataclass(frozen=True, eq=False)
class SoftF1(OuterLoss):
    """1 - F1 with probabilities in the place of decisions: 1 - 2 sum(y p) / (sum(y) + sum(p)).

    Of several classes the mean over them (macro average). Counted over a batch, so batches must not be small.

    Args:
        from_logits: Bool. Predictions are logits and not probabilities.
    """

    from_logits: bool = False

    def __call__(self, targets: Tensor, predictions: Tensor, extra: Any = None) -> Tensor:
        predictions = _matrix("SoftF1", predictions)
        probabilities = _probabilities(predictions, self.from_logits)
        truth = _one_hot(targets, predictions)
        weights = tf.ones_like(predictions[:, :1]) if extra is None else tf.cast(
            tf.reshape(extra, [-1, 1]), predictions.dtype)
        both = tf.reduce_sum(weights * truth * probabilities, axis=0)
        either = tf.reduce_sum(weights * (truth + probabilities), axis=0)
        return 1.0 - tf.reduce_mean(tf.math.divide_no_nan(2.0 * both, either))


@dataclasses.dataclass(frozen=True, eq=False)
class WorstGroupLoss(OuterLoss):
    """The mean loss of the group of examples that has the greatest. Outer batches are (x, y, group).

    Args:
        loss: As of `supervised_problem`; a `keras.losses.Loss` must have the reduction "sum_over_batch_size".
        num_groups: Positive int. Groups without an example in the batch do not count.
        temperature: Positive float or None. With it, temperature * log(mean over groups of exp(loss / temperature)),
            which all groups have a part in; without, only the worst one moves.

    Raises:
        ValueError: If an argument is out of range. When called: if a group is out of range.

    Reference:
        [Sagawa et al., 2020](https://arxiv.org/abs/1911.08731), group distributionally robust optimisation.
    """

    loss: Any
    num_groups: int
    temperature: Any = None
    takes_groups = True

    def __post_init__(self):
        checks.positive_integer("num_groups", self.num_groups)
        if self.temperature is not None:
            checks.positive_number("temperature", self.temperature)
        _check_reduction(self.loss)

    def __call__(self, targets: Tensor, predictions: Tensor, extra: Any = None) -> Tensor:
        members, zero = _members(extra, self.num_groups, keras.tree.flatten(predictions)[0].dtype)
        counts = tf.reduce_sum(members, axis=1)
        loss = SupervisedLoss(self.loss, dtype=_dtype_name(predictions))
        size = tf.cast(tf.shape(members)[1], members.dtype)
        means = tf.stack([tf.cast(loss(targets, predictions, group), members.dtype) for group in tf.unstack(members)])
        means = tf.math.divide_no_nan(means * size, counts)
        present = counts > 0
        lowest = tf.fill(tf.shape(means), means.dtype.min)
        if self.temperature is None:
            return tf.reduce_max(tf.where(present, means, lowest)) + zero
        scaled = tf.where(present, means / self.temperature, lowest)
        number = tf.math.log(tf.reduce_sum(tf.cast(present, means.dtype)))
        return self.temperature * (tf.reduce_logsumexp(scaled) - number) + zero


@dataclasses.dataclass(frozen=True, eq=False)
class EqualizedOddsLoss(OuterLoss):
    """The mean loss plus a penalty on predictions that depend on the group. Outer batches are (x, y, group).

    The penalty is the mean, over labels and groups, of the squared distance of the mean probabilities of a group's
    examples with that label from those of all groups with it. Where it is zero, true and false positives are as
    frequent in each group, in the sense of probabilities.

    Args:
        loss: As of `supervised_problem`.
        num_groups: Positive int. Labels without an example of a group in the batch do not count for that group.
        weight: Non-negative float, the weight of the penalty.
        from_logits: Bool. Predictions are logits and not probabilities.

    Raises:
        ValueError: If an argument is out of range. When called: if a group is out of range.

    Reference:
        [Hardt et al., 2016](https://arxiv.org/abs/1610.02413), definition 2.1.
    """

    loss: Any
    num_groups: int
    weight: float = 1.0
    from_logits: bool = False
    takes_groups = True

    def __post_init__(self):
        checks.positive_integer("num_groups", self.num_groups)
        checks.non_negative_number("weight", self.weight)

    def __call__(self, targets: Tensor, predictions: Tensor, extra: Any = None) -> Tensor:
        predictions = _matrix("EqualizedOddsLoss", predictions)
        loss = SupervisedLoss(self.loss, dtype=_dtype_name(predictions))(targets, predictions)
        loss = tf.cast(loss, predictions.dtype)
        probabilities = _probabilities(predictions, self.from_logits)
        members, zero = _members(extra, self.num_groups, predictions.dtype)
        truth = _one_hot(targets, predictions)
        if predictions.shape[-1] == 1:
            truth = tf.concat([1.0 - truth, truth], axis=1)
        # [label, group, class]: means over the examples of a group with a label; [label, 1, class]: of all of them.
        cells = truth[:, :, tf.newaxis] * tf.transpose(members)[:, tf.newaxis, :]
        counts = tf.reduce_sum(cells, axis=0)[:, :, tf.newaxis]
        means = tf.math.divide_no_nan(tf.einsum("bly,bc->lyc", cells, probabilities), counts)
        all_means = tf.math.divide_no_nan(
            tf.einsum("bl,bc->lc", truth, probabilities), tf.reduce_sum(truth, axis=0)[:, tf.newaxis])
        distances = tf.reduce_sum(tf.square(means - all_means[:, tf.newaxis, :]), axis=-1)
        present = tf.cast(counts[:, :, 0] > 0, distances.dtype)
        return loss + zero + self.weight * tf.math.divide_no_nan(
            tf.reduce_sum(present * distances), tf.reduce_sum(present))


def as_outer_loss(loss: Any, output_names: Sequence[Any], dtype: DType) -> Any:
    """The loss of an outer objective as a callable `(targets, predictions, extra)`."""
    return loss if isinstance(loss, OuterLoss) else SupervisedLoss(loss, None, output_names, dtype)


def takes_groups(loss: Any) -> bool:
    """Whether the third entry of an outer batch is the group of each example."""
    return isinstance(loss, OuterLoss) and loss.takes_groups


def _matrix(name, predictions, binary=False):
    if keras.tree.is_nested(predictions) or predictions.shape.rank != 2 or (binary and predictions.shape[-1] != 1):
        shapes = keras.tree.map_structure(lambda leaf: tuple(leaf.shape), predictions)
        raise ValueError(f"{name} needs the predictions of one output, of shape [batch, {1 if binary else 'classes'}]. "
                         f"Received shape: {shapes}")
    return predictions


def _labels(targets, predictions):
    """Class numbers [batch]; of a binary model 0 or 1."""
    targets = tf.convert_to_tensor(targets)
    if targets.shape.rank == 2 and targets.shape[-1] == predictions.shape[-1] > 1:
        return tf.argmax(targets, axis=-1)
    labels = tf.reshape(targets, [-1])
    like = predictions if predictions.shape[-1] != 1 else tf.concat([predictions, predictions], axis=1)
    return checked_labels(labels, like)


def _one_hot(targets, predictions):
    targets = tf.convert_to_tensor(targets)
    if targets.shape.rank == 2 and targets.shape[-1] == predictions.shape[-1] > 1:
        return tf.cast(targets, predictions.dtype)
    labels = _labels(targets, predictions)
    if predictions.shape[-1] == 1:
        return tf.cast(labels, predictions.dtype)[:, tf.newaxis]
    return tf.one_hot(tf.cast(labels, tf.int32), predictions.shape[-1], dtype=predictions.dtype)


def _probabilities(predictions, from_logits):
    if not from_logits:
        return predictions
    return tf.sigmoid(predictions) if predictions.shape[-1] == 1 else tf.nn.softmax(predictions)


def _logit(probabilities):
    epsilon = keras.config.epsilon()
    probabilities = tf.clip_by_value(probabilities, epsilon, 1.0 - epsilon)
    return tf.math.log(probabilities) - tf.math.log1p(-probabilities)


def _members(groups, num_groups, dtype):
    """Matrix [groups, batch] of ones where an example is in a group, and zero; a group out of range is an error.

    XLA drops assertions: there the zero is not a number, and neither is the loss to which it is added.
    """
    groups = tf.reshape(tf.convert_to_tensor(groups), [-1])
    if not groups.dtype.is_integer:
        raise ValueError(f"{GROUP_RULE} ({num_groups - 1}). Received dtype: {groups.dtype.name}")
    inside = (groups >= 0) & (groups < num_groups)
    low, high = tf.reduce_min(groups), tf.reduce_max(groups)
    if tf.executing_eagerly():
        if not tf.reduce_all(inside):
            raise ValueError(f"{GROUP_RULE} ({num_groups - 1}). Received groups from {low.numpy()} to {high.numpy()}")
        return tf.one_hot(groups, num_groups, dtype=dtype, axis=0), tf.zeros([], dtype)
    check = tf.debugging.Assert(tf.reduce_all(inside), [
        f"{GROUP_RULE} ({num_groups - 1}). Received groups from", low, "to", high])
    with tf.control_dependencies([check]):
        members = tf.one_hot(groups, num_groups, dtype=dtype, axis=0)
    return members, tf.where(tf.reduce_all(inside), tf.zeros([], dtype), tf.constant(float("nan"), dtype))


def _check_reduction(loss):
    for entry in keras.tree.flatten(loss):
        if isinstance(entry, keras.losses.Loss) and entry.reduction != "sum_over_batch_size":
            raise ValueError('A loss over groups must have the reduction "sum_over_batch_size". '
                             f"Received: {entry.name!r} with reduction={entry.reduction!r}")


def _dtype_name(predictions):
    dtype = keras.tree.flatten(predictions)[0].dtype
    return "float64" if dtype == tf.float64 else None

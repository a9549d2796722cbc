"""What learners are given, checked where it comes in: models, episodes in data sets, support and query as arrays."""

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core.types import Batch, Data
from farhox.meta.episodes import Episode, EpisodeSource
from farhox.problem.bilevel import BilevelProblem

_PARTS = "A learner takes episodes: ((support x, support y), (query x, query y)), each with sample weights if need be"
_DATA = ("A learner takes a tf.data.Dataset of episodes in meta-batches, as EpisodeSource.dataset(meta_batch_size) "
         "makes it, or one meta-batch")
_UNBATCHED = ("Episodes must come in meta-batches, with an axis of episodes before that of examples: "
              "EpisodeSource.dataset(meta_batch_size) makes them, or .batch(1) of a data set")


def check_model(name: str, model: Any) -> None:
    """Raises a TypeError unless `model` is a Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"{name} must be a keras.Model. Received: {model!r}")


def checked_data(data: Data, network: Any) -> Data:
    """Episodes for `fit` or `evaluate`: a data set of meta-batches, or one of them.

    Single episodes, in a data set or alone, are meta-batches of one.

    Raises:
        TypeError: If the data are something else.
        ValueError: If a data set is empty, or its elements are no episodes or not in meta-batches.
    """
    if isinstance(data, EpisodeSource):
        raise TypeError(f"{_DATA}. Received a source of episodes, {type(data).__name__}: call its method dataset")
    if isinstance(data, tf.data.Dataset):
        if data.cardinality() == 0:
            raise ValueError("The data set must hold at least one meta-batch of episodes. Received an empty one")
        if _is_single(data.element_spec, network):
            data = data.batch(1)
        as_parts(data.element_spec, network)
    elif isinstance(data, Episode) or _is_pair_of_parts(data):
        if _is_single(data, network):
            data = Episode(*tf.nest.map_structure(lambda leaf: tf.convert_to_tensor(leaf)[None], tuple(data)))
        as_parts(data, network)
    elif not isinstance(data, tf.distribute.DistributedDataset):
        listed = isinstance(data, (list, tuple)) and any(isinstance(part, Episode) for part in data)
        raise TypeError(f"{_DATA}{'. farhox.meta.TaskEpisodes takes a list of tasks' if listed else ''}. "
                        f"Received: {f'{len(data)} episodes in a ' if listed else ''}{type(data).__name__}")
    return data


def as_parts(element: Any, network: Any) -> Any:
    """(support, query) of a meta-batch of episodes, or of its specification, each a tuple (x, y) or (x, y, weights).

    Raises:
        ValueError: If it is no such meta-batch.
    """
    if not _is_pair_of_parts(element):
        raise ValueError(f"{_PARTS}. Received: {_in_words(element)}")
    episodes = {}
    for name, part in zip(("support", "query"), element):
        examples = {}
        for what, nest in zip(("inputs", "labels", "weights"), part):
            for leaf in tf.nest.flatten(nest):
                shape = getattr(leaf, "shape", np.shape(leaf))
                shape = tf.TensorShape(shape)
                if shape.rank is not None and shape.rank < 2:
                    raise ValueError(f"{_UNBATCHED}. Received: {name} {what} of shape {shape}")
                if shape.rank is not None:
                    episodes[f"{name} {what}"], examples[f"{name} {what}"] = shape[0], shape[1]
        _check_one_number("examples", examples)
        if 0 in examples.values():
            raise ValueError(f"An episode must have {name} examples. Received none")
        _check_rank(name, part[0], network)
    _check_one_number("episodes", episodes)
    support, query = element
    return tuple(support), tuple(query)


def as_support(support: Any, network: Any, classes: int | None = None, ignored: int | None = None) -> Any:
    """The support set of one episode as tensors (x, y) or (x, y, weights).

    Args:
        support: Tuple of arrays.
        network: The Keras model that takes the inputs.
        classes: Int, if labels are class numbers: they must be less.
        ignored: Int, a class number that a loss ignores, or None.

    Raises:
        TypeError: If it is no such tuple, or an array has the wrong type.
        ValueError: If shapes do not fit each other or the model, there are no examples, a number is not finite, or a
            label is out of range.
    """
    if isinstance(support, Episode):
        raise TypeError("support must be the support set alone, (x, y): the first part of an episode. "
                        "Received an Episode")
    if not isinstance(support, (tuple, list)) or len(support) not in (2, 3):
        raise TypeError("support must be a tuple of arrays (x, y) or (x, y, sample weights). "
                        f"Received: {_in_words(support)}")
    x = as_inputs("support inputs", support[0], network)
    count = tf.nest.flatten(x)[0].shape[0]
    given = support[1]
    nested = isinstance(given, dict) and classes is None
    labels = {key: _tensor(f"support labels {key!r}", part) for key, part in given.items()} if nested else _tensor(
        "support labels", given)
    for part in tf.nest.flatten(labels):
        if part.shape.rank == 0 or part.shape[0] != count:
            raise ValueError(f"There must be one label for each of the {count} support inputs. "
                             f"Received: labels of shape {part.shape}")
        _check_finite("support labels", part)
    if classes is not None:
        labels = _class_numbers(labels, x, network, classes, ignored)
    if len(support) == 2:
        return x, labels
    weights = _tensor("support weights", support[2])
    if weights.dtype == tf.string or weights.shape[:1] != [count]:
        raise ValueError(f"support weights must be one number for each of the {count} support inputs. "
                         f"Received: {weights.dtype.name} of shape {weights.shape}")
    weights = weights if weights.dtype.is_floating else tf.cast(weights, keras.config.floatx())
    _check_finite("support weights", weights)
    if tf.reduce_min(weights) < 0:
        raise ValueError(f"support weights must not be negative. Received: {float(tf.reduce_min(weights))}")
    return x, labels, weights


def as_inputs(name: str, inputs: Any, network: Any) -> Any:
    """The inputs of one episode for a Keras model as tensors of the model's types.

    Raises:
        TypeError, ValueError: As `as_support`.
    """
    expected = _inputs_of(network)
    if len(expected) > 1:
        try:
            tf.nest.assert_same_structure(network.input, inputs, check_types=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must have the structure of the model's {len(expected)} inputs. "
                             f"Received: {_in_words(inputs)}") from error
        parts = tf.nest.flatten(inputs)
        tensors = [as_one_input(f"{name} {spec.name!r}", part, spec) for part, spec in zip(parts, expected)]
        if len({tensor.shape[0] for tensor in tensors}) > 1:
            raise ValueError(f"All {name} must have the same number of examples. "
                             f"Received: {[tensor.shape[0] for tensor in tensors]}")
        return tf.nest.pack_sequence_as(inputs, tensors)
    return as_one_input(name, inputs, expected[0] if expected else None)


def as_one_input(name: str, value: Any, spec: Any) -> Any:
    """A tensor [examples, ...] for an input of a Keras model, or for any if `spec` is None."""
    tensor = _tensor(name, value)
    if spec is not None:
        shape = tf.TensorShape([None, *spec.shape[1:]])
        if not shape.is_compatible_with(tensor.shape):
            raise ValueError(f"{name} must have shape {_shape_in_words(shape)}. Received shape: {tensor.shape}")
        if (tensor.dtype == tf.string) != (spec.dtype == "string"):
            raise TypeError(f"{name} must be of type {spec.dtype}. Received: {tensor.dtype.name}")
        tensor = tf.cast(tensor, spec.dtype)
    if tensor.shape.rank == 0 or tensor.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one example. Received shape: {tensor.shape}")
    _check_finite(name, tensor)
    return tensor


def check_queries_are_seen(problem: BilevelProblem, outer_batch: Batch, query: Batch) -> None:
    """Raises a ValueError if the outer objective of a meta-batch does not depend on the query inputs."""
    own = {id(leaf) for leaf in tf.nest.flatten(query)}
    leaves = tf.nest.flatten(outer_batch)
    places = [place for place, leaf in enumerate(leaves) if id(leaf) in own]

    def objective(*episode):
        batch = tf.nest.pack_sequence_as(outer_batch, episode)
        state, outer = problem.initial_state(), problem.outer_values()
        if problem.outer_predictions is None:
            return problem.outer_loss(state, outer, batch)
        return problem.predict_outer(state, outer, batch)[1]  # The loss of these may fail for their shape.

    traced = tf.function(objective, autograph=False).get_concrete_function(
        *[tf.TensorSpec(leaf.shape[1:], leaf.dtype) for leaf in leaves])
    wanted = {id(traced.inputs[place].op) for place in places}
    seen, left = set(), [output.op for output in traced.outputs]
    while left:
        operation = left.pop()
        if id(operation) not in seen:
            seen.add(id(operation))
            left.extend(tensor.op for tensor in operation.inputs)
    if places and not wanted & seen:
        raise ValueError("The outer objective of a learner must depend on the query inputs. Outer batches are "
                         "((support x, query x), query y): give supervised_problem an outer_call, for example "
                         "outer_call=lambda inputs: model(inputs[1]). Received one that never sees the queries")


def check_finite_episodes(batch: Batch, first: int) -> None:
    """Raises a ValueError that names what is not finite in a meta-batch whose first episode has the number `first`."""
    for name, part in zip(("support", "query"), batch):
        for what, nest in zip(("inputs", "labels", "weights"), part):
            for leaf in tf.nest.flatten(nest):
                if not leaf.dtype.is_floating:
                    continue
                bad = np.argwhere(~np.isfinite(leaf.numpy()))
                if len(bad):
                    raise ValueError(f"Episodes must hold finite numbers. Received NaN or infinity in the {name} "
                                     f"{what} of episode {first + bad[0][0]}, example {bad[0][1]}")


def _tensor(name, value):
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"{name} must be a dense array. Received: {type(value).__name__}")
    if value is None or isinstance(value, (str, bytes, dict, tf.data.Dataset)) or inspect.isgenerator(value):
        raise TypeError(f"{name} must be an array. Received: {type(value).__name__}")
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise TypeError(f"{name} must be an array of one shape and type. Received: {_in_words(value)}") from error


def _class_numbers(labels, x, network, classes, ignored):
    rank = len(network.output_shape) if _inputs_of(network) else None
    if rank is not None and labels.shape.rank not in (rank - 1, rank):
        # Of some layers Keras infers another rank than they have: text vectorization is one.
        rank = len(network(tf.nest.map_structure(lambda leaf: leaf[:1], x), training=False).shape)
    if labels.dtype == tf.string or not (labels.dtype.is_integer or bool(tf.reduce_all(labels == tf.round(labels)))):
        raise ValueError(f"support labels must be whole numbers, those of classes. Received: {labels.dtype.name}"
                         f"{'' if labels.dtype == tf.string else ' with fractions'}")
    if rank is not None and labels.shape.rank not in (rank - 1, rank) or labels.shape.rank == rank and (
            labels.shape[-1] != 1):
        raise ValueError("support labels must be class numbers of shape [examples], as the loss takes them. "
                         f"Received shape: {labels.shape}")
    numbers = tf.cast(labels, tf.int64)
    counted = numbers if ignored is None else tf.boolean_mask(numbers, numbers != ignored)
    low, high = int(tf.reduce_min(counted)), int(tf.reduce_max(counted))
    if low < 0 or high >= classes:
        raise ValueError(f"support labels must be from 0 to {classes - 1}, as the model has {classes} classes. "
                         f"Received labels from {low} to {high}")
    return labels if labels.dtype.is_integer else numbers


def _check_finite(name, tensor):
    if tensor.dtype.is_floating:
        bad = np.argwhere(~np.isfinite(tensor.numpy()))
        if len(bad):
            raise ValueError(f"{name} must be finite. Received NaN or infinity in example {bad[0][0]}")


def _check_one_number(what, numbers):
    known = {name: number for name, number in numbers.items() if number is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"All parts must have the same number of {what}. Received: {known}. {_UNBATCHED}")


def _check_rank(name, inputs, network):
    """Whether inputs have an axis of episodes more than the model's."""
    expected, leaves = _inputs_of(network), tf.nest.flatten(inputs)
    if len(expected) != len(leaves):
        return
    for spec, leaf in zip(expected, leaves):
        shape = tf.TensorShape(getattr(leaf, "shape", np.shape(leaf)))
        if shape.rank is not None and shape.rank == len(spec.shape):
            raise ValueError(f"{_UNBATCHED}. Received: {name} inputs of shape {shape} for a model that takes "
                             f"{_shape_in_words(spec.shape)}")
        if not tf.TensorShape([None, None, *spec.shape[1:]]).is_compatible_with(shape):
            raise ValueError(f"{name} inputs must have shape [episodes, {_shape_in_words(spec.shape)[1:]}, as the "
                             f"model {network.name!r} takes them. Received shape: {shape}")


def _inputs_of(network):
    """The symbolic inputs of a model that says what they are, or an empty list."""
    return list(getattr(network, "inputs", None) or [])


def _is_single(element, network):
    """Whether an episode, or its specification, has no axis of episodes in front."""
    expected = _inputs_of(network)
    if not _is_pair_of_parts(element):
        return False
    leaves = tf.nest.flatten(element[0][0])
    shapes = [tf.TensorShape(getattr(leaf, "shape", np.shape(leaf))) for leaf in leaves]
    return len(expected) == len(leaves) > 0 and all(
        shape.rank is not None and shape.rank == len(spec.shape) for shape, spec in zip(shapes, expected))


def _is_pair_of_parts(element):
    return isinstance(element, (tuple, list)) and len(element) == 2 and not any(
        isinstance(part, Episode) for part in element) and all(
            isinstance(part, (tuple, list)) and len(part) in (2, 3) for part in element)


def _shape_in_words(shape):
    return f"[{', '.join(['examples', *('any' if size is None else str(size) for size in list(shape)[1:])])}]"


def _in_words(value):
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}: {', '.join(type(part).__name__ for part in value)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, str) else type(value).__name__

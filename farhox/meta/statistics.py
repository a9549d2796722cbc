"""Batch-norm statistics of an episode: from its queries (transductive) or from its support set."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from farhox._core import checks, functional
from farhox._core.types import Tensor
from farhox.meta.episode_checks import check_model
from farhox.meta.weights import is_present


@keras.saving.register_keras_serializable(package="farhox")
class StepBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalisation with a scale and a shift for each inner step.

    Inner step t is taken with row t; what is predicted after it, with that row too. Steps beyond the last row have the
    last one. Statistics are those of farhox' other learners: of the queries or of the support set, never moving ones.

    Args:
        steps: Positive int, the number of inner steps.
        **kwargs: Of `keras.layers.BatchNormalization`, without `center` and `scale`.

    Raises:
        ValueError: If `steps` is not a positive integer.

    Reference:
        [Antoniou et al., 2019](https://arxiv.org/abs/1810.09502), section 4.
    """

    def __init__(self, steps: int, **kwargs: Any) -> None:
        super().__init__(center=False, scale=False, **kwargs)
        self.steps = checks.positive_integer("steps", steps)
        self.counts = True

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        shape = (self.steps, input_shape[self.axis])
        self.gammas = self.add_weight(shape=shape, initializer="ones", name="gammas")
        self.betas = self.add_weight(shape=shape, initializer="zeros", name="betas")
        self.step = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int32", name="step")

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        outputs = super().call(inputs, training=training, mask=mask)
        steps = bool(training) and self.counts
        done = tf.convert_to_tensor(self.step)
        row = tf.clip_by_value(done if steps else done - 1, 0, self.steps - 1)
        if steps:
            self.step.assign(done + 1)
        shape = [1] * inputs.shape.rank
        shape[self.axis] = -1
        gamma, beta = (tf.reshape(tf.cast(tf.gather(tf.convert_to_tensor(rows), row), outputs.dtype), shape)
                       for rows in (self.gammas, self.betas))
        return outputs * gamma + beta

    def get_config(self) -> dict[str, Any]:
        config = {key: value for key, value in super().get_config().items() if key not in ("center", "scale")}
        return {**config, "steps": self.steps}


def query_call(model: keras.Model, transductive: bool) -> Callable[..., Any]:
    """The model as it predicts queries: a callable (support x, query x) -> predictions.

    Batch-norm layers normalise queries by the statistics of all queries of the episode together (transductive: a
    prediction depends on the other queries), or by those of the support set (each query stands alone). Their moving
    statistics are never used, so that nothing is carried from one episode to another. Layers such as dropout behave as
    in inference. A model without batch normalisation treats each query on its own in any case.

    Args:
        model: A built `keras.Model`.
        transductive: Bool.

    Raises:
        TypeError: If `model` is not a Keras model.

    Returns:
        A callable `(support x, query x) -> predictions`; or `(support x, query x, support weights, query weights) ->
        predictions` for episodes with sample weights. Examples of weight zero have no part in the statistics. A further
        part of the inputs is left to methods.
    """
    check_model("model", model)
    layers = _batch_norms(model)
    own = {id(variable) for layer in layers for variable in (layer.moving_mean, layer.moving_variance)}
    # Where batch norm alone knows of training, its training mode is what is wanted, in one pass.
    batch_norm_alone = layers and all(id(v) in own for v in model.non_trainable_variables)

    def predict(inputs):
        support, query, *others = inputs
        weights = others[:2] if len(others) > 1 else []  # One other part, or a third one, is a method's.
        if not layers:
            return model(query, training=False)
        used = query if transductive else support
        present = is_present(weights[1 if transductive else 0]) if weights else None
        with _statistics_of(layers, present):
            if transductive and batch_norm_alone:
                return model(query, training=True)
            with _without_memory(layers):
                model(used, training=True)
        return model(query, training=False)

    return predict


def statistics_of_weighted(model: keras.Model) -> Callable[..., Any]:
    """Callable sample weights or None -> context manager, in which examples of weight zero are not in statistics."""
    def context(weights):
        return _statistics_of(_batch_norms(model), is_present(weights))

    return context


def support_statistics(model: keras.Model, inputs: Tensor, values: Any, weights: Any = None) -> Any:
    """The batch-norm statistics of `inputs` under other weights.

    Args:
        model: A built `keras.Model`.
        inputs: Tensor, the support inputs.
        values: Dictionary from ids of the model's variables to tensors.
        weights: Tensor of sample weights [examples, ...], or None.

    Returns:
        Dictionary from ids of the moving statistics to tensors.
    """
    layers = _batch_norms(model)
    if not layers:
        return {}
    statistics = [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
    bindings = [(variable, values[id(variable)]) for variable in model.variables if id(variable) in values]
    bindings += [(variable, variable.value) for variable in statistics]

    def run():
        with _without_memory(layers), _statistics_of(layers, is_present(weights)):
            model(inputs, training=True)

    result = functional.call(run, bindings=bindings)
    return {id(v): value for v, value in zip(statistics, result.values[len(result.values) - len(statistics):])}


def _batch_norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


@contextlib.contextmanager
def _without_memory(layers):
    """Moving statistics that are assigned inside are those of the batch alone, and inner steps are not counted."""
    momenta = [layer.momentum for layer in layers]
    counting = [layer for layer in layers if isinstance(layer, StepBatchNormalization)]
    for layer in layers:
        layer.momentum = 0.0
    for layer in counting:
        layer.counts = False
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for layer in counting:
            layer.counts = True


@contextlib.contextmanager
def statistics_of(model: keras.Model, present: Any) -> Iterator[None]:
    """The model's batch-norm layers take the statistics of a batch from some of its examples alone.

    Args:
        model: A `keras.Model`.
        present: Bools [examples], or None for all.
    """
    with _statistics_of(_batch_norms(model), present):
        yield


@contextlib.contextmanager
def _statistics_of(layers, present):
    if present is None:
        yield
        return
    for layer in layers:
        if layer.synchronized:
            raise ValueError("Episodes with sample weights need batch-norm layers that are not synchronized. "
                             f"Received: {layer.name!r} with synchronized=True")
        # In place of the method of the class.
        vars(layer)["_moments"] = _moments_of(layer, present)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_moments", None)


def _moments_of(layer, present):
    def moments(inputs, mask):
        rank = inputs.shape.rank
        counts = tf.reshape(present, [-1] + [1] * (rank - 1))
        if mask is not None:
            counts = tf.logical_and(counts, tf.expand_dims(mask, -1))
        counts = tf.cast(tf.broadcast_to(counts, tf.shape(inputs)), inputs.dtype)
        axes = [axis % rank for axis in layer._reduction_axes]
        total = tf.reduce_sum(counts, axes, keepdims=True)
        mean = tf.math.divide_no_nan(tf.reduce_sum(counts * inputs, axes, keepdims=True), total)
        variance = tf.math.divide_no_nan(tf.reduce_sum(counts * (inputs - mean) ** 2, axes, keepdims=True), total)
        return tf.squeeze(mean, axes), tf.squeeze(variance, axes)

    return moments

"""What is trained: a copy of the user's model with hyperparameters in it, its losses, its evaluation."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from farhox import stn
from farhox._core.types import Variables
from farhox.tuner.losses import Losses
from farhox.tuner.penalties import Penalties
from farhox.tuner.responses import Responses

# Metrics that count have no derivative; a smooth loss stands for them in hypergradients.
_SMOOTH = {
    keras.metrics.MeanSquaredError: keras.losses.MeanSquaredError,
    keras.metrics.MeanAbsoluteError: keras.losses.MeanAbsoluteError,
    keras.metrics.MeanAbsolutePercentageError: keras.losses.MeanAbsolutePercentageError,
    keras.metrics.MeanSquaredLogarithmicError: keras.losses.MeanSquaredLogarithmicError,
    keras.metrics.LogCoshError: keras.losses.LogCosh,
    keras.metrics.CosineSimilarity: keras.losses.CosineSimilarity,
}
_CROSS_ENTROPIES = {
    keras.metrics.CategoricalCrossentropy: keras.losses.CategoricalCrossentropy,
    keras.metrics.SparseCategoricalCrossentropy: keras.losses.SparseCategoricalCrossentropy,
    keras.metrics.BinaryCrossentropy: keras.losses.BinaryCrossentropy,
}


class Objective:
    """What is best: a value of the epoch's logs, its direction, and a smooth loss for hypergradients.

    Args:
        objective: "val_loss", the name of a compiled metric with or without "val_", a Keras loss or a Keras metric.
        model: The compiled model.

    Attributes:
        name: Name in the logs.
        maximize: Bool.
        loss: Keras loss that hypergradients follow, or None for the model's own.
        metric: A metric to evaluate beside the compiled ones, or None.
        note: One line on what hypergradients follow.

    Raises:
        ValueError: If the name is none of the model's, or the direction of a metric is not known.
        TypeError: If it is neither a name, a loss nor a metric.
    """

    def __init__(self, objective: Any, model: Any) -> None:
        self.loss: Any = None
        self.metric: Any = None
        self.maximize = False
        if isinstance(objective, keras.losses.Loss):
            self.name, self.loss = f"val_{objective.name}", objective
            self.metric = keras.metrics.MeanMetricWrapper(
                lambda y_true, y_pred: objective.call(y_true, y_pred), name=objective.name)
            self.note = f"objective: {self.name}, which hypergradients follow"
            return
        if isinstance(objective, keras.metrics.Metric):
            metric, self.metric = objective, objective
        elif isinstance(objective, str):
            name = objective.removeprefix("val_")
            if name == "loss":
                self.name = "val_loss"
                self.note = "objective: val_loss, the compiled loss without penalties"
                return
            metric = next((metric for metric in _compiled_metrics(model) if _name(metric) == name), None)
            if metric is None:
                known = ["val_loss", *(f"val_{_name(metric)}" for metric in _compiled_metrics(model))]
                raise ValueError(f"objective must be a value that validation gives: {', '.join(known)}, a Keras loss "
                                 f"or a metric. Received: {objective!r}")
        else:
            raise TypeError(f"objective must be a name, a Keras loss or a Keras metric. Received: {objective!r}")
        self.name = f"val_{_name(metric)}"
        counts = metric in ("accuracy", "acc") if isinstance(metric, str) else False
        metric: Any = keras.metrics.get(metric) if isinstance(metric, str) and not counts else metric
        smooth = {**_SMOOTH, **_CROSS_ENTROPIES}.get(type(metric))
        if smooth is not None:
            config = {key: value for key, value in metric.get_config().items() if key not in ("name", "dtype")}
            self.loss = smooth.from_config(config) if smooth in _CROSS_ENTROPIES.values() else smooth()
            self.note = f"objective: {self.name}, which hypergradients follow"
            return
        # What EarlyStopping goes by too.
        direction = True if counts else {"up": True, "down": False}.get(getattr(metric, "_direction", ""))
        if direction is None:
            raise ValueError("Whether a metric is to be large or small must be known. Received: "
                             f"{self.name} of type {type(metric).__name__}: give objective a Keras loss")
        self.maximize = direction
        self.note = (f"objective: {self.name}, which counts and has no derivative: hypergradients follow "
                     "the compiled loss, the best epoch follows it")


class Network:
    """A copy of the user's model, trained in its place; one that reads strengths if those of its layers are tuned.

    Args:
        model: The compiled functional or Sequential Keras model. It is not changed.
        choice: A `Choice`.
        objective: An `Objective`.

    Attributes:
        model: The copy.
        found: List of `Tunable` of losses and layers.
        draws: The draws that weights learn to respond to, or None.

    Raises:
        TypeError: If the model is not functional or Sequential.
        ValueError: If it is not built or not compiled.
    """

    def __init__(self, model: Any, choice: Any, objective: Any) -> None:
        check_model(model)
        self._original, self._objective = model, objective
        self.losses = Losses(model, choice)
        self.penalties = Penalties(model, choice)
        self.responses = Responses(model, choice)
        self.found = self.losses.found + self.penalties.found + self.responses.found
        self.model: Any = None
        self.draws: Any = None
        self._added = [] if objective.metric is None else [objective.metric]
        self._mean = keras.metrics.Mean()
        self._evaluate = tf.function(self._evaluated, reduce_retracing=True, autograph=False)

    def build(self, rows: Any) -> None:
        """Makes the copy, once it is settled which hyperparameters are tuned.

        Args:
            rows: List of `Tunable`.
        """
        names = {row.name for row in rows if row.tuned}
        self.responses.found = [row if row.name in names else dataclasses.replace(row, tuned=False)
                                for row in self.responses.found]
        tuned = self.responses.tuned()
        self.model = copy_of(self._original)
        self.penalties.install(self.model)
        if tuned:
            self.model, self.draws = self.responses.converted(self.model)
        self.model.compile(loss=self._original.loss, **metrics_of(self._original))

    @property
    def inner_variables(self) -> Variables:
        """The weights that training trains."""
        return list(self.model.trainable_variables)

    @property
    def state_variables(self) -> Variables:
        """Statistics and seeds: what is not trainable by nature, rather than frozen."""
        frozen = {id(v) for layer in self.model._flatten_layers() for v in layer._trainable_variables}
        own = [v for v in self.model.non_trainable_variables if id(v) not in frozen]
        return own + (self.draws.state_variables if self.draws is not None else [])

    def inner_objective(self, batch: Any) -> Any:
        """The training loss of a batch (x, y) or (x, y, sample_weight), penalties of layers included."""
        x, y, weight = unpacked(batch)

        def loss(predictions):
            value = self.losses.training(y, predictions, weight)
            for addition in self.model.losses:
                value += tf.cast(addition, value.dtype)
            return value

        return loss(self.model(x, training=True)) if self.draws is None else self.draws.objective(x, loss)

    def outer_objective(self, batch: Any) -> Any:
        """The validation loss of a batch."""
        x, y, weight = unpacked(batch)
        return self._validation_loss(y, self.predict(x), weight)

    def penalty(self) -> float:
        """The penalties of the weights, as they are now."""
        return sum(float(variable.regularizer(variable)) for variable in self.inner_variables
                   if variable.regularizer is not None)

    def predict(self, x: Any) -> Any:
        """Predictions at the current hyperparameters."""
        return self.model(x, training=False)

    def evaluate(self, batches: Any) -> dict[str, float]:
        """Validation loss and metrics over batches, a dictionary of floats with "val_" in front."""
        if self.model._compile_metrics is not None and not self.model._compile_metrics.built:
            self._evaluated(next(iter(batches)))  # Metrics make their variables outside of a graph.
        self._mean.reset_state()
        self.model.reset_metrics()
        for metric in self._added:
            metric.reset_state()
        for batch in batches:
            self._evaluate(batch)
        values = {name: value for name, value in self.model.get_metrics_result().items() if name != "loss"}
        values.update({metric.name: metric.result() for metric in self._added})
        return {"val_loss": float(self._mean.result()),
                **{f"val_{name}": float(value) for name, value in values.items()}}

    def plain_model(self, weights: Any, values: Any, optimizer: Any) -> keras.Model:
        """A plain Keras model with these weights and hyperparameters, compiled as the original is.

        Args:
            weights: List of arrays as of `get_weights` of the copy.
            values: Dictionary from names to values.
            optimizer: Keras optimizer to compile it with.
        """
        if not self.responses.tuned():
            plain = copy_of(self._original)
            plain.set_weights(weights)
        else:
            plain = self._baked(weights, values)
        self.penalties.write(plain, values)
        plain.compile(optimizer=optimizer, loss=self._original.loss,
                      loss_weights=self._original._compile_loss._user_loss_weights, **metrics_of(self._original))
        return plain

    def _baked(self, weights, values):
        """The plain model of one that reads strengths, with these weights and strengths."""
        before = self.model.get_weights(), [row.value() for row in self.responses.found]
        self._set(weights, [values[row.name] for row in self.responses.found])
        plain = stn.bake(self.model)
        self._set(*before)
        return plain

    def _set(self, weights, strengths):
        self.model.set_weights(weights)
        for row, value in zip(self.responses.found, strengths):
            row.hyperparameter.assign(value)

    def _validation_loss(self, targets, predictions, weight):
        if self._objective.loss is not None:
            return self._objective.loss(targets, predictions, sample_weight=weight)
        return self.losses.validation(targets, predictions, weight)

    def _evaluated(self, batch):
        x, y, weight = unpacked(batch)
        predictions = self.predict(x)
        size = tf.shape(tf.nest.flatten(x)[0])[0]
        self._mean.update_state(self.losses.validation(y, predictions, weight), sample_weight=size)
        if self.model._compile_metrics is not None:
            self.model._compile_metrics.update_state(y, predictions, weight)
        for metric in self._added:
            metric.update_state(y, predictions, weight)


def check_model(model: Any) -> None:
    """Raises unless the model is a functional or Sequential Keras model that is built and compiled."""
    if not isinstance(model, (keras.Sequential, Functional)):
        raise TypeError(f"A Tuner needs a functional or Sequential keras.Model. Received: {model!r}")
    if not model.built:
        raise ValueError("The model must be built: give it a keras.Input, or call it once. "
                         f"Received: {model.name!r}")
    if not model.compiled or model.loss is None:
        raise ValueError("The model must be compiled with an optimizer and a loss. "
                         f"Received: {model.name!r}, which is not")


def copy_of(model: Any) -> Any:
    """A copy of a model with its weights."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def metrics_of(model: Any) -> dict[str, Any]:
    """The metrics of a compiled model, as new ones, as arguments of `compile`."""
    compiled = model._compile_metrics
    if compiled is None:
        return {}

    def new(metric):
        return type(metric).from_config(metric.get_config()) if isinstance(metric, keras.metrics.Metric) else metric

    return {"metrics": keras.tree.map_structure(new, compiled._user_metrics),
            "weighted_metrics": keras.tree.map_structure(new, compiled._user_weighted_metrics)}


def unpacked(batch: Any) -> tuple[Any, ...]:
    """(x, y, sample_weight or None) of a batch.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError("A batch must be a tuple (x, y) or (x, y, sample_weight). "
                         f"Received: {type(batch).__name__}")
    return (*batch, None) if len(batch) == 2 else tuple(batch)


def _compiled_metrics(model):
    given = metrics_of(model)
    return [metric for metric in keras.tree.flatten([given.get("metrics"), given.get("weighted_metrics")])
            if metric is not None]


def _name(metric):
    return metric if isinstance(metric, str) else metric.name

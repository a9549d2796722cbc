"""The self-tuning model: weights on perturbed hyperparameters and hyperparameters on validation data, in turn."""

import sys
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.logs import log_values, unique_names
from farhox._core.types import Array, Batch, Config, Data, Logs, Loss, Metrics, Nest, Optimizer
from farhox.dynamics.base import check_keras_optimizer, check_unscaled, unscales
from farhox.outer.outer_variable import OuterVariable
from farhox.outer.serialization import deserialized, serialized
from farhox.stn import conversion
from farhox.stn.alternation import alternate, as_dataset, training_data, unpack
from farhox.stn.draws import Draws
from farhox.stn.gates import as_hyperparameters
from farhox.stn.guard import StopWhenDiverged, UpdateGuard
from farhox.stn.held import hyperparameters_in
from farhox.stn.losses import as_loss
from farhox.stn.network import Network
from farhox.stn.saved_names import check_names, save_names
from farhox.stn.steps import STN, DeltaSTN
from farhox.stn.untuned import check_settings, warn_of_untuned
from farhox.stn.updates import Updates, done, guarded_parts

_METHODS = ("stn", "delta")


@keras.saving.register_keras_serializable(package="farhox")
class SelfTuningModel(keras.Model):
    """Tunes hyperparameters while it trains: the weights learn their response, the hyperparameters follow it.

    In a training step every example has its own draw u' = u + scale * noise of the unconstrained hyperparameters, and
    the weights, elementary and hyper, descend the training loss at u'. In a validation step the hyperparameters descend
    the validation loss through the gates alone, and the scales with them (Eq. 15):

        F(u', w(u')) - entropy_weight * sum(log(scale sqrt(2 pi e))).

    The training loss is never differentiated with respect to a hyperparameter, so it may depend on it in any way: by a
    dropout rate, a number of holes, an augmentation.

    ```python
    rate = farhox.Hyperparameter(0.2, low=0.0, high=0.9, name="dropout")
    network = keras.Sequential([
        keras.Input([64]), keras.layers.Dense(50, "relu"), stn.Dropout(rate), keras.layers.Dense(10)])
    model = stn.SelfTuningModel(stn.convert(network), [rate])
    model.compile(optimizer="sgd", hyper_optimizer=keras.optimizers.Adam(0.003),
                  scale_optimizer=keras.optimizers.Adam(0.003),
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, validation_data=(x_validation, y_validation))
    ```

    With `method="delta"` (Delta-STN) gates see the difference from the current hyperparameters. The elementary weights
    learn at the current hyperparameters, and the response learns on the network linearised in the gates around them,
    y + J (u' - u), with an exact forward-mode product.

    An update with a value that is not finite is never made: weights, hyperparameters and slots keep their last good
    values, `skipped_updates` counts it, and `fit` ends with an error when too many come in a row. With a
    `LossScaleOptimizer` the gradients of the weights are that optimizer's to judge: it lowers its scale.

    Args:
        model: A built `keras.Model` with self-tuning layers, `stn.convert(...)` for example.
        hyperparameters: List of `Hyperparameter`. Default: those that the self-tuning layers respond to.
        training_steps: Positive int, training steps in a row.
        validation_steps: Positive int, validation steps after them.
        warmup_steps: Int, training steps before the first validation step.
        initial_scale: Positive float, standard deviation of the draws in unconstrained space.
        entropy_weight: Float, at least 0.
        method: "stn" or "delta".
        one_draw: List of hyperparameters with one draw for the whole batch, because the training loss applies them to
            weights or to the batch as a whole. Those of regularizers and DropConnect are found.
        max_skipped_updates: Positive int, updates skipped in a row after which `fit` stops with an error.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the model has no self-tuning layer, one of them responds to a
            hyperparameter that is not among the model's, or none responds to one that is.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088);
        [Bae and Grosse, 2020](https://arxiv.org/abs/2010.13514).
    """

    def __init__(self, model: keras.Model, hyperparameters: Sequence[OuterVariable] | None = None,
                 training_steps: int = 2, validation_steps: int = 1, warmup_steps: int = 0, initial_scale: float = 0.5,
                 entropy_weight: float = 1e-3, method: str = "stn", one_draw: Sequence[OuterVariable] = (),
                 max_skipped_updates: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(model, keras.Model) or not model.built:
            raise TypeError(f"A SelfTuningModel needs a built keras.Model. Received: {model!r}")
        network = Network(model)
        if not network.gated:
            raise ValueError("A SelfTuningModel needs a model with self-tuning layers, which stn.convert makes. "
                             f"Received: {model.name!r} without any")
        if hyperparameters is None:
            hyperparameters = list({id(entry): entry for layer in network.gated for entry in layer.hyperparameters}
                                   .values())
        self.hyperparameters = as_hyperparameters(hyperparameters, "SelfTuningModel")
        own = {id(entry) for entry in self.hyperparameters}
        for layer in network.gated:
            for entry in layer.hyperparameters:
                if id(entry) not in own:
                    raise ValueError("Layers must respond to hyperparameters of their SelfTuningModel. Received: layer "
                                     f"{layer.name!r} with {entry.name!r}, which is none of "
                                     f"{[entry.name for entry in self.hyperparameters]}")
        responding = {id(entry) for layer in network.gated for entry in layer.hyperparameters}
        blind = [entry.name for entry in self.hyperparameters if id(entry) not in responding]
        if blind:
            raise ValueError("Every hyperparameter must have a layer that responds to it, or it would never move: name "
                             "it in stn.convert(model, hyperparameters) or in a layer. Received: "
                             f"{', '.join(map(repr, blind))} without any")
        if method not in _METHODS:
            raise ValueError(f"method must be one of {_METHODS}. Received: method={method!r}")
        self.model = model
        self.method = method
        self.training_steps = checks.positive_integer("training_steps", training_steps)
        self.validation_steps = checks.positive_integer("validation_steps", validation_steps)
        self.warmup_steps = checks.non_negative_integer("warmup_steps", warmup_steps)
        self.initial_scale = checks.positive_number("initial_scale", initial_scale)
        self.entropy_weight = checks.non_negative_number("entropy_weight", entropy_weight)
        self.max_skipped_updates = checks.positive_integer("max_skipped_updates", max_skipped_updates)
        self.one_draw = as_hyperparameters(one_draw, "one_draw") if one_draw else ()
        self.draws = Draws(
            self.hyperparameters, initial_scale, [*self.one_draw, *network.hyperparameters_with_one_draw()])
        for gate_input in network.gate_inputs:
            gate_input.centred = method == "delta"
        self._network = network
        warn_of_untuned(hyperparameters_in(network.layers), "A layer of the network", self.hyperparameters)
        self._evaluated_loss = keras.metrics.Mean(name="loss")
        self._outer_loss = keras.metrics.Mean(name="outer_loss")
        self._inner_loss = keras.metrics.Mean(name="inner_loss")
        self.guard = UpdateGuard(guarded_parts(self.hyperparameters), self.max_skipped_updates)
        self._functions = {}
        self.built = True

    def compile(self, optimizer: Optimizer = "sgd", hyper_optimizer: Optimizer = "adam",
                scale_optimizer: Optimizer | None = None, loss: Loss | None = None, validation_loss: Loss | None = None,
                response_optimizer: Optimizer | None = None, metrics: Metrics | None = None,
                weighted_metrics: Metrics | None = None, **kwargs: Any) -> None:
        """Sets optimizers and losses.

        Args:
            optimizer: Keras optimizer of the weights.
            hyper_optimizer: Keras optimizer of the unconstrained hyperparameters.
            scale_optimizer: Keras optimizer of the perturbation scales. None: the scales stay, and validation steps are
                taken at the current hyperparameters, unperturbed.
            loss: Training loss: the name of a Keras loss, a `keras.losses.Loss` or a function (targets, predictions) ->
                losses of the examples. It may read hyperparameters. Losses of layers are added.
            validation_loss: The same for validation and `evaluate`, where nothing is added. Default: `loss`.
            response_optimizer: Keras optimizer of hyper weights and gates with `method="delta"`. Default: a copy of
                `optimizer`.
            metrics, weighted_metrics, **kwargs: As in Keras.

        Raises:
            TypeError: If a loss is not one, or an optimizer is none of Keras'.
            ValueError: If there is no loss, `response_optimizer` comes with `method="stn"`, an optimizer of
                hyperparameters or scales unscales gradients (`LossScaleOptimizer`), or an optimizer has a
                setting that is a hyperparameter: gates do not see what an optimizer does, so it would never be tuned.
        """
        if loss is None:
            raise ValueError("A SelfTuningModel must be compiled with a loss. Received: loss=None")
        if response_optimizer is not None and self.method != "delta":
            raise ValueError('Only method="delta" has a response_optimizer of its own. '
                             f"Received: method={self.method!r} and response_optimizer={response_optimizer!r}")
        for name, given in (("optimizer", optimizer), ("hyper_optimizer", hyper_optimizer),
                            ("scale_optimizer", scale_optimizer), ("response_optimizer", response_optimizer)):
            check_keras_optimizer(name, given)
            if name in ("hyper_optimizer", "scale_optimizer"):
                check_unscaled(name, given)
        if response_optimizer is not None and (unscales(optimizer) or unscales(response_optimizer)):
            raise ValueError("Where the loss is scaled, response_optimizer must be left out: it is then one of the "
                             f"same kind. Received: optimizer={type(optimizer).__name__} and response_optimizer="
                             f"{type(response_optimizer).__name__}")
        dtype = self.model.variable_dtype
        self._losses_given, self._metrics_given = (loss, validation_loss), {
            "metrics": metrics, "weighted_metrics": weighted_metrics, **kwargs}
        self._loss = as_loss(loss, dtype)
        self._validation_loss = self._loss if validation_loss is None else as_loss(validation_loss, dtype)
        warn_of_untuned(hyperparameters_in([self._loss]), "The training loss", self.hyperparameters)
        super().compile(optimizer=optimizer, metrics=metrics, weighted_metrics=weighted_metrics, **kwargs)
        self.hyper_optimizer = keras.optimizers.get(hyper_optimizer)
        self.scale_optimizer = None if scale_optimizer is None else keras.optimizers.get(scale_optimizer)
        for name, given in (("optimizer", self.optimizer), ("hyper_optimizer", self.hyper_optimizer),
                            ("scale_optimizer", self.scale_optimizer), ("response_optimizer", response_optimizer)):
            if isinstance(given, keras.optimizers.Optimizer):
                check_settings(name, given, self.hyperparameters)
        network, delta = self._network, self.method == "delta"
        if delta and response_optimizer is None:
            response_optimizer = type(self.optimizer).from_config(self.optimizer.get_config())
        self.response_optimizer: Any = keras.optimizers.get(response_optimizer) if delta else None
        self.optimizer.build(network.general if delta else network.general + network.response)
        self.hyper_optimizer.build(self.draws.variables_of)
        if delta:
            self.response_optimizer.build(network.response)
        if self.scale_optimizer is not None:
            self.scale_optimizer.build([self.draws.raw_scales])
        self._steps = (DeltaSTN if delta else STN)(
            network, self.draws, self._training_objective, self._validation_objective,
            self.optimizer.scale_loss, self.entropy_weight)
        self._updates = Updates(
            self.hyperparameters, self._steps, self.guard, self.optimizer, self.hyper_optimizer,
            self.response_optimizer, self.scale_optimizer,
            isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer), self._inner_loss,
            self._outer_loss, self._compile_metrics)
        self._functions = {}

    def fit(self, x: Data = None, y: Data = None, batch_size: int | None = None, epochs: int = 1,
            validation_data: Data = None, sample_weight: Data = None, shuffle: bool = True,
            validation_batch_size: int | None = None, callbacks: Any = None,
            **kwargs: Any) -> keras.callbacks.History:
        """Trains and tunes. One step of an epoch is one training step or one validation step.

        The logs of an epoch have the names that those of a `HyperOptimizer` have: `loss` and `outer_loss` are the
        mean over validation steps, `inner_loss` that of the training loss over training steps. They have every
        hyperparameter in natural units under its name, `skipped_updates`, and, as in Keras, `val_loss` and metrics with
        `val_` in front from an evaluation on the validation data. What was not measured has no entry: `loss` and
        `outer_loss` before the warm-up ends.

        Args:
            x, y, sample_weight: Arrays, or `x` a `tf.data.Dataset` of batches (x, y) or (x, y, sample_weight).
            batch_size: Int, for arrays.
            epochs: Int, passes over the training data.
            validation_data: Arrays (x, y) or (x, y, sample_weight), or a `tf.data.Dataset` of batches. It is read again
                and again in training, so it must not be what the result is reported on.
            shuffle: Bool, for arrays.
            validation_batch_size: Int, for arrays. Default: `batch_size`.
            callbacks, **kwargs: As in Keras.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            RuntimeError: If too many updates in a row were skipped because a value was not finite.
            ValueError: If there is no validation data, or training and validation batches differ in structure.
        """
        if validation_data is None:
            raise ValueError("A SelfTuningModel tunes hyperparameters on validation data. Received: "
                             "validation_data=None")
        if not self.compiled:
            raise ValueError("A SelfTuningModel must be compiled before fit().")
        if self.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError("A SelfTuningModel trains on one replica. Received a strategy with "
                             f"{self.distribute_strategy.num_replicas_in_sync}")
        for name in ("class_weight", "validation_split"):
            if kwargs.pop(name, None):
                raise ValueError(f"fit() of a SelfTuningModel takes no {name}: give sample weights, or validation "
                                 f"data. Received: {name}")
        train = as_dataset(training_data(x, y, sample_weight), batch_size, shuffle, "The training data",
                           kwargs.get("steps_per_epoch"))
        validation = as_dataset(validation_data, validation_batch_size or batch_size, shuffle, "validation_data",
                                kwargs.get("validation_steps"))
        if self._compile_metrics is not None and not self._compile_metrics.built:
            # Their variables are made from a batch, and Keras would take the flag of a batch for its inputs.
            self.test_on_batch(*next(iter(validation)))
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        return super().fit(
            alternate(train, validation, self.training_steps, self.validation_steps), epochs=epochs, shuffle=False,
            validation_data=validation, callbacks=[StopWhenDiverged(self.guard), *callbacks], **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        if self.train_function is None or force:
            super().make_train_function(force)
            train: Any = self.train_function
            self.train_function = lambda iterator: self._measured(train(iterator))
        return self.train_function

    def train_step(self, data: Data) -> Logs:
        if len(data) != 2 or getattr(data[0], "dtype", None) != tf.bool:
            raise ValueError("A SelfTuningModel takes training and validation batches in turn, with fit(), or step by "
                             "step with training_step() and validation_step(). Received: train_on_batch()")
        is_validation, batch = data
        x, y, sample_weight, batch_size = unpack(batch)
        noise = self.draws.noise(batch_size)
        due = tf.convert_to_tensor(self.optimizer.iterations) >= self.warmup_steps

        tf.cond(
            is_validation,
            lambda: tf.cond(due, lambda: done(self._updates.validation, x, y, sample_weight, noise), tf.no_op),
            lambda: done(self._updates.training, x, y, sample_weight, noise))
        return self._logs()

    def test_step(self, data: Data) -> Logs:
        x, y, sample_weight, batch_size = unpack(data)
        predictions = self.model(x, training=False)
        loss = self._validation_objective(x, y, predictions, sample_weight)
        self._evaluated_loss.update_state(loss, sample_weight=batch_size)
        logs = self.compute_metrics(x, y, predictions, sample_weight)
        return {name: value for name, value in logs.items() if name not in ("outer_loss", "inner_loss")}

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Keras' summary, with what of the network responds to hyperparameters under it."""
        super().summary(*args, **kwargs)
        text = conversion.summary(self)
        (kwargs.get("print_fn") or (lambda line: sys.stdout.write(line + "\n")))(text)

    def call(self, inputs: Nest, training: bool | None = None, mask: Any = None) -> Any:
        return self.model(inputs, training=training, mask=mask)

    def training_step(self, batch: Batch, noise: Array = None) -> Any:
        """One training step by hand; compiled unless the model runs eagerly.

        Args:
            batch: (x, y) or (x, y, sample_weight).
            noise: Tensor [batch, n] in the place of standard normal numbers, or None.

        Returns:
            The training loss.
        """
        return self._by_hand("training", batch, noise)

    def validation_step(self, batch: Batch, noise: Array = None) -> Any:
        """One validation step by hand, whatever `warmup_steps`; compiled unless the model runs eagerly.

        Args:
            batch, noise: As in `training_step`.

        Returns:
            The validation loss.
        """
        return self._by_hand("validation", batch, noise)

    def save_own_variables(self, store: Any) -> None:
        save_names(store, self.hyperparameters)

    def load_own_variables(self, store: Any) -> None:
        # Layers check them too; an error of the model's own is the one that Keras shows.
        check_names(store, self.hyperparameters, self.name)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        # Keras' own tracker of a loss stays empty: losses are weighted by examples, those of evaluation differ.
        return [metric for metric in super().metrics if metric.name != "loss" or metric is self._evaluated_loss]

    def get_config(self) -> Config:
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model),
                "hyperparameters": serialized(self.hyperparameters), "training_steps": self.training_steps,
                "validation_steps": self.validation_steps, "warmup_steps": self.warmup_steps,
                "initial_scale": self.initial_scale, "entropy_weight": self.entropy_weight, "method": self.method,
                "one_draw": serialized(self.one_draw), "max_skipped_updates": self.max_skipped_updates}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        return cls(**deserialized(config, "model", "hyperparameters", "one_draw"))

    def get_compile_config(self) -> Any:
        if not self.compiled:
            return {}
        loss, validation_loss = self._losses_given
        return keras.saving.serialize_keras_object({
            "optimizer": self.optimizer, "hyper_optimizer": self.hyper_optimizer,
            "scale_optimizer": self.scale_optimizer, "response_optimizer": self.response_optimizer,
            "loss": loss, "validation_loss": validation_loss, **self._metrics_given})

    def compile_from_config(self, config: Config) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))

    def _training_objective(self, x, y, predictions, sample_weight):
        loss = self._loss(y, predictions, sample_weight=sample_weight)
        return tf.add_n([loss] + [tf.cast(tf.reduce_sum(added), loss.dtype) for added in self.model.losses])

    def _validation_objective(self, x, y, predictions, sample_weight):
        return self._validation_loss(y, predictions, sample_weight=sample_weight)

    def _by_hand(self, name, batch, noise):
        if not self.compiled:
            raise ValueError(f"A SelfTuningModel must be compiled before {name}_step().")
        step = self._updates.training if name == "training" else self._updates.validation
        if name not in self._functions:
            def function(batch, noise):
                x, y, sample_weight, batch_size = unpack(batch)
                noise = (self.draws.noise(batch_size) if noise is None else
                         self.draws.same_rows(tf.cast(noise, self.draws.raw_scales.dtype)))
                return step(x, y, sample_weight, noise)

            self._functions[name] = function if self.run_eagerly else tf.function(
                function, autograph=False, jit_compile=bool(self.jit_compile))
        return self._functions[name](tuple(batch) if isinstance(batch, list) else batch, noise)

    def _logs(self):
        logs = self.get_metrics_result()
        logs["loss"] = logs["outer_loss"]
        logs["skipped_updates"] = tf.convert_to_tensor(self.guard.skipped)
        return {**logs, **log_values(unique_names(self.hyperparameters, taken=logs))}

    def _measured(self, logs):
        """The logs without what was measured in no step since the epoch began, where a metric is zero."""
        unmeasured = set()
        if not float(self._outer_loss.count):
            unmeasured |= {"loss", "outer_loss"}
        if not float(self._inner_loss.count):
            # Compiled metrics are those of training steps.
            unmeasured |= set(self.get_metrics_result()) - {"loss", "outer_loss"}
        return {name: value for name, value in logs.items() if name not in unmeasured}

"""HyperOptimizer: a bilevel problem as a `keras.Model` that is trained with `fit`. The only mutable object."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.inner_state import InnerState
from farhox._core.types import Batch, Data, InnerBatches, Metrics, Optimizer, Tensor, Tensors
from farhox.data.batches import examples_of
from farhox.data.datasets import as_hyper_iterations, pair, raise_if_endless
from farhox.hypergradients import HyperGradient
from farhox.hypergradients.base import HyperGradientResult
from farhox.problem.bilevel import BilevelProblem
from farhox.training.by_hand import ByHand
from farhox.training.compilation import Compilation
from farhox.training.data_checks import with_checks
from farhox.training.errors import graph_calls
from farhox.training.executions import in_one_execution, is_suited
from farhox.training.flat_updates import FlatUpdates
from farhox.training.hyper_iteration import HyperIteration, checked_settings, problem_to_compile
from farhox.training.measures import Measures
from farhox.training.metric_variables import make_metrics, make_metrics_of_replicas
from farhox.training.progress import Logs, add_progress, as_list
from farhox.training.trained import Trained, describe, known_model, trained_copy
from farhox.training.watch import SkipGuard
from farhox.training.weights import SAVE_RULE, check_checkpoints, read_names, unchanged_on_error, write_names


class HyperOptimizer(keras.Model):
    """Learns the outer variables of a bilevel problem with `fit`; callbacks, logs and strategies are those of Keras.

    One element of the data set, (inner_batches, outer_batch), is one hyper-iteration: T inner steps, the hypergradient,
    one update of the outer variables by the compiled optimizer. The logs hold `outer_loss` (the outer objective,
    averaged over the epoch), `inner_loss` (the inner objective before the last inner step), the compiled metrics on the
    outer batch, the current value of each hyperparameter in natural units under its name, of implicit methods
    `solver_failed` (the part of the linear systems), `solver_residual` and `inner_gradient_norm`, and where there are
    any `skipped_updates`. Callbacks find the outer loss under Keras' names too, `loss` and `val_loss`.

    ```python
    optimizer = farhox.HyperOptimizer(problem, farhox.ReverseHG())
    optimizer.compile(optimizer=keras.optimizers.Adam(1e-2), metrics=["accuracy"])
    optimizer.fit(farhox.bilevel_dataset((x, y), (x_val, y_val), inner_steps=100), epochs=20)
    ```

    A hypergradient that is not finite never reaches the outer variables: the update is skipped and counted. Online, the
    inner training goes on all the same where it is finite itself. An update after which an outer value would not be
    finite, or is multiplied to nothing, is taken back, the optimizer's state included, and counts as skipped; a value
    that arrives at a bound is held before it, and a warning names it.

    `farhox.callbacks.Resume` goes on with an interrupted run, bit for bit.

    Args:
        problem: A `BilevelProblem`.
        hypergradient: A `HyperGradient`; default `ReverseHG()`.
        online: Bool. The inner training goes on from one hyper-iteration to the next instead of starting anew: the
            model itself is trained, and tangents of `ForwardHG` are carried along.
        max_skipped_updates: Positive int, updates skipped in a row after which `fit` stops with an error.
        name: Name of the Keras model.
        outer_first: Bool, for `online=True`. The outer variables are updated first, with the hypergradient from the
            inner state kept; the inner steps are then taken from there on the same batches with the new values. By
            default they are taken with the old ones, and count for the hypergradient too.

    Raises:
        TypeError: If `problem` or `hypergradient` has the wrong type.
        ValueError: If `max_skipped_updates` is not positive, or `online` is asked of a problem whose initial state
            matters: with learned initial values or a proximal term; or `outer_first` is asked of a training that is
            not online, or with a method that carries memory of the inner state.
    """

    def __init__(self, problem: BilevelProblem, hypergradient: HyperGradient | None = None, online: bool = False,
                 max_skipped_updates: int = 10, name: str | None = "hyper_optimizer",
                 outer_first: bool = False) -> None:
        super().__init__(name=name)
        problem, hypergradient = checked_settings(problem, hypergradient, online, outer_first)
        self.problem, self.hypergradient = problem, hypergradient
        self.online, self.outer_first = bool(online), bool(outer_first)
        self.max_skipped_updates = checks.positive_integer("max_skipped_updates", max_skipped_updates)
        # Tracked by Keras, so that save_weights and Resume hold all there is to go on from.
        self._outer = list(problem.outer_variables)
        self._inner = list(problem.inner_variables) + list(problem.state_variables)
        self._measures = Measures(problem)
        self._outer_loss, self._inner_loss = self._measures.outer_loss, self._measures.inner_loss
        self._solver_metrics = self._measures.of_solvers
        self._one = HyperIteration.of(problem, hypergradient, self.online, self.outer_first, self.max_skipped_updates)
        self._watch, self._kept, self._guarded_update = self._one.watch, self._one.kept, self._one.guarded_update
        self._counters, self.last_outer_loss = self._watch.variables, self._one.last_outer_loss
        self._slots, self._carry = self._kept.slots, self._kept.carry
        self.built = True
        self._compilation = Compilation(self, False)
        self._by_hand = ByHand(self)

    def compile(self, optimizer: Optimizer = "adam", metrics: Metrics | None = None,
                jit_compile: bool | str = False, parallel_iterations: int | None = None, **kwargs: Any) -> None:
        """Configures the outer optimizer and metrics.

        Args:
            optimizer: A Keras optimizer, or its name, for the outer variables.
            metrics: List of Keras metrics on the outer batch; needs a problem with `outer_predictions`, as
                `supervised_problem` makes it.
            jit_compile: Bool, whether hyper-iterations are compiled with XLA; on CPUs this slows convolutions down.
                "auto": measured at the first one in `fit` or `step`, where a line says what was chosen, and why;
                `jit_choice` is that line. XLA is chosen if it takes less time, and only if the hypergradient is the
                same up to rounding: under XLA seeds draw other numbers. (In Keras "auto" is XLA wherever it can be.) A
                run that is resumed measures again: for the same bits, say True or False.
            parallel_iterations: Positive int, episodes that are computed at the same time, see
                `BilevelProblem.over_episodes`. Default: what was said there, else one after the other.
            **kwargs: `weighted_metrics`, `run_eagerly`, `steps_per_execution` of `keras.Model.compile`.

        Raises:
            TypeError: If the optimizer is none of Keras'.
            ValueError: If a loss is given (the objectives are part of the problem), metrics cannot be computed, or
                `parallel_iterations` is no positive integer or comes without episodes.
        """
        losses = [kwargs.pop(name, None) for name in ("loss", "loss_weights")]
        self.problem = problem_to_compile(
            self.problem, optimizer, losses, metrics or kwargs.get("weighted_metrics"), parallel_iterations)
        self._compilation = Compilation(self, jit_compile)
        # Losses are not scaled: a hypergradient is computed before the optimizer sees it.
        super().compile(optimizer=optimizer, metrics=metrics, auto_scale_loss=False, **kwargs,
                        jit_compile=jit_compile != "auto" and bool(jit_compile))
        if not self.optimizer.built:
            self.optimizer.build(self._outer)
        self._updates = FlatUpdates(self.optimizer, self._outer)
        self._by_hand = ByHand(self)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        # Those of this class are tracked by Keras among the others too.
        return self._measures.joined_with(super().metrics)

    @property
    def metrics_names(self) -> list[str]:
        """The names of what `evaluate` returns, in its order."""
        return self._measures.names(self)

    @property
    def jit_choice(self) -> str | None:
        """The line that says what `jit_compile="auto"` chose and why, or None."""
        return self._compilation.choice

    @property
    def hyper_iterations(self) -> int:
        """Int, the hyper-iterations that the compiled optimizer has done, skipped updates included."""
        done = int(self.optimizer.iterations.numpy()) if self.compiled else 0
        return done + int(self._watch.skipped.numpy())

    def fit(self, x: Data = None, callbacks: Any = None, validation_data: Data = None,
            **kwargs: Any) -> keras.callbacks.History:
        """Runs hyper-iterations, one per element of the data set; arguments and callbacks are those of Keras.

        Args:
            x: `tf.data.Dataset` of (inner_batches, outer_batch), for example from `bilevel_dataset`; or one such pair.
            callbacks: List of Keras callbacks.
            validation_data: A data set of the same kind; see `evaluate`.
            **kwargs: `epochs`, `verbose`, `steps_per_epoch`, ... of `keras.Model.fit`.

        Returns:
            A Keras `History`. Its dictionary lists no number twice; `loss`, another name of `outer_loss`, and counters
            that are zero all the time are there for who asks by name.

        Raises:
            RuntimeError: If too many hypergradients in a row were not finite.
            ValueError: If the data are empty or not pairs, labels are out of range, or a `ModelCheckpoint` is to save
                more than weights.
        """
        x = self._dataset(x)
        raise_if_endless(x, "steps_per_epoch", kwargs.get("steps_per_epoch"))
        if validation_data is not None:
            validation_data = self._dataset(validation_data)
        # First in the list, so that what another one restores is not touched.
        callbacks = [SkipGuard(), *as_list(callbacks)]
        check_checkpoints(callbacks)
        add_progress(callbacks, kwargs.get("verbose", "auto"))
        kwargs.setdefault("shuffle", False)  # A data set shuffles itself; Keras warns where it is asked to.
        self.problem.raise_if_model_changed()
        with graph_calls():
            make_metrics(self, self._compile_metrics, x, self._predictions_of)
            history = super().fit(x, callbacks=callbacks, validation_data=validation_data, **kwargs)
        history.history = Logs(history.history)
        return history

    def evaluate(self, x: Data = None, **kwargs: Any) -> Any:
        """The outer loss and metrics with the current outer variables; nothing is updated.

        Each element's inner batches train the inner variables from their initial state before the outer batch is
        evaluated. Online, the outer batch is evaluated at the state kept, and the inner batches are not used.

        Args:
            x: As for `fit`.
            **kwargs: `verbose`, `return_dict`, `steps`, ... of `keras.Model.evaluate`.

        Returns:
            The values that `metrics_names` names, or with `return_dict=True` a dictionary, as `keras.Model.evaluate`.
        """
        if kwargs.pop("_use_cached_eval_dataset", False):  # The validation of Keras' fit, for its callbacks.
            with graph_calls():
                return super().evaluate(x, _use_cached_eval_dataset=True, **kwargs)
        self.problem.raise_if_model_changed()
        as_dictionary = kwargs.pop("return_dict", False)
        callbacks = as_list(kwargs.pop("callbacks", None))
        add_progress(callbacks, kwargs.get("verbose", "auto"))
        with graph_calls():
            x = self._dataset(x)
            raise_if_endless(x, "steps", kwargs.get("steps"))
            make_metrics(self, self._compile_metrics, x, self._predictions_of)
            # Keras 3.8 leaves tensors where nothing shows the numbers.
            logs = Logs({name: value if np.ndim(value) else float(value) for name, value in super().evaluate(
                x, callbacks=callbacks, return_dict=True, **kwargs).items()})
        return logs if as_dictionary else logs.as_values(self.metrics_names)

    def step(self, inner_batches: InnerBatches, outer_batch: Batch) -> HyperGradientResult:
        """One hyper-iteration by hand: compiled, with the same update as in `fit`.

        Args:
            inner_batches: T inner batches.
            outer_batch: The outer batch.

        Returns:
            The `HyperGradientResult`.

        Raises:
            RuntimeError: If too many hypergradients in a row were not finite.
            ValueError: If the optimizer was not compiled.
        """
        if not self.compiled:
            raise ValueError("A HyperOptimizer must be compiled with an outer optimizer before step() or fit().")
        result = self._by_hand.step(inner_batches, outer_batch)
        self.raise_if_diverged()
        gap = result.diagnostics.get("stationarity_gap")
        self._watch.warn_once(0.0 if gap is None else float(tf.reduce_mean(gap)))
        return result

    def train_inner(self, inner_batches: InnerBatches) -> Tensor:
        """Trains the inner variables with the current outer variables and keeps the result in the model.

        Args:
            inner_batches: T inner batches.

        Returns:
            Tensor [T], the inner objective before each step.

        Raises:
            DivergedError: A RuntimeError, if the training diverged: the model is as it was.
        """
        run = self.trained_state(inner_batches)
        self._kept.train_to(run.state)
        return run.losses

    def trained_model(self, data: Data) -> keras.Model:
        """A new Keras model, trained with the current outer variables; nothing else changes.

        Args:
            data: T inner batches, or a `tf.data.Dataset` of hyper-iterations: training then goes on through the inner
                batches of all its elements.

        Returns:
            A plain `keras.Model` of the kind that the problem was made of, with weights of its own. Inner variables
            start where the model's are (online: at the state kept).

        Raises:
            DivergedError: A RuntimeError, if the training diverged.
            ValueError: If the problem does not know its model.
        """
        return trained_copy(self, data)

    def predict(self, x: Any, **kwargs: Any) -> np.ndarray:
        """Predictions of the problem's model with its current weights, as `keras.Model.predict`.

        Between hyper-iterations these are the initial values, or online the weights trained so far. `train_inner` and
        `trained_model` train them with the outer variables learned.
        """
        return known_model(self.problem).predict(x, **kwargs)

    def summary(self, *args: Any, print_fn: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        """Prints what is learned, and the summary of the problem's model where it is known.

        Args:
            *args, **kwargs: Of `keras.Model.summary`.
            print_fn: Callable that is given the text. Default: standard output.
        """
        write = print_fn or (lambda text, **_: sys.stdout.write(text + "\n"))
        write(describe(self))
        if self.problem.model is not None:
            self.problem.model.summary(*args, print_fn=print_fn, **kwargs)

    def load_weights(self, filepath: str | os.PathLike, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """Loads what `save_weights` wrote, after checking that it is of this problem.

        Raises:
            ValueError: If the file is damaged, of another problem, or of a later version of farhox. It is named, and
                nothing has changed.
        """
        with unchanged_on_error(self, filepath):
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        write_names(self, store)

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(read_names(self, store))

    def make_train_function(self, force: bool = False) -> None:
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        if is_suited(self, HyperOptimizer.train_step):
            self.train_function = in_one_execution(self, self.train_function, self._trained, self._logs_of_training)
        self.train_function = self._compilation.measured_first(self.train_function)

    def train_step(self, data: Any) -> dict[str, Any]:
        return self.trained_on(data)[0]

    def trained_on(self, data: Any) -> tuple[dict[str, Any], HyperGradientResult]:
        """One hyper-iteration of `fit`: the logs after it, and its result."""
        result = self._trained(data)
        return self._logs_of_training(), result

    def _trained(self, data):
        inner_batches, outer_batch = self._hyper_iteration_data(data, training=True)
        result = self._hyper_iteration(inner_batches, outer_batch)
        self._measures.take(self, result, lambda: self.problem.predictions(result.state, outer_batch))
        return result

    def _logs_of_training(self):
        return {**self._measures.logs_of_training(self), "skipped_updates": tf.convert_to_tensor(self._watch.skipped)}

    def _iteration(self) -> tf.Tensor:
        """The number of the hyper-iteration, skipped updates included: a scalar int64 tensor."""
        done = tf.cast(self.optimizer.iterations, tf.int64) if self.compiled else tf.constant(0, tf.int64)
        return done + tf.cast(self._watch.skipped, tf.int64)

    def test_step(self, data: Data) -> dict[str, Any]:
        inner_batches, outer_batch = self._hyper_iteration_data(data)
        if self.online:
            state: Any = self._kept.state_now()
            loss, predictions = self.problem.judged(state, self.problem.outer_values(), outer_batch)
            logs = self._logs(loss, lambda: predictions)
            del logs["inner_loss"]  # No inner training has been measured.
            return logs
        evaluation = self.problem.evaluate(inner_batches, outer_batch, iteration=self._iteration())
        self._inner_loss.update_state(evaluation.inner_losses[..., -1])
        return self._logs(evaluation.outer_loss, lambda: evaluation.predictions)

    def raise_if_diverged(self) -> None:
        """Raises a RuntimeError that says what diverged if too many updates in a row were skipped."""
        self._watch.raise_if_diverged()

    def kept_state(self) -> InnerState | None:
        """The inner state that an online training goes on from, as an `InnerState`.

        Raises:
            ValueError: If the training is not online: it starts anew in each hyper-iteration.
        """
        if not self.online:
            raise ValueError("Only with online=True an inner state is kept. Received: online=False")
        return self._kept.state_now()

    def start_counting_skips(self) -> None:
        """Starts the count of updates skipped in a row anew, so that a run goes on after a cause was removed."""
        self._watch.start_counting()

    def reset_inner_state(self) -> None:
        """Starts the optimizer's slots, the step count and the carried memory anew; variables stay as they are."""
        self._kept.reset()

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(SAVE_RULE)

    def _hyper_iteration_data(self, data, training=False):
        """(inner_batches, outer_batch) of an element of the data set."""
        del training
        return pair(data)

    def _checked_examples(self, data):
        """Of an element of the data set: the examples of training and of validation whose labels XLA cannot check."""
        inner_batches, outer_batch = pair(data)
        return examples_of(inner_batches), outer_batch

    def _hyper_iteration(self, inner_batches, outer_batch):
        return self._one.run(self.problem, self._updates, self._iteration(), inner_batches, outer_batch)

    def trained_state(self, inner_batches: InnerBatches, outer: Tensors | None = None,
                      state: InnerState | None = None) -> Trained:
        """Inner training without keeping it: nothing changes.

        Args:
            inner_batches: T inner batches.
            outer: List of tensors, the outer values; default: the current ones.
            state: The `InnerState` to start from; default: the initial one, online the one kept.

        Returns:
            A named tuple of `state`, the inner state after it, and `losses` [T], the inner objective before each step.

        Raises:
            DivergedError: A RuntimeError, if the training diverged.
        """
        return self._by_hand.trained(inner_batches, outer, state)

    def warn_once(self) -> None:
        """Warns, once each, of what a person should know about the hyper-iterations since the epoch began."""
        self._watch.warn_once(self._measures.gap)

    def _logs(self, outer_loss, outer_predictions):
        """The logs; `outer_predictions()` is called where there are metrics."""
        return self._measures.logs(self, outer_loss, outer_predictions)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch=None):
        make_metrics_of_replicas(self, self._compile_metrics, iterator, self._predictions_of)

    def _predictions_of(self, element):
        return self.problem.evaluate(*self._hyper_iteration_data(element)).predictions

    def _compiled(self, function, **options):
        if self.run_eagerly:
            return function
        # Before compile() Keras would choose XLA by itself.
        return tf.function(
            function, autograph=False, jit_compile=self.compiled and bool(self.jit_compile), **options)

    def _dataset(self, x):
        data = as_hyper_iterations(x, self.distribute_strategy)
        if self._compilation.checks_apart:
            return with_checks(data, self.problem, self._checked_examples)
        return data

"""HyperOptimizer: a bilevel problem as a `keras.Model` that is trained with `fit`. The only mutable object."""

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks, tree
from farhox._core.inner_state import InnerState
from farhox._core.logs import log_names, log_values
from farhox.data.batches import as_inner_batches
from farhox.data.datasets import as_hyper_iterations, as_tensors, pair
from farhox.data.finite import first_not_finite, place_in_words
from farhox.hypergradients import HyperGradient, ReverseHG
from farhox.problem.bilevel import BilevelProblem, variable_names
from farhox.problem.inner_training import InnerTraining
from farhox.problem.losses import LABEL_RULE

_ADVICE = (
    "Try a smaller inner learning rate or tighter bounds on it, fewer inner steps, a smaller outer learning rate or "
    "clipnorm on the outer optimizer; with an inner rate that is learned, an upper bound (high=...) keeps it stable.")
_NAMES = "names_of_outer_variables"
_SAVE_RULE = (
    "A HyperOptimizer holds objectives, which are Python code and cannot be saved. Use save_weights (ModelCheckpoint "
    "with save_weights_only=True): it holds inner and outer variables, the outer optimizer and all memory. Save the "
    "Keras model itself with model.save.")


class HyperOptimizer(keras.Model):
    """Learns the outer variables of a bilevel problem with `fit`; callbacks, logs and strategies are those of Keras.

    One element of the data set, (inner_batches, outer_batch), is one hyper-iteration: T inner steps, the hypergradient,
    one update of the outer variables by the compiled optimizer. The logs hold `loss` and `outer_loss` (both the outer
    objective, averaged over the epoch), `inner_loss` (the inner objective before the last inner step), the compiled
    metrics on the outer batch, the current value of each hyperparameter in natural units under its name, and
    `skipped_updates`.

    ```python
    optimizer = farhox.HyperOptimizer(problem, farhox.ReverseHG())
    optimizer.compile(optimizer=keras.optimizers.Adam(1e-2), metrics=["accuracy"])
    optimizer.fit(farhox.bilevel_dataset((x, y), (x_val, y_val), inner_steps=100), epochs=20)
    ```

    A hypergradient that is not finite never reaches the outer variables: the update is skipped and counted.

    `farhox.callbacks.Resume` goes on with an interrupted run, bit for bit.

    Args:
        problem: A `BilevelProblem`.
        hypergradient: A `HyperGradient`; default `ReverseHG()`.
        online: Bool. The inner training goes on from one hyper-iteration to the next instead of starting anew: the
            model itself is trained, and tangents of `ForwardHG` are carried along.
        max_skipped_updates: Positive int, updates skipped in a row after which `fit` stops with an error.
        name: Name of the Keras model.

    Raises:
        TypeError: If `problem` or `hypergradient` has the wrong type.
        ValueError: If `max_skipped_updates` is not positive, or `online` is asked of a problem whose initial state
            matters: with learned initial values or a proximal term.
    """

    def __init__(self, problem, hypergradient=None, online=False, max_skipped_updates=10, name="hyper_optimizer"):
        super().__init__(name=name)
        hypergradient = ReverseHG() if hypergradient is None else hypergradient
        if not isinstance(problem, BilevelProblem):
            raise TypeError(f"problem must be a farhox.BilevelProblem. Received: {problem!r}")
        if not isinstance(hypergradient, HyperGradient):
            raise TypeError("hypergradient must be one of farhox' methods, for example farhox.ReverseHG(). "
                            f"Received: {hypergradient!r}")
        if online and (problem.learns_initialization or problem.proximal is not None):
            raise ValueError("online=True goes on from the last inner state, so the initial state must not matter. "
                             "Received a problem with "
                             f"{'a proximal term' if problem.proximal is not None else 'learned initial values'}.")
        self.problem = problem
        self.hypergradient = hypergradient
        self.online = bool(online)
        self.max_skipped_updates = checks.positive_integer("max_skipped_updates", max_skipped_updates)
        # Tracked by Keras, so that save_weights and Resume hold all there is to go on from.
        self._outer = list(problem.outer_variables)
        self._inner = list(problem.inner_variables) + list(problem.state_variables)
        self._log_names = log_names(problem)
        self._outer_loss = keras.metrics.Mean(name="outer_loss")
        self._inner_loss = keras.metrics.Mean(name="inner_loss")
        self._skipped = _counter(0, "skipped_updates")
        self._skipped_in_a_row = _counter(0, "skipped_in_a_row")
        # Which of the inner loss, the outer loss, the memory kept and each hypergradient was not finite at the last
        # skip.
        self._not_finite = _counter(np.zeros(3 + len(self._outer)), "not_finite")
        # Where the inner batches and the outer batch of that hyper-iteration were not finite themselves.
        self._not_finite_data = _counter(np.zeros([2, 3]), "not_finite_data")
        initial = problem.initial_state()
        self._slots = [_kept(leaf) for leaf in tf.nest.flatten([initial.slots, initial.step])] if online else []
        self._slot_structure = [initial.slots, initial.step]
        self._keeps_carry = self.online or hypergradient.carry_outlives_state
        self._carry_structure = hypergradient.initial_carry(problem) if self._keeps_carry else []
        self._carry = [_kept(leaf) for leaf in tf.nest.flatten(self._carry_structure)]
        self.built = True
        self._step_function = None
        self._inner_function = None

    def compile(self, optimizer="adam", metrics=None, jit_compile=False, **kwargs):
        """Configures the outer optimizer and metrics.

        Args:
            optimizer: A Keras optimizer, or its name, for the outer variables.
            metrics: List of Keras metrics on the outer batch; needs a problem with `outer_predictions`, as
                `supervised_problem` makes it.
            jit_compile: Bool. Compile hyper-iterations with XLA; on CPUs this slows convolutions down.
            **kwargs: `weighted_metrics`, `run_eagerly`, `steps_per_execution` of `keras.Model.compile`.

        Raises:
            ValueError: If a loss is given (the objectives are part of the problem), or metrics cannot be computed.
        """
        if any(kwargs.pop(name, None) is not None for name in ("loss", "loss_weights")):
            raise ValueError("A HyperOptimizer takes no loss: the inner and outer objective are part of the problem.")
        if (metrics or kwargs.get("weighted_metrics")) and self.problem.outer_predictions is None:
            raise ValueError("Metrics need predictions: give BilevelProblem(outer_predictions=batch -> (targets, "
                             "predictions, sample_weight)), or make the problem with farhox.supervised_problem.")
        # Losses are not scaled: a hypergradient is computed before the optimizer sees it.
        super().compile(optimizer=optimizer, metrics=metrics, jit_compile=jit_compile, auto_scale_loss=False, **kwargs)
        if not self.optimizer.built:
            self.optimizer.build(self._outer)
        self._step_function = self._inner_function = None

    @property
    def metrics(self):
        return [self._outer_loss, self._inner_loss] + super().metrics

    @property
    def hyper_iterations(self):
        """Int, the hyper-iterations that the compiled optimizer has done, skipped updates included."""
        done = int(self.optimizer.iterations.numpy()) if self.compiled else 0
        return done + int(self._skipped.numpy())

    def fit(self, x=None, callbacks=None, validation_data=None, **kwargs):
        """Runs hyper-iterations, one per element of the data set; arguments and callbacks are those of Keras.

        Args:
            x: `tf.data.Dataset` of (inner_batches, outer_batch), for example from `bilevel_dataset`; or one such pair.
            callbacks: List of Keras callbacks.
            validation_data: A data set of the same kind; see `evaluate`.
            **kwargs: `epochs`, `verbose`, `steps_per_epoch`, ... of `keras.Model.fit`.

        Returns:
            A Keras `History`.

        Raises:
            RuntimeError: If too many hypergradients in a row were not finite.
            ValueError: If the data are empty or not pairs, labels are out of range, or a `ModelCheckpoint` is to save
                more than weights.
        """
        x = self._dataset(x)
        if validation_data is not None:
            validation_data = self._dataset(validation_data)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        if any(isinstance(c, keras.callbacks.ModelCheckpoint) and not c.save_weights_only for c in callbacks):
            raise ValueError(f"ModelCheckpoint must have save_weights_only=True. {_SAVE_RULE}")
        # First in the list, so that what another one restores is not touched.
        callbacks.insert(0, _SkipGuard())
        kwargs.setdefault("shuffle", False)  # A data set shuffles itself; Keras warns where it is asked to.
        self.problem.raise_if_model_changed()
        with clear_errors():
            return super().fit(x, callbacks=callbacks, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, **kwargs):
        """The outer loss and metrics with the current outer variables; nothing is updated.

        Each element's inner batches train the inner variables from their initial state before the outer batch is
        evaluated. Online, the outer batch is evaluated at the state kept, and the inner batches are not used.

        Args:
            x: As for `fit`.
            **kwargs: `verbose`, `return_dict`, `steps`, ... of `keras.Model.evaluate`.

        Returns:
            As `keras.Model.evaluate`.
        """
        self.problem.raise_if_model_changed()
        with clear_errors():
            return super().evaluate(self._dataset(x), **kwargs)

    def step(self, inner_batches, outer_batch):
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
        self.problem.raise_if_model_changed()
        if self._step_function is None:
            self._step_function = self._compiled(self._hyper_iteration)
        with clear_errors():
            result = self._step_function(as_inner_batches(inner_batches), as_tensors(outer_batch))
        self.raise_if_diverged()
        return result

    def train_inner(self, inner_batches):
        """Trains the inner variables with the current outer variables and keeps the result in the model.

        Args:
            inner_batches: T inner batches.

        Returns:
            Tensor [T], the inner objective before each step.
        """
        self.problem.raise_if_model_changed()
        if self._inner_function is None:
            self._inner_function = self._compiled(self._train_inner)
        with clear_errors():
            return self._inner_function(as_inner_batches(inner_batches))

    def train_step(self, data):
        inner_batches, outer_batch = self._hyper_iteration_data(data, training=True)
        result = self._hyper_iteration(inner_batches, outer_batch)
        self._inner_loss.update_state(result.inner_losses[..., -1])
        return self._logs(result.outer_loss, result.state, outer_batch)

    def test_step(self, data):
        inner_batches, outer_batch = self._hyper_iteration_data(data)
        if self.online:
            state = self._kept_state()
            loss = self.problem.outer_loss(state, self.problem.outer_values(), outer_batch)
            return self._logs(loss, state, outer_batch)
        evaluation = self.hypergradient.evaluate(self.problem, inner_batches, outer_batch)
        self._inner_loss.update_state(evaluation.inner_losses[..., -1])
        return self._logs(evaluation.outer_loss, evaluation.state, outer_batch)

    def raise_if_diverged(self):
        """Raises a RuntimeError that says what diverged if too many updates in a row were skipped."""
        in_a_row = int(self._skipped_in_a_row.numpy())
        if in_a_row < self.max_skipped_updates:
            return
        inner, outer, memory, *gradients = (bool(flag) for flag in self._not_finite.numpy())
        names = variable_names([v for v, bad in zip(self._outer, gradients) if bad])
        causes = ["the inner objective"] * inner + ["the outer objective"] * outer
        causes += ["the inner state that is carried on"] * memory
        causes += [f"the hypergradients of {names}"] if names else []
        places = [f"{place_in_words(place)} of the {which}" for which, place in zip(
            ("inner batches", "outer batch"), self._not_finite_data.numpy()) if place[0]]
        advice = f"The data hold NaN or infinity, in {' and in '.join(places)}: mend them." if places else _ADVICE
        raise RuntimeError(
            f"Training stopped: {in_a_row} updates in a row were skipped because a value was not finite. At the last "
            f"one: {', '.join(causes)}. {advice}")

    def start_counting_skips(self):
        """Starts the count of updates skipped in a row anew, so that a run goes on after a cause was removed."""
        self._skipped_in_a_row.assign(0)

    def reset_inner_state(self):
        """Starts the optimizer's slots, the step count and the carried memory anew; variables stay as they are."""
        initial = self.problem.initial_state()
        kept = self._slots + self._carry
        fresh = tf.nest.flatten([initial.slots, initial.step]) if self.online else []
        if self._keeps_carry:
            fresh = fresh + tf.nest.flatten(self.hypergradient.initial_carry(self.problem))
        for variable, value in zip(kept, fresh):
            variable.assign(value)

    def save(self, *args, **kwargs):
        raise ValueError(_SAVE_RULE)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # Keras keeps variables by their position alone.
        store[_NAMES] = np.frombuffer("\n".join(self._names()).encode(), "uint8")

    def load_own_variables(self, store):
        held = {key: store[key] for key in store.keys()}
        names = bytes(np.asarray(held.pop(_NAMES, []), "uint8")).decode().split("\n")
        if names != [""] and names != self._names():
            raise ValueError("Weights must be loaded into a problem with the same outer variables in the same order. "
                             f"Received weights of {names} for the outer variables {self._names()}.")
        super().load_own_variables(held)

    def _names(self):
        return [variable.name for variable in self._outer]

    def _hyper_iteration_data(self, data, training=False):
        """(inner_batches, outer_batch) of an element of the data set."""
        del training
        return pair(data)

    def _hyper_iteration(self, inner_batches, outer_batch):
        state = self._kept_state() if self.online else None
        carry = self._kept_carry() if self._keeps_carry else None
        result = self.hypergradient.compute(self.problem, inner_batches, outer_batch, state=state, carry=carry)
        kept = list(zip(self._carry, tf.nest.flatten(result.carry)))
        if self.online:
            kept += zip(self._inner + self._slots, tf.nest.flatten(
                [result.state.variables, result.state.state_variables, result.state.slots, result.state.step]))
        flags = [tf.logical_not(tree.is_finite(part)) for part in [
            result.inner_losses, result.outer_loss, [leaf for _, leaf in kept], *result.gradients]]
        flags = tf.cast(tf.stack(flags), tf.int32)
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:
            if self.online:
                raise ValueError("online=True keeps one inner state and needs one replica. Received a strategy with "
                                 f"{context.num_replicas_in_sync} replicas.")
            flags = context.all_reduce(tf.distribute.ReduceOp.SUM, flags)
        # A diverged inner loss with a finite hypergradient is a diverged run all the same.
        finite = tf.reduce_all(flags == 0)
        self._update(finite, result.gradients, context)
        for variable, value in kept:
            variable.assign(tf.where(finite, value, tf.convert_to_tensor(variable)))
        skipped = tf.cast(tf.logical_not(finite), tf.int32)
        self._skipped.assign(tf.convert_to_tensor(self._skipped) + skipped)
        self._skipped_in_a_row.assign((tf.convert_to_tensor(self._skipped_in_a_row) + skipped) * skipped)
        self._not_finite.assign(tf.cast(flags > 0, tf.int32))
        self._not_finite_data.assign(tf.cond(
            finite, lambda: tf.zeros([2, 3], tf.int32),
            lambda: tf.cast(tf.stack([first_not_finite(inner_batches), first_not_finite(outer_batch)]), tf.int32)))
        return result

    def _update(self, finite, gradients, context):
        """Applies the hypergradients if they are finite. Over replicas the optimizer adds them up: hence the mean."""
        replicas = context.num_replicas_in_sync
        if replicas == 1:
            tf.cond(finite, lambda: self._apply(gradients), lambda: tf.no_op())
            return
        gradients = [gradient / replicas for gradient in gradients]

        def across_replicas(strategy, finite, gradients):
            # A condition may not hold a call that merges replicas, so the merge comes first and splits again inside.
            def apply():
                strategy.extended.call_for_each_replica(self._apply, args=(gradients,))
                return tf.no_op()

            return tf.cond(strategy.experimental_local_results(finite)[0], apply, lambda: tf.no_op())

        context.merge_call(across_replicas, args=(finite, gradients))

    def _apply(self, gradients):
        self.optimizer.apply(gradients, self._outer)
        return tf.no_op()

    def _train_inner(self, inner_batches):
        training = InnerTraining(self.problem, inner_batches, self._kept_state() if self.online else None)
        run = training.run()
        finished = self.problem.dynamics.finished(run.state.variables, run.state.slots)
        values = tf.nest.flatten([finished, run.state.state_variables])
        for variable, value in zip(self._inner, values):
            variable.assign(value)
        for variable, value in zip(self._slots, tf.nest.flatten([run.state.slots, run.state.step])):
            variable.assign(value)
        return training.losses(run)

    def _kept_state(self):
        count = len(self.problem.inner_variables)
        values = [tf.convert_to_tensor(variable) for variable in self._inner]
        slots, step = tf.nest.pack_sequence_as(
            self._slot_structure, [tf.convert_to_tensor(variable) for variable in self._slots])
        return InnerState(values[:count], values[count:], slots, step)

    def _kept_carry(self):
        return tf.nest.pack_sequence_as(
            self._carry_structure, [tf.convert_to_tensor(variable) for variable in self._carry])

    def _logs(self, outer_loss, state, outer_batch):
        self._outer_loss.update_state(outer_loss)
        outer_mean = self._outer_loss.result()
        logs = {"loss": outer_mean, "outer_loss": outer_mean, "inner_loss": self._inner_loss.result()}
        if self._compile_metrics is not None:
            targets, predictions, weights = self.hypergradient.predict(self.problem, state, outer_batch)
            values = self.compute_metrics(None, targets, predictions, sample_weight=weights)
            own = {metric.name for metric in (self._outer_loss, self._inner_loss)} | {"loss"}
            logs.update({name: value for name, value in values.items() if name not in own})
        logs.update(log_values(self._log_names))
        logs["skipped_updates"] = tf.convert_to_tensor(self._skipped)
        return logs

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Makes the variables of metrics before training, as a distribution strategy needs it.

        Keras' own way averages the data of all replicas, which makes fractions of indices and labels.
        """
        if self._compile_metrics is None or self._compile_metrics.built or self._distribute_strategy is None:
            return
        strategy = self.distribute_strategy
        batch = next(next(iter(iterator))[2])
        batch = tf.nest.map_structure(lambda leaf: strategy.experimental_local_results(leaf)[0], batch)

        def predictions(inner_batches, outer_batch):
            state = self.hypergradient.evaluate(self.problem, inner_batches, outer_batch).state
            return self.hypergradient.predict(self.problem, state, outer_batch)

        # Traced for its shapes and never run.
        traced = tf.function(predictions, autograph=False).get_concrete_function(*self._hyper_iteration_data(batch))
        targets, outputs, _ = traced.structured_outputs
        with strategy.scope():
            self._compile_metrics.build(
                *(keras.KerasTensor(part.shape, part.dtype.name) for part in (targets, outputs)))

    def _compiled(self, function, **options):
        if self.run_eagerly:
            return function
        # Before compile() Keras would choose XLA by itself.
        return tf.function(
            function, autograph=False, jit_compile=self.compiled and bool(self.jit_compile), **options)

    def _dataset(self, x):
        return as_hyper_iterations(x, self.distribute_strategy)


class _SkipGuard(keras.callbacks.Callback):
    """Ends `fit` with an error when updates keep being skipped."""

    def on_train_begin(self, logs=None):
        self.model.start_counting_skips()

    def on_train_batch_end(self, batch, logs=None):
        self.model.raise_if_diverged()


class clear_errors:
    """Turns the assertion on labels inside a graph into the ValueError that it would be outside."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, tf.errors.InvalidArgumentError) and LABEL_RULE in str(error):
            message = str(error)
            raise ValueError(message[message.index(LABEL_RULE):].splitlines()[0]) from error


def _counter(value, name):
    return keras.Variable(value, dtype="int32", trainable=False, name=name, aggregation="only_first_replica")


def _kept(value):
    return keras.Variable(value, dtype=value.dtype.name, trainable=False, aggregation="only_first_replica")

"""What the learners share: episodes as hyper-iterations, adaptation, prediction, evaluation."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.copies import copy_of
from farhox._core.types import Batch, Data, Logs, Loss, Metrics, Optimizer, Tensor
from farhox.data.batches import RepeatedBatch
from farhox.hypergradients.base import HyperGradient
from farhox.meta import episode_checks
from farhox.meta.accuracy import classifies, correct
from farhox.meta.episodes import EpisodeSource, count_episodes, new_episodes_seen
from farhox.meta.evaluation import evaluate_episodes
from farhox.meta.problem import LOSS
from farhox.meta.statistics import support_statistics
from farhox.meta.weights import joined, order_of_present, scaled, weighted_mean, with_both_weights, with_weights
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.episodes import map_episodes, num_episodes
from farhox.problem.inner_training import InnerTraining
from farhox.problem.losses import takes_class_numbers
from farhox.training.errors import graph_calls
from farhox.training.hyper_optimizer import HyperOptimizer


class Learner(HyperOptimizer):
    """A few-shot learner: a Keras model, and initial values or a representation that new tasks start from.

    A learner is a `HyperOptimizer` whose data are episodes: `fit` takes what `EpisodeSource.dataset` returns.

    Args:
        model: A built `keras.Model`.
        problem: The `BilevelProblem` of an episode. Inner batches are (x, y), outer batches ((support x, query x),
            query y). Of episodes with sample weights they are (x, y, weights) and ((support x, query x, support
            weights, query weights), query y, query weights).
        hypergradient: A `HyperGradient` over episodes.
        inner_steps: Positive int, inner steps in training.
        evaluation_steps: Positive int, inner steps in `evaluate`, `predict` and `adapt`. Default: `inner_steps`.
        batch_size: Positive int, support examples in an inner batch: the examples in random order, again and again
            without replacement. Default: all of them in each step.
        transductive: Bool, see `query_call`. Kept for the results of `evaluate`.
        seed: Non-negative int, of the random order.
        loss: The loss of the queries, as for `episode_problem`: for what labels are, and how weights count.
        name: Name of the Keras model.
        support_loss: That of the support set. Default: `loss`.

    Attributes:
        model, problem, inner_steps, evaluation_steps, transductive, support_loss: As given.
        labels_are_class_numbers: Bool; labels are targets like the model's outputs otherwise.
        episodes_seen: Integer `keras.Variable`, the episodes that the learner was trained on, in all replicas: the
            position in a data set that begins at it (`EpisodeSource.dataset(start=)`). Saved with the weights.

    Raises:
        ValueError: If a number is not a positive integer.
    """

    def __init__(self, model: keras.Model, problem: BilevelProblem, hypergradient: HyperGradient, inner_steps: int,
                 evaluation_steps: int | None = None, batch_size: int | None = None, transductive: bool = True,
                 seed: int = 0, loss: Loss = LOSS, name: str | None = None,
                 support_loss: Loss | None = None) -> None:
        super().__init__(problem, hypergradient, name=name)
        evaluation_steps = inner_steps if evaluation_steps is None else evaluation_steps
        for label, value in (("inner_steps", inner_steps), ("evaluation_steps", evaluation_steps),
                             ("batch_size", 1 if batch_size is None else batch_size)):
            checks.positive_integer(label, value)
        self.model = model
        self.inner_steps, self.evaluation_steps = int(inner_steps), int(evaluation_steps)
        self.batch_size = batch_size
        self.transductive = bool(transductive)
        self.seed = checks.non_negative_integer("seed", seed)
        self.labels_are_class_numbers = takes_class_numbers(loss)
        self._loss = loss
        self.support_loss = loss if support_loss is None else support_loss
        self._sees_queries = False
        self.episodes_seen = new_episodes_seen()
        self._adapt_function: Any = None
        self._predict_function: Any = None
        self._judge_function: Any = None

    def compile(self, optimizer: Optimizer = "adam", metrics: Metrics | None = None,
                jit_compile: bool | str = False, weighted_metrics: Metrics | None = None, **kwargs: Any) -> None:
        """As `HyperOptimizer.compile`; all metrics count a query by its sample weight, if there are weights."""
        super().compile(optimizer, jit_compile=jit_compile, weighted_metrics=joined(metrics, weighted_metrics),
                        **kwargs)
        self._adapt_function = self._predict_function = self._judge_function = None

    def evaluate(self, x: Data = None, episodes: int = 600, meta_batch_size: int = 10, **kwargs: Any) -> Any:
        """Judges the learner by episodes: it adapts to each support set and predicts the query set.

        Args:
            x: An `EpisodeSource`; its first `episodes` episodes are used, the same for every learner. A data set of
                episodes is evaluated as by `keras.Model.evaluate`.
            episodes: Positive int, their number.
            meta_batch_size: Positive int, episodes taken at a time; without influence on the result.
            **kwargs: Of `keras.Model.evaluate`, for a data set.

        Returns:
            Of an `EpisodeSource` a dictionary of "loss" and, of a classifier, "accuracy" (Keras' metric of that name),
            the means over episodes; "loss_interval" and "accuracy_interval", half the width of their 95 % intervals;
            "episodes", and "transductive".
        """
        if not isinstance(x, EpisodeSource):
            return super().evaluate(x, **kwargs)
        if self._judge_function is None:
            self._judge_function = self._compiled(self._judge)
        with graph_calls():
            result = evaluate_episodes(self._judge_function, x, episodes, meta_batch_size)
        return {**result, "transductive": self.transductive}

    def predict(self, support: Batch, query: Batch) -> np.ndarray:
        """Predictions for the query inputs of one episode, after adaptation to its support set.

        Args:
            support: Tuple (x, y) of arrays, or (x, y, sample weights).
            query: Array of inputs.

        Returns:
            Array of predictions, one per query.

        Raises:
            TypeError, ValueError: If support or query are not what the model takes: it is said what is wrong with what.
        """
        support = self._checked_support(support)
        query = _one_episode(episode_checks.as_inputs("query inputs", query, self.model))
        if self._predict_function is None:
            self._predict_function = self._compiled(self.predict_episodes, reduce_retracing=True)
        return self._predict_function(support, query).numpy()[0]

    def predict_episodes(self, support: Batch, query: Batch) -> Tensor:
        """`predict` for several episodes, in pure TensorFlow.

        Args:
            support: Tuple (x, y) of tensors [episodes, support examples, ...], or (x, y, sample weights).
            query: Tensor of inputs [episodes, queries, ...].

        Returns:
            Tensor of predictions [episodes, queries, ...].
        """
        def one(_, inputs, state):
            return self.problem.predict_outer(state, self.problem.outer_values(), (inputs, None))[1]

        inputs = support[0], query
        if len(support) == 3:
            support = with_weights(support)
            leaf = tf.nest.flatten(query)[0]
            inputs += support[2], tf.ones(tf.shape(leaf)[:2], support[2].dtype)
        return map_episodes(one, (), inputs, self._adapted(support)[0], self.problem.parallel_iterations)

    def adapt(self, support: Batch) -> keras.Model:
        """A plain Keras model adapted to a support set.

        Its batch-norm layers hold the statistics of the support set, so that `model(x)` treats each input on its own.

        Args:
            support: Tuple (x, y) of arrays, or (x, y, sample weights).

        Returns:
            A `keras.Model` of the same kind as the learner's, with weights of its own.

        Raises:
            TypeError, ValueError: As `predict`; or if Keras cannot make the model again from its configuration.
        """
        support = self._checked_support(support)
        if self._adapt_function is None:
            self._adapt_function = self._compiled(self._adapted, reduce_retracing=True)
        problem = self.problem
        state = tf.nest.map_structure(lambda leaf: leaf[0], self._adapt_function(support)[0])
        values = {id(variable): variable.value for variable in self.model.variables}
        values.update((id(variable), value) for variable, value in zip(
            problem.inner_variables + problem.state_variables, [*state.variables, *state.state_variables]))
        weights = support[2][0] if len(support) == 3 else None
        values.update(support_statistics(
            self.model, tf.nest.map_structure(lambda leaf: leaf[0], support[0]), values, weights))
        adapted = copy_of(self.model)
        for own, variable in zip(adapted.variables, self.model.variables):
            own.assign(values[id(variable)])
        return adapted

    def _checked_support(self, support):
        """A support set as a meta-batch of one episode."""
        classes = self.model.output_shape[-1] if self.labels_are_class_numbers else None
        loss = keras.losses.get(self._loss) if isinstance(self._loss, str) else self._loss
        ignored = loss.get_config().get("ignore_class") if isinstance(loss, keras.losses.Loss) else None
        return _one_episode(episode_checks.as_support(support, self.model, classes, ignored))

    def raise_if_diverged(self) -> None:
        try:
            super().raise_if_diverged()
        except RuntimeError as error:
            places = self._watch.places_not_finite()
            parts = [self._part_in_words(outer, place) for outer, place in enumerate(places) if place[0]]
            if not parts:
                raise
            raise RuntimeError(f"Episodes must hold finite numbers. Received NaN or infinity in {', '.join(parts)}. "
                               f"{error}") from error

    def _part_in_words(self, outer, place):
        """What an array of the inner batches (0) or of the outer batch (1) is in an episode."""
        number, episode, example = (int(part) for part in place)
        inputs = len(getattr(self.model, "inputs", None) or [None])
        name = "query" if outer and number > inputs else "support"
        what = "inputs" if number <= (1 + outer) * inputs else "labels or weights"
        in_order = outer or self.batch_size is None
        return f"the {name} {what} of episode {episode} of the meta-batch{f', example {example}' if in_order else ''}"

    def _dataset(self, x):
        return super()._dataset(episode_checks.checked_data(x, self.model))

    def _checked_examples(self, data):
        return episode_checks.as_parts(data, self.model)

    def test_step(self, data: Data) -> Logs:
        support, query = self._parts(data)
        states, inner_losses = self._adapted(support)
        self._inner_loss.update_state(inner_losses[..., -1])
        loss = tf.reduce_mean(self._judged(states, support, query)["loss"])
        return self._logs(loss, lambda: self.problem.predictions(states, self._outer_batch(support, query)))

    def _hyper_iteration_data(self, data, training=False):
        support, query = self._parts(data)
        steps = self.inner_steps if training else self.evaluation_steps
        return self._inner_batches(support, steps, training), self._outer_batch(support, query)

    def _parts(self, episodes):
        """Support and query of a meta-batch, checked; with sample weights both or none."""
        support, query = with_both_weights(*episode_checks.as_parts(episodes, self.model))
        if not self._sees_queries:
            episode_checks.check_queries_are_seen(self.problem, self._outer_batch(support, query), query[0])
            self._sees_queries = True
        return support, query

    def _hyper_iteration(self, inner_batches, outer_batch):
        result = super()._hyper_iteration(inner_batches, outer_batch)
        # After the data are drawn: their start may be read from the count, and nothing else orders the two in a graph.
        with tf.control_dependencies([result.outer_loss]):
            count_episodes(self, num_episodes(inner_batches))
        return result

    def _outer_batch(self, support, query):
        """The outer batch of an episode; episodes may have a leading axis."""
        if len(query) == 2:
            return (support[0], query[0]), query[1]
        weights = scaled(query[2], self._loss)
        return (support[0], query[0], support[2], weights), query[1], weights

    def _inner_batches(self, support, steps, training):
        """Inner batches with a leading axis of episodes."""
        weights = support[2] if len(support) == 3 else None
        if self.batch_size is None:
            if weights is not None:
                support = *support[:2], scaled(weights, self.support_loss)
            return RepeatedBatch(tuple(support), tf.range(steps))
        seed = [self.seed, self.optimizer.iterations + 1 if training else 0]
        seed = tf.stack([tf.cast(part, tf.int64) for part in seed])
        if weights is not None:
            places = order_of_present(weights, steps, self.batch_size, seed)
            return tf.nest.map_structure(lambda leaf: _in_batches(
                tf.gather(leaf, places, batch_dims=1), steps, self.batch_size), tuple(support))
        count = support[0].shape[1]
        count = tf.shape(support[0])[1] if count is None else count
        passes = -(-steps * self.batch_size // count)
        keys = tf.random.stateless_uniform([passes, count], seed)
        order = tf.reshape(tf.argsort(keys, stable=True), [-1])[:steps * self.batch_size]
        order = tf.reshape(order, [steps, self.batch_size])
        return tf.nest.map_structure(lambda leaf: tf.gather(leaf, order, axis=1), tuple(support))

    def _initial_state(self):
        """The state that adaptation starts from."""
        return self.problem.initial_state()

    def _adapted(self, support):
        """States after adaptation, with a leading axis of episodes, and the inner losses [episodes, steps]."""
        inner_batches = self._inner_batches(support, self.evaluation_steps, training=False)

        def one(inner_batches, *_):
            training = InnerTraining(self.problem, inner_batches, self._initial_state())
            run = training.run()
            return run.state, training.losses(run)

        return map_episodes(one, inner_batches, (), parallel_iterations=self.problem.parallel_iterations)

    def _judge(self, episodes):
        """Loss and, of a classifier, accuracy of each episode: a dictionary of tensors [episodes]."""
        support, query = self._parts(episodes)
        return self._judged(self._adapted(support)[0], support, query)

    def _judged(self, states, support, query):
        def one(_, batch, state):
            outer = self.problem.outer_values()
            values = {"loss": self.problem.outer_loss(state, outer, batch)}
            targets, predictions, weights = self.problem.predict_outer(state, outer, batch)
            if self._has_accuracy(targets, predictions):
                values["accuracy"] = weighted_mean(correct(targets, predictions), weights)
            return values

        return map_episodes(
            one, (), self._outer_batch(support, query), states, self.problem.parallel_iterations)

    def _has_accuracy(self, targets, predictions):
        """Whether predictions are right or wrong: by a cross-entropy, or by class numbers for several outputs."""
        if isinstance(targets, dict):
            return False
        numbers = targets.dtype.is_integer and targets.shape.rank < predictions.shape.rank
        return classifies(self._loss) or (numbers and predictions.shape[-1] != 1)


def _in_batches(leaf, steps, batch_size):
    """[episodes, steps * batch_size, ...] as [episodes, steps, batch_size, ...]."""
    shape = tf.shape(leaf)
    return tf.reshape(leaf, tf.concat([shape[:1], [steps, batch_size], shape[2:]], axis=0))


def _one_episode(nest):
    return tf.nest.map_structure(lambda leaf: leaf[None], nest)

"""What the learners share: episodes as hyper-iterations, adaptation, prediction, evaluation."""

import keras
import tensorflow as tf

from farhox._core import checks
from farhox.data.batches import RepeatedBatch
from farhox.data.datasets import pair
from farhox.hypergradients.base import new_losses, run_inner, stacked_losses
from farhox.hypergradients.episodes import map_episodes
from farhox.meta.episodes import EpisodeSource
from farhox.meta.evaluation import evaluate_episodes
from farhox.meta.statistics import support_statistics
from farhox.problem.features import with_shared_features
from farhox.problem.supervised import takes_class_numbers
from farhox.training.hyper_optimizer import HyperOptimizer


class Learner(HyperOptimizer):
    """A few-shot learner: a Keras model, and initial values or a representation that new tasks start from.

    A learner is a `HyperOptimizer` whose data are episodes: `fit` takes what `EpisodeSource.dataset` returns.

    Args:
        model: A built `keras.Model`.
        problem: The `BilevelProblem` of an episode. Outer batches are ((support x, query x), query y).
        hypergradient: A `HyperGradient` over episodes.
        inner_steps: Positive int, inner steps in training.
        evaluation_steps: Positive int, inner steps in `evaluate`, `predict` and `adapt`. Default: `inner_steps`.
        batch_size: Positive int, support examples in an inner batch: the examples in random order, again and again
            without replacement. Default: all of them in each step.
        transductive: Bool, see `query_call`. Kept for the results of `evaluate`.
        seed: Int, of the random order.
        loss: The loss of an episode, as for `supervised_problem`; for what labels are.
        name: Name of the Keras model.

    Attributes:
        model, problem, inner_steps, evaluation_steps, transductive: As given.
        labels_are_class_numbers: Bool; labels are targets like the model's outputs otherwise.

    Raises:
        ValueError: If a number is not a positive integer.
    """

    def __init__(self, model, problem, hypergradient, inner_steps, evaluation_steps=None, batch_size=None,
                 transductive=True, seed=0, loss="sparse_categorical_crossentropy", name=None):
        super().__init__(problem, hypergradient, name=name)
        evaluation_steps = inner_steps if evaluation_steps is None else evaluation_steps
        for label, value in (("inner_steps", inner_steps), ("evaluation_steps", evaluation_steps),
                             ("batch_size", 1 if batch_size is None else batch_size)):
            checks.positive_integer(label, value)
        self.model = model
        self.inner_steps, self.evaluation_steps = int(inner_steps), int(evaluation_steps)
        self.batch_size = batch_size
        self.transductive = bool(transductive)
        self.seed = int(seed)
        self.labels_are_class_numbers = takes_class_numbers(loss)
        self._adapt_function = self._predict_function = self._judge_function = None

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        self._adapt_function = self._predict_function = self._judge_function = None

    def evaluate(self, x=None, episodes=600, meta_batch_size=10, **kwargs):
        """Judges the learner by episodes: it adapts to each support set and predicts the query set.

        Args:
            x: An `EpisodeSource`; its first `episodes` episodes are used, the same for every learner. A data set of
                episodes is evaluated as by `keras.Model.evaluate`.
            episodes: Positive int, their number.
            meta_batch_size: Positive int, episodes taken at a time; without influence on the result.
            **kwargs: Of `keras.Model.evaluate`, for a data set.

        Returns:
            Of an `EpisodeSource`, a dictionary: "loss" and, where labels are integers, "accuracy", the means over
            episodes; "loss_interval" and "accuracy_interval", half the width of their 95 % intervals; "episodes", and
            "transductive".
        """
        if not isinstance(x, EpisodeSource):
            return super().evaluate(x, **kwargs)
        if self._judge_function is None:
            self._judge_function = self._compiled(self._judge)
        result = evaluate_episodes(self._judge_function, x, episodes, meta_batch_size)
        return {**result, "transductive": self.transductive}

    def predict(self, support, query):
        """Predictions for the query inputs of one episode, after adaptation to its support set.

        Args:
            support: Tuple (x, y) of arrays.
            query: Array of inputs.

        Returns:
            Array of predictions, one per query.
        """
        support = tf.nest.map_structure(lambda leaf: tf.convert_to_tensor(leaf)[None], tuple(support))
        query = tf.convert_to_tensor(query)[None]
        if self._predict_function is None:
            self._predict_function = self._compiled(self.predict_episodes, reduce_retracing=True)
        return self._predict_function(support, query).numpy()[0]

    def predict_episodes(self, support, query):
        """`predict` for several episodes, in pure TensorFlow.

        Args:
            support: Tuple (x, y) of tensors [episodes, support examples, ...].
            query: Tensor of inputs [episodes, queries, ...].

        Returns:
            Tensor of predictions [episodes, queries, ...].
        """
        def one(_, inputs, state):
            return self.problem.predict_outer(state, self.problem.outer_values(), (inputs, None))[1]

        return map_episodes(one, (), (support[0], query), self._adapted(support)[0])

    def adapt(self, support):
        """A plain Keras model adapted to a support set.

        Its batch-norm layers hold the statistics of the support set, so that `model(x)` treats each input on its own.

        Args:
            support: Tuple (x, y) of arrays.

        Returns:
            A `keras.Model` of the same kind as the learner's, with weights of its own.
        """
        support = tf.nest.map_structure(lambda leaf: tf.convert_to_tensor(leaf)[None], tuple(support))
        if self._adapt_function is None:
            self._adapt_function = self._compiled(self._adapted, reduce_retracing=True)
        problem = self.problem
        state = tf.nest.map_structure(lambda leaf: leaf[0], self._adapt_function(support)[0])
        values = {id(variable): variable.value for variable in self.model.variables}
        values.update((id(variable), value) for variable, value in zip(problem.inner_variables, state.variables))
        values.update(support_statistics(self.model, support[0][0], values))
        adapted = keras.models.clone_model(self.model)
        for own, variable in zip(adapted.variables, self.model.variables):
            own.assign(values[id(variable)])
        return adapted

    def test_step(self, data):
        support, query = pair(data)
        states, inner_losses = self._adapted(support)
        self._inner_loss.update_state(inner_losses[..., -1])
        loss = tf.reduce_mean(self._judged(states, support, query)["loss"])
        return self._logs(loss, states, self._outer_batch(support, query))

    def _hyper_iteration_data(self, data, training=False):
        support, query = pair(data)
        steps = self.inner_steps if training else self.evaluation_steps
        return self._inner_batches(support, steps, training), self._outer_batch(support, query)

    def _outer_batch(self, support, query):
        """The outer batch of an episode; episodes may have a leading axis."""
        return (support[0], query[0]), query[1]

    def _inner_batches(self, support, steps, training):
        """Inner batches with a leading axis of episodes."""
        if self.batch_size is None:
            return RepeatedBatch(tuple(support), tf.range(steps))
        count = support[0].shape[1]
        count = tf.shape(support[0])[1] if count is None else count
        passes = -(-steps * self.batch_size // count)
        seed = [self.seed, self.optimizer.iterations + 1 if training else 0]
        keys = tf.random.stateless_uniform([passes, count], tf.stack([tf.cast(part, tf.int64) for part in seed]))
        order = tf.reshape(tf.argsort(keys, stable=True), [-1])[:steps * self.batch_size]
        order = tf.reshape(order, [steps, self.batch_size])
        return tf.nest.map_structure(lambda leaf: tf.gather(leaf, order, axis=1), tuple(support))

    def _initial_state(self):
        """The state that adaptation starts from."""
        return self.problem.initial_state()

    def _adapted(self, support):
        """States after adaptation, with a leading axis of episodes, and the inner losses [episodes, steps]."""
        inner_batches = self._inner_batches(support, self.evaluation_steps, training=False)
        steps = self.evaluation_steps

        def one(inner_batches, *_):
            problem = with_shared_features(self.problem, inner_batches)
            run = run_inner(problem, self._initial_state(), problem.outer_values(), inner_batches, 0, steps,
                            new_losses(problem, steps))
            return run.state, stacked_losses(problem, run)

        return map_episodes(one, inner_batches, ())

    def _judge(self, episodes):
        """Loss and, where labels are integers, accuracy of each episode: a dictionary of tensors [episodes]."""
        return self._judged(self._adapted(episodes.support)[0], *episodes)

    def _judged(self, states, support, query):
        def one(_, batch, state):
            outer = self.problem.outer_values()
            values = {"loss": self.problem.outer_loss(state, outer, batch)}
            targets, predictions, _ = self.problem.predict_outer(state, outer, batch)
            if targets.dtype.is_integer:
                values["accuracy"] = tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(targets, predictions))
            return values

        return map_episodes(one, (), ((support[0], query[0]), query[1]), states)

"""The workloads of the benchmarks of hypergradients, the training alone beside each, and the measurement of a pair.

`benchmark_hypergradients.py` says what they are.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import farhox
from farhox.hypergradients import EpisodesHG
from farhox import meta
from farhox.data.batches import RepeatedBatch, batch_at, num_steps

from _shared.measuring import forget_peak_memory, peak_memory, timed

METHODS = {
    "reverse": farhox.ReverseHG(),
    "reverse_sqrt": farhox.ReverseHG(checkpoint_every="sqrt"),
    "forward": farhox.ForwardHG(),
    # A tolerance that is never reached: always ten products.
    "implicit": farhox.ImplicitHG(farhox.linear_solvers.ConjugateGradient(max_steps=10, tolerance=0.0)),
    "maml": EpisodesHG(farhox.ReverseHG()),
    "fomaml": EpisodesHG(farhox.ReverseHG()),
    "hyper_representation": EpisodesHG(farhox.ReverseHG()),
    "imaml": EpisodesHG(farhox.ImplicitHG(farhox.linear_solvers.ConjugateGradient(max_steps=5, tolerance=0.0))),
}


class Workload(NamedTuple):
    """What one workload is made of.

    Attributes:
        problem: A `BilevelProblem`.
        inner_batches: Callable, T to inner batches.
        outer_batch: The batch of the outer objective.
        plain_step: Callable `variables, slots, batch -> variables, slots`: the same inner step without farhox.
        warm_up_steps: Plain steps to take before anything is measured.
        plain_loss: Callable `variables, outer_batch -> scalar`, the outer objective without farhox, where batches have
            a leading axis of episodes; else None.
        plain_features: Callable, inner batch to what `plain_step` is given in its place, computed once; or None.
        learning_rate: That of the inner steps where it is a fixed number; else None.
    """

    problem: Any
    inner_batches: Callable
    outer_batch: Any
    plain_step: Callable
    warm_up_steps: int = 0
    plain_loss: Any = None
    plain_features: Any = None
    learning_rate: float | None = None


def made(workload, method, quick):
    """The `Workload` of a name; of W3 the learner is that of the method."""
    if workload == "W3":
        return few_shot_learner(quick, method)
    return {"W1": softmax_regression, "W2": tanh_network, "W4": near_optimum}[workload](quick)


def arguments_of(task, steps):
    """What a hypergradient of a workload is computed from: inner batches, outer batch, and a state unless it is Φ_0."""
    state = (warmed_up(task),) if task.warm_up_steps else ()
    return task.inner_batches(steps), task.outer_batch, *state


def measured(task, compute, arguments, repeats):
    """CPU seconds and memory of a hypergradient and of the training alone, in this process.

    Args:
        task: A `Workload`.
        compute: Callable `problem, *arguments -> hypergradient`.
        arguments: Those of `arguments_of`.
        repeats: Positive int, timed computations.

    Returns:
        Dictionary of the measurements, and the traced function of the arguments that computes the hypergradient.
    """
    problem = task.problem
    forget_peak_memory()
    idle = peak_memory()
    start = time.process_time()
    hypergradient = tf.function(lambda *arguments: compute(problem, *arguments), autograph=False)
    hypergradient = hypergradient.get_concrete_function(*arguments)
    tracing = time.process_time() - start
    first_call = timed(hypergradient, arguments)
    grown = peak_memory()

    plain_run = plain_training if task.plain_loss is None else plain_episodes
    plain = tf.function(lambda *arguments: plain_run(task, *arguments), autograph=False)
    plain = plain.get_concrete_function(*arguments)
    timed(plain, arguments)
    # One after the other in turn, so that a machine that slows down slows both.
    times = [(timed(hypergradient, arguments), timed(plain, arguments)) for _ in range(repeats)]
    grown = max(grown, peak_memory())
    seconds, plain_seconds = (statistics.median(column) for column in zip(*times))
    return dict(
        hypergradient_s=seconds, plain_s=plain_seconds, over_plain=seconds / plain_seconds, tracing_s=tracing,
        first_call_s=max(first_call - seconds, 0.0), growth_mb=(grown - idle) / 1024, peak_mb=grown / 1024,
        state_mb=state_megabytes(problem), repeats=repeats), hypergradient


def state_megabytes(problem):
    """Size of one inner state."""
    leaves = tf.nest.flatten(problem.initial_state())
    return sum(leaf.dtype.size * leaf.shape.num_elements() for leaf in leaves) / 2**20


# The competitors: plain training, and the tape that records every step.


def plain_training(task, inner_batches, outer_batch=None, state=None):
    """The inner training alone: a loop over the hand-written step."""
    del outer_batch
    state = task.problem.initial_state() if state is None else state

    def body(t, variables, slots):
        return t + 1, *task.plain_step(variables, slots, batch_at(inner_batches, t))

    return tf.while_loop(lambda t, *_: t < num_steps(inner_batches), body,
                         [tf.constant(0), state.variables, state.slots], parallel_iterations=1)[1]


def plain_episodes(task, inner_batches, outer_batch):
    """The inner training of each episode and its outer objective: a tensor [episodes]."""
    steps = num_steps(inner_batches)

    def one(episode):
        batch = episode[0] if task.plain_features is None else task.plain_features(episode[0])
        variables = plain_training(task, farhox.repeat(batch, steps))
        return task.plain_loss(variables, episode[1])

    return tf.map_fn(one, (inner_batches.batch, outer_batch), fn_output_signature=tf.float32, parallel_iterations=1)


def unrolled(problem, inner_batches, outer_batch, state=None):
    """The hypergradient with all steps written out under one tape."""
    outer = problem.outer_values()
    with tf.GradientTape() as tape:
        tape.watch(outer)
        state = problem.initial_state(outer) if state is None else state
        for t in range(num_steps(inner_batches)):
            state = problem.step(state, outer, batch_at(inner_batches, t)).state
        loss = problem.outer_loss(state, outer, outer_batch)
    return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, outer)], loss


# The workloads.


def softmax_regression(quick):
    """W1."""
    examples, features, classes = (60, 8, 3) if quick else (2000, 784, 10)
    x, y = synthetic_data(2 * examples, features, classes)
    model = network([features, classes])
    learning_rate = farhox.Hyperparameter(0.1, low=0.0, log=True, name="learning_rate")
    weights = farhox.ExampleWeights(examples)
    problem = farhox.supervised_problem(
        model, cross_entropy(), farhox.GradientDescent(learning_rate), outer_variables=[learning_rate],
        example_weights=weights)

    def plain_step(variables, slots, batch):
        gradients = plain_gradients(variables, batch, weights=weights.natural_value())
        return [w - 0.1 * g for w, g in zip(variables, gradients)], slots

    batch = (x[:examples], y[:examples], np.arange(examples))
    return Workload(problem, lambda steps: farhox.repeat(batch, steps), (x[examples:], y[examples:]), plain_step)


def tanh_network(quick):
    """W2."""
    examples, batch_size, widths = (60, 10, [8, 6, 6, 3]) if quick else (2000, 100, [784, 256, 256, 10])
    x, y = synthetic_data(examples + batch_size, widths[0], widths[-1])
    learning_rate = farhox.Hyperparameter(0.05, low=0.0, log=True, name="learning_rate")
    momentum = farhox.Hyperparameter(0.9, low=0.0, high=1.0, name="momentum")
    strengths = [farhox.Hyperparameter(1e-4, low=0.0, log=True, name=f"l2_{i}") for i in range(len(widths) - 1)]
    problem = farhox.supervised_problem(
        network(widths, strengths), cross_entropy(), farhox.Momentum(learning_rate, momentum),
        outer_variables=[learning_rate, momentum, *strengths])

    def plain_step(variables, slots, batch):
        gradients = plain_gradients(variables, batch, strength=1e-4)
        slots = [0.9 * m + g for m, g in zip(slots, gradients)]
        return [w - 0.05 * m for w, m in zip(variables, slots)], slots

    data = (tf.constant(x[:examples]), tf.constant(y[:examples]))
    draws = np.random.default_rng(1)
    return Workload(
        problem, lambda steps: farhox.gather(data, draws.integers(examples, size=[steps, batch_size])),
        (x[examples:], y[examples:]), plain_step)


def few_shot_learner(quick, method):
    """W3."""
    episodes, ways, queries, filters = (2, 3, 2, 4) if quick else (4, 5, 15, 64)
    keras.utils.set_random_seed(0)
    body = meta.convolutional_body(filters=filters)
    rate = 0.01
    if method == "hyper_representation":
        learner = meta.HyperRepresentation(body, keras.layers.Dense(ways, "softmax"), rate)
    elif method == "imaml":
        learner = meta.IMAML(meta.few_shot_classifier(ways, body), rate)
    else:
        learner = meta.MAML(meta.few_shot_classifier(ways, body), rate, first_order=method == "fomaml")
    draws = np.random.default_rng(0)

    def examples(count):
        labels = np.tile(np.repeat(np.arange(ways), count), (episodes, 1))
        return draws.random((*labels.shape, 28, 28, 1), "float32"), labels

    support, query = examples(1), examples(queries)
    # Of the hyper-representation the head alone is inner.
    fixed = [variable.value for variable in body.trainable_variables] if method == "hyper_representation" else []

    def plain_loss(variables, images, labels):
        return plain_cross_entropy(variables[-2:], plain_body(fixed + variables[:-2], images), labels)

    def plain_step(variables, slots, batch):
        with tf.GradientTape() as tape:
            tape.watch(variables)
            loss = plain_cross_entropy(variables, *batch) if fixed else plain_loss(variables, *batch)
            if method == "imaml":
                anchors = [variable.value for variable in learner.problem.inner_variables]
                loss += 2.0 / 2 * tf.add_n([tf.reduce_sum((w - a) ** 2) for w, a in zip(variables, anchors)])
        return [w - rate * g for w, g in zip(variables, tape.gradient(loss, variables))], slots

    # As Learner makes the data of an episode: queries are normalised together.
    return Workload(
        learner.problem, lambda steps: RepeatedBatch(tf.nest.map_structure(tf.constant, support), tf.range(steps)),
        ((support[0], query[0]), query[1]), plain_step,
        plain_loss=lambda variables, batch: plain_loss(variables, batch[0][1], batch[1]),
        plain_features=(lambda batch: (plain_body(fixed, batch[0]), batch[1])) if fixed else None,
        learning_rate=rate)


def plain_body(variables, images):
    """`meta.convolutional_body` with batch statistics, without Keras."""
    values = images
    for kernel, bias, scale, offset in zip(*(variables[i::4] for i in range(4))):
        values = tf.nn.conv2d(values, kernel, 2, "SAME") + bias
        mean, variance = tf.nn.moments(values, [0, 1, 2])
        values = tf.nn.relu(tf.nn.batch_normalization(values, mean, variance, offset, scale, 1e-3))
    return tf.reshape(values, [tf.shape(values)[0], -1])


def plain_cross_entropy(head, values, labels):
    """The cross-entropy of a linear layer, without Keras."""
    logits = tf.matmul(values, head[0]) + head[1]
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def near_optimum(quick):
    """W4."""
    examples, features, classes = (60, 8, 3) if quick else (2000, 784, 10)
    # Just within stability. The small features of --quick are longer in each direction.
    learning_rate = 1.0 if quick else 10.0
    x, y = synthetic_data(2 * examples, features, classes)
    strength = farhox.Hyperparameter(0.01, low=0.0, log=True, name="l2")
    weights = farhox.ExampleWeights(examples)
    problem = farhox.supervised_problem(
        network([features, classes], [strength]), cross_entropy(), farhox.GradientDescent(learning_rate),
        outer_variables=[strength], example_weights=weights)

    def plain_step(variables, slots, batch):
        gradients = plain_gradients(variables, batch, weights=weights.natural_value(), strength=0.01)
        return [w - learning_rate * g for w, g in zip(variables, gradients)], slots

    batch = (x[:examples], y[:examples], np.arange(examples))
    return Workload(problem, lambda steps: farhox.repeat(batch, steps), (x[examples:], y[examples:]), plain_step,
                    warm_up_steps=20 if quick else 300, learning_rate=learning_rate)


def warmed_up(task):
    """The inner state after the task's warm-up steps."""
    batches = task.inner_batches(task.warm_up_steps)
    variables = tf.function(lambda batches: plain_training(task, batches), autograph=False)(batches)
    return task.problem.initial_state()._replace(variables=list(variables))


def synthetic_data(examples, features, classes):
    """Normal inputs of about length 3 and the labels that a random linear map gives them."""
    draws = np.random.default_rng(0)
    x = draws.normal(size=[examples, features]).astype("float32") * np.float32(3.0 / features**0.5)
    return x, np.argmax(x @ draws.normal(size=[features, classes]), axis=1)


def network(widths, strengths=None):
    """A dense Keras network: tanh layers and a linear one, with L2 strengths for their kernels."""
    keras.utils.set_random_seed(0)
    strengths = strengths or [None] * (len(widths) - 1)
    return keras.Sequential([keras.Input([widths[0]])] + [
        keras.layers.Dense(width, activation="tanh" if i < len(widths) - 2 else None,
                           kernel_regularizer=None if strength is None else farhox.L1L2(l2=strength))
        for i, (width, strength) in enumerate(zip(widths[1:], strengths))])


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def plain_gradients(variables, batch, weights=None, strength=None):
    """The inner gradient of `network`, without Keras."""
    with tf.GradientTape() as tape:
        tape.watch(variables)
        values = batch[0]
        for i in range(0, len(variables), 2):
            values = tf.matmul(values if i == 0 else tf.tanh(values), variables[i]) + variables[i + 1]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], values)
        loss = tf.reduce_mean(losses if weights is None else weights * losses)
        if strength is not None:
            loss += strength * tf.add_n([tf.reduce_sum(tf.square(kernel)) for kernel in variables[::2]])
    return tape.gradient(loss, variables)

r"""Time and memory of a hypergradient beside plain training, for every method and several numbers of inner steps.

    python scripts/benchmarks/benchmark_hypergradients.py --quick
    python scripts/benchmarks/benchmark_hypergradients.py --workloads=W1,W2,W4 \
        --steps=10,100,1000 --json=benchmark.json
    python scripts/benchmarks/benchmark_hypergradients.py --workloads=W3 \
        --steps=5,16,256 --json=meta_learning.json

Workloads, on synthetic data in float32:

- W1: softmax regression 2000 x 784 x 10, full-batch gradient descent; outer: the examples' weights, the learning rate.
- W2: 784-256-256-10 tanh network, batches of 100, momentum; outer: learning rate, momentum, L2 strength of each layer.
- W3: a meta-step of four 5-way 1-shot episodes with 15 queries a class, 28 x 28 images, four convolutions of 64 filters
  with batch normalisation, full-batch gradient descent; outer: the initial weights.
- W4: W1's model with L2 penalty, near its optimum, 10 conjugate-gradient steps; outer: examples' weights, L2 strength.

Methods: `reverse`, `reverse_sqrt` (checkpoint_every="sqrt"), `forward` (W2 has five scalars), `implicit` (W4), and
`naive`: the steps written out in Python under one tape, up to T=100. Of W3: `maml`, `fomaml`, `imaml` with five
steps of conjugate gradient, and `hyper_representation`, whose inner steps train the last layer alone; the plain loop
computes what it is trained on once, too.

Each case runs in a process of its own. Times are medians of CPU seconds, which other programs disturb little; plain
training is a hand-written TensorFlow loop over the same steps without derivatives, on W3 over the episodes with the
outer objective of each. `first_call_s` is what the first
call takes beyond a later one: TensorFlow optimizes the graph and asks for memory. `growth_mb` is the peak of resident
memory, tracing included, above that of the process with its data and its model, `peak_mb` the peak of all.
"""

import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program
from _shared.measuring import forget_peak_memory, peak_memory, timed

METHODS = {"W1": ["reverse", "reverse_sqrt", "naive"], "W2": ["reverse", "reverse_sqrt", "forward", "naive"],
           "W3": ["maml", "fomaml", "imaml", "hyper_representation"], "W4": ["implicit", "naive"]}
# Tracing steps that are written out takes minutes beyond this.
NAIVE_MAX_STEPS = 100
COLUMNS = [("workload", "{}"), ("method", "{}"), ("steps", "{}"), ("hypergradient_s", "{:.4f}"),
           ("plain_s", "{:.4f}"), ("over_plain", "{:.2f}"), ("tracing_s", "{:.2f}"), ("first_call_s", "{:.2f}"),
           ("growth_mb", "{:.0f}"), ("peak_mb", "{:.0f}")]


def define_flags():
    program.define_names("workloads", ["W1", "W2", "W4"], list(METHODS), "Workloads to run.")
    flags.DEFINE_list("steps", None, "Numbers of inner steps T. Default: 10,100,1000, with --quick 2,5.")
    methods = sorted({method for of_workload in METHODS.values() for method in of_workload})
    program.define_names("methods", None, methods, "Methods to run. Default: all that a workload has.")
    flags.DEFINE_integer("repeats", None, "Timed computations per case. Default: 3 to 15, fewer for more steps.",
                         lower_bound=1)
    cases.define_flags("Tiny sizes: shows in seconds that everything runs; the numbers mean nothing.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import keras
import numpy as np
import tensorflow as tf

import farhox
from farhox.hypergradients import EpisodesHG
from farhox import meta
from farhox.data.batches import RepeatedBatch, batch_at, num_steps

HYPERGRADIENTS = {
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
    """

    problem: Any
    inner_batches: Callable
    outer_batch: Any
    plain_step: Callable
    warm_up_steps: int = 0
    plain_loss: Any = None
    plain_features: Any = None


def main(_):
    options = flags.FLAGS
    if cases.is_measured_here(measure):
        return
    chosen = chosen_cases(options.workloads, options.methods, options.steps, options.quick)
    rows = [cases.measured(__file__, f"[{i}/{len(chosen)}] {case['workload']} {case['method']} T={case['steps']}",
                           **case, repeats=options.repeats) for i, case in enumerate(chosen, start=1)]
    print(cases.table(rows, COLUMNS))
    cases.write(rows)


def chosen_cases(workloads, methods, steps, quick):
    """The cases of the flags' values as dictionaries."""
    steps = [int(t) for t in steps or (["2", "5"] if quick else ["10", "100", "1000"])]
    return [dict(workload=workload, method=method, steps=t, quick=quick)
            for workload in workloads for t in steps for method in METHODS[workload]
            if (methods is None or method in methods) and (method != "naive" or t <= NAIVE_MAX_STEPS)]


def measure(workload, method, steps, quick, repeats):
    """Measures one case in this process: a dictionary with the columns of the table."""
    task = {"W1": softmax_regression, "W2": tanh_network, "W4": near_optimum}[workload](quick) if (
        workload != "W3") else few_shot_learner(quick, method)
    problem = task.problem
    inner_batches = task.inner_batches(steps)
    state = warmed_up(task) if task.warm_up_steps else None

    arguments = (inner_batches, task.outer_batch) + (() if state is None else (state,))

    forget_peak_memory()
    idle = peak_memory()
    start = time.process_time()
    compute = unrolled if method == "naive" else HYPERGRADIENTS[method].compute
    hypergradient = tf.function(lambda *arguments: compute(problem, *arguments), autograph=False)
    hypergradient = hypergradient.get_concrete_function(*arguments)
    tracing = time.process_time() - start
    first_call = timed(hypergradient, arguments)
    grown = peak_memory()

    plain_run = plain_training if task.plain_loss is None else plain_episodes
    plain = tf.function(lambda *arguments: plain_run(task, *arguments), autograph=False)
    plain = plain.get_concrete_function(*arguments)
    timed(plain, arguments)
    repeats = repeats or max(3, min(15, 1000 // steps))
    # One after the other in turn, so that a machine that slows down slows both.
    times = [(timed(hypergradient, arguments), timed(plain, arguments)) for _ in range(repeats)]
    grown = max(grown, peak_memory())
    seconds, plain_seconds = (statistics.median(column) for column in zip(*times))
    return dict(
        workload=workload, method=method, steps=steps, hypergradient_s=seconds, plain_s=plain_seconds,
        over_plain=seconds / plain_seconds, tracing_s=tracing, first_call_s=max(first_call - seconds, 0.0),
        growth_mb=(grown - idle) / 1024, peak_mb=grown / 1024, state_mb=state_megabytes(problem), repeats=repeats)


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
        plain_features=(lambda batch: (plain_body(fixed, batch[0]), batch[1])) if fixed else None)


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
                    warm_up_steps=20 if quick else 300)


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


if __name__ == "__main__":
    program.run(main)

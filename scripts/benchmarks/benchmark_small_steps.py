r"""What one hyper-iteration of a single inner step costs in `fit`, beside the same arithmetic in a loop by hand.

    python scripts/benchmarks/benchmark_small_steps.py --quick
    python scripts/benchmarks/benchmark_small_steps.py --json=small_steps.json

Least squares with 100 weights and 64 examples, T = 1 online, the learning rate is learned by `ReverseHG`. Cases:

- `fit_1`, `fit_50`, `fit_50_xla`: `HyperOptimizer.fit` with one hyper-iteration or 50 an execution, and with XLA.
- `forward_50`: the same by `ForwardHG`. `many_50`: twenty L2 strengths, of five weights each, are learned too, by Adam.
- `keras_1`, `keras_50`: `keras.Model.fit` with a `train_step` of the same arithmetic by hand, two assignments and
  nothing else: no optimizer, no metrics, no checks. What is above the loop by hand is Keras' loop and reading the data.

Each case runs in a process of its own, in turn with the loop by hand, a `tf.while_loop` over hyper-iterations on data
that stay where they are. Times are medians of CPU milliseconds per hyper-iteration, those of an epoch included.
`operations` are those of the graph that TensorFlow runs, constants and what is outside of the loop included.
"""

import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program

CASES = ("fit_1", "fit_50", "fit_50_xla", "forward_50", "many_50", "keras_1", "keras_50")
COLUMNS = [("case", "{}"), ("fit_ms", "{:.3f}"), ("hand_ms", "{:.4f}"), ("over_hand", "{:.1f}"),
           ("first_epoch_s", "{:.2f}"), ("operations", "{}")]
RATE, OUTER_RATE = 1e-3, 1e-3
STRENGTHS, STRENGTH = 20, 1e-4


def define_flags():
    program.define_names("cases", list(CASES), CASES, "Cases to run.")
    flags.DEFINE_integer("repeats", None, "Timed epochs per case. Default: 7, with --quick 1.", lower_bound=1)
    flags.DEFINE_bool("kinds", False, "Print how many operations of each kind there are.")
    cases.define_flags("A few hyper-iterations: shows that everything runs; the numbers mean nothing.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

import farhox

from _shared.measuring import timed


def main(_):
    options = flags.FLAGS
    if cases.is_measured_here(measure):
        return
    rows = [cases.measured(__file__, name, name=name, quick=options.quick, repeats=options.repeats)
            for name in options.cases]
    print(cases.table(rows, COLUMNS))
    for row in rows if options.kinds else []:
        print(f"{row['case']}: " + ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items()))
    cases.write(rows)


def measure(name, quick, repeats):
    """Measures one case in this process: a dictionary with the columns of the table."""
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=[64, 100]).astype("float32"), draws.normal(size=64).astype("float32")
    per_execution, count = int(name.split("_")[1]), 100 if quick else 600
    data = tf.data.Dataset.from_tensors(((x[None], y[None]), (x, y))).repeat(count)
    model = ByHand(x.shape[1]) if name.startswith("keras") else farhox_model(name, x.shape[1])
    settings = dict(steps_per_execution=per_execution, jit_compile=name.endswith("xla"))
    optimizer = keras.optimizers.Adam if name.startswith("many") else keras.optimizers.SGD
    model.compile(optimizer(OUTER_RATE), **settings)

    def fit():
        model.fit(data, shuffle=False, verbose=0)
        return []

    context.context().enable_graph_collection()
    first = timed(fit)
    kinds = kinds_of_operations(context.context().export_run_metadata())
    context.context().disable_graph_collection()
    by_hand = loop_by_hand(x, y, count)
    by_hand()
    fit()
    # One after the other in turn, so that a machine that slows down slows both.
    times = [(timed(fit), timed(by_hand)) for _ in range(repeats or (1 if quick else 7))]
    fit_ms, hand_ms = (1e3 * statistics.median(column) / count for column in zip(*times))
    return dict(case=name, fit_ms=fit_ms, hand_ms=hand_ms, over_hand=fit_ms / hand_ms, first_epoch_s=first,
                operations=sum(kinds.values()), kinds=kinds)


def farhox_model(name, size):
    """The `HyperOptimizer` of a case."""
    w = keras.Variable(np.zeros(size, "float32"))
    rate = farhox.Hyperparameter(RATE, low=0.0, log=True, name="learning_rate")
    strengths = [farhox.Hyperparameter(STRENGTH, low=0.0, log=True, name=f"l2_{i}")
                 for i in range(STRENGTHS if name.startswith("many") else 0)]

    def loss(batch):
        return tf.reduce_mean((tf.linalg.matvec(batch[0], tf.convert_to_tensor(w)) - batch[1]) ** 2)

    def penalised(batch):
        blocks = tf.reshape(tf.convert_to_tensor(w), [STRENGTHS, -1])
        values = tf.stack([strength() for strength in strengths])
        return loss(batch) + tf.reduce_sum(values[:, tf.newaxis] * blocks ** 2)

    problem = farhox.BilevelProblem(
        penalised if strengths else loss, loss, [w], [rate, *strengths], farhox.GradientDescent(rate))
    method = farhox.ForwardHG() if name.startswith("forward") else farhox.ReverseHG()
    return farhox.HyperOptimizer(problem, method, online=True)


def updated(x, y, outer_x, outer_y, w, log_rate):
    """One hyper-iteration by hand: the weights, the logarithm of the rate and the outer loss after it."""
    with tf.GradientTape() as outer_tape:
        outer_tape.watch(log_rate)
        with tf.GradientTape() as tape:
            tape.watch(w)
            loss = tf.reduce_mean((tf.linalg.matvec(x, w) - y) ** 2)
        w = w - tf.exp(log_rate) * tape.gradient(loss, w)
        outer_loss = tf.reduce_mean((tf.linalg.matvec(outer_x, w) - outer_y) ** 2)
    return w, log_rate - OUTER_RATE * outer_tape.gradient(outer_loss, log_rate), outer_loss


def loop_by_hand(x, y, count):
    """A function that runs so many hyper-iterations in one loop."""
    x, y = tf.constant(x), tf.constant(y)

    def body(index, w, log_rate):
        return index + 1, *updated(x, y, x, y, w, log_rate)[:2]

    return tf.function(lambda: tf.while_loop(
        lambda index, *_: index < count, body, [tf.constant(0), tf.zeros(x.shape[1]), tf.math.log(RATE)],
        parallel_iterations=1), autograph=False)


class ByHand(keras.Model):
    """The same arithmetic as a Keras model."""

    def __init__(self, size):
        super().__init__()
        self.w = keras.Variable(np.zeros(size, "float32"))
        self.log_rate = keras.Variable(np.log(np.float32(RATE)))
        self.built = True

    def train_step(self, data):
        (x, y), (outer_x, outer_y) = data
        w, log_rate, outer_loss = updated(
            x[0], y[0], outer_x, outer_y, tf.convert_to_tensor(self.w), tf.convert_to_tensor(self.log_rate))
        self.w.assign(w)
        self.log_rate.assign(log_rate)
        return {"loss": outer_loss}


def kinds_of_operations(metadata):
    """How many operations of each kind there are in the largest graph that was run, the most frequent first."""
    graphs = [graph for run in metadata.function_graphs for graph in run.partition_graphs]
    counts = {}
    for node in max(graphs, key=lambda graph: len(graph.node)).node:
        counts[node.op] = counts.get(node.op, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


if __name__ == "__main__":
    program.run(main)

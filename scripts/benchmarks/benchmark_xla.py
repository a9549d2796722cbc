r"""Wall-clock time of a hyper-iteration with and without XLA, and what `jit_compile="auto"` chooses.

    python scripts/benchmarks/benchmark_xla.py --quick
    python scripts/benchmarks/benchmark_xla.py --json=docs/benchmarks/xla.json

Workloads, on synthetic data in float32: `forward`, five directions of forward mode through 50 steps of a 784-256-256-10
tanh network with momentum; `reverse`, the same in reverse mode; `online`, T = 1 on a least-squares problem with 100
weights, 64 examples; `dense`, ten steps of a 50-32-10 network; `cnn`, five steps of two convolutions with batch
normalization on 16 x 16 images; `dropout`, `dense` with a layer that draws.

Each case runs in a process of its own. `choice_s` is what the first hyper-iteration takes, choosing included: two
traces and the compilation.
"""

import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program

FLAGS = flags.FLAGS
WORKLOADS = ("online", "dense", "dropout", "reverse", "forward", "cnn")
COLUMNS = [("workload", "{}"), ("chosen", "{}"), ("without", "{}"), ("with_xla", "{}"), ("choice_s", "{:.1f}")]


def define_flags():
    """Called when the script runs, not when it is imported: absl flags are global."""
    program.define_names("workloads", list(WORKLOADS), WORKLOADS, "Workloads to run.")
    cases.define_flags("Tiny sizes: shows that everything runs; the numbers mean nothing.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import keras
import numpy as np

import farhox


def main(_):
    if cases.is_measured_here(measure):
        return
    rows = [cases.measured(__file__, workload, workload=workload, quick=FLAGS.quick) for workload in FLAGS.workloads]
    print(cases.table(rows, COLUMNS))
    cases.write(rows)


def measure(workload, quick):
    """Measures one case in this process: a dictionary with the columns of the table, and the line that says it."""
    optimizer, inner_batches, outer_batch = made(workload, quick)
    optimizer.compile(keras.optimizers.SGD(0.01), jit_compile="auto")
    start = time.perf_counter()
    optimizer.step(inner_batches, outer_batch)
    seconds = time.perf_counter() - start
    times = re.search(r"takes (.*) with it and (.*) without", optimizer.jit_choice)
    with_xla, without = times.groups() if times else ("-", "-")
    return dict(workload=workload, chosen="XLA" if optimizer.jit_compile else "none", without=without,
                with_xla=with_xla, choice_s=seconds, line=optimizer.jit_choice)


def made(workload, quick):
    """A `HyperOptimizer` and its data."""
    keras.utils.set_random_seed(0)
    draws = np.random.default_rng(0)
    rate = farhox.Hyperparameter(0.05, low=0.0, log=True, name="learning_rate")
    layers, regular = keras.layers, []
    if workload == "online":
        steps, batch, inputs, classes = 1, 64, [100], 1
        body = [layers.Dense(1)]
    elif workload == "cnn":
        steps, batch, inputs, classes = 5, 32, [16, 16, 1], 10
        body = [layer for filters in (8, 16) for layer in (
            layers.Conv2D(filters, 3, strides=2, activation="relu"), layers.BatchNormalization())]
        body += [layers.Flatten(), layers.Dense(10)]
    elif workload in ("dense", "dropout"):
        steps, batch, inputs, classes = 10, 100, [50], 10
        body = [layers.Dense(32, "tanh"), *([layers.Dropout(0.3)] if workload == "dropout" else []), layers.Dense(10)]
    else:
        width = 8 if quick else 256
        steps, batch, inputs, classes = (3 if quick else 50), 100, [784], 10
        regular = [farhox.Hyperparameter(1e-4, low=0.0, log=True, name=f"l2_{i}") for i in range(3)]
        body = [layers.Dense(size, "tanh" if size == width else None, kernel_regularizer=farhox.L1L2(l2=strength))
                for size, strength in zip((width, width, 10), regular)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if workload == "online":
        loss = "mean_squared_error"
    dynamics, outer = farhox.GradientDescent(rate), [rate]
    if regular:
        momentum = farhox.Hyperparameter(0.9, low=0.0, high=1.0, name="momentum")
        dynamics, outer = farhox.Momentum(rate, momentum), [rate, momentum, *regular]
    problem = farhox.supervised_problem(keras.Sequential([keras.Input(inputs), *body]), loss, dynamics, outer)

    def examples(*shape):
        x = draws.normal(size=[*shape, *inputs]).astype("float32")
        return x, draws.normal(size=[*shape, 1]) if classes == 1 else draws.integers(classes, size=shape)

    method = farhox.ForwardHG() if workload == "forward" else farhox.ReverseHG()
    return (farhox.HyperOptimizer(problem, method, online=workload == "online"), examples(steps, batch),
            examples(batch))


if __name__ == "__main__":
    program.run(main)

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
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program

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

from _shared import workloads


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
    task = workloads.made(workload, method, quick)
    compute = workloads.unrolled if method == "naive" else workloads.METHODS[method].compute
    row, _ = workloads.measured(
        task, compute, workloads.arguments_of(task, steps), repeats or max(3, min(15, 1000 // steps)))
    return dict(workload=workload, method=method, steps=steps, **row)


if __name__ == "__main__":
    program.run(main)

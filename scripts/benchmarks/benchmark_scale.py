r"""Time and memory of a hypergradient as the inner training gets longer, wider, and has more outer variables.

    python scripts/benchmarks/benchmark_scale.py --quick
    python scripts/benchmarks/benchmark_scale.py \
        --json=docs/benchmarks/scale.json --picture=docs/benchmarks/scale.png

A tanh network with one hidden layer on synthetic data in float32, batches of 100, momentum gradient descent; outer
variables are L2 strengths, each of as many weights of the first layer. Sweeps: `steps`, T from 10 to 10,000 with
10,000 weights and one strength; `weights`, from 1,000 to a million with T = 100 and one strength; `outer`, from one
strength to one per weight with a million weights and T = 10; `budget`, 784-256-256-10 with T = 1,000 and limits of
memory.

Methods: `reverse`; `reverse_states` (memory=0); `reverse_sqrt` (checkpoint_every="sqrt"); `reverse_memory`
(checkpoint_every="memory": 128 MB for all); `reversible`; `forward`, up to ten strengths; `implicit`, ten
steps of conjugate gradients. Of `budget` all are reverse mode: `64 MB`, 64 MB beside the states; the same with
`sqrt`; `64 MB of all` and `256 MB of all`, with checkpoint_every="memory".

Each case runs in a process of its own. Times are medians of CPU seconds; plain training is a hand-written TensorFlow
loop over the same steps without derivatives, in turn. `growth_mb` is the peak of resident memory above that of the
process with its data and its model; `calls_mb` above that after tracing; `planned_mb` what is stored for the way back
by the rule that is documented, where states are stored.
"""

import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program
from _shared.measuring import forget_peak_memory, peak_memory, timed

FLAGS = flags.FLAGS
METHODS = ("reverse", "reverse_states", "reverse_sqrt", "reverse_memory", "reversible", "forward", "implicit")
BUDGETS = ("64 MB", "64 MB sqrt", "64 MB of all", "256 MB of all")
SWEEPS = {"steps": "inner steps T", "weights": "weights", "outer": "outer variables", "budget": "limit of memory"}
# A direction per outer variable: beyond this forward mode takes minutes.
FORWARD_MAX_VARIABLES = 10
COLUMNS = [("sweep", "{}"), ("method", "{}"), ("steps", "{}"), ("weights", "{}"), ("strengths", "{}"),
           ("hypergradient_s", "{:.4f}"), ("plain_s", "{:.4f}"), ("over_plain", "{:.2f}"), ("growth_mb", "{:.0f}"),
           ("calls_mb", "{:.0f}"), ("planned_mb", "{:.1f}")]


def define_flags():
    """Called when the script runs, not when it is imported: absl flags are global."""
    program.define_names("sweeps", list(SWEEPS), SWEEPS, "What to sweep.")
    program.define_names("methods", list(METHODS), METHODS, "Methods to run.")
    flags.DEFINE_string("picture", None, "File to draw the measurements to, a PNG.")
    cases.define_flags("Tiny sizes: shows that everything runs; the numbers mean nothing.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import keras
import numpy as np
import tensorflow as tf

import farhox
from farhox import hypergradients
from farhox.data.batches import batch_at
from farhox.hypergradients import checkpoints

MEGABYTE = 2 ** 20
HYPERGRADIENTS = {
    "reverse": farhox.ReverseHG(),
    "reverse_states": farhox.ReverseHG(memory=0),
    "reverse_sqrt": farhox.ReverseHG(checkpoint_every="sqrt"),
    "reverse_memory": farhox.ReverseHG(checkpoint_every="memory"),
    "reversible": hypergradients.ReversibleHG(),
    "forward": farhox.ForwardHG(),
    # A tolerance that is never reached: always ten products.
    "implicit": farhox.ImplicitHG(farhox.linear_solvers.ConjugateGradient(max_steps=10, tolerance=0.0)),
    "64 MB": farhox.ReverseHG(memory=64 * MEGABYTE),
    "64 MB sqrt": farhox.ReverseHG(checkpoint_every="sqrt", memory=64 * MEGABYTE),
    "64 MB of all": farhox.ReverseHG(checkpoint_every="memory", memory=64 * MEGABYTE),
    "256 MB of all": farhox.ReverseHG(checkpoint_every="memory", memory=256 * MEGABYTE),
}
RATE, MOMENTUM, STRENGTH = 0.05, 0.9, 1e-4


def main(_):
    if cases.is_measured_here(measure):
        return
    if FLAGS.picture:
        program.require(matplotlib="plots")
    chosen = [case for sweep in FLAGS.sweeps for case in cases_of(sweep, FLAGS.methods, FLAGS.quick)]
    rows = []
    for i, case in enumerate(chosen, start=1):
        rows.append(cases.measured(__file__, f"[{i}/{len(chosen)}] {case}", **case))
        cases.write(rows)  # A run that takes an hour keeps what it has.
    print(cases.table(rows, COLUMNS))
    if FLAGS.picture:
        draw(rows, FLAGS.picture)


def cases_of(sweep, methods, quick):
    """The cases of a sweep as dictionaries."""
    if sweep == "budget":
        sizes = dict(steps=20, widths=[8, 6, 6, 3], strengths=1) if quick else dict(
            steps=1000, widths=[784, 256, 256, 10], strengths=1)
        return [dict(sweep=sweep, method=method, **sizes) for method in BUDGETS]
    if sweep == "steps":
        sizes = [(t, 4 if quick else 100, 1) for t in ([2, 5] if quick else [10, 100, 1000, 10_000])]
    elif sweep == "weights":
        sizes = [(2 if quick else 100, width, 1) for width in ([2, 4] if quick else [32, 100, 316, 1000])]
    else:
        sizes = [(2, 4, n) for n in (1, 16)] if quick else [
            (10, 1000, n) for n in (1, 10, 100, 10_000, 1_000_000)]
    return [dict(sweep=sweep, method=method, steps=steps, widths=[width, width, 10], strengths=strengths)
            for steps, width, strengths in sizes for method in methods
            if method != "forward" or strengths <= FORWARD_MAX_VARIABLES]


def measure(sweep, method, steps, widths, strengths):
    """Measures one case in this process: a dictionary with the columns of the table."""
    problem, inner_batches, outer_batch = network_problem(steps, widths, strengths)
    arguments = (inner_batches, outer_batch)
    forget_peak_memory()
    idle = peak_memory()
    hypergradient = tf.function(
        lambda *arguments: HYPERGRADIENTS[method].compute(problem, *arguments), autograph=False)
    hypergradient = hypergradient.get_concrete_function(*arguments)
    forget_peak_memory()
    traced = peak_memory()
    first = timed(hypergradient, arguments)
    plain = tf.function(lambda inner_batches: plain_training(problem, inner_batches), autograph=False)
    plain = plain.get_concrete_function(inner_batches)
    timed(plain, arguments[:1])
    # One after the other in turn, so that a machine that slows down slows both.
    times = [(timed(hypergradient, arguments), timed(plain, arguments[:1]))
             for _ in range(1 if first > 3 else max(2, min(9, 500 // steps)))]
    seconds, plain_seconds = (statistics.median(column) for column in zip(*times))
    peak = peak_memory()
    return dict(
        sweep=sweep, method=method, steps=steps, weights=weights_of(problem), strengths=strengths,
        hypergradient_s=seconds, plain_s=plain_seconds, over_plain=seconds / plain_seconds,
        growth_mb=(peak - idle) / 1024, calls_mb=(peak - traced) / 1024,
        planned_mb=planned_bytes(method, problem, inner_batches) / MEGABYTE, repeats=len(times))


def weights_of(problem):
    return sum(int(np.prod(variable.shape)) for variable in problem.inner_variables)


def planned_bytes(method, problem, inner_batches):
    """What is stored at a time for the way back: states, and what is kept of the steps between two of them."""
    settings = HYPERGRADIENTS[method]
    if not isinstance(settings, farhox.ReverseHG):
        return 0
    batch, steps = batch_at(inner_batches, 0), inner_batches.indices.shape[0]
    state, lengths, memory = problem.memory_plan(1, batch).state_bytes, [], settings.memory
    if settings.checkpoint_every == "sqrt":
        lengths = [int(np.ceil(np.sqrt(steps)))]
    elif settings.checkpoint_every == "memory":
        kept = problem.memory_plan(1, batch, memory=None).total_bytes - 2 * state
        lengths = checkpoints.segment_lengths(steps, state, kept, memory)
        memory -= checkpoints.stored_bytes(steps, lengths, state, 0)
    kept = sum(choice.bytes for choice in problem.memory_plan([steps, *lengths][-1], batch, memory).kept)
    return checkpoints.stored_bytes(steps, lengths, state, kept)


def network_problem(steps, widths, strengths):
    """A problem with T batches and an outer batch. Widths are those of inputs, hidden layers and classes."""
    examples, batch_size = (60, 10) if widths[0] < 20 else (2000, 100)
    draws = np.random.default_rng(0)
    x = draws.normal(size=[examples + batch_size, widths[0]]).astype("float32") * np.float32(3 / widths[0] ** 0.5)
    y = np.argmax(x @ draws.normal(size=[widths[0], widths[-1]]), axis=1)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([widths[0]]), *(
        keras.layers.Dense(width, activation="tanh") for width in widths[1:-1]), keras.layers.Dense(widths[-1])])
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    strength = farhox.Hyperparameter(np.full(strengths, STRENGTH, "float32"), low=0.0, log=True, name="l2")
    kernel = model.layers[0].kernel

    def inner_objective(batch):
        blocks = tf.reshape(tf.convert_to_tensor(kernel), [strengths, -1])
        penalty = tf.reduce_sum(strength()[:, tf.newaxis] * tf.square(blocks))
        return cross_entropy(batch[1], model(batch[0])) + penalty

    problem = farhox.BilevelProblem(
        inner_objective, lambda batch: cross_entropy(batch[1], model(batch[0])), model.trainable_variables, [strength],
        farhox.Momentum(RATE, MOMENTUM))
    data = (tf.constant(x[:examples]), tf.constant(y[:examples]))
    indices = np.random.default_rng(1).integers(examples, size=[steps, batch_size])
    return problem, farhox.gather(data, indices), (tf.constant(x[examples:]), tf.constant(y[examples:]))


def plain_training(problem, inner_batches):
    """The inner training alone, by hand: a loop without farhox and without derivatives of it."""
    values = [tf.convert_to_tensor(variable) for variable in problem.inner_variables]

    def body(t, values, momenta):
        x, y = batch_at(inner_batches, t)
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = x
            for i in range(0, len(values), 2):
                outputs = tf.matmul(outputs if i == 0 else tf.tanh(outputs), values[i]) + values[i + 1]
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, outputs))
            loss += STRENGTH * tf.reduce_sum(tf.square(values[0]))
        momenta = [MOMENTUM * m + g for m, g in zip(momenta, tape.gradient(loss, values))]
        return t + 1, [w - RATE * m for w, m in zip(values, momenta)], momenta

    return tf.while_loop(lambda t, *_: t < inner_batches.indices.shape[0], body,
                         [tf.constant(0), values, [tf.zeros_like(w) for w in values]], parallel_iterations=1)[1]


def draw(rows, path):
    """Time and memory of the sweeps, one over the other."""
    from _shared import pictures
    sweeps = [sweep for sweep in SWEEPS if sweep != "budget" and any(row["sweep"] == sweep for row in rows)]
    styles = pictures.line_styles([*METHODS, "plain"])
    with pictures.figure(path, rows=2, columns=len(sweeps), size=(3.6 * len(sweeps), 6.6)) as axes:
        for column, sweep in enumerate(sweeps):
            time, memory = axes[column], axes[len(sweeps) + column]
            size = {"steps": "steps", "weights": "weights", "outer": "strengths"}[sweep]
            chosen = [row for row in rows if row["sweep"] == sweep]
            for method in METHODS:
                line = sorted((row[size], row["hypergradient_s"], row["growth_mb"])
                              for row in chosen if row["method"] == method)
                if line:
                    sizes, seconds, megabytes = zip(*line)
                    time.plot(sizes, seconds, marker=".", label=method, **styles[method])
                    memory.plot(sizes, megabytes, marker=".", label=method, **styles[method])
            planned = sorted((row[size], row["planned_mb"]) for row in chosen if row["method"] == "reverse")
            if planned:
                memory.plot(*zip(*planned), color=pictures.BLUE, linestyle=":", linewidth=1, label="stored by reverse")
            sizes = sorted({row[size] for row in chosen})
            plain = [statistics.median(row["plain_s"] for row in chosen if row[size] == at) for at in sizes]
            time.plot(sizes, plain, marker=".", label="plain", **styles["plain"])
            for axis, label in ((time, "CPU seconds"), (memory, "memory, MB")):
                axis.set(xlabel=SWEEPS[sweep], ylabel=label if column == 0 else "", xscale="log", yscale="log")
                axis.margins(y=0.2)  # What hardly changes must not look as if it did.
                low, high = axis.get_ylim()
                axis.set_ylim(min(low, high / 10), high)
                pictures.logarithmic(axis)
        pictures.legend_of_figure(axes, columns=4)


if __name__ == "__main__":
    program.run(main)

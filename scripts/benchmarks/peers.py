r"""Hypergradients of farhox beside those of JAX and PyTorch: time, memory, and whether all of them agree.

    python scripts/benchmarks/peers.py --environments=../peers --quick
    python scripts/benchmarks/peers.py --environments=../peers --rounds=2 \
        --json=docs/benchmarks/peers.json --picture=docs/benchmarks/peers.png

The workloads are those of `benchmark_hypergradients.py`: W1 with T = 100, W2 with T = 50, W3 (a meta-step of MAML) with
T = 5, W4 with T = 20. farhox writes the data, the initial weights and the outer variables of each to a file, from which
the peers read them.

Peers: `jax`, its own transformations and jaxopt, and `torch`, PyTorch by hand, TorchOpt and higher. Each lives in a
virtual environment of its own in the folder --environments, made and filled by pip where there is none. Nothing of it
is needed by farhox, and nothing of farhox is in it. What cannot be installed or fails is a row that says so.

Each row is measured in a process of its own, on one thread. `hypergradient_s` is the median of CPU seconds, `plain_s`
that of the training alone in the same framework, in turn; `first_s` what the first call takes beyond a later one,
tracing and compilation included; `growth_mb` the peak of resident memory above that of the process with its data.
`over_farhox` compares with farhox' reverse mode. `difference` is how far the hypergradient is from farhox' first row of
the workload: the largest, over the outer variables, of the length of the difference relative to that of the variable's
hypergradient, or to a hundredth of the length of the whole if that is more: what is zero but for rounding, as of biases
before batch normalisation, has no relative difference. Beyond 1e-3 the program ends with code 1.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import venv

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import cases, program

FLAGS = flags.FLAGS
STEPS = {"W1": 100, "W2": 50, "W3": 5, "W4": 20}
# What runs of each workload: ways of farhox are its methods.
WAYS = {
    "farhox": {"W1": ["reverse"], "W2": ["reverse", "forward"], "W3": ["maml"], "W4": ["implicit"]},
    "jax": {"W1": ["scan", "checkpoint"], "W2": ["scan", "checkpoint", "forward", "linearize"], "W3": ["loop", "map"],
            "W4": ["by hand", "jaxopt"]},
    "torch": {"W1": ["by hand", "TorchOpt", "higher"], "W2": ["by hand", "TorchOpt", "higher"],
              "W3": ["by hand", "TorchOpt", "higher"], "W4": ["by hand", "TorchOpt"]},
}
PACKAGES = {"jax": ["jaxopt"], "torch": ["torchopt", "higher"]}
LARGEST_DIFFERENCE = 1e-3
NUMBERS = {"hypergradient_s": "{:.4f}", "plain_s": "{:.4f}", "over_plain": "{:.2f}", "over_farhox": "{:.2f}",
           "first_s": "{:.1f}", "growth_mb": "{:.0f}", "difference": "{:.0e}"}


def define_flags():
    """Called when the script runs, not when it is imported: absl flags are global."""
    program.define_names("workloads", list(STEPS), STEPS, "Workloads to run.")
    program.define_names("peers", list(PACKAGES), PACKAGES, "Frameworks to compare with; none: farhox alone.")
    flags.DEFINE_string("environments", None, "Folder of the virtual environments of the peers.")
    flags.DEFINE_bool("install", True, "Make and fill the environments that are not there.")
    flags.DEFINE_string("jax", "jax", "What pip installs as JAX.")
    flags.DEFINE_string("torch", "torch", "What pip installs as PyTorch. Its usual wheels for Linux bring CUDA with "
                        "them; a version that ends in +cpu, where pip finds one, does not.")
    flags.DEFINE_integer("repeats", None, "Timed computations per row. Default: 9, with --quick 2.", lower_bound=1)
    flags.DEFINE_integer("rounds", 1, "Times that all rows are measured, one after the other: medians are shown.",
                         lower_bound=1)
    flags.DEFINE_string("picture", None, "File to draw the seconds to, a PNG.")
    cases.define_flags("Tiny sizes: shows that everything runs and agrees; the numbers mean nothing.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import numpy as np
import tensorflow as tf

from _shared import workloads


def main(_):
    if cases.is_measured_here(measure):
        return
    if FLAGS.picture:
        program.require(matplotlib="plots")
    if FLAGS.peers and not FLAGS.environments:
        raise SystemExit("--environments must name a folder for the virtual environments of the peers, or --peers= "
                         "must be empty. Received: neither.")
    problems = {peer: problem_of_environment(peer) for peer in FLAGS.peers}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen_cases(FLAGS.workloads, FLAGS.peers) * FLAGS.rounds:
            measured.setdefault(words(case), []).append(row_of(case, problems, pathlib.Path(folder)))
            rows = compared([median_of(same) for same in measured.values()])
            cases.write(rows)  # A run that is stopped keeps what it has.
    problem = ["problem"] if any("problem" in row for row in rows) else []
    print(cases.table([shown(row) for row in rows], [
        (name, "{}") for name in ("workload", "framework", "way", "steps", *NUMBERS, *problem)]))
    if FLAGS.picture:
        draw(rows, FLAGS.picture)
    differing = [row for row in rows if row.get("difference", 0.0) > LARGEST_DIFFERENCE]
    if differing:
        raise SystemExit("These hypergradients are not those of farhox: " + ", ".join(map(words, differing)))


def chosen_cases(chosen, peers):
    """The rows of the table to be as dictionaries; farhox, which writes the arrays, comes first."""
    return [dict(workload=workload, framework=framework, way=way) for workload in chosen
            for framework in ("farhox", *peers) for way in WAYS[framework][workload]]


def words(row):
    return f"{row['workload']} {row['framework']} {row['way']}"


# The environments of the peers.


def python_of(peer):
    """The Python of a peer's environment. Its folder is not named as the package: it would be taken for that."""
    folder = pathlib.Path(FLAGS.environments).resolve() / f"environment_{peer}"
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def problem_of_environment(peer):
    """Makes the environment of a peer if there is none. Returns None, or why it cannot be used."""
    python = python_of(peer)
    filled = python.parents[1] / "filled"  # Says that pip came to its end.
    if filled.exists():
        return None
    if not FLAGS.install:
        return f"there is no environment in {python.parents[1]}"
    print(f"installing {peer} in {python.parents[1]}", file=sys.stderr, flush=True)
    venv.create(python.parents[1], with_pip=True, clear=True)
    # One after the other: what is built around PyTorch may be older than it, and is not to choose its version.
    for packages in ([FLAGS[peer].value, "numpy"], PACKAGES[peer]):
        pip = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            return f"pip cannot install {' '.join(packages)}: {last_line(pip.stderr)}"
    filled.touch()
    return None


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip() and "[notice]" not in line]
    return lines[-1] if lines else "it says nothing"


# The rows.


def row_of(case, problems, folder):
    """Measures a row in a process of its own; of a peer that fails the row says why."""
    workload, framework, way = case["workload"], case["framework"], case["way"]
    steps, repeats = (3 if FLAGS.quick else STEPS[workload]), FLAGS.repeats or (2 if FLAGS.quick else 9)
    arrays, result = folder / f"{workload}.npz", folder / f"{workload}_{framework}_{way}.npz"
    row = {**case, "steps": steps, "repeats": repeats, "threads": 1}
    arguments = dict(workload=workload, way=way, steps=steps, repeats=repeats, arrays=str(arrays),
                     hypergradient=str(result))
    if problems.get(framework):
        return {**row, "problem": problems[framework]}
    if framework == "farhox":
        row.update(cases.measured(__file__, words(row), quick=FLAGS.quick, **arguments))
    else:
        print(words(row), file=sys.stderr, flush=True)
        program_of_peer = pathlib.Path(__file__).with_name("peer_frameworks") / f"in_{framework}.py"
        # XLA's threads are as many as NPROC says.
        finished = subprocess.run(
            [str(python_of(framework)), str(program_of_peer), json.dumps(arguments)], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NPROC": "1"})
        if finished.returncode:
            return {**row, "problem": last_line(finished.stderr)}
        row.update(json.loads(finished.stdout.splitlines()[-1]))
    with np.load(result) as file:
        return {**row, "gradients": [file[f"arr_{i}"] for i in range(len(file.files))]}


def measure(workload, way, steps, repeats, quick, arrays, hypergradient):
    """Measures a row of farhox in this process; writes what the peers read, and the hypergradient."""
    task = workloads.made(workload, way, quick)
    arguments = workloads.arguments_of(task, steps)
    write_arrays(arrays, workload, task, *arguments)
    row, function = workloads.measured(task, workloads.METHODS[way].compute, arguments, repeats)
    np.savez(hypergradient, *[tf.convert_to_tensor(gradient).numpy() for gradient in function(*arguments).gradients])
    row["first_s"] = row.pop("tracing_s") + row.pop("first_call_s")
    return row


def write_arrays(path, workload, task, inner_batches, outer_batch, state=None):
    """The data of a workload, its weights at the first inner step and its unconstrained outer variables, as .npz."""
    named = {}
    if workload == "W2":
        named["indices"] = inner_batches.indices
        (named["x"], named["y"]), (named["x_outer"], named["y_outer"]) = inner_batches.data, outer_batch
    else:
        named["x"], named["y"] = inner_batches.batch[:2]
        named["x_outer"], named["y_outer"] = outer_batch
    if workload == "W3":
        named["x_outer"] = outer_batch[0][1]
    if workload in ("W3", "W4"):
        named["learning_rate"] = task.learning_rate
    variables = task.problem.initial_state().variables if state is None else state.variables
    named.update({f"inner_variable_{i}": variable for i, variable in enumerate(variables)})
    named.update({f"outer_variable_{i}": variable for i, variable in enumerate(task.problem.outer_variables)})
    np.savez(path, **{name: np.asarray(value) for name, value in named.items()})


def median_of(rows):
    """One row of those of all rounds."""
    good = [row for row in rows if "problem" not in row]
    if len(good) < len(rows):
        return next(row for row in rows if "problem" in row)
    return {**good[0], **{name: statistics.median(row[name] for row in good) for name in good[0] if name in NUMBERS},
            "rounds": len(good)}


def compared(rows):
    """The rows with what compares them with farhox' first one of the workload, and without the hypergradients."""
    references = {}
    for row in rows:
        if row["framework"] == "farhox":
            references.setdefault(row["workload"], row)
    done = []
    for row in rows:
        gradients, reference = row.get("gradients"), references[row["workload"]]
        row = {name: value for name, value in row.items() if name != "gradients"}
        if gradients is not None:
            row.update(over_farhox=row["hypergradient_s"] / reference["hypergradient_s"],
                       difference=difference(gradients, reference["gradients"]))
        done.append(row)
    return done


def difference(gradients, expected):
    """How far a hypergradient is from the expected one, as the description of the program says."""
    if [np.shape(g) for g in gradients] != [np.shape(e) for e in expected]:
        return float("inf")
    least = 1e-2 * np.sqrt(sum(np.sum(np.square(e, dtype="float64")) for e in expected))
    differences = [np.linalg.norm(np.ravel(np.float64(g) - e)) / max(np.linalg.norm(np.ravel(e)), least)
                   for g, e in zip(gradients, expected)]
    return float(np.max(differences)) if np.all(np.isfinite(differences)) else float("inf")


def shown(row):
    """A row in words."""
    return {**row, "problem": row.get("problem", ""),
            **{name: form.format(row[name]) if name in row else "–" for name, form in NUMBERS.items()}}


def draw(rows, path):
    """CPU seconds of every row, a panel per workload; a line in each bar is plain training."""
    from _shared import pictures
    colors = {"farhox": pictures.BLUE, "jax": pictures.YELLOW, "torch": pictures.PURPLE}
    chosen = list(dict.fromkeys(row["workload"] for row in rows))
    with pictures.figure(path, rows=(len(chosen) + 1) // 2, columns=min(2, len(chosen)),
                         size=(9.0 if len(chosen) > 1 else 5.0, 2.6 * ((len(chosen) + 1) // 2))) as axes:
        for axis, workload in zip(np.ravel(axes), chosen):
            shown_rows = [row for row in rows if row["workload"] == workload][::-1]
            seconds = [row.get("hypergradient_s", 0.0) for row in shown_rows]
            axis.barh(range(len(shown_rows)), seconds, color=[colors[row["framework"]] for row in shown_rows])
            for at, row in enumerate(shown_rows):
                if "problem" in row:
                    axis.text(0, at, " no number", va="center", fontsize=8)
                else:
                    axis.plot([row["plain_s"]] * 2, [at - 0.4, at + 0.4], color=pictures.BLACK, linewidth=1.5)
            axis.set(yticks=range(len(shown_rows)), xlabel="CPU seconds",
                     title=f"{workload}, T = {shown_rows[0]['steps']}",
                     yticklabels=[f"{row['framework']}, {row['way']}" for row in shown_rows])
            axis.grid(axis="y", visible=False)
        for axis in np.ravel(axes)[len(chosen):]:
            axis.set_visible(False)


if __name__ == "__main__":
    program.run(main)

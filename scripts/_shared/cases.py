"""Benchmarks: each case is measured in a process of its own; the flags for that, and what is made of the numbers."""

import json
import platform
import subprocess
import sys

from absl import flags


def define_flags(quick):
    """The flags of every benchmark; `quick` is what --quick says of itself."""
    flags.DEFINE_integer("threads", 1, "Threads TensorFlow may use; 0 leaves it to TensorFlow.", lower_bound=0)
    flags.DEFINE_bool("quick", False, quick)
    flags.DEFINE_string("json", None, "File to write the measurements to.")
    flags.DEFINE_string("case", None, "For internal use: the one case to measure in this process, as JSON.")


def is_measured_here(measure):
    """In the process of a case: measures and prints it. `measure` takes what the case says but the threads."""
    if flags.FLAGS.case is None:
        return False
    import tensorflow as tf  # Not before: --help takes no seconds.
    case = json.loads(flags.FLAGS.case)
    threads = case.pop("threads")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    print(json.dumps({**measure(**case), "threads": threads}))
    return True


def measured(script, words, **case):
    """What `measure` of a script gives in a new process; `words` are shown meanwhile."""
    print(words, file=sys.stderr, flush=True)
    case = json.dumps({**case, "threads": flags.FLAGS.threads})
    result = subprocess.run([sys.executable, str(script), f"--case={case}"], stdout=subprocess.PIPE, text=True,
                            check=True, start_new_session=True)
    return json.loads(result.stdout.splitlines()[-1])


def table(rows, columns):
    """The measurements as text, a line per case where that fits on a screen.

    Args:
        rows: List of dictionaries.
        columns: List of (key in a row, format).
    """
    from _shared import experiment
    return experiment.markdown_table(
        [name for name, _ in columns], [[form.format(row[name]) for name, form in columns] for row in rows])


def write(rows):
    """Writes the measurements to --json, if it is given, with what they were made with."""
    if not flags.FLAGS.json:
        return
    import keras
    import tensorflow as tf
    results = {"tensorflow": tf.__version__, "keras": keras.__version__, "python": platform.python_version(),
               "processor": _processor(), "results": rows}
    with open(flags.FLAGS.json, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
        file.write("\n")


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

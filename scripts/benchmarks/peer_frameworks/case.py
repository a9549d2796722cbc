"""One case in the Python of a peer: CPU seconds of a hypergradient and of the training alone, and memory.

The Python is that of the peer's own environment: nothing of farhox or TensorFlow is imported here.
"""

import importlib.metadata
import json
import pathlib
import statistics
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # The scripts' shared package is there.

from _shared.measuring import forget_peak_memory, peak_memory


def measure(made, finished, packages):
    """Measures the case of the command line, writes its hypergradient and prints the measurements as JSON.

    Args:
        made: Callable `workload, way, steps, arrays -> hypergradient, plain`: two functions of no arguments. The first
            returns a list of NumPy's or the framework's arrays in farhox's order and layout, or a function that does:
            what turns results into that layout is not measured.
        finished: Callable that waits until all that it is given is computed, and returns it.
        packages: List of the packages whose versions are written down.
    """
    case = json.loads(sys.argv[1])
    with np.load(case["arrays"]) as file:
        arrays = dict(file)
    hypergradient, plain = made(case["workload"], case["way"], case["steps"], arrays)
    forget_peak_memory()
    idle = peak_memory()

    def timed(function):
        start = time.process_time()
        computed = finished(function())
        return time.process_time() - start, computed

    first, computed = timed(hypergradient)
    grown = peak_memory()
    np.savez(case["hypergradient"], *[np.asarray(a) for a in (computed() if callable(computed) else computed)])
    del computed
    timed(plain)
    # One after the other in turn, so that a machine that slows down slows both.
    times = [(timed(hypergradient)[0], timed(plain)[0]) for _ in range(case["repeats"])]
    seconds, plain_seconds = (statistics.median(column) for column in zip(*times))
    print(json.dumps(dict(
        hypergradient_s=seconds, plain_s=plain_seconds, over_plain=seconds / plain_seconds,
        first_s=max(first - seconds, 0.0), growth_mb=(max(grown, peak_memory()) - idle) / 1024,
        versions={name: importlib.metadata.version(name) for name in packages})))

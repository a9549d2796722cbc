"""Times an exported few-shot learner: how long a request for adaptation takes, alone and among others.

    python scripts/benchmarks/benchmark_serving.py

The network is that of few-shot classification on 28 x 28 images (four convolutions of 64 filters), five ways and one
shot; images are random. Requests go to the loaded SavedModel itself, without a network in between.
"""

import concurrent.futures
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import program


def define_flags():
    flags.DEFINE_integer("inner_steps", 5, "Inner steps of an adaptation.", lower_bound=1)
    flags.DEFINE_integer("filters", 64, "Filters of each of the four convolutions.", lower_bound=1)
    flags.DEFINE_list("queries", ["5", "15", "75"], "Numbers of queries in a request.")
    flags.DEFINE_integer("requests", 100, "Timed requests of each kind.", lower_bound=1)
    flags.DEFINE_integer("clients", 4, "Clients that ask at the same time.", lower_bound=1)
    flags.DEFINE_string("output", None, "File for the numbers as JSON.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import numpy as np

from _shared import experiment
from farhox import export, meta


def request(queries):
    random = np.random.default_rng(0)
    images = random.random((5 + queries, 28, 28, 1), dtype="float32")
    return {"support_inputs": images[:5], "support_labels": np.arange(5), "query_inputs": images[5:]}


def measured(served, queries, requests, clients):
    """Milliseconds of a request: median and 95th percentile alone, CPU time, and requests per second of all clients."""
    inputs = request(queries)

    def ask(_=None):
        start = time.perf_counter()
        served.predict("adapt", **inputs)
        return 1000 * (time.perf_counter() - start)

    for _ in range(5):
        ask()
    cpu = time.process_time()
    alone = [ask() for _ in range(requests)]
    cpu = 1000 * (time.process_time() - cpu) / requests
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        list(pool.map(ask, range(requests)))
        rate = requests / (time.perf_counter() - start)
    return {"queries": queries, "median_ms": float(np.median(alone)), "p95_ms": float(np.percentile(alone, 95)),
            "cpu_ms": cpu, "requests_per_second": rate}


def main(_):
    model = meta.few_shot_classifier(5, meta.convolutional_body(filters=flags.FLAGS.filters))
    learners = {"MAML": meta.MAML(model, 0.1, flags.FLAGS.inner_steps),
                "prototypical network": meta.PrototypicalNetwork(
                    meta.convolutional_body(filters=flags.FLAGS.filters), 5)}
    results, rows = {}, []
    for name, learner in learners.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            export.saved_model(learner, folder)
            served = export.load(folder)
            seconds = time.perf_counter() - start
            results[name] = [measured(served, int(queries), flags.FLAGS.requests, flags.FLAGS.clients)
                             for queries in flags.FLAGS.queries]
        for result in results[name]:
            rows.append([name, str(result["queries"]), *(f"{result[key]:.1f}" for key in (
                "median_ms", "p95_ms", "cpu_ms", "requests_per_second")), f"{seconds:.1f}"])
    print(experiment.markdown_table(
        ["", "queries", "median, ms", "95 %, ms", "CPU, ms", f"requests/s, {flags.FLAGS.clients} clients",
         "export and load, s"], rows))
    if flags.FLAGS.output:
        path = pathlib.Path(flags.FLAGS.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        experiment.write_json(path, experiment.rounded(results))


if __name__ == "__main__":
    program.run(main)

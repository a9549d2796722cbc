r"""Runs a script as several workers of tf.distribute on this machine, and starts them again when one of them dies.

    python scripts/few_shot/launch_workers.py --workers=2 \
        scripts/few_shot/distributed_omniglot.py --quick

Each worker finds its place in the environment variable TF_CONFIG. Workers on several machines are started by what
starts processes there, with a TF_CONFIG of the same form; see distributed_omniglot.py.

SIGTERM, SIGHUP and Ctrl-C are passed on to the workers, which save where they are; those that still run after
6 seconds are killed.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import program

GRACE = 6.0  # Seconds that workers have to save their state.


def define_flags():
    flags.DEFINE_integer("workers", 2, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer("restarts", 3, "How often all are started again after one has died.", lower_bound=0)


def launch(command, workers, restarts):
    """Runs a command as workers until all of them have ended well.

    Args:
        command: List of str, the command of each worker.
        workers: Positive int.
        restarts: Non-negative int.

    Raises:
        SystemExit: If a worker has died more often than `restarts`, or this process was told to stop.
    """
    told = []
    before = {number: signal.signal(number, lambda number, frame: told.append(number))
              for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        for attempt in range(restarts + 1):
            addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
            processes = []
            for index in range(workers):
                task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
                # In a session of its own, so that a terminal's Ctrl-C reaches it once, from here.
                processes.append(subprocess.Popen(
                    command, env={**os.environ, "TF_CONFIG": json.dumps(task)}, start_new_session=True))
            try:
                failed = first_failure(processes, told)
                if told:
                    end(processes)
            finally:
                # The others wait for the one that died, some of them for minutes.
                for process in processes:
                    process.kill()
                    process.wait()
            if told:
                print(f"Stopped by {signal.Signals(told[0]).name}, and all workers with it: the same command goes on.",
                      file=sys.stderr, flush=True)
                raise SystemExit(128 + told[0])
            if failed is None:
                return
            print(f"Worker {failed} ended with code {processes[failed].returncode} at start {attempt + 1} of "
                  f"{restarts + 1}.", file=sys.stderr, flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise SystemExit(f"Workers died {restarts + 1} times; there are no restarts left.")


def first_failure(processes, told):
    """Index of the first process that fails, or None when all have ended well or `told` is no longer empty."""
    while not told:
        codes = [process.poll() for process in processes]
        failed = [index for index, code in enumerate(codes) if code]
        if failed or None not in codes:
            return failed[0] if failed else None
        time.sleep(0.1)
    return None


def end(processes):
    """Tells processes to stop, and waits for them for a while."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and None in [process.poll() for process in processes]:
        time.sleep(0.1)


def free_ports(count):
    """Ports of this machine that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main(arguments):
    if len(arguments) < 2:
        raise SystemExit("The script to run comes after the flags: launch_workers.py --workers=2 script.py ...")
    launch([sys.executable, *arguments[1:]], flags.FLAGS.workers, flags.FLAGS.restarts)


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(False)  # What comes after the name of the script to run is for that script.
    program.parse(define_flags, positional=True, tensorflow=False)
    program.run(main)

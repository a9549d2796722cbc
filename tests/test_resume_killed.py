"""Trainings in processes that are killed: the weights and the history of one that was not, bit for bit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import resumable_runs
from resumable_runs import RUNS, fit, make, outcome

RUN = pathlib.Path(resumable_runs.__file__)
# The training, killed at the file operation with a number.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from file_operations import FileOperations
import resumable_runs
with FileOperations(int(sys.argv.pop(1)), lambda name: os.kill(os.getpid(), signal.SIGKILL), sys.argv[2]):
    resumable_runs.main(*sys.argv[1:])
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def finish(process):
    errors = process.communicate(timeout=1200)[1]
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode == 0


@pytest.mark.slow
def test_a_process_killed_while_it_saves_is_gone_on_with(tmp_path):
    arguments = ["reptile", tmp_path / "run", tmp_path / "result", resumable_runs.EPOCHS]
    # In the middle of the third state or so.
    assert not finish(start("-c", KILLED, RUN.parent, 250, *arguments))
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert any(name.endswith(".part") for name in names) and any(name.endswith(".farhox") for name in names)
    assert finish(start(RUN, *arguments))
    model = make("reptile")
    assert (tmp_path / "result").read_text() == outcome(model, fit("reptile", model))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_processes_killed_at_random_moments_and_points_of_a_save_are_gone_on_with(tmp_path, name):
    """Three moments of each of eight kinds, and three file operations."""
    draws, epochs, kills = random.Random(name), 6, 0
    assert finish(start(RUN, name, tmp_path / "other", tmp_path / "whole", epochs))
    arguments = [name, tmp_path / "run", tmp_path / "result", epochs]
    for _ in range(3):
        process = start(RUN, *arguments)
        process.stdout.readline()
        time.sleep(draws.uniform(0.0, 0.15))
        process.kill()
        kills += not finish(process)
    for _ in range(3):
        kills += not finish(start("-c", KILLED, RUN.parent, draws.randrange(1, 300), *arguments))
    assert kills >= 3, kills
    assert finish(start(RUN, *arguments))
    assert (tmp_path / "result").read_text() == (tmp_path / "whole").read_text()

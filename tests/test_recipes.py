"""The five tasks of a new user, as the page has them: short, and one of them killed."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
TASKS = ("A folder of images", "New classes from a few images", "Wrong labels", "Serve and query", "Go on after a kill")


def test_each_of_the_five_tasks_has_a_block_of_at_most_fifteen_lines():
    titles = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert tuple(titles) == TASKS and len(BLOCKS) == 1 + len(TASKS)
    assert [title for title, block in zip(TASKS, BLOCKS[1:]) if len(block.strip().splitlines()) > 15] == []


# What the last block reads of those before it, a pause so that a signal comes in the middle, and what the run leaves.
AROUND = """
import json, time
import keras
import farhox
from sklearn.datasets import load_digits
x, labels = load_digits(return_X_y=True)
x = (x / 16).astype("float32")
fit = farhox.HyperOptimizer.fit
def slowly(self, *args, callbacks, **kwargs):
    def wait(epoch, logs):
        print(epoch, flush=True)
        time.sleep(PAUSE)
    return fit(self, *args, callbacks=[*callbacks, keras.callbacks.LambdaCallback(on_epoch_end=wait)], **kwargs)
farhox.HyperOptimizer.fit = slowly
BLOCK
json.dump([history.history["learning_rate"], [w.tolist() for w in model.get_weights()]], open("result.json", "w"))
"""


@pytest.mark.slow
def test_a_program_killed_without_warning_ends_as_if_nothing_had_happened(tmp_path):
    def program(folder, pause):
        folder.mkdir(exist_ok=True)
        code = AROUND.replace("PAUSE", str(pause)).replace("BLOCK", BLOCKS[-1])
        return subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert program(whole, 0).wait(300) == 0
    process = program(killed, 0.5)
    assert [process.stdout.readline().strip() for _ in range(4)] == ["0", "1", "2", "3"]
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait(300) == -signal.SIGKILL and not (killed / "result.json").exists()
    again = program(killed, 0)
    printed = again.communicate(timeout=300)[0].split()
    assert again.returncode == 0 and printed[0] in ("3", "4")  # It did not begin anew.
    result = json.loads((killed / "result.json").read_text())
    assert result == json.loads((whole / "result.json").read_text()) and len(result[0]) == 8

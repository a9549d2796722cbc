"""The comparison with peers: farhox alone, peers that are not there or fail, and when hypergradients agree."""

import json
import subprocess
import sys

import numpy as np
import pytest
from problems import assert_close
from script_files import given_flags, import_script, script_path


@pytest.fixture
def peers(monkeypatch):
    """The script as a module."""
    return import_script("peers", monkeypatch)


def measured_here(peers, monkeypatch):
    """Rows of farhox are measured in the process of the test."""
    def measured(script, words, **case):
        return peers.measure(**case)

    monkeypatch.setattr(peers.cases, "measured", measured)


def test_peer_without_an_environment_is_a_row_that_says_so_beside_farhox(tmp_path, peers, monkeypatch):
    measured_here(peers, monkeypatch)
    with given_flags(peers.define_flags, f"--environments={tmp_path}", "--noinstall", "--quick", "--workloads=W1"):
        problems = {"jax": peers.problem_of_environment("jax")}
        rows = peers.compared([peers.row_of(case, problems, tmp_path) for case in peers.chosen_cases(["W1"], ["jax"])])
    ours, *others = rows
    assert (ours["framework"], ours["difference"], ours["over_farhox"], ours["steps"]) == ("farhox", 0.0, 1.0, 3)
    assert ours["hypergradient_s"] > 0 and ours["plain_s"] > 0 and ours["first_s"] > 0 and "gradients" not in ours
    assert [(row["way"], row["problem"]) for row in others] == [
        (way, f"there is no environment in {tmp_path / 'environment_jax'}") for way in ("scan", "checkpoint")]
    assert json.loads(json.dumps(rows)) == rows
    assert [peers.shown(row)["over_farhox"] for row in rows] == ["1.00", "–", "–"]
    with np.load(tmp_path / "W1.npz") as arrays:
        assert set(arrays) == {"x", "y", "x_outer", "y_outer", "inner_variable_0", "inner_variable_1",
                               "outer_variable_0", "outer_variable_1"}
        assert arrays["x"].shape == (60, 8) and arrays["outer_variable_1"].shape == (60,)
        # The unconstrained variables: the logarithm of the learning rate, the logits of the weights.
        assert_close([arrays["outer_variable_0"]], [np.log(0.1)], 1e-6)
        assert_close([arrays["outer_variable_1"]], [np.zeros(60)], 1e-6)


@pytest.mark.skipif(sys.platform == "win32", reason="The Python of the environment is a shell script here.")
def test_peer_that_fails_is_a_row_with_the_last_line_that_it_says(tmp_path, peers, monkeypatch):
    with given_flags(peers.define_flags, f"--environments={tmp_path}", "--quick"):
        python = peers.python_of("torch")
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\necho Traceback >&2\necho ImportError: no torch >&2\nexit 1\n")
        python.chmod(0o700)
        (python.parents[1] / "filled").touch()
        assert peers.problem_of_environment("torch") is None
        row = peers.row_of(dict(workload="W1", framework="torch", way="by hand"), {"torch": None}, tmp_path)
    assert row["problem"] == "ImportError: no torch" and "hypergradient_s" not in row


@pytest.mark.slow
def test_peer_that_pip_cannot_install_is_a_problem_and_is_tried_again(tmp_path, peers, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with given_flags(peers.define_flags, f"--environments={tmp_path}", "--jax=a-package-that-nobody-made"):
        for _ in range(2):
            problem = peers.problem_of_environment("jax")
            assert problem.startswith("pip cannot install a-package-that-nobody-made numpy: ERROR: No matching")


def test_difference_is_relative_to_each_variable_but_not_to_one_that_hardly_counts(peers):
    expected = [np.float32(2.0), np.array([3.0, 4.0], "float32"), np.float32(1e-9)]
    assert peers.difference(expected, expected) == 0.0
    assert peers.difference([2.0, [3.0, 4.0], 0.0], expected) == pytest.approx(1e-9 / (1e-2 * 29 ** 0.5))
    assert peers.difference([2.1, [3.0, 4.0], 1e-9], expected) == pytest.approx(0.05)
    assert peers.difference([2.0, [3.0, 4.5], 1e-9], expected) == pytest.approx(0.1)
    assert peers.difference([2.0, [3.0, np.nan], 1e-9], expected) == np.inf
    assert peers.difference([2.0, [3.0], 1e-9], expected) == np.inf


def test_several_rounds_are_medians_and_a_problem_of_one_of_them_is_kept(peers):
    row = dict(workload="W1", framework="jax", way="scan", steps=3, plain_s=1.0)
    rounds = [{**row, "hypergradient_s": seconds} for seconds in (3.0, 1.0, 2.0)]
    assert peers.median_of(rounds) == {**row, "hypergradient_s": 2.0, "rounds": 3}
    assert peers.median_of([rounds[0], {**row, "problem": "none"}])["problem"] == "none"


@pytest.mark.slow
def test_comparison_with_farhox_alone_writes_its_rows_and_a_picture(tmp_path):
    path, picture = tmp_path / "peers.json", tmp_path / "peers.png"
    finished = subprocess.run(
        [sys.executable, str(script_path("peers")), "--quick", "--peers=", "--workloads=W1", "--rounds=2",
         f"--json={path}", f"--picture={picture}"], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    (row,) = json.loads(path.read_text())["results"]
    assert (row["workload"], row["way"], row["rounds"], row["difference"]) == ("W1", "reverse", 2, 0.0)
    assert row["hypergradient_s"] > 0 and row["growth_mb"] > 0 and picture.stat().st_size > 5_000


@pytest.mark.slow
def test_comparison_with_peers_needs_a_folder_for_their_environments():
    finished = subprocess.run([sys.executable, str(script_path("peers")), "--quick"], capture_output=True, text=True,
                              timeout=300)
    assert finished.returncode == 1 and "--environments must name a folder" in finished.stderr

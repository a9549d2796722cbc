"""The benchmark: its competitors compute what farhox computes, and what it writes is complete."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close
from script_files import import_script, script_path
from unrolled import unrolled_hypergradient

import farhox


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    return import_script("benchmark_hypergradients", monkeypatch)


@pytest.fixture
def workloads(monkeypatch):
    """What it measures."""
    return import_script("workloads", monkeypatch)


@pytest.mark.slow
def test_quick_run_writes_a_row_with_all_measurements(tmp_path, benchmark):
    path = tmp_path / "benchmark.json"
    finished = subprocess.run(
        [sys.executable, str(script_path("benchmark_hypergradients")), "--quick", "--workloads=W2",
         "--methods=reverse", "--steps=3", "--repeats=2", f"--json={path}"],
        capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(path.read_text())
    assert results["tensorflow"] == tf.__version__ and results["processor"]
    (row,) = results["results"]
    assert (row["workload"], row["method"], row["steps"], row["repeats"], row["threads"]) == ("W2", "reverse", 3, 2, 1)
    assert row["hypergradient_s"] > 0 and row["plain_s"] > 0 and row["growth_mb"] > 0
    assert row["tracing_s"] > 0 and row["first_call_s"] > 0
    assert row["over_plain"] == pytest.approx(row["hypergradient_s"] / row["plain_s"])
    # 8-6-6-3 with biases: 117 weights, as many of momentum, and the step.
    assert row["state_mb"] * 2**20 == 4 * 2 * 117 + 8
    assert finished.stdout.splitlines() == benchmark.cases.table([row], benchmark.COLUMNS).splitlines()


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("workload, method", [
    ("W1", "reverse"), ("W2", "reverse_sqrt"), ("W2", "forward"),
    pytest.param("W1", "reverse_sqrt", marks=pytest.mark.slow), pytest.param("W2", "reverse", marks=pytest.mark.slow)])
def test_naive_tape_of_the_benchmark_gives_the_hypergradient_of_the_methods(workload, method, workloads):
    task = workloads.made(workload, None, quick=True)
    data = task.inner_batches(5), task.outer_batch
    expected, loss = workloads.unrolled(task.problem, *data)
    result = workloads.METHODS[method].compute(task.problem, *data)
    assert_close([result.outer_loss], [loss], 1e-5)
    assert_close(result.gradients, expected, 1e-4)


@pytest.mark.slow
def test_implicit_hypergradient_of_the_benchmark_is_that_of_a_long_training(workloads):
    task = workloads.near_optimum(quick=True)
    batches = task.inner_batches(200)
    expected, _ = workloads.unrolled(task.problem, batches, task.outer_batch, workloads.warmed_up(task))
    result = workloads.METHODS["implicit"].compute(
        task.problem, batches, task.outer_batch, workloads.warmed_up(task))
    assert_close(result.gradients, expected, 1e-2)


@pytest.mark.one_case
@pytest.mark.parametrize("workload", ["W1", "W2", "W4"])
def test_plain_training_of_the_benchmark_takes_the_steps_of_the_problem(workload, workloads):
    task = workloads.made(workload, None, quick=True)
    batches = task.inner_batches(5)
    state = task.problem.evaluate(batches, task.outer_batch).state
    assert_close(workloads.plain_training(task, batches), state.variables, 1e-5)


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method", ["maml", "fomaml", "imaml", "hyper_representation"])
def test_plain_episodes_of_the_benchmark_have_the_losses_of_the_problem(method, workloads):
    task = workloads.few_shot_learner(quick=True, method=method)
    batches = task.inner_batches(3)
    evaluation = task.problem.over_episodes().evaluate(batches, task.outer_batch)
    plain = workloads.plain_episodes(task, batches, task.outer_batch)
    assert plain.shape == (2,) and evaluation.inner_losses.shape == (2, 3)
    assert_close([tf.reduce_mean(plain)], [evaluation.outer_loss], 1e-5)


def test_naive_tape_is_left_out_beyond_the_steps_that_it_can_trace(benchmark):
    cases = benchmark.chosen_cases(["W1"], ["naive", "reverse"], ["100", "1000"], quick=False)
    assert [(case["method"], case["steps"]) for case in cases] == [
        ("reverse", 100), ("naive", 100), ("reverse", 1000)]


@pytest.fixture
def scale(monkeypatch):
    """The script of long and wide trainings as a module."""
    return import_script("benchmark_scale", monkeypatch)


def test_cases_of_scale_have_a_strength_per_weight_and_forward_mode_for_few(scale):
    cases = scale.cases_of("outer", ["reverse", "forward"], quick=False)
    assert max(case["strengths"] for case in cases) == 1000 * 1000 == cases[-1]["widths"][0] * cases[-1]["widths"][1]
    assert [case["strengths"] for case in cases if case["method"] == "forward"] == [1, 10]
    assert [case["steps"] for case in scale.cases_of("steps", ["reverse"], False)] == [10, 100, 1000, 10_000]


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["reverse", "reverse_memory", "reversible", "forward"])
def test_plain_training_and_methods_of_scale_belong_to_one_training(method, scale):
    problem, inner_batches, outer_batch = scale.network_problem(4, [6, 5, 3], strengths=6)
    result = scale.HYPERGRADIENTS[method].compute(problem, inner_batches, outer_batch)
    assert_close(scale.plain_training(problem, inner_batches), result.state.variables, 1e-5)
    assert_close(result.gradients, unrolled_hypergradient(problem, inner_batches, outer_batch), 1e-4)


def test_planned_memory_is_that_of_states_and_what_is_kept(scale):
    problem, inner_batches, _ = scale.network_problem(30, [6, 5, 3], strengths=1)
    state = 4 * 2 * (6 * 5 + 5 + 5 * 3 + 3) + 8
    assert scale.planned_bytes("reverse_states", problem, inner_batches) == 31 * state
    assert scale.planned_bytes("reverse_sqrt", problem, inner_batches) >= (5 + 6 + 1) * state
    assert scale.planned_bytes("forward", problem, inner_batches) == 0
    assert scale.planned_bytes("reverse_memory", problem, inner_batches) >= 31 * state


@pytest.mark.slow
def test_quick_run_of_scale_writes_rows_and_a_picture(tmp_path):
    path, picture = tmp_path / "scale.json", tmp_path / "scale.png"
    finished = subprocess.run(
        [sys.executable, str(script_path("benchmark_scale")), "--quick", "--sweeps=weights", "--methods=reverse",
         f"--json={path}", f"--picture={picture}"], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    rows = json.loads(path.read_text())["results"]
    assert [row["weights"] for row in rows] == [36, 70] and picture.stat().st_size > 10_000
    assert all(row["hypergradient_s"] > 0 and row["plain_s"] > 0 and row["growth_mb"] > 0 for row in rows)


@pytest.mark.slow
def test_benchmark_of_xla_says_what_was_chosen(monkeypatch):
    script = import_script("benchmark_xla", monkeypatch)
    rows = {workload: script.measure(workload, quick=True) for workload in ("online", "dropout")}
    assert all(row["line"].startswith('jit_compile="auto": with') and row["choice_s"] > 0 for row in rows.values())
    assert "relative difference" in rows["dropout"]["line"] and rows["dropout"]["chosen"] == "none"
    assert rows["online"]["without"].endswith("ms") and rows["online"]["with_xla"].endswith("ms")


@pytest.mark.slow
def test_the_loop_by_hand_of_small_steps_learns_what_fit_learns(monkeypatch):
    script = import_script("benchmark_small_steps", monkeypatch)
    x, y = (np.random.default_rng(0).normal(size=shape).astype("float32") for shape in ((64, 100), (64,)))
    data = tf.data.Dataset.from_tensors(((x[None], y[None]), (x, y))).repeat(30)
    _, w, log_rate = script.loop_by_hand(x, y, 30)()
    for model in (script.farhox_model(100), script.ByHand(100)):
        model.compile(keras.optimizers.SGD(script.OUTER_RATE), steps_per_execution=7)
        model.fit(data, verbose=0)
        learned = model.problem.inner_variables + model.problem.outer_variables if isinstance(
            model, farhox.HyperOptimizer) else [model.w, model.log_rate]
        assert_close(learned, [w, log_rate], 1e-5)
    row = script.measure("fit_50", quick=True, repeats=1)
    assert set(name for name, _ in script.COLUMNS) <= set(row) and row["kinds"]["MatMul"] == 4

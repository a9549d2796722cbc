"""A few inner steps are written out, there and back: no loop, nothing run twice, the same numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import assert_close, assert_identical, heavy_ball, network_problem, scalar_quadratic, variable

import farhox
from farhox import hypergradients
from farhox._core import few

METHODS = [farhox.ReverseHG(), farhox.ReverseHG(truncation=1), farhox.ReverseHG(truncation=0), farhox.ForwardHG()]


def graph_of(case, method):
    function = tf.function(lambda: method.compute(*case[:3]), autograph=False)
    return function, function.get_concrete_function().graph


def operations(graph, kind):
    """How many operations of a kind there are in the graph, what is called included."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return sum(kind in node.op for node in nodes)


def test_a_row_of_tensors_is_written_and_read_as_an_array_is():
    row = few.FewTensors().write(0, tf.constant(1.0)).write(1, tf.constant(2.0))
    other = row.write(0, tf.constant(3.0))
    assert [float(row.read(0)), float(row.read(1)), float(other.read(0))] == [1.0, 2.0, 3.0]
    assert_identical(other.stack(), tf.constant([3.0, 2.0]))


@pytest.mark.parametrize("steps", [1, few.FEW, few.FEW + 1])
def test_no_loop_is_made_of_a_few_steps(steps):
    _, graph = graph_of(scalar_quadratic(outer=("rate",), steps=steps), farhox.ReverseHG())
    assert (operations(graph, "While") == 0) == (operations(graph, "TensorList") == 0) == (steps <= few.FEW)


@pytest.mark.parametrize("dynamics, steps", [("gradient_descent", 1), ("momentum", few.FEW), ("adam", 2)])
def test_steps_written_out_have_the_hypergradient_of_the_unrolled_tape(dynamics, steps, float64):
    case = network_problem("BatchNormalization", dynamics, steps=steps, extra=[keras.layers.Dropout(0.5)])
    result = farhox.ReverseHG().compute(*case[:3])
    assert_close(result.gradients, unrolled.unrolled_hypergradient(*case[:3]), 1e-10)


def test_an_initial_value_is_learned_through_one_step_written_out():
    case = scalar_quadratic(outer=("rate", "initial"), steps=1)
    function, graph = graph_of(case, farhox.ReverseHG())
    assert operations(graph, "While") == 0
    assert_close(function().gradients, case.expected, 1e-12)


def test_an_early_stop_keeps_the_loop():
    case = scalar_quadratic(outer=("rate",), steps=1, stop_tolerance=1e-9)
    function, graph = graph_of(case, farhox.ReverseHG())
    assert operations(graph, "While") > 0
    assert_close(function().gradients, case.expected, 1e-12)


@pytest.mark.parametrize("memory, written_out", [(None, True), (10**6, True), (16, False), (0, False)])
def test_steps_are_written_out_where_all_that_is_needed_of_them_may_be_stored(memory, written_out, float64):
    model = keras.Sequential([keras.Input([20]), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])
    rate = variable(0.1)
    problem = farhox.supervised_problem(
        model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), farhox.Momentum(rate), [rate],
        learn_initialization=False)
    random = np.random.default_rng(0)
    batch = random.normal(size=(6, 20)), random.integers(0, 3, 6)
    case = problem, farhox.repeat(batch, 3), batch
    function, graph = graph_of(case, farhox.ReverseHG(memory=memory))
    again = problem.memory_plan(3, batch, memory=memory).computed_again
    assert any("MatMul" in choice.name for choice in again) != written_out
    # The way there is written out in any case; the way back then runs parts of each step again.
    assert (operations(graph, "While") == 0) == written_out
    assert_close(function().gradients, unrolled.unrolled_hypergradient(*case), 1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_steps_written_out_are_those_of_the_loops(method, float64, monkeypatch):
    case = heavy_ball("float64")
    case = case._replace(inner_batches=case.inner_batches[:3])
    written_out = graph_of(case, method)[0]()
    assert operations(graph_of(case, method)[1], "While") == 0
    monkeypatch.setattr(few, "FEW", 1)
    function, graph = graph_of(case, method)
    assert operations(graph, "While") > 0
    looped = function()
    assert_close(written_out.gradients, looped.gradients, 1e-14)
    for part in ("outer_loss", "inner_losses", "state"):
        assert_identical(getattr(written_out, part), getattr(looped, part))


@pytest.mark.parametrize("outer, written_out", [(("rate", "target", "initial"), True), (("schedule", "target"), False)])
def test_forward_mode_is_written_out_where_no_variable_has_a_loop_over_its_directions(outer, written_out, float64):
    case = scalar_quadratic(outer=outer, steps=few.FEW)
    function, graph = graph_of(case, farhox.ForwardHG())
    assert (operations(graph, "While") == 0) == written_out
    assert_close(function().gradients, case.expected, 1e-12)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0)])
def test_a_few_steps_of_reptile_written_out_are_those_of_the_loop(weights, float64, monkeypatch):
    case = scalar_quadratic(outer=("initial",), steps=2)
    case = case._replace(inner_batches=tf.constant([[0.5, 0.4], [0.3, 0.8]], tf.float64),
                         outer_batch=tf.constant([1.0, 2.0], tf.float64))
    method = hypergradients.ReptileHG(step_weights=weights)
    found, loops = [], []
    for count in (few.FEW, 0):
        monkeypatch.setattr(few, "FEW", count)
        function, graph = graph_of(case, method)
        loops.append(operations(graph, "While"))
        found.append(function())
    assert loops[0] < loops[1]
    for part in ("gradients", "outer_loss", "inner_losses", "state"):
        assert_identical(*[getattr(result, part) for result in found])
    ends = np.asarray(found[0].state.variables[0])
    if weights is None:
        assert_close(found[0].gradients, [np.mean(case.problem.inner_variables[0].numpy() - ends)], 1e-14)


@pytest.mark.parametrize("rhs", [[1.0, 2.0], [0.0, 0.0], [1.0, 0.0], [1.0, np.nan]])
@pytest.mark.parametrize("solver", [
    farhox.linear_solvers.ConjugateGradient, farhox.linear_solvers.FixedPoint,
    lambda **settings: farhox.linear_solvers.Neumann(step_size=0.7, **settings)])
def test_a_few_steps_of_a_solver_written_out_end_where_the_loop_ends(solver, rhs, monkeypatch):
    # The first step solves for the third right-hand side; the matrix is not definite in the second direction.
    matrix = tf.constant([[1.0, 0.0], [0.0, -0.5]], tf.float64)
    found = []
    for count in (few.FEW, 0):
        monkeypatch.setattr(few, "FEW", count)
        solve = tf.function(lambda: solver(max_steps=3).solve(
            lambda v: tf.linalg.matvec(matrix, v), tf.constant(rhs, tf.float64)), autograph=False)
        graph = solve.get_concrete_function().graph
        assert (operations(graph, "While") == 0) == (count == 3)
        found.append(solve())
    assert_identical(*found)

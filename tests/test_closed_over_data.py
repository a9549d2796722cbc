"""What an objective closes over: large arrays stay outside of the traced graph, and a graph that is not imported."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, assert_identical, variable
from unrolled import finite_differences

import farhox
from farhox._core.large_constants import LARGE

EXAMPLES, INPUTS = 400, 30  # 400 x 30 numbers of float64: 96 kB.


def closed_over(kind):
    """A problem whose objectives close over their data, as NumPy arrays or as tensors."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(EXAMPLES, INPUTS)), random.normal(size=(EXAMPLES, 1))
    assert x.nbytes > LARGE
    if kind == "tensors":
        x, y = tf.constant(x), tf.constant(y)
    w, rate, l2 = variable(np.full((INPUTS, 1), 0.1)), variable(0.05, name="rate"), variable(0.3, name="l2")

    def inner(_):
        with tf.control_dependencies([tf.convert_to_tensor(x)]):
            return loss()

    def loss():
        return tf.reduce_mean(tf.square(tf.matmul(x, tf.tanh(w.value)) - y)) + l2 * tf.reduce_sum(tf.square(w))

    def outer(_):
        return tf.reduce_mean(tf.square(tf.matmul(x, tf.tanh(w.value)) - y))

    return farhox.BilevelProblem(inner, outer, [w], [rate, l2], farhox.GradientDescent(rate), allow_unused=True)


def constants(graph):
    """Bytes of the constants in the functions of a graph, each function counted once."""
    nodes = [node for function in graph.as_graph_def().library.function for node in function.node_def]
    return sum(len(node.attr["value"].tensor.tensor_content) for node in nodes if node.op == "Const")


@pytest.mark.parametrize("method", [
    farhox.ReverseHG(), farhox.ForwardHG(), pytest.param(farhox.ReverseHG(checkpoint_every=2), marks=pytest.mark.slow),
    pytest.param(farhox.ImplicitHG(linear_solver=farhox.linear_solvers.Direct()), marks=pytest.mark.slow)],
    ids=["reverse", "forward", "kept", "implicit"])
def test_large_arrays_give_the_numbers_of_tensors_and_no_graph_holds_a_copy_of_them(method, float64):
    batches = farhox.repeat(tf.zeros([1]), 3)
    results = []
    for kind in ("arrays", "tensors"):
        problem = closed_over(kind)
        step = tf.function(lambda problem=problem: method.compute(problem, batches, tf.zeros([1])), autograph=False)
        results.append(step().gradients)
        assert constants(step.get_concrete_function().graph) < LARGE
    assert_identical(*results)
    if not isinstance(method, farhox.ImplicitHG):  # Which is right at a stationary point, and this is none.
        assert_close(results[0], finite_differences(closed_over("arrays"), batches, tf.zeros([1])), 1e-7)


def test_large_arrays_are_the_same_under_xla_and_in_eager_mode(float64):
    batches, method, problem = farhox.repeat(tf.zeros([1]), 3), farhox.ReverseHG(), closed_over("arrays")
    eager = method.compute(problem, batches, tf.zeros([1])).gradients
    compiled = tf.function(lambda: method.compute(problem, batches, tf.zeros([1])).gradients, autograph=False,
                           jit_compile=True)()
    assert_close(compiled, eager, 1e-12)


def test_shapes_that_the_users_code_sets_stay_beside_large_arrays():
    table, w, rate = np.ones((LARGE // 8, 2)), variable([1.0, 2.0]), variable(0.1)

    def inner(batch):
        rows = tf.boolean_mask(tf.constant(table), batch)
        rows.set_shape([3, 2])
        if rows.shape != (3, 2):
            raise ValueError(f"Received: {rows.shape}")
        return tf.reduce_sum(keras.ops.matmul(rows, tf.reshape(w, [2, 1])) ** 2)

    problem = farhox.BilevelProblem(inner, lambda _: tf.reduce_sum(tf.square(w)), [w], [rate],
                                    farhox.GradientDescent(rate))
    mask = tf.constant(np.arange(len(table)) < 3)
    result = farhox.ReverseHG().compute(problem, farhox.repeat(mask, 1), tf.zeros([1]))
    # w - 6 rate (w_1 + w_2): both coordinates move by 1.8.
    np.testing.assert_allclose(result.outer_loss, 0.8 ** 2 + 0.2 ** 2, rtol=1e-12)
    np.testing.assert_allclose(result.gradients[0], -2 * 18 * (-0.8 + 0.2), rtol=1e-12)


@pytest.mark.parametrize("make", [lambda x: farhox.repeat(x, 2), lambda x: farhox.gather(x, [[0, 1], [2, 3]])],
                         ids=["repeat", "gather"])
def test_large_arrays_that_are_given_inside_of_a_function_are_not_part_of_its_graph(make, float64):
    x = np.random.default_rng(0).normal(size=(EXAMPLES, INPUTS))
    w, rate = variable(np.full((INPUTS, 1), 0.1)), variable(0.05, name="rate")

    def objective(x):
        return tf.reduce_mean(tf.square(tf.matmul(x, tf.tanh(w.value)) - 1.0))

    problem = farhox.BilevelProblem(objective, objective, [w], [rate], farhox.GradientDescent(rate))
    results = []
    for data in (x, tf.constant(x)):
        step = tf.function(lambda data=data: farhox.ReverseHG().compute(problem, make(data), data).gradients)
        results.append(step())
        graph = step.get_concrete_function().graph
        own = [node for node in graph.as_graph_def().node if node.op == "Const"]
        assert constants(graph) + sum(len(node.attr["value"].tensor.tensor_content) for node in own) < LARGE
    assert_identical(*results)


@pytest.mark.parametrize("branch", [
    lambda yes: tf.cond(tf.constant(True), yes, lambda: 0.0 * yes()),
    lambda yes: tf.switch_case(tf.constant(1), [lambda: 0.0 * yes(), yes]),
    lambda yes: tf.while_loop(lambda i, _: i < 2, lambda i, total: (i + 1, total + yes()),
                              [0, tf.zeros([], "float64")])[1]], ids=["cond", "switch", "while"])
def test_rules_inside_of_branches_and_loops_hold_beside_large_arrays(branch, float64):
    data = np.random.default_rng(0).normal(size=LARGE // 8)
    w, scale = variable([0.7, -0.4]), variable(0.3)

    def inner(_):
        return tf.reduce_mean(data * data) * branch(
            lambda: tf.reduce_sum(tf.square(scale * w - tf.stop_gradient(tf.tanh(w.value)))) * tf.reduce_max(data))

    problem = farhox.BilevelProblem(inner, lambda _: tf.reduce_sum(tf.square(w)), [w], [scale],
                                    farhox.GradientDescent(0.05))
    arguments = problem, farhox.repeat(tf.zeros([1]), 3), tf.zeros([1])
    assert_close(farhox.ReverseHG().compute(*arguments).gradients, finite_differences(*arguments), 1e-7)


def test_arrays_that_no_graph_has_room_for_are_refused(monkeypatch):
    monkeypatch.setattr("farhox._core.large_constants.ROOM", 2**16)
    with pytest.raises(ValueError, match="closes over .*must stay under 2 GB together.*Received: 0.0 GB"):
        farhox.ReverseHG().compute(closed_over("arrays"), farhox.repeat(tf.zeros([1]), 1), tf.zeros([1]))


@pytest.mark.one_case
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_graph_that_is_not_imported_is_copied_with_the_same_results_and_said(mode, float64, monkeypatch):
    problem, method, batches = closed_over("tensors"), farhox.ReverseHG(), farhox.repeat(tf.zeros([1]), 3)

    def compute():
        return method.compute(problem, batches, tf.zeros([1]))

    function = compute if mode == "eager" else tf.function(compute, autograph=False, jit_compile=mode == "xla")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imported = function()
    assert "step_is_copied" not in imported.diagnostics

    def refuse(*_, **__):
        raise ValueError("not today")

    monkeypatch.setattr(tf.graph_util, "import_graph_def", refuse)
    problem = closed_over("tensors")
    function = compute if mode == "eager" else tf.function(compute, autograph=False, jit_compile=mode == "xla")
    with pytest.warns(RuntimeWarning, match="copied operation by operation: .*TensorFlow says: not today"):
        copied = function()
    assert bool(copied.diagnostics["step_is_copied"])
    assert_identical(copied.gradients, imported.gradients)

"""Tensors of a traced step that are known to be zero are left out of sums, and nothing else changes."""

import numpy as np
import pytest
import tensorflow as tf
from problems import assert_identical

from farhox._core.step_graph import StepGraph
from farhox._core.zeros import without_zeros

X = [np.random.default_rng(index).normal(size=[3, 3]) for index in range(3)]


def traced():
    """A step with sums, products, broadcasting and operations that are not known, and its pullback along cotangents."""
    def step(inputs):
        a, b, c = inputs
        joined = tf.concat([a, tf.sin(b)], 0)
        return [a @ b + tf.tanh(a), 0.9 * a + b + tf.reduce_sum(c), tf.tanh(tf.transpose(b)) * c, joined]

    graph = StepGraph(step, [tf.zeros([3, 3], tf.float64)] * 3)
    cotangents = graph.placeholders(graph.outputs)
    return graph, cotangents, graph.pullback(graph.outputs, graph.inputs, cotangents)


def run(graph, fetches, cotangents, values):
    feeds = [*zip(graph.inputs, map(tf.constant, X)), *zip(cotangents, values)]
    return graph.run(fetches, feeds)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("zeros", [(0,), (1, 3), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_products_are_those_with_zeros_that_are_fed(mode, zeros, copied, monkeypatch):
    graph, cotangents, products = traced()
    given = [None if index in zeros else tf.constant(np.random.default_rng(index).normal(size=cotangent.shape))
             for index, cotangent in enumerate(cotangents)]
    fed = [tf.zeros(cotangent.shape, tf.float64) if value is None else value
           for value, cotangent in zip(given, cotangents)]

    def refuse(*_, **__):
        raise ValueError("not today")

    def computed(values):
        return run(graph, products, cotangents, values)

    function = computed if mode == "eager" else lambda values: tf.function(
        lambda: computed(values), autograph=False, jit_compile=mode == "xla")()
    if copied:
        monkeypatch.setattr(tf.graph_util, "import_graph_def", refuse)
        with pytest.warns(RuntimeWarning, match="copied"):
            left_out = function(given)
    else:
        left_out = function(given)
    assert_identical([value + 0.0 for value in left_out], [value + 0.0 for value in function(fed)])  # -0 is 0.


def test_sums_lose_the_zeros_and_what_is_zero_is_not_computed():
    graph, cotangents, products = traced()
    counts = []
    for values in ([tf.ones(cotangent.shape, tf.float64) for cotangent in cotangents],
                   [None, *[tf.ones(cotangent.shape, tf.float64) for cotangent in cotangents[1:]]]):
        function = tf.function(lambda values=values: run(graph, products, cotangents, values), autograph=False)
        operations = function.get_concrete_function().graph.get_operations()
        counts.append({kind: sum(len(op.inputs) for op in operations if op.type == kind)
                       for kind in ("AddN", "MatMul")})
    assert counts[0]["MatMul"] == 4 and counts[1]["MatMul"] == 0
    assert counts[0]["AddN"] > counts[1]["AddN"]


def test_of_what_has_no_known_shape_nothing_is_said():
    with tf.Graph().as_default() as graph:
        zero = tf.compat.v1.placeholder(tf.float32, [None], "zero")
        tf.negative(zero, name="negative")
        tf.add(tf.zeros([1]), tf.compat.v1.placeholder(tf.float32, [4], "other"), name="broadcast")
    nodes = {node.name: node for node in graph.as_graph_def().node}

    def shape(name):
        return graph.get_tensor_by_name(name).shape

    assert without_zeros(nodes, ["zero:0"], shape) == ({}, {"zero:0"})
    changed, _ = without_zeros(nodes, ["other:0"], shape)
    assert changed == {}  # What is left, of one number, is not the sum, of four.

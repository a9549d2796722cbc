"""The cut: what is kept of a step for the way back, that it is cheapest, and that every part of it counts."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, variable

import farhox
from farhox._core import cut
from farhox._core.step_graph import StepGraph
from farhox.hypergradients import walk
from farhox.problem.back_step import BackStep
from farhox.problem.inner_training import InnerTraining


def chain():
    """a -> b = a @ a (dear) -> c = tanh(b) -> d = c * cotangent, with the cotangent known later."""
    graph = StepGraph(lambda inputs: [tf.tanh(inputs[0] @ inputs[0])], [tf.zeros([64, 64])])
    (cotangent,) = graph.placeholders(graph.outputs)
    products = graph.pullback(graph.outputs, graph.inputs, [cotangent])
    return graph, products, cotangent


def test_a_dear_product_is_kept_and_its_input_is_free():
    graph, products, cotangent = chain()
    kept = cut.tensors_to_keep(graph, products, graph.inputs, graph.outputs, [cotangent], float("inf"))
    assert [tensor.op.type for tensor in kept] == ["Tanh"]
    assert cut.kept_bytes(kept) == 64 * 64 * 4


def test_nothing_is_kept_that_does_not_fit_or_that_is_free():
    graph, products, cotangent = chain()
    for budget, free in ((64 * 64 * 4 - 1, graph.inputs), (float("inf"), [*graph.inputs, *graph.outputs, *graph.inside(
            graph.outputs)])):
        assert cut.tensors_to_keep(graph, products, free, graph.outputs, [cotangent], budget) == []


def brute_force(edges):
    """The least capacity between source and sink over all ways to part the nodes."""
    nodes = sorted({node for edge in edges for node in edge[:2]} - {"source", "sink"})
    least = np.inf
    for count in range(len(nodes) + 1):
        for side in itertools.combinations(nodes, count):
            inside = {"source", *side}
            least = min(least, sum(c for a, b, c in edges if a in inside and b not in inside))
    return least


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_least_one(seed):
    random = np.random.default_rng(seed)
    names = ["source", "a", "b", "c", "d", "e", "sink"]
    edges = [(x, y, float(random.integers(1, 20))) for x, y in itertools.permutations(names, 2)
             if y != "source" and x != "sink" and random.random() < 0.5]
    flow = cut._Flow()
    for edge in edges:
        flow.add(*edge)
    side = flow.source_side()
    assert sum(c for a, b, c in edges if a in side and b not in side) == pytest.approx(brute_force(edges))


def wide_problem(learn_initialization=False):
    """A network whose products of matrices are dearer than their bytes, with momentum and a stop inside."""
    model = keras.Sequential([
        keras.Input([300]), keras.layers.Dense(6, "tanh"), keras.layers.BatchNormalization(),
        keras.layers.Dense(6, "tanh"), keras.layers.Dense(3)])
    rate, decay, strength = variable(0.1), variable(0.5), variable(0.3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def inner(batch):
        features = model(batch[0], training=True)
        own = keras.ops.mean(keras.ops.square(features - keras.ops.stop_gradient(2.0 * keras.ops.tanh(features))))
        return loss(batch[1], features) + strength * own

    outer_variables = [rate, decay, strength, *(model.trainable_variables if learn_initialization else [])]
    problem = farhox.BilevelProblem(
        inner, lambda batch: loss(batch[1], model(batch[0], training=False)), model.trainable_variables,
        outer_variables, farhox.Momentum(rate, decay), model.non_trainable_variables)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(4, 5, 300)), random.integers(0, 3, (4, 5))
    return problem, (x, y), (x[0], y[0])


def hypergradient(data, memory=None):
    return tf.function(lambda: farhox.ReverseHG(memory=memory).compute(*data).gradients, autograph=False)()


@pytest.mark.slow
def test_every_kept_tensor_counts(float64, monkeypatch):
    data = wide_problem()
    expected = hypergradient(data, memory=0)
    assert_close(hypergradient(data), expected, 1e-12)
    run = BackStep.run

    def disturbed(number):
        def disturbed_run(self, t, state, after, kept, adjoint, **keywords):
            kept = [(tensor, value * 1.5 if i == number else value) for i, (tensor, value) in enumerate(kept)]
            count.append(len(kept))
            return run(self, t, state, after, kept, adjoint, **keywords)
        return disturbed_run

    count, number = [], 0
    while not count or number < count[-1]:
        monkeypatch.setattr(BackStep, "run", disturbed(number))
        found = hypergradient(data)
        assert max(np.max(np.abs(a - b)) for a, b in zip(found, expected)) > 1e-6, number
        number += 1
    assert number >= 1


@pytest.mark.slow
def test_an_index_that_is_off_by_one_and_a_stop_that_is_left_in_are_seen(float64, monkeypatch):
    data = wide_problem()
    expected = hypergradient(data)
    kept_values, state, run = walk.Record.kept_values, walk.Record.state, BackStep.run
    faults = {  # The first step and the last one have numbers in the place of indices.
        "kept of the next step": (walk.Record, "kept_values", lambda self, index: kept_values(
            self, index if isinstance(index, int) else tf.minimum(index + 1, 3))),
        "state of the step before": (walk.Record, "state", lambda self, index: state(
            self, index if isinstance(index, int) else tf.maximum(index - 1, 0))),
        "state after is that before": (BackStep, "run", lambda self, t, state, after, kept, adjoint, **keywords: run(
            self, t, state, state, kept, adjoint, **keywords)),
        "a stop": (data[0], "stop_gradient", "tensorflow")}
    for name, fault in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(*fault)
            found = hypergradient(data)
        assert max(np.max(np.abs(a - b)) for a, b in zip(found, expected)) > 1e-6, name


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("method,learned,without", [
    (farhox.ReverseHG(), False, 1), (farhox.ReverseHG(checkpoint_every=2), False, 1), (farhox.ReverseHG(), True, 0),
    (farhox.ReverseHG(truncation=2), False, 1)])
def test_the_last_step_back_takes_no_adjoint_that_nothing_reads(method, learned, without, float64, monkeypatch):
    problem, batches, outer_batch = wide_problem(learned)
    run, taken = BackStep.run, []

    def counted(self, *arguments, of_state=True):
        taken.append(of_state)
        return run(self, *arguments, of_state=of_state)

    monkeypatch.setattr(BackStep, "run", counted)
    found = tf.function(lambda: method.compute(problem, batches, outer_batch).gradients, autograph=False)()
    assert taken.count(False) == without and any(taken)
    monkeypatch.setattr(walk.Walk, "_has_its_own_first_step", lambda *arguments: False)
    assert_close(found, method.compute(problem, batches, outer_batch).gradients, 1e-12)


@pytest.mark.slow
def test_the_plan_says_what_is_kept_and_what_is_computed_again(float64):
    problem, (x, y), _ = wide_problem()
    plan = problem.memory_plan(4, (x[0], y[0]), memory=None)
    training = InnerTraining(problem, (x, y))
    assert plan.state_bytes == cut.kept_bytes(tf.nest.flatten(training.start))
    kept = BackStep(training, range(len(problem.inner_variables))).kept(float("inf"), 4)
    assert sum(choice.bytes for choice in plan.kept) == cut.kept_bytes(kept) > 0
    assert plan.total_bytes == 5 * plan.state_bytes + 4 * cut.kept_bytes(kept)
    assert "Tanh" in str(plan) and "4 steps" in str(plan)
    # After a training its batches are the example.
    fresh, batches, outer = wide_problem()
    with pytest.raises(ValueError, match="inner_batch must be given before the first training"):
        fresh.memory_plan(4)
    fresh.evaluate(batches, outer)
    assert fresh.memory_plan(4, memory=None).total_bytes == plan.total_bytes
    nothing = problem.memory_plan(4, (x[0], y[0]), memory=0)
    assert not nothing.kept and any("MatMul" in choice.name for choice in nothing.computed_again)


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": 2, "memory": -1}])
def test_a_plan_is_for_a_number_of_steps_and_bytes(arguments):
    problem, (x, y), _ = wide_problem()
    with pytest.raises(ValueError, match="must be a (positive|non-negative) integer"):
        problem.memory_plan(inner_batch=(x[0], y[0]), **arguments)

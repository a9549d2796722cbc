"""How a computation runs: pure, reproducible, traced once, in every mode of TensorFlow."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, assert_identical, network_problem, scalar_quadratic

import farhox

METHODS = {
    "reverse": farhox.ReverseHG(),
    "checkpointed": farhox.ReverseHG(truncation=5, checkpoint_every=2),
    "forward": farhox.ForwardHG(),
    "implicit": farhox.ImplicitHG(farhox.ConjugateGradient(max_steps=3)),
}
methods = pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))


def case_for(method, steps=2, name="Dropout"):
    """A small network; for implicit differentiation without the learning rate."""
    case = network_problem(name, steps=steps)
    if not isinstance(method, farhox.ImplicitHG):
        return case
    problem = case.problem
    return case._replace(problem=farhox.BilevelProblem(
        problem._inner_objective, problem._outer_objective, problem.inner_variables, problem.outer_variables[1:],
        farhox.GradientDescent(0.1), problem.state_variables))


def scalar_case_for(method, steps=3):
    """A problem of one weight: what a computation runs inside of does not depend on the network."""
    outer = ("target",) if isinstance(method, farhox.ImplicitHG) else ("target", "rate")
    return scalar_quadratic(outer=outer, steps=steps, curvatures=[2.0, 1.0, 1.5][:steps])


def operations(graph):
    """Number of operations of a graph and of all functions in it: loop bodies, branches, calls."""
    definition = graph.as_graph_def()
    return len(definition.node) + sum(len(function.node_def) for function in definition.library.function)


@pytest.mark.slow
@methods
def test_no_variable_changes_no_bit_differs_and_one_trace_serves_all_data_and_values(method, float64):
    case, traces = case_for(method, name="BatchNormalization"), []
    variables = case.problem.inner_variables + case.problem.state_variables + case.problem.outer_variables

    @tf.function(autograph=False)
    def compute(inner_batches, outer_batch):
        traces.append(1)
        return method.compute(case.problem, inner_batches, outer_batch)

    (x, y), outer_batch = tf.nest.map_structure(tf.convert_to_tensor, case[1:3])
    results = []
    for scale in (1.0, 2.0):
        before = [variable.numpy() for variable in variables]
        data = (scale * x, y), outer_batch
        graph, eager = compute(*data), method.compute(case.problem, *data)
        assert_identical(compute(*data), graph)
        assert_identical([variable.numpy() for variable in variables], before)
        tf.nest.assert_same_structure(graph, eager)
        for a, b in zip(tf.nest.flatten(graph), tf.nest.flatten(eager)):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)
        results.append([gradient.numpy() for gradient in graph.gradients])
        for variable in case.problem.inner_variables:
            variable.assign_add(0.1 * tf.ones(variable.shape, variable.dtype))
        case.problem.outer_variables[0].assign(-1.0 * scale)
    assert len(traces) == 1
    assert any(np.any(a != b) for a, b in zip(*results))


@pytest.mark.slow
@pytest.mark.one_case
@methods
def test_a_network_compiles_under_xla(method, float64):
    # XLA draws other random numbers from the same seed: a network without masks.
    case = case_for(method, name="Dense")
    compiled = tf.function(method.compute, autograph=False, jit_compile=True)(*case[:3])
    assert_close(compiled.gradients, method.compute(*case[:3]).gradients, 1e-9)


@pytest.mark.one_case
@methods
def test_graph_is_of_the_same_size_whatever_the_number_of_steps(method, float64):
    sizes = []
    for steps in (10, 1000):
        case = scalar_quadratic(outer=("target",), steps=steps)
        function = tf.function(method.compute, autograph=False)
        sizes.append(operations(function.get_concrete_function(*case[:3]).graph))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["repeat", "gather"])
def test_graph_of_other_kinds_of_batches_does_not_grow_either(kind):
    sizes = []
    for steps in (10, 1000):
        case = scalar_quadratic(outer=("target",))
        batches = (farhox.repeat(case.inner_batches[0], steps) if kind == "repeat"
                   else farhox.gather(case.inner_batches, np.zeros((steps, 1), "int32")))
        problem = farhox.BilevelProblem(
            lambda a: keras.ops.mean(case.problem._inner_objective(a)), case.problem._outer_objective,
            case.problem.inner_variables, case.problem.outer_variables)
        function = tf.function(farhox.ReverseHG().compute, autograph=False)
        sizes.append(operations(function.get_concrete_function(problem, batches, case.outer_batch).graph))
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.one_case
@methods
def test_number_of_steps_may_be_unknown_when_traced(method):
    case, traces = scalar_case_for(method), []

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.float64)])
    def compute(batches):
        traces.append(1)
        return method.compute(case.problem, batches, case.outer_batch)

    for steps in (3, 1):
        batches = case.inner_batches[:steps]
        assert_close(compute(batches).gradients,
                     method.compute(case.problem, batches, case.outer_batch).gradients, 1e-9)
    assert len(traces) == 1


@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["repeat", "gather", "stack"])
@pytest.mark.parametrize("checkpoint_every", [2, None, "sqrt"])
def test_all_kinds_of_batches_may_have_an_unknown_number_of_steps(kind, checkpoint_every):
    case = scalar_quadratic(outer=("target", "rate", "initial"))
    problem = farhox.BilevelProblem(
        lambda a: keras.ops.mean(case.problem._inner_objective(a)), case.problem._outer_objective,
        case.problem.inner_variables, case.problem.outer_variables, case.problem.dynamics)
    batches = {"repeat": farhox.repeat(case.inner_batches[:1], 7),
               "gather": farhox.gather(case.inner_batches, np.arange(7)[:, np.newaxis]),
               "stack": case.inner_batches[:, tf.newaxis]}[kind]
    method = farhox.ReverseHG(checkpoint_every=checkpoint_every)
    specification = tf.nest.map_structure(lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), batches)
    if kind == "repeat":
        specification = specification._replace(batch=tf.TensorSpec.from_tensor(batches.batch))
    compute = tf.function(lambda batches: method.compute(problem, batches, case.outer_batch).gradients,
                          autograph=False, input_signature=[specification])
    for element in tf.data.Dataset.from_tensors(batches):
        assert_close(compute(element), case.expected, 1e-9)


@pytest.mark.one_case
@pytest.mark.parametrize("make", [scalar_case_for, pytest.param(case_for, marks=pytest.mark.slow)])
@methods
def test_computation_runs_inside_a_distribution_strategy(method, make, float64):
    case = make(method)
    expected = method.compute(*case[:3]).gradients
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2

    @tf.function(autograph=False)
    def compute():
        return strategy.run(lambda: method.compute(*case[:3]).gradients)

    for gradient, value in zip(compute(), expected):
        for replica in strategy.experimental_local_results(gradient):
            assert_close([replica], [value], 1e-9)


@pytest.mark.slow
@pytest.mark.one_case
@methods
def test_computation_inside_a_saved_module_gives_the_same_numbers_when_loaded(method, tmp_path, float64):
    # Of a scalar case for an implicit method the rate is not an outer variable, and nothing tracks it.
    own = method == METHODS["reverse"] or isinstance(method, farhox.ImplicitHG)
    case = case_for(method) if own else scalar_case_for(method)
    inner_batches, outer_batch = tf.nest.map_structure(tf.convert_to_tensor, case[1:3])

    class Tuner(tf.Module):
        def __init__(self):
            super().__init__()
            variables = case.problem.inner_variables + case.problem.state_variables + case.problem.outer_variables
            self.kept = [variable.value for variable in variables]

        @tf.function(autograph=False, input_signature=[
            tf.nest.map_structure(tf.TensorSpec.from_tensor, inner_batches),
            tf.nest.map_structure(tf.TensorSpec.from_tensor, outer_batch)])
        def gradients(self, inner_batches, outer_batch):
            return method.compute(case.problem, inner_batches, outer_batch).gradients

    tuner = Tuner()
    expected = tuner.gradients(inner_batches, outer_batch)
    tf.saved_model.save(tuner, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    assert_identical(loaded.gradients(inner_batches, outer_batch), expected)


@methods
def test_problem_must_be_a_bilevel_problem(method):
    with pytest.raises(TypeError, match="problem must be a farhox.BilevelProblem. Received: 'problem'"):
        method.compute("problem", tf.zeros([2]), tf.zeros([]))


@pytest.mark.covering
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@methods
def test_variable_without_any_effect_is_an_error_that_names_it(method, compiled):
    case = scalar_quadratic(outer=("target",))
    idle = keras.Variable(1.0, name="idle")
    problem = farhox.BilevelProblem(
        case.problem._inner_objective, case.problem._outer_objective, case.problem.inner_variables,
        [*case.problem.outer_variables, idle])
    compute = tf.function(method.compute, autograph=False) if compiled else method.compute
    with pytest.raises(ValueError, match="Nothing that was computed depends on 'idle'"):
        compute(problem, *case[1:3])


@methods
def test_bad_inner_batches_are_an_error(method):
    case = scalar_quadratic(outer=("target",))
    for batches, message in [
            (tf.zeros([0], tf.float64), "There must be at least one inner step.*T=0"),
            (tf.zeros([], tf.float64), "must have a leading axis T.*Received a scalar"),
            ((), "must hold at least one tensor"),
            ((tf.zeros([2]), tf.zeros([3])), r"same leading axis T. Received leading axes: \[2, 3\]")]:
        with pytest.raises(ValueError, match=message):
            method.compute(case.problem, batches, case.outer_batch)


def test_divergence_shows_in_the_diagnostics():
    case = scalar_quadratic(outer=("target",), steps=700, dynamics=lambda rate: farhox.GradientDescent(2.0))
    for method in (farhox.ReverseHG(), farhox.ForwardHG(), farhox.ImplicitHG()):
        result = tf.function(method.compute, autograph=False)(*case[:3])
        assert not result.diagnostics["finite"]
        assert not np.isfinite(result.diagnostics["hypergradient_norm"])

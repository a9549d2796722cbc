"""ForwardHG against closed forms, and the tangents that it carries."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import unrolled
from problems import (
    TOLERANCE,
    assert_close,
    assert_identical,
    heavy_ball,
    proximal_quadratic,
    scalar_quadratic,
    variable,
)

import farhox
from farhox._core import autodiff

dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


@pytest.mark.one_case
@dtypes
@pytest.mark.parametrize("outer", [("target", "rate", "initial"), ("schedule",), ("initial", "schedule", "target")])
def test_scalar_quadratic_has_its_closed_form(dtype, outer):
    case = scalar_quadratic(dtype, outer)
    assert_close(farhox.ForwardHG().compute(*case[:3]).gradients, case.expected, TOLERANCE[dtype])


@pytest.mark.one_case
@dtypes
@pytest.mark.parametrize("nesterov", [False, True])
def test_heavy_ball_has_its_hypergradient(dtype, nesterov):
    case = heavy_ball(dtype, nesterov)
    assert_close(farhox.ForwardHG().compute(*case[:3]).gradients, case.expected, TOLERANCE[dtype])


@pytest.mark.one_case
@dtypes
def test_each_step_uses_its_own_minibatch(dtype):
    case = scalar_quadratic(dtype, ("target", "rate"), steps=3, curvatures=[1.0, 2.0, 0.5])
    case.problem.outer_variables[1].assign(0.2)
    result = farhox.ForwardHG().compute(*case[:3])
    assert_close(result.gradients, [0.32944, -3.219], TOLERANCE[dtype])
    assert_close([result.state.variables[0]], [1.58], TOLERANCE[dtype])


@pytest.mark.parametrize("most_loops", [0, 8])
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("online", [False, True])
def test_directions_at_the_same_time_have_the_bits_of_one_after_the_other(most_loops, steps, online, monkeypatch):
    monkeypatch.setattr(farhox.hypergradients.forward, "_MOST_LOOPS", most_loops)
    outer = ("target", "rate") if online else ("target", "schedule", "initial")  # A schedule ends.
    case = scalar_quadratic("float32", outer, steps=steps)
    results = []
    for count in (1, 2, 10):
        method = farhox.ForwardHG(parallel_iterations=count)
        compute = tf.function(lambda *going_on: method.compute(*case[:3], *going_on), autograph=False)  # noqa: B023
        result = compute()
        results.append(compute(result.state, result.carry) if online else result)
    for result in results[1:]:
        assert_identical(result.gradients, results[0].gradients)
        assert_identical(result.carry, results[0].carry)
    if not online:
        assert_close(results[0].gradients, case.expected, TOLERANCE["float32"])


def test_no_direction_waits_for_another_one_that_is_pushed_at_the_same_time():
    case = heavy_ball()  # Three scalars.

    def longest(count):
        method = farhox.ForwardHG(parallel_iterations=count)
        graph = tf.function(lambda: method.compute(*case[:3]).gradients, autograph=False).get_concrete_function().graph
        (body,) = [function for function in graph.as_graph_def().library.function
                   if "while_body" in function.signature.name and any(
                       node.op == "TensorListSetItem" for node in function.node_def)]
        inputs = {node.name: [name.split(":")[0].lstrip("^") for name in node.input] for node in body.node_def}
        kinds = {node.name: node.op for node in body.node_def}
        lengths = {}

        def reads_on_the_way(name):
            if name not in lengths:
                lengths[name] = (kinds.get(name) == "TensorListGetItem") + max(
                    map(reads_on_the_way, inputs.get(name, [])), default=0)
            return lengths[name]

        return max(map(reads_on_the_way, inputs))

    assert (longest(1), longest(2)) == (3, 1)


def test_parallel_iterations_are_a_positive_integer():
    with pytest.raises(ValueError, match="parallel_iterations must be a positive integer. Received: .*0"):
        farhox.ForwardHG(parallel_iterations=0)


@pytest.mark.slow
def test_result_is_that_of_reverse_mode():
    case = scalar_quadratic(outer=("target", "initial"))
    forward, reverse = farhox.ForwardHG().compute(*case[:3]), farhox.ReverseHG().compute(*case[:3])
    assert_close(forward.gradients, reverse.gradients, 1e-12)
    for name in ("outer_loss", "inner_losses"):
        np.testing.assert_array_equal(getattr(forward, name), getattr(reverse, name))
    assert forward.diagnostics.keys() == reverse.diagnostics.keys()
    np.testing.assert_array_equal(
        forward.diagnostics["inner_gradient_norm"], reverse.diagnostics["inner_gradient_norm"])


@pytest.mark.one_case
@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize("most_loops", [0, 8])
def test_directions_of_scalars_and_arrays_agree_with_reverse_mode_in_loops_of_their_own_and_in_one(
        most_loops, jit_compile, float64, monkeypatch):
    monkeypatch.setattr(farhox.hypergradients.forward, "_MOST_LOOPS", most_loops)
    w, target, rates = variable([1.0, -2.0]), variable([[0.5], [0.3]]), [variable(0.1), variable([0.2, 0.3])]

    def objective(batch):
        return tf.reduce_sum(tf.exp(w * tf.convert_to_tensor(target)[:, 0]) * batch)

    problem = farhox.BilevelProblem(
        objective, objective, [w], [rates[0], target, rates[1]],
        farhox.GradientDescent(lambda step: rates[0] * tf.reduce_sum(tf.convert_to_tensor(rates[1]))))
    data = tf.constant([[1.0, 2.0], [0.5, -1.0], [2.0, 1.0]], tf.float64), tf.constant([1.0, 0.5], tf.float64)
    expected = farhox.ReverseHG().compute(problem, *data).gradients
    compute = tf.function(farhox.ForwardHG().compute, autograph=False, jit_compile=jit_compile)
    assert_close(compute(problem, *data).gradients, expected, 1e-12)


@pytest.mark.slow
def test_carry_holds_the_derivative_of_the_state_in_each_direction():
    case = scalar_quadratic(outer=("target", "rate", "initial"))
    (tangents,) = farhox.ForwardHG().compute(*case[:3]).carry
    end = 1.0242880000000001 - 1.0
    assert_close([tangents], [np.array(case.expected) / end], 1e-9)


def test_state_and_carry_passed_back_go_on_as_one_training():
    case = scalar_quadratic(outer=("target", "rate", "initial"))
    first = farhox.ForwardHG().compute(case.problem, case.inner_batches[:3], case.outer_batch)
    second = farhox.ForwardHG().compute(
        case.problem, case.inner_batches[3:], case.outer_batch, state=first.state, carry=first.carry)
    assert_close(second.gradients, case.expected, 1e-12)


@pytest.mark.slow
def test_state_passed_alone_starts_the_tangents_at_zero():
    case = scalar_quadratic(outer=("target", "rate"))
    first = farhox.ForwardHG().compute(case.problem, case.inner_batches[:3], case.outer_batch)
    second = farhox.ForwardHG().compute(case.problem, case.inner_batches[3:], case.outer_batch, state=first.state)
    assert_close(second.gradients, farhox.ReverseHG(truncation=4).compute(*case[:3]).gradients, 1e-12)


def test_initial_carry_has_the_structure_of_the_carry():
    case = scalar_quadratic(outer=("target", "initial"))
    initial, carry = farhox.ForwardHG().initial_carry(case.problem), farhox.ForwardHG().compute(*case[:3]).carry
    tf.nest.assert_same_structure(initial, carry)
    assert [z.shape for z in initial] == [z.shape for z in carry]
    np.testing.assert_array_equal(initial[0], [0.0, 1.0])


@pytest.mark.slow
def test_outer_variables_of_two_types_are_differentiated_together():
    w, target, scale = variable(3.0), variable(0.5), variable(2.0, "float32")
    problem = farhox.BilevelProblem(
        lambda a: a / 2 * keras.ops.square(w - target) * tf.cast(scale, "float64"),
        lambda goal: keras.ops.square(w - goal) / 2,
        inner_variables=[w], outer_variables=[target, scale], dynamics=farhox.GradientDescent(0.1))
    data = tf.fill([5], tf.constant(1.0, tf.float64)), tf.constant(1.0, tf.float64)
    gradients = farhox.ForwardHG().compute(problem, *data).gradients
    assert [gradient.dtype for gradient in gradients] == [tf.float64, tf.float32]
    assert_close(gradients, unrolled.unrolled_hypergradient(problem, *data), 1e-6)


@pytest.mark.slow
def test_learned_initial_value_with_proximal_term_agrees_with_the_tape():
    case = proximal_quadratic(steps=5)
    case.problem.dynamics = farhox.GradientDescent(0.2)
    expected = unrolled.unrolled_hypergradient(*case[:3])
    assert_close(farhox.ForwardHG().compute(*case[:3]).gradients, expected, 1e-12)


@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
def test_accumulator_still_fails_in_the_loop_of_a_recurrent_layer(layer, float64):
    """Without this failure of TensorFlow, `autodiff.forward_product` needs no second formulation."""
    recurrent = getattr(keras.layers, layer)(2)
    x = tf.ones([2, 3, 2], tf.float64)
    recurrent(x)

    @tf.function(autograph=False)
    def product():
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(recurrent(x) ** 2)
            gradient = tape.gradient(y, x)
        return accumulator.jvp(gradient)

    with pytest.raises(Exception, match="variant"):
        product()


@pytest.mark.slow
def test_forward_linearization_gives_the_numbers_of_the_accumulator():
    def function(inputs):
        a, b, unused = inputs
        return [a * b, tf.reduce_sum(tf.sin(a))[tf.newaxis], tf.ones([2], tf.float64)]

    inputs = [tf.constant([1.0, 2.0], tf.float64), tf.constant([3.0, 4.0], tf.float64), tf.ones([3], tf.float64)]
    tangents = [tf.constant([0.5, -1.0], tf.float64), tf.constant([2.0, 1.0], tf.float64), tf.ones([3], tf.float64)]
    outputs, accumulated, _ = autodiff.forward_product(lambda inputs: (function(inputs), []), inputs, tangents)
    linearization = autodiff.ForwardLinearization(lambda inputs: (function(inputs), "auxiliary"), inputs)
    assert_close(linearization.product(tangents), accumulated, 1e-15)
    assert_close(linearization.product([tangents[0], None, None])[0], tangents[0] * inputs[1], 1e-15)
    assert_close(linearization.outputs, outputs, 0.0)
    assert (linearization.auxiliary, linearization.depends) == ("auxiliary", [True, True, False])
    for none_depends in (linearization.product([None] * 3), autodiff.ForwardLinearization(
            lambda inputs: ([tf.ones([2])], ()), inputs).product(tangents)):
        np.testing.assert_array_equal(none_depends[0], [0.0, 0.0])


@pytest.mark.slow
def test_error_of_the_objective_is_raised_as_it_is():
    w, target = variable(1.0), variable(2.0)

    def objective(batch):
        raise KeyError("the objective's own error")

    problem = farhox.BilevelProblem(objective, objective, [w], [target])
    data = tf.zeros([2], tf.float64), tf.zeros([], tf.float64)
    for compute in (farhox.ForwardHG().compute, tf.function(farhox.ForwardHG().compute, autograph=False)):
        with pytest.raises(KeyError, match="the objective's own error"):
            compute(problem, *data)


def test_inner_gradient_is_computed_once_for_the_step_and_for_its_tangents():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    rate = farhox.Hyperparameter(0.1, name="rate")
    problem = farhox.supervised_problem(
        model, loss="mse", dynamics=farhox.GradientDescent(rate), outer_variables=[rate])
    x = tf.ones([2, 3])
    batch = (x, tf.ones([2, 1]))
    traced = tf.function(lambda: farhox.ForwardHG().compute(
        problem, farhox.repeat(batch, 4), batch).gradients).get_concrete_function()
    bodies = [function for function in traced.graph.as_graph_def().library.function
              if "while_body" in function.signature.name]
    # Two forward and three back for the gradient; of the tangent three forward and five back; the outputs once more for
    # the loss, which TensorFlow's graph optimizer merges.
    products = [sum(node.op == "MatMul" for node in body.node_def) for body in bodies]
    assert max(products) == 14

"""What ReverseHG(checkpoint_every="memory") stores, and that the hypergradient is the same for it."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import assert_close, assert_identical, heavy_ball, network_problem, scalar_quadratic

import farhox
from farhox.hypergradients.checkpoints import segment_lengths, stored_bytes


def levels_of(steps, state_bytes, kept, memory):
    return len(segment_lengths(steps, state_bytes, kept, memory))


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000, 12345])
def test_everything_stored_fits_with_as_few_levels_as_possible(steps):
    state, kept = 100, 35
    all_states = (steps + 1) * state
    assert segment_lengths(steps, state, kept, all_states) == []
    for memory in (all_states - 1, all_states // 3, all_states // 20, 24 * state):
        try:
            lengths = segment_lengths(steps, state, kept, memory)
        except ValueError:
            continue
        assert stored_bytes(steps, lengths, state, 0) <= memory
        assert all(1 <= shorter <= longer for longer, shorter in zip([steps, *lengths], lengths))
        # With one level less, and whatever length of its segments, the states take more.
        if len(lengths) == 2:
            assert min(math.ceil(steps / k) + k + 1 for k in range(1, steps + 1)) * state > memory


@pytest.mark.parametrize("steps", [9, 100, 1000, 3000])
def test_one_level_of_checkpoints_takes_no_more_than_a_twentieth_beyond_the_least(steps):
    least = min(stored_bytes(steps, [k], 100, 0) for k in range(1, steps + 1))
    (length,) = segment_lengths(steps, 100, 0, max(1.05 * least, least + 100))
    assert abs(length - steps ** 0.5) < 2


def test_memory_that_holds_no_plan_is_an_error_that_says_how_much_would_do():
    with pytest.raises(ValueError, match="memory must hold the states .* 1000 steps with states of 100 bytes. "
                                         "Received: memory=1500") as error:
        segment_lengths(1000, 100, 10, 1500)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert stored_bytes(1000, segment_lengths(1000, 100, 10, least), 100, 0) == least


@pytest.mark.parametrize("memory, levels", [(101 * 16, 0), (24 * 16, 1), (16 * 16, 2), (15 * 16, 3)])
def test_scalar_quadratic_has_its_closed_form_on_every_level(memory, levels):
    case = scalar_quadratic(outer=("target", "rate", "initial"), steps=100)
    assert levels_of(100, 16, 0, memory) == levels  # A float64 and the number of the step.
    method = farhox.ReverseHG(checkpoint_every="memory", memory=memory)
    assert_close(method.compute(*case[:3]).gradients, case.expected, 1e-9)


def test_truncation_and_weights_of_steps_are_those_of_all_states_stored():
    case = scalar_quadratic(outer=("target", "rate"), steps=60)
    weights = tuple(np.arange(1, 61) / np.sum(np.arange(1, 61)))
    for arguments in ({"truncation": 50}, {"truncation": 1}, {"truncation": 0}, {"step_weights": weights}):
        whole = farhox.ReverseHG(**arguments).compute(*case[:3])
        method = farhox.ReverseHG(checkpoint_every="memory", memory=13 * 16, **arguments)
        assert_close(method.compute(*case[:3]).gradients, whole.gradients, 1e-12)


def test_a_training_that_stops_early_goes_back_over_the_steps_it_took():
    case = scalar_quadratic(outer=("target", "initial"), steps=60, stop_tolerance=0.05)
    whole = farhox.ReverseHG().compute(*case[:3])
    result = farhox.ReverseHG(checkpoint_every="memory", memory=13 * 16).compute(*case[:3])
    assert 10 < int(result.diagnostics["inner_steps"]) < 40
    assert_close(result.gradients, whole.gradients, 1e-12)


@pytest.mark.slow
def test_levels_of_checkpoints_change_no_bit_of_a_network_that_draws(float64):
    case = network_problem("BatchNormalization", "momentum", steps=30, extra=[keras.layers.Dropout(0.5)])
    whole = tf.function(lambda: farhox.ReverseHG(memory=0).compute(*case[:3]), autograph=False)()
    state_bytes = sum(leaf.dtype.size * leaf.shape.num_elements()
                      for leaf in tf.nest.flatten(case.problem.initial_state()))
    for states, levels in ((13, 1), (11, 2)):
        assert levels_of(30, state_bytes, 0, states * state_bytes) == levels
        method = farhox.ReverseHG(checkpoint_every="memory", memory=states * state_bytes)
        result = tf.function(lambda: method.compute(*case[:3]), autograph=False)()  # noqa: B023
        assert_identical(result.gradients, whole.gradients)
    # XLA draws other numbers, the same ones on every level.
    compiled = [tf.function(lambda: by.compute(*case[:3]), autograph=False, jit_compile=True)()  # noqa: B023
                for by in (farhox.ReverseHG(memory=0), method)]
    assert_close(compiled[1].gradients, compiled[0].gradients, 1e-12)


@pytest.mark.parametrize("states, levels", [(101, 0), (30, 1), (16, 2), (15, 3)])
def test_no_segment_is_run_again_beside_the_loop_over_them(states, levels):
    # Nothing would order the two, and what is kept of both would take memory at the same time.
    case = heavy_ball()
    case = case._replace(inner_batches=tf.repeat(case.inner_batches[:1], 100))
    state_bytes = 24  # The variable, its momentum and the number of the step.
    assert levels_of(100, state_bytes, 0, states * state_bytes) == levels
    method = farhox.ReverseHG(checkpoint_every="memory", memory=states * state_bytes)
    graph = tf.function(lambda: method.compute(*case[:3]).gradients, autograph=False).get_concrete_function().graph
    assert sum(operation.type in ("While", "StatelessWhile") for operation in graph.get_operations()) == 2


@pytest.mark.parametrize("memory", [None, 0])
def test_a_plan_by_memory_needs_a_limit(memory):
    with pytest.raises(ValueError, match=f"needs a positive number of bytes. Received: memory={memory}"):
        farhox.ReverseHG(checkpoint_every="memory", memory=memory)


def test_a_plan_by_memory_needs_the_number_of_steps():
    case = scalar_quadratic()
    compute = tf.function(farhox.ReverseHG(checkpoint_every="memory").compute, autograph=False)
    with pytest.raises(ValueError, match="needs the number of inner steps in advance. Received: inner batches of"):
        compute.get_concrete_function(case.problem, tf.TensorSpec([None], tf.float64), tf.TensorSpec([], tf.float64))

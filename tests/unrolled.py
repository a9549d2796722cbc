"""The naive oracles: inner training as a plain Python loop under one tape, and finite differences of it."""

import numpy as np
import tensorflow as tf

from farhox.data.batches import as_inner_batches, batch_at, num_steps


def outer_loss(problem, outer, inner_batches, outer_batch):
    """E after T inner steps from the initial state, as a plain function of the list λ.

    A step is a function that a tape sees as one operation: the rules that hold for its derivatives are in its graph.
    """
    state = problem.initial_state(outer)
    given = [state, list(outer), batch_at(inner_batches, 0)]

    def flat_step(*flat):
        state, outer, batch = tf.nest.pack_sequence_as(given, flat)
        return tf.nest.flatten(problem.step(state, outer, batch).state)

    step = tf.function(flat_step, autograph=False).get_concrete_function(
        *[tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in tf.nest.flatten(given)])
    for t in range(num_steps(inner_batches)):
        flat = tf.nest.flatten([state, list(outer), batch_at(inner_batches, t)])
        state = tf.nest.pack_sequence_as(state, list(step(*flat)))
    return problem.outer_loss(state, outer, outer_batch)


def unrolled_hypergradient(problem, inner_batches, outer_batch):
    """dE/dλ as one tape over the whole training gives it."""
    inner_batches = as_inner_batches(inner_batches)
    outer_batch = tf.nest.map_structure(tf.convert_to_tensor, outer_batch)
    outer = problem.outer_values()
    with tf.GradientTape() as tape:
        tape.watch(outer)
        loss = outer_loss(problem, outer, inner_batches, outer_batch)
    return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, outer)]


def finite_differences(problem, inner_batches, outer_batch, step=1e-4):
    """dE/dλ entry by entry from four values of E on a line: the error is of the order of step^4 and 1e-16 / step."""
    inner_batches = as_inner_batches(inner_batches)
    outer_batch = tf.nest.map_structure(tf.convert_to_tensor, outer_batch)
    outer = [np.array(value) for value in problem.outer_values()]
    steps = num_steps(inner_batches)

    @tf.function(autograph=False)
    def loss(outer):
        body = lambda t, state: (t + 1, problem.step(state, outer, batch_at(inner_batches, t)).state)  # noqa: E731
        _, state = tf.while_loop(lambda t, state: t < steps, body, [tf.constant(0), problem.initial_state(outer)])
        return problem.outer_loss(state, outer, outer_batch)

    def moved(index, entry, distance):
        values = [value.copy() for value in outer]
        values[index].flat[entry] += distance
        return float(loss([tf.constant(value) for value in values]))

    gradients = [np.zeros_like(value) for value in outer]
    for index, value in enumerate(outer):
        for entry in range(value.size):
            near = moved(index, entry, step) - moved(index, entry, -step)
            far = moved(index, entry, 2 * step) - moved(index, entry, -2 * step)
            gradients[index].flat[entry] = (8 * near - far) / (12 * step)
    return gradients

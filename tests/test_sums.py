"""Sums in loops: TensorFlow does not rewrite them into temporary variables, which it leaves behind."""

import subprocess
import sys

import keras
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.eager import context

import farhox
from farhox._core.sums import sums_as_written

# In a process of its own: of the two logical CPUs of the tests TensorFlow does not know the memory.
IN_A_LOOP = """
import tensorflow as tf
from tensorflow.python.eager import context
from farhox._core.sums import sums_as_written

def rewritten():
    @tf.function
    def function(x):
        return tf.while_loop(lambda i, _: i < 2, lambda i, total: (i + 1, total + tf.sin(x + 1.0) + tf.cos(2.0 * x)),
                             [tf.constant(0), tf.zeros_like(x)])[1]
    context.enable_run_metadata()
    function(tf.ones([20_000_000]))
    metadata = context.export_run_metadata()
    context.disable_run_metadata()
    return [node.name for graphs in metadata.function_graphs for graph in graphs.partition_graphs
            for node in graph.node if node.op == "TemporaryVariable"]

assert rewritten()  # What TensorFlow does by itself.
with sums_as_written():
    assert rewritten() == []
"""
# Ten thousand weights and two strengths, each a sum along the loop of the way back. Without the setting its second
# call failed.
TRAINING = """
import keras
import numpy as np
import tensorflow as tf
import farhox

keras.utils.set_random_seed(0)
random = np.random.default_rng(0)

def data(count):
    return random.random([count, 28, 28, 1], "float32"), random.integers(0, 10, count)

weights = farhox.ExampleWeights(10_000, budget=6000.0)
learned = {name: farhox.Hyperparameter(value, low=0.0, log=True, name=name)
           for name, value in (("learning_rate", 0.01), ("weight_decay", 0.001))}
model = keras.Sequential([keras.Input([28, 28, 1]), keras.layers.Flatten(), keras.layers.Dense(10)])
problem = farhox.supervised_problem(
    model, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), example_weights=weights,
    dynamics=farhox.KerasDynamics(keras.optimizers.SGD(momentum=0.9, weight_decay=0.001), **learned),
    outer_variables=list(learned.values()))
batches = farhox.bilevel_dataset(data(10_000), data(2500), 40, batch_size=100, index=True, seed=0)
optimizer = farhox.HyperOptimizer(problem, farhox.ReverseHG(), online=True)
optimizer.compile(keras.optimizers.Adam(0.05))
history = optimizer.fit(batches.repeat(), epochs=3, steps_per_epoch=1, verbose=0)
assert np.all(np.isfinite(history.history["outer_loss"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [IN_A_LOOP, TRAINING], ids=["loop", "training"])
def test_sums_in_loops_over_large_tensors_stay_as_they_are_written(program):
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr


def setting():
    """Whether what is called now is optimized without the rewriting."""
    config = config_pb2.ConfigProto.FromString(context.context().function_call_options.config_proto_serialized)
    return config.graph_options.rewrite_options.memory_optimization == rewriter_config_pb2.RewriterConfig.NO_MEM_OPT


def test_all_that_runs_a_training_runs_it_so_and_nothing_stays_set():
    seen = []
    weight, strength = keras.Variable(1.0), keras.Variable(0.5)

    def inner(batch):
        seen.append(setting())
        return tf.reduce_mean((weight * batch - 1.0) ** 2) + strength * weight**2

    problem = farhox.BilevelProblem(
        inner, lambda batch: tf.reduce_mean((weight * batch - 1.0) ** 2), [weight], [strength],
        dynamics=farhox.GradientDescent(0.1))
    inner_batches, outer_batch = tf.ones([2, 3]), tf.ones([3])

    def check(call):
        seen.clear()
        call()
        assert seen and all(seen) and not setting()

    for method in (farhox.ReverseHG(), farhox.ForwardHG(), farhox.ImplicitHG()):
        check(lambda method=method: method.compute(problem, inner_batches, outer_batch))
    optimizer = farhox.HyperOptimizer(problem, farhox.ReverseHG())
    optimizer.compile(keras.optimizers.SGD(0.1))
    data = tf.data.Dataset.from_tensors((inner_batches, outer_batch))
    check(lambda: optimizer.fit(data, verbose=0))
    check(lambda: optimizer.evaluate(data, verbose=0))
    check(lambda: optimizer.step(inner_batches, outer_batch))
    check(lambda: farhox.check_hypergradient(problem, inner_batches, outer_batch, farhox.ReverseHG()))


def test_what_was_set_before_comes_back_after_an_error():
    before = context.context().function_call_options
    try:
        with sums_as_written():
            assert setting()
            raise ValueError
    except ValueError:
        assert context.context().function_call_options is before and not setting()

"""A function as a graph whose large constants are not part of it."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core.functional import user_code

# Bytes of a constant from which on a graph takes it from outside. Shapes and indices, which XLA must know when it
# compiles, are smaller.
LARGE = 2**16
# Bytes that TensorFlow has room for in the definition of one graph.
ROOM = 2**31 - 1


def traced(function: Callable[..., Any], inputs: Any) -> Any:
    """Traces a function once.

    A NumPy array that the function closes over becomes a constant of its graph, and every part of the graph that is
    taken elsewhere would bring a copy of it along. Large ones are therefore made tensors outside of the graph.

    Args:
        function: Callable, list of tensors to a nest of tensors and None. It is called once.
        inputs: List of tensors, or of anything with a shape and a dtype.

    Returns:
        A concrete function whose graph holds what was traced, the graph's tensors in the place of the inputs, and what
        the function returned.

    Raises:
        ValueError: If the constants are more than TensorFlow has room for in one graph.
    """
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]

    def called(*inputs):
        # A tensor that is returned as it came in must be told from the input.
        with user_code():
            return tf.nest.map_structure(
                lambda output: None if output is None else tf.identity(output), function(list(inputs)))

    concrete, inside, outputs = _trace(called, specs)
    large = [operation for operation in concrete.graph.get_operations() if _bytes_of_constant(operation) >= LARGE]
    if not large:
        return concrete, inside, outputs
    return _trace(_without(concrete.graph, large, inside, outputs), specs)


def _trace(function, specs):
    seen = []

    def body(*inputs):
        seen.extend([list(inputs), function(*inputs)])
        return ()

    concrete = tf.function(body, autograph=False).get_concrete_function(*specs)
    return concrete, *seen


def _bytes_of_constant(operation):
    if operation.type != "Const":
        return 0
    (tensor,) = operation.outputs
    return 0 if tensor.dtype == tf.string else math.prod(tensor.shape) * tensor.dtype.size


def _without(graph, large, inputs, outputs):
    """A function that builds the graph again, with tensors from outside in the place of the large constants."""
    total = sum(map(_bytes_of_constant, large))
    if total >= ROOM:
        raise ValueError(
            "The NumPy arrays that an objective closes over are constants of its graph, and must stay under 2 GB "
            "together. Pass them as a batch, or make them tensors (tf.constant) outside of the objective. "
            f"Received: {total / 2**30:.1f} GB")
    with tf.init_scope():
        outside = {f"{operation.name}:0": tf.constant(tf.make_ndarray(operation.get_attr("value")))
                   for operation in large}
    outside.update((internal.name, external) for external, internal in graph.captures)
    definition = graph.as_graph_def()
    left_out = {name.split(":")[0] for name in outside} | {tensor.op.name for tensor in inputs}
    nodes = [node for node in definition.node if node.name not in left_out]
    del definition.node[:]
    definition.node.extend(nodes)
    read = {source if ":" in source else f"{source}:0" for node in nodes for source in node.input}
    shapes = {tensor.name: tensor.shape for operation in graph.get_operations() if operation.name not in left_out
              for tensor in operation.outputs}

    def again(*new_inputs):
        current = tf.compat.v1.get_default_graph()
        replaced = {name: current.capture(value) for name, value in outside.items() if name in read}
        replaced.update((old.name, new) for old, new in zip(inputs, new_inputs) if old.name in read)
        imported = dict(zip(shapes, tf.graph_util.import_graph_def(
            definition, input_map=replaced, return_elements=list(shapes), name="objective")))
        for name, shape in shapes.items():
            imported[name].set_shape(shape)
        return tf.nest.map_structure(lambda output: None if output is None else imported[output.name], outputs)

    return again

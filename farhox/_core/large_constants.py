"""Large constants of a graph, which come in from outside where a part of it is taken.

A NumPy array that a function closes over becomes a constant of its graph, and every part that is imported elsewhere
would bring a copy of it along.
"""

import math

import tensorflow as tf

from farhox._core.types import Tensor

# Bytes of a constant from which on it stays outside. Shapes and indices, which XLA must know when it compiles, are
# smaller.
LARGE = 2**16
# Bytes that TensorFlow has room for in the definition of one graph.
ROOM = 2**31 - 1


def check_room(graph: tf.Graph) -> None:
    """Refuses a graph that TensorFlow could not read again.

    Raises:
        ValueError: If its constants are more than fits into one definition.
    """
    total = sum(_bytes(operation.outputs[0]) for operation in graph.get_operations() if operation.type == "Const")
    if total >= ROOM:
        raise ValueError(
            "The NumPy arrays that an objective closes over are constants of its graph, and must stay under 2 GB "
            "together. Pass them as a batch, or make them tensors (tf.constant) outside of the objective. "
            f"Received: {total / 2**30:.1f} GB")


def take_out(graph: tf.Graph, definition: tf.compat.v1.GraphDef, outside: dict[str, Tensor]) -> None:
    """Takes the values of large constants out of a definition.

    Args:
        graph: The graph.
        definition: Its definition. The values go, the nodes stay.
        outside: Dictionary from names of tensors to eager tensors, to which new ones are added.
    """
    for node in definition.node:
        name = f"{node.name}:0"
        if node.op == "Const" and _bytes(graph.get_tensor_by_name(name)) >= LARGE:
            if name not in outside:
                with tf.init_scope():
                    outside[name] = tf.constant(tf.make_ndarray(node.attr["value"].tensor))
            del node.attr["value"]


def _bytes(tensor):
    return 0 if tensor.dtype == tf.string else math.prod(tensor.shape) * tensor.dtype.size

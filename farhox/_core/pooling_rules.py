"""The derivative of the gradient of max pooling, also under XLA.

`MaxPoolGrad` sends each cotangent to the place of the maximum; along a tangent of the input, the derivative is what the
tangent has there. XLA's operation for that finds the maximum of the inputs rounded to bfloat16, so that of two that
agree in their first eight bits it may take the wrong one, and it has no version for float64.
"""

import itertools
from typing import Any

import tensorflow as tf

from farhox._core.types import Tensor


@tf.RegisterGradient("FarhoxMaxPoolGrad")
def _max_pool_grad(operation, cotangent):
    images, pooled = operation.inputs[:2]
    options = {name: operation.get_attr(name) for name in ("ksize", "strides")}
    padding, data_format = (operation.get_attr(name).decode() for name in ("padding", "data_format"))
    if padding == "EXPLICIT" or _compiled_by_xla(tf.compat.v1.get_default_graph()):
        flat = operation.get_attr("explicit_paddings") if padding == "EXPLICIT" else []
        pads = [flat[i:i + 2] for i in range(0, len(flat), 2)]
        return None, None, _at_the_maximum(images, pooled, cotangent, padding, pads, **options)
    grad_grad = tf.raw_ops.MaxPoolGradGrad if operation.type == "MaxPoolGrad" else tf.raw_ops.MaxPool3DGradGrad
    return None, None, grad_grad(orig_input=images, orig_output=pooled, grad=cotangent, padding=padding,
                                 data_format=data_format, **options)


def _at_the_maximum(images: Tensor, pooled: Tensor, tangent: Tensor, padding: str, pads: list[Any],
                    ksize: list[int], strides: list[int]) -> Tensor:
    """The tangent at the first maximum of each window, in the order of rows."""
    sizes, counts = _shape(images), _shape(pooled)
    if padding == "SAME":
        # As much before as after; one more after where the number is odd.
        missing = [tf.maximum((count - 1) * stride + window - size, 0)
                   for size, count, window, stride in zip(sizes, counts, ksize, strides)]
        pads = [[number // 2, number - number // 2] for number in missing]
    if pads:
        images = tf.pad(images, pads, constant_values=images.dtype.min)
        tangent = tf.pad(tangent, pads)
    result = tf.zeros_like(pooled)
    # The last one that is written is the first in the window.
    for offset in reversed(list(itertools.product(*map(range, ksize)))):
        part = tuple(slice(start, start + stride * (count - 1) + 1, stride)
                     for start, stride, count in zip(offset, strides, counts))
        result = tf.where(tf.equal(images[part], pooled), tangent[part], result)
    return result


def _shape(tensor):
    dynamic = tf.shape(tensor)
    return [dynamic[i] if size is None else size for i, size in enumerate(tensor.shape)]


def _compiled_by_xla(graph):
    """Whether a graph, or one that it is traced in, is being traced for XLA."""
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False

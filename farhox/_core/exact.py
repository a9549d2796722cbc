"""Derivatives of a graph that TensorFlow gets wrong, does not have, or stops: set on single operations.

Hypergradients differentiate a gradient. When the gradient has been traced into a graph, every operation of it can be
told by which rule it is to be differentiated once more. What the operations compute stays untouched: first derivatives
are those of the training that happens.

- `tf.stop_gradient` stops the first derivative. Its value flows on in the training, so that the second derivative must
  pass: batch, layer and group normalisation (`tf.nn.moments`), targets that a model makes for itself.
- `SoftmaxCrossEntropyWithLogits` has no mixed derivative with respect to logits and labels.
- The gradient of `ImageProjectiveTransformV3` is not its adjoint; see `image_rules`.
- The gradient of max pooling has a derivative that XLA takes at the wrong place now and then; see `pooling_rules`.
- The gradients of resizing with interpolation have no derivative, or one that is silently missing; softsign's has none.
- Where infinities are masked, the first derivative meets zero times infinity and a `where` discards it; in the second
  one it would be met again. There what a cotangent of zero is multiplied with counts as finite.
- In update rules, `sqrt`, `rsqrt`, powers less than one and quotients have an infinite derivative at zero, which
  optimizers multiply by an exact zero: not a number. Here their derivative there is zero, the value the product has.

The rules hold where a graph is differentiated as a whole, by `tf.gradients` or through the call of a function, in
eager mode, in graphs and under XLA. A tape around the single operations does not know of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2

from farhox._core import image_rules, pooling_rules  # noqa: F401  They register rules.


@contextlib.contextmanager
def exact_derivatives(stops: Any = True) -> Iterator[None]:
    """Sets the rules of the inner gradient on all operations that are added to the current graph inside.

    Args:
        stops: Bool. Whether second derivatives pass what stopped the first one.
    """
    if not stops and not tf.executing_eagerly():
        tf.compat.v1.get_default_graph().add_to_collection(_CONSTANT_STOPS, True)
    with _marked(_PASSING | _SECOND if stops else _SECOND, _MASKED):
        yield


@contextlib.contextmanager
def finite_roots() -> Iterator[None]:
    """Sets the rules of update rules on all operations that are added to the current graph inside."""
    with _marked(_ROOTS):
        yield


@contextlib.contextmanager
def _marked(rules, where_infinite=None):
    """Sets rules by the type of operation; `where_infinite` in graphs that mask what is not finite."""
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    yield
    operations = list(operations_of(graph, before))
    if where_infinite and _masks_infinities(graph, operations):
        rules = rules | where_infinite
    for operation in operations:
        rule = rules.get(operation.type)
        if rule is not None and "_gradient_op_type" not in operation.node_def.attr:
            value = attr_value_pb2.AttrValue(s=rule.encode())
            operation._set_attr("_gradient_op_type", value)


def _masks_infinities(graph, operations):
    """Whether a graph holds a constant that is not finite or asks for such numbers, now or when it was asked before."""
    if not graph.get_collection(_INFINITE) and any(
            operation.type in ("IsNan", "IsInf", "IsFinite") or operation.type == "Const"
            and operation.outputs[0].dtype.is_floating
            and not np.all(np.isfinite(tf.make_ndarray(operation.node_def.attr["value"].tensor).astype(np.float64)))
            for operation in operations):
        graph.add_to_collection(_INFINITE, True)
    return bool(graph.get_collection(_INFINITE))


def operations_of(graph: tf.Graph, start: int = 0) -> Iterator[tf.Operation]:
    """The operations of a graph from number `start` on, and all that loops and branches among them hold."""
    for operation in graph.get_operations()[start:]:
        yield operation
        yield from operations_inside(operation)


def operations_inside(operation: tf.Operation) -> Iterator[tf.Operation]:
    """The operations that a loop or a branch holds; none of any other operation."""
    for name in graphs_inside(operation):
        yield from operations_of(getattr(operation, name))


def operations_called(operation: tf.Operation) -> Iterator[tf.Operation]:
    """The operations of the function that a call of a traced function runs; none of any other operation.

    Nothing can be set on them: the derivative of the call was traced with the function.
    """
    if operation.type not in _CALLS:
        return
    name, graph, function = operation.get_attr("f").name, operation.graph, None
    while graph is not None and function is None:
        function, graph = graph._get_function(name), getattr(graph, "outer_graph", None)
    for inner in () if function is None else operations_of(function.graph):
        yield inner
        yield from operations_called(inner)


def needs_rule(graph: tf.Graph, operation: tf.Operation) -> bool:
    """Whether the second derivatives of an operation of the inner gradient need a rule of these."""
    stops = {} if graph.get_collection(_CONSTANT_STOPS) else _PASSING
    return operation.type in _SECOND or operation.type in stops


def graphs_inside(operation: tf.Operation) -> list[str]:
    """The attributes of a loop or a branch under which TensorFlow keeps the graphs that it holds."""
    names = list(_GRAPHS)
    if operation.type in ("Case", "StatelessCase"):
        names = [f"_branch_graph_{i}" for i in range(len(operation.get_attr("branches")))]
    return [name for name in names if getattr(operation, name, None) is not None]


def is_stop(operation: tf.Operation) -> bool:
    """Whether an operation stops derivatives, and no rule lets them pass."""
    return operation.type == "StopGradient" and "_gradient_op_type" not in operation.node_def.attr


def passes_to(tensors: Any) -> set[Any]:
    """The names of all operations whose derivatives may reach the tensors: not through integers, nor through stops
    that no rule lets pass."""
    seen, stack = set(), [tensor.op for tensor in tensors]
    while stack:
        operation = stack.pop()
        if operation.name in seen:
            continue
        seen.add(operation.name)
        if not is_stop(operation):
            stack.extend(tensor.op for tensor in operation.inputs
                         if tensor.dtype.is_floating or tensor.dtype.is_complex
                         or tensor.dtype in (tf.variant, tf.resource))
    return seen


@tf.RegisterGradient("FarhoxPass")
def _pass(operation, cotangent):
    return cotangent


@tf.RegisterGradient("FarhoxSoftmaxCrossEntropy")
def _softmax_cross_entropy(operation, of_loss, of_backprop):
    """loss = -Σ labels log softmax(logits), backprop = softmax(logits) - labels, both over the last axis."""
    logits, labels = operation.inputs
    of_loss = of_loss[..., tf.newaxis]
    softmax = tf.nn.softmax(logits)
    inside = tf.reduce_sum(of_backprop * softmax, axis=-1, keepdims=True)
    of_logits = of_loss * operation.outputs[1] + softmax * (of_backprop - inside)
    of_labels = -of_loss * tf.nn.log_softmax(logits) - of_backprop
    return of_logits, of_labels


@tf.RegisterGradient("FarhoxSoftsignGrad")
def _softsign_grad(operation, cotangent):
    """The operation is g / (1 + |x|)^2."""
    g, x = operation.inputs
    base = 1.0 + tf.abs(x)
    return cotangent / tf.square(base), -2.0 * cotangent * g * tf.sign(x) / base**3


def _resize_rule(kind, resize):
    @tf.RegisterGradient(kind)
    def rule(operation, cotangent):
        """The operation is the transposed resizing of its first input; the second one gives a shape or a type."""
        size = tf.shape(operation.inputs[0])[1:3]
        product = resize(
            images=cotangent, size=size, align_corners=operation.get_attr("align_corners"),
            half_pixel_centers=operation.get_attr("half_pixel_centers"))
        return tf.cast(product, operation.inputs[0].dtype), None


_resize_rule("FarhoxResizeBilinearGrad", tf.raw_ops.ResizeBilinear)
_resize_rule("FarhoxResizeBicubicGrad", tf.raw_ops.ResizeBicubic)
_resize_rule("FarhoxResizeNearestNeighborGrad", tf.raw_ops.ResizeNearestNeighbor)


@tf.RegisterGradient("FarhoxMul")
def _mul(operation, cotangent):
    x, y = operation.inputs
    return (_summed(tf.math.multiply_no_nan(y, cotangent), x), _summed(tf.math.multiply_no_nan(x, cotangent), y))


@tf.RegisterGradient("FarhoxReciprocal")
def _reciprocal(operation, cotangent):
    (y,) = operation.outputs
    return tf.math.multiply_no_nan(-tf.square(y), cotangent)


@tf.RegisterGradient("FarhoxLog")
def _log(operation, cotangent):
    return tf.math.multiply_no_nan(tf.math.reciprocal(operation.inputs[0]), cotangent)


@tf.RegisterGradient("FarhoxMaskedDiv")
def _masked_div(operation, cotangent):
    x, y = operation.inputs
    return (_summed(tf.math.multiply_no_nan(tf.math.reciprocal(y), cotangent), x),
            _summed(tf.math.multiply_no_nan(-x / tf.square(y), cotangent), y))


@tf.RegisterGradient("FarhoxSqrt")
def _sqrt(operation, cotangent):
    (y,) = operation.outputs
    return _where_not_zero(y, lambda y: cotangent * 0.5 / y)


@tf.RegisterGradient("FarhoxRsqrt")
def _rsqrt(operation, cotangent):
    (x,), (y,) = operation.inputs, operation.outputs
    return _where_not_zero(x, lambda x: cotangent * -0.5 * y / x)


@tf.RegisterGradient("FarhoxPow")
def _pow(operation, cotangent):
    """Zero where x = 0 and the exponent is less than one; d/d exponent is zero where x is."""
    x, exponent = operation.inputs
    steep = tf.equal(x, 0) & (exponent < 1)
    safe = tf.where(steep, tf.ones_like(x), x)
    of_x = tf.where(steep, tf.zeros_like(x), exponent * tf.pow(safe, exponent - 1))
    positive = x > 0
    logarithm = tf.math.log(tf.where(positive, x, tf.ones_like(x)))
    of_exponent = tf.where(positive | tf.zeros_like(exponent, tf.bool), operation.outputs[0] * logarithm, 0)
    return _summed(cotangent * of_x, x), _summed(cotangent * of_exponent, exponent)


@tf.RegisterGradient("FarhoxRealDiv")
def _real_div(operation, cotangent):
    """Zero where the divisor is: optimizers discard such quotients with `where` or `minimum`."""
    x, y = operation.inputs
    zero = tf.equal(y, 0)
    safe = tf.where(zero, tf.ones_like(y), y)
    of_x = tf.where(zero, tf.zeros_like(y), 1.0 / safe)
    return _summed(cotangent * of_x, x), _summed(cotangent * -of_x * (x / safe), y)


def _where_not_zero(x, function):
    zero = tf.equal(x, 0)
    value = function(tf.where(zero, tf.ones_like(x), x))
    return tf.where(zero, tf.zeros_like(value), value)


def _summed(product, like):
    """The product added up over the axes along which `like` was broadcast."""
    if product.shape.is_fully_defined() and product.shape == like.shape:
        return product
    axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(like), s1=tf.shape(product))[0]
    return tf.reshape(tf.reduce_sum(product, axes), tf.shape(like))


_GRAPHS = ("_cond_graph", "_body_graph", "_true_graph", "_false_graph")
_PASSING = {"StopGradient": "FarhoxPass", "PreventGradient": "FarhoxPass"}
_SECOND = {
    "SoftmaxCrossEntropyWithLogits": "FarhoxSoftmaxCrossEntropy",
    "SoftsignGrad": "FarhoxSoftsignGrad",
    "ResizeBilinearGrad": "FarhoxResizeBilinearGrad",
    "ResizeBicubicGrad": "FarhoxResizeBicubicGrad",
    "ResizeNearestNeighborGrad": "FarhoxResizeNearestNeighborGrad",
    "ImageProjectiveTransformV3": "FarhoxImageProjectiveTransform",
    "MaxPoolGrad": "FarhoxMaxPoolGrad",
    "MaxPool3DGrad": "FarhoxMaxPoolGrad",
}
_MASKED = {"Mul": "FarhoxMul", "Reciprocal": "FarhoxReciprocal", "Inv": "FarhoxReciprocal", "Log": "FarhoxLog",
           "RealDiv": "FarhoxMaskedDiv"}
_INFINITE = "farhox_masks_infinities"
_CONSTANT_STOPS = "farhox_stops_are_constants"
_CALLS = frozenset(["PartitionedCall", "StatefulPartitionedCall"])
_ROOTS = {"Sqrt": "FarhoxSqrt", "Rsqrt": "FarhoxRsqrt", "Pow": "FarhoxPow", "RealDiv": "FarhoxRealDiv"}

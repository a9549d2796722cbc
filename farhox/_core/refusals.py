"""Operations that cannot be part of an inner training, found in its traced graph and named."""

import re
from typing import Any

import tensorflow as tf

from farhox._core.exact import is_stop, needs_rule, operations_called, operations_inside, passes_to
from farhox._core.types import Tensors

_DRAWS = frozenset([
    "RandomUniform", "RandomUniformInt", "RandomStandardNormal", "TruncatedNormal", "ParameterizedTruncatedNormal",
    "Multinomial", "RandomGamma", "RandomPoisson", "RandomPoissonV2", "RandomShuffle", "RngReadAndSkip", "RngSkip",
    "StatefulRandomBinomial", "StatefulStandardNormal", "StatefulStandardNormalV2", "StatefulTruncatedNormal",
    "StatefulUniform", "StatefulUniformFullInt", "StatefulUniformInt", "SampleDistortedBoundingBox",
    "SampleDistortedBoundingBoxV2", "FractionalMaxPool", "FractionalAvgPool"])
_PYTHON = frozenset(["PyFunc", "PyFuncStateless", "EagerPyFunc"])
_ASSIGNMENTS = frozenset([
    "AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "ResourceScatterAdd", "ResourceScatterUpdate",
    "ResourceScatterSub", "ResourceScatterNdUpdate", "ResourceScatterNdAdd"])

# Operations with a derivative that TensorFlow counts as having none, and which inputs of others it leaves out: there
# a gradient would be a part of the truth, without a word.
_COUNTED_AS_CONSTANT = frozenset([
    "HSVToRGB", "LinSpace", "ExtractGlimpse", "ExtractGlimpseV2", "SparseAddGrad", "SparseConcat", "XlaVariadicReduce",
    "FakeQuantWithMinMaxArgsGradient", "FakeQuantWithMinMaxVarsGradient", "FakeQuantWithMinMaxVarsPerChannelGradient"])
_INPUTS_LEFT_OUT = {
    "Betainc": (0, 1), "Zeta": (0,), "ImageProjectiveTransformV2": (1,), "ImageProjectiveTransformV3": (1, 3)}
_COMPARISONS = frozenset(["Greater", "GreaterEqual", "Less", "LessEqual"])
# A number made of draws and constants with these is a draw too.
_KEEP_DRAWS = frozenset(["AddV2", "Sub", "Mul", "Cast", "Identity", "Reshape", "ExpandDims", "Squeeze", "BroadcastTo"])
_SEEDED_DRAWS = "StatelessRandom"
# What `tf.gradients` puts where it has no gradient; such an operation does not run.
_PLACE_HOLDER = "SymbolicGradient"
_RULE = (
    "A hypergradient needs the derivative of every operation that the inner variables or the outer variables pass "
    "through, also of the first derivative's. ")
_ADVICE = (
    " Put another layer or loss in its place, move it into the data, or give the dynamics first_order=True where it is "
    "the second derivative that is missing.")


def check_operations(graph: tf.Graph, outputs: Tensors, outer: Any = False) -> None:
    """Refuses operations that would make the training another one each time it is run.

    The inner training is run more than once, on the way there and on the way back, and must then be the same.

    Args:
        graph: A `StepGraph`.
        outputs: Nest of its tensors. Operations that none of them needs are not looked at, but for assignments.
        outer: Bool. The graph is that of the outer objective, which is run once: it may draw.

    Raises:
        ValueError: If there is such an operation; it is named, and so is what to use in its place.
    """
    needed = graph.ancestors([output for output in tf.nest.flatten(outputs) if output is not None])
    for operation in graph.graph.get_operations():
        for found in _with_inner(operation):
            _check(found, operation.name in needed, operation.name, outer)


def _check(operation, needed, name, outer):
    if operation.type in _ASSIGNMENTS:
        raise ValueError(
            "An objective may assign Keras variables that are state variables, and nothing else: inner training runs "
            f"it more than once. The operation {operation.type} at {name!r} assigns a tf.Variable. Make it a "
            "keras.Variable, and name it in state_variables.")
    if not needed or outer:
        return
    if operation.type in _DRAWS:
        raise ValueError(
            "Random numbers of the inner training must follow from a seed that is part of its state, so that the way "
            f"back sees the numbers of the way there. The operation {operation.type} at {name!r} draws from a state of "
            "TensorFlow's own. Use keras.random with a keras.random.SeedGenerator (and name its state in "
            "state_variables), tf.random.stateless_* with a seed from the batch, or a layer such as "
            "keras.layers.Dropout or GaussianNoise.")
    if operation.type in _PYTHON:
        raise ValueError(
            "The inner training is a graph whose derivatives are taken twice. The operation "
            f"{operation.type} at {name!r} calls Python (tf.py_function, tf.numpy_function), which has none. Write it "
            "with TensorFlow or keras.ops, or move it into the data.")


def check_compared_draws(outputs: Tensors, parameters: Tensors, names: Any) -> None:
    """Refuses draws that are compared with what follows from parameters, as a mask of dropout by its rate.

    A comparison has no derivative, though the mean over draws of what depends on it has. What is left of the derivative
    then, as that of the factor 1 / (1 - rate), is no estimate of it. A `tf.custom_gradient` around it has one.

    Args:
        outputs: Nest of tensors of a graph.
        parameters: List of its tensors.
        names: Names of the parameters, in their order.

    Raises:
        ValueError: If there is such a comparison; it and the parameter are named.
    """
    needed = _of_derivative([output for output in tf.nest.flatten(outputs) if output is not None])
    for operation in [operation for operation in needed if operation.type in _COMPARISONS]:
        for threshold, other in (operation.inputs, reversed(operation.inputs)):
            above = {ancestor.name for ancestor in _of_derivative([threshold])} if _is_draw(other) else ()
            found = [name for parameter, name in zip(parameters, names) if parameter.op.name in above]
            if found:
                raise ValueError(
                    "A random number that is compared with an outer variable has no derivative, and a gradient of the "
                    f"rest alone would be wrong without a word. The operation {operation.type} at {operation.name!r} "
                    f"compares one with what depends on {', '.join(found)}. Where it is dropout, use stn.Dropout, or "
                    "stn.with_strengths for a Keras model, which have the derivative of the mean over masks; otherwise "
                    "a draw that depends smoothly on it, such as mean + deviation * noise, or name it in fixed.")


def _of_derivative(tensors):
    """The operations that tensors depend on, without what a `tf.custom_gradient` has a derivative of its own for, and
    what is stopped and no rule lets pass."""
    seen, stack = {}, [tensor.op for tensor in tensors]
    while stack:
        operation = stack.pop()
        if operation.name in seen or is_stop(operation):
            continue
        seen[operation.name] = operation
        inputs = operation.inputs
        if operation.type == "IdentityN" and "_gradient_op_type" in operation.node_def.attr:
            # Its results are used; its arguments stand behind them, for the gradient alone.
            inputs = [given for given, result in zip(inputs, operation.outputs) if not result.consumers()]
        stack.extend(tensor.op for tensor in inputs)
    return list(seen.values())


def _is_draw(tensor):
    """Whether a tensor is a draw, scaled and shifted at most."""
    drawn, stack = False, [tensor.op]
    while stack:
        operation = stack.pop()
        if operation.type.startswith(_SEEDED_DRAWS):  # Others are refused anyway.
            drawn = True
        elif operation.type in _KEEP_DRAWS:
            stack.extend(entry.op for entry in operation.inputs if entry.dtype.is_floating)
        elif operation.type != "Const":
            return False
    return drawn


def check_derivatives(outputs: Tensors, inputs: Tensors, second: bool = False, exact: bool = False) -> None:
    """Refuses operations between inputs and outputs of which TensorFlow would leave a derivative out unsaid.

    Args:
        outputs, inputs: Lists of tensors of one graph.
        second: Bool. The graph holds an inner gradient, whose derivative this is: calls of functions that were traced
            before, where no rule can be set, must not need one.
        exact: Bool. The rules of `exact` are set on the operations, as they are for a second derivative.

    Raises:
        ValueError: If there is such an operation; it is named.
    """
    sources = {tensor.name for tensor in inputs}
    reached = _between(outputs, inputs)
    for operation in reached.values():
        for found in _with_inner(operation):
            if found.type in _COUNTED_AS_CONSTANT:
                raise ValueError(f"{_RULE}TensorFlow counts the operation {found.type} at {operation.name!r} as a "
                                 f"constant, which it is not.{_ADVICE}")
        for place in () if _has_rule(operation, exact or second) else _INPUTS_LEFT_OUT.get(operation.type, ()):
            tensor = operation.inputs[place]
            if tensor.name in sources or tensor.op.name in reached:
                raise ValueError(f"{_RULE}TensorFlow leaves out the derivative of the operation {operation.type} at "
                                 f"{operation.name!r} with respect to its input {place}.{_ADVICE}")
        if second:
            _check_calls(operation)


def _has_rule(operation, exact):
    """Whether a rule gives the derivatives that TensorFlow leaves out: of moved pixels, but to the nearest one."""
    return exact and operation.type == "ImageProjectiveTransformV3" and (
        operation.get_attr("interpolation") == b"BILINEAR")


def _check_calls(operation):
    for caller in (operation, *operations_inside(operation)):
        for found in operations_called(caller):
            if needs_rule(caller.graph, found):
                raise ValueError(
                    f"{_RULE}The one of the operation {found.type} is TensorFlow's own, which leaves a part out, "
                    f"inside of the function that {operation.name!r} calls: it was traced before. Call the "
                    "tf.function or the layer itself in the place of its ConcreteFunction or of what was loaded "
                    "from a SavedModel; where it is tf.stop_gradient, stop_gradient='tensorflow' of the problem "
                    "takes what it stops for a constant.")


def _between(outputs, inputs):
    """By name, the operations between inputs and outputs that derivatives pass."""
    allowed = passes_to(outputs)
    reached, stack = {}, [consumer for tensor in inputs for consumer in tensor.consumers()]
    while stack:
        operation = stack.pop()
        if operation.name in reached or operation.name not in allowed:
            continue
        reached[operation.name] = operation
        stack.extend(consumer for tensor in operation.outputs for consumer in tensor.consumers())
    return reached


def _with_inner(operation):
    """The operation, those that it holds as a loop or a branch, and those of the functions that these call."""
    for held in (operation, *operations_inside(operation)):
        yield held
        yield from operations_called(held)


def check_gradients_exist(operations: Any) -> None:
    """Refuses what `tf.gradients` could not differentiate and added a place holder for.

    Args:
        operations: The operations that were added.

    Raises:
        ValueError: If there is one; the operation that it belongs to is named.
    """
    for operation in operations:
        if any(found.type == _PLACE_HOLDER for found in (operation, *operations_inside(operation))):
            raise ValueError(f"{_RULE}TensorFlow has none for a part of the operation {operation.type} at "
                             f"{operation.name!r}.{_ADVICE}")


def no_derivative(error: Any, graph: tf.Graph) -> ValueError:
    """A LookupError of TensorFlow's as a ValueError: the operation without a gradient, by type and name.

    Args:
        error: The LookupError.
        graph: The `tf.Graph` that was differentiated.
    """
    found = re.search(r"operation ?'([^']*)' \(op type: ([^)]*)\)", str(error))
    if found is not None:
        name, kind = found.groups()
    else:  # A tape knows the type alone.
        kind = str(error).rsplit(" ", 1)[-1].strip("'\"")
        name = next((operation.name for operation in graph.get_operations() if operation.type == kind), None)
    if name is None:
        return ValueError(f"{_RULE}{error}")
    return ValueError(f"{_RULE}TensorFlow has none for the operation {kind} at {name!r}.{_ADVICE}")

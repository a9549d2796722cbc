"""Operations that cannot be part of an inner training, found in its traced graph and named."""

import tensorflow as tf

from farhox._core.exact import operations_inside

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


def check_operations(graph, outputs, outer=False):
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
        for found in (operation, *operations_inside(operation)):
            _check(found, operation.name in needed, operation.name, outer)


def _check(operation, needed, name, outer):
    if operation.type in _ASSIGNMENTS:
        raise ValueError(
            "An objective may assign Keras variables that are state variables, and nothing else: inner training runs it "
            f"more than once. The operation {operation.type} at {name!r} assigns a tf.Variable. Make it a "
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

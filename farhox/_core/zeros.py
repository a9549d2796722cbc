"""What is left of a graph in which some tensors are known to be zero."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Zero if the first input is, and if any of the inputs is.
_FIRST = frozenset(["Identity", "Neg", "Reshape", "Cast", "Transpose", "Sum", "RealDiv", "DivNoNan", "ExpandDims",
                    "Squeeze", "BroadcastTo", "PreventGradient"])
_ANY = frozenset(["Mul", "MulNoNan", "MatMul", "BatchMatMulV2"])
_SUMS = frozenset(["AddN", "AddV2", "Add"])


def without_zeros(nodes: Mapping[str, Any], zeros: Iterable[str], shape: Callable[[str], Any]) -> tuple[Any, set[str]]:
    """Leaves tensors that are zero out of sums, and finds what else is zero because of them.

    An operation that is not known here takes the zeros as it takes any numbers, and what has no static shape is none.

    Args:
        nodes: Dictionary from names to `NodeDef`, each after those that it takes from.
        zeros: Names of tensors that are zero.
        shape: Function from the name of a tensor to its static shape.

    Returns:
        A dictionary from names to the nodes that are others now, and the names of all tensors that are zero.
    """
    zero, changed = set(zeros), {}
    for name, node in nodes.items():
        inputs = [source if ":" in source else f"{source}:0" for source in node.input if not source.startswith("^")]
        is_zero = [source in zero for source in inputs]
        if not any(is_zero):
            continue
        output = f"{name}:0"
        if not shape(output).is_fully_defined():
            continue
        if node.op in _FIRST and is_zero[0] or node.op in _ANY or node.op in _SUMS and all(is_zero):
            zero.add(output)
        elif node.op in _SUMS:
            left = [source for source, is_left_out in zip(inputs, is_zero) if not is_left_out]
            if len(left) > 1 or shape(left[0]) == shape(output):  # A sum of two may broadcast.
                changed[name] = _sum_of(node, left)
    return changed, zero


def _sum_of(node, left):
    """The node as the sum of the tensors that are left of its inputs."""
    changed = type(node)()
    changed.CopyFrom(node)
    waits = [source for source in node.input if source.startswith("^")]
    del changed.input[:]
    changed.input.extend(left + waits)
    if len(left) > 1:
        changed.attr["N"].i = len(left)
        return changed
    changed.op = "Identity"
    changed.attr.pop("N", None)
    return changed

"""What to keep of one computation for a second one that needs parts of it: a minimum cut, priced in bytes.

The second computation can get a tensor in two ways. Either it was kept, which costs its bytes, or the operation behind
it is run again, which costs that operation's arithmetic and asks for the operation's own inputs. The cheapest choice
for all tensors together is a minimum cut: every operation hangs on the source by its arithmetic and on each of its
tensors by the price of keeping that; an operation that is run again needs its inputs, and what is needed hangs on the
sink.
"""

import collections
import math
from typing import Any, NamedTuple

import tensorflow as tf

from farhox._core.types import Tensors

# Arithmetic operations that are as dear as one byte. Where multiplications of matrices meet, choices do not depend on
# it within a wide range; a low price would keep results that are cheap to compute.
PRICE = 30.0

_CHEAP = frozenset([
    "BroadcastTo", "Cast", "ConcatV2", "Const", "ExpandDims", "Fill", "Identity", "IdentityN", "NoOp", "Pack",
    "Placeholder", "Reshape", "Shape", "Slice", "Split", "Squeeze", "StopGradient", "StridedSlice", "Transpose",
    "Unpack", "ZerosLike", "OnesLike"])
_DEAR = frozenset([
    "Erf", "Exp", "Log", "Log1p", "Pow", "RandomUniform", "Sigmoid", "Softmax", "LogSoftmax", "Softplus", "Sqrt",
    "Rsqrt", "StatelessRandomNormalV2", "StatelessRandomUniformV2", "Tanh"])
_CONVOLUTIONS = frozenset(["Conv2D", "Conv3D", "DepthwiseConv2dNative"])
_LOOPS = frozenset(["While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase", "PartitionedCall",
                    "StatefulPartitionedCall"])
# What is in a loop is not counted: run it again only where it cannot be kept.
_LOOP_COST = 1e9


class Choice(NamedTuple):
    """A tensor that is kept, or an operation that is run again.

    Attributes:
        name: Its name in the graph.
        shape: Tuple, the shape of the tensor or of the operation's first result.
        bytes: Int, what keeping it takes.
        arithmetic: Float, the arithmetic operations of computing it again.
    """

    name: str
    shape: Any
    bytes: int
    arithmetic: float


def tensors_to_keep(graph: tf.Graph, wanted: Any, free: Any, forward: Any, sources: Any, budget: float,
                    price: float = PRICE) -> Tensors:
    """Tensors of a graph to keep when `forward` is computed, for computing `wanted` later.

    Args:
        graph: A `StepGraph`.
        wanted: List of tensors, what is computed later.
        free: List of tensors that are at hand later anyhow.
        forward: List of tensors that are computed first anyhow. Only what they depend on can be kept.
        sources: List of tensors that are known only later: what depends on them is computed then.
        budget: Bytes to keep at most, or infinity.
        price: The arithmetic operations that are as dear as keeping a byte.

    Returns:
        List of tensors.
    """
    cutter = _Cutter(graph, wanted, free, forward, sources)
    kept = cutter.cut(price)
    if _bytes(kept) <= budget:
        return kept
    low, high = math.log(price), math.log(1e9)
    kept = []
    for _ in range(6):
        middle = (low + high) / 2
        candidate = cutter.cut(math.exp(middle))
        if _bytes(candidate) <= budget:
            kept, high = candidate, middle
        else:
            low = middle
    return kept


def choices(graph: tf.Graph, kept: Tensors, wanted: Any, free: Any, sources: Any) -> Any:
    """What `tensors_to_keep` decided, in a form for people: what is kept, and what is run again, the dearest first."""
    at_hand = {tensor.name for tensor in [*kept, *free]}
    needed = graph.ancestors(wanted, at_hand) - graph.dependents(wanted, sources)
    again = [_choice(operation) for operation in graph.operations(needed) if _arithmetic(operation) > 0]
    again.sort(key=lambda choice: -choice.arithmetic)
    return [_choice(tensor.op) for tensor in kept], again


def _choice(operation):
    tensor = operation.outputs[0]
    size = tensor.shape.num_elements()
    return Choice(operation.name, tuple(tensor.shape), 0 if size is None else size * tensor.dtype.size,
                  _arithmetic(operation))


def kept_bytes(tensors: Tensors) -> int:
    """Bytes of the tensors."""
    return _bytes(tensors)


class _Cutter:
    def __init__(self, graph: tf.Graph, wanted: Any, free: Any, forward: Any, sources: Any) -> None:
        self._free = {tensor.ref() for tensor in free}
        computed = graph.ancestors(forward)
        later = graph.dependents(wanted, sources)
        self._computed = computed
        self._needed, self._operations = [], []
        stack = []
        for operation in graph.operations(graph.ancestors(wanted)):
            if operation.name in later:
                stack.extend(tensor for tensor in operation.inputs if tensor.op.name not in later)
        stack.extend(tensor for tensor in wanted if tensor.op.name not in later)
        self._needed = _distinct(tensor for tensor in stack if tensor.ref() not in self._free)
        seen = set()
        stack = [tensor.op for tensor in self._needed]
        while stack:
            operation = stack.pop()
            if operation.name in seen or operation.type == "Placeholder":
                continue
            seen.add(operation.name)
            self._operations.append(operation)
            stack.extend(tensor.op for tensor in operation.inputs if tensor.ref() not in self._free)

    def cut(self, price: float) -> Tensors:
        """The tensors that are kept at a price in operations per byte."""
        flow = _Flow()
        tensors = {}
        for operation in self._operations:
            flow.add("source", operation.name, _arithmetic(operation))
            for tensor in operation.outputs:
                if tensor.ref() not in self._free:
                    tensors[tensor.name] = tensor
                    flow.add(operation.name, tensor.name, self._price(tensor, price))
            for tensor in operation.inputs:
                if tensor.ref() not in self._free and tensor.op.type != "Placeholder":
                    flow.add(tensor.name, operation.name, math.inf)
        for tensor in self._needed:
            flow.add(tensor.name, "sink", math.inf)
        first = flow.source_side()
        return [tensor for name, tensor in tensors.items() if tensor.op.name in first and name not in first]

    def _price(self, tensor, price):
        size = tensor.shape.num_elements()
        can_be_kept = (tensor.op.name in self._computed and size is not None and
                       (tensor.dtype.is_floating or tensor.dtype.is_bool))
        return price * size * tensor.dtype.size if can_be_kept else math.inf


class _Flow:
    """A network of capacities; the largest flow by shortest augmenting paths in layers (Dinic)."""

    def __init__(self) -> None:
        self._edges = collections.defaultdict(dict)

    def add(self, start: str, end: str, capacity: float) -> None:
        """An edge; of two between the same nodes the capacities add up."""
        self._edges[start][end] = self._edges[start].get(end, 0.0) + capacity
        self._edges[end].setdefault(start, 0.0)

    def source_side(self) -> set[Any]:
        """The nodes that the source still reaches when the flow is largest."""
        while True:
            layers = self._layers()
            if "sink" not in layers:
                return set(layers)
            left = {node: list(edges) for node, edges in self._edges.items()}
            while self._augment(layers, left):
                pass

    def _layers(self):
        layers, queue = {"source": 0}, collections.deque(["source"])
        while queue:
            node = queue.popleft()
            for end, capacity in self._edges[node].items():
                if capacity > 0 and end not in layers:
                    layers[end] = layers[node] + 1
                    queue.append(end)
        return layers

    def _augment(self, layers, left):
        """Sends as much as one path of the layers takes; False when there is none."""
        path, node = [], "source"
        while node != "sink":
            ends = left[node]
            while ends and not (self._edges[node][ends[-1]] > 0 and layers.get(ends[-1]) == layers[node] + 1):
                ends.pop()
            if ends:
                path.append((node, ends[-1]))
                node = ends[-1]
            elif path:
                node, end = path.pop()
                left[node].pop()
            else:
                return False
        amount = min(self._edges[start][end] for start, end in path)
        if math.isinf(amount):
            raise ValueError("Something that is needed later can neither be kept nor computed again.")
        for start, end in path:
            self._edges[start][end] -= amount
            self._edges[end][start] += amount
            if self._edges[start][end] < 1e-6:
                self._edges[start][end] = 0.0
        return True


def _arithmetic(operation):
    """The number of arithmetic operations, as far as shapes tell."""
    kind = operation.type
    if kind in _CHEAP:
        return 0.0
    if kind in _LOOPS:
        return _LOOP_COST
    sizes = [tensor.shape.num_elements() or 0 for tensor in operation.outputs]
    out = float(sum(sizes))
    if kind == "MatMul":
        inner = operation.inputs[0].shape[0 if operation.get_attr("transpose_a") else 1]
        return 2.0 * out * (inner or 1)
    if kind in ("BatchMatMulV2", "BatchMatMul"):
        inner = operation.inputs[0].shape[-2 if operation.get_attr("adj_x") else -1]
        return 2.0 * out * (inner or 1)
    if kind in _CONVOLUTIONS:
        return 2.0 * out * (operation.inputs[1].shape[:-1].num_elements() or 1)
    if kind.startswith("Conv") and kind.endswith("Input"):
        return 2.0 * float(operation.inputs[2].shape.num_elements() or 0) * (
            operation.inputs[1].shape[:-1].num_elements() or 1)
    if kind.startswith("Conv") and kind.endswith("Filter"):
        return 2.0 * float(operation.inputs[2].shape.num_elements() or 0) * (
            operation.outputs[0].shape[:-1].num_elements() or 1)
    ins = float(sum(tensor.shape.num_elements() or 0 for tensor in operation.inputs))
    return max(out, ins) * (10.0 if kind in _DEAR else 1.0)


def _bytes(tensors):
    return sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in tensors)


def _distinct(tensors):
    return list({tensor.ref(): tensor for tensor in tensors}.values())

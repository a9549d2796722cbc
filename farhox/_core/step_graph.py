"""A function traced once into a graph that can be read, differentiated and run in pieces.

`tf.function` traces; `tf.gradients` adds derivatives to the same graph, where it obeys the gradients that `exact` has
set on single operations; `tf.graph_util.import_graph_def` brings what a piece needs into the graph that runs it: the
body of a loop, say. A tensor that is fed cuts the graph there, and what no fetch needs is not run.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from google.protobuf.message import DecodeError

from farhox._core import large_constants, refusals
from farhox._core.exact import exact_derivatives
from farhox._core.functional import user_code
from farhox._core.sums import sums_as_written
from farhox._core.types import Nest, Tensor, Tensors
from farhox._core.zeros import without_zeros


class StepGraph:
    """The graph of one function and of its derivatives.

    Args:
        function: Callable, list of tensors to a nest of tensors. It is called once.
        inputs: List of tensors, or of anything with a shape and a dtype: what the function will be given.

    Attributes:
        inputs: List of the graph's tensors in the place of the inputs.
        outputs: What the function returned: a nest of tensors of the graph, None where it returned that.
        is_copied: Bool, whether TensorFlow did not import a part of the graph, which was then copied operation by
            operation. A warning has said why.
    """

    def __init__(self, function: Callable[..., Any], inputs: Any) -> None:
        traced = []

        def body(*inputs):
            # A tensor that is returned as it came in must be told from the input.
            inputs = list(inputs)
            with user_code():
                outputs = tf.nest.map_structure(
                    lambda output: None if output is None else tf.identity(output), function(inputs))
            traced.extend([inputs, outputs])
            return ()

        concrete = tf.function(body, autograph=False).get_concrete_function(
            *[tf.TensorSpec(x.shape, x.dtype) for x in inputs])
        self.inputs, self.outputs = traced
        large_constants.check_room(concrete.graph)
        # The graph lives as long as its function.
        self._concrete = concrete
        self._definition = None
        self._nodes = {}
        self._functions = {}
        self._linear = {}
        self._constants = {}
        self.is_copied = False

    @property
    def graph(self) -> tf.Graph:
        """The `tf.Graph`."""
        return self._concrete.graph

    @staticmethod
    def inside(outputs: Any) -> Any:
        """Outputs as the rest of the graph sees them, where it goes on computing with them."""
        return [output.op.inputs[0] for output in outputs]

    def placeholders(self, like: Nest) -> Tensors:
        """New tensors of the graph, to be fed where they are needed, of the shapes and types of `like`."""
        with self.graph.as_default():
            return [tf.compat.v1.placeholder(tensor.dtype, tensor.shape) for tensor in like]

    def pullback(self, outputs: Any, inputs: Any, cotangents: Sequence[Tensor | None],
                 held: Sequence[Tensor] = ()) -> Any:
        """cotangents' (d outputs / d inputs) as tensors of the graph, None where independent.

        Args:
            outputs: List of floating-point tensors of the graph.
            inputs: List of floating-point tensors of the graph.
            cotangents: List of tensors of the graph aligned with `outputs`; an output whose cotangent is None does not
                count.
            held: List of tensors of the graph that are constants.

        Raises:
            ValueError: If an operation on the way has no derivative; it is named.
        """
        pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents) if cotangent is not None]
        if not pairs:
            return [None] * len(inputs)
        outputs, given = zip(*pairs)
        free = [tensor for tensor in inputs if not any(tensor is constant for constant in held)]
        refusals.check_derivatives(outputs, free, second=True)
        self._definition: Any = None
        # What is added here is differentiated once more by `pushforward`.
        with self.graph.as_default(), user_code(), exact_derivatives():
            products = _symbolic_gradients(list(outputs), list(inputs), list(given), list(held))
            return [None if product is None else tf.convert_to_tensor(product) for product in products]

    def pushforward(self, outputs: Any, inputs: Any, tangents: Sequence[Tensor | None]) -> Any:
        """(d outputs / d inputs) tangents as tensors of the graph, None where independent.

        It is the derivative of the pullback, which is linear in the cotangents, along the tangents.

        Args:
            outputs, inputs: As in `pullback`.
            tangents: List of tensors of the graph aligned with `inputs`; None is a tangent of zero.
        """
        key = tuple(tensor.name for tensor in outputs), tuple(tensor.name for tensor in inputs)
        if key not in self._linear:
            with self.graph.as_default():
                # The derivative of a linear function is the same everywhere.
                cotangents = [tf.zeros(output.shape, output.dtype) if output.shape.is_fully_defined()
                              else tf.zeros_like(output) for output in outputs]
            self._linear[key] = cotangents, self.pullback(outputs, inputs, cotangents)
        cotangents, products = self._linear[key]
        pairs = [(product, tangent) for product, tangent in zip(products, tangents)
                 if product is not None and tangent is not None]
        return self.pullback([product for product, _ in pairs], cotangents, [tangent for _, tangent in pairs])

    def run(self, fetches: Any, feeds: Any, checks: bool = False) -> Any:
        """Runs what the fetches need in the current graph.

        Args:
            fetches: List of tensors of this graph.
            feeds: List of pairs (tensor of this graph, tensor). Of two pairs for one tensor the later one counts. None
                for a tensor of known shape is zeros, which are left out of sums.
            checks: Bool. Run the assertions and prints of the function too, as far as they depend on what is fed.

        Returns:
            List of tensors aligned with `fetches`.

        Raises:
            ValueError: If a fetch depends on a placeholder that is not fed.
        """
        feeds = list(feeds)
        if tf.executing_eagerly():
            return self._run_eagerly(list(fetches), feeds, checks)
        current = tf.compat.v1.get_default_graph()
        values = {tensor.name: value for tensor, value in feeds}
        every, zero = self._without([name for name, value in values.items() if value is None])
        values = {**zero, **{name: value for name, value in values.items() if value is not None}}
        wanted = [fetch.name for fetch in fetches if fetch.name not in values]
        nodes, cut = self._needed(wanted, values, every)
        captured = {**self._constants, **{internal.name: external for external, internal in self.graph.captures}}
        missing = sorted(name for name in cut if name not in values and name not in captured)
        if missing:
            raise ValueError(f"The graph must be fed all that a fetch depends on. Not fed: {missing}")
        effects = []
        for name in self._effects() if checks else []:
            more, ends = self._needed([f"{name}:0"], values, every)
            if all(end in values or end in captured for end in ends):
                nodes.update(more)
                cut.update(ends)
                effects.append(name)
        taken = cut.union(fetch.name for fetch in fetches if fetch.name in values)
        outside = {name: _in_graph(current, values[name] if name in values else captured[name]) for name in taken}
        imported = iter(self._imported(nodes, {name: outside[name] for name in cut}, wanted, effects))
        results = [outside[fetch.name] if fetch.name in values else next(imported) for fetch in fetches]
        for result, fetch in zip(results, fetches):
            result.set_shape(fetch.shape)
        return results

    def nest(self, fetches: Any, inputs: Any, feeds: Any = (), checks: bool = False) -> Any:
        """`run` for a nest of tensors, None staying None, with all inputs of the graph fed."""
        flat = [fetch for fetch in tf.nest.flatten(fetches) if fetch is not None]
        values = iter(self.run(flat, [*zip(self.inputs, inputs), *feeds], checks))
        return tf.nest.map_structure(lambda fetch: None if fetch is None else next(values), fetches)

    def _run_eagerly(self, fetches, feeds, checks):
        """`run` by a function of its own: nothing can be imported outside of a graph."""
        zeros = [(tensor, value) for tensor, value in feeds if value is None]
        feeds = [(tensor, value) for tensor, value in feeds if value is not None]
        tensors = [tensor for tensor, _ in feeds]
        key = (tuple(fetch.name for fetch in fetches), tuple(tensor.name for tensor in tensors),
               tuple(tensor.name for tensor, _ in zeros), checks)
        if key not in self._functions:
            self._functions[key] = tf.function(
                lambda *values: self.run(fetches, [*zip(tensors, values), *zeros], checks), autograph=False,
            ).get_concrete_function(*[tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors])
        with sums_as_written():
            return self._functions[key](*[value for _, value in feeds])

    def independent(self, wanted: Any, sources: Any) -> Tensors:
        """Where a computation of `wanted` can be cut so that nothing before the cut depends on `sources`.

        Integers are not cut: they are shapes and indices, which are cheap, and which XLA must know when it compiles.

        Returns:
            List of tensors of the graph.
        """
        nodes, _ = self._needed([tensor.name for tensor in wanted], {})
        dependent = self._dependent(nodes, {tensor.op.name for tensor in sources})
        cut, seen = {}, set()
        stack = [tensor.name for tensor in wanted]
        while stack:
            name = stack.pop()
            if name in seen or name.startswith("^"):
                continue
            seen.add(name)
            node = self._nodes[name.split(":")[0]]
            if node.name not in dependent and node.op not in ("Placeholder", "Const"):
                tensor = self.graph.get_tensor_by_name(name)
                if not tensor.dtype.is_integer:
                    cut[name] = tensor
                    continue
            stack.extend(_full_name(source) for source in node.input)
        return list(cut.values())

    def ancestors(self, tensors: Tensors, fed: Any = ()) -> set[Any]:
        """The names of all operations that the tensors depend on, their own among them.

        Args:
            fed: Names of tensors that need not be computed.
        """
        return set(self._needed([tensor.name for tensor in tensors if tensor.name not in fed], fed)[0])

    def dependents(self, wanted: Any, sources: Any) -> set[Any]:
        """The names of the operations that `wanted` needs and that depend on `sources`, the sources with them."""
        nodes, _ = self._needed([tensor.name for tensor in wanted], {})
        return self._dependent(nodes, {tensor.op.name for tensor in sources})

    def operations(self, names: Any) -> list[tf.Operation]:
        """The operations of these names, in the order in which they were added."""
        return [operation for operation in self.graph.get_operations() if operation.name in names]

    def _dependent(self, nodes, sources):
        """The names among `nodes` that depend on an operation among `sources`, the sources with them."""
        users = {}
        for node in nodes.values():
            for source in node.input:
                users.setdefault(source.lstrip("^").split(":")[0], []).append(node.name)
        found, stack = set(), list(sources)
        while stack:
            name = stack.pop()
            if name not in found:
                found.add(name)
                stack.extend(users.get(name, ()))
        return found

    def _imported(self, nodes, input_map, wanted, effects):
        if not nodes:
            # What is fetched came in as it is: captured from outside.
            return [input_map[name] for name in wanted]
        # Loops and branches are functions, which live as long as this graph does.
        tf.compat.v1.add_to_collection("farhox_imported", self)
        definition = tf.compat.v1.GraphDef()
        definition.versions.CopyFrom(self._definition.versions)
        definition.library.CopyFrom(self._definition.library)
        for node in nodes.values():
            copy = definition.node.add()
            copy.CopyFrom(node)
            kept = [source for source in node.input if not source.startswith("^") or source[1:] in nodes]
            if len(kept) < len(node.input):
                del copy.input[:]
                copy.input.extend(kept)
        inside = [name for name in wanted if name not in input_map]
        try:
            imported = iter(tf.graph_util.import_graph_def(
                definition, input_map=input_map, return_elements=inside + effects, name=_scope()))
        except (ValueError, TypeError, DecodeError, tf.errors.OpError) as error:
            self._say_copied(error)
            imported = iter(self._copied(nodes, input_map, inside))
        return [input_map[name] if name in input_map else next(imported) for name in wanted]

    def _copied(self, nodes, input_map, wanted):
        """What an import does, without a definition of the whole: operation by operation."""
        graph, tensors, operations = tf.compat.v1.get_default_graph(), dict(input_map), {}
        with tf.name_scope(_scope()):
            for operation in self.operations(nodes):
                before = [operations[first.name] for first in operation.control_inputs if first.name in operations]
                with graph.control_dependencies(before):
                    node = nodes[operation.name]
                    copy = graph.create_op(
                        node.op, [tensors[_full_name(source)] for source in node.input if not source.startswith("^")],
                        [tensor.dtype for tensor in operation.outputs], name=operation.name, attrs=dict(node.attr))
                operations[operation.name] = copy
                for old, new in zip(operation.outputs, copy.outputs):
                    tensors.setdefault(old.name, new)
        return [tensors[name] for name in wanted]

    def _say_copied(self, error):
        if not self.is_copied:
            warnings.warn("TensorFlow does not import a part of the traced graph, which is therefore copied operation "
                          f"by operation: results are the same, tracing takes longer. TensorFlow says: {error}",
                          RuntimeWarning, stacklevel=2)
        self.is_copied = True

    def _read(self):
        """The definition of the graph, read again when derivatives were added."""
        if self._definition is None:
            self._definition = self.graph.as_graph_def()
            large_constants.take_out(self.graph, self._definition, self._constants)
            self._nodes = {node.name: node for node in self._definition.node}
            for node in self._nodes.values():
                node.attr.pop("_class", None)
                # What is imported is not differentiated again, and a SavedModel would trace every rule that is set.
                if "_gradient_op_type" in node.attr and node.attr["_gradient_op_type"].s.startswith(b"Farhox"):
                    node.attr.pop("_gradient_op_type")
        return self._nodes

    def _effects(self):
        return [node.name for node in self._read().values() if node.op in _EFFECTS]

    def _without(self, zeros):
        """The nodes where tensors of these names are zero and left out, and zeros for all that is zero, by name."""
        every = self._read()
        if not zeros:
            return every, {}
        changed, zero = without_zeros(every, zeros, lambda name: self.graph.get_tensor_by_name(name).shape)
        tensors = [self.graph.get_tensor_by_name(name) for name in zero]
        return {**every, **changed}, {tensor.name: _Zeros(tensor.shape, tensor.dtype) for tensor in tensors}

    def _needed(self, wanted, fed, every=None):
        """The nodes that the tensors `wanted` need, by name, and the names of the tensors where the graph is cut."""
        every = self._read() if every is None else every
        nodes, cut, seen, stack = {}, set(), set(), list(wanted)
        while stack:
            tensor = stack.pop()
            name = tensor.lstrip("^").split(":")[0]
            if tensor in seen:
                continue
            seen.add(tensor)
            node = every[name]
            if node.op == "Placeholder" or f"{name}:0" in self._constants:
                if not tensor.startswith("^"):
                    cut.add(tensor)
                continue
            if name in nodes:
                continue
            nodes[name] = node
            # What a constant waits for would be run for nothing: TensorFlow lets those of its gradients wait.
            for source in () if node.op == "Const" else node.input:
                full = _full_name(source)
                if full in fed:
                    cut.add(full)
                else:
                    stack.append(full)
        return nodes, cut


# Operations that act without anybody reading what they return.
_EFFECTS = frozenset(["Assert", "Print", "PrintV2"])


def _scope():
    """A name for what is imported that differs from those in the graphs around the current one.

    A loop names what it takes from outside after its names there: equal names in both would meet in its body.
    """
    depth, graph = 0, tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None:
        depth, graph = depth + 1, graph.outer_graph
    return f"step_of_level_{depth}"


def _full_name(source):
    """The name of a tensor, or of a control input with its ^, from its short form in a node."""
    return source if ":" in source or source.startswith("^") else f"{source}:0"


class _Zeros(NamedTuple):
    """What stands for zeros until something needs them."""

    shape: tf.TensorShape
    dtype: tf.DType


def _in_graph(graph, value):
    """A tensor of the graph or of a graph around it, an eager tensor or `_Zeros`, as a tensor of the graph."""
    if isinstance(value, _Zeros):
        return tf.zeros(*value)
    return graph.capture(value) if graph.building_function else tf.convert_to_tensor(value)


def _symbolic_gradients(outputs, inputs, cotangents, held):
    graph = outputs[0].graph
    before = len(graph.get_operations())
    try:
        products = tf.gradients(outputs, inputs, grad_ys=cotangents, stop_gradients=held)
    except LookupError as error:
        raise refusals.no_derivative(error, graph) from error
    refusals.check_gradients_exist(graph.get_operations()[before:])
    return products

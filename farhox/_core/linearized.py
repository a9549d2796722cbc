"""Products of a map with cotangents and tangents, read off a traced graph at a point."""

import contextlib
from collections.abc import Sequence

import tensorflow as tf

from farhox._core.types import Nest, Tensor, Tensors


class LinearizedMap:
    """A map read off a traced graph, at a point: its products with cotangents and tangents can be taken many times.

    What does not depend on cotangents or tangents is computed once, in the graph where the map was made, also when
    products are taken inside a loop.

    Args:
        graph: A `StepGraph`.
        values: Values of the graph's inputs, the point.
        inputs, parameters: Lists of tensors of the graph that the map depends on.
        outputs: List of tensors of the graph.
        unknowns: List of values of the shapes of `inputs`.
        held: List of tensors of the graph through which products with the parameters do not pass.

    Attributes:
        unknowns: As given.
    """

    def __init__(self, graph: tf.Graph, values: Tensors, inputs: Tensors, parameters: Tensors, outputs: Tensors,
                 unknowns: Tensors, held: Sequence[Tensor] = ()) -> None:
        self.unknowns = unknowns
        self._graph = graph
        self._feeds = list(zip(graph.inputs, values))
        self._inputs = inputs
        self._parameters = parameters
        self._outputs = outputs
        self._held = held
        self._home = contextlib.nullcontext if tf.executing_eagerly() else tf.compat.v1.get_default_graph().as_default
        self._products = {}
        # By name: tensors that depend on no cotangent or tangent, with their values.
        self._computed = {}

    @property
    def computed(self) -> list[tuple[Tensor, Tensor]]:
        """What products so far needed at the point: pairs (tensor of the graph, its value)."""
        return list(self._computed.values())

    def input_product(self, cotangents: Tensors) -> Tensors:
        """(d outputs / d inputs)' cotangents as a list, zero where no output depends on an input."""
        products = self._transposed("inputs", self._inputs, cotangents, ())
        return zeros_for_none(products, self.unknowns)

    def parameter_product(self, cotangents: Tensors) -> Tensors:
        """(d outputs / d parameters)' cotangents as a list, None where no output depends on a parameter."""
        return self._transposed("parameters", self._parameters, cotangents, self._held)

    def product(self, tangents: Sequence[Tensor | None], of_parameters: Sequence[Tensor | None]) -> Tensors:
        """(d outputs / d (inputs, parameters)) tangents as a list, zero where an output is independent.

        Args:
            tangents: List aligned with inputs; None is a tangent of zero.
            of_parameters: The same for the parameters.
        """
        tangents = list(tangents) + list(of_parameters)
        key = ("forward", tuple(tangent is None for tangent in tangents))
        if key not in self._products:
            sources = self._inputs + self._parameters
            placeholders = [None if tangent is None else placeholder for tangent, placeholder in zip(
                tangents, self._graph.placeholders(sources))]
            self._products[key] = placeholders, self._staged(
                self._graph.pushforward(self._outputs, sources, placeholders), placeholders)
        return zeros_for_none(self._at(key, tangents), self.unknowns)

    def depends_on(self) -> list[bool]:
        """Which parameters the outputs depend on: a list of bools."""
        cotangents = self._graph.placeholders(self._outputs)
        return [product is not None
                for product in self._graph.pullback(self._outputs, self._parameters, cotangents)]

    def _transposed(self, name, sources, cotangents, held):
        key = (name, tuple(cotangent is None for cotangent in cotangents))
        if key not in self._products:
            placeholders = [None if cotangent is None else placeholder for cotangent, placeholder in zip(
                cotangents, self._graph.placeholders(self._outputs))]
            self._products[key] = placeholders, self._staged(
                self._graph.pullback(self._outputs, sources, placeholders, held), placeholders)
        return self._at(key, cotangents)

    def _staged(self, products, placeholders):
        """The products, and what they need that does not depend on the placeholders, computed at home."""
        wanted = [product for product in products if product is not None]
        base = self._graph.independent(wanted, [p for p in placeholders if p is not None])
        new = [tensor for tensor in base if tensor.name not in self._computed]
        with self._home():
            values = self._graph.run(new, self._feeds + list(self._computed.values()))
        self._computed.update((tensor.name, (tensor, value)) for tensor, value in zip(new, values))
        return products, [self._computed[tensor.name] for tensor in base]

    def _at(self, key, values):
        placeholders, (products, base) = self._products[key]
        feeds = self._feeds + base + [(p, value) for p, value in zip(placeholders, values) if p is not None]
        wanted = iter(self._graph.run([product for product in products if product is not None], feeds))
        return [None if product is None else next(wanted) for product in products]


def zeros_for_none(products: Tensors, like: Nest) -> Tensors:
    """The products, zero tensors where there is none."""
    return [tf.zeros(leaf.shape, leaf.dtype) if product is None and leaf.shape.is_fully_defined()
            else tf.zeros_like(leaf) if product is None else product for product, leaf in zip(products, like)]

"""One step of the way back through an inner training: its products, and what is kept for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from farhox._core.cut import choices, kept_bytes, tensors_to_keep
from farhox._core.exact import passes_to
from farhox._core.few import is_few
from farhox._core.inner_state import InnerState, float_leaves
from farhox._core.linearized import zeros_for_none
from farhox._core.types import Tensor, Tensors

if TYPE_CHECKING:
    from farhox.problem.inner_training import InnerTraining

# A price for keeping a byte at which only what takes no arithmetic is run again.
_NEXT_TO_NOTHING = 1e-6


class BackStep:
    """adjoint' (∂Φ_t/∂s, ∂Φ_t/∂λ) on the graph of a step.

    Only leaves of the state whose adjoint can be other than zero take part: those that the outer objective reads, and
    those that these depend on over one or more steps.

    Args:
        training: An `InnerTraining`.
        sources: List of ints, the leaves of the state that the outer objective reads.
        of_state: Bool, whether dE/ds_t is wanted. A single step back can do without: no second derivatives are traced.

    Attributes:
        active: List of ints, the leaves that take part.
        parameter_products: List of tensors of the graph aligned with the training's parameters, None where no active
            leaf of the next state depends.
    """

    def __init__(self, training: InnerTraining, sources: Any, of_state: bool = True) -> None:
        self._training, self.of_state = training, of_state
        self._graph = graph = training.graph
        outputs, inputs = training.leaf_outputs, training.leaf_inputs
        self.active = self._closure(sources, outputs, inputs) if of_state else sorted(sources)
        self._cotangents = graph.placeholders([outputs[i] for i in self.active])
        leaves = [inputs[i] for i in self.active] if of_state else []
        products = graph.pullback([outputs[i] for i in self.active], leaves + training.parameter_inputs,
                                  self._cotangents)
        self._leaf_products = products[:len(leaves)] if of_state else [None] * len(self.active)
        self.parameter_products = products[len(leaves):]

    def _closure(self, sources, outputs, inputs):
        """The leaves that the sources depend on over any number of steps, the sources with them, in order."""
        active, new = set(), set(sources)
        while new:
            active |= new
            reached = passes_to([outputs[i] for i in new])
            new = {i for i, leaf in enumerate(inputs) if leaf.op.name in reached} - active
        return sorted(active)

    @property
    def passes_on(self) -> bool:
        """Whether a step leaves every adjoint that is wanted as it is and adds nothing to the hypergradient."""
        keeps = not self.of_state or all(_source(product) is cotangent for product, cotangent in zip(
            self._leaf_products, self._cotangents))
        return keeps and all(product is None for product in self.parameter_products)

    def kept(self, memory: float, steps: int) -> Tensors:
        """The tensors of each step's graph to keep for the way back, beside the states.

        Args:
            memory: Bytes for those of `steps` steps.
            steps: Int, or a tensor where the number is not known before: then nothing is kept.
        """
        if not isinstance(steps, int) or not memory:
            return []
        return tensors_to_keep(self._graph, self._products(), self._free(), self._forward(), self._cotangents,
                               memory / max(steps, 1))

    def kept_of_few(self, memory: float, steps: int) -> Tensors | None:
        """All that the way back needs of each of a few steps written out, of which nothing is then run again.

        Returns:
            List of tensors of the graph, or None where they take more than `memory` bytes.
        """
        kept = tensors_to_keep(self._graph, self._products(), self._free(), self._forward(), self._cotangents,
                               math.inf, price=_NEXT_TO_NOTHING)
        return kept if kept_bytes(kept) * steps <= memory else None

    def plan(self, memory: float, steps: int) -> Any:
        """What is kept of each step, and the dearest of what is run again, as lists of `Choice`."""
        of_few = self.kept_of_few(memory, steps) if is_few(steps) else None
        kept = self.kept(memory, steps) if of_few is None else of_few
        kept, again = choices(self._graph, kept, self._products(), self._free(), self._cotangents)
        return kept, again[:10]

    def run(self, t: Tensor, state: InnerState, after: Any, kept: Any, adjoint: Tensors, of_state: bool = True) -> Any:
        """One step back.

        Args:
            t: Scalar int32, the step.
            state, after: The inner states before and after it.
            kept: Values of the kept tensors.
            adjoint: List of tensors, dE/ds_{t+1} over the active leaves, None where it is known to be zero.
            of_state: Bool, whether dE/ds_t is wanted.

        Returns:
            dE/ds_t over the active leaves (zeros where it is not wanted), and the products with the parameters, None
            where independent.
        """
        training = self._training
        feeds = [*zip(self._graph.inputs, training.inputs(state, t)), *zip(self._next_state(), tf.nest.flatten(after)),
                 *kept, *zip(self._cotangents, adjoint)]
        count = len(self.active)
        products = [*(self._leaf_products if of_state else [None] * count), *self.parameter_products]
        wanted = iter(self._graph.run([product for product in products if product is not None], feeds))
        products = [None if product is None else next(wanted) for product in products]
        leaves = float_leaves(state)
        return zeros_for_none(products[:count], [leaves[i] for i in self.active]), products[count:]

    def _products(self):
        return [product for product in self._leaf_products + self.parameter_products if product is not None]

    def _next_state(self):
        return self._graph.inside(tf.nest.flatten(self._graph.outputs.state))

    def _free(self):
        """What the way back has anyhow: the state before the step, the parameters, the batch, the state after it."""
        return list(self._graph.inputs) + self._next_state()

    def _forward(self):
        """What the training computes anyhow."""
        outputs = self._graph.outputs
        return [*tf.nest.flatten(outputs.state), outputs.loss, outputs.gradient_norm]


def _source(tensor):
    """What a tensor is a copy of; None stays None."""
    while tensor is not None and tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor

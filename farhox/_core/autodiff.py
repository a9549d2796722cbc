"""The only tapes: gradients and forward products of functions on flat lists of tensors.

All functions take `function(list of tensors) -> nest of tensors` and watch just the tensors they are given. A missing
dependency is reported as None, so that callers can tell "does not depend" from "is zero".
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from farhox._core import refusals
from farhox._core.exact import exact_derivatives
from farhox._core.types import Nest, Tensor, Tensors


def dense(gradient: Tensor) -> Tensor:
    """A gradient as a tensor: the sparse gradients of lookups are added up, None stays None."""
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _distinct(tensors):
    """The tensors as objects of their own.

    A tape knows a tensor by its identity: with one object in two places it would return the sum of both derivatives,
    twice. An inner state has such places, where a slot was assigned the value of its variable.
    """
    return [tf.identity(tensor) for tensor in tensors]


def gradients(function: Callable[..., Any], inputs: Tensors, exact: bool = False) -> tuple[Tensor, Any, Tensors]:
    """Value and gradients of a scalar function.

    Args:
        function: `list -> (scalar, auxiliary nest)`.
        inputs: List of floating-point tensors.
        exact: Bool. In a graph, gradients that TensorFlow has wrong are the right ones, see `exact`. Without it they
            are those that every training with TensorFlow has.

    Returns:
        scalar, auxiliary nest, list of gradients aligned with `inputs` (None where the scalar does not depend).

    Raises:
        ValueError: If an operation on the way has no derivative; it is named.
    """
    inputs = _distinct(inputs)
    eagerly = tf.executing_eagerly()
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        with exact_derivatives(stops=False) if exact else contextlib.nullcontext():
            value, auxiliary = function(inputs)
    if not eagerly:
        refusals.check_derivatives([value], inputs, exact=exact)
    try:
        found = tf.gradients(value, inputs) if exact and not eagerly else tape.gradient(value, inputs)
    except LookupError as error:
        raise refusals.no_derivative(error, tf.compat.v1.get_default_graph()) from error
    return value, auxiliary, [dense(gradient) for gradient in found]


def not_differentiable(results: Nest, sources: Tensors) -> Nest:
    """Results of an inner training through which a tape must not go: it does not know the rules of `exact`.

    Args:
        results: Nest of tensors and None.
        sources: List of tensors that the results depend on.

    Returns:
        The same values. An eager tape meets an error where it would differentiate them; in a graph there is no
        gradient: an error there could come up without anybody asking for one.
    """
    results = tf.nest.map_structure(lambda leaf: None if leaf is None else tf.stop_gradient(leaf), results)
    if not tf.executing_eagerly() or not record.could_possibly_record():
        return results
    flat = tf.nest.flatten(results)
    floating = [index for index, leaf in enumerate(flat) if leaf is not None and leaf.dtype.is_floating]
    for index, leaf in zip(floating, _refusing([flat[index] for index in floating], sources)):
        flat[index] = leaf
    return tf.nest.pack_sequence_as(results, flat)


@tf.custom_gradient
def _refusing(tensors, sources):
    del sources  # They are on the tape: so is this.

    def refuse(*_):
        raise ValueError(
            "A tape does not differentiate what compute() and evaluate() return: it would leave out what TensorFlow's "
            "second derivatives leave out. The hypergradient is result.gradients of compute(). Where the result is a "
            "constant of what the tape differentiates, write tf.stop_gradient(result.outer_loss).")

    return [tf.identity(tensor) for tensor in tensors], refuse


class ForwardLinearization:
    """A function recorded once at a point, whose products with tangents can be taken any number of times.

    The product J t is the derivative in u, along t, of the transposed product J'u, which is linear in u. Taken inside a
    loop over tangents, what does not depend on them is computed once, outside of the loop. TensorFlow's forward
    accumulator would compute the function again for each tangent.

    Args:
        function: `list -> (list of tensors, auxiliary nest)`.
        inputs: List of floating-point tensors.

    Attributes:
        outputs, auxiliary: function(inputs).
        depends: List of bools: whether an output depends on each input.
    """

    def __init__(self, function: Callable[..., Any], inputs: Tensors) -> None:
        inputs = _distinct(inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            self.outputs, self.auxiliary = function(inputs)
        # The derivative of a linear function is the same everywhere.
        self._cotangents = [tf.zeros_like(output) for output in self.outputs]
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as self._tape:
            self._tape.watch(self._cotangents)
            self._transposed = [dense(product) for product in
                                tape.gradient(self.outputs, inputs, output_gradients=self._cotangents)]
        self.depends = [product is not None for product in self._transposed]

    def product(self, tangents: Sequence[Tensor | None]) -> Tensors:
        """(d outputs / d inputs) tangents as a list, zero where an output is independent.

        Args:
            tangents: List aligned with `inputs`; None is a tangent of zero, and saves its work.
        """
        pairs = [(product, tangent) for product, tangent in zip(self._transposed, tangents)
                 if product is not None and tangent is not None]
        if not pairs:
            return [tf.zeros_like(output) for output in self.outputs]
        products, used = zip(*pairs)
        return self._tape.gradient(list(products), self._cotangents, output_gradients=list(used),
                                   unconnected_gradients=tf.UnconnectedGradients.ZERO)


def forward_product(function: Callable[..., Any], inputs: Tensors, tangents: Tensors) -> Any:
    """(d function / d inputs) tangents: one step of forward mode.

    TensorFlow's forward accumulator cannot enter the loops of a graph (LSTM and GRU without `unroll`) and some
    functions with a gradient of their own. There the product is the derivative of the transposed product u'J in u,
    along the tangents: the same numbers for about twice the work. An error of the function itself comes up again there.

    Args:
        function: `list -> (list of tensors, auxiliary list of tensors)`.
        inputs, tangents: Lists of floating-point tensors.

    Returns:
        Outputs of the function, the list of their tangents (zeros where independent), and the auxiliary list.
    """
    inputs = _distinct(inputs)
    try:
        with tf.autodiff.ForwardAccumulator(inputs, tangents) as accumulator:
            outputs, auxiliary = function(inputs)
        return outputs, [accumulator.jvp(output, unconnected_gradients=tf.UnconnectedGradients.ZERO)
                         for output in outputs], auxiliary
    except Exception:  # The accumulator fails with errors of many kinds.
        linearization = ForwardLinearization(function, inputs)
        return linearization.outputs, linearization.product(tangents), linearization.auxiliary

"""EvoGradHG: the hypergradient from perturbed copies of the inner variables, without second derivatives."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import tensorflow as tf

from farhox._core import checks
from farhox._core.step_graph import StepGraph
from farhox._core.types import Batch, Carry
from farhox.data.batches import batch_at
from farhox.hypergradients.base import SingleHyperGradient, result
from farhox.problem.inner_training import InnerTraining

if TYPE_CHECKING:
    from farhox.hypergradients.base import HyperGradientResult

_SEES = ("EvoGradHG sees what the inner and the outer objective depend on, at the end of the inner training. A "
         "learning rate or another setting of the dynamics, and an initial value without a proximal term, act through "
         "the path: use ReverseHG or ForwardHG for them.")


@dataclasses.dataclass(frozen=True)
class EvoGradHG(SingleHyperGradient):
    """Hypergradient by one step of evolution: perturbed copies of w_T weighted by how well they fit the inner batch.

    With L the inner objective on the last inner batch and ε_k random signs,

        w_k = w_T + sigma ε_k;  p = softmax(-L(w_k, λ) / temperature);  w* = Σ_k p_k w_k;  hypergradient dE(w*, λ)/dλ.

    First order only: K = `perturbations` forward passes and one backward pass through them, whatever T. The part that
    goes through the inner training is random; for small sigma its mean is that of one differentiated gradient step of
    size sigma^2 (1 - 1/K) / temperature. With the default settings that is about 1e-5: outer optimizers that rescale
    (Adam, with an epsilon of 1e-12 rather than 1e-7) suit it, and a part of E that depends on λ explicitly would
    outweigh it.

    The order of the published code (the hypergradient at the current weights, the outer update, the training step on
    the same batch) is that of `EvoGradHG(at_start=True)` under `HyperOptimizer(online=True, outer_first=True)`.

    The draws follow from the seed and the number of the hyper-iteration, `compute(iteration=)`: with the same number
    the same draws, in all episodes of a problem `over_episodes`.

    `result.outer_loss` is E(w_T, λ) as in every method; the diagnostics hold "mixture_loss", E(w*, λ).

    Args:
        perturbations: Int of at least 2, K.
        sigma: Positive float, the size of each entry of a perturbation.
        temperature: Positive float. Small compared with the differences of the losses: one copy takes all the weight.
        seed: Int.
        sign: Bool. False: ε_k are normal numbers instead of their signs.
        at_start: Bool. Perturb s_0, the state before the inner steps, in the place of s_T, and take the losses on the
            first inner batch. `result.outer_loss` is then E(w_0, λ).

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        [Bohdal et al., 2021](https://arxiv.org/abs/2106.10575), section 3.
    """

    perturbations: int = 2
    sigma: float = 1e-3
    temperature: float = 0.05
    seed: int = 0
    sign: bool = True
    at_start: bool = False

    def __post_init__(self):
        if not checks.is_integer(self.perturbations) or self.perturbations < 2:
            raise ValueError("perturbations must be an integer of at least 2, because a single copy always has the "
                             f"weight 1. Received: {self.perturbations!r}")
        for name in ("sigma", "temperature"):
            checks.positive_number(name, getattr(self, name))
        checks.integer("seed", self.seed)

    shares_features = False

    def differentiate(self, training: InnerTraining, outer_batch: Batch, carry: Carry) -> HyperGradientResult:
        problem, outer = training.problem, training.outer
        run = training.run()
        at, t = (training.start, 0) if self.at_start else (run.state, run.steps - 1)
        batch = batch_at(training.inner_batches, t)
        given = at, self._noise(at.variables, training.iteration), batch, outer_batch
        flat = tf.nest.flatten(given)

        def losses(inputs):
            outer, (state, noise, batch, outer_batch) = inputs[:len(training.outer)], tf.nest.pack_sequence_as(
                given, inputs[len(training.outer):])

            def inner_loss(perturbation):
                variables = [w + self.sigma * e for w, e in zip(state.variables, perturbation)]
                loss, _ = problem.inner_loss(variables, state.state_variables, outer, batch)
                return tf.cast(loss, problem.loss_dtype)

            # AutoGraph would rewrite the user's objective, and turn its errors into others.
            losses = tf.map_fn(tf.autograph.experimental.do_not_convert(inner_loss), noise, parallel_iterations=1,
                               fn_output_signature=tf.TensorSpec([], problem.loss_dtype))
            weights = tf.nn.softmax(-losses / self.temperature)
            # The weights add up to 1, so Σ_k p_k (w + sigma ε_k) = w + sigma Σ_k p_k ε_k.
            mixture = [w + self.sigma * tf.tensordot(tf.cast(weights, e.dtype), e, 1)
                       for w, e in zip(state.variables, noise)]
            # The loop gives a derivative of zero to all that enters it: the last two tell what depends on λ.
            return [problem.outer_loss(state._replace(variables=mixture), outer, outer_batch),
                    problem.inner_loss(state.variables, state.state_variables, outer, batch)[0],
                    problem.outer_loss(state, outer, outer_batch)]

        graph = StepGraph(losses, outer + flat)
        ones = graph.placeholders(graph.outputs)
        products = [graph.pullback([loss], graph.inputs[:len(outer)], [one]) for loss, one in zip(graph.outputs, ones)]
        depends = [inner is not None or explicit is not None for _, inner, explicit in zip(*products)]
        wanted = [product if ok else None for product, ok in zip(products[0], depends)]
        values = graph.run([graph.outputs[0], graph.outputs[2], *(part for part in wanted if part is not None)],
                           [*zip(graph.inputs, outer + flat), (ones[0], tf.ones([], graph.outputs[0].dtype))])
        found = iter(values[2:])
        gradients = training.gradients([None if part is None else next(found) for part in wanted], sees=_SEES)
        return result(training, gradients, values[1], run, mixture_loss=values[0])

    def _noise(self, variables, draw):
        """ε_k for each inner variable: tensors [K, *shape] that follow from the seed and the number of the draw."""
        key = tf.stack([tf.constant(self.seed, tf.int64), draw])
        noise = []
        for i, w in enumerate(variables):
            # One type and one generator for all: the draws depend neither on the precision of the model nor on XLA.
            normal = tf.random.stateless_normal(
                [self.perturbations, *w.shape], tf.random.fold_in(key, i, alg="philox"), dtype=tf.float32,
                alg="philox")
            if self.sign:
                normal = tf.where(normal < 0, -tf.ones_like(normal), tf.ones_like(normal))
            noise.append(tf.cast(normal, w.dtype))
        return noise

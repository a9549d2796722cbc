"""EvoGradHG: the hypergradient from perturbed copies of the inner variables, without second derivatives."""

import dataclasses

import tensorflow as tf

from farhox._core import autodiff, checks
from farhox.data.batches import batch_at, num_steps
from farhox.hypergradients.base import (
    HyperGradient,
    HyperGradientResult,
    common_diagnostics,
    gradients_or_error,
    new_losses,
    run_inner,
    stacked_losses,
)

_SEES = ("EvoGradHG sees what the inner and the outer objective depend on, at the end of the inner training. A "
         "learning rate or another setting of the dynamics, and an initial value without a proximal term, act through "
         "the path: use ReverseHG or ForwardHG for them.")


@dataclasses.dataclass(frozen=True)
class EvoGradHG(HyperGradient):
    """Hypergradient by one step of evolution: perturbed copies of w_T weighted by how well they fit the inner batch.

    With L the inner objective on the last inner batch and ε_k random signs,

        w_k = w_T + sigma ε_k;  p = softmax(-L(w_k, λ) / temperature);  w* = Σ_k p_k w_k;  hypergradient dE(w*, λ)/dλ.

    First order only: K = `perturbations` forward passes and one backward pass through them, whatever T. The part that
    goes through the inner training is random; for small sigma its mean is that of one differentiated gradient step of
    size sigma^2 (1 - 1/K) / temperature. With the default settings that is about 1e-5: outer optimizers that rescale
    (Adam) suit it, and a part of E that depends on λ explicitly would outweigh it.

    The draws follow from the seed and a count of hyper-iterations, which `result.carry` holds: passed back, the next
    computation draws anew; without a carry it repeats the same draws. Under `EpisodesHG`, which keeps no memory, every
    episode has the same draws in each hyper-iteration.

    `result.outer_loss` is E(w_T, λ) as in every method; the diagnostics hold "mixture_loss", E(w*, λ).

    Args:
        perturbations: Int of at least 2, K.
        sigma: Positive float, the size of each entry of a perturbation.
        temperature: Positive float. Small compared with the differences of the losses: one copy takes all the weight.
        seed: Int.
        sign: Bool. False: ε_k are normal numbers instead of their signs.

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

    carry_outlives_state = True

    def __post_init__(self):
        if not checks.is_integer(self.perturbations) or self.perturbations < 2:
            raise ValueError("perturbations must be an integer of at least 2, because a single copy always has the "
                             f"weight 1. Received: {self.perturbations!r}")
        for name in ("sigma", "temperature"):
            checks.positive_number(name, getattr(self, name))
        checks.integer("seed", self.seed)

    def _compute(self, problem, inner_batches, outer_batch, state, carry):
        outer = problem.outer_values()
        steps = num_steps(inner_batches)
        state = problem.initial_state(outer) if state is None else state
        run = run_inner(problem, state, outer, inner_batches, 0, steps, new_losses(problem, steps))
        batch = batch_at(inner_batches, run.steps - 1)
        (draw,) = carry or [tf.constant(0, tf.int64)]
        noise = self._noise(run.state.variables, draw)

        def mixture_loss(outer):
            def inner_loss(perturbation):
                variables = [w + self.sigma * e for w, e in zip(run.state.variables, perturbation)]
                loss, _ = problem.inner_loss(variables, run.state.state_variables, outer, batch)
                return tf.cast(loss, problem.loss_dtype)

            # AutoGraph would rewrite the user's objective, and turn its errors into others.
            losses = tf.map_fn(tf.autograph.experimental.do_not_convert(inner_loss), noise, parallel_iterations=1,
                               fn_output_signature=tf.TensorSpec([], problem.loss_dtype))
            weights = tf.nn.softmax(-losses / self.temperature)
            # The weights add up to 1, so Σ_k p_k (w + sigma ε_k) = w + sigma Σ_k p_k ε_k.
            mixture = [w + self.sigma * tf.tensordot(tf.cast(weights, e.dtype), e, 1)
                       for w, e in zip(run.state.variables, noise)]
            return problem.outer_loss(run.state._replace(variables=mixture), outer, outer_batch), ()

        loss, _, gradients = autodiff.gradients(mixture_loss, outer)
        reached = _reached(problem, run.state, outer, batch, outer_batch)
        gradients = gradients_or_error(problem, gradients, reached, _SEES)
        outer_loss = problem.outer_loss(run.state, outer, outer_batch)
        diagnostics = common_diagnostics(gradients, outer_loss, run)
        diagnostics["mixture_loss"] = loss
        return HyperGradientResult(
            gradients, outer_loss, stacked_losses(problem, run), run.state, [draw + 1], diagnostics)

    def initial_carry(self, problem):
        return [tf.constant(0, tf.int64)]

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


def _reached(problem, state, outer, batch, outer_batch):
    """Which outer variables the objectives depend on: a list of bools. In a graph its operations are never run.

    The loop over perturbations gives a gradient of zero to all that enters it, so it cannot tell.
    """
    seen = [
        autodiff.gradients(lambda outer: problem.inner_loss(
            state.variables, state.state_variables, outer, batch), outer)[2],
        autodiff.gradients(lambda outer: (problem.outer_loss(state, outer, outer_batch), ()), outer)[2]]
    return [any(gradient is not None for gradient in gradients) for gradients in zip(*seen)]

"""MAML and its relatives: each is a bilevel problem over episodes and a method for its gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Loss, Tensor
from farhox.dynamics.base import GradientDescent, InnerDynamics
from farhox.dynamics.keras_optimizers import KerasDynamics
from farhox.hypergradients import EpisodesHG, HyperGradient, ImplicitHG, InitialHG, ReptileHG, ReverseHG
from farhox.linear_solvers import ConjugateGradient
from farhox.linear_solvers.base import LinearSolver
from farhox.meta.episode_checks import check_model
from farhox.meta.learner import Learner
from farhox.meta.problem import LOSS, episode_problem
from farhox.meta.statistics import query_call
from farhox.meta.weights import scaled
from farhox.outer.hyperparameters import Hyperparameter
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.representation import can_share_representation, representation_variables


class MAML(Learner):
    """Learns initial weights from which a few gradient steps lead to a good model of a new task.

    ```python
    learner = farhox.meta.MAML(model, inner_learning_rate=0.1, inner_steps=5)
    learner.compile(keras.optimizers.Adam(1e-3), metrics=["accuracy"])
    learner.fit(episodes.dataset(meta_batch_size=4), epochs=10, steps_per_epoch=100)
    learner.evaluate(test_episodes)
    model = learner.adapt((support_images, support_labels))
    ```

    Args:
        model: A built `keras.Model` with one output per class of an episode (or per regression target).
        inner_learning_rate: Positive float; or a `Hyperparameter`, which is learned too. Of gradient descent: not used
            if `dynamics` are given.
        inner_steps: Positive int.
        first_order: Bool. FOMAML: second derivatives are left out.
        learn_learning_rates: Bool. Meta-SGD: one learning rate per weight, learned with the initial weights.
            "positive": rates that stay so.
        loss: The loss of the queries, as for `supervised_problem`.
        transductive: Bool. Batch-norm layers normalise the queries of an episode together, as in most published
            results; or, if false, by the statistics of the support set.
        evaluation_steps: Positive int, inner steps outside training. Default: `inner_steps`.
        step_weights: Tuple of non-negative numbers that sum to one, one per inner step, or a callable from the
            number of meta-steps done to a tensor of them. Multi-step loss: the query loss after each inner step counts
            with its weight, instead of that after the last one alone.
        allow_unused: Bool. Weights that the model's outputs do not depend on stay as they are; else they are an error.
        name: Name of the Keras model.
        dynamics: An `InnerDynamics`, the inner optimizer: Adam, momentum, a learned preconditioner, gradient descent
            with rates of layers or steps. Default: gradient descent.
        support_loss: The loss of the support set, which may be learned. Default: `loss`.
        outer_variables: List of further outer variables, which the dynamics, losses or the condition read.
        condition: Callable that sets weights of the model for a task, see `episode_problem`.
        representation: List of layers and single variables of the model that are learned and do not adapt.

    Raises:
        TypeError: If `inner_learning_rate` is neither a float nor a `Hyperparameter`.
        ValueError: If a number is out of range, `learn_learning_rates` comes with a `Hyperparameter`, or settings of
            gradient descent come with `dynamics`.

    Reference:
        [Finn et al., 2017](https://arxiv.org/abs/1703.03400), Algorithm 1;
        [Li et al., 2017](https://arxiv.org/abs/1707.09835) for learned rates per weight;
        [Antoniou et al., 2019](https://arxiv.org/abs/1810.09502) for the multi-step loss.
    """

    def __init__(self, model: keras.Model, inner_learning_rate: float | OuterVariable = 0.1, inner_steps: int = 5,
                 first_order: bool = False, learn_learning_rates: bool | str = False, loss: Loss = LOSS,
                 transductive: bool = True, evaluation_steps: int | None = None,
                 step_weights: Sequence[float] | Callable[[Tensor], Any] | None = None, allow_unused: bool = False,
                 name: str = "maml",
                 dynamics: InnerDynamics | None = None, support_loss: Loss | None = None,
                 outer_variables: Sequence[keras.Variable | OuterVariable] = (), condition: Any = None,
                 representation: Sequence[Any] = ()) -> None:
        problem = _initialization_problem(
            model, representation, inner_learning_rate, learn_learning_rates, first_order, dynamics, outer_variables,
            loss=loss, support_loss=support_loss, condition=condition, transductive=transductive,
            allow_unused=allow_unused)
        weights = step_weights if not callable(step_weights) else (
            lambda: step_weights(tf.convert_to_tensor(self.optimizer.iterations)))
        super().__init__(model, problem, EpisodesHG(ReverseHG(step_weights=weights)), inner_steps, evaluation_steps,
                         transductive=transductive, loss=loss, name=name, support_loss=support_loss)


class ANIL(Learner):
    """MAML in which the head alone adapts; the body is learned like any network.

    Args:
        model: As for `MAML`.
        head: List of layers and single variables of the model that adapt. Default: its last layer with weights.
        inner_learning_rate, inner_steps, first_order, learn_learning_rates, loss, transductive: As for `MAML`.
        evaluation_steps, allow_unused, name, dynamics, support_loss, outer_variables, condition: As for `MAML`.

    Raises:
        TypeError, ValueError: As `MAML`; or if `head` holds what is not the model's, or all of its weights.

    Reference:
        [Raghu et al., 2020](https://arxiv.org/abs/1909.09157).
    """

    def __init__(self, model: keras.Model, head: Any = None, inner_learning_rate: float | OuterVariable = 0.1,
                 inner_steps: int = 5, first_order: bool = False, learn_learning_rates: bool | str = False,
                 loss: Loss = LOSS, transductive: bool = True, evaluation_steps: int | None = None,
                 allow_unused: bool = False, name: str = "anil", dynamics: InnerDynamics | None = None,
                 support_loss: Loss | None = None, outer_variables: Sequence[keras.Variable | OuterVariable] = (),
                 condition: Any = None) -> None:
        problem = _initialization_problem(
            model, _body(model, head), inner_learning_rate, learn_learning_rates, first_order, dynamics,
            outer_variables, loss=loss, support_loss=support_loss, condition=condition, transductive=transductive,
            allow_unused=allow_unused)
        super().__init__(model, problem, EpisodesHG(ReverseHG()), inner_steps, evaluation_steps,
                         transductive=transductive, loss=loss, name=name, support_loss=support_loss)


class HyperRepresentation(Learner):
    """Learns a representation on which a head that starts at zero is trained anew for every task.

    The body's weights and, if it is a `Hyperparameter`, the inner learning rate are outer variables; the head is inner.
    The head's weights are set to zero.

    Args:
        body: A built `keras.Model`, inputs to representation.
        head: A `keras.Layer` on the representation, for example `Dense(ways, activation="softmax")`.
        inner_learning_rate: Positive float or `Hyperparameter`. Default: a `Hyperparameter` that starts at 0.1.
        inner_steps: Positive int.
        hypergradient: Method for one episode; `ImplicitHG` needs an inner objective with a unique minimum, say by a
            regulariser of the head, and a fixed rate. Default: `ReverseHG()`.
        loss, transductive, evaluation_steps, allow_unused, name, dynamics, support_loss, outer_variables, condition: As
            for `MAML`.

    Attributes:
        body, head: As given.

    Raises:
        TypeError: If `body` is not a model, `head` not a layer, or `hypergradient` not a method.
        ValueError: If a number is out of range or the body not built.

    Reference:
        [Franceschi et al., 2018](https://arxiv.org/abs/1806.04910), section 5.
    """

    def __init__(self, body: keras.Model, head: Any, inner_learning_rate: float | OuterVariable | None = None,
                 inner_steps: int = 5, hypergradient: HyperGradient | None = None, loss: Loss = LOSS,
                 transductive: bool = True, evaluation_steps: int | None = None, allow_unused: bool = False,
                 name: str = "hyper_representation", dynamics: InnerDynamics | None = None,
                 support_loss: Loss | None = None, outer_variables: Sequence[keras.Variable | OuterVariable] = (),
                 condition: Any = None) -> None:
        if not isinstance(body, keras.Model) or not isinstance(head, keras.Layer):
            raise TypeError("body must be a keras.Model and head a keras.Layer. "
                            f"Received: {type(body).__name__} and {type(head).__name__}")
        if not body.built:
            raise ValueError("body must be built, so that the size of the representation is known: give it an Input. "
                             f"Received the unbuilt model {body.name!r}")
        hypergradient = ReverseHG() if hypergradient is None else hypergradient
        if not isinstance(hypergradient, HyperGradient):
            raise TypeError("hypergradient must be a method for one episode, for example farhox.ReverseHG(). "
                            f"Received: {hypergradient!r}")
        if inner_learning_rate is None and dynamics is None:
            inner_learning_rate = Hyperparameter(0.1, low=0.0, log=True, name="inner_learning_rate")
        model = keras.Sequential([keras.Input(body.input_shape[1:], dtype=body.inputs[0].dtype), body, head])
        for variable in head.trainable_variables:
            variable.assign(keras.ops.zeros_like(variable))
        if dynamics is None:
            dynamics = GradientDescent(_checked_rate(inner_learning_rate))
            outer_variables = [*_learned([inner_learning_rate]), *outer_variables]
        problem = episode_problem(
            model, loss, dynamics, outer_variables, representation=[body], support_loss=support_loss,
            condition=condition, transductive=transductive, allow_unused=allow_unused,
            share_representation=condition is None and can_share_representation([body]))
        super().__init__(model, problem, EpisodesHG(hypergradient), inner_steps, evaluation_steps,
                         transductive=transductive, loss=loss, name=name, support_loss=support_loss)
        self.body, self.head = body, head

    def embed(self, inputs: Tensor) -> Tensor:
        """The representation of inputs: a tensor [inputs, features].

        Batch-norm layers of the body normalise by the statistics of these inputs, whose moving averages farhox does not
        learn.
        """
        return query_call(self.body, transductive=True)((None, tf.convert_to_tensor(inputs)))


class IMAML(Learner):
    """MAML by the implicit function theorem: the inner training stays near the initial weights by a proximal term.

    The meta-gradient at the adapted weights φ is (I + H/λ)^-1 ∇E(φ) with λ the proximal strength and H the Hessian of
    the support loss, so that the inner optimizer is free and memory does not grow with the inner steps. It assumes that
    the inner training has converged.

    Args:
        model: As for `MAML`.
        inner_learning_rate: Positive float, of gradient descent; not used if `dynamics` are given.
        inner_steps: Positive int.
        proximal: Positive float λ: λ/2 ||φ - θ||^2 is added to the support loss. A `Hyperparameter` is learned too.
        linear_solver: A `LinearSolver`. Default: five steps of conjugate gradient.
        damping: Non-negative float d: the system becomes I + (H + d I)/λ. Without it the system need not be positive
            definite where the inner steps end far from a minimum. The released code's settings amount to d = 22 at
            λ = 2.
        dynamics: An `InnerDynamics`. Default: gradient descent.
        loss, transductive, evaluation_steps, allow_unused, name, support_loss, outer_variables: As for `MAML`.
        batch_size: Positive int, support examples in an inner batch. Default: all.
        curvature: Callable `(support, query) -> (x, y)` or `(x, y, sample weights)`, the examples of H: a part of an
            episode or some of both, all with an axis of episodes in front. Default: the support set.
        seed: Int, of the order of inner batches.

    Raises:
        TypeError: If `dynamics` or `linear_solver` has the wrong type.
        ValueError: If a number is out of range.

    Reference:
        [Rajeswaran et al., 2019](https://arxiv.org/abs/1909.04630), Algorithms 1 and 2. The released code computes
        something else, see the page on meta-learning.
    """

    def __init__(self, model: keras.Model, inner_learning_rate: float | OuterVariable = 0.1, inner_steps: int = 16,
                 proximal: float | OuterVariable = 2.0, linear_solver: LinearSolver | None = None, damping: float = 0.0,
                 dynamics: InnerDynamics | None = None, loss: Loss = LOSS, transductive: bool = True,
                 evaluation_steps: int | None = None, allow_unused: bool = False, name: str = "imaml",
                 support_loss: Loss | None = None, outer_variables: Sequence[keras.Variable | OuterVariable] = (),
                 batch_size: int | None = None, curvature: Callable[..., Any] | None = None,
                 seed: int = 0) -> None:
        if checks.is_number(proximal) and proximal <= 0:
            raise ValueError(f"proximal must be positive. Received: {proximal}")
        if curvature is not None and not callable(curvature):
            raise TypeError(f"curvature must be a callable (support, query) -> examples. Received: {curvature!r}")
        dynamics = GradientDescent(inner_learning_rate) if dynamics is None else dynamics
        solver = ConjugateGradient(max_steps=5) if linear_solver is None else linear_solver
        problem = episode_problem(
            model, loss, dynamics, [*_learned([proximal]), *outer_variables], learn_initialization=True,
            support_loss=support_loss, transductive=transductive, proximal=proximal, allow_unused=allow_unused)
        # The whole support set is the last inner batch, if there are no smaller ones.
        apart = curvature is not None or batch_size is not None
        hypergradient = ImplicitHG(solver, damping, system_batch=_curvature_part if apart else None)
        super().__init__(model, problem, EpisodesHG(hypergradient), inner_steps, evaluation_steps, batch_size,
                         transductive=transductive, seed=seed, loss=loss, name=name, support_loss=support_loss)
        self._curvature: Any = (curvature or _support) if apart else None

    def _outer_batch(self, support, query):
        (*inputs,), *others = super()._outer_batch(support, query)
        if self._curvature is None:
            return (tuple(inputs), *others)
        return ((*inputs, self._checked_curvature(support, query)), *others)

    def _checked_curvature(self, support, query):
        """The examples of H as an inner batch, with an axis of episodes."""
        part = self._curvature(support, query)
        if not isinstance(part, (tuple, list)) or len(part) != len(support):
            raise ValueError(f"curvature must return a tuple of {len(support)}, as support and query are here. "
                             f"Received: {part!r}")
        return part[:2] if len(part) == 2 else (*part[:2], scaled(part[2], self.support_loss))


class Reptile(Learner):
    """Moves the initial weights towards the weights that the inner training of each task ends at.

    Compile it with gradient descent, whose rate is Reptile's outer step size:

    ```python
    learner = farhox.meta.Reptile(model, inner_steps=5, batch_size=10, evaluation_steps=50)
    decay = keras.optimizers.schedules.PolynomialDecay(1.0, meta_steps, 0.0)
    learner.compile(keras.optimizers.SGD(decay), metrics=["accuracy"])
    ```

    A meta-batch of one episode is serial Reptile, a larger one batched Reptile. Slots of the inner optimizer go on from
    task to task and into the evaluation, as in the code of the paper.

    Args:
        model: As for `MAML`.
        dynamics: An `InnerDynamics`. Default: Adam with rate 0.001 and without momentum (beta_1 = 0).
        inner_steps: Positive int, inner steps in training.
        batch_size: Positive int, support examples in an inner batch. Default: all.
        step_weights: As for `ReptileHG`.
        loss, transductive, evaluation_steps, allow_unused, name, support_loss: As for `MAML`.
        seed: Int, of the order of inner batches.

    Raises:
        ValueError: If a number is out of range.

    Reference:
        [Nichol et al., 2018](https://arxiv.org/abs/1803.02999), Algorithms 1 and 2.
    """

    def __init__(self, model: keras.Model, dynamics: InnerDynamics | None = None, inner_steps: int = 5,
                 batch_size: int | None = None, step_weights: Sequence[float] | None = None, loss: Loss = LOSS,
                 transductive: bool = True, evaluation_steps: int | None = None, seed: int = 0,
                 allow_unused: bool = False, name: str = "reptile", support_loss: Loss | None = None) -> None:
        if dynamics is None:
            dynamics = KerasDynamics(keras.optimizers.Adam(1e-3, beta_1=0.0))
        problem = episode_problem(
            model, loss, dynamics, learn_initialization=True, support_loss=support_loss, transductive=transductive,
            allow_unused=allow_unused)
        super().__init__(model, problem, ReptileHG(step_weights), inner_steps, evaluation_steps, batch_size,
                         transductive=transductive, seed=seed, loss=loss, name=name, support_loss=support_loss)

    def _initial_state(self):
        slots, step = self._kept.carry_now()
        return super()._initial_state()._replace(slots=slots, step=step)


class JointTraining(Learner):
    """The baseline: one model trained on the examples of all tasks, adapted by gradient steps only when judged.

    Args:
        model: As for `MAML`.
        inner_learning_rate: Positive float, in evaluation.
        evaluation_steps: Positive int, gradient steps in evaluation.
        loss, transductive, allow_unused, name, dynamics, support_loss: As for `MAML`.
        outer_variables: List of further outer variables that the query loss reads.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, model: keras.Model, inner_learning_rate: float | OuterVariable = 0.1,
                 evaluation_steps: int | None = 5, loss: Loss = LOSS, transductive: bool = True,
                 allow_unused: bool = False, name: str = "joint_training", dynamics: InnerDynamics | None = None,
                 support_loss: Loss | None = None,
                 outer_variables: Sequence[keras.Variable | OuterVariable] = ()) -> None:
        problem = episode_problem(
            model, loss, GradientDescent(inner_learning_rate) if dynamics is None else dynamics, outer_variables,
            learn_initialization=True, support_loss=support_loss, transductive=transductive, allow_unused=allow_unused)
        super().__init__(model, problem, EpisodesHG(InitialHG()), 1, evaluation_steps,
                         transductive=transductive, loss=loss, name=name, support_loss=support_loss)


def _initialization_problem(model, body, rate, learn_rates, first_order, dynamics, outer_variables, **settings):
    """The problem of `MAML` and `ANIL`: inner variables are learned as initial values, the body's are outer alone."""
    learned = []
    if dynamics is None:
        dynamics, learned = _gradient_descent(model, body, rate, learn_rates, first_order)
    elif learn_rates or first_order:
        raise ValueError("learn_learning_rates and first_order are settings of gradient descent: with dynamics, give "
                         "them learned rates and first_order=True themselves. Received both")
    return episode_problem(model, dynamics=dynamics, outer_variables=[*learned, *outer_variables], representation=body,
                           learn_initialization=True, **settings)


def _gradient_descent(model, body, rate, learn_rates, first_order):
    """Gradient descent, and the list of its rates that are learned."""
    rate = _checked_rate(rate)
    if learn_rates not in (False, True, "positive"):
        raise ValueError(f'learn_learning_rates must be False, True or "positive". Received: {learn_rates!r}')
    if learn_rates:
        if isinstance(rate, OuterVariable):
            raise ValueError("learn_learning_rates=True makes a learned rate for each weight and needs their common "
                             f"initial value, a float. Received: inner_learning_rate={rate!r}")
        check_model("model", model)
        frozen = {id(variable) for variable in representation_variables(model, body)}
        low = 0.0 if learn_rates == "positive" else None
        rate = [Hyperparameter(np.full(variable.shape, rate, variable.dtype), low=low,
                               name="learning_rate_" + variable.path.replace("/", "_"))
                for variable in model.trainable_variables if id(variable) not in frozen]
    rates = rate if isinstance(rate, list) else [rate]
    return GradientDescent(rate, first_order=first_order), _learned(rates)


def _learned(settings):
    return [setting for setting in settings if isinstance(setting, OuterVariable)]


def _checked_rate(rate):
    if not isinstance(rate, (float, int, OuterVariable)) or isinstance(rate, bool):
        raise TypeError(f"inner_learning_rate must be a float or a farhox.Hyperparameter. Received: {rate!r}")
    return rate


def _body(model, head):
    """The trainable variables that are not in the head."""
    check_model("model", model)
    if head is None:
        head = [layer for layer in model.layers if layer.trainable_variables][-1:]
    adapting = representation_variables(model, head, "head")
    return [variable for variable in model.trainable_variables if not any(variable is own for own in adapting)]


def _support(support, query):
    del query
    return support


def _curvature_part(outer_batch):
    """Where an outer batch of `IMAML` has the examples of the curvature."""
    return outer_batch[0][-1]

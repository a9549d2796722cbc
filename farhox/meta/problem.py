"""The bilevel problem of an episode: a loss on the support set inside, a loss on the queries outside."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras

from farhox._core.types import Loss
from farhox.dynamics.base import InnerDynamics
from farhox.meta.episode_checks import check_model
from farhox.meta.statistics import query_call, statistics_of_weighted
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.bilevel import BilevelProblem
from farhox.problem.supervised import supervised_problem

LOSS = "sparse_categorical_crossentropy"


def episode_problem(model: keras.Model, loss: Loss = LOSS, dynamics: InnerDynamics | None = None,
                    outer_variables: Sequence[keras.Variable | OuterVariable] = (), representation: Sequence[Any] = (),
                    learn_initialization: bool = False, support_loss: Loss | None = None, condition: Any = None,
                    transductive: bool = True, proximal: float | OuterVariable | None = None,
                    allow_unused: bool = False, share_representation: bool = False) -> BilevelProblem:
    """The `BilevelProblem` of an episode, from which a learner is made.

    Inner batches are examples of the support set, the outer batch is the query set. All learners of `farhox.meta` are
    made of it; so is one of your own:

    ```python
    problem = farhox.meta.episode_problem(
        model, dynamics=farhox.GradientDescent(0.1), representation=model.layers[:-1], learn_initialization=True)
    learner = farhox.meta.Learner(model, problem, farhox.hypergradients.EpisodesHG(farhox.ReverseHG()), inner_steps=5)
    ```

    Args:
        model: A built `keras.Model`.
        loss: The loss of the queries, as for `supervised_problem`.
        dynamics: An `InnerDynamics`. Default: gradient descent with rate 0.01.
        outer_variables: List of further outer variables: hyperparameters, or weights of other models that the losses,
            the condition or the dynamics read.
        representation: List of layers and single variables of the model that are outer, and do not adapt.
        learn_initialization: Bool. The initial values of what adapts are outer variables too. Else it starts at the
            model's weights, which stay as they are.
        support_loss: The loss of the support set, as `loss`; a callable `(targets, predictions) -> [examples]` may be a
            network that is learned. Default: `loss`.
        condition: Callable `(support x, support y, sample weights or None)` that assigns non-trainable weights of the
            model what they are to be for this task, in each inner step before the model is called: a modulation of
            features, an embedding of the task. The inner steps must have the whole support set. Default: none.
        transductive: Bool, see `MAML`.
        proximal: Float or `Hyperparameter`, see `BilevelProblem`.
        allow_unused: Bool, see `BilevelProblem`.
        share_representation: Bool, see `supervised_problem`; not with a condition, which acts in every step.

    Returns:
        A `BilevelProblem` with the batches that a `Learner` makes.

    Raises:
        TypeError: If the model is not a Keras model, a loss not one, or `condition` not callable.
        ValueError: As `supervised_problem`.
    """
    check_model("model", model)
    if condition is not None and not callable(condition):
        raise TypeError("condition must be a callable (support x, support y, sample weights or None) that assigns "
                        f"weights of the model. Received: {condition!r}")
    statistics = statistics_of_weighted(model)

    @contextlib.contextmanager
    def inner_context(x, y, weights):
        if condition is not None:
            condition(x, y, weights)
        with statistics(weights):
            yield

    return supervised_problem(
        model, loss if support_loss is None else support_loss, dynamics=dynamics, outer_variables=list(outer_variables),
        representation=list(representation), learn_initialization=learn_initialization, proximal=proximal,
        outer_call=query_call(model, transductive), inner_context=inner_context,
        outer_loss=None if support_loss is None else loss, allow_unused=allow_unused,
        share_representation=share_representation)

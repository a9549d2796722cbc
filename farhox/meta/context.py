"""CAVIA: what adapts to a task is a context, a few numbers beside the inputs; the network itself stays."""

from collections.abc import Sequence
from typing import Any

import keras

from farhox._core import checks
from farhox._core.types import Loss, Tensor
from farhox.dynamics.base import GradientDescent, InnerDynamics
from farhox.hypergradients import EpisodesHG, ReverseHG
from farhox.meta.episode_checks import check_model
from farhox.meta.learner import Learner
from farhox.meta.problem import LOSS, episode_problem
from farhox.outer.outer_variable import OuterVariable
from farhox.problem.representation import representation_variables


@keras.saving.register_keras_serializable(package="farhox")
class TaskContext(keras.layers.Layer):
    """Appends a vector that belongs to the task, and starts at zero, to the last axis of its inputs.

    Args:
        size: Positive int, numbers in the vector.
        **kwargs: Of `keras.layers.Layer`.

    Raises:
        ValueError: If `size` is not a positive integer.
    """

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = checks.positive_integer("size", size)

    def build(self, input_shape: Any) -> None:
        self.context = self.add_weight(shape=(self.size,), initializer="zeros", name="context")

    def call(self, inputs: Tensor) -> Tensor:
        shape = (*keras.ops.shape(inputs)[:-1], self.size)
        return keras.ops.concatenate([inputs, keras.ops.broadcast_to(self.context, shape)], axis=-1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return *input_shape[:-1], input_shape[-1] + self.size

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size}


class CAVIA(Learner):
    """Learns a network that a new task is explained to by a context alone, which a few gradient steps find.

    The context starts at its stored value, zero of a `TaskContext`, and is not learned; everything else is outer and
    does not adapt. An adapted model differs from another in the context only.

    ```python
    network = keras.Sequential([
        keras.Input([1]), farhox.meta.TaskContext(4), keras.layers.Dense(40, "relu"), keras.layers.Dense(1)])
    learner = farhox.meta.CAVIA(network, inner_learning_rate=1.0, inner_steps=1, loss="mean_squared_error")
    ```

    Args:
        model: A built `keras.Model`.
        context: List of layers and single variables of the model that adapt. Default: its `TaskContext` layers.
        inner_learning_rate: A setting of gradient descent.
        inner_steps, loss, transductive, evaluation_steps, allow_unused, name: As for `MAML`.
        dynamics, support_loss, outer_variables, condition: As for `MAML`.

    Raises:
        TypeError, ValueError: As `MAML`; or if the model has no context.

    Reference:
        [Zintgraf et al., 2019](https://arxiv.org/abs/1810.03642), Algorithm 1.
    """

    def __init__(self, model: keras.Model, context: Sequence[Any] | None = None, inner_learning_rate: Any = 0.1,
                 inner_steps: int = 2, loss: Loss = LOSS, transductive: bool = True,
                 evaluation_steps: int | None = None, allow_unused: bool = False, name: str = "cavia",
                 dynamics: InnerDynamics | None = None, support_loss: Loss | None = None,
                 outer_variables: Sequence[keras.Variable | OuterVariable] = (), condition: Any = None) -> None:
        check_model("model", model)
        if context is None:
            context = [layer for layer in model._flatten_layers() if isinstance(layer, TaskContext)]
        adapting = representation_variables(model, context, "context")
        if not adapting:
            raise ValueError("CAVIA needs a context: a farhox.meta.TaskContext layer in the model, or context=[...]. "
                             f"Received: {model.name!r} without one")
        rest = [variable for variable in model.trainable_variables if not any(variable is own for own in adapting)]
        problem = episode_problem(
            model, loss, GradientDescent(inner_learning_rate) if dynamics is None else dynamics, outer_variables,
            representation=rest, support_loss=support_loss, condition=condition, transductive=transductive,
            allow_unused=allow_unused)
        super().__init__(model, problem, EpisodesHG(ReverseHG()), inner_steps, evaluation_steps,
                         transductive=transductive, loss=loss, name=name, support_loss=support_loss)

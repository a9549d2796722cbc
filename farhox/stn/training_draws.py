"""Self-tuned hyperparameters in a `BilevelProblem`, beside others that hypergradients tune."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Tensor
from farhox.outer.outer_variable import OuterVariable
from farhox.stn.draws import Draws
from farhox.stn.gates import as_hyperparameters
from farhox.stn.network import Network


class TrainingDraws:
    """The training objective of a self-tuning network: every example has its own draw of the hyperparameters.

    A problem whose inner objective uses it, and whose outer objective evaluates the same network, has as hypergradient
    of a hyperparameter the derivative through the gates, that of a `SelfTuningModel`. Other hyperparameters of the
    problem, rates and strengths of weights, have theirs as ever.

    ```python
    network = stn.convert(model, strengths=stn.strengths_of(model))
    draws = stn.TrainingDraws(network)

    def inner_objective(batch):
        x, y = batch
        return draws.objective(x, lambda predictions: loss(y, predictions))

    problem = farhox.BilevelProblem(
        inner_objective, lambda batch: loss(batch[1], network(batch[0], training=False)),
        network.trainable_variables, [*draws.hyperparameters, decay],
        state_variables=[*network.non_trainable_variables, *draws.state_variables], dynamics=...,
        stop_gradient="tensorflow")  # Draws are constants: hyperparameters act through the gates alone.
    ```

    Args:
        model: A built `keras.Model` with self-tuning layers, `stn.convert(...)` for example.
        initial_scale: Positive float, standard deviation of the draws in unconstrained space.
        one_draw: List of hyperparameters with one draw for the whole batch. Those of regularizers and DropConnect are
            found.

    Attributes:
        hyperparameters: Tuple of those that the self-tuning layers respond to.
        state_variables: List of the variables that are to be among those of the problem: the state of the draws.

    Raises:
        TypeError: If the model is no built Keras model.
        ValueError: If the model has no self-tuning layer or the scale is not positive.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088), Algorithm 1.
    """

    def __init__(self, model: keras.Model, initial_scale: float = 0.5, one_draw: Sequence[OuterVariable] = ()) -> None:
        if not isinstance(model, keras.Model) or not model.built:
            raise TypeError(f"TrainingDraws needs a built keras.Model. Received: {model!r}")
        self._network = Network(model)
        found = [entry for layer in self._network.gated for entry in layer.hyperparameters]
        if not found:
            raise ValueError("TrainingDraws needs a model with self-tuning layers, which stn.convert makes. "
                             f"Received: {model.name!r} without any")
        self.hyperparameters = tuple({id(entry): entry for entry in found}.values())
        one_draw = as_hyperparameters(one_draw, "one_draw") if one_draw else ()
        self._draws = Draws(self.hyperparameters, checks.positive_number("initial_scale", initial_scale),
                            [*one_draw, *self._network.hyperparameters_with_one_draw()])
        self.state_variables = [self._draws.seed_generator.state]

    def objective(self, x: Tensor, function: Callable[..., Any]) -> Any:
        """The training objective on new draws, which has no derivative with respect to the hyperparameters.

        Args:
            x: Inputs of the model, a nest of tensors [batch, ...].
            function: Callable from predictions to the objective. It may read the hyperparameters, one value per
                example, and `model.losses`.
        """
        draws = self._draws
        noise = draws.noise(tf.shape(tf.nest.flatten(x)[0])[0])
        drawn = tf.stop_gradient(draws.centre() + draws.scales() * noise)

        def gates(gate_input):
            return gate_input.relative(tf.gather(drawn, draws.columns_of(gate_input.hyperparameters), axis=-1))

        result = self._network.run(function, x, True, (), draws.values_of(drawn), gates)
        for variable, value in result.updates:
            variable.assign(value)
        return result.value

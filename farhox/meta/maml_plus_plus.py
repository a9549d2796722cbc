"""MAML++: MAML with a rate for each weight and step, a loss after each step, batch norm of each step."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from farhox._core import checks
from farhox._core.types import Loss
from farhox.dynamics.base import GradientDescent
from farhox.meta.episode_checks import check_model
from farhox.meta.learners import MAML
from farhox.meta.problem import LOSS
from farhox.meta.statistics import StepBatchNormalization
from farhox.outer.hyperparameters import LearnedSchedule
from farhox.outer.outer_variable import OuterVariable


class MAMLPlusPlus(MAML):
    """MAML that is easier to train: a learned rate for each weight array and inner step, and a loss after each step.

    Early losses count less and less, and after `annealing_steps` meta-steps that of the last step alone. Scales and
    shifts of `farhox.meta.StepBatchNormalization` layers, which have some for each step, are learned and do not adapt.
    Let the rate of the outer optimizer fall along a cosine, as in the paper: `keras.optimizers.schedules.CosineDecay`.
    The paper's annealing from first to second order saves time only, and is not here.

    Args:
        model: As for `MAML`.
        inner_learning_rate: Positive float, where all rates start. They stay positive.
        inner_steps: Positive int.
        annealing_steps: Positive int, meta-steps in which the losses of early steps fade.
        loss, transductive, evaluation_steps, allow_unused, name, support_loss, outer_variables, condition: As for
            `MAML`.

    Attributes:
        rates: List of a `LearnedSchedule` for each weight array that adapts.

    Raises:
        TypeError, ValueError: As `MAML`.

    Reference:
        [Antoniou et al., 2019](https://arxiv.org/abs/1810.09502), section 4.
    """

    def __init__(self, model: keras.Model, inner_learning_rate: float = 0.1, inner_steps: int = 5,
                 annealing_steps: int = 1000, loss: Loss = LOSS, transductive: bool = True,
                 evaluation_steps: int | None = None, allow_unused: bool = False, name: str = "maml_plus_plus",
                 support_loss: Loss | None = None,
                 outer_variables: Sequence[keras.Variable | OuterVariable] = (), condition: Any = None) -> None:
        check_model("model", model)
        checks.positive_integer("inner_steps", inner_steps)
        checks.positive_integer("annealing_steps", annealing_steps)
        layers = [layer for layer in model._flatten_layers() if isinstance(layer, StepBatchNormalization)]
        of_steps = {id(variable) for layer in layers for variable in layer.trainable_variables}
        adapting = [variable for variable in model.trainable_variables if id(variable) not in of_steps]
        rates = [LearnedSchedule(inner_steps, inner_learning_rate, dtype=variable.dtype,
                                 name="rates_" + variable.path.replace("/", "_")) for variable in adapting]

        def step_weights(meta_step):
            left = tf.maximum(1.0 - tf.cast(meta_step, tf.float32) / annealing_steps, 0.0)
            early = tf.fill([inner_steps - 1], left / inner_steps)
            return tf.concat([early, [1.0 - tf.reduce_sum(early)]], axis=0)

        super().__init__(
            model, inner_steps=inner_steps, loss=loss, transductive=transductive, evaluation_steps=evaluation_steps,
            step_weights=step_weights, allow_unused=allow_unused, name=name, dynamics=GradientDescent(rates),
            support_loss=support_loss, outer_variables=[*rates, *outer_variables], condition=condition,
            representation=layers)
        self.rates = rates

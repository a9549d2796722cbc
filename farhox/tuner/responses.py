"""Dropout, noise and augmentation in a tuned training: what there is, and a model with layers that respond to it."""

import re
from typing import Any

import keras

from farhox import stn
from farhox.outer import OuterVariable
from farhox.stn.held import layers_of
from farhox.stn.perturbations import PerturbationLayer
from farhox.tuner import tunables
from farhox.tuner.tunables import Place


class Responses:
    """The strengths of a model's layers that perturb, and the self-tuning copy that learns the response to them.

    No derivative goes through a strength in training: each example has a draw of its own around the current value, and
    the weights learn how they answer. On validation data the strengths follow the derivative through that answer.

    Args:
        model: The compiled model.
        choice: A `Choice`.

    Attributes:
        found: List of `Tunable`.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088).
    """

    def __init__(self, model: keras.Model, choice: Any) -> None:
        self._layers, self._strengths, self.found = layers_of(model), {}, []
        rows = {}
        for layer, arguments in stn.strengths_of(model, shared=choice.granularity == "global").items():
            for argument, hyperparameter in arguments.items():
                rows.setdefault(id(hyperparameter), (hyperparameter, argument, []))[2].append(layer)
                self._strengths.setdefault(layer, {})[argument] = hyperparameter
        for hyperparameter, argument, layers in rows.values():
            kind_name = f"{_snake(type(layers[0]).__name__)}_{argument}"
            hyperparameter.name = kind_name if choice.granularity == "global" else f"{layers[0].name}.{argument}"
            self.found.append(choice.strength(hyperparameter, kind_name, [Place(layer.name, None) for layer in layers]))
        own = {}
        for layer in layers_of(model):
            if isinstance(layer, PerturbationLayer):
                for value in vars(layer).values():
                    if isinstance(value, OuterVariable):
                        own.setdefault(id(value), (value, []))[1].append(Place(layer.name, None))
        self.found += [choice.own(value, tunables.RESPONSE, places) for value, places in own.values()]

    def tuned(self) -> list[OuterVariable]:
        """The hyperparameters that are tuned."""
        return [row.hyperparameter for row in self.found if row.tuned]

    def converted(self, model: keras.Model) -> Any:
        """A self-tuning model made of a copy of the original, and the draws of strengths that it is trained on.

        Raises:
            ValueError: If no layer of the model can respond.
        """
        tuned = {id(entry) for entry in self.tuned()}
        strengths = {}
        for layer, copy in zip(self._layers, layers_of(model)):
            given = {name: entry for name, entry in self._strengths.get(layer, {}).items() if id(entry) in tuned}
            if given:
                strengths[copy] = given
        names = [entry.name for entry in self.tuned()]
        converted = stn.convert(model, self.tuned(), strengths=strengths)
        if not any(isinstance(layer, stn.SelfTuning) for layer in converted._flatten_layers()):
            raise ValueError("Dropout, noise and augmentation are tuned by layers that respond to them, such as Dense "
                             f"and Conv2D. Received: {model.name!r} without any: fix={names}")
        return converted, stn.TrainingDraws(converted)


def _snake(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()

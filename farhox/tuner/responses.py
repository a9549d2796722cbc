"""Dropout, noise and augmentation in a tuned training: what there is, and a model with layers that read it."""

import re
from typing import Any

import keras

from farhox import stn
from farhox.outer import OuterVariable
from farhox.stn.held import layers_of
from farhox.stn.keras_strengths import has_derivative
from farhox.stn.perturbations import PerturbationLayer
from farhox.tuner.tunables import PATH, RESPONSE, Place


class Responses:
    """The strengths of a model's layers that perturb, and the copy of the model that reads them.

    Strengths of dropout, noise and most augmentation have a derivative along the path of training. To the others, of
    what is erased, counted or moved to the nearest pixel and of rates inside recurrent layers and attention, the
    weights learn how they answer: each example has a draw of its own around the current value, and on validation data
    the strengths follow the derivative through that answer.

    Args:
        model: The compiled model.
        choice: A `Choice`.

    Attributes:
        found: List of `Tunable`.

    Reference:
        [MacKay et al., 2019](https://arxiv.org/abs/1903.03088) (the response of layers);
        [Liu et al., 2023](https://arxiv.org/abs/2304.08612) (derivatives of masks).
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
            route = PATH if all(map(has_derivative, layers)) else RESPONSE
            self.found.append(choice.strength(
                hyperparameter, kind_name, route, [Place(layer.name, None) for layer in layers]))
        own = {}
        for layer in layers_of(model):
            if isinstance(layer, PerturbationLayer):
                for value in vars(layer).values():
                    if isinstance(value, OuterVariable):
                        own.setdefault(id(value), (value, []))[1].append(layer)
        for value, layers in own.values():
            along_path = not value.discrete and all(layer.differentiable for layer in layers)
            route = PATH if along_path else RESPONSE
            self.found.append(choice.own(value, route, [Place(layer.name, None) for layer in layers], True))

    def tuned(self) -> list[OuterVariable]:
        """The hyperparameters that are tuned."""
        return [row.hyperparameter for row in self.found if row.tuned]

    def converted(self, model: keras.Model) -> Any:
        """A copy of a copy of the original that reads what is tuned, and the draws that it is trained on.

        Where a strength has no derivative along the path the copy is self-tuning; otherwise there are no draws: None.

        Raises:
            ValueError: If a strength needs layers that respond, and no layer of the model can.
        """
        tuned = {id(entry) for entry in self.tuned()}
        strengths = {}
        for layer, copy in zip(self._layers, layers_of(model)):
            given = {name: entry for name, entry in self._strengths.get(layer, {}).items() if id(entry) in tuned}
            if given:
                strengths[copy] = given
        responding = [row.hyperparameter for row in self.found if row.route == RESPONSE]
        if not responding:
            return stn.with_strengths(model, strengths), None
        converted = stn.convert(model, responding, strengths=strengths)
        if not any(isinstance(layer, stn.SelfTuning) for layer in converted._flatten_layers()):
            raise ValueError("A strength without a derivative, as of what is erased or moved to the nearest pixel, is "
                             "tuned by layers that respond to it, such as Dense and Conv2D. Received: "
                             f"{model.name!r} without any: "
                             f"fix={[entry.name for entry in responding]}")
        return converted, stn.TrainingDraws(converted)


def _snake(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()

"""Which layers of Keras this room has a layer for: read from what each of its layers says of itself, in `plain`."""

from farhox.stn.perturbations import PerturbationLayer
from farhox.stn.self_tuning import Twin


def self_tuning_twins() -> dict[type, type[Twin]]:
    """Dictionary from classes of Keras layers to the self-tuning ones, without cells, which stand in their layers."""
    return {layer.plain: layer for layer in _naming_a_plain_one(Twin) if layer.alone}


def perturbing_twins() -> dict[type, type[PerturbationLayer]]:
    """Dictionary from classes of Keras layers to those that perturb with a strength per example."""
    return {layer.plain: layer for layer in _naming_a_plain_one(PerturbationLayer)}


def _naming_a_plain_one(kind):
    """The classes below `kind` in this room that say `plain` themselves. Those of users are theirs to name."""
    below = [each for direct in kind.__subclasses__() for each in [direct, *_naming_a_plain_one(direct)]]
    room = __name__.rpartition(".")[0] + "."
    return list(dict.fromkeys(
        each for each in below if vars(each).get("plain") is not None and each.__module__.startswith(room)))

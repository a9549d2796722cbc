"""What of a compiled Keras model can be tuned: the settings, where they are, their ranges, and how each is reached."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from farhox._core import checks
from farhox.dynamics.keras_optimizers import learnable_settings
from farhox.outer import Box, Hyperparameter
from farhox.outer.outer_variable import OuterVariable
from farhox.starts import StartRule
from farhox.starts.evaluations import middle

SWEEP, PATH, RESPONSE = "sweep", "path", "response"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of hyperparameter.

    Attributes:
        name: Name in tables, logs and arguments.
        low, high: Range in natural units.
        log: Whether its logarithm is tuned, rather than a sigmoid between the bounds.
        route: How it is reached: by the sweep, by the gradient along the path of training, by the response of layers.
        tuned: Whether it is tuned unless asked otherwise.
        reason: Why it is not.
        is_strength: Whether it is the strength of layers that perturb: dropout, noise, augmentation.
    """

    name: str
    low: float
    high: float
    log: bool = True
    route: str = PATH
    tuned: bool = True
    reason: str = ""
    is_strength: bool = False


LEARNING_RATE = Kind("learning_rate", 1e-7, 100.0, route=SWEEP)
WEIGHT_DECAY = Kind("weight_decay", 1e-7, 10.0)
# Settings of optimizers, in the order of the table.
OPTIMIZER = (
    Kind("momentum", 0.0, 0.999, False, tuned=False, reason="the sweep sets the rate for it"),
    Kind("beta_1", 0.0, 0.999, False, tuned=False, reason="the sweep sets the rate for it"),
    Kind("beta_2", 0.5, 0.99999, False, tuned=False, reason="little to gain"),
    Kind("rho", 0.5, 0.99999, False, tuned=False, reason="little to gain"),
    WEIGHT_DECAY,
    Kind("clipnorm", 1e-3, 1e3, tuned=False, reason="acts as the rate does"),
    Kind("global_clipnorm", 1e-3, 1e3, tuned=False, reason="acts as the rate does"),
    Kind("clipvalue", 1e-5, 1e2, tuned=False, reason="acts as the rate does"),
)
L1, L2 = Kind("l1", 1e-9, 1.0), Kind("l2", 1e-8, 1.0)
ACTIVITY_L1, ACTIVITY_L2 = Kind("activity_l1", 1e-9, 1.0), Kind("activity_l2", 1e-9, 1.0)
LABEL_SMOOTHING = Kind("label_smoothing", 0.0, 0.5, False)
CLASS_WEIGHTS = Kind("class_weights", 0.02, 50.0, tuned=False, reason="not asked for")
LOSS_WEIGHTS = Kind("loss_weights", 1e-3, 1e3, tuned=False, reason="the objective is the sum they weigh")


@dataclasses.dataclass(frozen=True)
class Place:
    """One place that a hyperparameter acts in.

    Attributes:
        where: Name of the layer, or class of the optimizer or loss.
        value: The value the model has there: a float, an array, or None where the setting is off.
    """

    where: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Tunable:
    """One row of the table: a hyperparameter, tuned or fixed.

    Attributes:
        name: Unique name.
        kind: A `Kind`.
        places: List of `Place`.
        hyperparameter: A `Hyperparameter`, or None if the setting is off.
        ratios: One factor per place: its value is the factor times the hyperparameter.
        low, high: Range in natural units.
        route: How it is reached if it is tuned.
        tuned: Bool.
        reason: Why it is tuned or fixed, in a few words.
        given: Whether its value was given to start from, rather than found in the model.
    """

    name: str
    kind: Kind
    places: list[Place]
    hyperparameter: Any
    ratios: list[float]
    low: float
    high: float
    tuned: bool
    reason: str
    given: bool = False

    @property
    def route(self) -> str:
        """How the hyperparameter is reached."""
        return self.kind.route if self.tuned else "-"

    @property
    def where(self) -> str:
        """The places, as a person reads them."""
        return ", ".join(place.where for place in self.places)

    def value(self) -> Any:
        """The current value in natural units: a float, an array, or None if the setting is off."""
        if self.hyperparameter is None:
            return None
        value = self.hyperparameter.numpy()
        return float(value) if value.ndim == 0 else value


class Choice:
    """What the user chose: which hyperparameters are tuned, in which ranges, from which values.

    Args:
        tune: List of names, of hyperparameters or of kinds, or None: those worth tuning.
        fix: List of names that are not tuned.
        ranges: Dictionary from names to pairs (low, high).
        start: Dictionary from names to values; a trial of Optuna or KerasTuner or the HyperParameters of the latter,
            of whose names the model must have one; or a `StartRule`, which has values when there are data. Until then
            the middle of its ranges stands in.
        granularity: "global": one hyperparameter per kind, or "layer": one per kind and layer.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.
    """

    def __init__(self, tune: Any, fix: Any, ranges: Any, start: Any, granularity: str) -> None:
        for name, value in (("tune", tune), ("fix", fix)):
            if value is not None and (not isinstance(value, (list, tuple)) or not all(
                    isinstance(entry, str) for entry in value)):
                raise TypeError(f"{name} must be a list of names of hyperparameters. Received: {value!r}")
        if granularity not in ("global", "layer"):
            raise ValueError(f'granularity must be "global" or "layer". Received: {granularity!r}')
        self.tune = None if tune is None else list(tune)
        self.fix = list(fix or [])
        both = set(self.tune or []) & set(self.fix)
        if both:
            raise ValueError(f"A hyperparameter can be tuned or fixed, not both. Received in both: {sorted(both)}")
        self.ranges = _checked_ranges(ranges)
        self.rule = start if isinstance(start, StartRule) else None
        self.start = _values_of_trial(start) if self.rule is None else middle(self.rule.space)
        # What has names of other things too, such as the units of a layer.
        self._chosen_from = None if start is None or isinstance(start, dict) else (
            "a trial" if self.rule is None else "a rule")
        self.granularity = granularity
        self._used = set()

    def groups(self, kind: Kind, places: list[Place]) -> list[tuple[str, list[Place]]]:
        """(name, places) of each hyperparameter of a kind: one, or one per place."""
        if self.granularity == "global" or len(places) == 1 and kind.route == SWEEP:
            return [(kind.name, places)]
        names, groups = {}, []
        for place in places:
            name = f"{place.where}.{kind.name}"
            names[name] = names.get(name, 0) + 1
            groups.append((name if names[name] == 1 else f"{name}_{names[name]}", [place]))
        return groups

    def tunable(self, name: str, kind: Kind, places: list[Place],
                hyperparameter: OuterVariable | None = None) -> Tunable:
        """The `Tunable` of this choice.

        Raises:
            ValueError: If a start value is out of range.
        """
        low, high = self._lookup(self.ranges, name, kind, (kind.low, kind.high))
        given = self._given(name, kind)
        values = [place.value for place in places]
        asked = self._lookup(dict.fromkeys(self.tune or [], True), name, kind, False)
        refused = self._lookup(dict.fromkeys(self.fix, True), name, kind, False)
        on = [value for value in values if value is not None and np.any(np.asarray(value) != 0)]
        ratios = [1.0] * len(values)
        if hyperparameter is None and (given is not None or on):
            start = _mean(on, kind) if given is None else given
            if given is None and len(on) > 1 and kind.log:
                ratios = [0.0 if value is None else float(value) / start for value in values]
            hyperparameter = self._hyperparameter(name, kind, start, low, high)
            low, high = self._widened(name, kind, start, low, high)
        if hyperparameter is None:
            if asked:
                raise ValueError(f"To tune what the model does not use needs a value to start from. Received: {name!r} "
                                 f"in tune, which is {values[0]!r}: give start={{{name!r}: ...}}")
            return Tunable(name, kind, places, None, ratios, low, high, False, f"off: is {_text(values[0])}")
        if refused:
            return Tunable(name, kind, places, hyperparameter, ratios, low, high, False, "as asked (fix)")
        if self.tune is not None:
            return Tunable(name, kind, places, hyperparameter, ratios, low, high, asked,
                           "as asked (tune)" if asked else "not in tune", given is not None)
        return Tunable(name, kind, places, hyperparameter, ratios, low, high, kind.tuned,
                       kind.reason if not kind.tuned else "", given is not None)

    def own(self, hyperparameter: OuterVariable, route: str, places: list[Place], is_strength: bool = False) -> Tunable:
        """The `Tunable` of a `Hyperparameter` of the user's own, as it is."""
        low = -math.inf if hyperparameter.low is None else hyperparameter.low
        high = math.inf if hyperparameter.high is None else hyperparameter.high
        kind = Kind(hyperparameter.name, low, high, hyperparameter.log, route, is_strength=is_strength)
        given = self._given(hyperparameter.name, kind)
        if given is not None:
            hyperparameter.assign(given)
        return self.tunable(hyperparameter.name, kind, places, hyperparameter)

    def strength(self, hyperparameter: OuterVariable, kind_name: str, route: str, places: list[Place]) -> Tunable:
        """The `Tunable` of the strength of layers that perturb, with its start and its range set."""
        high = math.inf if hyperparameter.high is None else hyperparameter.high
        kind = Kind(kind_name, hyperparameter.low or 0.0, high, False, route, is_strength=True)
        start = self._given(hyperparameter.name, kind)
        given = self._lookup(self.ranges, hyperparameter.name, kind, None)
        if start is not None:
            hyperparameter.assign(start)
        if given is not None:
            value, ends = float(hyperparameter.numpy()), []
            if not given[0] <= value <= given[1] or given[1] > kind.high:
                raise ValueError(f"The range of {hyperparameter.name!r} must hold its value {value:g} and end at "
                                 f"{kind.high:g} at most. Received: {given}")
            for end in given:
                room = 1e-6 * (given[1] - given[0])
                hyperparameter.assign(min(max(end, kind.low + room), kind.high - room))
                ends.append(float(hyperparameter.variable.numpy()))
            hyperparameter.assign(value)
            hyperparameter.variable.constraint = Box(*ends)
        return self.tunable(hyperparameter.name, kind, places, hyperparameter)

    def check_used(self, tunables: Sequence[Any]) -> None:
        """Checks that names are the model's.

        A trial or a rule may have others, of architectures: they are passed by with a warning, but one must be known.

        Raises:
            ValueError: If a name is none of the model's, or none that a trial or a rule has.
        """
        known = sorted({t.name for t in tunables} | {t.kind.name for t in tunables})
        if self._chosen_from is not None:
            others = [name for name in self.start if name not in self._used]
            if len(others) == len(self.start):
                raise ValueError(f"{self._chosen_from.capitalize()} to start from must know a hyperparameter of the "
                                 f"model: {', '.join(known)}. Received: {self._chosen_from} for "
                                 f"{', '.join(others) or 'none'}")
            if others:
                warnings.warn(f"Names of {self._chosen_from} that are no hyperparameters of the model are passed by: "
                              f"{', '.join(others)}. The model has {', '.join(known)}.", stacklevel=3)
        given = {*(self.tune or []), *self.fix, *self.ranges, *(self.start if self._chosen_from is None else ())}
        unknown = sorted(given - self._used)
        if unknown:
            raise ValueError(f"Names must be hyperparameters of the model: {', '.join(known)}. "
                             f"Received: {', '.join(unknown)}")

    def _given(self, name, kind):
        value = self._lookup(self.start, name, kind, None)
        if value is not None and np.asarray(value).dtype.kind not in "iuf":
            raise TypeError(f"A value to start from must be a number. Received: {name}={value!r}")
        return value

    def _lookup(self, table, name, kind, default):
        for key in (name, kind.name):
            if key in table:
                self._used.update({name, kind.name} & set(table))
                return table[key]
        return default

    def _widened(self, name, kind, start, low, high):
        """Where the range is not the user's, it has the start in it."""
        if name in self.ranges or kind.name in self.ranges:
            return low, high
        if self.rule is not None:  # What it may say has to fit too.
            reach = [*self.rule.space.get(name, ()), *self.rule.space.get(kind.name, ())]
            start = np.append(start, [end for end in reach if end > 0 or not kind.log])
        return min(low, float(np.min(start)) / 10 if kind.log else low), max(high, float(np.max(start)) * (
            10 if kind.log else 1))

    def _hyperparameter(self, name, kind, start, low, high):
        start = np.asarray(start, "float64")
        low, high = self._widened(name, kind, start, low, high)
        if not np.all(np.isfinite(start)) or np.any(start < low) or np.any(start > high) or (
                kind.log and np.any(start <= 0)):
            raise ValueError(f"The value of {name!r} must be in its range from {low:g} to {high:g} to start from. "
                             f"Received: {start}. Give start= or ranges= another value")
        if kind.log:
            hyperparameter = Hyperparameter(start, low=0.0, log=True, name=name)
            hyperparameter.variable.constraint = Box(math.log(low), math.log(high))
            return hyperparameter
        room = 1e-3 * (high - low)
        return Hyperparameter(np.clip(start, low + room, high - room), low=low, high=high, name=name)


def optimizer_tunables(optimizer: keras.optimizers.Optimizer, choice: Any) -> list[Tunable]:
    """The rate and the other settings of a Keras optimizer.

    Raises:
        ValueError: If the optimizer has no learning rate that can be set.
    """
    where, learnable = type(optimizer).__name__, learnable_settings(optimizer)
    rate = optimizer.learning_rate if "learning_rate" in learnable else None
    if rate is None:
        raise ValueError(f"The optimizer must have a learning rate. Received: {where}")
    schedule = isinstance(vars(optimizer)["_learning_rate"], keras.optimizers.schedules.LearningRateSchedule)
    value = float(keras.ops.convert_to_numpy(
        vars(optimizer)["_learning_rate"](0) if schedule else optimizer.learning_rate))
    place = Place(f"{where}, times its schedule" if schedule else where, 1.0 if schedule else value)
    if not schedule and not value > 0:
        raise ValueError(f"The learning rate must be positive. Received: {value}")
    found = [choice.tunable(LEARNING_RATE.name, LEARNING_RATE, [place])]
    config = vars(optimizer)
    for kind in OPTIMIZER:
        if kind.name in learnable and kind.name in config:
            setting = config[kind.name]
            found.append(choice.tunable(kind.name, kind, [Place(where, None if setting is None else float(setting))]))
    return found


def _mean(values, kind):
    arrays = np.stack([np.asarray(value, "float64") for value in values])
    return np.exp(np.mean(np.log(arrays), axis=0)) if kind.log else np.mean(arrays, axis=0)


def _checked_ranges(ranges):
    if ranges is not None and not isinstance(ranges, dict):
        raise TypeError(f"ranges must be a dictionary from names to pairs (low, high). Received: {ranges!r}")
    for name, pair in (ranges or {}).items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(checks.is_number, pair)) or not (
                0 <= pair[0] < pair[1]):
            raise ValueError(f"A range must be a pair (low, high) with 0 <= low < high. Received: {name}={pair!r}")
    return {name: (float(low), float(high)) for name, (low, high) in (ranges or {}).items()}


def _values_of_trial(start):
    """Values by name, from a dictionary, KerasTuner's trials and `HyperParameters` or Optuna's trials."""
    if start is None:
        return {}
    # Optuna's trials have a dictionary as `params`, KerasTuner's HyperParameters, which its trials hold, as `values`.
    candidates = [start, getattr(start, "params", None),
                  getattr(getattr(start, "hyperparameters", start), "values", None)]
    values = next((candidate for candidate in candidates if isinstance(candidate, dict)), None)
    if values is None:
        raise TypeError("start must be a dictionary from names to values, HyperParameters or a trial of KerasTuner, a "
                        f"trial of Optuna or a farhox.starts.StartRule. Received: {start!r}")
    # KerasTuner's Hyperband keeps notes of its own among the values: no names of anything.
    return {name: value for name, value in values.items() if start is values or not name.startswith("tuner/")}


def _text(value):
    return "None" if value is None else f"{value:g}"

"""Genetic programming of formulas, by DEAP: a tree for each hyperparameter, bred by what it reaches and its size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from farhox.starts.formulas import OPERATORS, size, text

_CROSSOVER = 0.25
_LEAST_DEPTH, _MOST_DEPTH, _MOST_HEIGHT = 1, 3, 6
_DEVIATION, _DOUBLINGS = 0.1, 2.0  # Of a constant: by a tenth, or by its order of magnitude.
_SCALED = 0.3  # Share of the changed trees that are brought to where the best values are.
_DIGITS = 4
_GAIN = 1e-9
_FIRST = 5  # Populations of random trees, of which a run begins with the best.


def evolve(properties: Sequence[str], hyperparameters: int, score: Callable[[list[Any]], list[float]],
           parents: int, population: int, generations: int, patience: int, seed: int,
           factor: Callable[[int, Any], float | None] = lambda index, formula: None) -> tuple[list[Any], list[float]]:
    """The formulas that score best, and of those the shortest; (mu + lambda) with selection by NSGA-II.

    Three things of DEAP are minded. The best so far is kept apart and stays among the parents, since NSGA-II, unlike
    selBest, may lose it. All fitness is finite, since the hall of fame loses its best where one is NaN. Constants are
    made by functions of this module and come out as floats, since what a lambda makes cannot be pickled. `random`'s own
    generator, which DEAP draws from, is put back as it was.

    Args:
        properties: Names that formulas may use.
        hyperparameters: Positive int, formulas of an individual.
        score: Function from a list of lists of formulas to finite floats, higher is better.
        parents, population, generations, patience: Positive ints; see `SymbolicDefaults`.
        seed: Int.
        factor: Function from the index of a hyperparameter and a formula to what it should be multiplied with, or None.

    Returns:
        List of formulas, and the best score after each generation, the first of random trees.

    Raises:
        ImportError: If deap is not installed.
    """
    deap = _Deap(properties, hyperparameters, factor)
    state = random.getstate()
    random.seed(seed)
    try:
        return _evolve(deap, score, parents, population, generations, patience)
    finally:
        random.setstate(state)


def _evolve(deap, score, parents, population, generations, patience):
    known: dict[str, float] = {}

    def rate(individuals):
        formulas = [deap.formulas(individual) for individual in individuals]
        keys = ["; ".join(map(text, entry)) for entry in formulas]
        new = {key: entry for key, entry in zip(keys, formulas) if key not in known}
        known.update(zip(new, score(list(new.values())) if new else []))
        for individual, key, entry in zip(individuals, keys, formulas):
            individual.fitness.values = known[key], sum(map(size, entry))

    best, own, chosen, since = deap.tools.HallOfFame(1), None, [], 0
    history: list[float] = []
    for _ in range(generations + 1):
        if own is None or since >= patience:
            own, offspring, chosen, since = deap.tools.HallOfFame(1), [
                deap.individual() for _ in range(_FIRST * population)], [], 0
        else:
            offspring = deap.algorithms.varOr(chosen, deap.toolbox, population, _CROSSOVER, 1.0 - _CROSSOVER)
        rate(offspring)
        before = own[0].fitness.values[0] if len(own) else -math.inf
        own.update(offspring)
        best.update(offspring)
        chosen = deap.tools.selNSGA2(_distinct(chosen + offspring), parents)
        if all(individual.fitness != own[0].fitness for individual in chosen):
            chosen[-1] = deap.clone(own[0])
        chosen = chosen if len(chosen) > 1 else chosen * 2  # Crossover takes two.
        since = 0 if own[0].fitness.values[0] > before + _GAIN else since + 1
        history.append(best[0].fitness.values[0])
    return deap.formulas(best[0]), history


def _distinct(individuals):
    """One of each score and size: copies and other spellings of one formula would fill the first fronts."""
    return list({individual.fitness.values: individual for individual in individuals}.values())


class _Deap:
    """DEAP's sets of primitives and tools, for lists of trees."""

    def __init__(self, properties: Sequence[str], hyperparameters: int, factor: Callable[[int, Any], Any]) -> None:
        try:
            from deap import algorithms, base, gp, tools
        except ImportError as error:
            raise ImportError("farhox.starts.SymbolicDefaults breeds formulas with the package deap, which is not "
                              "installed: pip install 'farhox[starts]'") from error

        class Fitness(base.Fitness):
            weights = (1.0, -1.0)

        class Individual(list):
            def __init__(self, trees: Any = ()) -> None:
                super().__init__(trees)
                self.fitness = Fitness()

        self.algorithms, self.tools, self._gp, self._individual = algorithms, tools, gp, Individual
        self._properties, self._count, self._factor = list(properties), hyperparameters, factor
        self._set = gp.PrimitiveSetTyped("formula", [float] * len(self._properties), float)
        for name, arity in OPERATORS.items():
            # Trees are read by `formulas`, never run: what DEAP keeps for an operator is its name.
            self._set.addPrimitive(_never_called, [float] * arity, float, name)
        self._set.addEphemeralConstant("fraction", _fraction, float)
        self._set.addEphemeralConstant("whole", _whole, float)
        self.toolbox = base.Toolbox()
        self.toolbox.register("clone", self.clone)
        self.toolbox.register("mate", self._mate)
        self.toolbox.register("mutate", self._mutate)

    def individual(self) -> Any:
        """Random full trees of depth 1 to 3."""
        return self._individual([self._gp.PrimitiveTree(self._gp.genFull(self._set, _LEAST_DEPTH, _MOST_DEPTH))
                                 for _ in range(self._count)])

    def clone(self, individual: Any) -> Any:
        """A copy whose trees can be changed."""
        copy = self._individual([self._gp.PrimitiveTree(tree) for tree in individual])
        if individual.fitness.valid:
            copy.fitness.values = individual.fitness.values
        return copy

    def formulas(self, individual: Any) -> list[Any]:
        """The formulas of an individual: plain floats, strings and tuples, which can be pickled."""
        return [self._formula(iter(tree)) for tree in individual]

    def _formula(self, nodes):
        node = next(nodes)
        if isinstance(node, self._gp.Primitive):
            return (node.name, *(self._formula(nodes) for _ in range(node.arity)))
        if isinstance(node.value, str):
            return self._properties[self._set.arguments.index(node.value)]
        return float(node.value)

    def _mate(self, first, second):
        """Swaps whole trees of hyperparameters drawn at random; where none was drawn, parts of one."""
        swapped = [index for index in range(self._count) if self._count > 1 and random.random() < 0.5]
        for index in swapped:
            first[index], second[index] = second[index], first[index]
        if not swapped:
            index = random.randrange(self._count)
            mated, _ = self._gp.cxOnePoint(*(self._gp.PrimitiveTree(entry[index]) for entry in (first, second)))
            if mated.height <= _MOST_HEIGHT:
                first[index] = mated
        return first, second

    def _mutate(self, individual):
        """Changes one tree; what becomes too high stays as it was."""
        index = random.randrange(self._count)
        tree = self._gp.PrimitiveTree(individual[index])
        changes = [self._replace_node, self._replace_terminal, self._insert, self._shrink]
        if any(isinstance(node.value, float) for node in tree if not isinstance(node, self._gp.Primitive)):
            changes.append(self._shift_constant)
        changed = random.choice(changes)(tree)
        if random.random() < _SCALED:
            changed = self._scaled(index, changed)
        if changed.height <= _MOST_HEIGHT:
            individual[index] = changed
        return (individual,)

    def _replace_node(self, tree):
        return self._gp.mutNodeReplacement(tree, self._set)[0] if len(tree) > 1 else self._replace_terminal(tree)

    def _replace_terminal(self, tree):
        places = [place for place, node in enumerate(tree) if not isinstance(node, self._gp.Primitive)]
        tree[random.choice(places)] = self._terminal()
        return tree

    def _insert(self, tree):
        return self._gp.mutInsert(tree, self._set)[0]

    def _shrink(self, tree):
        return self._gp.mutShrink(tree)[0]

    def _shift_constant(self, tree):
        places = [place for place, node in enumerate(tree)
                  if not isinstance(node, self._gp.Primitive) and isinstance(node.value, float)]
        place = random.choice(places)
        value = tree[place].value
        constant = type(tree[place])()
        whole = type(tree[place]).__name__ == "whole"
        factor = 1.0 + random.gauss(0.0, _DEVIATION) if random.random() < 0.5 else 2.0 ** random.gauss(0.0, _DOUBLINGS)
        shifted = value * factor
        constant.value = float(round(shifted)) if whole else _rounded(shifted)
        tree[place] = constant
        return tree

    def _scaled(self, index, tree):
        """The tree times what brings it to the best values: a better form shall not be lost by its constant."""
        factor = self._factor(index, self._formula(iter(tree)))
        if factor is None:
            return tree
        leads = isinstance(tree[0], self._gp.Primitive) and tree[0].name in ("*", "/") and not isinstance(
            tree[1], self._gp.Primitive) and isinstance(tree[1].value, float)
        if leads:
            tree[1] = self._constant(_rounded(tree[1].value * factor))
            return tree
        times = next(primitive for primitive in self._set.primitives[float] if primitive.name == "*")
        return self._gp.PrimitiveTree([times, self._constant(_rounded(factor)), *tree])

    def _constant(self, value):
        constant = next(entry for entry in self._set.terminals[float] if isinstance(entry, type))()
        constant.value = value
        return constant

    def _terminal(self):
        terminal = random.choice(self._set.terminals[float])
        return terminal() if isinstance(terminal, type) else terminal


def _fraction():
    return _rounded(2.0 ** random.uniform(-10.0, 0.0))


def _whole():
    return float(round(2.0 ** random.uniform(0.0, 10.0)))


def _rounded(value):
    """So that the formula that is shown is the one that is computed."""
    return float(f"{value:.{_DIGITS}g}")


def _never_called(*arguments):
    raise NotImplementedError("Formulas are evaluated by farhox.starts.formulas.")

"""Symbolic defaults: formulas, forests, and rules that are found on planted tables."""

import math
import pickle
import random
import sys
import warnings
import zlib

import numpy as np
import pytest

from farhox.starts import PriorEvaluations, SymbolicDefaults, best_on_average
from farhox.starts.evolution import evolve
from farhox.starts.forests import Forests
from farhox.starts.formulas import evaluate, is_valid, simplified, size, text


def planted(count, seed, configurations=30):
    """A table whose best gamma is 1 / (p variance): scores fall with the distance of logarithms."""
    draw = np.random.default_rng(seed)
    datasets = [{"n": float(draw.integers(100, 5000)), "p": float(draw.integers(2, 60)),
                 "variance": float(np.exp(draw.uniform(-2, 2)))} for _ in range(count)]
    gammas = np.geomspace(1e-4, 10, configurations)
    return PriorEvaluations(
        {"gamma": (1e-4, 10.0)}, datasets, [{"gamma": float(gamma)} for gamma in gammas],
        [-np.abs(np.log(gammas * entry["p"] * entry["variance"])) for entry in datasets])


def quick(**changes):
    return SymbolicDefaults(**{"population": 50, "generations": 50, "trees": 10, "seed": 0, **changes})


@pytest.fixture(scope="module")
def rule():
    return quick().fit(planted(16, 0))


def error_of(values, table):
    """The mean distance of logarithms from the best gamma."""
    return np.mean([abs(math.log(value * entry["p"] * entry["variance"]))
                    for value, entry in zip(values, table.properties)])


def test_a_planted_rule_is_found_and_beats_the_best_constant_on_held_out_data_sets(rule):
    held_out, constant = planted(12, 100), best_on_average(planted(16, 0))["gamma"]
    found = [rule.predict(properties)["gamma"] for properties in held_out.properties]
    assert error_of(found, held_out) < 0.2 < 0.7 < error_of([constant] * 12, held_out)
    assert "p" in rule.formulas["gamma"] and "variance" in rule.formulas["gamma"]


def test_the_formula_that_is_shown_is_the_one_that_is_computed(rule):
    functions = {"expit": lambda a: 1 / (1 + math.exp(-a)), "max": max, "min": min,
                 "if_greater": lambda a, b, c, d: c if a > b else d}
    for properties in planted(5, 3).properties:
        shown = eval(rule.formulas["gamma"], {**functions, **properties})
        assert rule.predict(properties)["gamma"] == pytest.approx(shown, rel=1e-4)


def test_the_same_seed_gives_the_same_formula_another_another_and_the_generator_of_python_is_left_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    first, other = (quick(generations=5, seed=seed).fit(planted(6, 0)) for seed in (3, 4))
    assert random.random() == expected
    again = first.unfitted().fit(planted(6, 0))
    assert again.formulas == first.formulas and again.history == first.history
    assert other.formulas != first.formulas


def test_a_rule_comes_back_from_pickle_and_from_its_file_constants_and_all(rule, tmp_path):
    made = quick(generations=3, seed=4).fit(planted(5, 5))
    made._fitted["trees"]["gamma"] = ("*", 0.125, ("**", "p", -1.5))
    made.save(tmp_path / "rule.json")
    for back in (pickle.loads(pickle.dumps(made)), SymbolicDefaults.load(tmp_path / "rule.json")):
        assert back.formulas == made.formulas == {"gamma": "0.125 * p ** (-1.5)"}
        assert back.predict({"n": 1, "p": 4, "variance": 1}) == {"gamma": 0.125 / 8}
        assert back.space == made.space and back.history == made.history
        assert back.suggest({"n": 1, "p": 4, "variance": 1}, 3) == made.suggest({"n": 1, "p": 4, "variance": 1}, 3)
    saved = (tmp_path / "rule.json").read_text()
    for broken in ("{}", "[1]", saved.replace('"**", "p"', '"import", "p"'), saved.replace('"**", "p"', '"**", "q"'),
                   saved.replace('"seed": 4', '"seed": -4')):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match="path must be a file that SymbolicDefaults.save wrote. Received: "):
            SymbolicDefaults.load(tmp_path / "broken.json")


def test_values_are_clipped_to_the_space_and_a_warning_says_so(rule):
    with pytest.warns(UserWarning, match="gamma = .* and was clipped to its range from 0.0001 to 10"):
        assert rule.predict({"n": 1000, "p": 1e9, "variance": 1e9}) == {"gamma": 1e-4}


def test_where_a_formula_has_no_value_the_best_on_average_stands_in_and_a_warning_says_so():
    table = planted(5, 5)
    rule = quick(generations=1).fit(table)
    for tree, properties in ((("/", 1.0, ("-", "p", "p")), {"p": 3}), (("**", ("neg", "p"), 0.5), {"p": 3}),
                             (("**", "p", "p"), {"p": 100})):
        rule._fitted["trees"]["gamma"] = tree
        with pytest.warns(UserWarning, match="is no finite number here; it is that of the best configuration on av"):
            assert rule.predict({"n": 1, "variance": 1, **properties}) == best_on_average(table)


def test_integers_are_rounded_within_their_range():
    table = PriorEvaluations({"units": (4, 64)}, [{"n": 1.0}, {"n": 2.0}], [{"units": 4}, {"units": 64}],
                             [[0, 1], [1, 0]])
    rule = quick(generations=1).fit(table)
    rule._fitted["trees"]["units"] = "n"
    value = rule.predict({"n": 7.6})["units"]
    assert value == 8 and isinstance(value, int)
    with pytest.warns(UserWarning, match="clipped"):
        assert rule.predict({"n": 1e5})["units"] == 64


def test_suggestions_are_the_formula_and_then_the_portfolio(rule):
    x, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
    table = PriorEvaluations({"gamma": (1e-4, 10.0)}, [(x, y), (2 * x, y)], [{"gamma": 0.1}, {"gamma": 1.0}],
                             [[0, 1], [1, 0]])
    made = quick(generations=2).fit(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = made.suggest((x, y), 3)
        assert made.start(x, y) == found[0] == made.predict(table.properties[0])
    assert len(found) == len({entry["gamma"] for entry in found}) >= 2
    with pytest.raises(TypeError, match=r"must be a pair \(x, y\) or a dictionary of properties. Received: int"):
        made.suggest(3)
    with pytest.raises(ValueError, match="count must be a positive integer"):
        made.suggest((x, y), 0)


@pytest.mark.parametrize("scores", [[[0, 1, 2]], [[1, 1, 1]], [[math.nan, 1, math.nan]]])
def test_one_data_set_is_enough_for_constants(scores):
    table = PriorEvaluations({"rate": (0.1, 1.0)}, [{"n": 10.0}], [{"rate": r} for r in (0.1, 0.5, 1.0)], scores)
    rule = quick(generations=2).fit(table)
    assert 0.1 <= rule.predict({"n": 10.0})["rate"] <= 1.0 and rule.history[-1] > 0.5


@pytest.mark.parametrize("properties, error, rule_text", [
    ({"n": 1.0, "p": 2.0}, ValueError, "properties must have what the table has: n, p, variance. Received: .*ce"),
    ({"n": 1.0, "p": 2.0, "variance": math.nan}, ValueError, "finite numbers under names. Received: 'variance': nan"),
    ({"n": 1.0, "p": 2.0, "variance": None}, ValueError, "Received: 'variance': None"),
    ([1.0], TypeError, "properties must be a dictionary"),
])
def test_properties_that_are_none_are_an_error(rule, properties, error, rule_text):
    with pytest.raises(error, match=rule_text):
        rule.predict(properties)


@pytest.mark.parametrize("settings, rule_text", [
    ({"population": 1}, "population must be an integer of at least 2"),
    ({"generations": -1}, "generations must be a non-negative integer"), ({"seed": -1}, "seed must be"),
    ({"parents": 1}, "parents must be an integer of at least 2"), ({"patience": 0}, "patience must be a positive"),
    ({"trees": 0.5}, "trees must be a positive integer")])
def test_settings_out_of_range_are_an_error(settings, rule_text):
    with pytest.raises(ValueError, match=rule_text):
        SymbolicDefaults(**settings)


def test_a_rule_that_has_learned_nothing_says_so(tmp_path):
    for use in (lambda rule: rule.formulas, lambda rule: rule.predict({"n": 1}), lambda rule: rule.space,
                lambda rule: rule.history, lambda rule: rule.save(tmp_path / "rule.json")):
        with pytest.raises(ValueError, match=r"The rule must have learned from a table: call fit\(\) first"):
            use(SymbolicDefaults())
    with pytest.raises(TypeError, match="table must be a PriorEvaluations. Received: list"):
        SymbolicDefaults().fit([])


@pytest.mark.parametrize("package", ["deap", "sklearn"])
def test_a_package_that_is_missing_is_an_error_that_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"which is not installed: pip install 'farhox\[starts\]'"):
        SymbolicDefaults(generations=1).fit(planted(3, 0))


# What DEAP loses or cannot do unless one minds it.


def test_the_best_that_was_ever_rated_is_the_result_though_selection_may_lose_it():
    rated = {}

    def score(individuals):
        # As good as random: the children of the best are worse.
        draws = [zlib.crc32(text(formulas[0]).encode()) / 2 ** 32 for formulas in individuals]
        rated.update({text(formulas[0]): draw for formulas, draw in zip(individuals, draws)})
        return draws

    formulas, history = evolve(["n", "p"], 1, score, parents=2, population=10, generations=15, patience=20, seed=0)
    assert rated[text(formulas[0])] == max(rated.values()) == history[-1]
    assert history == sorted(history) and len(history) == 16


def test_what_has_no_valid_value_ranks_below_all_others_and_is_never_not_a_number():
    # Of negative properties most powers are complex, quotients by zero are infinite.
    table = PriorEvaluations({"rate": (0.5, 4.0)}, [{"zero": 0.0, "below": -2.5}] * 2,
                             [{"rate": rate} for rate in (0.5, 1.0, 4.0)], [[0, 0, 1]] * 2)
    rule = quick(generations=5).fit(table)
    assert np.all(np.isfinite(rule.history)) and rule.history == sorted(rule.history) and rule.history[-1] > 0.5
    from farhox.starts.symbolic import _Score
    score = _Score(table, Forests(table, 5, 0))
    invalid = [("/", 1.0, "zero"), ("**", "below", 0.5), ("**", 10.0, 40.0), ("-", ("/", 1.0, "zero"),
                                                                             ("/", 1.0, "zero"))]
    assert score([[formula] for formula in invalid]) == [-1.0] * 4
    assert min(score([[0.5], [1e20], ["below"]])) > -1e-5
    # Of the same predictions, those of values in the space are better.
    assert score([[4.0]])[0] > score([[5.0]])[0] > score([[4.0]])[0] - 1e-5


def test_individuals_of_several_hyperparameters_have_a_formula_each_of_at_most_a_height():
    def height(formula):
        return 1 + max(map(height, formula[1:])) if isinstance(formula, tuple) else 0

    heights = []

    def score(individuals):
        heights.extend(height(formula) for formulas in individuals for formula in formulas)
        return [float(sum(map(size, formulas))) for formulas in individuals]  # The longer the better.

    formulas, _ = evolve(["n"], 3, score, parents=5, population=20, generations=20, patience=20, seed=1)
    assert len(formulas) == 3 and max(heights) == 6


def test_forests_say_what_those_of_scikit_learn_say():
    from sklearn.ensemble import RandomForestRegressor
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(2, 40))
    scores[1, :30] = math.nan
    table = PriorEvaluations({"a": (0.0, 1.0), "b": (0.0, 1.0)}, [{"n": 1.0}, {"n": 2.0}],
                             [{"a": a, "b": b} for a, b in draw.uniform(size=(40, 2))], scores)
    points = draw.uniform(size=(2, 50, 2))
    found = Forests(table, 7, 3).predict(points)
    for index in range(2):
        known = np.isfinite(scores[index])
        forest = RandomForestRegressor(7, max_samples=int(known.sum()), random_state=3 + index)
        forest.fit(table.units()[known], table.scaled_scores()[index][known])
        np.testing.assert_allclose(found[index], forest.predict(points[index]), rtol=1e-12)


@pytest.mark.parametrize("formula, shown, value", [
    (("/", 1.0, ("*", "p", "v")), "1 / (p * v)", 1 / 6), (("*", ("/", 1.0, "p"), "v"), "1 / p * v", 1.5),
    (("-", "p", ("-", "v", "p")), "p - (v - p)", 1.0), (("+", "p", ("+", "v", "p")), "p + v + p", 7.0),
    (("**", ("**", "p", "v"), "p"), "(p ** v) ** p", 64.0), (("**", "p", ("neg", "v")), "p ** (-v)", 1 / 8),
    (("neg", ("+", "p", "v")), "-(p + v)", -5.0), (("**", ("neg", "p"), 2.0), "(-p) ** 2", 4.0),
    (("-", "p", ("neg", "v")), "p - -v", 5.0), (("max", "p", ("min", "v", 0.5)), "max(p, min(v, 0.5))", 2.0),
    (("expit", ("-", "p", "p")), "expit(p - p)", 0.5), (("*", -1.5, "p"), "-1.5 * p", -3.0),
    (("if_greater", "p", "v", 1.0, ("/", "v", "p")), "if_greater(p, v, 1, v / p)", 1.5),
])
def test_formulas_are_written_with_the_parentheses_they_need(formula, shown, value):
    assert text(formula) == shown
    assert evaluate(formula, {"p": 2.0, "v": 3.0}) == pytest.approx(value)
    assert size(formula) == sum(shown.count(name) for name in (
        " + ", " - ", " * ", " / ", " ** ", "-(", "-v", "-p", "max", "min", "expit", "if_"))


@pytest.mark.parametrize("formula, shown", [
    (("*", ("+", 1.0, 2.0), "p"), "3 * p"), (("*", 1.0, ("+", "p", 0.0)), "p"), (("neg", ("neg", "p")), "p"),
    (("max", "p", "p"), "p"), (("/", ("-", "p", 0.0), ("**", 1.0, 5.0)), "p"), (("**", -1.0, 0.5), "-1 ** 0.5"),
    (("/", 1.0, 3.0), "0.333333"), (("*", 0.25, ("/", ("/", 8.0, "p"), "v")), "2 / p / v"),
    (("*", ("*", "p", ("*", 2.0, "v")), 0.5), "p * v"), (("/", ("*", "p", 3.0), 2.0), "p * 1.5"),
    (("*", ("+", "p", 1.0), 2.0), "(p + 1) * 2"), (("/", "p", 2.0), "p / 2")])
def test_what_is_constant_in_a_formula_is_computed_and_what_changes_nothing_is_left_out(formula, shown):
    assert text(simplified(formula)).replace("(-1)", "-1") == shown


def test_what_is_not_defined_is_not_a_number_and_arrays_are_taken_at_once():
    values = evaluate(("/", 1.0, "p"), {"p": np.array([0.0, 2.0])})
    assert is_valid(values).tolist() == [False, True]
    assert not is_valid(evaluate(("if_greater", ("**", -1.0, 0.5), 1.0, 2.0, 3.0), {}))
    assert not is_valid(2.0 ** 100) and is_valid(-2.0 ** 99)

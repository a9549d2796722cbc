"""Comparisons of starts on held-out data sets: regrets by hand, baselines, what is none."""

import itertools
import math

import matplotlib
import numpy as np
import pytest

from farhox.starts import PriorEvaluations, StartRule, SymbolicDefaults, best_on_average, compare_starts

BASELINES = ["random", "middle of the ranges", "best on average", "portfolio", "nearest, best of each",
             "nearest, mean of ten"]
SCORES = [[0, 2, 4, 1], [0, 4, 3, math.nan], [8, 6, 0, 4]]


def table(scores=SCORES, **changes):
    return PriorEvaluations({"rate": (0.0, 3.0)}, [{"n": float(i)} for i in range(len(scores))],
                            [{"rate": float(i)} for i in range(4)], scores, **changes)


class Middle(StartRule):
    """Suggests the value that it was made with, and then others."""

    def __init__(self, value):
        self.value, self.tables = value, []

    @property
    def space(self):
        return {"rate": (0.0, 3.0)}

    def fit(self, table):
        self.tables.append(table)
        return self

    def suggest(self, dataset, count=1):
        return [{"rate": self.value}, {"rate": self.value}, {"rate": 0.2}][:count]

    def unfitted(self):
        return Middle(self.value)


def test_regrets_are_those_of_the_nearest_configurations_that_were_evaluated():
    rule = Middle(2.4)
    found = compare_starts(table(), rule, evaluations=(1, 2, 3))
    # Scaled: [0, .5, 1, .25], [0, 1, .75, -], [1, .75, 0, .5]. 2.4 is nearest to 2, then to 3 (or 1), then 0.2 to 0.
    np.testing.assert_allclose(found.regrets["Middle"], [[0, 0, 0], [0.25, 0, 0], [1, 0.5, 0]])
    assert rule.tables == [] and found.names == ["0", "1", "2"]
    assert found.means()["Middle"] == pytest.approx([1.25 / 3, 0.5 / 3, 0])
    assert found.evaluations == (1, 2, 3) and list(found.regrets) == [*BASELINES, "Middle"]


def test_baselines_learn_from_the_data_sets_that_are_not_held_out():
    found = compare_starts(table(), evaluations=(1, 2))
    for index in range(3):
        rest = [i for i in range(3) if i != index]
        best = int(best_on_average(table().subset(rest))["rate"])
        scaled = table().scaled_scores()[index]
        tried = best if np.isfinite(scaled[best]) else 2
        assert found.regrets["best on average"][index, 0] == 1 - scaled[tried]
    # The middle is one configuration: there is no second one.
    assert np.all(np.isnan(found.regrets["middle of the ranges"][:, 1]))
    assert "| middle of the ranges | " in found.table() and found.table().count(" - |") == 1


def test_the_regret_of_random_configurations_is_the_mean_over_all_orders():
    found = compare_starts(table(), evaluations=(1, 2, 4)).regrets["random"]
    for scores, row in zip(table().scaled_scores(), found):
        known = scores[np.isfinite(scores)]
        for number, regret in zip((1, 2, 4), row):
            subsets = list(itertools.combinations(known, min(number, len(known))))
            assert regret == pytest.approx(1 - np.mean([max(subset) for subset in subsets]))


def test_functions_are_methods_too_and_folds_hold_out_several_data_sets():
    sizes = []

    def first(rest, dataset, count):
        sizes.append(len(rest))
        return [rest.configurations[0], {"rate": 7.0 if dataset["n"] else -7.0}][:count]

    found = compare_starts(table(), {"first": first}, folds=2, evaluations=(1, 2))
    assert sorted(sizes) == [1, 1, 2] and found.regrets["first"][:, 0].tolist() == [1, 1, 0]
    again = compare_starts(table(), {"first": first}, folds=2, evaluations=(1, 2))
    np.testing.assert_array_equal(found.regrets["portfolio"], again.regrets["portfolio"])


def test_a_planted_rule_beats_all_baselines_and_stays_as_it_was(tmp_path):
    gammas, draw = np.geomspace(1e-2, 10, 16), np.random.default_rng(0)
    variances = np.exp(draw.uniform(-2, 2, 12))
    planted = PriorEvaluations(
        {"gamma": (1e-2, 10.0)}, [{"n": float(draw.integers(100, 999)), "variance": float(v)} for v in variances],
        [{"gamma": float(gamma)} for gamma in gammas], [-np.abs(np.log(gammas * v)) for v in variances])
    rule = SymbolicDefaults(population=20, generations=20, trees=5)
    found = compare_starts(planted, [rule], folds=3)
    means = found.means()
    assert means["SymbolicDefaults"][0] < 0.5 * min(means[name][0] for name in ("best on average", "portfolio"))
    with pytest.raises(ValueError, match="must have learned"):
        rule.space  # noqa: B018
    with matplotlib.rc_context():
        found.plot(tmp_path / "regrets.png")
    assert (tmp_path / "regrets.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("call, error, rule", [
    (lambda: compare_starts([]), TypeError, "table must be a PriorEvaluations"),
    (lambda: compare_starts(table().subset([0])), ValueError, "there must be two at least. Received: 1"),
    (lambda: compare_starts(table(), 3), TypeError, "methods must be a StartRule, a list of them, or a dict"),
    (lambda: compare_starts(table(), {"mine": 3}), TypeError, "A method must be a StartRule or a function.*'mine': 3"),
    (lambda: compare_starts(table(), {"portfolio": Middle(1.0)}), ValueError, "another name than the baselines"),
    (lambda: compare_starts(table(), {"random": Middle(1.0)}), ValueError, "another name than the baselines"),
    (lambda: compare_starts(table(), {"mine": lambda *given: []}), ValueError, "must suggest a list.*of 'mine'"),
    (lambda: compare_starts(table(), {"mine": lambda *given: [{"rte": 1}]}), ValueError, "with numbers for rate"),
    (lambda: compare_starts(table(), Middle(math.nan)), ValueError, "with numbers for rate. Received: .*nan"),
    (lambda: compare_starts(table(), folds=1), ValueError, "folds must be an integer from 2 to 3. Received: 1"),
    (lambda: compare_starts(table(), folds=4), ValueError, "folds must be an integer from 2 to 3. Received: 4"),
    (lambda: compare_starts(table(), evaluations=(3, 1)), ValueError, "evaluations must be positive integers that inc"),
    (lambda: compare_starts(table(), evaluations=(0,)), ValueError, "evaluations must be positive integers"),
    (lambda: compare_starts(table(), evaluations=(1, 5)), ValueError, "up to the number of configurations, 4"),
    (lambda: compare_starts(table(), evaluations=3), ValueError, "Received: 3"),
    (lambda: compare_starts(table(), seed=-1), ValueError, "seed must be a non-negative integer"),
])
def test_what_cannot_be_compared_is_an_error_that_names_the_rule(call, error, rule):
    with pytest.raises(error, match=rule):
        call()


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    import sys
    found = compare_starts(table(), evaluations=(1,))
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"plot needs the package matplotlib.*pip install 'farhox\[starts\]'"):
        found.plot(tmp_path / "regrets.png")

"""Tables of earlier evaluations, properties of data sets, and the baselines on them."""

import math

import numpy as np
import pytest

from farhox.starts import PriorEvaluations, best_on_average, dataset_properties, portfolio
from farhox.starts.baselines import nearest_by_properties, neighbour_mean_order, neighbour_order

SPACE = {"learning_rate": (1e-3, 1.0), "momentum": (0.0, 0.9), "units": (4, 256)}
CONFIGURATIONS = [{"learning_rate": rate, "momentum": momentum, "units": units} for rate, momentum, units in (
    (1e-3, 0.0, 4), (0.1, 0.5, 32), (1.0, 0.9, 256))]
DATASETS = [{"n": 100.0, "p": 4.0}, {"n": 1000.0, "p": 8.0}]
SCORES = [[0.1, 0.5, 0.3], [-5.0, math.nan, -1.0]]


def table(**changes):
    parts = {"space": SPACE, "datasets": DATASETS, "configurations": CONFIGURATIONS, "scores": SCORES, **changes}
    return PriorEvaluations(**parts)


def test_scores_are_scaled_from_the_worst_to_the_best_of_each_data_set_and_nan_stays():
    np.testing.assert_allclose(table().scaled_scores(), [[0, 1, 0.5], [0, math.nan, 1]])
    np.testing.assert_allclose(table().filled_scores(), [[0, 1, 0.5], [0, 0.5, 1]])
    same = table(scores=[[2.0, 2.0, 2.0], [-1e308, 1e308, 0.0]]).scaled_scores()
    np.testing.assert_allclose(same, [[1, 1, 1], [0, 1, 0.5]])


def test_positive_ranges_of_a_factor_of_ten_have_a_logarithmic_scale_and_others_a_linear_one():
    np.testing.assert_allclose(table().units(), [[0, 0, 0], [2 / 3, 5 / 9, 0.5], [1, 1, 1]])
    middle = table().middle()
    assert middle == pytest.approx({"learning_rate": 10 ** -1.5, "momentum": 0.45, "units": 32})
    assert isinstance(middle["units"], int) and table().integers == {"units"}
    assert table(space={**SPACE, "momentum": (-1.0, 0.9)}).middle()["momentum"] == pytest.approx(-0.05)


def test_a_table_of_arrays_has_their_properties_and_keeps_them(tmp_path):
    random = np.random.default_rng(0)
    data = [(random.normal(size=(30, 3, 2)), np.arange(30) % 3), (random.normal(size=(20, 5)), ["a", "b"] * 10)]
    made = table(datasets=data, names=["first", "second"])
    assert made.properties == [dataset_properties(*pair) for pair in data]
    part = made.subset([1])
    assert part.names == ["second"] and len(part) == 1 and part.data[0][0] is made.data[1][0]
    assert table().subset([1]).data is None and table().names == ["0", "1"]


def test_a_table_comes_back_from_its_file(tmp_path):
    table().save(tmp_path / "table.json")
    back = PriorEvaluations.load(tmp_path / "table.json")
    assert (back.space, back.properties, back.names) == (table().space, DATASETS, ["0", "1"])
    assert back.configurations == CONFIGURATIONS and back.integers == {"units"}
    np.testing.assert_array_equal(back.scores, table().scores)
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="A table as JSON must be what PriorEvaluations wrote. Received: TypeError"):
        PriorEvaluations.load(tmp_path / "other.json")


@pytest.mark.parametrize("changes, error, rule", [
    ({"space": [1]}, TypeError, "space must be a dictionary from names to pairs"),
    ({"space": {}}, ValueError, "space must have at least one hyperparameter"),
    ({"space": {1: (0, 1)}}, TypeError, "Names of hyperparameters must be strings. Received: 1"),
    ({"space": {"momentum": (1.0, 1.0)}}, ValueError, r"with low < high. Received: momentum=\(1.0, 1.0\)"),
    ({"space": {"momentum": (0.0, math.inf)}}, ValueError, "of finite numbers with low < high"),
    ({"space": {"momentum": 3}}, ValueError, "Received: momentum=3"),
    ({"datasets": np.zeros([2, 2])}, TypeError, "datasets must be a list. Received: ndarray"),
    ({"datasets": []}, ValueError, "datasets must have at least one entry"),
    ({"datasets": [DATASETS[0], {"n": 3.0}]}, ValueError, "must have the same properties: n, p. Received: data set "),
    ({"datasets": [DATASETS[0], {"n": 3.0, "p": math.nan}]}, ValueError, "finite numbers under names. Received: 'p': "),
    ({"datasets": [DATASETS[0], {"n": 3.0, "p": "4"}]}, ValueError, "data set '1' must be finite numbers"),
    ({"datasets": [{}, {}]}, ValueError, "must have at least one property"),
    ({"datasets": [DATASETS[0], (np.zeros([3, 2]), [0, 1, 0])]}, TypeError, "all alike. Received: data set '0'"),
    ({"datasets": [3, 4]}, TypeError, "datasets must be dictionaries of properties, or pairs"),
    ({"configurations": []}, ValueError, "configurations must have at least one entry"),
    ({"configurations": [*CONFIGURATIONS[:2], 3]}, TypeError, r"dictionary .* Received: configurations\[2\]=3"),
    ({"configurations": [*CONFIGURATIONS[:2], {"momentum": 0.1}]}, ValueError,
     "must have the names of the space: learning_rate, momentum, units. Received: .* with momentum"),
    ({"configurations": [*CONFIGURATIONS[:2], {**CONFIGURATIONS[2], "rho": 1}]}, ValueError, "with .*, rho"),
    ({"configurations": [*CONFIGURATIONS[:2], {**CONFIGURATIONS[2], "momentum": 0.95}]}, ValueError,
     r"in its range from 0 to 0.9. Received: configurations\[2\]\['momentum'\]=0.95"),
    ({"configurations": [*CONFIGURATIONS[:2], {**CONFIGURATIONS[2], "momentum": math.nan}]}, ValueError, "=nan"),
    ({"scores": "abc"}, TypeError, "scores must be an array of numbers"),
    ({"scores": [[1.0, 2.0], [3.0]]}, TypeError, "scores must be an array of numbers"),
    ({"scores": np.zeros([3, 2])}, ValueError, r"here \(2, 3\). Received: \(3, 2\)"),
    ({"scores": [[0.1, math.inf, 0.3], [1, 2, 3]]}, ValueError, "Received: inf for data set '0' and configuration 1"),
    ({"scores": [[0.1, 0.2, 0.3], [math.nan] * 3]}, ValueError, "at least one score. Received: NaN only for 1"),
    ({"names": "ab"}, TypeError, "names must be a list of strings"),
    ({"names": ["a", "a"]}, ValueError, "all different"),
    ({"names": ["a"]}, ValueError, "one for each of the 2 data sets"),
])
def test_a_table_that_is_none_is_an_error_that_names_the_rule(changes, error, rule):
    with pytest.raises(error, match=rule):
        table(**changes)


@pytest.mark.parametrize("indices", [[2], [-1], [0.5]])
def test_a_part_of_a_table_has_indices_of_its_data_sets(indices):
    with pytest.raises(ValueError, match="An index of a data set must be an integer from 0 to 1"):
        table().subset(indices)


def test_properties_are_those_of_their_definitions():
    x = np.array([[0.0, 10.0], [2.0, 10.0], [0.0, 30.0], [2.0, 30.0]])
    found = dataset_properties(x, [1, 0, 1, 1])
    # Standardised features differ by 2 where they differ: squared distances are 4, 4 and 8.
    assert found == {"n": 4, "p": 2, "m": 2, "p_encoded": 2, "majority_share": 0.75, "categorical_share": 0,
                     "variance": np.var(x), "median_kernel_distance": 0.25}
    assert found == dataset_properties(x, [1, 0, 1, 1]) == dataset_properties(x, [[1], [0], [1], [1]])
    assert found == dataset_properties(x, [[0, 1], [1, 0], [0, 1], [0, 1]]) == dataset_properties(x, list("baбб")) or (
        found["majority_share"] == 0.75)
    images = dataset_properties(np.zeros([6, 3, 3, 1], "uint8"), np.arange(6.0) % 3)
    assert (images["n"], images["p"], images["m"], images["variance"], images["median_kernel_distance"]) == (
        6, 9, 3, 0, 0)
    mixed = dataset_properties(np.array([["red", 1.5], ["blue", 2.5], ["red", 3.5]], object), [0, 1, 0])
    assert (mixed["categorical_share"], mixed["p_encoded"]) == (0.5, 3)
    chosen = dataset_properties([[0, 5], [1, 7], [2, 9]], [0, 1, 0], categorical=[0, 1])
    assert (chosen["categorical_share"], chosen["p_encoded"]) == (1, 6)


@pytest.mark.parametrize("x, y, options, error, rule", [
    ([[1.0], [math.nan]], [0, 1], {}, ValueError, "x must be finite: fill in missing values first. Received: 1"),
    ([[1.0], [math.inf]], [0, 1], {}, ValueError, "x must be finite"),
    ([[1e300], [-1e300]], [0, 1], {}, ValueError, "whose squares are finite. Received: entries up to 1e"),
    ([[1.0], [math.nan]], [0, 1], {"categorical": [0]}, ValueError, "x must be finite"),
    (np.zeros([0, 3]), [], {}, ValueError, r"at least one number. Received: shape \(0, 3\)"),
    (3.0, [0], {}, ValueError, r"Received: shape \(\)"),
    (np.zeros([2, 1], complex), [0, 1], {}, TypeError, "x must be an array of numbers. Received: dtype complex128"),
    ([[1.0], [2.0]], [0, 1, 0], {}, ValueError, "same number of examples. Received: 2 and 3"),
    ([[1.0], [2.0]], [], {}, ValueError, "y must be of shape"),
    ([[1.0], [2.0]], np.zeros([2, 2, 2]), {}, ValueError, "y must be of shape"),
    ([[1.0], [2.0]], [0.5, 1.0], {}, ValueError, "y must hold classes"),
    ([[1.0], [2.0]], [math.nan, 1.0], {}, ValueError, "y must hold classes"),
    ([[1.0], [2.0]], [[0, 2], [1, 0]], {}, ValueError, "y with two axes must be one-hot"),
    ([[1.0], [2.0]], [1j, 2j], {}, TypeError, "y must be an array of classes"),
    ([[1.0], [2.0]], np.array([None, 1]), {}, TypeError, "y must be an array of classes.* NoneType"),
    ([[1.0], [2.0]], [0, 1], {"categorical": [1]}, ValueError, "An index of a categorical feature must be"),
    ([[1.0], [2.0]], [0, 1], {"categorical": 0}, TypeError, "categorical must be a list of indices"),
    ([[1.0], [2.0]], [0, 1], {"seed": -1}, ValueError, "seed must be an integer of at least 0"),
])
def test_what_has_no_properties_is_an_error_that_names_the_rule(x, y, options, error, rule):
    with pytest.raises(error, match=rule):
        dataset_properties(x, y, **options)


def four(scores, **changes):
    space = {"rate": (1.0, 4.0)}
    return PriorEvaluations(space, [{"n": float(10 ** i)} for i in range(len(scores))],
                            [{"rate": float(i)} for i in (1, 2, 3, 4)], scores, **changes)


def test_the_best_on_average_and_the_portfolio_are_those_of_the_greedy_rule():
    # Good for all; best for the first two; best for the third; bad for all.
    made = four([[0.8, 1, 0, 0], [0.8, 1, 0, 0], [0.8, 0, 1, 0]])
    assert best_on_average(made) == {"rate": 1.0}
    assert [entry["rate"] for entry in portfolio(made, 3)] == [1.0, 2.0, 3.0]
    # Nothing more is gained: what is left follows by its mean.
    assert [entry["rate"] for entry in portfolio(made, 4)] == [1.0, 2.0, 3.0, 4.0]
    # Tried on one data set only, and the best there, it is not the best on average.
    rare = four([[0.9, 1, 0, 0], [0.9, math.nan, 0, 1], [0.9, math.nan, 0, 1]])
    assert best_on_average(rare) == {"rate": 1.0}


@pytest.mark.parametrize("size", [0, 5, 1.5, True])
def test_a_portfolio_has_at_most_the_configurations_of_the_table(size):
    with pytest.raises(ValueError, match="size must be an integer from 1 to 4. Received: "):
        portfolio(four([[0, 1, 2, 3]]), size)


@pytest.mark.parametrize("function", [best_on_average, portfolio])
def test_baselines_need_a_table(function):
    with pytest.raises(TypeError, match="table must be a PriorEvaluations. Received: dict"):
        function({})


def test_neighbours_are_those_of_similar_rank_and_propose_their_best():
    made = four([[0, 1, 0, 0], [0, 0, 1, 0.9], [1, 0.5, 0, 0.9]])
    assert nearest_by_properties(made, {"n": 5e9}).tolist() == [2, 1, 0]
    assert nearest_by_properties(made, {"n": 3.0}).tolist()[0] in (0, 1)
    assert [entry["rate"] for entry in neighbour_order(made, [2, 1, 0], 2)] == [1.0, 3.0]
    assert [entry["rate"] for entry in neighbour_order(made, [2, 1, 0], 4)] == [1.0, 3.0, 2.0, 4.0]
    assert neighbour_mean_order(made, [2, 1, 0], 1, neighbours=2) == [{"rate": 4.0}]
    with pytest.raises(ValueError, match="properties must have what the table has: n. Received: none of the name n"):
        nearest_by_properties(made, {"p": 3.0})

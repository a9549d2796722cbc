"""The encoder of data sets: distances that it learns, neighbours, starts, what it keeps."""

import pickle

import keras
import numpy as np
import pytest

from farhox.starts import DatasetEncoder, PriorEvaluations

GAMMAS = np.geomspace(1e-3, 10, 12)


def planted(count, seed):
    """Data sets whose best gamma is the inverse of their variance, which arrays show and no count does."""
    draw = np.random.default_rng(seed)
    scales = np.exp(draw.uniform(-1.5, 1.5, count))
    data = [(scale * draw.normal(size=(50, int(draw.integers(2, 5)))), np.arange(50) % 3) for scale in scales]
    scores = [-np.abs(np.log(GAMMAS * scale ** 2)) for scale in scales]
    table = PriorEvaluations({"gamma": (1e-3, 10.0)}, data, [{"gamma": float(gamma)} for gamma in GAMMAS], scores)
    return table, data, scales


def small(**changes):
    return DatasetEncoder(**{"size": 3, "units": 16, "rows": 32, "features": 4, "classes": 2, "steps": 150, **changes})


@pytest.fixture(scope="module")
def encoder():
    return small().fit(planted(14, 0)[0])


def test_the_loss_falls_clearly_below_the_variance_of_its_targets_on_new_data_sets_too(encoder):
    assert isinstance(encoder, keras.Model)
    for seed, share in ((0, 0.3), (1, 0.4)):
        loss, variance = encoder.distance_loss(planted(14, seed)[0])
        assert loss < share * variance
    assert np.mean(encoder.training_losses[-20:]) < 0.3 * encoder.training_losses[0]


def test_neighbours_have_similar_best_values_and_a_start_beats_the_best_on_average(encoder):
    table, _, scales = planted(14, 0)
    from farhox.starts import best_on_average
    constant, errors, constants = best_on_average(table)["gamma"], [], []
    for (x, y), scale in zip(*planted(10, 2)[1:]):
        assert encoder.nearest(x, y, k=3) == np.argsort(encoder.distances(x, y))[:3].tolist()
        errors.append(abs(np.log(encoder.start(x, y)["gamma"] * scale ** 2)))
        constants.append(abs(np.log(constant * scale ** 2)))
    assert np.mean(errors) < 0.6 * np.mean(constants)
    x, y = planted(14, 0)[1][5]
    assert encoder.nearest(x, y)[0] == 5 and isinstance(encoder.nearest(x, y)[0], int)


def test_an_encoder_comes_back_from_its_file_and_from_pickle_with_what_it_learned(encoder, tmp_path):
    x, y = planted(3, 3)[1][0]
    encoder.save(tmp_path / "encoder.keras")
    for back in (keras.saving.load_model(tmp_path / "encoder.keras"), pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_allclose(back.distances(x, y), encoder.distances(x, y), rtol=1e-6)
        assert back.suggest((x, y), 3) == encoder.suggest((x, y), 3) and back.space == {"gamma": (1e-3, 10.0)}
        assert back.training_losses == encoder.training_losses


def test_the_same_seed_gives_the_same_codes_another_others_and_fit_begins_anew(eagerly):
    table, data, _ = planted(4, 4)
    made = small(steps=3).fit(table)
    first = made.distances(*data[0])
    np.testing.assert_array_equal(made.fit(table).distances(*data[0]), first)
    other = made.unfitted()
    properties_only = PriorEvaluations(table.space, table.properties, table.configurations, table.scores)
    np.testing.assert_array_equal(other.fit(properties_only, data).distances(*data[0]), first)
    assert np.max(np.abs(small(steps=3, seed=1).fit(table).distances(*data[0]) - first)) > 1e-3


def test_pairs_without_a_common_configuration_are_left_out(eagerly):
    _, data, _ = planted(3, 5)
    nan = np.nan
    scores = [[0, 1, nan, nan], [1, 0, nan, nan], [nan, nan, 0, 1]]
    configurations = [{"gamma": gamma} for gamma in (0.1, 0.2, 0.3, 0.4)]
    table = PriorEvaluations({"gamma": (0.1, 0.4)}, data, configurations, scores)
    made = small(steps=2).fit(table)
    loss, variance = made.distance_loss(table)
    assert np.isfinite(loss) and variance == 0  # One pair is left.
    with pytest.raises(ValueError, match="Two data sets at least must have a configuration that was evaluated on both"):
        made.fit(table.subset([0, 2]))


def test_what_an_encoder_cannot_read_is_an_error_that_names_the_rule(encoder):
    table, data, _ = planted(3, 6)
    bare = PriorEvaluations(table.space, table.properties, table.configurations, table.scores)
    for call, error, rule in (
            (lambda: small().fit([]), TypeError, "table must be a PriorEvaluations"),
            (lambda: small().fit(bare), ValueError, "reads data sets as arrays. Received: a table of properties only"),
            (lambda: small().fit(bare, data[:2]), ValueError, "one for each data set .* Received: 2 for 3"),
            (lambda: small().fit(table.subset([0])), ValueError, "at least two. Received: 1 for 1"),
            (lambda: small().fit(bare, 3), TypeError, r"datasets must be a list of pairs \(x, y\). Received: int"),
            (lambda: small().fit(bare, [*data[:2], 3]), TypeError, r"must be a pair \(x, y\)"),
            (lambda: small().fit(bare, [*data[:2], ([[np.nan]], [0])]), ValueError, "x must be finite"),
            (lambda: small().fit(bare, [*data[:2], (np.zeros([3, 1]), [0, 1])]), ValueError, "same number of examples"),
            (lambda: small().nearest(*data[0]), ValueError, "The encoder must have learned from a table: call fit"),
            (lambda: small().space, ValueError, "The encoder must have learned from a table"),
            (lambda: encoder.nearest(*data[0], k=15), ValueError, "k must be an integer from 1 to 14. Received: 15"),
            (lambda: encoder.suggest({"n": 1.0}), TypeError, r"must be a pair \(x, y\)"),
            (lambda: encoder.suggest(data[0], 0), ValueError, "count must be a positive integer"),
            (lambda: encoder.start(data[0][0], data[0][1] + 0.5), ValueError, "y must hold classes")):
        with pytest.raises(error, match=rule):
            call()


@pytest.mark.parametrize("settings", [{"size": 0}, {"units": 1.5}, {"batch_size": 1}, {"learning_rate": 0.0},
                                      {"seed": -1}, {"neighbours": 0}])
def test_settings_out_of_range_are_an_error(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be "):
        DatasetEncoder(**settings)

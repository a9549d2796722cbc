"""Episodes: classes, counts, seeds, order; splits by class, rotations, Omniglot; the prototypical network over them."""

import os
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import meta
from farhox.meta import omniglot

# Every image is its own number, so that what was drawn can be told.
IMAGES = np.arange(60, dtype="float32").reshape(60, 1)
LABELS = np.repeat([7, 3, 11, 2, 5, 9], [10, 9, 11, 10, 8, 12])


def source(**settings):
    return meta.ClassificationEpisodes(IMAGES, LABELS, **{"ways": 4, "shots": 2, "queries": 3, **settings})


def test_an_episode_has_distinct_classes_and_examples_and_labels_by_place():
    seen = set()
    for index in range(40):
        (x, y), (query_x, query_y) = source().draw(tf.constant(index, tf.int64))
        np.testing.assert_array_equal(y, [0, 0, 1, 1, 2, 2, 3, 3])
        np.testing.assert_array_equal(query_y, np.repeat(range(4), 3))
        drawn = np.concatenate([x, query_x]).astype(int).ravel()
        assert len(set(drawn)) == 20
        classes = LABELS[x.numpy().astype(int).ravel()].reshape(4, 2)
        assert len(set(classes[:, 0])) == 4 and np.all(classes[:, 0] == classes[:, 1])
        np.testing.assert_array_equal(LABELS[query_x.numpy().astype(int).ravel()].reshape(4, 3), classes[:, [0] * 3])
        seen |= set(drawn)
    assert seen == set(range(60))  # The last example of the largest class too.


def test_classes_and_examples_are_drawn_evenly():
    counts = np.zeros(60)
    for support, query in source(shots=1, queries=1).dataset(100, count=600):
        counts += np.bincount(np.concatenate([np.ravel(support[0]), np.ravel(query[0])]).astype(int), minlength=60)
    expected = 600 * (4 / 6) * 2 / np.array([10, 9, 11, 10, 8, 12])[np.searchsorted(
        np.cumsum([10, 9, 11, 10, 8, 12]), np.arange(60), side="right")]
    assert np.sum((counts - expected) ** 2 / expected) < 110  # 60 places; chi-squared passes this once in 10,000.


def test_episode_k_of_a_seed_is_always_the_same():
    batches = [list(source(seed=seed).dataset(size, start, 6)) for seed, size, start in (
        (1, 2, 0), (1, 3, 0), (1, 2, 0), (2, 2, 0), (1, 2, 2))]
    flat = [np.concatenate([batch.support[0] for batch in part]) for part in batches]
    np.testing.assert_array_equal(flat[0], flat[1])
    np.testing.assert_array_equal(flat[0], flat[2])
    assert not np.array_equal(flat[0], flat[3])
    np.testing.assert_array_equal(flat[0][2:], flat[4][:4])
    assert not np.array_equal(flat[0][0], flat[0][1])


@pytest.mark.slow
def test_shards_share_out_the_meta_batches():
    whole = [batch.support[0] for batch in source().dataset(2, 4, count=12)]
    parts = [[batch.support[0] for batch in source().dataset(2, 4, 12, shards=3, shard=shard)] for shard in range(3)]
    np.testing.assert_array_equal(whole, [part[i] for i in range(2) for part in parts])


def test_data_sets_have_known_shapes_and_no_end_unless_given():
    endless = source().dataset(2)
    assert endless.cardinality() == tf.data.INFINITE_CARDINALITY
    assert endless.element_spec.support[0].shape == (2, 8, 1)
    assert int(source().dataset(2, count=6).cardinality()) == 3


def test_bytes_are_drawn_as_fractions():
    images = np.full([12, 2, 2, 1], 255, np.uint8)
    support, _ = meta.ClassificationEpisodes(images, np.repeat([0, 1], 6), ways=2, shots=1, queries=1).draw(
        tf.constant(0, tf.int64))
    assert support[0].dtype == tf.float32 and np.all(support[0] == 1.0)


def test_sinusoids_have_the_amplitudes_and_phases_of_the_paper():
    episodes = meta.SinusoidEpisodes(shots=10, queries=5, seed=3)
    curves = np.array([episodes.curve(index) for index in range(300)])
    assert 0.1 <= curves[:, 0].min() < 0.3 and 4.8 < curves[:, 0].max() <= 5.0
    assert 0.0 <= curves[:, 1].min() < 0.1 and 3.0 < curves[:, 1].max() <= np.pi
    (x, y), (query_x, query_y) = episodes.draw(tf.constant(7, tf.int64))
    assert x.shape == (10, 1) and query_x.shape == (5, 1)
    amplitude, phase = episodes.curve(7)
    np.testing.assert_allclose(y, amplitude * np.sin(x - phase), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(query_y, amplitude * np.sin(query_x - phase), rtol=1e-5, atol=1e-5)
    assert np.abs(np.concatenate([x, query_x])).max() <= 5.0


def test_parts_of_a_split_share_no_class():
    parts = meta.split_classes(IMAGES, LABELS, [2, 1, None], seed=1)
    classes = [set(labels) for _, labels in parts]
    assert [len(part) for part in classes] == [2, 1, 3]
    assert set.union(*classes) == set(LABELS)
    assert sum(len(images) for images, _ in parts) == 60
    for images, labels in parts:
        np.testing.assert_array_equal(LABELS[images.astype(int).ravel()], labels)
    again = meta.split_classes(IMAGES, LABELS, [2, 1, None], seed=2)
    assert [set(labels) for _, labels in again] != classes


def test_rotations_are_classes_of_their_own():
    images = np.arange(18, dtype="uint8").reshape(2, 3, 3, 1)
    turned, labels = meta.with_rotations(images, np.array([4, 9]))
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(turned[:2], images)
    np.testing.assert_array_equal(turned[2, ..., 0], [[2, 5, 8], [1, 4, 7], [0, 3, 6]])
    np.testing.assert_array_equal(turned[4], images[0, ::-1, ::-1])


@pytest.mark.parametrize("settings, message", [
    ({"ways": 0}, "ways must be a positive integer. Received: 0"),
    ({"shots": 1.5}, "shots must be a positive integer"), ({"queries": True}, "queries must be a positive integer"),
    ({"seed": -1}, "seed must be a non-negative integer"), ({"ways": 7}, "Received: 6 classes for ways=7"),
    ({"queries": 7}, "class 5 of 8 examples for shots=2 and queries=7")])
def test_wrong_settings_are_errors_that_state_the_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        source(**settings)


@pytest.mark.parametrize("call, message", [
    (lambda: meta.ClassificationEpisodes(IMAGES[1:], LABELS), "59 images and 60 labels"),
    (lambda: meta.ClassificationEpisodes(IMAGES, LABELS / 2), "labels must be integers"),
    (lambda: source().dataset(0), "meta_batch_size must be a positive integer"),
    (lambda: source().dataset(2, start=-1), "start must be a non-negative integer"),
    (lambda: source().dataset(4, count=6), "count=6, meta_batch_size=4"),
    (lambda: source().dataset(2, shards=0), "shards must be a positive integer"),
    (lambda: source().dataset(2, shards=2, shard=2), "non-negative integer below shards=2. Received: 2"),
    (lambda: meta.split_classes(IMAGES, LABELS, [4, 3]), r"Received: \[4, 3\] for 6 classes"),
    (lambda: meta.split_classes(IMAGES, LABELS, [None, 3]), "only the last may be None"),
    (lambda: meta.with_rotations(np.zeros([2, 3, 4, 1]), [0, 1]), "height = width. Received shape"),
    (lambda: meta.SinusoidEpisodes(shots=0), "shots must be a positive integer")])
def test_wrong_arguments_are_errors_that_state_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_sources_of_episodes_are_judged_by_the_protocol():
    with pytest.raises(TypeError, match="must come from a farhox.meta.EpisodeSource.*Received: list"):
        meta.evaluate_episodes(lambda batch: {}, [])
    with pytest.raises(ValueError, match="The number of episodes must be a positive integer. Received: 0"):
        meta.evaluate_episodes(lambda batch: {}, source(), 0)


def test_every_episode_is_judged_once_whatever_the_meta_batches():
    for meta_batch_size in (3, 10):
        sizes = []

        def judge(batch):
            sizes.append(batch.query[0].shape[0])
            return {"sum": tf.reduce_sum(batch.query[0], axis=[1, 2])}

        result = meta.evaluate_episodes(judge, source(), 7, meta_batch_size)
        sums = [tf.reduce_sum(source().draw(tf.constant(index, tf.int64)).query[0]) for index in range(7)]
        assert sum(sizes) == result["episodes"] == 7 and max(sizes) <= meta_batch_size
        np.testing.assert_allclose(result["sum"], np.mean(sums))


def test_intervals_are_two_standard_errors_wide():
    values = np.random.default_rng(0).normal(3.0, 2.0, 10000)
    mean, interval = meta.mean_and_interval(values)
    assert mean == pytest.approx(3.0, abs=0.1) and interval == pytest.approx(1.96 * 2.0 / 100, rel=0.03)
    assert np.isnan(meta.mean_and_interval([1.0])[1])
    # The variance of few values is about their own mean: 2, and the error of their mean 1.
    assert meta.mean_and_interval([1.0, 3.0]) == pytest.approx((2.0, 1.96))


@pytest.mark.skipif("FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")
@pytest.mark.slow
def test_omniglot_is_ink_on_paper_split_by_character_and_read_once(tmp_path, monkeypatch):
    parts = meta.load_omniglot(os.environ["FARHOX_DATA_DIR"], cache_dir=tmp_path, download=False, rotations=False)
    assert [len(np.unique(labels)) for _, labels in parts] == [1200, 100, 323]
    assert [images.shape for images, _ in parts] == [(20 * n, 28, 28, 1) for n in (1200, 100, 323)]
    assert all(np.all(np.unique(labels, return_counts=True)[1] == 20) for _, labels in parts)
    train = parts[0][0]
    assert train.dtype == np.uint8 and train.max() > 200 and 0.04 < train.mean() / 255 < 0.15
    assert np.mean(train[:, 0] == 0) > 0.95  # Paper at the upper edge.
    # Other settings, from the file.
    monkeypatch.setattr(omniglot, "_read", None)
    again = meta.load_omniglot(os.environ["FARHOX_DATA_DIR"], cache_dir=tmp_path, download=False)
    np.testing.assert_array_equal(again[1][0][:2000], parts[1][0])
    assert len(np.unique(again[0][1])) == 4800


def test_omniglot_without_the_package_that_reads_it_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"load_omniglot reads .* pip install 'farhox\[omniglot\]'"):
        meta.load_omniglot(tmp_path, cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.ModuleType("tensorflow_datasets"))
    with pytest.raises(ImportError, match="not installed or does not work .cannot import name 'load'"):
        meta.load_omniglot(tmp_path, cache_dir=tmp_path)


def test_the_cache_of_omniglot_is_one_of_each_folder_and_checked(tmp_path, monkeypatch):
    def read(source, download):
        reads.append((source.name, download))
        number = len(reads)
        return np.full([40, 28, 28, 1], number, np.uint8), np.repeat(np.arange(4), 10)

    def first_image(folder):
        parts = meta.load_omniglot(tmp_path / folder, 2, 1, cache_dir=tmp_path / "cache", download=False)
        return parts[0][0][0, 0, 0, 0]

    reads = []
    monkeypatch.setattr(omniglot, "_read", read)
    assert [first_image("a"), first_image("a"), first_image("b"), first_image("a")] == [1, 1, 2, 1]
    assert reads == [("a", False), ("b", False)]
    (tmp_path / "a" / "omniglot" / "4.0.0").mkdir(parents=True)  # A newer version of the data.
    assert [first_image("a"), first_image("a")] == [3, 3]
    for damage in (lambda content: content[:100], lambda content: content[:-200] + b"0" * 100 + content[-100:],
                   lambda content: b"", lambda content: content.replace(b"digest", b"tsegid")):
        (file, *_) = (file for file in (tmp_path / "cache").iterdir() if np.load(file)["images"].max() == len(reads))
        file.write_bytes(damage(file.read_bytes()))
        with pytest.warns(UserWarning, match=f"The cached images in {file} are damaged: they are read again from"):
            assert first_image("a") == len(reads)


def prototypes():
    """A network on points of a plane, and episodes of five classes of them."""
    random = np.random.default_rng(0)
    centers = random.normal(size=[10, 4])
    points = np.repeat(centers, 12, axis=0) + 0.6 * random.normal(size=[120, 4])
    episodes = meta.ClassificationEpisodes(points.astype("float32"), np.repeat(np.arange(10), 12), 5, 3, 4)
    embedding = keras.Sequential([keras.Input([4]), keras.layers.Dense(8, "relu"), keras.layers.BatchNormalization(),
                                  keras.layers.Dense(3)])
    return meta.PrototypicalNetwork(embedding, 5), episodes


def test_prototypes_are_class_means_and_classify_by_squared_distance():
    learner, episodes = prototypes()
    support, query = episodes.draw(tf.constant(0, tf.int64))
    features, others = learner.embedding(support[0]).numpy(), learner.embedding(query[0]).numpy()
    means = features.reshape(5, 3, 3).mean(1)
    scores = -((others[:, None] - means[None]) ** 2).sum(-1)
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(learner.predict(support, query[0]), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(learner.adapt(support)(query[0]), expected, rtol=1e-4, atol=1e-6)
    # The order of the support examples does not matter.
    order = np.random.default_rng(0).permutation(15)
    shuffled = (tf.gather(support[0], order), tf.gather(support[1], order))
    np.testing.assert_allclose(learner.predict(shuffled, query[0]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_prototypical_network_learns():
    learner, episodes = prototypes()
    learner.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    before = learner.evaluate(episodes, episodes=40)
    history = learner.fit(episodes.dataset(4, start=100), epochs=1, steps_per_epoch=80, verbose=0,
                          validation_data=episodes.dataset(4, count=8)).history
    after = learner.evaluate(episodes, episodes=40)
    assert {"loss", "accuracy", "val_accuracy"} <= set(history)
    assert after["loss"] < before["loss"] - before["loss_interval"] and after["transductive"] is False


@pytest.mark.parametrize("embedding, ways, error, message", [
    ("cnn", 5, TypeError, "embedding must be a keras.Model"),
    (keras.Sequential([keras.layers.Dense(2)]), 5, ValueError, "embedding must be built"),
    (keras.Sequential([keras.Input([2]), keras.layers.Dense(2)]), 0, ValueError, "ways must be a positive integer")])
def test_wrong_prototypical_networks_are_refused(embedding, ways, error, message):
    with pytest.raises(error, match=message):
        meta.PrototypicalNetwork(embedding, ways)


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
def test_networks_have_the_size_of_the_papers(downsampling):
    body = meta.convolutional_body(downsampling=downsampling)
    assert body.output_shape == (None, 2 * 2 * 64)
    model = meta.few_shot_classifier(5, body)
    # Convolutions with bias, batch norm with scale and offset, a dense layer from 256 to 5.
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == (
        9 * 64 + 3 * 9 * 64 * 64 + 4 * 64 + 4 * 2 * 64 + 256 * 5 + 5)
    short = meta.convolutional_body(downsampling=downsampling, normalize_features=True)
    assert body.count_params() == short.count_params()
    features = short(np.random.default_rng(0).normal(size=[3, 28, 28, 1]))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)
    assert meta.few_shot_classifier(3, meta.residual_body(filters=(4, 8), features=6)).output_shape == (None, 3)
    with pytest.raises(ValueError, match="downsampling must be 'stride' or 'pool'. Received: 'none'"):
        meta.convolutional_body(downsampling="none")


@pytest.mark.slow
@pytest.mark.one_case
@pytest.mark.parametrize("normalize_features", [True, False])
def test_inner_training_on_normalized_features_never_rises_at_a_rate_below_two(normalize_features):
    keras.utils.set_random_seed(0)
    body = meta.convolutional_body(filters=4, normalize_features=normalize_features)
    body.layers[-3 - normalize_features].gamma.assign(np.full(4, 30.0))  # Long features, as meta-training makes them.
    model = keras.Sequential([body, keras.layers.Dense(2, activation="softmax")])
    rate = farhox.Hyperparameter(1.99, low=0.0, high=2.0, name="rate")
    problem = farhox.supervised_problem(
        model, dynamics=farhox.GradientDescent(rate), representation=[body], outer_variables=[rate])
    # The same image in both classes: the curvature is greatest where probabilities are even, and that is the minimum.
    image = np.random.default_rng(0).normal(size=[1, 28, 28, 1])
    batch = np.repeat(image, 2, axis=0).astype("float32"), np.array([0, 1])
    model.layers[-1].bias.assign([1.0, -1.0])
    losses = problem.evaluate(farhox.repeat(batch, 50), batch).inner_losses
    rises = np.max(np.diff(losses))
    assert rises <= 1e-6 if normalize_features else rises > 0.1
    assert not normalize_features or losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_data_that_start_at_the_episodes_seen_go_on_as_if_never_interrupted(tmp_path):
    def learner():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([8, 8, 1]), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")])
        learner = meta.Reptile(model, inner_steps=2, batch_size=2)
        learner.compile(keras.optimizers.Adam(0.1))
        return learner

    def fit(learner, epochs):
        data = episodes.dataset(2, start=learner.episodes_seen)
        learner.fit(data, epochs=epochs, steps_per_epoch=2, verbose=0)
        return data

    images = np.random.default_rng(0).random([48, 8, 8, 1]).astype("float32")
    episodes = meta.ClassificationEpisodes(images, np.repeat(np.arange(6), 8), ways=3, shots=2, queries=2)
    whole, first, second = learner(), learner(), learner()
    fit(whole, 3)
    fit(first, 1)
    first.save_weights(tmp_path / "learner.weights.h5")
    data = episodes.dataset(2, start=second.episodes_seen)  # Made before the weights are there.
    second.load_weights(tmp_path / "learner.weights.h5")
    second.fit(data, epochs=1, steps_per_epoch=2, verbose=0)
    fit(second, 1)
    assert int(second.episodes_seen) == int(whole.episodes_seen) == 12
    for a, b in zip(second.get_weights(), whole.get_weights()):
        np.testing.assert_array_equal(a, b)
    assert data.cardinality() == tf.data.INFINITE_CARDINALITY
    some = episodes.dataset(2, start=whole.episodes_seen, count=4)
    assert some.cardinality() == 2
    for (x, _), number in zip((x for element in some.unbatch() for x in [element.support]), range(12, 16)):
        np.testing.assert_array_equal(x, episodes.draw(number).support[0])

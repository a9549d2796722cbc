"""What people pass by mistake to `farhox.meta` and `farhox.export`, and the error that names it: one row for each."""

import functools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import farhox
from farhox import export, meta
from farhox.hypergradients import EpisodesHG

X = np.random.default_rng(0).random((36, 4)).astype("float32")
Y = np.repeat(np.arange(6), 6)
SUPPORT = X[:6], np.arange(6) % 3
QUERY = X[6:9]
SPOILT = np.where(np.arange(24).reshape(6, 4) == 9, np.nan, X[:6])


def model(outputs=3):
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(outputs, "softmax")])


@functools.cache
def shared():
    """A tiny learner of each kind, a source of episodes, an episode of it, and exports."""
    source = meta.ClassificationEpisodes(X, Y, ways=3, shots=2, queries=4)
    maml = meta.MAML(model(), 0.1, 1)
    reference = meta.PrototypicalNetwork(model(), 3)
    for learner in (maml, reference):
        learner.compile(keras.optimizers.SGD(0.1))
    return types.SimpleNamespace(
        source=source, maml=maml, reference=reference, episode=source.draw(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    export.saved_model(model(), folder / "plain", serialized_examples=True)
    export.saved_model(shared().maml, folder / "maml")
    sequence = keras.Sequential([keras.Input([None, 4]), keras.layers.GlobalAveragePooling1D()])
    export.saved_model(sequence, folder / "sequence")
    return folder


class Wrong(meta.EpisodeSource):
    """A source that forgets the labels."""

    def draw(self, index):
        return tf.zeros([3, 4]), tf.zeros([3])


class Spoilt(meta.EpisodeSource):
    """A source whose fourth episode holds NaN."""

    def draw(self, index):
        (x, y), query = shared().source.draw(index)
        return meta.Episode((tf.where(tf.equal(index, 3), float("nan"), x), y), query)


def rows(*names):
    """Rows for both kinds of learners."""
    return [pytest.param(name, *row, id=f"{name} {row[0].__name__} {number}") for name in names for number, row in
            enumerate(LEARNER_ROWS)]


def fit(learner, data):
    learner.fit(data, verbose=0)


def evaluate(learner, data):
    learner.evaluate(data, verbose=0)


def predict(learner, arguments):
    learner.predict(*arguments)


def adapt(learner, support):
    learner.adapt(support)


DATA, BATCHED = "A learner takes a tf.data.Dataset of episodes", "Episodes must come in meta-batches"
LEARNER_ROWS = [
    (fit, lambda: None, TypeError, f"{DATA}.* Received: NoneType"),
    (fit, lambda: "episodes", TypeError, f"{DATA}.* Received: str"),
    (fit, lambda: (episode for episode in [shared().episode]), TypeError, f"{DATA}.* Received: generator"),
    (fit, lambda: [shared().episode] * 3, TypeError, f"{DATA}.* Received: 3 episodes in a list"),
    (fit, lambda: shared().source, TypeError, "Received a source of episodes, ClassificationEpisodes: call its method"),
    (fit, lambda: (X, Y), TypeError, f"{DATA}.* Received: tuple"),
    (fit, lambda: meta.Episode((X[None], Y), (X[None], Y)), ValueError,
     f"{BATCHED}.* Received: support labels of shape"),
    (fit, lambda: shared().source.dataset(2, count=2).take(0), ValueError, "at least one meta-batch .* an empty one"),
    (fit, lambda: tf.data.Dataset.from_tensors((X, Y)), ValueError, "A learner takes episodes.* Received: tuple of 2"),
    (fit, lambda: tf.data.Dataset.from_tensors(X), ValueError, "A learner takes episodes.* Received: TensorSpec"),
    (fit, lambda: meta.Episode((X[None], Y[None, :5]), (X[None], Y[None])), ValueError, "same number of examples"),
    (fit, lambda: meta.Episode((X[None], Y[None]), (X[None, :0], Y[None, :0])), ValueError, "must have query examples"),
    (fit, lambda: meta.Episode((X[None, :, :3], Y[None]), (X[None], Y[None])), ValueError,
     r"support inputs must have shape \[episodes, examples, 4\]"),
    (fit, lambda: meta.Episode((X[None], 9 + Y[None]), (X[None], Y[None] % 3)), ValueError, "Labels must be integers"),
    (evaluate, lambda: None, TypeError, f"{DATA}.* Received: NoneType"),
    (evaluate, lambda: [shared().episode], TypeError, f"{DATA}.* Received: 1 episodes in a list"),
    (predict, lambda: (None, QUERY), TypeError, r"support must be a tuple of arrays \(x, y\).* Received: NoneType"),
    (predict, lambda: ("ab", QUERY), TypeError, r"support must be a tuple of arrays \(x, y\).* Received: str 'ab'"),
    (predict, lambda: (X, QUERY), TypeError, r"support must be a tuple of arrays \(x, y\).* Received: ndarray"),
    (predict, lambda: ((part for part in SUPPORT), QUERY), TypeError, "support must be a tuple.* Received: generator"),
    (predict, lambda: (shared().episode, QUERY), TypeError, "support must be the support set alone"),
    (predict, lambda: ((None, SUPPORT[1]), QUERY), TypeError, "support inputs must be an array. Received: NoneType"),
    (predict, lambda: ((SUPPORT[0].astype(str), SUPPORT[1]), QUERY), TypeError, "support inputs must be of type float"),
    (predict, lambda: ((SUPPORT[0][0], SUPPORT[1]), QUERY), ValueError, r"support inputs must have shape \[example"),
    (predict, lambda: ((SUPPORT[0][None], SUPPORT[1][None]), QUERY[None]), ValueError, "support inputs must have shap"),
    (predict, lambda: ((SUPPORT[0], SUPPORT[1][:5]), QUERY), ValueError, "one label for each of the 6 support inputs"),
    (predict, lambda: ((SUPPORT[0], 5), QUERY), ValueError, "one label for each of the 6 support inputs"),
    (predict, lambda: ((SUPPORT[0], SUPPORT[1] + 1), QUERY), ValueError, "labels must be from 0 to 2.* from 1 to 3"),
    (predict, lambda: ((SUPPORT[0], SUPPORT[1] - 1), QUERY), ValueError, "labels must be from 0 to 2.* from -1 to 1"),
    (predict, lambda: ((SUPPORT[0], SUPPORT[1] + 0.5), QUERY), ValueError, "labels must be whole numbers"),
    (predict, lambda: ((SUPPORT[0], SUPPORT[1].astype(str)), QUERY), ValueError, "whole numbers.* Received: string"),
    (predict, lambda: ((SUPPORT[0], np.eye(3)[SUPPORT[1]]), QUERY), ValueError, r"class numbers of shape \[examples\]"),
    (predict, lambda: ((SPOILT, SUPPORT[1]), QUERY), ValueError, "support inputs must be finite.* in example 2"),
    (predict, lambda: ((X[:0], Y[:0]), QUERY), ValueError, "support inputs must hold at least one example"),
    (predict, lambda: ((*SUPPORT, [1.0]), QUERY), ValueError, "weights must be one number for each of the 6"),
    (predict, lambda: ((*SUPPORT, -np.ones(6)), QUERY), ValueError, "support weights must not be negative"),
    (predict, lambda: ((*SUPPORT, np.full(6, np.inf)), QUERY), ValueError, "support weights must be finite"),
    (predict, lambda: (SUPPORT, None), TypeError, "query inputs must be an array. Received: NoneType"),
    (predict, lambda: (SUPPORT, (QUERY, SUPPORT[1])), TypeError, "query inputs must be an array of one shape"),
    (predict, lambda: (SUPPORT, QUERY[0]), ValueError, r"query inputs must have shape \[examples, 4\]"),
    (predict, lambda: (SUPPORT, QUERY[:0]), ValueError, "query inputs must hold at least one example"),
    (predict, lambda: (SUPPORT, np.where(X > 2, X, np.inf)), ValueError, "query inputs must be finite"),
    (predict, lambda: ((tf.ragged.constant([[1.0], [2.0, 3.0]]), [0, 1]), QUERY), TypeError, "must be a dense array"),
    (predict, lambda: ((tf.sparse.from_dense(SUPPORT[0]), SUPPORT[1]), QUERY), TypeError, "must be a dense array"),
    (adapt, lambda: None, TypeError, "support must be a tuple of arrays"),
    (adapt, lambda: (SPOILT, SUPPORT[1]), ValueError, "support inputs must be finite"),
    (adapt, lambda: (SUPPORT[0], SUPPORT[1] + 3), ValueError, "labels must be from 0 to 2"),
]


@pytest.mark.parametrize("name, entry, given, error, message", rows("maml", "reference"))
def test_what_a_learner_cannot_take_is_named(name, entry, given, error, message):
    with pytest.raises(error, match=message):
        entry(getattr(shared(), name), given())


@pytest.mark.parametrize("call, error, message", [
    (lambda: shared().maml.evaluate(Wrong(), 2), ValueError, "A learner takes episodes: .* Received: tuple of 2"),
    (lambda: shared().maml.evaluate(Spoilt(), 5, 2), ValueError,
     "Received NaN or infinity in the support inputs of episode 3, example 0"),
    (lambda: shared().reference.evaluate(Spoilt(), 5, 2), ValueError, "support inputs of episode 3"),
    (lambda: meta.MAML(model(2), 0.1, 1).evaluate(shared().source, 2), ValueError, "Labels must be integers from 0"),
    (lambda: shared().maml.evaluate(shared().source, 0), ValueError, "The number of episodes must be a positive int"),
    (lambda: shared().source.draw(-1), ValueError, "The number of an episode must be a non-negative integer"),
    (lambda: shared().source.draw(1.5), ValueError, "The number of an episode must be a scalar integer"),
    (lambda: shared().source.dataset("4"), ValueError, "meta_batch_size must be a positive integer. Received: '4'"),
    (lambda: shared().source.dataset(4, start=1.5), ValueError, "start must be a non-negative integer"),
    (lambda: shared().source.dataset(4, start=tf.Variable([1])), ValueError, r"a variable of shape \(1,\)"),
    (lambda: shared().source.dataset(4, start=tf.Variable(1.0)), ValueError, "or a scalar integer variable.* float32"),
    (lambda: meta.ClassificationEpisodes(None, Y), TypeError, "images must be an array .* Received: NoneType"),
    (lambda: meta.ClassificationEpisodes((x for x in X), Y), TypeError, "images must be an array .* generator"),
    (lambda: meta.ClassificationEpisodes(X, None), TypeError, "labels must be an array .* Received: NoneType"),
    (lambda: meta.ClassificationEpisodes([X[0], X[0, :2]], [0, 1]), TypeError, "images must be an array, all examples"),
    (lambda: meta.ClassificationEpisodes(tf.data.Dataset.from_tensors(X), Y), TypeError, "images must be an array"),
    (lambda: meta.ClassificationEpisodes(X, Y.astype(float)), ValueError, "labels must be integers or strings"),
    (lambda: meta.ClassificationEpisodes(SPOILT, Y[:6], 1, 1, 1), ValueError, "images must hold finite .* example 2"),
    (lambda: meta.split_classes(X, Y[:5], [3]), ValueError, "one label for each image. Received: 36 images and 5"),
    (lambda: meta.split_classes(X, Y, 3), TypeError, "sizes must be a list of numbers of classes. Received: 3"),
    (lambda: meta.with_rotations(np.zeros([4, 8, 8, 1]), [0, 1]), ValueError, "one label for each image"),
    (lambda: meta.few_shot_classifier("5"), ValueError, "ways must be a positive integer. Received: '5'"),
    (lambda: meta.few_shot_classifier(5, "body"), TypeError, "body must be a keras.Model. Received: 'body'"),
    (lambda: meta.few_shot_classifier(5, keras.Sequential([keras.layers.Dense(2)])), ValueError, "body must say what"),
    (lambda: meta.convolutional_body((28, 28)), ValueError, r"input_shape must be \(height, width, channels\)"),
    (lambda: meta.residual_body(28), ValueError, r"input_shape must be \(height, width, channels\). Received: 28"),
    (lambda: meta.mean_and_interval([]), ValueError, "values must be a list of at least one number"),
    (lambda: meta.MAML(None), TypeError, "model must be a keras.Model. Received: None"),
    (lambda: meta.ANIL("model"), TypeError, "model must be a keras.Model. Received: 'model'"),
    (lambda: meta.Reptile(model(), seed="a"), ValueError, "seed must be a non-negative integer. Received: 'a'"),
    (lambda: meta.MAML(keras.Sequential([keras.layers.Dense(3)])), ValueError, "The model must be built before"),
])
def test_what_episodes_and_networks_cannot_be_made_of_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def example(**features):
    values = {name: tf.train.Feature(float_list=tf.train.FloatList(value=value)) if isinstance(value[0], float) else
              tf.train.Feature(int64_list=tf.train.Int64List(value=value)) for name, value in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString()


GRAPH = tf.errors.InvalidArgumentError
TASK = {"support_inputs": SUPPORT[0], "support_labels": SUPPORT[1], "query_inputs": QUERY}


@pytest.mark.parametrize("name, signature, inputs, error, message", [
    ("plain", "serving_default", {"inputs": X[0]}, GRAPH, r"inputs must have shape \[examples, 4\]"),
    ("plain", "serving_default", {"inputs": np.zeros([2, 4, 7])}, GRAPH, r"inputs must have shape \[examples, 4\]"),
    ("plain", "serving_default", {"inputs": 1.0}, GRAPH, r"inputs must have shape \[examples, 4\]"),
    ("sequence", "serving_default", {"inputs": X}, GRAPH, r"inputs must have shape \[examples, inputs_1, 4\]"),
    ("sequence", "serving_default", {"inputs": np.zeros([2, 5, 4, 1])}, GRAPH, r"\[examples, inputs_1, 4\]"),
    ("plain", "serving_default", {"inputs": None}, TypeError, "inputs must be an array. Received: NoneType"),
    ("plain", "serving_default", {"inputs": (x for x in X)}, TypeError, "inputs must be an array. Received: generator"),
    ("plain", "serving_default", {"inputs": "abc"}, TypeError, "inputs must be of type float32. Received: string"),
    ("plain", "serving_default", {"inputs": [[1, 2], [3]]}, TypeError, "inputs must be an array of one shape"),
    ("plain", "serving_default", {"inputs": SPOILT}, GRAPH, "inputs must be finite: it holds a NaN"),
    ("plain", "serving_default", {"inputs": X[:0]}, GRAPH, "none of them empty"),
    ("plain", "serving_default_examples", {"examples": [b"garbage"]}, GRAPH, "Could not parse example .* 'garbage'"),
    ("plain", "serving_default_examples", {"examples": [example(inputs=[1.0] * 4), b""]}, GRAPH, "Name: examples 1, .*"
     "inputs .*is required"),
    ("plain", "serving_default_examples", {"examples": [example(inputs=[1.0])]}, GRAPH, "examples 0, Key: inputs"),
    ("plain", "serving_default_examples", {"examples": [example(inputs=[1] * 4)]}, GRAPH, "examples 0, Key: inputs"),
    ("plain", "serving_default_examples", {"examples": X}, TypeError, "examples must be of type string"),
    ("plain", "adapt", {}, ValueError, "The signature must be one of .* Received: 'adapt'"),
    ("maml", "adapt", {**TASK, "support_labels": SUPPORT[1] + 1}, GRAPH, "support_labels must be integers from 0 to 2"),
    ("maml", "adapt", {**TASK, "support_labels": SUPPORT[1] + 0.5}, ValueError, "support_labels must be whole numbers"),
    ("maml", "adapt", {**TASK, "support_labels": list("abcabc")}, TypeError, "support_labels must be of type int64"),
    ("maml", "adapt", {**TASK, "support_labels": [0, 1]}, GRAPH, r"support_labels must have shape \[support\], with a"),
    ("maml", "adapt", {**TASK, "support_inputs": SPOILT}, GRAPH, "support_inputs must be finite"),
    ("maml", "adapt", {**TASK, "query_inputs": QUERY[0]}, GRAPH, r"query_inputs must have shape \[query, 4\]"),
])
def test_what_an_export_cannot_answer_is_named(name, signature, inputs, error, message, folder):
    with pytest.raises(error, match=message):
        served(folder / name).predict(signature, **inputs)


@functools.cache
def served(path):
    return export.load(path)


@pytest.mark.parametrize("labels", [
    tf.constant(SUPPORT[1], tf.int32), SUPPORT[1].astype("int8"), SUPPORT[1].astype(float), SUPPORT[1].tolist()],
    ids=["int32 tensor", "int8", "float", "list"])
def test_an_export_takes_labels_of_every_type_of_number(labels, folder):
    answer = served(folder / "maml").predict("adapt", **{**TASK, "support_labels": labels})["probabilities"]
    np.testing.assert_allclose(answer, shared().maml.predict(SUPPORT, QUERY), rtol=1e-5)


@pytest.mark.parametrize("call, error, message", [
    (lambda path: export.saved_model(None, path), TypeError, "saved_model exports a learner .* Received: None"),
    (lambda path: export.saved_model(model(), None), TypeError, "directory must be a path. Received: None"),
    (lambda path: export.saved_model(model(), path, version="1"), ValueError, "version must be a positive integer"),
    (lambda path: export.saved_model(model(), path, labels="abc"), TypeError, "labels must be a list of strings"),
    (lambda path: export.saved_model(model(), path, labels=["a\rb", "c", "d"]), ValueError, "3 strings of one line"),
    (lambda path: export.saved_model(model(), path, warmup="yes"), TypeError, "warmup must be True or a list of pairs"),
    (lambda path: export.saved_model(model(), path, warmup=[("serving_default", {"inputs": X[0]})]), ValueError,
     r"inputs of a warm-up request must have shape \[examples, 4\]. Received shape: \(4,\)"),
    (lambda path: export.load(None), TypeError, "directory must be a path. Received: None"),
    (lambda path: export.load(path, version="1"), ValueError, "version must be a positive integer. Received: '1'"),
    (lambda path: export.load(path), FileNotFoundError, "There must be a version of the model"),
])
def test_what_cannot_be_exported_or_loaded_is_named(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


@pytest.mark.parametrize("content, expected", [
    (b"a\r\nb\r\nc\r\n", "abc"), (b"a\rb\rc", "abc"), (b"\xef\xbb\xbfa\nb\nc", "abc"),
    ("a\u2028\nb\nc\n".encode(), ["a\u2028", "b", "c"]),
    (b"a\nb\n", "must hold one line for each of the model's outputs: .3.. Received: 2 lines"),
    ("ä\nb\nc\n".encode("latin-1"), "labels.txt must be text in UTF-8")],
    ids=["windows", "old mac", "byte order mark", "line separator", "too few", "not utf-8"])
def test_labels_are_read_whatever_their_lines_end_with(content, expected, folder):
    file = folder / "plain" / "1" / "assets" / "labels.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    try:
        if "must" in expected:
            with pytest.raises(ValueError, match=expected):
                export.load(folder / "plain")
        else:
            assert export.load(folder / "plain").labels == list(expected)
    finally:
        file.unlink()


class WithUnused(keras.Model):
    """A model with a layer that its outputs do not depend on."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = keras.layers.Dense(3, "softmax"), keras.layers.Dense(2)

    def build(self, shape):
        self.used.build(shape)
        self.unused.build(shape)

    def call(self, inputs):
        return self.used(inputs)


@pytest.mark.slow
def test_unused_layers_of_a_learner_are_an_error_unless_allowed():
    network = WithUnused()
    network.build((None, 4))
    before = network.unused.kernel.numpy()
    with pytest.raises(ValueError, match="does not depend on 'with_unused/dense.*/kernel.* allow_unused=True"):
        meta.MAML(network, 0.1, 1).evaluate(shared().source, 2)
    for learner in (meta.MAML(network, 0.1, 1, allow_unused=True),
                    meta.ANIL(network, [network.used], 0.1, 1, allow_unused=True),
                    meta.Reptile(network, inner_steps=1, allow_unused=True)):
        learner.compile(keras.optimizers.SGD(0.1))
        assert learner.fit(shared().source.dataset(2, count=2), verbose=0).history["skipped_updates"] == [0]
        np.testing.assert_array_equal(network.unused.kernel, before)


def test_a_learner_whose_outer_objective_never_sees_the_queries_is_an_error():
    network = model()
    problem = farhox.supervised_problem(network, learn_initialization=True, dynamics=farhox.GradientDescent(0.1),
                                        outer_call=lambda inputs: network(inputs[0]))
    learner = meta.Learner(network, problem, EpisodesHG(farhox.ReverseHG()), 1)
    learner.compile(keras.optimizers.SGD(0.1))
    message = "The outer objective of a learner must depend on the query inputs.* never sees the queries"
    for call in (lambda: learner.fit(shared().source.dataset(2, count=2), verbose=0),
                 lambda: learner.evaluate(shared().source, 2)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
def test_training_on_episodes_that_hold_nan_ends_with_an_error_that_names_them():
    learner = meta.MAML(model(), 0.1, 1)
    learner.compile(keras.optimizers.SGD(0.1))
    (x, y), (queries, labels) = next(iter(shared().source.dataset(2)))
    spoilt = tf.tensor_scatter_nd_update(queries, [[1, 3, 0]], [float("nan")])
    data = tf.data.Dataset.from_tensors(meta.Episode((x, y), (spoilt, labels))).repeat(20)
    with pytest.raises(RuntimeError, match="NaN or infinity in the query inputs of episode 1 of the meta-batch, ex"):
        learner.fit(data, verbose=0)


@pytest.mark.slow
def test_labels_of_episodes_are_checked_before_xla_which_checks_nothing():
    element = shared().source.dataset(2).take(1)
    learner = meta.MAML(model(), 0.1, 1)
    learner.compile(keras.optimizers.SGD(0.1), jit_compile=True)
    assert np.isfinite(learner.fit(element, verbose=0).history["outer_loss"][0])
    wrong = element.map(lambda episode: meta.Episode(episode.support, (episode.query[0], episode.query[1] + 1)))
    with pytest.raises(ValueError, match="Labels must be integers from 0 .* Received labels from 1 to 3"):
        learner.fit(wrong, verbose=0)


def test_a_folder_without_omniglot_is_named(tmp_path):
    try:
        from tensorflow_datasets import load  # noqa: F401
    except ImportError as error:
        pytest.skip(f"tensorflow-datasets is not installed, or does not work beside this TensorFlow: {error}")
    with pytest.raises(ValueError, match="data_dir must hold the data set 'omniglot'.*Received: data_dir='.*empty'"):
        meta.load_omniglot(tmp_path / "empty", cache_dir=tmp_path / "cache", download=False)

"""farhox.export: SavedModels that answer as the live models do, without Python, and refuse what makes no sense."""

import concurrent.futures
import ctypes
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import saved_model_pb2

import farhox
from farhox import export, meta, stn

WAYS = 20
# One that trains when it is asked, and one that does not.
main = pytest.mark.parametrize("name", ["maml", "prototypical_network", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("imaml", "reptile", "hyper_representation"))])


def body():
    return meta.convolutional_body((6, 6, 1), filters=3, blocks=1)


def classifier():
    return meta.few_shot_classifier(WAYS, body())


LEARNERS = {
    "maml": lambda: meta.MAML(classifier(), 0.3, 2),
    "fomaml_by_support_statistics": lambda: meta.MAML(classifier(), 0.3, 2, first_order=True, transductive=False),
    "meta_sgd": lambda: meta.MAML(classifier(), 0.3, 2, learn_learning_rates=True),
    "anil": lambda: meta.ANIL(classifier(), inner_learning_rate=0.3, inner_steps=2),
    "imaml": lambda: meta.IMAML(classifier(), 0.3, 3),
    "reptile": lambda: meta.Reptile(classifier(), inner_steps=2, batch_size=3),
    "hyper_representation": lambda: meta.HyperRepresentation(
        body(), keras.layers.Dense(WAYS, activation="softmax"), inner_steps=2),
    "joint": lambda: meta.JointTraining(classifier(), 0.3),
    "prototypical_network": lambda: meta.PrototypicalNetwork(body(), WAYS),
}


def episode(ways, shots, queries=4, seed=0):
    random = np.random.default_rng(seed)
    return (random.random((ways * shots, 6, 6, 1), dtype="float32"), np.repeat(np.arange(ways), shots),
            random.random((queries, 6, 6, 1), dtype="float32"))


def request(ways=3, shots=2, **changes):
    names = ("support_inputs", "support_labels", "query_inputs")
    return {**dict(zip(names, episode(ways, shots))), **changes}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A learner and the folder of its export by name, made when they are asked for."""
    made = {}

    def get(name):
        if name not in made:
            keras.utils.set_random_seed(0)
            learner = LEARNERS[name]()
            directory = tmp_path_factory.mktemp("served") / name
            export.saved_model(learner, directory, serialized_examples=name == "maml")
            made[name] = learner, directory
        return made[name]

    return get


@pytest.fixture(scope="module")
def served(exported):
    """The export of MAML."""
    return export.load(exported("maml")[1])


def check_answers(learner, directory, sizes):
    served = export.load(directory)
    for ways, shots in sizes:
        x, y, query = episode(ways, shots)
        expected = learner.predict((x, y), query)
        assert expected.shape == (4, WAYS) and np.isfinite(expected).all()
        for signature in ("adapt", "serving_default"):
            answer = served.predict(signature, **request(ways, shots))["probabilities"]
            np.testing.assert_allclose(answer, expected, atol=1e-5)
        other = episode(ways, shots, seed=1)
        batch = served.predict("adapt_batch", support_inputs=[x, other[0]], support_labels=[y, y],
                               query_inputs=[query, other[2]])["probabilities"]
        np.testing.assert_allclose(batch, [expected, learner.predict((other[0], y), other[2])], atol=1e-5)
    if "embed" in served.signatures:
        np.testing.assert_allclose(
            served.predict("embed", inputs=query)["representation"], learner.embed(query), atol=1e-5)


@main
@pytest.mark.parametrize("ways, shots", [(3, 2), pytest.param(WAYS, 5, marks=pytest.mark.slow)])
def test_every_signature_answers_as_the_live_learner(name, ways, shots, exported):
    learner, directory = exported(name)
    check_answers(learner, directory, [(ways, shots)])
    assert ("embed" in export.load(directory).signatures) == (name in ("hyper_representation", "prototypical_network"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_signature_answers_for_all_ways_and_shots(name, exported):
    check_answers(*exported(name), [(ways, shots) for ways in (1, 2, 5, 11, WAYS) for shots in (1, 3, 5)])


@pytest.mark.slow
def test_a_learned_state_is_what_is_exported(tmp_path):
    """Learned rates and Reptile's slots are in the export, not their initial values."""
    x, y, query = episode(5, 2)
    for name, make in (("meta_sgd", lambda model: meta.MAML(model, 0.3, 2, learn_learning_rates=True)),
                       ("reptile", lambda model: meta.Reptile(model, inner_steps=2))):
        keras.utils.set_random_seed(0)
        learner = make(keras.Sequential([
            keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(WAYS, activation="softmax")]))
        before = learner.predict((x, y), query)
        random = np.random.default_rng(0)
        for variable in learner.problem.outer_variables + [v for v in learner._carry if "float" in v.dtype]:
            variable.assign(np.abs(variable.numpy() + random.normal(size=variable.shape)))
        expected = learner.predict((x, y), query)
        assert np.abs(expected - before).max() > 1e-3
        served = export.load(export.saved_model(learner, tmp_path / name).parent)
        np.testing.assert_allclose(
            served.predict("adapt", **request(5, 2))["probabilities"], expected, atol=1e-5)


@pytest.mark.slow
def test_regression_tasks_have_targets_as_labels(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)])
    learner = meta.MAML(model, 0.01, 3, loss="mean_squared_error")
    x, y, query = (np.random.default_rng(0).normal(size=(size, 1)).astype("float32") for size in (5, 5, 7))
    served = export.load(export.saved_model(learner, tmp_path).parent)
    answer = served.predict("adapt", support_inputs=x, support_labels=y, query_inputs=query)["predictions"]
    np.testing.assert_allclose(answer, learner.predict((x, y), query), atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="support_labels must be finite"):
        served.predict("adapt", support_inputs=x, support_labels=y * np.nan, query_inputs=query)


@pytest.mark.parametrize("changes, message", [
    ({"support_inputs": np.zeros([0, 6, 6, 1]), "support_labels": np.zeros([0])},
     r"support_inputs must have shape \[support, 6, 6, 1\], none of them empty"),
    ({"query_inputs": np.zeros([0, 6, 6, 1])}, "query_inputs must have shape .*, none of them empty"),
    ({"support_inputs": np.zeros([6, 6, 5, 1])}, r"support_inputs must have shape \[support, 6, 6, 1\].*6 6 5 1"),
    ({"query_inputs": np.zeros([6, 6, 1])}, r"query_inputs must have shape \[query, 6, 6, 1\].*6 6 1"),
    ({"query_inputs": np.zeros([2, 6, 6, 3])}, r"query_inputs must have shape \[query, 6, 6, 1\].*2 6 6 3"),
    ({"query_inputs": 1.0}, "query_inputs must have shape"),
    ({"support_labels": np.arange(5)},
     r"support_labels must .* as many of support as in support_inputs.*\[5\].*\[6\]"),
    ({"support_labels": np.zeros([6, 1])}, r"support_labels must have shape \[support\]"),
    ({"support_labels": np.arange(6) + 15},
     "support_labels must be integers from 0 to 19, as the model has 20 outputs"),
    ({"support_labels": np.arange(6) - 1}, "support_labels must be integers from 0 to 19.*-1.*4"),
    ({"support_inputs": np.full([6, 6, 6, 1], np.nan)}, "support_inputs must be finite"),
    ({"query_inputs": np.full([6, 6, 6, 1], np.inf)}, "query_inputs must be finite"),
])
def test_inputs_that_make_no_sense_are_named_by_an_error_of_the_graph(changes, message, served):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        served.predict("adapt", **request(**changes))
    if "support_inputs" in changes:
        assert np.isfinite(served.predict("adapt", **request())["probabilities"]).all(), "It answers on."


@pytest.mark.parametrize("shape", [(None, 3), (2,), ()])
def test_a_loaded_signature_of_a_keras_model_refuses_other_ranks_and_sizes(shape, tmp_path):
    """TensorFlow itself does not compare an input with the shape in a signature: a dense layer of any rank runs."""
    model = keras.Sequential([keras.Input(shape), keras.layers.Rescaling(2.0)])
    export.saved_model(model, tmp_path)
    signature = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    good = [4, *(5 if size is None else size for size in shape)]
    assert signature(inputs=tf.zeros(good))["predictions"].shape == good
    for bad in (good[1:], [1, *good], [0, *good[1:]], *([[*good[:-1], 7]] if shape else [])):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"inputs must have shape \[examples"):
            signature(inputs=tf.zeros(bad))


def test_tasks_of_a_batch_need_labels_for_all_of_them(served):
    x, y, query = (value[None] for value in episode(3, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="support_labels must .* as many of tasks as in support"):
        served.predict("adapt_batch", support_inputs=x, support_labels=[y[0], y[0]], query_inputs=query)


@pytest.mark.slow
def test_a_hundred_requests_at_once_are_answered_as_one_by_one(served):
    requests = [request(1 + index % 7, 1 + index % 3) for index in range(100)]
    one_by_one = [served.predict("adapt", **entry)["probabilities"] for entry in requests]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        at_once = list(pool.map(lambda entry: served.predict("adapt", **entry)["probabilities"], requests))
    np.testing.assert_array_equal(at_once, one_by_one)


_CLIENT = """
import sys
sys.modules["keras"] = sys.modules["farhox"] = None  # Neither can be imported.
import numpy as np
import tensorflow as tf
inputs = dict(np.load(sys.argv[1]))
answers = {}
for directory in sys.argv[3:]:
    function = tf.saved_model.load(directory).signatures["adapt"]
    answer = function(**{name: tf.constant(value) for name, value in inputs.items()})
    answers[directory] = answer["probabilities"].numpy()
np.savez(sys.argv[2], **answers)
"""


@pytest.mark.slow
def test_exports_are_served_without_keras_and_farhox(exported, tmp_path):
    folders = [str(exported(name)[1] / "1") for name in ("maml", "prototypical_network")]
    np.savez(tmp_path / "request.npz", **request(5, 1))
    subprocess.run([sys.executable, "-c", _CLIENT, tmp_path / "request.npz", tmp_path / "answers.npz", *folders],
                   check=True, cwd=tmp_path)
    answers = np.load(tmp_path / "answers.npz")
    x, y, query = episode(5, 1)
    for name, folder in zip(("maml", "prototypical_network"), folders):
        np.testing.assert_allclose(answers[folder], exported(name)[0].predict((x, y), query), atol=1e-5)


@main
def test_no_operation_of_the_graph_needs_python(name, exported):
    (graph,) = saved_model_pb2.SavedModel.FromString(
        (exported(name)[1] / "1" / "saved_model.pb").read_bytes()).meta_graphs
    operations = {node.op for node in graph.graph_def.node}
    operations |= {node.op for function in graph.graph_def.library.function for node in function.node_def}
    assert len(operations) > 20 and not [op for op in operations if "PyFunc" in op]


class _Session:
    """TensorFlow's C API, as far as it takes to load a SavedModel and to run a signature of it."""

    def __init__(self, path):
        directory = pathlib.Path(tf.sysconfig.get_lib())
        (library,) = [file for file in directory.glob("libtensorflow_cc.*") if file.suffix != ".params"]
        self.api = ctypes.CDLL(str(library))
        for name in ("NewStatus", "NewSessionOptions", "NewGraph", "LoadSessionFromSavedModel", "TensorData",
                     "GraphOperationByName", "AllocateTensor"):
            getattr(self.api, f"TF_{name}").restype = ctypes.c_void_p
        self.api.TF_Message.restype = ctypes.c_char_p
        self.api.TF_TensorByteSize.restype = self.api.TF_Dim.restype = ctypes.c_int64
        self.status = ctypes.c_void_p(self.api.TF_NewStatus())
        self.graph = ctypes.c_void_p(self.api.TF_NewGraph())
        tags = (ctypes.c_char_p * 1)(b"serve")
        self.session = ctypes.c_void_p(self.api.TF_LoadSessionFromSavedModel(
            ctypes.c_void_p(self.api.TF_NewSessionOptions()), None, str(path).encode(), tags, 1, self.graph, None,
            self.status))
        self._check()

    def _check(self):
        if self.api.TF_GetCode(self.status) != 0:
            raise RuntimeError(self.api.TF_Message(self.status).decode())

    class _Output(ctypes.Structure):
        _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]

    def _output(self, name):
        operation, index = name.split(":")
        return self._Output(self.api.TF_GraphOperationByName(self.graph, operation.encode()), int(index))

    def run(self, definition, inputs, output):
        keys = list(inputs)
        feeds = (self._Output * len(keys))(*[self._output(definition.inputs[key].name) for key in keys])
        tensors = (ctypes.c_void_p * len(keys))()
        for position, key in enumerate(keys):
            value = np.ascontiguousarray(inputs[key], tf.as_dtype(definition.inputs[key].dtype).as_numpy_dtype)
            sizes = (ctypes.c_int64 * value.ndim)(*value.shape)
            tensor = ctypes.c_void_p(self.api.TF_AllocateTensor(
                definition.inputs[key].dtype, sizes, value.ndim, ctypes.c_size_t(value.nbytes)))
            ctypes.memmove(self.api.TF_TensorData(tensor), value.ctypes.data, value.nbytes)
            tensors[position] = tensor
        fetched = (ctypes.c_void_p * 1)()
        self.api.TF_SessionRun(self.session, None, feeds, tensors, len(keys),
                               (self._Output * 1)(self._output(definition.outputs[output].name)), fetched, 1, None, 0,
                               None, self.status)
        self._check()
        tensor = ctypes.c_void_p(fetched[0])
        shape = [self.api.TF_Dim(tensor, axis) for axis in range(self.api.TF_NumDims(tensor))]
        data = ctypes.string_at(self.api.TF_TensorData(tensor), self.api.TF_TensorByteSize(tensor))
        return np.frombuffer(data, "float32").reshape(shape)


@main
def test_the_loader_of_tensorflow_serving_runs_every_signature(name, exported):
    learner, directory = exported(name)
    session = _Session(directory / "1")
    (graph,) = saved_model_pb2.SavedModel.FromString((directory / "1" / "saved_model.pb").read_bytes()).meta_graphs
    inputs = request(5, 2)
    expected = learner.predict((inputs["support_inputs"], inputs["support_labels"]), inputs["query_inputs"])
    adapt, batch = (graph.signature_def[key] for key in ("adapt", "adapt_batch"))
    np.testing.assert_allclose(session.run(adapt, inputs, "probabilities"), expected, atol=1e-5)
    np.testing.assert_allclose(
        session.run(batch, {key: value[None] for key, value in inputs.items()}, "probabilities"), expected[None],
        atol=1e-5)
    if "embed" in graph.signature_def:
        np.testing.assert_allclose(
            session.run(graph.signature_def["embed"], {"inputs": inputs["query_inputs"]}, "representation"),
            learner.embed(inputs["query_inputs"]), atol=1e-5)
    for key, value, message in (("support_labels", np.full(10, WAYS), "support_labels must be integers"),
                                ("support_inputs", np.zeros([10, 5, 6, 1]), "support_inputs must have shape"),
                                ("query_inputs", np.zeros([6, 6, 1]), "query_inputs must have shape")):
        with pytest.raises(RuntimeError, match=message):
            session.run(adapt, {**inputs, key: value}, "probabilities")


@pytest.mark.slow
def test_saved_model_cli_shows_and_runs_an_export(exported, tmp_path):
    learner, directory = exported("maml")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "tensorflow.python.tools.saved_model_cli", *arguments, "--dir", directory / "1",
             "--tag_set", "serve", "--signature_def", "adapt"], check=True, capture_output=True, text=True).stdout

    shown = run("show")
    for text in ("inputs['support_inputs'] tensor_info", "shape: (-1, 6, 6, 1)", "inputs['support_labels'] tensor_info",
                 "outputs['probabilities'] tensor_info", "shape: (-1, 20)"):
        assert text in shown
    inputs = request(5, 1)
    np.savez(tmp_path / "request.npz", **inputs)
    run("run", "--outdir", tmp_path, "--inputs",
        ";".join(f"{name}={tmp_path / 'request.npz'}[{name}]" for name in inputs))
    np.testing.assert_allclose(
        np.load(tmp_path / "probabilities.npy"),
        learner.predict((inputs["support_inputs"], inputs["support_labels"]), inputs["query_inputs"]), atol=1e-5)


def test_serialized_examples_are_parsed_in_the_graph(served):
    inputs = request(3, 2)

    def serialized(values, labels=None):
        return [tf.train.Example(features=tf.train.Features(feature={
            "inputs": tf.train.Feature(float_list=tf.train.FloatList(value=value.ravel())),
            **({} if labels is None else {
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[labels[index]]))}),
        })).SerializeToString() for index, value in enumerate(values)]

    support = serialized(inputs["support_inputs"], inputs["support_labels"])
    answer = served.predict(
        "adapt_examples", support_examples=support, query_examples=serialized(inputs["query_inputs"]))
    np.testing.assert_allclose(
        answer["probabilities"], served.predict("adapt", **inputs)["probabilities"], atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="label"):
        served.predict("adapt_examples", support_examples=serialized(inputs["support_inputs"]),
                       query_examples=serialized(inputs["query_inputs"]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="support_labels must be integers from 0 to 19"):
        served.predict("adapt_examples", support_examples=serialized(inputs["support_inputs"], np.arange(6) + 40),
                       query_examples=serialized(inputs["query_inputs"]))


@pytest.mark.slow
def test_half_precision_rounds_the_weights_and_halves_the_size(tmp_path):
    keras.utils.set_random_seed(0)
    learner = meta.MAML(meta.few_shot_classifier(5, meta.convolutional_body((6, 6, 1), filters=64, blocks=2)), 0.3, 2)
    whole, half = (export.saved_model(learner, tmp_path, float16=float16) for float16 in (False, True))
    for variable in learner.model.variables:
        if "float" in variable.dtype:
            variable.assign(variable.numpy().astype("float16"))
    inputs = request(3, 2)
    np.testing.assert_allclose(
        export.load(tmp_path).predict("adapt", **inputs)["probabilities"],
        learner.predict((inputs["support_inputs"], inputs["support_labels"]), inputs["query_inputs"]), atol=1e-5)
    sizes = [sum(file.stat().st_size for file in (path / "variables").iterdir()) for path in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.slow
def test_xla_answers_the_same_and_checks_the_same(tmp_path):
    learner = meta.HyperRepresentation(body(), keras.layers.Dense(WAYS, activation="softmax"), inner_steps=2)
    served = export.load(export.saved_model(learner, tmp_path, jit_compile=True).parent)
    inputs = request(3, 2)
    np.testing.assert_allclose(
        served.predict("adapt", **inputs)["probabilities"],
        learner.predict((inputs["support_inputs"], inputs["support_labels"]), inputs["query_inputs"]), atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="support_inputs must be finite"):
        served.predict("adapt", **request(support_inputs=np.full([6, 6, 6, 1], np.nan)))


def plain(outputs=3):
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(outputs, activation="softmax")])


def spread(targets, predictions):
    """A loss of labels with two parts: the outputs are to come near a place, as far as it counts."""
    return targets["counts"] * tf.reduce_sum((predictions - targets["place"]) ** 2, axis=-1)


def regression(loss, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)])
    return meta.MAML(model, 0.1, 2, loss=loss, **arguments)


@pytest.mark.slow
def test_labels_that_are_dictionaries_are_inputs_by_name(tmp_path):
    learner, random = regression(spread), np.random.default_rng(0)
    spec = {"place": tf.TensorSpec([2]), "counts": tf.TensorSpec([])}
    x, place, counts, query = (random.random(size, dtype="float32") for size in ((5, 2), (5, 2), 5, (3, 2)))
    served = export.load(export.saved_model(learner, tmp_path, label_spec=spec, serialized_examples=True).parent)
    expected = learner.predict((x, {"place": place, "counts": counts}), query)
    sent = {"support_inputs": x, "support_place": place, "support_counts": counts, "query_inputs": query}
    np.testing.assert_allclose(served.predict("adapt", **sent)["predictions"], expected, atol=1e-5)
    np.testing.assert_allclose(
        served.predict("adapt_batch", **{name: value[None] for name, value in sent.items()})["predictions"][0],
        expected, atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"support_counts must have shape \[support\]"):
        served.predict("adapt", **{**sent, "support_counts": counts[:, None]})

    def serialized(**features):
        return [tf.train.Example(features=tf.train.Features(feature={
            name: tf.train.Feature(float_list=tf.train.FloatList(value=np.ravel(values[index])))
            for name, values in features.items()})).SerializeToString() for index in range(len(features["inputs"]))]

    answer = served.predict("adapt_examples", query_examples=serialized(inputs=query),
                            support_examples=serialized(inputs=x, place=place, counts=counts))
    np.testing.assert_allclose(answer["predictions"], expected, atol=1e-5)


@pytest.mark.slow
def test_labels_of_another_shape_than_the_outputs_are_described(tmp_path):
    """A column says how much an example counts."""
    def loss(targets, predictions):
        return targets[:, 2] * tf.reduce_sum((predictions - targets[:, :2]) ** 2, axis=-1)

    learner, random = regression(loss), np.random.default_rng(0)
    x, y, query = (random.random(size, dtype="float32") for size in ((5, 2), (5, 3), (3, 2)))
    served = export.load(export.saved_model(learner, tmp_path, label_spec=tf.TensorSpec([3])).parent)
    np.testing.assert_allclose(
        served.predict("adapt", support_inputs=x, support_labels=y, query_inputs=query)["predictions"],
        learner.predict((x, y), query), atol=1e-5)


@pytest.mark.slow
def test_a_learner_with_several_inputs_is_served_by_their_names(tmp_path):
    left, right = keras.Input((2,), name="left"), keras.Input((1,), name="right")
    model = keras.Model({"left": left, "right": right}, keras.layers.Dense(2)(
        keras.layers.Concatenate()([left, right])))
    learner, random = meta.MAML(model, 0.1, 2, loss="mean_squared_error"), np.random.default_rng(0)
    x, query = ({"left": random.random((size, 2), dtype="float32"), "right": random.random((size, 1), dtype="float32")}
                for size in (5, 3))
    y = random.random((5, 2), dtype="float32")
    served = export.load(export.saved_model(learner, tmp_path).parent)
    sent = {f"{part}_{name}": value for part, own in (("support", x), ("query", query)) for name, value in own.items()}
    np.testing.assert_allclose(served.predict("adapt", support_labels=y, **sent)["predictions"],
                               learner.predict((x, y), query), atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="support_right must .* as many of support as in support"):
        served.predict("adapt", support_labels=y, **{**sent, "support_right": x["right"][:4]})
    with pytest.raises(ValueError, match=r"must have names that differ. Received twice: \['left'\]"):
        export.saved_model(learner, tmp_path, label_spec={"left": tf.TensorSpec([2])})


@pytest.mark.parametrize("make, spec, error, message", [
    (lambda: regression(spread), None, ValueError, "Labels of a learner whose loss takes other ones .* label_spec="),
    (lambda: regression("mean_squared_error", support_loss=spread), None, ValueError, "must be described"),
    (lambda: regression(spread), {"place": [2]}, TypeError, "label_spec must be a tf.TensorSpec"),
    (lambda: regression(spread), {}, TypeError, "label_spec must be a tf.TensorSpec"),
    (lambda: regression(spread), tf.TensorSpec([None, 2]), ValueError, "label_spec must have known shapes"),
    (LEARNERS["prototypical_network"], tf.TensorSpec([]), ValueError, "for learners whose labels are no class numbers"),
    (plain, tf.TensorSpec([]), ValueError, "for learners whose labels are no class numbers"),
])
def test_labels_that_do_not_fit_the_loss_are_refused(make, spec, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export.saved_model(make(), tmp_path / "served", label_spec=spec)
    assert not (tmp_path / "served").exists()


def test_an_adapted_model_is_served_by_the_default_signature(exported, tmp_path):
    inputs = request(3, 2)
    adapted = exported("maml")[0].adapt((inputs["support_inputs"], inputs["support_labels"]))
    served = export.load(export.saved_model(adapted, tmp_path).parent)
    np.testing.assert_allclose(served.predict(inputs=inputs["query_inputs"])["probabilities"],
                               adapted(inputs["query_inputs"]), atol=1e-5)
    assert served.signatures["serving_default"]["inputs"]["inputs"].shape == (None, 6, 6, 1)
    assert list(served.signatures) == ["serving_default"]


def test_a_self_tuning_model_is_served_baked(tmp_path):
    strength = farhox.Hyperparameter(0.3, low=0.0, high=0.9, name="rate")
    network = stn.convert(keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(5, activation="relu"), stn.Dropout(strength),
        keras.layers.Dense(3, activation="softmax")]), [strength], gate_initializer="random_normal")
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    served = export.load(export.saved_model(stn.SelfTuningModel(network), tmp_path).parent)
    np.testing.assert_allclose(served.predict(inputs=x)["probabilities"], network(x), atol=1e-5)


@pytest.mark.slow
def test_several_inputs_and_tables_of_words_are_served(tmp_path):
    words, numbers = keras.Input((), dtype="string", name="words"), keras.Input((2,), name="numbers")
    vocabulary = keras.layers.StringLookup(vocabulary=["inner", "outer"])
    embedded = keras.layers.Embedding(3, 2)(vocabulary(words))
    model = keras.Model([words, numbers], keras.layers.Dense(1)(keras.layers.Concatenate()([embedded, numbers])))
    inputs = {"words": np.array(["outer", "unknown"]), "numbers": np.ones([2, 2], "float32")}
    served = export.load(export.saved_model(model, tmp_path, serialized_examples=True).parent)
    expected = model([tf.constant(value) for value in inputs.values()])
    np.testing.assert_allclose(served.predict(**inputs)["predictions"], expected, atol=1e-6)
    examples = [tf.train.Example(features=tf.train.Features(feature={
        "words": tf.train.Feature(bytes_list=tf.train.BytesList(value=[word.encode()])),
        "numbers": tf.train.Feature(float_list=tf.train.FloatList(value=[1.0, 1.0])),
    })).SerializeToString() for word in ("outer", "unknown")]
    np.testing.assert_allclose(
        served.predict("serving_default_examples", examples=examples)["predictions"], expected, atol=1e-6)


def test_versions_count_up_and_are_never_overwritten(tmp_path):
    assert export.saved_model(plain(), tmp_path).name == "1"
    assert export.saved_model(plain(), tmp_path, version=7).name == "7"
    assert export.saved_model(plain(), tmp_path).name == "8"
    before = {file: file.read_bytes() for file in (tmp_path / "7").rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match="A version is never overwritten. Received: version=7"):
        export.saved_model(plain(), tmp_path, version=7)
    assert before == {file: file.read_bytes() for file in (tmp_path / "7").rglob("*") if file.is_file()}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1", "7", "8"]
    assert export.load(tmp_path).version == 8 and export.load(tmp_path, version=1).version == 1
    # A server of another user can read it as it can any new folder; one made by `tempfile` it could not.
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "8").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_version_that_another_process_publishes_meanwhile_is_kept(tmp_path, monkeypatch):
    export.saved_model(plain(), tmp_path)
    module = sys.modules["farhox.export.saved_model"]
    write = module._write

    def slow(*arguments, number="2"):
        write(*arguments)
        (tmp_path / number).mkdir(exist_ok=True)
        (tmp_path / number / "theirs").touch()

    monkeypatch.setattr(module, "_write", slow)
    assert export.saved_model(plain(), tmp_path).name == "3"
    monkeypatch.setattr(module, "_write", lambda *arguments: slow(*arguments, number="9"))
    with pytest.raises(FileExistsError, match="version=9"):
        export.saved_model(plain(), tmp_path, version=9)
    assert [file.name for file in (tmp_path / "2").iterdir()] == ["theirs"]


def test_a_crash_leaves_the_versions_as_they_were(tmp_path, monkeypatch):
    export.saved_model(plain(), tmp_path)

    def crash(module, path, **_):
        pathlib.Path(path).mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", crash)
    with pytest.raises(OSError, match="No space left"):
        export.saved_model(plain(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["1"]


def test_labels_are_an_asset(tmp_path):
    path = export.saved_model(plain(), tmp_path, labels=["zeta", "ключ", "third one"])
    assert (path / "assets" / "labels.txt").read_text(encoding="utf-8") == "zeta\nключ\nthird one\n"
    assert export.load(tmp_path).labels == ["zeta", "ключ", "third one"]
    assert export.load(export.saved_model(plain(), tmp_path).parent).labels is None


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "b", 3], ["a", "b", "c\nd"]])
def test_labels_must_name_the_outputs(labels, tmp_path):
    with pytest.raises(ValueError, match="labels must be 3 strings of one line"):
        export.saved_model(plain(), tmp_path, labels=labels)


@pytest.mark.slow
def test_warm_up_requests_are_records_of_requests_that_run(exported, tmp_path):
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    own = [("serving_default", {"inputs": np.ones([2, 2], "float32")})]
    for model, warmup, expected in ((exported("maml")[0], True, ["adapt", "adapt_batch"]),
                                    (plain(), own, ["serving_default"])):
        path = export.saved_model(model, tmp_path / "digits", warmup=warmup)
        served = export.load(tmp_path / "digits")
        found = []
        for record in tf.data.TFRecordDataset(str(path / "assets.extra" / "tf_serving_warmup_requests")):
            sent = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
            assert sent.model_spec.name == "digits"
            found.append(sent.model_spec.signature_name)
            inputs = {name: tf.make_ndarray(tensor_pb2.TensorProto.FromString(value.SerializeToString()))
                      for name, value in sent.inputs.items()}
            assert np.isfinite(served.predict(found[-1], **inputs)["probabilities"]).all()
        assert found == expected


def test_warm_up_requests_must_fit_a_signature(tmp_path):
    for request in (("adapt", {}), ("serving_default", {"x": 1.0})):
        with pytest.raises(ValueError, match="A warm-up request must be one of the signatures with its inputs"):
            export.saved_model(plain(), tmp_path, warmup=[request])


def test_warm_up_without_the_serving_api_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match=r"pip install 'farhox\[serving\]'"):
        export.saved_model(plain(), tmp_path / "served", warmup=True)
    assert not (tmp_path / "served").exists()


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(TypeError, match="saved_model exports a learner of farhox.meta, .* Received: 'model'"):
        export.saved_model("model", tmp_path)
    model = plain()
    tuned = farhox.HyperOptimizer(farhox.supervised_problem(model, learn_initialization=True))
    with pytest.raises(TypeError, match="such as the one that a HyperOptimizer tunes"):
        export.saved_model(tuned, tmp_path)
    with pytest.raises(ValueError, match="The model must say what its inputs are"):
        export.saved_model(_Subclassed(), tmp_path)
    for version in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="version must be a positive integer"):
            export.saved_model(model, tmp_path, version=version)
    assert not list(tmp_path.iterdir())


class _Subclassed(keras.Model):
    def call(self, x):
        return x


def test_load_and_predict_say_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="There must be a version of the model .* It holds: none"):
        export.load(tmp_path / "nothing")
    served = export.load(export.saved_model(plain(), tmp_path).parent)
    with pytest.raises(FileNotFoundError, match=r"There must be version 4 of the model .* It holds: \[1\]"):
        export.load(tmp_path, version=4)
    with pytest.raises(ValueError, match=r"The signature must be one of \['serving_default'\]. Received: 'adapt'"):
        served.predict("adapt")
    with pytest.raises(ValueError, match=r"'serving_default' takes the inputs \['inputs'\]. Received: \['x'\]"):
        served.predict(x=1.0)

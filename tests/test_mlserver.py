"""MLServer with the runtime of the scripts: the class itself, and a real server that REST and gRPC clients ask."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import math
import socket
import statistics
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from script_files import SCRIPTS, import_script

from farhox import export, meta

needs_mlserver = pytest.mark.skipif(importlib.util.find_spec("mlserver") is None,
                                    reason="MLServer is not installed: pip install '.[serving]'")
DATATYPES = {"float32": "FP32", "float64": "FP64", "int32": "INT32", "int64": "INT64", "object": "BYTES"}


def learner(seed=0):
    keras.utils.set_random_seed(seed)
    return meta.MAML(meta.few_shot_classifier(3, meta.convolutional_body((6, 6, 1), filters=2, blocks=1)), 0.3, 2)


def episode(**changes):
    random = np.random.default_rng(0)
    return {"support_inputs": random.random((6, 6, 6, 1), dtype="float32"), "support_labels": np.arange(6) % 3,
            "query_inputs": random.random((4, 6, 6, 1), dtype="float32"), **changes}


def expected(learner, inputs):
    return learner.predict((inputs["support_inputs"], inputs["support_labels"]), inputs["query_inputs"])


def message(inputs, signature=None):
    """A request of the V2 protocol in JSON; NaN is null there."""
    return {**({"parameters": {"signature": signature}} if signature else {}), "inputs": [
        {"name": name, "shape": list(value.shape), "datatype": DATATYPES[value.dtype.name],
         "data": [None if isinstance(number, float) and math.isnan(number) else number for number in value.ravel()
                  .tolist()]} for name, value in inputs.items()]}


REFUSED = {
    "rank": ({"query_inputs": np.zeros([6, 6, 1], "float32")},
             "query_inputs must have shape [query, 6, 6, 1]. Received shape:] [6 6 1]"),
    "size": ({"support_inputs": np.zeros([6, 6, 5, 1], "float32")}, "support_inputs must have shape [support, 6, 6"),
    "empty": ({"support_inputs": np.zeros([0, 6, 6, 1], "float32"), "support_labels": np.zeros([0], "int64")},
              "support_inputs must have shape [support, 6, 6, 1], none of them empty"),
    "fewer labels": ({"support_labels": np.zeros([5], "int64")}, "with as many of support as in support_inputs"),
    "NaN": ({"query_inputs": np.full([4, 6, 6, 1], np.nan, "float32")}, "query_inputs must be finite"),
    "class": ({"support_labels": np.arange(6)}, "support_labels must be integers from 0 to 2"),
    "floats": ({"support_labels": np.zeros([6], "float32")},
               "support_labels must be of datatype INT64 or of numbers that hold no more. Received: FP32"),
    "strings": ({"query_inputs": np.full([4, 6, 6, 1], "dark", object)},
                "query_inputs must be of datatype FP32 or of numbers that hold no more. Received: BYTES"),
    "another": ({"queries": np.zeros([4, 6, 6, 1], "float32")}, "'adapt' takes the inputs ['query_inputs', 'support_i"),
}
MALFORMED = [
    (lambda sent: sent["inputs"].pop(), "'adapt' takes the inputs ['query_inputs', 'support_inputs', 'suppo"),
    (lambda sent: sent["inputs"].append(sent["inputs"][0]), "['query_inputs', 'support_inputs', 'support_inputs', 's"),
    (lambda sent: sent["inputs"][1]["data"].pop(), "support_labels must hold numbers or strings of its dat"),
    (lambda sent: sent["inputs"][1]["data"].__setitem__(0, None), "support_labels must hold numbers or strings of i"),
    (lambda sent: sent["parameters"].update(signature="embed"),
     "The signature must be one of ['adapt', 'adapt_batch', 'serving_default']. Received: 'embed'"),
]


def refused():
    """Messages that make no sense, and the errors that they get."""
    for changes, text in REFUSED.values():
        yield message(episode(**changes), "adapt"), text
    for spoil, text in MALFORMED:
        sent = message(episode(), "adapt")
        spoil(sent)
        yield sent, text


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A learner, and the folder of a server with it as the model `signs`."""
    own = learner()
    root = tmp_path_factory.mktemp("served")
    export.saved_model(own, root / "signs")
    return own, root


def write_settings(root, monkeypatch, **settings):
    import_script("mlserver_settings", monkeypatch).write_settings(root / "signs", **settings)


def test_settings_name_the_runtime_that_lies_beside_them(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="signs must hold a version of a model"):
        write_settings(tmp_path, monkeypatch)
    (tmp_path / "signs" / "3").mkdir(parents=True)
    write_settings(tmp_path, monkeypatch, version=3, http_port=1234)
    model = json.loads((tmp_path / "signs" / "model-settings.json").read_text())
    assert model["name"] == "signs" and model["parameters"] == {"uri": ".", "version": "3"}
    module, name = model["implementation"].split(".")
    assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
    assert json.loads((tmp_path / "settings.json").read_text())["http_port"] == 1234


@needs_mlserver
def test_the_runtime_answers_as_the_learner_and_refuses_what_makes_no_sense(served, monkeypatch):
    from mlserver import ModelSettings, errors, types
    monkeypatch.syspath_prepend(str(SCRIPTS / "serving" / "for_mlserver"))
    import savedmodel_runtime
    own, root = served
    runtime = savedmodel_runtime.SavedModelRuntime(ModelSettings(
        name="signs", implementation=savedmodel_runtime.SavedModelRuntime, parameters={"uri": str(root / "signs")}))

    def ask(sent):
        answer = asyncio.run(runtime.predict(types.InferenceRequest.model_validate(sent)))
        assert answer.model_version == "1"
        (output,) = answer.outputs
        assert output.name == "probabilities"
        return np.reshape(output.data.root, output.shape)

    assert asyncio.run(runtime.load())
    for inputs in (episode(), episode(support_labels=np.arange(6, dtype="int32") % 3),
                   episode(query_inputs=episode()["query_inputs"].astype("float64"))):
        np.testing.assert_allclose(ask(message(inputs)), expected(own, episode()), atol=1e-5)
    batch = {name: value[None] for name, value in episode().items()}
    np.testing.assert_allclose(ask(message(batch, "adapt_batch"))[0], expected(own, episode()), atol=1e-5)
    for sent, text in refused():
        with pytest.raises(errors.InferenceError) as error:
            ask(sent)
        assert text in str(error.value) and "\n" not in str(error.value)


@needs_mlserver
def test_the_runtime_takes_strings_and_serialized_examples(tmp_path, monkeypatch):
    """Bytes as they are: those of an example may end with zeros, which NumPy's own strings lose."""
    import base64

    import tensorflow as tf
    from mlserver import ModelSettings, types
    monkeypatch.syspath_prepend(str(SCRIPTS / "serving" / "for_mlserver"))
    import savedmodel_runtime
    words = keras.Input((), dtype="string", name="words")
    model = keras.Model(words, keras.layers.Embedding(3, 2)(
        keras.layers.StringLookup(vocabulary=["inner", "outer"])(words)))
    export.saved_model(model, tmp_path / "words", serialized_examples=True)
    runtime = savedmodel_runtime.SavedModelRuntime(ModelSettings(
        name="words", implementation=savedmodel_runtime.SavedModelRuntime,
        parameters={"uri": str(tmp_path / "words"), "version": "1"}))
    assert asyncio.run(runtime.load())
    examples = [tf.train.Example(features=tf.train.Features(feature={"inputs": tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[word]))})).SerializeToString() for word in (b"outer", b"other")]
    wanted = model(tf.constant(["outer", "other"])).numpy()
    for signature, name, data, parameters in (
            ("serving_default", "inputs", ["outer", "other"], {}),
            ("serving_default_examples", "examples", [base64.b64encode(example).decode() for example in examples],
             {"content_type": "base64"})):
        answer = asyncio.run(runtime.predict(types.InferenceRequest.model_validate({
            "parameters": {"signature": signature},
            "inputs": [{"name": name, "shape": [2], "datatype": "BYTES", "data": data, "parameters": parameters}]})))
        np.testing.assert_allclose(np.reshape(answer.outputs[0].data.root, [2, 2]), wanted, atol=1e-6)


class Client:
    """A client that keeps its connection."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post(self, path, sent):
        self.connection.request("POST", path, json.dumps(sent), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body) if body else None

    def ask(self, sent):
        status, answer = self.post("/v2/models/signs/infer", sent)
        assert status == 200, answer
        (output,) = answer["outputs"]
        return answer["model_version"], np.reshape(output["data"], output["shape"])


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    """The ports of a real server."""
    root = served[1]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    with pytest.MonkeyPatch.context() as monkeypatch:
        write_settings(root, monkeypatch, host="127.0.0.1", http_port=ports[0], grpc_port=ports[1],
                       metrics_port=ports[2])
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from mlserver.cli import main; main()", "start", str(root)], stdout=output,
            stderr=subprocess.STDOUT, cwd=log.parent)
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=5)
                    connection.request("GET", "/v2/health/ready")
                    if connection.getresponse().status == 200:
                        break
                time.sleep(0.2)
            else:
                pytest.fail(f"The server does not start:\n{log.read_text()}")
            yield ports
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@needs_mlserver
@pytest.mark.slow
def test_a_real_server_answers_over_rest_and_names_what_it_refuses(served, server):
    own, client = served[0], Client(server[0])
    wanted = expected(own, episode())
    batch = {name: value[None] for name, value in episode().items()}
    for sent, shape in ((message(episode()), [4, 3]), (message(episode(), "adapt"), [4, 3]),
                        (message(batch, "adapt_batch"), [1, 4, 3])):
        version, answer = client.ask(sent)
        np.testing.assert_allclose(answer, wanted.reshape(shape), atol=1e-5)
        assert version == "1"
    for sent, text in refused():
        status, answer = client.post("/v2/models/signs/infer", sent)
        assert status == 400 and text in answer["error"], answer
    np.testing.assert_allclose(client.ask(message(episode()))[1], wanted, atol=1e-5)


@needs_mlserver
@pytest.mark.slow
def test_a_real_server_casts_labels_of_thirty_two_bits_over_grpc_and_names_others(served, server):
    import grpc
    from mlserver.grpc import dataplane_pb2, dataplane_pb2_grpc

    def ask(label_type):
        request = dataplane_pb2.ModelInferRequest(model_name="signs")
        request.parameters["signature"].string_param = "adapt"
        for name, value in episode().items():
            datatype, field = ("FP32", "fp32_contents") if name != "support_labels" else (label_type, {
                "INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}[label_type])
            entry = request.inputs.add(name=name, datatype=datatype, shape=value.shape)
            getattr(entry.contents, field).extend(value.ravel().tolist())
        with grpc.insecure_channel(f"127.0.0.1:{server[1]}") as channel:
            (output,) = dataplane_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60).outputs
        return np.reshape(output.contents.fp32_contents, output.shape)

    for label_type in ("INT32", "INT64"):
        np.testing.assert_allclose(ask(label_type), expected(served[0], episode()), atol=1e-5)
    with pytest.raises(grpc.RpcError) as error:
        ask("FP32")
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "support_labels must be of datatype INT64" in error.value.details()


@needs_mlserver
@pytest.mark.slow
def test_a_thousand_requests_of_eight_clients_go_on_while_the_version_changes(served, server):
    own, root = served
    other = learner(seed=1)
    wanted = {"1": expected(own, episode()), "2": expected(other, episode())}
    assert np.abs(wanted["1"] - wanted["2"]).max() > 0.01
    sent, own_client, seconds = message(episode(), "adapt"), threading.local(), []

    def ask(_):
        if not vars(own_client):
            own_client.made = Client(server[0])
        start = time.perf_counter()
        version, answer = own_client.made.ask(sent)
        seconds.append(time.perf_counter() - start)
        np.testing.assert_allclose(answer, wanted[version], atol=1e-5)
        return version

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        start = time.perf_counter()
        running = [pool.submit(ask, number) for number in range(1000)]
        next(concurrent.futures.as_completed(running))
        export.saved_model(other, root / "signs")
        assert Client(server[0]).post("/v2/repository/models/signs/load", {}) == (200, None)
        versions = [each.result() for each in running]
        whole = time.perf_counter() - start
    assert versions[0] == "1"
    for _ in range(20):
        assert Client(server[0]).ask(sent)[0] == "2"
    milliseconds = [1000 * value for value in seconds]
    print(f"1,000 requests of 8 clients in {whole:.1f} s: median {statistics.median(milliseconds):.0f} ms, 95th "
          f"percentile {np.percentile(milliseconds, 95):.0f} ms, longest {max(milliseconds):.0f} ms")

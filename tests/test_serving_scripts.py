"""The scripts around a server, and every command of the page on serving but the server's own.

TensorFlow Serving itself is not a Python package. In its place stands a server of the same two protocols that answers
with the exported model: messages, addresses and errors are what the scripts get from TensorFlow Serving.
"""

import concurrent.futures
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import tensorflow as tf
from script_files import import_script
from tensorflow.core.framework import tensor_pb2
from test_docs import blocks

from farhox import export, meta

ROOT = pathlib.Path(__file__).resolve().parents[1]
needs_data = pytest.mark.skipif(
    "FARHOX_DATA_DIR" not in os.environ, reason="FARHOX_DATA_DIR names no folder of TFDS' data sets")


class _Rest(http.server.BaseHTTPRequestHandler):
    """https://www.tensorflow.org/tfx/serving/api_rest, columns of JSON."""

    def do_GET(self):
        served = self.server.load()
        self._answer(200, {"model_version_status": [{"version": str(served.version), "state": "AVAILABLE"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = re.fullmatch(r"/v1/models/(\w+)(/versions/\d+)?:predict", self.path)
        if name is None or name[1] != "omniglot":
            return self._answer(404, {"error": f"Servable not found for request: {self.path}"})
        try:
            answer = self.server.load().predict(body.get("signature_name", "serving_default"), **body["inputs"])
        except tf.errors.InvalidArgumentError as error:
            return self._answer(400, {"error": error.message})
        outputs = {key: value.tolist() for key, value in answer.items()}
        return self._answer(200, {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))})

    def _answer(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class _RestServer(http.server.ThreadingHTTPServer):
    def __init__(self, load):
        super().__init__(("127.0.0.1", 0), _Rest)
        self.load = load


def start_grpc(load):
    """A gRPC server and its port."""
    grpc = pytest.importorskip("grpc")
    pytest.importorskip("tensorflow_serving")
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            inputs = {name: tf.make_ndarray(tensor_pb2.TensorProto.FromString(value.SerializeToString()))
                      for name, value in request.inputs.items()}
            try:
                outputs = load().predict(request.model_spec.signature_name, **inputs)
            except tf.errors.InvalidArgumentError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            answer = predict_pb2.PredictResponse()
            for name, value in outputs.items():
                answer.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return answer

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


@pytest.fixture
def servers():
    """Starts both servers of a folder of versions and gives their ports."""
    running = []

    def start(directory):
        loaded = {}

        def load():
            if not loaded:
                loaded["model"] = export.load(directory)
            return loaded["model"]

        rest = _RestServer(load)
        threading.Thread(target=rest.serve_forever, daemon=True).start()
        grpc_server, grpc_port = start_grpc(load)
        running.extend([rest.shutdown, lambda: grpc_server.stop(None)])
        return rest.server_address[1], grpc_port

    yield start
    for stop in running:
        stop()


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture
def script(monkeypatch):
    """Imports a script and runs its main function with flags, in this process."""
    def start(name, **values):
        module = import_script(name, monkeypatch)
        monkeypatch.setattr(module, "flags", types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values)))
        return module.main(None)

    return start


@needs_data
@pytest.mark.slow
def test_every_command_of_the_page_on_serving_runs(tmp_path, servers):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    rest, grpc = servers(tmp_path / "served" / "omniglot")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3", "PATH": os.pathsep.join(
        [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])}
    outputs = []
    for language, line, code in blocks(ROOT / "docs" / "serving.md"):
        if language != "bash":
            continue
        code = code.replace("localhost:8501", f"127.0.0.1:{rest}").replace("localhost:8500", f"127.0.0.1:{grpc}")
        # The smallest network will do.
        small = "--quick --filters=4 --meta_steps=2 --steps_per_epoch=2 --validation_episodes=10 --test_episodes=10"
        code = code.replace("--quick", small)
        done = run(["bash", "-e", "-c", code], cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"line {line}: {done.stderr}"
        outputs.append(done.stdout)
    made, asked, by_hand, _, _ = outputs
    assert "inputs['support_labels'] tensor_info" in made
    assert '"AVAILABLE"' in asked and asked.count("Accuracy on 15 queries") == 2
    assert np.shape(json.loads(by_hand)["outputs"]) == (1, 5)
    assert (tmp_path / "served" / "savedmodel_runtime.py").exists()
    assert json.loads((tmp_path / "v2.json").read_text())["inputs"][2]["name"] == "query_inputs"
    assert (tmp_path / "results" / "query_serving" / "answer.png").read_bytes().startswith(b"\x89PNG")


def test_the_list_of_models_on_the_page_is_what_tensorflow_serving_reads():
    config = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    from google.protobuf import text_format
    (models, _) = [code for language, _, code in blocks(ROOT / "docs" / "serving.md") if language == "text"]
    (model,) = text_format.Parse(models, config.ModelServerConfig()).model_config_list.config
    assert model.name == "omniglot" and dict(model.version_labels) == {"stable": 1, "canary": 2}


@pytest.mark.slow
def test_answers_errors_and_silence_of_a_server_reach_the_user(tmp_path, servers, script):
    body = meta.convolutional_body((6, 6, 1), filters=2, blocks=1)
    learner = meta.MAML(meta.few_shot_classifier(3, body), inner_steps=1)
    random = np.random.default_rng(0)
    inputs = {"support_inputs": random.random((3, 6, 6, 1), dtype="float32"), "support_labels": np.arange(3),
              "query_inputs": random.random((4, 6, 6, 1), dtype="float32")}
    np.savez(tmp_path / "good.npz", **inputs)
    np.savez(tmp_path / "bad.npz", **{**inputs, "support_labels": np.arange(3) + 1})
    export.saved_model(learner, tmp_path / "omniglot")
    rest, grpc = servers(tmp_path / "omniglot")

    def query(request, address, grpc=False, model="omniglot"):
        script("query_serving", address=f"127.0.0.1:{address}", grpc=grpc, model=model, version=1, timeout=60.0,
               request=tmp_path / request, output=tmp_path / "answer")

    expected = learner.predict((inputs["support_inputs"], inputs["support_labels"]), inputs["query_inputs"])
    for protocol in ({"address": rest}, {"address": grpc, "grpc": True}):
        query("good.npz", **protocol)
        answer = json.loads((tmp_path / "answer" / "answer.json").read_text())
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
        assert "accuracy" not in answer, "Nobody said what the queries are."
        assert (tmp_path / "answer" / "answer.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(SystemExit, match="support_labels must be integers from 0 to 2"):
            query("bad.npz", **protocol)
    with pytest.raises(SystemExit, match="The server refused the request: .*Servable not found"):
        query("good.npz", rest, model="other")
    with pytest.raises(SystemExit, match="No server answers at http://127.0.0.1:9/v1/models/omniglot/versions/1"):
        query("good.npz", 9)
    with pytest.raises(SystemExit, match="The server at 127.0.0.1:9 gave no answer: UNAVAILABLE"):
        query("good.npz", 9, grpc=True)


def test_a_folder_without_a_training_is_refused(tmp_path, script):
    with pytest.raises(SystemExit, match="holds no training with seed 0: --run must be the --output of omniglot.py"):
        script("export_model", run=tmp_path, seed=0)


def test_what_is_exported_is_the_state_of_a_training_that_goes_on(tmp_path, script, monkeypatch, capsys):
    omniglot_learner = import_script("omniglot_learner", monkeypatch)
    settings = {
        "algorithm": "maml", "ways": 3, "inner_steps": 1, "evaluation_steps": None, "inner_learning_rate": 0.1,
        "learn_learning_rates": False, "transductive": True, "filters": 2, "downsampling": "stride",
        "normalize_features": False, "outer_learning_rate": 1e-3, "decay": "none", "clipnorm": None, "meta_steps": 4}
    learner = omniglot_learner.make_learner(settings, omniglot_learner.network(settings), True)
    omniglot_learner.compile_learner(learner, settings)
    for variable in learner.problem.outer_variables:
        variable.assign(variable + 0.1)
    state = tmp_path / "runs" / "seed0"
    state.mkdir(parents=True)
    learner.save_weights(state / "3.weights.h5")
    (state / "state.json").write_text(json.dumps({"weights": "3.weights.h5"}))
    (tmp_path / "runs" / "settings.json").write_text(json.dumps(settings))
    script("export_model", run=tmp_path, seed=0, directory=tmp_path / "served", version=None, labels=None,
           serialized_examples=False, warmup=False, float16=False, jit_compile=False)
    printed = capsys.readouterr().out
    assert "maml with 3 ways" in printed and "support_labels: int64 (None,)" in printed
    random = np.random.default_rng(0)
    support, labels, query = random.random((3, 28, 28, 1)), np.arange(3), random.random((4, 28, 28, 1))
    answer = export.load(tmp_path / "served").predict(support_inputs=support, support_labels=labels, query_inputs=query)
    expected = learner.predict((support.astype("float32"), labels), query.astype("float32"))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)


@pytest.mark.slow
def test_the_benchmark_of_serving_times_requests_of_every_size(tmp_path, script, capsys):
    script("benchmark_serving", inner_steps=1, filters=2, queries=["1", "3"], requests=2, clients=2,
           output=tmp_path / "serving.json")
    results = json.loads((tmp_path / "serving.json").read_text())
    assert [row["queries"] for row in results["MAML"]] == [1, 3]
    assert all(value > 0 for rows in results.values() for row in rows for value in row.values())
    assert "| MAML" in capsys.readouterr().out

r"""Asks a running TensorFlow Serving to learn a new task of Omniglot, and draws its answer.

    python scripts/serving/query_serving.py --model=omniglot
    python scripts/serving/query_serving.py --model=omniglot --grpc \
        --address=localhost:8500

The request is a test episode that the model has never seen: a support set and queries. The picture shows both, with the
class that the server gives each query and how sure it is. --request sends arrays of a file of your own instead.
"""

import json
import os
import pathlib
import sys
import urllib.error
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import program


def define_flags():
    flags.DEFINE_string("address", None, "Host and port. Default: localhost:8501, or localhost:8500 with --grpc.")
    flags.DEFINE_bool("grpc", False, "Speak gRPC instead of REST; needs the package tensorflow-serving-api.")
    flags.DEFINE_string("model", "omniglot", "Name of the served model.")
    flags.DEFINE_integer("version", None, "Its version. Default: the one that the server holds for the latest.")
    flags.DEFINE_float("timeout", 30.0, "Seconds to wait for the answer.", lower_bound=0.1)
    flags.DEFINE_string("request", None, "File of NumPy (.npz) with support_inputs, support_labels and query_inputs; "
                        "query_labels too, if they are known.")
    flags.DEFINE_integer("episode", 0, "Number of the test episode.", lower_bound=0)
    flags.DEFINE_integer("ways", 5, "Classes of the episode.", lower_bound=1)
    flags.DEFINE_integer("shots", 1, "Support examples of each class.", lower_bound=1)
    flags.DEFINE_integer("queries", 3, "Queries of each class.", lower_bound=1)
    flags.DEFINE_string("data_dir", os.environ.get("FARHOX_DATA_DIR"), "Folder of TFDS' data sets.")
    flags.DEFINE_string("output", "results/query_serving", "Folder for answer.json and answer.png.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

import numpy as np
import tensorflow as tf

from _shared import experiment, pictures
from farhox import meta


def task():
    """Inputs of the signature `adapt`, and the labels of the queries or None."""
    if flags.FLAGS.request:
        arrays = dict(np.load(flags.FLAGS.request))
        labels = arrays.pop("query_labels", None)
        return {name: as_served(value) for name, value in arrays.items()}, labels
    (_, _, test) = meta.load_omniglot(flags.FLAGS.data_dir)
    source = meta.ClassificationEpisodes(*test, flags.FLAGS.ways, flags.FLAGS.shots, flags.FLAGS.queries, seed=0)
    support, query = source.draw(tf.constant(flags.FLAGS.episode, tf.int64))
    inputs = {"support_inputs": support[0], "support_labels": support[1], "query_inputs": query[0]}
    return {name: as_served(value.numpy()) for name, value in inputs.items()}, query[1].numpy()


def as_served(array):
    """The array in the type that the signature takes: over gRPC a server refuses any other."""
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) and array.ndim == 1 else (
        array.astype(np.float32))


def ask_rest(address, inputs):
    """The probabilities that the server answers with, over REST."""
    version = f"/versions/{flags.FLAGS.version}" if flags.FLAGS.version else ""
    url = f"http://{address}/v1/models/{flags.FLAGS.model}{version}:predict"
    body = json.dumps({"signature_name": "adapt", "inputs": {name: value.tolist() for name, value in inputs.items()}})
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=flags.FLAGS.timeout) as answer:
            return np.array(json.load(answer)["outputs"])  # Of a single output REST leaves out the name.
    except urllib.error.HTTPError as error:
        raise SystemExit(f"The server refused the request: {error.read().decode()}") from error
    except OSError as error:
        raise SystemExit(f"No server answers at {url}: {error}") from error


def ask_grpc(address, inputs):
    """The probabilities that the server answers with, over gRPC."""
    program.require(tensorflow_serving="serving")
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = flags.FLAGS.model, "adapt"
    if flags.FLAGS.version:
        request.model_spec.version.value = flags.FLAGS.version
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    try:
        with grpc.insecure_channel(address) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            (answer,) = stub.Predict(request, timeout=flags.FLAGS.timeout).outputs.values()
    except grpc.RpcError as error:
        raise SystemExit(f"The server at {address} gave no answer: {error.code().name}, {error.details()}") from error
    return tf.make_ndarray(answer)


def draw(inputs, labels, probabilities, path):
    """The support set, a row for each class, and the queries under the class that the server gives them."""
    support, query = inputs["support_inputs"], inputs["query_inputs"]
    classes = np.unique(inputs["support_labels"])
    given = probabilities.argmax(axis=1)
    shots = max((inputs["support_labels"] == label).sum() for label in classes)
    columns = max(shots, -(-len(query) // len(classes)))
    order = np.arange(len(query)) if labels is None else np.argsort(labels, kind="stable")
    size = (1.1 * (shots + columns) + 1, 1.25 * len(classes) + 0.9)
    with pictures.figure(path, len(classes), shots + columns, size) as axes:
        axes = np.reshape(axes, [len(classes), shots + columns])
        for axis in axes.flat:
            axis.axis("off")
        axes[0, 0].figure.suptitle(f"Left: {shots} example{'s' if shots > 1 else ''} of each class to learn from.\n"
                                   "Right: queries, the class they are given, how sure.", fontsize=10)
        for row, label in enumerate(classes):
            for column, image in enumerate(support[inputs["support_labels"] == label]):
                axes[row, column].imshow(1 - image[..., 0], cmap="gray")
                axes[row, column].set_title(f"class {label}", color=pictures.GREY, fontsize=9)
        for place, index in enumerate(order):
            axis = axes[place // columns, shots + place % columns]
            right = labels is None or labels[index] == given[index]
            axis.imshow(1 - query[index][..., 0], cmap="gray")
            axis.set_title(f"{given[index]}: {100 * probabilities[index].max():.0f} %" + ("" if right else "\nwrong"),
                           fontsize=9, color=pictures.BLUE if right else pictures.ORANGE)


def main(_):
    program.require(matplotlib="serving")
    inputs, labels = task()
    speaks_grpc = flags.FLAGS.grpc
    address = flags.FLAGS.address or ("localhost:8500" if speaks_grpc else "localhost:8501")
    probabilities = (ask_grpc if speaks_grpc else ask_rest)(address, inputs)
    output = pathlib.Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    answer = {"classes": probabilities.argmax(axis=1).tolist(), "probabilities": probabilities.tolist()}
    if labels is not None:
        answer["accuracy"] = float(np.mean(probabilities.argmax(axis=1) == labels))
        print(f"Accuracy on {len(labels)} queries: {100 * answer['accuracy']:.1f} %")
    experiment.write_json(output / "answer.json", experiment.rounded(answer))
    draw(inputs, labels, probabilities, output / "answer.png")
    print(f"Answer and picture: {output.resolve()}")


if __name__ == "__main__":
    program.run(main)

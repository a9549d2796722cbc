r"""Writes what MLServer needs to serve an export: settings of the server and of the model, and the runtime they name.

    python scripts/serving/mlserver_settings.py --directory=served/omniglot
    mlserver start served

The files are model-settings.json in the folder of the model, and settings.json and savedmodel_runtime.py in the folder
above. An export of a later version is served after the request POST /v2/repository/models/omniglot/load, without a
pause: the version before answers until then.
"""

import json
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import program

RUNTIME = pathlib.Path(__file__).resolve().parent / "for_mlserver" / "savedmodel_runtime.py"


def define_flags():
    flags.DEFINE_string("directory", "served/omniglot", "Folder of the served model, with its versions.")
    flags.DEFINE_integer("version", None, "The version to serve. Default: the greatest when the model is loaded.",
                         lower_bound=1)
    flags.DEFINE_string("host", "127.0.0.1", "Address that the server listens at.")
    flags.DEFINE_integer("http_port", 8080, "Port of the V2 protocol over REST.", lower_bound=1)
    flags.DEFINE_integer("grpc_port", 8081, "Port of the V2 protocol over gRPC.", lower_bound=1)
    flags.DEFINE_integer("metrics_port", 8082, "Port of the numbers for Prometheus.", lower_bound=1)


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.", tensorflow=False)


def write_settings(directory, version=None, **server):
    """Writes the three files.

    Args:
        directory: Folder of the served model.
        version: Positive int, or None for the greatest.
        **server: Settings of the server: host, http_port, grpc_port, metrics_port.
    """
    directory = pathlib.Path(directory).resolve()
    if not any(path.name.isdigit() for path in directory.glob("*/")):
        raise SystemExit(f"{directory} must hold a version of a model, as export_model.py writes it.")
    model = {"name": directory.name, "implementation": f"{RUNTIME.stem}.SavedModelRuntime", "platform": "tensorflow",
             "parameters": {"uri": ".", **({"version": str(version)} if version else {})}}
    # TensorFlow computes in threads of its own. Processes would each hold the model.
    for file, settings in ((directory / "model-settings.json", model),
                           (directory.parent / "settings.json", {"parallel_workers": 0, "debug": False, **server})):
        file.write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copyfile(RUNTIME, directory.parent / RUNTIME.name)


def main(_):
    directory = pathlib.Path(flags.FLAGS.directory)
    write_settings(directory, flags.FLAGS.version,
                   **{name: getattr(flags.FLAGS, name) for name in ("host", "http_port", "grpc_port", "metrics_port")})
    print(f"The server starts with: mlserver start {directory.parent}")


if __name__ == "__main__":
    program.run(main)

r"""A page to draw on: five characters of your own, then new ones, and the answer of an adapted learner while you draw.

    python scripts/few_shot/omniglot.py --algorithm=protonet --meta_steps=2000 \
        --filters=32 --output=results/drawn
    python scripts/serving/export_model.py --run=results/drawn \
        --directory=served/drawn
    python scripts/serving/draw_page.py --directory=served/drawn

Serves the page at an address of this machine. The learner is an exported SavedModel, which adapts to the examples in
every request: any export of a classifier of 28 x 28 drawings will do.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import program

PAGE = pathlib.Path(__file__).resolve().parent / "page" / "draw.html"
STROKE, EXTENT = 1.4, 18  # Pixels of 28 that a line of Omniglot is wide, and its characters are large.


def define_flags():
    flags.DEFINE_string("directory", "served/drawn", "Folder of the served model; its versions are in it.")
    flags.DEFINE_integer("version", None, "Which version. Default: the greatest.", lower_bound=1)
    flags.DEFINE_string("host", "127.0.0.1", "Address to serve at.")
    flags.DEFINE_integer("port", 8000, "Port to serve at.", lower_bound=0)


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts the page again.")

import numpy as np
import tensorflow as tf

from farhox import export


def make_app(served, ways=5):
    """The page and what it asks, as a Flask application.

    Args:
        served: A `farhox.export.ServedModel` with a signature `adapt` of images [side, side, 1].
        ways: Positive int, examples on the page; no more than the learner has classes.
    """
    import flask
    app = flask.Flask(__name__)
    side = served.signatures["adapt"]["inputs"]["query_inputs"].shape[1]
    ways = min(ways, served.signatures["adapt"]["outputs"]["probabilities"].shape[-1])

    @app.get("/")
    def page():
        return flask.render_template_string(
            PAGE.read_text(encoding="utf-8"), ways=ways, side=side, stroke=STROKE, extent=EXTENT)

    @app.post("/answer")
    def answer():
        try:
            asked = flask.request.get_json()
            support, query = (np.reshape(np.array(asked[name], "float32"), [-1, side, side, 1])
                              for name in ("support", "query"))
            found = served.predict(
                "adapt", support_inputs=support, support_labels=asked["labels"], query_inputs=query)
        except (KeyError, TypeError, ValueError) as error:
            return {"error": f"A question must have support, labels and query, drawings of {side * side} numbers. "
                             f"Received: {error}"}, 400
        except tf.errors.InvalidArgumentError as error:
            return {"error": error.message}, 400
        return {"probabilities": found["probabilities"][0].tolist()}

    return app


def main(_):
    program.require(flask="demo")
    from werkzeug import serving

    class Quiet(serving.WSGIRequestHandler):
        """Without a line for each of the many questions."""

        def log_request(self, *_):
            pass

    served = export.load(flags.FLAGS.directory, flags.FLAGS.version)
    server = serving.make_server(
        flags.FLAGS.host, flags.FLAGS.port, make_app(served), threaded=True, request_handler=Quiet)
    print(f"Draw at http://{flags.FLAGS.host}:{server.port}/ (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    program.run(main)

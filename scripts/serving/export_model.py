r"""Exports a few-shot learner that scripts/few_shot/omniglot.py has trained, as a new version of a served model.

    python scripts/serving/export_model.py --run=results/omniglot_maml \
        --directory=served/omniglot

The folder of the run may be that of a finished training or of one that is still going on: then the state that was saved
last is exported. Prints the signatures of what it wrote.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import program


def define_flags():
    flags.DEFINE_string("run", "results/omniglot", "The --output folder of a training by omniglot.py.")
    flags.DEFINE_integer("seed", 0, "Which of the trainings in it.", lower_bound=0)
    flags.DEFINE_string("directory", "served/omniglot", "Folder of the served model; its versions are in it.")
    flags.DEFINE_integer("version", None, "Number of the version. Default: the next free one.", lower_bound=1)
    flags.DEFINE_string("labels", None, "File with the name of each output, one in a line.")
    flags.DEFINE_bool("serialized_examples", False, "Signatures that take serialized tf.train.Examples, too.")
    flags.DEFINE_bool("warmup", False, "Requests that a server runs when it loads the model.")
    flags.DEFINE_bool("float16", False, "Store weights in half precision.")
    flags.DEFINE_bool("jit_compile", False, "Compile with XLA on the server.")


if __name__ == "__main__":
    program.parse(define_flags, when_stopped="The same command starts anew.")

from _shared.omniglot_learner import compile_learner, make_learner, network
from farhox import export


def weights_of(run, seed):
    """The file of weights of a training: its result, or the state that was saved last."""
    finished, state = run / f"seed{seed}.weights.h5", run / "runs" / f"seed{seed}" / "state.json"
    if finished.exists():
        return finished
    if state.exists():
        return state.parent / json.loads(state.read_text())["weights"]
    raise SystemExit(f"{run} holds no training with seed {seed}: --run must be the --output of omniglot.py.")


def trained_learner(run, seed):
    """The learner of a training, and the settings of its run."""
    weights = weights_of(run, seed)
    settings = json.loads((run / "runs" / "settings.json").read_text())
    learner = make_learner(settings, network(settings), settings["transductive"])
    compile_learner(learner, settings)
    learner.load_weights(weights)
    return learner, settings


def main(_):
    learner, settings = trained_learner(pathlib.Path(flags.FLAGS.run), flags.FLAGS.seed)
    labels = flags.FLAGS.labels and pathlib.Path(flags.FLAGS.labels).read_text(encoding="utf-8").splitlines()
    path = export.saved_model(
        learner, flags.FLAGS.directory, flags.FLAGS.version, labels, flags.FLAGS.serialized_examples,
        flags.FLAGS.warmup, flags.FLAGS.float16, flags.FLAGS.jit_compile)
    print(f"{settings['algorithm']} with {settings['ways']} ways: {path.resolve()}")
    for name, sides in export.load(path.parent, int(path.name)).signatures.items():
        print(f"  {name}")
        for side, arrow in (("inputs", " "), ("outputs", "->")):
            for spec in sides[side].values():
                print(f"    {arrow:2} {spec.name}: {spec.dtype.name} {spec.shape}")


if __name__ == "__main__":
    program.run(main)

r"""Meta-training on Omniglot over several processes or machines, with the learners and flags of omniglot.py.

    python scripts/few_shot/launch_workers.py --workers=2 \
        scripts/few_shot/distributed_omniglot.py --quick
    TF_CONFIG='{"cluster": {"worker": ["host1:2222", "host2:2222"]},
                "task": {"type": "worker", "index": 0}}' \
        python scripts/few_shot/distributed_omniglot.py \
        --flagfile=scripts/few_shot/flags/omniglot_maml.cfg \
        --output=/shared/omniglot_maml

Each process is the worker that TF_CONFIG names, and --output is a folder that all workers see. Every worker takes its
share of each meta-batch, hypergradients are averaged, and the first worker (or the chief) saves the state every
--save_every seconds, tests the learner at the end and writes the results. When a worker dies the others end too, with
an error: all are started again with the same commands, which launch_workers.py does by itself, and go on from the last
state to the weights of a run that was not interrupted. When a worker is told to stop, by SIGTERM or Ctrl-C, all save
and stop after the same meta-step. Without TF_CONFIG there is one worker.
"""

import hashlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program
from _shared.omniglot_flags import QUICK, SETTINGS, define_flags


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import tensorflow as tf

from _shared import experiment
from _shared.omniglot_learner import compile_learner, make_learner, network, sources
from farhox import meta


def work(strategy, settings, output, data_dir, seed, save_every):
    """The part of one worker."""
    chief = meta.is_chief(strategy)
    if chief:
        experiment.Folder(output, settings)
    train, _, test = sources(settings, data_dir, seed)
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        learner = make_learner(settings, network(settings), settings["transductive"])
        compile_learner(learner, settings)
    bar = experiment.ProgressBar(settings["meta_steps"], "meta-step") if chief else None
    losses = meta.fit_distributed(
        learner, train, settings["meta_batch_size"], settings["meta_steps"], output / "states", save_every,
        report=(lambda done, loss: bar.update(done, {"outer_loss": loss})) if chief else None)
    # The same for all workers, bit for bit: that their logs agree is easily seen.
    print(f"SHA-256 of the learner's variables: {digest(learner)}", flush=True)
    if chief:
        weights = output / f"seed{seed}.weights.h5"
        learner.save_weights(weights)
        judge = make_learner(settings, network(settings), settings["transductive"])
        compile_learner(judge, settings)
        judge.load_weights(weights)
        result = judge.evaluate(test, settings["test_episodes"])
        print(f"Test accuracy {100 * result['accuracy']:.2f} % ± {100 * result['accuracy_interval']:.2f}")
        experiment.write_json(output / "results.json", experiment.rounded(
            {"settings": settings, "workers": strategy.num_replicas_in_sync, "seed": seed, "test": result,
             "losses": losses}))


def digest(learner):
    """SHA-256 over the bytes of all that a learner learns and of its optimizer's variables.

    Its other variables hold the last outer loss too, which is that of a worker's own share.
    """
    total = hashlib.sha256()
    for variable in [*learner.problem.outer_variables, *learner.optimizer.variables]:
        total.update(keras.ops.convert_to_numpy(variable).tobytes())
    return total.hexdigest()


def main(_):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # Before anything else of TensorFlow.
    settings = experiment_flags.settings(SETTINGS, QUICK)
    if settings["algorithm"] == "protonet":
        raise SystemExit("--algorithm must be a learner with an inner training. Received: protonet")
    work(strategy, settings, pathlib.Path(flags.FLAGS.output), flags.FLAGS.data_dir, flags.FLAGS.seed,
         flags.FLAGS.save_every)


if __name__ == "__main__":
    program.run(main)

"""Meta-training over the replicas of several processes, where Keras' `fit` does not run."""

import json
import os
import pathlib
import time

import tensorflow as tf

from farhox.meta.episodes import EpisodeSource
from farhox.meta.learner import Learner


def fit_distributed(learner, episodes, meta_batch_size, meta_steps, folder, save_every=60.0, report=None):
    """Trains a learner over all replicas of the strategy it was made in, and goes on from the last checkpoint.

    Every process of a `tf.distribute.MultiWorkerMirroredStrategy` calls it with the same arguments. Each replica
    takes its share of every meta-batch; the hypergradients are averaged over replicas and every replica makes the same
    update. The chief saves checkpoints, from which all processes go on when they are started again. The episodes go
    on too: a run that was interrupted ends with the weights of one that was not.

    ```python
    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # The first of TensorFlow in each process; reads TF_CONFIG.
    with strategy.scope():
        learner = farhox.meta.MAML(make_model())
        learner.compile(keras.optimizers.Adam(1e-3))
    farhox.meta.fit_distributed(learner, episodes, meta_batch_size=8, meta_steps=10000, folder="/shared/run")
    ```

    Args:
        learner: A compiled `Learner` that was made, with its model, in the scope of a strategy.
        episodes: An `EpisodeSource`, the same in all processes.
        meta_batch_size: Positive int, episodes in a meta-step over all replicas; a multiple of their number.
        meta_steps: Positive int.
        folder: Folder for the checkpoint that all processes see.
        save_every: Float, seconds between two checkpoints; there is always one at the end.
        report: Callable of the number of meta-steps done and the outer loss, called after each of them.

    Returns:
        List of floats, the outer loss of each meta-step, those before an interruption included.

    Raises:
        TypeError: If `learner` is not a `Learner` or `episodes` not an `EpisodeSource`.
        ValueError: If the learner was not compiled, or `meta_batch_size` cannot be shared out evenly.
        RuntimeError: If too many hypergradients in a row were not finite.
    """
    if not isinstance(learner, Learner) or not isinstance(episodes, EpisodeSource):
        raise TypeError("fit_distributed takes a farhox.meta.Learner and a farhox.meta.EpisodeSource. "
                        f"Received: {type(learner).__name__} and {type(episodes).__name__}")
    if not learner.compiled:
        raise ValueError("The learner must be compiled, in the scope of its strategy. Received one that is not.")
    strategy = learner.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    if meta_batch_size % replicas:
        raise ValueError("meta_batch_size must be a multiple of the number of replicas. "
                         f"Received: meta_batch_size={meta_batch_size} for {replicas} replicas")
    checkpoint = _Checkpoint(folder)
    losses = checkpoint.restore(learner)
    start, share = len(losses) * meta_batch_size, meta_batch_size // replicas
    data = iter(strategy.distribute_datasets_from_function(lambda context: episodes.dataset(
        share, start, shards=context.num_input_pipelines, shard=context.input_pipeline_id)))

    def hyper_iteration(element):
        return learner._hyper_iteration(*learner._hyper_iteration_data(element, training=True)).outer_loss

    @tf.function(autograph=False)
    def meta_step(element):
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, strategy.run(hyper_iteration, (element,)), axis=None)

    learner.start_counting_skips()
    saved = time.monotonic()
    for done in range(len(losses) + 1, meta_steps + 1):
        losses.append(float(meta_step(next(data))))
        learner.raise_if_diverged()
        if is_chief(strategy) and (done == meta_steps or time.monotonic() - saved >= save_every):
            checkpoint.save(learner, losses)
            saved = time.monotonic()
        if report is not None:
            report(done, losses[-1])
    return losses


class _Checkpoint:
    """The state of a training in a folder: a file of weights, and one of JSON that names it and is replaced in one go.

    The chief writes only after a meta-step, which all processes take part in and so have read before.
    """

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)
        self._file = self._folder / "checkpoint.json"

    def restore(self, learner):
        """Loads the state if there is one, and returns the losses until then."""
        if not self._file.exists():
            return []
        state = json.loads(self._file.read_text())
        learner.load_weights(self._folder / state["weights"])
        return state["losses"]

    def save(self, learner, losses):
        weights = f"{len(losses)}.weights.h5"
        self._folder.mkdir(parents=True, exist_ok=True)
        learner.save_weights(self._folder / weights)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({"weights": weights, "losses": losses}))
        os.replace(part, self._file)
        for old in self._folder.glob("*.weights.h5"):
            if old.name != weights:
                old.unlink()


def is_chief(strategy):
    """Whether this process is the one that writes: the only one, the chief, or worker 0 where there is no chief."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    return resolver.task_type == ("chief" if "chief" in resolver.cluster_spec().jobs else "worker") and (
        resolver.task_id == 0)

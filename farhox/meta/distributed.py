"""Meta-training over the replicas of several processes, where Keras' `fit` does not run."""

import os
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from farhox._core import checks
from farhox._core.sums import sums_as_written
from farhox.meta.episodes import EpisodeSource
from farhox.meta.learner import Learner
from farhox.training.resume import assign_variables, variables_with_names
from farhox.training.saved_states import SavedStates
from farhox.training.signals import Signals


@sums_as_written()
def fit_distributed(learner: Learner, episodes: EpisodeSource, meta_batch_size: int, meta_steps: int,
                    folder: str | os.PathLike, save_every: float = 60.0,
                    report: Callable[..., Any] | None = None) -> Any:
    """Trains a learner over all replicas of the strategy it was made in, and goes on from the last saved state.

    Every process of a `tf.distribute.MultiWorkerMirroredStrategy` calls it with the same arguments. Each replica
    takes its share of every meta-batch; the hypergradients are averaged over replicas and every replica makes the same
    update. The chief saves states, in the same way as `farhox.callbacks.Resume`, from which all processes go on when
    they are started again. The episodes go on too: a run that was interrupted ends with the weights of one that was
    not. When one of the processes gets SIGTERM, SIGHUP or Ctrl-C, all end after the same meta-step, with its state
    saved.

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
        folder: Folder of this run alone that all processes see.
        save_every: Float, seconds between two saved states; the end is always saved.
        report: Callable of the number of meta-steps done and the outer loss, called after each of them.

    Returns:
        List of floats, the outer loss of each meta-step, those before an interruption included.

    Raises:
        TypeError: If `learner` is not a `Learner`, `episodes` not an `EpisodeSource`, `folder` no path or `report` not
            callable.
        ValueError: If a number is out of range, the learner was not compiled, `meta_batch_size` cannot be shared out
            evenly, or a saved state is of another learner, or all of them are damaged.
        OSError: If a state cannot be saved.
        RuntimeError: If too many hypergradients in a row were not finite.
    """
    if not isinstance(learner, Learner) or not isinstance(episodes, EpisodeSource):
        raise TypeError("fit_distributed takes a farhox.meta.Learner and a farhox.meta.EpisodeSource. "
                        f"Received: {type(learner).__name__} and {type(episodes).__name__}")
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise TypeError(f"folder must be the path of a folder that all processes see. Received: {folder!r}")
    for name, value in (("meta_batch_size", meta_batch_size), ("meta_steps", meta_steps)):
        checks.positive_integer(name, value)
    checks.non_negative_number("save_every", save_every)
    if report is not None and not callable(report):
        raise TypeError(f"report must be a callable (meta-steps done, outer loss). Received: {report!r}")
    if not learner.compiled:
        raise ValueError("The learner must be compiled, in the scope of its strategy. Received one that is not.")
    strategy = learner.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    if meta_batch_size % replicas:
        raise ValueError("meta_batch_size must be a multiple of the number of replicas. "
                         f"Received: meta_batch_size={meta_batch_size} for {replicas} replicas")
    states, signals, chief = SavedStates(folder), Signals(), is_chief(strategy)
    state = states.load()
    losses = [] if state is None else state["losses"]
    if state is not None:
        assign_variables(learner, state["variables"], states.path)
    if chief and len(losses) < meta_steps:
        states.check_writable()
    start, share = len(losses) * meta_batch_size, meta_batch_size // replicas
    data = iter(strategy.distribute_datasets_from_function(lambda context: episodes.dataset(
        share, start, shards=context.num_input_pipelines, shard=context.input_pipeline_id)))

    def hyper_iteration(element, stop):
        loss = learner._hyper_iteration(*learner._hyper_iteration_data(element, training=True)).outer_loss
        return tf.stack([loss, tf.cast(stop, loss.dtype)])

    @tf.function(autograph=False)
    def meta_step(element, stop):
        # Whether somebody is to stop goes round with the loss: all processes stop after the same meta-step.
        return tf.unstack(strategy.reduce(
            tf.distribute.ReduceOp.MEAN, strategy.run(hyper_iteration, (element, stop)), axis=None))

    def save():
        if chief:
            states.save({"variables": variables_with_names(learner), "losses": losses})

    learner.start_counting_skips()
    saved = time.monotonic()
    signals.start()
    try:
        for done in range(len(losses) + 1, meta_steps + 1):
            loss, stop = meta_step(next(data), tf.constant(signals.received is not None))
            losses.append(float(loss))
            learner.raise_if_diverged()
            if done == meta_steps or stop > 0 or time.monotonic() - saved >= save_every:
                save()
                saved = time.monotonic()
            if report is not None:
                report(done, losses[-1])
            if stop > 0:
                signals.end(f"The state after {done} meta-steps is saved in {states.path}: start all processes again "
                            "to go on." if chief else None)
    finally:
        signals.stop()
    return losses


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes: the only one, the chief, or worker 0 where there is no chief."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    return resolver.task_type == ("chief" if "chief" in resolver.cluster_spec().jobs else "worker") and (
        resolver.task_id == 0)

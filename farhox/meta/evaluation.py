"""The field's protocol: means over many episodes, with 95 % intervals."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from farhox._core import checks
from farhox._core.types import Array
from farhox.meta.episode_checks import check_finite_episodes
from farhox.meta.episodes import EpisodeSource


def evaluate_episodes(judge: Callable[..., Any], episodes: EpisodeSource, count: int = 600,
                      meta_batch_size: int = 10) -> dict[str, Any]:
    """Means over the first episodes of a source.

    Args:
        judge: Callable, `Episode` with a leading axis of episodes -> dictionary of tensors [episodes].
        episodes: An `EpisodeSource`.
        count: Positive int, the number of episodes.
        meta_batch_size: Positive int, episodes in a call; the last call takes what is left.

    Returns:
        Dictionary: for each entry its mean, and under `<name>_interval` half the width of its 95 % interval, 1.96
        standard errors; "episodes", their number.

    Raises:
        TypeError: If `episodes` is not an `EpisodeSource`.
        ValueError: If `count` or `meta_batch_size` is not a positive integer, or an episode holds NaN or infinity.
    """
    if not isinstance(episodes, EpisodeSource):
        raise TypeError("Episodes must come from a farhox.meta.EpisodeSource, for example ClassificationEpisodes. "
                        f"Received: {type(episodes).__name__}")
    checks.positive_integer("The number of episodes", count)
    checks.positive_integer("meta_batch_size", meta_batch_size)
    values, left = {}, count % meta_batch_size
    for start, size, number in ((0, meta_batch_size, count - left), (count - left, left, left)):
        data = episodes.dataset(size, start, number) if number else ()
        for first, batch in zip(itertools.count(start, size), data):
            judged = {name: value.numpy() for name, value in judge(batch).items()}
            if not all(np.isfinite(value).all() for value in judged.values()):
                check_finite_episodes(batch, first)
            for name, value in judged.items():
                values.setdefault(name, []).append(value)
    result = {}
    for name, parts in values.items():
        result[name], result[f"{name}_interval"] = mean_and_interval(np.concatenate(parts))
    return {**result, "episodes": count}


def mean_and_interval(values: Array) -> tuple[float, float]:
    """Mean of independent values, and half the width of its 95 % interval: 1.96 standard errors.

    Raises:
        ValueError: If `values` is not a list of numbers, at least one.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a list of at least one number. Received shape: {values.shape}")
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean()), float(1.96 * error)

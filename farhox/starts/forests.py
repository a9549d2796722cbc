"""A random forest for each data set of a table: scores of configurations that were not evaluated."""

from __future__ import annotations

from typing import Any

import numpy as np

from farhox.starts.evaluations import PriorEvaluations

_MOST_ROWS = 1000  # That a tree is grown on.


class Forests:
    """Random forests on the scaled scores, one for each data set, all read in one pass.

    Args:
        table: A `PriorEvaluations`.
        trees: Positive int, in each forest.
        seed: Int.

    Raises:
        ImportError: If scikit-learn is not installed.
    """

    def __init__(self, table: PriorEvaluations, trees: int, seed: int) -> None:
        ensemble = _scikit_learn()
        units, scores = table.units(), table.scaled_scores()
        grown = []
        for index, row in enumerate(scores):
            known = np.isfinite(row)
            count = int(np.sum(known))
            forest = ensemble.RandomForestRegressor(
                trees, max_samples=min(count, _MOST_ROWS), random_state=seed + index, n_jobs=1)
            grown.append(forest.fit(units[known], row[known]).estimators_)
        self._pack([[estimator.tree_ for estimator in forest] for forest in grown])

    def _pack(self, forests: list[list[Any]]) -> None:
        """All nodes of all trees one after the other. A leaf leads to itself, so that all paths can be as long."""
        features, thresholds, left, right, values, roots, begin, depth = [], [], [], [], [], [], 0, 0
        for forest in forests:
            for tree in forest:
                own = np.arange(tree.node_count)
                leaf = tree.children_left < 0
                features.append(np.where(leaf, 0, tree.feature))
                thresholds.append(np.where(leaf, np.inf, tree.threshold))
                left.append(begin + np.where(leaf, own, tree.children_left))
                right.append(begin + np.where(leaf, own, tree.children_right))
                values.append(tree.value[:, 0, 0])
                roots.append(begin)
                begin, depth = begin + tree.node_count, max(depth, tree.max_depth)
        self._features, self._thresholds, self._values = map(np.concatenate, (features, thresholds, values))
        self._next = np.stack([np.concatenate(right), np.concatenate(left)], axis=1).reshape(-1)
        self._roots, self._depth = np.array(roots).reshape(len(forests), -1), depth

    def predict(self, units: np.ndarray) -> np.ndarray:
        """Scaled scores [data sets, points] at points [data sets, points, hyperparameters] from 0 to 1."""
        points = units.astype("float32")  # As scikit-learn compares them.
        count, hyperparameters = points.shape[1:]
        flat = points.reshape(-1)
        offset = (np.arange(len(points) * count) * hyperparameters).reshape(len(points), 1, count)
        node = np.broadcast_to(self._roots[:, :, np.newaxis], (*self._roots.shape, count))
        for _ in range(self._depth):
            goes_left = flat[offset + self._features[node]] <= self._thresholds[node]
            node = self._next[2 * node + goes_left]
        return np.mean(self._values[node], axis=1)


def _scikit_learn():
    try:
        from sklearn import ensemble
    except ImportError as error:
        raise ImportError("farhox.starts.SymbolicDefaults predicts scores with the package scikit-learn, which is not "
                          "installed: pip install 'farhox[starts]'") from error
    return ensemble

"""Features that all inner steps share: computed once per inner training instead of in each step."""

from farhox._core import autodiff
from farhox._core.inner_state import float_leaves, with_float_leaves
from farhox.data.batches import RepeatedBatch
from farhox.problem.bilevel import BilevelProblem


def with_shared_features(problem, inner_batches):
    """The problem with the features of a batch that is the same in every step; without such, the problem itself.

    Args:
        problem: A `BilevelProblem`.
        inner_batches: Inner batches of one inner training.

    Returns:
        A `BilevelProblem`. Where features are shared they are further outer values: `outer_values` returns those of the
        outer variables and after them the features, lists of derivatives have entries for both, and its method
        `through_features` brings them together.
    """
    if not problem.has_features or not isinstance(inner_batches, RepeatedBatch):
        return problem
    return _SharedFeatures(problem, inner_batches.batch)


class _SharedFeatures(BilevelProblem):
    """See `with_shared_features`."""

    def __init__(self, problem, batch):
        # Everything but the features is that of the problem.
        vars(self).update(vars(problem))
        self._like = None

        def leaves(outer):
            self._like = problem.features(batch, outer)
            return float_leaves(self._like)

        self._linearization = autodiff.Linearization(leaves, [], problem.outer_values())

    def outer_values(self):
        return super().outer_values() + self._linearization.outputs

    def features(self, batch, outer):
        return with_float_leaves(self._like, outer[len(self.outer_variables):])

    def is_reached_by_features(self, variable):
        products = self._linearization.parameter_product(self._linearization.outputs)
        return any(v is variable and product is not None for v, product in zip(self.outer_variables, products))

    def through_features(self, gradients):
        """Derivatives with respect to the outer variables, of those with respect to `outer_values`."""
        count = len(self.outer_variables)
        products = self._linearization.parameter_product(gradients[count:])
        return [total if product is None else total + product
                for total, product in zip(gradients[:count], products)]

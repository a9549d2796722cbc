"""Checks, comparisons, reports and pictures of hypergradients and of what was learned."""

from farhox.insight.diagnostics import compare_hypergradients
from farhox.insight.differences import check_hypergradient
from farhox.insight.health import health

__all__ = ["check_hypergradient", "compare_hypergradients", "health"]

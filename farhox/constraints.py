"""Projections of outer variables: the public door to `farhox.outer.constraints`."""

from farhox.outer.constraints import Box, CappedSimplex, Simplex

__all__ = ["Box", "CappedSimplex", "Simplex"]

"""Pictures of what was learned: the public door to `farhox.insight.plots`."""

from farhox.insight.plots import (
    example_weights,
    hypergradients,
    outer_loss_grid,
    response_surface,
    schedules,
    suspicious_examples,
)

__all__ = ["example_weights", "hypergradients", "outer_loss_grid", "response_surface", "schedules",
           "suspicious_examples"]

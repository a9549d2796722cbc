"""Losses for `supervised_problem(outer_loss=...)`: what is wanted in the end, with a derivative."""

from farhox.problem.outer_losses import EqualizedOddsLoss, OuterLoss, SoftAUC, SoftF1, WorstGroupLoss

__all__ = ["EqualizedOddsLoss", "OuterLoss", "SoftAUC", "SoftF1", "WorstGroupLoss"]

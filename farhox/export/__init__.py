"""Learners and models as SavedModels for TensorFlow Serving."""

from farhox.export.saved_model import ServedModel, load, saved_model

__all__ = ["ServedModel", "load", "saved_model"]

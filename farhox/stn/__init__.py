"""Self-tuning networks: layers that carry their own best response to hyperparameters, and a model that tunes these."""

from farhox.stn.conversion import bake, convert, summary
from farhox.stn.images import (
    RandomBrightness,
    RandomContrast,
    RandomHue,
    RandomRotation,
    RandomSaturation,
    RandomTranslation,
)
from farhox.stn.layers import Conv1D, Conv2D, Dense, DepthwiseConv2D, Embedding
from farhox.stn.losses import LabelSmoothing
from farhox.stn.model import SelfTuningModel
from farhox.stn.perturbations import (
    ActivityRegularization,
    Cutout,
    Dropout,
    GaussianNoise,
    PerturbationLayer,
    RandomScale,
)
from farhox.stn.recurrent import GRU, LSTM, GRUCell, LSTMCell
from farhox.stn.schedules import ScheduleRecorder, ScheduleReplay

__all__ = [
    "ActivityRegularization", "Conv1D", "Conv2D", "Cutout", "Dense", "DepthwiseConv2D", "Dropout", "Embedding", "GRU",
    "GRUCell", "GaussianNoise", "LSTM", "LSTMCell", "LabelSmoothing", "PerturbationLayer", "RandomBrightness",
    "RandomContrast", "RandomHue", "RandomRotation", "RandomSaturation", "RandomScale", "RandomTranslation",
    "ScheduleRecorder", "ScheduleReplay", "SelfTuningModel", "bake", "convert", "summary",
]

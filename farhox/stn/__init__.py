"""Self-tuning networks: layers that carry their own best response to hyperparameters, and a model that tunes these."""

from farhox.stn.attention import EinsumDense, GroupQueryAttention, MultiHeadAttention
from farhox.stn.conversion import bake, convert, summary, with_strengths
from farhox.stn.convolutions import Conv1D, Conv2D, Conv2DTranspose, Conv3D, DepthwiseConv2D, SeparableConv2D
from farhox.stn.dropout import (
    AlphaDropout,
    Dropout,
    GaussianDropout,
    GaussianNoise,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
)
from farhox.stn.images import (
    Augmentation,
    RandomBrightness,
    RandomContrast,
    RandomHue,
    RandomRotation,
    RandomSaturation,
    RandomTranslation,
)
from farhox.stn.keras_strengths import strengths_of
from farhox.stn.layers import Dense, Embedding
from farhox.stn.losses import LabelSmoothing
from farhox.stn.model import SelfTuningModel
from farhox.stn.perturbations import ActivityRegularization, Cutout, PerturbationLayer, RandomScale
from farhox.stn.recurrent import GRU, LSTM, GRUCell, LSTMCell
from farhox.stn.schedules import ScheduleRecorder, ScheduleReplay
from farhox.stn.self_tuning import Response, SelfTuning, SelfTuningParts
from farhox.stn.training_draws import TrainingDraws

__all__ = [
    "ActivityRegularization", "AlphaDropout", "Augmentation", "Conv1D", "Conv2D", "Conv2DTranspose", "Conv3D", "Cutout",
    "Dense", "DepthwiseConv2D", "Dropout", "EinsumDense", "Embedding", "GRU", "GRUCell", "GaussianDropout",
    "GaussianNoise", "GroupQueryAttention", "LSTM", "LSTMCell", "LabelSmoothing", "MultiHeadAttention",
    "PerturbationLayer", "RandomBrightness", "RandomContrast", "RandomHue", "RandomRotation", "RandomSaturation",
    "RandomScale", "RandomTranslation", "Response", "ScheduleRecorder", "ScheduleReplay", "SelfTuning",
    "SelfTuningModel", "SelfTuningParts", "SeparableConv2D", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D",
    "TrainingDraws", "bake", "convert", "strengths_of", "summary", "with_strengths",
]

"""Self-tuning networks: Keras layers that carry their own best response to hyperparameters, and a model that tunes them."""

from farhox.stn.layers import Conv1D, Conv2D, Dense, DepthwiseConv2D, Embedding
from farhox.stn.losses import LabelSmoothing
from farhox.stn.model import SelfTuningModel

__all__ = ["Conv1D", "Conv2D", "Dense", "DepthwiseConv2D", "Embedding", "LabelSmoothing", "SelfTuningModel"]

"""Every layer and activation of Keras: its hypergradient is that of finite differences, or it is refused by name."""

import inspect
import random

import keras
import numpy as np
import pytest

import farhox

layers = keras.layers
R = np.random.default_rng(0)
DATA = {
    "vector": R.normal(size=(3, 4)), "sequence": R.normal(size=(3, 5, 4)), "image": R.random((3, 6, 6, 3)),
    "volume": R.normal(size=(3, 4, 4, 4, 2)), "frames": R.random((3, 2, 4, 4, 2)), "rows": R.normal(size=(3, 2, 5, 2)),
    "volumes": R.normal(size=(2, 2, 3, 3, 3, 1)), "tokens": R.integers(0, 6, size=(3, 5)),
    "words": np.array([["good film"], ["bad play"], ["good play"]]), "sound": R.normal(size=(3, 40)),
}
WORDS = ["good", "bad", "film", "play"]
# What is called with more than one tensor, or wraps another layer.
CALLS = {
    "Add": lambda x: layers.Add()([x, x * x]), "Average": lambda x: layers.Average()([x, x * x]),
    "Concatenate": lambda x: layers.Concatenate()([x, x * x]), "Dot": lambda x: layers.Dot(-1)([x, x * x]),
    "Maximum": lambda x: layers.Maximum()([x, x * x]), "Minimum": lambda x: layers.Minimum()([x, x * x]),
    "Multiply": lambda x: layers.Multiply()([x, x * x]), "Subtract": lambda x: layers.Subtract()([x, x * x]),
    "AdditiveAttention": lambda x: layers.AdditiveAttention()([x, x]),
    "Attention": lambda x: layers.Attention(use_scale=True)([x, x]),
    "MultiHeadAttention": lambda x: layers.MultiHeadAttention(2, 2)(x, x),
    "GroupQueryAttention": lambda x: layers.GroupQueryAttention(2, 2, 1)(x, x),
    "Bidirectional": lambda x: layers.Bidirectional(layers.GRU(2, return_sequences=True))(x),
    "TimeDistributed": lambda x: layers.TimeDistributed(layers.Dense(2))(x),
    "RNN": lambda x: layers.RNN(layers.LSTMCell(2), return_sequences=True)(x),
    "StackedRNNCells": lambda x: layers.RNN(layers.StackedRNNCells([layers.GRUCell(2), layers.SimpleRNNCell(2)]))(x),
    "Lambda": lambda x: layers.Lambda(lambda v: v * keras.ops.sigmoid(v))(x),
    "SpectralNormalization": lambda x: layers.SpectralNormalization(layers.Dense(2))(x),
    "EinsumDense": lambda x: layers.EinsumDense("ab,bc->ac", 3, bias_axes="c")(x),
    "Reshape": lambda x: layers.Reshape([2, 2])(x), "Permute": lambda x: layers.Permute([2, 1])(x),
    "RandomCrop": lambda x: layers.GlobalAveragePooling2D()(layers.RandomCrop(4, 4)(x)),
    "Masking": lambda x: layers.LSTM(2)(layers.Masking()(x)),
    "Pipeline": lambda x: layers.Pipeline([layers.RandomContrast(0.3), layers.RandomBrightness(0.3)])(x),
    # What makes numbers of words and of numbers, in front of what is learned of them.
    "TextVectorization": lambda x: embedded(layers.TextVectorization(
        vocabulary=WORDS, output_sequence_length=2)(x)),
    "StringLookup": lambda x: embedded(layers.StringLookup(vocabulary=["good film", "bad play", "good play"])(x)),
    "IntegerLookup": lambda x: embedded(layers.IntegerLookup(vocabulary=list(range(6)))(x)),
    "Hashing": lambda x: embedded(layers.Hashing(4)(x)),
    "HashedCrossing": lambda x: embedded(layers.HashedCrossing(4)((x[:, :1], x[:, 1:2]))),
    "CategoryEncoding": lambda x: layers.CategoryEncoding(6, "count")(x),
    "Discretization": lambda x: embedded(layers.Discretization([-0.5, 0.0, 0.5])(x)),
    "Normalization": lambda x: layers.Normalization(mean=[0.1] * 4, variance=[0.5] * 4)(x),
    "STFTSpectrogram": lambda x: layers.STFTSpectrogram(
        "log", frame_length=16, frame_step=8, fft_length=16)(layers.Reshape([40, 1])(x)),
    "MelSpectrogram": lambda x: layers.MelSpectrogram(
        fft_length=16, sequence_stride=8, num_mel_bins=4, sampling_rate=100, min_freq=1.0, max_freq=50.0)(x),
}
# Arguments of what cannot do without, and the data that suit it where the name does not tell.
ARGUMENTS = {
    "Activation": ["tanh"], "ActivityRegularization": [0.1], "AlphaDropout": [0.4], "BatchNormalization": [],
    "Dense": [2], "Dropout": [0.4], "GaussianDropout": [0.4], "GaussianNoise": [0.3],
    "GroupNormalization": [2], "Conv1D": [2, 2], "Conv2D": [2, 2], "Conv3D": [2, 2], "Conv1DTranspose": [2, 2],
    "Conv2DTranspose": [2, 2], "Conv3DTranspose": [2, 2], "DepthwiseConv1D": [2], "DepthwiseConv2D": [2],
    "SeparableConv1D": [2, 2], "SeparableConv2D": [2, 2], "ConvLSTM1D": [2, 2], "ConvLSTM2D": [2, 2],
    "ConvLSTM3D": [2, 2], "GRU": [2], "LSTM": [2], "SimpleRNN": [2], "RepeatVector": [2], "SpatialDropout1D": [0.4],
    "SpatialDropout2D": [0.4], "SpatialDropout3D": [0.4], "CenterCrop": [4, 4], "Resizing": [4, 5], "Rescaling": [0.5],
    "RandomRotation": [0.2], "RandomZoom": [0.3], "RandomTranslation": [0.2, 0.2],
    "AveragePooling1D": [2], "AveragePooling2D": [2], "AveragePooling3D": [2], "RandomColorDegeneration": [0.5],
    "RandomHue": [0.3], "RandomPosterization": [4], "RandomSaturation": [0.5], "RandomSharpness": [0.5],
    "RandomBrightness": [0.3], "RandomContrast": [0.3], "RandomShear": [0.3, 0.3], "Embedding": [6, 3],
    "AdaptiveAveragePooling1D": [2], "AdaptiveAveragePooling2D": [2], "AdaptiveAveragePooling3D": [2],
    "AdaptiveMaxPooling1D": [2], "AdaptiveMaxPooling2D": [2], "AdaptiveMaxPooling3D": [2],
    "UpSampling2D": [2, None, "bilinear"], "ReversibleEmbedding": [6, 3],
}
# What computes in float32 whatever the type of the layer.
IN_FLOAT32 = {"Resizing", "RandomShear", "RandomZoom", "RandomTranslation", "RandomRotation", "RandomElasticTransform"}
# What has no derivative, or one that TensorFlow leaves out, and what the error says.
REFUSED = {
    "SpectralNormalization": "leave inner variables to the dynamics", "RandomHue": "HSVToRGB",
    "RandomSaturation": "HSVToRGB", "RandomColorJitter": "HSVToRGB", "RandomPosterization": "every inner variable",
    "ContrastLimitedAdaptiveHistogramEqualization": "every inner variable", "Equalization": "every inner variable",
    "Discretization": "every inner variable"}
# Not layers between two others: inputs, cells, bases, other frameworks, boxes.
ELSEWHERE = {
    "InputLayer", "InputSpec", "Layer", "Wrapper", "GRUCell", "LSTMCell", "SimpleRNNCell", "TorchModuleWrapper",
    "FlaxLayer", "JaxLayer", "TFSMLayer", "MaxNumBoundingBoxes",
}
IN_WORDS = {"TextVectorization", "StringLookup"}
IN_TOKENS = {"Embedding", "ReversibleEmbedding", "IntegerLookup", "Hashing", "HashedCrossing", "CategoryEncoding"}
KINDS = {"1D": "sequence", "2D": "image", "3D": "volume"}
SEQUENCES = {"GRU", "LSTM", "SimpleRNN", "RNN", "StackedRNNCells", "Bidirectional", "TimeDistributed", "Masking",
             "Attention", "AdditiveAttention", "MultiHeadAttention", "GroupQueryAttention", "Permute"}


def every_layer():
    found = {name for name, entry in vars(layers).items() if inspect.isclass(entry) and issubclass(entry, layers.Layer)}
    aliases = {"AvgPool1D", "AvgPool2D", "AvgPool3D", "MaxPool1D", "MaxPool2D", "MaxPool3D", "Convolution1D",
               "Convolution2D", "Convolution3D", "Convolution1DTranspose", "Convolution2DTranspose",
               "Convolution3DTranspose", "SeparableConvolution1D", "SeparableConvolution2D", "GlobalAvgPool1D",
               "GlobalAvgPool2D", "GlobalAvgPool3D", "GlobalMaxPool1D", "GlobalMaxPool2D", "GlobalMaxPool3D",
               "GroupedQueryAttention"}
    return sorted(found - aliases - ELSEWHERE)


def data_for(name):
    if name in IN_WORDS:
        return "words"
    if name in IN_TOKENS:
        return "tokens"
    if name.endswith("Spectrogram"):
        return "sound"
    if name.startswith("ConvLSTM"):
        return {"ConvLSTM1D": "rows", "ConvLSTM2D": "frames", "ConvLSTM3D": "volumes"}[name]
    if name.startswith(("Rand", "Auto", "Aug", "Mix", "Cut", "Contrast", "Equalization", "Solarization", "CenterCrop",
                        "Resizing", "Rescaling", "Pipeline")):
        return "image"
    if name in SEQUENCES:
        return "sequence"
    return next((kind for end, kind in KINDS.items() if end in name), "vector")


def made(name):
    """The layer, for images between 0 and 1 where it asks: stretched to 255 they make the training diverge."""
    kind = getattr(layers, name)
    in_range = {"value_range": (0, 1)} if "value_range" in inspect.signature(kind).parameters else {}
    return kind(*ARGUMENTS.get(name, []), **in_range)


def embedded(indices):
    """What stands behind a layer that makes indices."""
    return layers.Embedding(8, 3)(indices)


def model_with(make, kind):
    """The layer behind one with weights, so that the first derivative passes through it, and in front of another."""
    x = inputs = keras.Input(DATA[kind].shape[1:], dtype={"tokens": "int32", "words": "string"}.get(kind))
    if kind not in ("tokens", "words"):
        x = layers.Dense(x.shape[-1], name="front", activation="sigmoid" if kind == "image" else None)(x)
    x = make(x)
    return keras.Model(inputs, layers.Dense(1, name="back")(layers.Flatten()(x)))


def check(make, kind, tolerance=1e-5):
    keras.utils.set_random_seed(1)
    try:
        model = model_with(make, kind)
        model(DATA[kind], training=True)
    except Exception as error:
        if "float32" in str(error) or "float64" in str(error) or "double" in str(error):
            pytest.skip(f"Keras has no float64 here: {str(error)[:60]}")
        raise
    rate = farhox.Hyperparameter(0.05, low=0.0, log=True, name="rate")
    problem = farhox.supervised_problem(
        model, "mean_squared_error", dynamics=farhox.GradientDescent(rate), outer_variables=[rate])
    x, y = DATA[kind], np.random.default_rng(1).normal(size=(len(DATA[kind]), 1))
    try:
        check = farhox.check_hypergradient(problem, farhox.repeat((x, y), 2), (x, y), farhox.ReverseHG())
    except ValueError as error:
        return f"refused: {error}"
    if np.isnan(check.entries[0].finite_difference):
        pytest.skip("The training itself gives no number: Keras' first derivative has none.")
    if np.isnan(check.entries[0].hypergradient):
        return "not a number"
    assert check.maximum_error < tolerance, str(check)
    return "exact"


@pytest.mark.slow
@pytest.mark.parametrize("name", every_layer())
def test_every_layer_of_keras_is_exact_or_refused_by_name(name, float64, monkeypatch):
    if name == "AugMix":  # It asks Python for a chain of operations whenever it is traced: one for all traces here.
        monkeypatch.setattr(random, "choice", lambda operations: "auto_contrast")
    make = CALLS.get(name) or (lambda x: made(name)(x))
    found = check(make, data_for(name), 1e-2 if name in IN_FLOAT32 else 1e-5)
    assert found == "exact" or found.startswith("refused") and REFUSED[name] in found, found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(
    name for name, entry in vars(keras.activations).items()
    if inspect.isfunction(entry) and name not in ("get", "serialize", "deserialize")))
def test_every_activation_of_keras_is_exact(name, float64):
    activation = getattr(keras.activations, name)
    assert check(lambda x: layers.Lambda(activation)(x), "vector") == "exact"

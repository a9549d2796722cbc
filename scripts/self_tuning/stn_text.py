r"""A self-tuned language model: seven rates and strengths of an LSTM, against black-box searches and fixed values.

    python scripts/self_tuning/stn_text.py --quick
    python scripts/self_tuning/stn_text.py --level=words \
        --baseline=random,tpe,fixed
    python scripts/self_tuning/stn_text.py --folder=penn \
        --baseline=grid,random,tpe

Text is `tiny_shakespeare` of TFDS, in characters or words, or that of a folder with ptb.train.txt, ptb.valid.txt and
ptb.test.txt, in words. Two LSTM layers, the output tied to the embedding. Hyperparameters: variational dropout of
input, hidden layer and output, dropout of words of the embedding, DropConnect of the recurrent weights, L2 penalties of
the activations and of their differences in time. `stn_experiment` says what is compared.

Every window of the text starts from a zero state; the paper's training carries the state on.

Reference: MacKay et al., Self-tuning networks: bilevel optimization of hyperparameters using structured best-response
functions, 2019, section 4.3, tables 1 and 2.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program, stn_flags

SETTINGS = ("level", "folder", "vocabulary", "units", "window", "test_examples",
            *stn_flags.SETTINGS)
QUICK = {"units": 16, "window": 20, "vocabulary": 200, "train_examples": 200, "validation_examples": 50,
         "test_examples": 50, "steps": 16, "evaluate_every": 8, "batch_size": 20, "warmup_steps": 4, "trials": 2}


def define_flags():
    stn_flags.define_flags(
        "results/stn_text", baseline=["random", "fixed"], train_examples=10_000, validation_examples=700,
        steps=5000, evaluate_every=250, batch_size=40, learning_rate=0.002, warmup_steps=250,
        hyper_learning_rate=0.01, initial_scale=1.0, scale_learning_rate=0.0)
    flags.DEFINE_integer("test_examples", 700, "Windows of the test text.", lower_bound=1)
    flags.DEFINE_enum("level", "characters", ["characters", "words"], "What a token of tiny_shakespeare is.")
    flags.DEFINE_string("folder", None, "Folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt.")
    flags.DEFINE_integer("vocabulary", 10_000, "Most tokens to tell apart; all others are one.", lower_bound=2)
    flags.DEFINE_integer("units", 200, "Units of the embedding and of both LSTM layers.", lower_bound=1)
    flags.DEFINE_integer("window", 70, "Tokens of an example.", lower_bound=1)


if __name__ == "__main__":
    program.parse(define_flags)

import keras

from _shared import data_sets, stn_experiment
from _shared.stn_training import Range, Task
from farhox import stn

RATE, STRENGTH = Range(0.05, 0.0, 0.95), Range(0.1, 0.0, 5.0)
RANGES = {"input_dropout": RATE, "hidden_dropout": RATE, "output_dropout": RATE, "embedding_dropout": RATE,
          "dropconnect": RATE, "activation_l2": STRENGTH, "temporal_l2": STRENGTH}


def build(vocabulary, units, window, h):
    """A plain network: self-tuning layers whose gates are closed, and stay so, have DropConnect and a tied output."""
    hyperparameters = list(h.values())
    settings = {"gate_initializer": "zeros", "reference": [float(entry.variable.numpy()) for entry in hyperparameters]}
    inputs = keras.Input([window], dtype="int32")
    embedding = stn.Embedding(vocabulary, units, hyperparameters, dropout=h["embedding_dropout"], **settings)
    outputs = variational(h["input_dropout"])(embedding(inputs))
    for i in (1, 2):
        outputs = stn.LSTM(units, hyperparameters, recurrent_dropconnect=h["dropconnect"], return_sequences=True,
                           **settings)(outputs)
        if i == 1:
            outputs = variational(h["hidden_dropout"])(outputs)
    outputs = stn.ActivityRegularization(temporal=h["temporal_l2"])(outputs)
    outputs = variational(h["output_dropout"])(outputs)
    outputs = stn.ActivityRegularization(l2=h["activation_l2"])(outputs)
    model = keras.Model(inputs, embedding(outputs, reverse=True))
    _set_response(model, trainable=False)
    return model


def variational(rate):
    """Dropout of the same features at all steps."""
    return stn.Dropout(rate, noise_shape=(None, 1, None))


def open_gates(model, hyperparameters):
    """The network with a response that is trained."""
    _set_response(model, trainable=True)
    return model


def _set_response(model, trainable):
    for layer in model._flatten_layers():
        if isinstance(layer, stn.SelfTuning):
            for variable in layer.response_variables:
                variable.trainable = trainable


def make_task(settings, seed):
    del seed  # The parts are parts of the text; a seed decides on initial weights and batches.
    texts, vocabulary = data_sets.encode(
        data_sets.read_texts(settings["level"], settings["folder"], flags.FLAGS.data_dir), settings["vocabulary"])
    counts = [settings[f"{part}_examples"] for part in ("train", "validation", "test")]
    parts = tuple(data_sets.windows(text, settings["window"], count) for text, count in zip(texts, counts))
    return Task(
        RANGES, lambda h: build(vocabulary, settings["units"], settings["window"], h), parts,
        lambda: keras.optimizers.Adam(settings["learning_rate"], clipnorm=1.0), open_gates)


def main(_):
    stn_experiment.main("stn_text", experiment_flags.settings(SETTINGS, QUICK), make_task)


if __name__ == "__main__":
    program.run(main)

r"""Self-tuned dropout and augmentation on Fashion-MNIST, against black-box searches and fixed values.

    python scripts/self_tuning/stn_fashion_mnist.py --quick
    python scripts/self_tuning/stn_fashion_mnist.py --num_seeds=3
    python scripts/self_tuning/stn_fashion_mnist.py --model=alexnet \
        --baseline=tpe

Models: `cnn`, two convolutions and two dense layers; `alexnet`, five convolutions and three dense layers, after the
paper. Hyperparameters: a dropout rate after each convolution and before the dense layers, noise on the input, random
translation and brightness, and the side of a square that is cut out, which is discrete. `stn_experiment` says what is
compared.

Reference: MacKay et al., Self-tuning networks: bilevel optimization of hyperparameters using structured best-response
functions, 2019, section 4.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program, stn_flags

SETTINGS = ("model", "width", *stn_flags.SETTINGS)
QUICK = {"width": 0.5, "train_examples": 500, "validation_examples": 250, "steps": 40, "evaluate_every": 20,
         "batch_size": 32, "warmup_steps": 10, "trials": 2, "hyper_learning_rate": 0.05}
CONVOLUTIONS = {"cnn": 2, "alexnet": 5}


def define_flags():
    stn_flags.define_flags(
        "results/stn_fashion_mnist", baseline=["random", "fixed"], train_examples=1500, validation_examples=1000,
        steps=800, evaluate_every=80, batch_size=64, learning_rate=0.03, warmup_steps=50,
        hyper_learning_rate=0.04, scale_learning_rate=0.04)
    flags.DEFINE_enum("model", "cnn", list(CONVOLUTIONS), "Network.")
    flags.DEFINE_float("width", 1.0, "Factor of the numbers of filters and units.", lower_bound=0.0)


if __name__ == "__main__":
    program.parse(define_flags)

import keras

from _shared import data_sets, stn_experiment, stn_networks
from _shared.stn_training import Range, Task
from farhox import stn

# Wide, but so that most values leave a small network able to learn: a search would be no match otherwise.
AUGMENTATION = {
    "translation": Range(0.02, 0.0, 0.2), "brightness": Range(0.05, 0.0, 0.5), "input_noise": Range(0.02, 0.0, 0.3),
    "cutout_length": Range(1.5, 0.0, 10.0, discrete=True)}
RATE = Range(0.05, 0.0, 0.7)


def ranges(model):
    """Dictionary by name of the hyperparameters' `Range`."""
    names = [f"conv_dropout_{i}" for i in range(1, CONVOLUTIONS[model] + 1)] + ["dense_dropout_1", "dense_dropout_2"]
    return {**AUGMENTATION, **{name: RATE for name in names}}


def augment(images, hyperparameters):
    """Images in [0, 1], perturbed in training."""
    images = stn.RandomTranslation(hyperparameters["translation"], fill_mode="constant")(images)
    images = stn.RandomBrightness(hyperparameters["brightness"], value_range=(0, 1))(images)
    images = stn.GaussianNoise(hyperparameters["input_noise"])(images)
    return stn.Cutout(hyperparameters["cutout_length"])(images)


def build(model, width, hyperparameters):
    """A Keras model with logits."""
    inputs = keras.Input([28, 28, 1])
    outputs = augment(inputs, hyperparameters)
    network = stn_networks.small if model == "cnn" else stn_networks.alexnet
    return keras.Model(inputs, network(outputs, hyperparameters, width))


def make_task(settings, seed):
    sizes = settings["train_examples"], settings["validation_examples"]
    parts = data_sets.images("fashion_mnist", flags.FLAGS.data_dir, sizes, seed)
    return Task(
        ranges(settings["model"]), lambda h: build(settings["model"], settings["width"], h), tuple(parts),
        lambda: keras.optimizers.SGD(settings["learning_rate"], momentum=0.9))


def main(_):
    stn_experiment.main("stn_fashion_mnist", experiment_flags.settings(SETTINGS, QUICK), make_task)


if __name__ == "__main__":
    program.run(main)

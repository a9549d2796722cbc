"""Self-tuned dropout and augmentation on CIFAR-10: the fifteen hyperparameters of the paper, against its baselines.

    python scripts/self_tuning/stn_cifar10.py --quick
    python scripts/self_tuning/stn_cifar10.py --baseline=grid,random,tpe

The AlexNet-like network of the paper, with a dropout rate after each of five convolutions and before two dense layers,
dropout and a random scale on the input, hue, saturation, brightness and contrast, and the length and number of squares
that are cut out, which are discrete. `stn_experiment` says what is compared. TFDS downloads the images (162 MiB); the
full setting is for a GPU.

Reference: MacKay et al., Self-tuning networks: bilevel optimization of hyperparameters using structured best-response
functions, 2019, section 4.2 and table 2.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # The scripts' shared package is there.

from absl import flags

from _shared import experiment_flags, program, stn_flags

SETTINGS = ("width", *stn_flags.SETTINGS)
QUICK = {"width": 0.03, "train_examples": 200, "validation_examples": 100, "steps": 12, "evaluate_every": 6,
         "batch_size": 20, "warmup_steps": 2, "trials": 2}


def define_flags():
    stn_flags.define_flags(
        "results/stn_cifar10", baseline=["random", "tpe"], train_examples=40_000, validation_examples=10_000,
        steps=62_400, evaluate_every=312, batch_size=128, learning_rate=0.01, warmup_steps=1560)
    flags.DEFINE_float("width", 1.0, "Factor of the numbers of filters and units; 1 is the paper's.", lower_bound=0.0)


if __name__ == "__main__":
    program.parse(define_flags)

import keras
import numpy as np

from _shared import data_sets, stn_experiment, stn_networks
from _shared.stn_training import Range, Task
from farhox import stn

RANGES = {
    **{f"conv_dropout_{i}": Range(0.05, 0.0, 0.9) for i in range(1, 6)},
    **{f"dense_dropout_{i}": Range(0.05, 0.0, 0.9) for i in (1, 2)},
    "input_dropout": Range(0.05, 0.0, 1.0), "input_scale": Range(0.05, 0.0, 0.3), "hue": Range(0.05, 0.0, 0.5),
    "saturation": Range(0.05, 0.0, 1.0), "brightness": Range(0.05, 0.0, 1.0), "contrast": Range(0.05, 0.0, 1.0),
    "cutout_length": Range(4.0, 0.0, 25.0, discrete=True), "cutout_holes": Range(1.0, 0.0, 5.0, discrete=True)}


def build(width, h):
    """A Keras model with logits, of images in [0, 1] and a dictionary of hyperparameters."""
    inputs = outputs = keras.Input([32, 32, 3])
    for layer in (stn.RandomHue, stn.RandomSaturation, stn.RandomBrightness, stn.RandomContrast):
        outputs = layer(h[layer.__name__.removeprefix("Random").lower()], value_range=(0, 1))(outputs)
    outputs = stn.RandomScale(h["input_scale"])(outputs)
    outputs = stn.Cutout(h["cutout_length"], h["cutout_holes"])(outputs)
    outputs = stn.Dropout(h["input_dropout"])(outputs)
    return keras.Model(inputs, stn_networks.alexnet(outputs, h, width))


def images(data_dir, sizes, seed):
    """Training, validation and test images [n, 32, 32, 3] in [0, 1] with labels [n]; the first two drawn by `seed`."""
    builder = data_sets.prepared("cifar10", data_dir)
    parts = []
    for split, count in (("train", sum(sizes)), ("test", -1)):
        examples = list(builder.as_dataset(split=split, as_supervised=True).take(count).as_numpy_iterator())
        parts.append((np.array([image for image, _ in examples], "float32") / 255,
                      np.array([label for _, label in examples], "int64")))
    (x, y), test = parts
    order = np.random.default_rng(seed).permutation(len(x))
    train, validation = np.split(order, [sizes[0]])
    return (x[train], y[train]), (x[validation], y[validation]), test


def make_task(settings, seed):
    sizes = settings["train_examples"], settings["validation_examples"]
    return Task(
        RANGES, lambda h: build(settings["width"], h), images(flags.FLAGS.data_dir, sizes, seed),
        lambda: keras.optimizers.SGD(settings["learning_rate"], momentum=0.9))


def main(_):
    stn_experiment.main("stn_cifar10", experiment_flags.settings(SETTINGS, QUICK), make_task)


if __name__ == "__main__":
    program.run(main)

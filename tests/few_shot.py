"""Few-shot episodes of random images and a small network for them."""

import keras
import numpy as np

from farhox import meta


def network(normalized=True):
    """A small convolutional classifier of 6x6 images in three classes."""
    layers = [keras.Input([6, 6, 1]), keras.layers.Conv2D(2, 3, strides=2, use_bias=False)]
    layers += [keras.layers.BatchNormalization()] if normalized else []
    return keras.Sequential([*layers, keras.layers.Activation("tanh"), keras.layers.Flatten(),
                             keras.layers.Dense(3, activation="softmax")])


def images(shots=2, queries=3, episodes=2):
    """A source of episodes of 6x6 images in three classes, and a meta-batch of them."""
    random = np.random.default_rng(0)
    templates = random.normal(size=[8, 6, 6, 1])
    data = np.repeat(templates, 8, axis=0) + 0.3 * random.normal(size=[64, 6, 6, 1])
    source = meta.ClassificationEpisodes(
        data.astype(keras.config.floatx()), np.repeat(np.arange(8), 8), ways=3, shots=shots, queries=queries)
    return source, next(iter(source.dataset(episodes)))

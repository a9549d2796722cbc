"""Many configurations of one small network trained at once, their weights stacked, in one compiled loop."""

import numpy as np
import tensorflow as tf

SPACE = {"learning_rate": (1e-3, 3.0), "momentum": (0.0, 0.95), "l2": (1e-6, 0.1)}
_LOGARITHMIC = ("learning_rate", "l2")


def spread_configurations(count):
    """Configurations that fill the space evenly, dictionaries: a sequence whose steps are powers of a root.

    The steps of the Kronecker sequence are 1 / phi^k with phi^4 = phi + 1, that of three dimensions.
    """
    root = 2.0
    for _ in range(60):
        root = (1.0 + root) ** 0.25
    points = (0.5 + np.outer(np.arange(1, count + 1), root ** -np.arange(1.0, 4.0))) % 1.0
    return [{name: float(low * (high / low) ** u if name in _LOGARITHMIC else low + u * (high - low))
             for u, (name, (low, high)) in zip(point, SPACE.items())} for point in points]


class StackedTraining:
    """Trains `inputs - units - classes` with ReLU by SGD with momentum on batches that all configurations share.

    It is what Keras' SGD makes of `Dense(units, "relu")` and `Dense(classes)` with an L2 penalty on both kernels, once
    for each configuration. Data sets with fewer classes than `classes` leave the others out of their softmax.

    Args:
        configurations: List of dictionaries with learning_rate, momentum and l2.
        units, classes, steps, batch_size: Positive ints.
    """

    def __init__(self, configurations, units, classes, steps, batch_size):
        self._settings = [tf.constant([[[entry[name]]] for entry in configurations], tf.float32) for name in SPACE]
        self._count, self._units, self._classes = len(configurations), units, classes
        self._steps, self._batch_size = steps, batch_size
        self._run = tf.function(self._train, reduce_retracing=True)

    def losses(self, train, test, seed):
        """Mean cross-entropies [configurations] on test data after training; chance where it is worse or not finite."""
        (x, y), (test_x, test_y) = train, test
        classes = int(max(np.max(y), np.max(test_y))) + 1
        random = np.random.default_rng(seed)
        indices = np.concatenate([random.permutation(len(x)) for _ in range(
            -(-self._steps * self._batch_size // len(x)))])[:self._steps * self._batch_size]
        shapes = [(x.shape[1], self._units), (self._units, self._classes)]
        # Glorot's uniform kernels, the same for all configurations, as those of layers with at most as many outputs as
        # there are classes; biases zero.
        kernels = [random.uniform(-1, 1, shape) * np.sqrt(6.0 / (shape[0] + min(shape[1], classes)))
                   for shape in shapes]
        bias = np.where(np.arange(self._classes) < classes, 0.0, -1e9)
        arrays = [np.broadcast_to(array, (self._count, *array.shape)) for array in (
            kernels[0], np.zeros([1, self._units]), kernels[1], bias[np.newaxis])]
        weights = [tf.constant(array, tf.float32) for array in arrays]
        found = self._run(weights, tf.constant(x, tf.float32), tf.constant(y, tf.int32),
                          tf.constant(indices.reshape(self._steps, self._batch_size), tf.int32),
                          tf.constant(test_x, tf.float32), tf.constant(test_y, tf.int32)).numpy().astype("float64")
        chance = np.log(classes)
        return np.where(np.isfinite(found), np.minimum(found, chance), chance)

    def _train(self, weights, x, y, indices, test_x, test_y):
        rate, momentum, l2 = self._settings
        slots = [tf.zeros_like(weight) for weight in weights]
        for step in tf.range(self._steps):
            batch = indices[step]
            with tf.GradientTape() as tape:
                tape.watch(weights)
                losses = _losses(weights, tf.gather(x, batch), tf.gather(y, batch))
            gradients = tape.gradient(losses, weights)  # Of the sum: the weights of each are those of one loss alone.
            gradients = [gradient + 2.0 * l2 * weight if kernel else gradient
                         for gradient, weight, kernel in zip(gradients, weights, (True, False, True, False))]
            slots = [momentum * slot - rate * gradient for slot, gradient in zip(slots, gradients)]
            weights = [weight + slot for weight, slot in zip(weights, slots)]
        return _losses(weights, test_x, test_y)


def _losses(weights, x, y):
    """Mean cross-entropy [configurations]."""
    kernel, bias, out_kernel, out_bias = weights
    shared = tf.reshape(tf.transpose(kernel, [1, 0, 2]), [kernel.shape[1], -1])
    hidden = tf.reshape(tf.matmul(x, shared), [-1, kernel.shape[0], kernel.shape[2]])
    hidden = tf.nn.relu(tf.transpose(hidden, [1, 0, 2]) + bias)
    logits = tf.matmul(hidden, out_kernel) + out_bias
    labels = tf.broadcast_to(y, tf.shape(logits)[:2])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), axis=1)

"""TensorFlow functions whose second derivatives are wrong or missing, replaced while a user's objective runs.

Hypergradients differentiate a gradient. Some functions that Keras layers, losses and optimizers call are not
made for it:

- `tf.nn.moments` computes the variance around `stop_gradient(mean)`. The first derivative is right, the second is not:
  batch, layer and group normalisation would be off by up to several hundred percent. Replaced by the same formula
  with its whole derivative.
- `tf.nn.softmax_cross_entropy_with_logits` has no mixed derivative with respect to logits and labels, so that learned
  soft labels would get a gradient of zero. Replaced by -sum(labels * log_softmax(logits)).
- `tf.image.resize` with interpolation loses its second derivative. It stays, but its second derivative is an error that
  names the layer, since a missing part of a sum would go unnoticed.
- `tf.math.sqrt`, `tf.math.rsqrt`, powers less than one and quotients have an infinite derivative at zero, which
  optimizers multiply by an exact zero: not a number. Inside `finite_roots` their derivative there is zero, the value
  that the product has.

One more function of Keras is no matter of derivatives: under a distribution strategy its losses divide by the number of
replicas, for gradients that will be added up. Here every replica trains an inner problem of its own on whole batches,
so nothing is divided.

Otherwise the values computed are unchanged. The replacements are in place only inside the context managers below, which
count their users, because the replica threads of a distribution strategy enter and leave them in any order.
"""

import contextlib
import numbers
import threading

import tensorflow as tf
from keras.src.backend.common.name_scope import current_path
from keras.src.losses import loss as keras_loss

_moments = tf.nn.moments
_softmax_cross_entropy_with_logits = tf.nn.softmax_cross_entropy_with_logits
_resize = tf.image.resize
_sqrt = tf.math.sqrt
_rsqrt = tf.math.rsqrt
_pow = tf.pow
_truediv = tf.Tensor.__truediv__
_rtruediv = tf.Tensor.__rtruediv__


def _exact_moments(x, axes, shift=None, keepdims=False, name=None):
    """`tf.nn.moments`, differentiable any number of times."""
    del shift  # Unused by TensorFlow as well.
    with tf.name_scope(name or "moments"):
        x = tf.convert_to_tensor(x)
        moments = _mean_and_variance(tf.cast(x, tf.float32) if x.dtype == tf.float16 else x, axes)
        return tuple(tf.cast(moment if keepdims else tf.squeeze(moment, axes), x.dtype) for moment in moments)


def _mean_and_variance(x, axes):
    """Both with the axes kept.

    Their derivative is written down: a line in x, fewer and cheaper operations than TensorFlow makes of the formulas.
    """
    @tf.custom_gradient
    def moments(x):
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)

        def gradient(of_mean, of_variance):
            count = tf.cast(tf.size(x), x.dtype) / tf.cast(tf.size(mean), x.dtype)
            slope = 2.0 / count * of_variance
            return slope * x + (of_mean / count - slope * mean)

        return (mean, variance), gradient

    return moments(x)


def _exact_softmax_cross_entropy_with_logits(labels, logits, axis=-1, name=None):
    """`tf.nn.softmax_cross_entropy_with_logits`, differentiable in labels and logits together."""
    with tf.name_scope(name or "softmax_cross_entropy_with_logits"):
        logits = tf.convert_to_tensor(logits)
        return -tf.reduce_sum(tf.cast(labels, logits.dtype) * tf.nn.log_softmax(logits, axis=axis), axis=axis)


def _guarded_resize(images, size, *args, **kwargs):
    """`tf.image.resize`, whose second derivative is an error instead of a part that is silently missing."""
    layer = current_path() or "tf.image.resize"

    @tf.custom_gradient
    def first_derivative(cotangent, images):
        with tf.GradientTape() as tape:
            tape.watch(images)
            resized = _resize(images, size, *args, **kwargs)
        product = tape.gradient(resized, images, output_gradients=cotangent)

        def second_derivative(*unused):
            raise ValueError(
                "A hypergradient needs the second derivative of every layer that the inner variables pass through, and "
                "TensorFlow has none for tf.image.resize with interpolation. It is used by the layer "
                f"{layer!r}. Upsample with UpSampling2D(interpolation='nearest') or Conv2DTranspose, resize the data "
                "before training, or give the dynamics first_order=True."
            )

        return product, second_derivative

    @tf.custom_gradient
    def resize(images):
        return _resize(images, size, *args, **kwargs), lambda cotangent: first_derivative(cotangent, images)

    return resize(tf.convert_to_tensor(images))


def _finite_root(root):
    def finite_root(x, name=None):
        x = tf.convert_to_tensor(x)
        positive = x > 0
        safe = root(tf.where(positive, x, tf.ones_like(x)), name=name)
        return tf.where(positive, safe, root(tf.stop_gradient(x)))

    return finite_root


def _finite_power(x, y, name=None):
    """`tf.pow` with derivative zero where x = 0 and y < 1."""
    if not tf.is_tensor(x) or (isinstance(y, numbers.Real) and y >= 1):
        return _pow(x, y, name=name)
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_floating:
        return _pow(x, y, name=name)
    y = tf.convert_to_tensor(y, dtype_hint=x.dtype)
    steep = tf.equal(x, 0) & (y < 1)
    return tf.where(steep, _pow(tf.stop_gradient(x), tf.stop_gradient(y)),
                    _pow(tf.where(steep, tf.ones_like(x), x), y, name=name))


def _finite_quotient(x, y):
    """x / y with derivative zero where y = 0: optimizers discard such quotients with `where` or `minimum`."""
    if isinstance(y, numbers.Real):
        return _truediv(x, y)
    y = tf.convert_to_tensor(y, dtype_hint=x.dtype)
    if not y.dtype.is_floating:
        return _truediv(x, y)
    zero = tf.equal(y, 0)
    return tf.where(zero, _truediv(tf.stop_gradient(x), tf.stop_gradient(y)),
                    _truediv(x, tf.where(zero, tf.ones_like(y), y)))


def _finite_reciprocal(y, x):
    """`_finite_quotient(x, y)` for an `x` that is not a tensor."""
    if not y.dtype.is_floating:
        return _rtruediv(y, x)
    return _finite_quotient(tf.convert_to_tensor(x, dtype=y.dtype), y)


class _Replacement:
    """Attributes of TensorFlow's modules, replaced while at least one context is open."""

    def __init__(self, *replacements):
        self._replacements = replacements
        self._lock = threading.Lock()
        self._users = 0

    @contextlib.contextmanager
    def __call__(self):
        with self._lock:
            self._users += 1
            if self._users == 1:
                for module, name, _, replacement in self._replacements:
                    setattr(module, name, replacement)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for module, name, original, _ in self._replacements:
                        setattr(module, name, original)


exact_derivatives = _Replacement(
    (tf.nn, "moments", _moments, _exact_moments),
    (tf.nn, "softmax_cross_entropy_with_logits", _softmax_cross_entropy_with_logits,
     _exact_softmax_cross_entropy_with_logits),
    (tf.image, "resize", _resize, _guarded_resize),
    (keras_loss, "scale_loss_for_distribution", keras_loss.scale_loss_for_distribution, lambda loss: loss),
)
finite_roots = _Replacement(
    (tf.math, "sqrt", _sqrt, _finite_root(_sqrt)),
    (tf, "sqrt", _sqrt, _finite_root(_sqrt)),
    (tf.math, "rsqrt", _rsqrt, _finite_root(_rsqrt)),
    (tf.math, "pow", _pow, _finite_power),
    (tf, "pow", _pow, _finite_power),
    (tf.Tensor, "__pow__", tf.Tensor.__pow__, _finite_power),
    (tf.Tensor, "__truediv__", _truediv, _finite_quotient),
    (tf.Tensor, "__rtruediv__", _rtruediv, _finite_reciprocal),
)

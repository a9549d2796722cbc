"""The adjoint of moving the pixels of images: rotation, translation, zoom, shear, perspective.

TensorFlow's gradient of `ImageProjectiveTransformV3` moves the cotangent by the inverse transformation, which is near
the adjoint where the image keeps its size and far from it where it does not, and leaves out the derivative with respect
to the transformation.
"""

import tensorflow as tf


@tf.RegisterGradient("FarhoxImageProjectiveTransform")
def _image_projective_transform(operation, cotangent):
    """Every pixel of the result is a weighted sum of at most four pixels: the cotangent goes back with their weights.

    Between pixels their weights, and so the result, have a derivative with respect to the transformation, which
    TensorFlow leaves out; with interpolation to the nearest pixel there is none.
    """
    images, transforms, _, fill = operation.inputs
    nearest = operation.get_attr("interpolation") == b"NEAREST"
    mode = operation.get_attr("fill_mode")
    batch, height, width, channels = tf.unstack(tf.shape(images))
    corners = _corners(transforms, tf.shape(cotangent), height, width, mode, nearest)
    total, moved = 0.0, 0.0
    flat = tf.reshape(tf.stop_gradient(images), [-1, channels])
    for place, inside, weight in corners:
        weight = tf.cast(weight, cotangent.dtype)[..., tf.newaxis]
        # What lies outside goes nowhere: segments of negative number are dropped.
        segments = tf.where(inside, place, -1)
        total += tf.math.unsorted_segment_sum(
            tf.reshape(cotangent * weight, [-1, channels]), tf.reshape(segments, [-1]), batch * height * width)
        pixels = tf.gather(flat, tf.where(inside, place, 0))
        moved += weight * tf.where(inside[..., tf.newaxis], pixels, tf.cast(fill, pixels.dtype))
    of_transforms, of_fill = (None, None) if nearest else tf.gradients(moved, [transforms, fill], cotangent)
    return tf.reshape(total, tf.shape(images)), of_transforms, None, of_fill


def _corners(transforms, shape, height, width, mode, nearest):
    """The pixels that each pixel of the result is made of: for each corner (number, whether it is inside, weight)."""
    y, x, exists = _sources(transforms, shape[1], shape[2])
    y, x = _within(y, height, mode), _within(x, width, mode)
    if nearest:
        corners = [(_rounded(y), _rounded(x), tf.ones_like(x))]
    else:
        low_y, low_x = tf.floor(y), tf.floor(x)
        corners = [(at_y, at_x, of_y * of_x)
                   for at_y, of_y in ((low_y, low_y + 1 - y), (low_y + 1, y - low_y))
                   for at_x, of_x in ((low_x, low_x + 1 - x), (low_x + 1, x - low_x))]
    first = tf.range(shape[0])[:, tf.newaxis, tf.newaxis] * height * width
    for at_y, at_x, weight in corners:
        at_y, at_x = tf.cast(at_y, tf.int32), tf.cast(at_x, tf.int32)
        if mode != b"CONSTANT":  # At the last pixel the next one, of weight zero, is itself.
            at_y, at_x = tf.minimum(at_y, height - 1), tf.minimum(at_x, width - 1)
        inside = exists & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        yield first + at_y * width + at_x, inside, weight


def _sources(transforms, height, width):
    """Where each pixel [batch, height, width] of the result comes from, (y, x), and whether it comes from anywhere."""
    y, x = tf.cast(tf.range(height), tf.float32)[:, tf.newaxis], tf.cast(tf.range(width), tf.float32)
    of_x, along_y, shift_x, of_y, down_y, shift_y, tilt_x, tilt_y = (
        entry[:, tf.newaxis, tf.newaxis] for entry in tf.unstack(transforms, axis=1))
    depth = tilt_x * x + tilt_y * y + 1.0
    exists = tf.not_equal(depth, 0.0)
    depth = tf.where(exists, depth, 1.0)
    return (of_y * x + down_y * y + shift_y) / depth, (of_x * x + along_y * y + shift_x) / depth, exists


def _within(position, length, mode):
    """A coordinate as the fill mode maps it into the image; "CONSTANT" leaves it where it is."""
    size = tf.cast(length, tf.float32)
    last = size - 1.0
    if mode == b"CONSTANT":
        return position
    if mode == b"REFLECT":  # ... c b a | a b c | c b a ...
        there = tf.math.floormod(position, 2.0 * size)
        inside = tf.where(there >= size, 2.0 * size - there - 1.0, there)
        # Between -1 and 0 the image is met from the other side.
        inside = tf.where((position < 0.0) & (position >= -size), -position - 1.0, inside)
    elif mode == b"WRAP":
        divisor = tf.maximum(last, 1.0)
        below = position + size * (tf.floor(-position / divisor) + 1.0)
        above = position - size * tf.floor(position / divisor)
        inside = tf.where(position < 0.0, below, tf.where(position > last, above, position))
        inside = tf.where(size <= 1.0, 0.0, inside)
    else:  # NEAREST
        inside = position
    return tf.clip_by_value(tf.where((position < 0.0) | (position > last), inside, position), 0.0, last)


def _rounded(position):
    """To the nearest integer, halves away from zero."""
    return tf.sign(position) * tf.floor(tf.abs(position) + 0.5)

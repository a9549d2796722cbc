#!/bin/sh
# tensorflow 2.21.0 on a CPU: tf.reduce_max and tf.reduce_sum over every second axis of a tensor with eight axes (blocks of
# a volume, after a reshape) work, and their gradients are an UnimplementedError: what comes back is broadcast over the axes,
# which is not implemented for so many alternating ones. Of a tensor with four axes (blocks of a matrix) both have one.
# Seen: eight axes: max UnimplementedError, sum UnimplementedError; four axes: max fine, sum fine.
#
# Installs the package into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import tensorflow as tf


def outcome(reduce, shape, axes):
    x = tf.reshape(tf.range(tf.reduce_prod(shape), dtype=tf.float32), shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = reduce(x, axes)
    try:
        tape.gradient(y, x)
    except tf.errors.UnimplementedError:
        return "UnimplementedError"
    return "fine"


for name, shape, axes in (("eight axes:", [2, 3] * 4, [2, 4, 6]), ("four axes:", [2, 3] * 2, [2])):
    print(name, "max", outcome(tf.reduce_max, shape, axes), "sum", outcome(tf.reduce_sum, shape, axes), end=" ")
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "eight axes: max UnimplementedError sum UnimplementedError four axes: max fine sum fine " ]

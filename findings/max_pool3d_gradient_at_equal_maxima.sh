#!/bin/sh
# tensorflow 2.21.0 on a CPU: where a window has several equal maxima, the gradient of max_pool3d goes to every one of them,
# so that it adds up to more than what came in; max_pool2d, and max_pool3d under XLA, give it to the first one alone.
# Seen: sum of the gradient of one window of eight ones: max_pool2d 1.0 (of four), max_pool3d 8.0, max_pool3d under XLA 1.0.
#
# Installs the package into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import tensorflow as tf


def total(pool, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = pool(x, 2, 2, "VALID")
    return tf.reduce_sum(tape.gradient(y, x))


flat, deep = tf.ones([1, 2, 2, 1]), tf.ones([1, 2, 2, 2, 1])
compiled = tf.function(total, jit_compile=True)(tf.nn.max_pool3d, deep)
print("2d", float(total(tf.nn.max_pool2d, flat)), "3d", float(total(tf.nn.max_pool3d, deep)), "3d xla", float(compiled))
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "2d 1.0 3d 8.0 3d xla 1.0" ]

#!/bin/sh
# tensorflow 2.21.0 on a CPU: ImageProjectiveTransformV3, which random rotations, translations, zooms and shears of Keras run
# on, takes float64 images, returns float64, and interpolates in float32. A difference of 1e-10 between two images is gone
# after moving them bilinearly, be it by half a pixel or by a whole one; of the nearest neighbours it stays. Derivatives by
# small differences through it are noise, whatever the type. Seen: bilinear 0, nearest 1e-10.
#
# Installs the package into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import tensorflow as tf


def moved(image, by, interpolation):
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.reshape(image, [1, 1, 3, 1]), transforms=[[1.0, 0.0, by, 0.0, 1.0, 0.0, 0.0, 0.0]],
        output_shape=[1, 3], fill_value=0.0, interpolation=interpolation, fill_mode="CONSTANT")


image = tf.constant([1.0, 1.0, 1.0], tf.float64)
assert moved(image, 0.5, "BILINEAR").dtype == tf.float64
for by, interpolation in ((0.5, "BILINEAR"), (1.0, "BILINEAR"), (1.0, "NEAREST")):
    difference = moved(image + 1e-10, by, interpolation) - moved(image, by, interpolation)
    print(by, interpolation, f"{float(tf.reduce_max(difference)):.0e}", end="; ")
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "0.5 BILINEAR 0e+00; 1.0 BILINEAR 0e+00; 1.0 NEAREST 1e-10; " ]

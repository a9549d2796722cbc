#!/bin/sh
# keras 3.15.1 (TensorFlow): RandomCrop crops in training alone. With training=False it gives images back in the size that
# they came in, though its output shape is that of the crop and its documentation speaks of the largest window of that
# aspect ratio: a model of RandomCrop, a convolution and Flatten trains in `fit` and fails in `predict` and `evaluate`.
# Seen: declared (4, 10, 10, 3); in training (4, 10, 10, 3); in inference (4, 12, 12, 3); fit runs; predict: ValueError
#
# Installs the packages into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import keras
import numpy as np

images, labels = np.zeros((4, 12, 12, 3), "float32"), np.arange(4) % 2
layers = keras.layers
crop = layers.RandomCrop(10, 10)
shapes = [crop.compute_output_shape(images.shape), *(tuple(crop(images, training=t).shape) for t in (True, False))]
model = keras.Sequential([
    keras.Input((12, 12, 3)), layers.RandomCrop(10, 10), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(2)])
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(images, labels, verbose=0)
try:
    model.predict(images, verbose=0)
    outcome = "runs"
except ValueError:
    outcome = "ValueError"
print("declared {}; in training {}; in inference {}; fit runs; predict: {}".format(*shapes, outcome))
PYTHON
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2> /dev/null | tail -1)
echo "$found"
[ "$found" = "declared (4, 10, 10, 3); in training (4, 10, 10, 3); in inference (4, 12, 12, 3); fit runs; predict: ValueError" ]

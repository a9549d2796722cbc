#!/bin/sh
# keras 3.15.1 on tensorflow 2.21.0: a subclassed model whose `call` is a tf.function, and whose layers are built by its
# first call, answers to that shape of input with its initial weights for good: weights that are assigned or trained later
# are not seen, while other shapes of input see them. Seen, after all weights of the last layer were set to zero: not zero
# for the shape of the first call, 0.0 for another one.
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
import tensorflow as tf


class Model(keras.Model):
    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(1)

    @tf.function
    def call(self, x):
        return self.last(x)


model, x = Model(), np.ones([6, 3], "float32")
model(x)
for variable in model.trainable_variables:
    variable.assign(0.0 * variable)
print("first shape", "zero" if float(tf.reduce_sum(model(x))) == 0 else "not zero",
      "other shape", "zero" if float(tf.reduce_sum(model(x[:2]))) == 0 else "not zero")
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "first shape not zero other shape zero" ]

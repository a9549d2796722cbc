#!/bin/sh
# tensorflow 2.21.0, keras 3.15.1: dropout takes a tensor as its rate p, and a tape gives a gradient with respect to it: that
# of the factor 1 / (1 - p) of what is kept, as if the mask did not depend on p. It is no estimate of the derivative of the
# mean over masks: the mean of what dropout gives does not depend on p, and of its square, 1 / (1 - p), the gradient is
# twice the derivative. There is neither an error nor a warning.
# Seen: at p = .3, of the mean and of the mean square of a million ones (their derivatives: 0.00 and 2.04):
# tf.nn.dropout: 1.43 and 4.08; stateless_dropout: 1.43 and 4.08; keras.random.dropout: 1.43 and 4.08
#
# Installs the packages into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import keras
import tensorflow as tf

ones, rate = tf.ones([1_000_000]), tf.Variable(0.3)
found = []
for name, dropout in (("tf.nn.dropout", lambda p: tf.nn.dropout(ones, p, seed=1)),
                      ("stateless_dropout", lambda p: tf.nn.experimental.stateless_dropout(ones, p, seed=[1, 2])),
                      ("keras.random.dropout", lambda p: keras.random.dropout(ones, p, seed=1))):
    tf.random.set_seed(0)
    with tf.GradientTape(persistent=True) as tape:
        kept = dropout(tf.convert_to_tensor(rate))
        mean, square = tf.reduce_mean(kept), tf.reduce_mean(tf.square(kept))
    found.append(f"{name}: {tape.gradient(mean, rate):.2f} and {tape.gradient(square, rate):.2f}")
print("; ".join(found))
PYTHON
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2> /dev/null | tail -1)
echo "$found"
[ "$found" = "tf.nn.dropout: 1.43 and 4.08; stateless_dropout: 1.43 and 4.08; keras.random.dropout: 1.43 and 4.08" ]

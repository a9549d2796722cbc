#!/bin/sh
# keras 3.15.1 on tensorflow 2.21.0: keras.ops.corrcoef works in eager mode and fails wherever it is traced: it asks for the
# rank of a tensor as a tensor, and puts that under a Python `if`, which AutoGraph does not rewrite in Keras. A loss of
# correlation therefore passes a trial by hand and fails in `fit`, but with run_eagerly=True.
# Seen: eager fine; fit OperatorNotAllowedInGraphError; fit with run_eagerly fine.
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


def loss(y, outputs):
    return 1.0 - keras.ops.corrcoef(keras.ops.stack([y[:, 0], outputs[:, 0]]))[0, 1]


def outcome(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "fine"


random = np.random.default_rng(0)
x, y = random.normal(size=(8, 3)).astype("float32"), random.normal(size=(8, 1)).astype("float32")


def fitted(run_eagerly):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile("sgd", loss=loss, run_eagerly=run_eagerly)
    model.fit(x, y, verbose=0)


print("eager", outcome(lambda: loss(y, y)), "fit", outcome(lambda: fitted(False)),
      "fit with run_eagerly", outcome(lambda: fitted(True)))
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "eager fine fit OperatorNotAllowedInGraphError fit with run_eagerly fine" ]

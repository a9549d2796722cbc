#!/bin/sh
# keras 3.15.1 on tensorflow 2.21.0 with orbax-checkpoint 0.12.8: keras.callbacks.OrbaxCheckpoint does not resume in fit.
# A second process with the same program begins at epoch 0 and ends with an error, since a checkpoint of that step is
# there already. Seen: StepAlreadyExistsError.
#
# Installs the packages into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0 keras==3.15.1 orbax-checkpoint==0.12.8
cat > "$folder/run.py" <<'PYTHON'
import sys
import keras
import numpy as np

inputs = keras.Input([1])
model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
model.compile("sgd", "mse")
try:
    model.fit(np.ones([4, 1]), np.ones([4, 1]), batch_size=4, epochs=2, verbose=0,
              callbacks=[keras.callbacks.OrbaxCheckpoint(sys.argv[1], save_freq="epoch")])
    print("trained")
except Exception as error:
    print(type(error).__name__)
PYTHON
export TF_CPP_MIN_LOG_LEVEL=3
cd "$folder"
first=$("$folder/venv/bin/python" run.py "$folder/run" 2> /dev/null)
second=$("$folder/venv/bin/python" run.py "$folder/run" 2> /dev/null)
echo "first process: $first; second: $second"
[ "$first" = "trained" ] && [ "$second" = "StepAlreadyExistsError" ]

#!/bin/sh
# keras 3.15.1 on tensorflow 2.21.0: save_weights leaves out the state of seed generators. A dropout layer that has drawn
# three times begins again with its first draw after load_weights. Seen: counter 3 when saved, 0 after loading.
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


def make():
    return keras.Sequential([keras.Input([4]), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(1)])


first, second = make(), make()
for _ in range(3):
    first(np.ones([1, 4]), training=True)
first.save_weights("x.weights.h5")
second.load_weights("x.weights.h5")
print("saved:", int(first.layers[0].seed_generator.state[1]), "loaded:", int(second.layers[0].seed_generator.state[1]))
PYTHON
export TF_CPP_MIN_LOG_LEVEL=3
cd "$folder"
found=$("$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "saved: 3 loaded: 0" ]

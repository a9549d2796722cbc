#!/bin/sh
# keras 3.15.1 on tensorflow 2.21.0: keras.callbacks.BackupAndRestore writes the weights first and the number of the
# epoch after them. A process that is killed between the two leaves the weights of 3 epochs with the epoch 2: the next
# process trains an epoch too many, without a word. Seen: 4 epochs of 1 batch each end with 5 steps of the optimizer.
#
# Installs the packages into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import os, signal, sys
import keras
import numpy as np
from keras.src.utils import file_utils

killed = sys.argv[2] == "killed"
opened = file_utils.File
written = []


def open_or_die(path, mode="r", *args, **kwargs):
    if "training_metadata" in str(path) and "w" in mode:
        written.append(path)
        if killed and len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return opened(path, mode, *args, **kwargs)


file_utils.File = open_or_die
model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(np.ones([4, 1]), np.ones([4, 1]), batch_size=4, epochs=4, verbose=0,
          callbacks=[keras.callbacks.BackupAndRestore(sys.argv[1], delete_checkpoint=False)])
print("steps:", int(model.optimizer.iterations))
PYTHON
export TF_CPP_MIN_LOG_LEVEL=3
cd "$folder"
whole=$("$folder/venv/bin/python" run.py "$folder/whole" whole 2> /dev/null)
"$folder/venv/bin/python" run.py "$folder/parts" killed 2> /dev/null && { echo "it was not killed"; exit 1; }
parts=$("$folder/venv/bin/python" run.py "$folder/parts" whole 2> /dev/null)
echo "without interruption: $whole; killed in the third save and started again: $parts"
[ "$whole" = "steps: 4" ] && [ "$parts" = "steps: 5" ]

#!/bin/sh
# keras 3.15.1 on tensorflow 2.21.0: keras.callbacks.BackupAndRestore opens the file with the number of the epoch, which
# empties it, before it writes the number. A process that is killed between the two cannot be gone on with: the next one
# ends with a JSONDecodeError, although the state before was whole. Seen: JSONDecodeError in on_train_begin.
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


def open_and_die(path, mode="r", *args, **kwargs):
    file = opened(path, mode, *args, **kwargs)
    if "training_metadata" in str(path) and "w" in mode:
        written.append(path)
        if killed and len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return file


file_utils.File = open_and_die
model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
model.compile("sgd", "mse")
try:
    model.fit(np.ones([4, 1]), np.ones([4, 1]), batch_size=4, epochs=4, verbose=0,
              callbacks=[keras.callbacks.BackupAndRestore(sys.argv[1], delete_checkpoint=False)])
    print("trained")
except Exception as error:
    print(type(error).__name__)
PYTHON
export TF_CPP_MIN_LOG_LEVEL=3
cd "$folder"
"$folder/venv/bin/python" run.py "$folder/parts" killed 2> /dev/null && { echo "it was not killed"; exit 1; }
found=$("$folder/venv/bin/python" run.py "$folder/parts" whole 2> /dev/null)
echo "killed in the third save and started again: $found"
[ "$found" = "JSONDecodeError" ]

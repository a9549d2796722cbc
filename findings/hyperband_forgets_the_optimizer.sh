#!/bin/sh
# keras-tuner 1.4.8 with keras 3.15.1 on tensorflow 2.21.0: a trial that Hyperband promotes to more epochs goes on with the
# weights it had, but with a new optimizer: no step is counted and no moment is there, although the file has them, because
# Keras loads the state of an optimizer that has been built alone. So a learning rate schedule begins anew with every
# promotion, and Adam or momentum start from nothing in the middle of a training. A warning says so, once.
# Seen: trials that go on at epoch 1 and 2, of four steps each, with an optimizer that has done 0 steps.
#
# Installs the packages into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0 keras==3.15.1 keras-tuner==1.4.8 tensorboard==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import keras
import keras_tuner
import numpy as np

x, y = np.ones([32, 3], "float32"), np.ones([32, 1], "float32")
seen = []


class Look(keras.callbacks.Callback):
    """Notes the epoch and the optimizer's step count with which a trial goes on."""

    def on_epoch_begin(self, epoch, logs=None):
        if not seen or seen[-1][0] is not self.model:
            seen.append((self.model, epoch, int(self.model.optimizer.iterations)))


def build(parameters):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(parameters.Float("rate", 1e-3, 1e-1)), "mse")
    return model


search = keras_tuner.Hyperband(build, "loss", max_epochs=4, factor=2, seed=0, directory="trials", overwrite=True)
search.search(x, y, batch_size=8, callbacks=[Look()], verbose=0)
resumed = sorted({(epoch, steps) for _, epoch, steps in seen if epoch})
print("promoted trials, (first epoch, optimizer's steps):", resumed)
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null | tail -1)
echo "$found"
[ "$found" = "promoted trials, (first epoch, optimizer's steps): [(1, 0), (2, 0)]" ]

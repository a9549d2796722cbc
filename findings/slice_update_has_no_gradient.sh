#!/bin/sh
# keras 3.15.1 on tensorflow 2.21.0: keras.ops.slice_update gives its value in eager mode, in graphs and under XLA, and has no
# gradient there: a LookupError for the operation XlaDynamicUpdateSlice, with respect to what is updated and to the updates
# alike, so that no layer that trains can use it. keras.ops.scatter_update of the same entries has both gradients.
# Seen: slice_update inputs LookupError updates LookupError; scatter_update inputs [0.0, 1.0, 1.0] updates [1.0].
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


def outcome(function, source):
    with tf.GradientTape() as tape:
        inputs, updates = tf.constant([1.0, 2.0, 3.0]), tf.constant([5.0])
        tape.watch([inputs, updates])
        result = function(inputs, updates)
    assert result.numpy().tolist() == [5.0, 2.0, 3.0]
    try:
        return tape.gradient(result, [inputs, updates][source]).numpy().tolist()
    except LookupError as error:
        assert "XlaDynamicUpdateSlice" in str(error)
        return "LookupError"


for name, function in (("slice_update", lambda inputs, updates: keras.ops.slice_update(inputs, [0], updates)),
                       ("scatter_update", lambda inputs, updates: keras.ops.scatter_update(inputs, [[0]], updates))):
    print(name, "inputs", outcome(function, 0), "updates", outcome(function, 1), end="; ")
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "slice_update inputs LookupError updates LookupError; scatter_update inputs [0.0, 1.0, 1.0] updates [1.0]; " ]

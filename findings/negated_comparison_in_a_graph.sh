#!/bin/sh
# tensorflow 2.21.0: in a graph, tf.logical_not(x < 1.0) of a not-a-number x is False, eagerly and under XLA it is True.
# The graph optimizer writes the negated comparison as x >= 1.0, which does not hold of a not-a-number either. A loop that
# goes on "until the norm is below the tolerance" ends there, and a test "not (curvature > 0)" finds nothing wrong.
# Seen: eager True, graph False, XLA True.
#
# Installs the package into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0
cat > "$folder/run.py" <<'PYTHON'
import tensorflow as tf


def not_less(x):
    return tf.logical_not(x < 1.0)


x = tf.constant(float("nan"))
modes = {"eager": not_less, "graph": tf.function(not_less), "xla": tf.function(not_less, jit_compile=True)}
print(*[f"{name} {bool(mode(x))}" for name, mode in modes.items()])
PYTHON
cd "$folder"
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" run.py 2> /dev/null)
echo "$found"
[ "$found" = "eager True graph False xla True" ]

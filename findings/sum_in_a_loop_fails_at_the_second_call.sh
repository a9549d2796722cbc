#!/bin/sh
# tensorflow 2.21.0: a while_loop in a tf.function that adds two terms to its variable, beside tensors of 80 MB, runs once;
# every later call raises AlreadyExistsError for a ".../tmp_var". On graphs that are estimated to take more than four
# fifths of the 256 MB that a CPU is said to have, the memory optimizer turns sums of three and more into a
# TemporaryVariable and lets it wait for the first of them; if that is the variable of the loop, which is there once more
# when the loop has ended, a temporary variable is left over. With tensors of 80 kB all calls are fine.
# Seen: small: fine, fine; large: fine, AlreadyExistsError.
#
# Installs the package into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import tensorflow as tf


def integrated():
    """A function that takes three Euler steps of y' = exp(y) (a + b), a and b means over the data."""
    @tf.function
    def function(data):
        def step(i, y):
            first = tf.exp(y) * tf.reduce_mean(tf.sin(data * 2.0))
            second = tf.exp(y) * tf.reduce_mean(tf.cos(data * 2.0))
            return i + 1, y + first + second

        return tf.while_loop(lambda i, y: i < 3, step, [0, tf.constant(0.0)])[1]
    return function


def called(function, data):
    try:
        function(data)
        return "fine"
    except tf.errors.AlreadyExistsError as error:
        return type(error).__name__


lines = []
for name, count in (("small", 20_000), ("large", 20_000_000)):
    function, data = integrated(), tf.ones([count])
    lines.append(f"{name}: {called(function, data)}, {called(function, data)}")
print("; ".join(lines))
PYTHON
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2> /dev/null | tail -1)
echo "$found"
[ "$found" = "small: fine, fine; large: fine, AlreadyExistsError" ]

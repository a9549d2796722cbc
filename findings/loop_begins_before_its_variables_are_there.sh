#!/bin/sh
# tensorflow 2.21.0: a while_loop in a tf.function begins as soon as its condition can be computed, though it is given the
# result of another loop that has not ended: the parts of its first step that do not need that result run beside the other
# loop, parallel_iterations=1 or not, and what both of them hold takes memory at the same time. A control dependency of
# the counter on the result makes it wait.
# Seen: as written: step 0, other loop, step 1; with the dependency: other loop, step 0, step 1.
#
# Installs the package into a temporary folder, shows it, and fails if the behaviour changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow==2.21.0 keras==3.15.1
cat > "$folder/run.py" <<'PYTHON'
import time

import numpy as np
import tensorflow as tf

tf.config.threading.set_inter_op_parallelism_threads(2)
done = []


def slow(value):
    time.sleep(1.0)
    done.append("other loop")
    return value


def quick(index):
    done.append(f"step {index}")
    return np.float32(0.0)


def call(function, argument):
    return tf.ensure_shape(tf.numpy_function(function, [argument], tf.float32, stateful=False), [])


@tf.function(autograph=False)
def run(x, waits):
    _, x = tf.while_loop(lambda i, _: i < 1, lambda i, x: (i + 1, call(slow, x)), [0, x])
    with tf.control_dependencies([x] if waits else []):
        start = tf.identity(0)
    return tf.while_loop(lambda i, _: i < 2, lambda i, x: (i + 1, x + call(quick, i)), [start, x],
                         parallel_iterations=1)


lines = []
for name, waits in (("as written", False), ("with the dependency", True)):
    done.clear()
    run(tf.constant(1.0), waits)
    lines.append(f"{name}: {', '.join(done)}")
print("; ".join(lines))
PYTHON
found=$(TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/run.py" 2> /dev/null | tail -1)
echo "$found"
[ "$found" = "as written: step 0, other loop, step 1; with the dependency: other loop, step 0, step 1" ]

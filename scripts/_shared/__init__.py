"""What the scripts share; no script itself."""

import os

# Here, because TensorFlow reads it when it is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

"""What all tests share: two logical CPUs, seeds, and a float64 mode."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

# A distribution strategy needs two devices, and they must be made before TensorFlow's first operation.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True)
def seeds():
    """Random numbers of Python, NumPy and TensorFlow start anew in every test."""
    keras.utils.set_random_seed(0)


@pytest.fixture
def float64():
    """Keras layers and variables made in the test are float64."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)

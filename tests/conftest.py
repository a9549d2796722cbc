"""What all tests share: two logical CPUs, seeds, and a float64 mode."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

# A distribution strategy needs two devices, and they must be made before TensorFlow's first operation.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)


def axes_and_values(item):
    """What a case takes from each `parametrize` of its test: pairs of names and the objects they stand for."""
    axes = [mark.args[0] for mark in item.iter_markers("parametrize")]
    axes = [[name.strip() for name in (axis.split(",") if isinstance(axis, str) else axis)] for axis in axes]
    return {(tuple(axis), tuple(id(item.callspec.params[name]) for name in axis)) for axis in axes}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a cross product marked `covering` the default run keeps cases that hold every value of every axis once.

    The others are slow tests.
    """
    products = {}
    for item in items:
        if item.get_closest_marker("covering") is not None and item.get_closest_marker("slow") is None:
            products.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in products.values():
        missing = set().union(*map(axes_and_values, cases))
        while missing:
            chosen = max(cases, key=lambda case: len(missing & axes_and_values(case)))
            cases.remove(chosen)
            missing -= axes_and_values(chosen)
        for case in cases:
            case.add_marker(pytest.mark.slow)


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

"""What all tests share: two logical CPUs, seeds, a float64 mode, and a collector of garbage that seldom runs."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Looking through the objects of TensorFlow, of every test and of traced graphs for garbage takes a sixth of the time.
gc.disable()

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

    Of a test marked `one_case` it keeps the first case. The others are slow tests.
    """
    products, seen = {}, set()
    for item in items:
        name = item.nodeid.split("[")[0]
        if item.get_closest_marker("slow") is not None:
            continue
        if item.get_closest_marker("covering") is not None:
            products.setdefault(name, []).append(item)
        elif item.get_closest_marker("one_case") is not None:
            if name in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(name)
    for cases in products.values():
        missing = set().union(*map(axes_and_values, cases))
        while missing:
            chosen = max(cases, key=lambda case: len(missing & axes_and_values(case)))
            cases.remove(chosen)
            missing -= axes_and_values(chosen)
        for case in cases:
            case.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What is there before the first test stays; graphs refer to themselves, so what tests leave is collected."""
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


@pytest.fixture(autouse=True)
def graphs_as_they_are_traced(request):
    """TensorFlow optimizes graphs in slow tests, and in those marked `optimized`, as it does for users.

    It takes a fifth of the time of tests that run most of their graphs once.
    """
    optimized = any(request.node.get_closest_marker(name) is not None for name in ("slow", "optimized"))
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not optimized})


@pytest.fixture(autouse=True)
def seeds():
    """Random numbers of Python, NumPy and TensorFlow start anew in every test."""
    keras.utils.set_random_seed(0)


@pytest.fixture
def eagerly():
    """Few steps cost less than a graph."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def float64():
    """Keras layers and variables made in the test are float64."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)

"""Products with Jacobians where one tensor stands in two places."""

import numpy as np
import pytest
import tensorflow as tf

from farhox._core import autodiff


def function(inputs):
    return [inputs[0] * inputs[0] * inputs[1]]


def scalar(inputs):
    return autodiff.gradients(lambda inputs: (function(inputs)[0], ()), inputs)[2]


def forward(inputs):
    return [autodiff.forward_product(
        lambda inputs: (function(inputs), []), inputs, [tf.constant(a), tf.constant(b)])[1][0]
            for a, b in ((1.0, 0.0), (0.0, 1.0))]


@pytest.mark.one_case
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("derivatives", [scalar, forward])
def test_one_tensor_in_two_places_has_a_derivative_for_each(derivatives, compiled):
    x = tf.constant(3.0)
    result = (tf.function(derivatives) if compiled else derivatives)([x, x])
    np.testing.assert_array_equal(result, [18.0, 9.0])

"""Checks of numbers: what passes comes back as Python's own, what does not is named with the rule."""

import math

import numpy as np
import pytest
import tensorflow as tf

from farhox._core import checks

NO_NUMBERS = [True, None, "1", 1j, [1], math.nan, math.inf, tf.constant(1.0)]


@pytest.mark.parametrize("check, passes, fails, rule", [
    (checks.integer, [-3, 0, np.int64(2)], [1.0], "an integer"),
    (checks.positive_integer, [1, np.int32(7)], [0, -1, 1.0], "a positive integer"),
    (checks.non_negative_integer, [0, np.uint8(7)], [-1, 0.0], "a non-negative integer"),
    (lambda n, v: checks.integer_of_at_least(n, v, 2), [2, 3], [1, 2.0], "an integer of at least 2"),
    (lambda n, v: checks.integer_in_range(n, v, 2, 4), [2, 4], [1, 5, 3.0], "an integer from 2 to 4"),
    (checks.finite_number, [-1, 0.5, np.float32(2)], [], "a finite number"),
    (checks.positive_number, [1, 1e-30], [0, -0.5], "a positive finite number"),
    (checks.non_negative_number, [0, 0.5], [-0.5], "a non-negative finite number"),
    (lambda n, v: checks.number_between(n, v, 0, 1), [0.5, np.float64(0.1)], [0, 1, -1],
     "a number strictly between 0 and 1"),
    (lambda n, v: checks.number_in_range(n, v, 0, 1), [0, 1, 0.5], [-1e-9, 1.1], "a number from 0 to 1"),
])
def test_a_number_passes_as_pythons_own_and_what_breaks_the_rule_is_named(check, passes, fails, rule):
    for value in passes:
        assert check("size", value) == value and type(check("size", value)) in (int, float)
    for value in [*fails, *NO_NUMBERS]:
        with pytest.raises(ValueError) as raised:
            check("size", value)
        assert str(raised.value) == f"size must be {rule}. Received: {value!r}"

"""What an argument must be."""

import re
from decimal import Decimal
from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest

from fastbn import checks

FLAG = checks.Rule("True or False", bool, lambda _: True)


@pytest.mark.parametrize(
    ("check", "wanted"),
    [
        (lambda: checks.integer("n", np.int8(3)), 3),
        (lambda: checks.integer("n", 3, 3, 3), 3),
        (lambda: checks.number("n", Fraction(1, 2)), 0.5),
        (lambda: checks.number("n", np.float32(2)), 2.0),
        (lambda: checks.number("n", np.array(2)), 2.0),
        (lambda: checks.number("n", Decimal("0.5")), 0.5),
        (lambda: checks.eps("eps", 0), 0.0),
        (lambda: checks.momentum(1), 1.0),
        (lambda: checks.hyper_parameter("lr", np.array(2)), 2.0),
        (lambda: checks.hyper_parameter("m", np.float32(0.5), checks.SHARE), 0.5),
        (lambda: checks.hyper_parameter("f", np.True_, FLAG), True),
        (lambda: checks.activation("relu"), "relu"),
        (lambda: checks.activation(None), None),
        (lambda: checks.dtype("dtype", "f8", checks.FLOATS), np.dtype(np.float64)),
        (lambda: list(checks.iterator("it", "ab")), ["a", "b"]),
        (lambda: checks.mapping("m", {}), {}),
        (lambda: checks.state({"a": 1, "b": 2}, ["b", "a"], "others"), None),
        (lambda: checks.values("v", [1, 2], 2).tolist(), [1, 2]),
    ],
)
def test_returns_what_the_caller_needs(check, wanted):
    found = check()
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: checks.integer("n", 1.0), TypeError, "n: expected an integer, got float"),
        (lambda: checks.integer("n", 0, 1), ValueError, "n: expected an integer >= 1, got 0"),
        (lambda: checks.integer("n", 9, 1, 8), ValueError,
         "n: expected an integer from 1 to 8, got 9"),
        (lambda: checks.integer("n", 0, 1, 8), ValueError,
         "n: expected an integer from 1 to 8, got 0"),
        (lambda: checks.integer("n", -(10**5000), 1), ValueError,
         "n: expected an integer >= 1, got an integer of 64 bits or more"),
        (lambda: checks.number("n", "1"), TypeError, "n: expected a number, got str"),
        (lambda: checks.number("n", b"1"), TypeError, "n: expected a number, got bytes"),
        (lambda: checks.number("n", None), TypeError, "n: expected a number, got NoneType"),
        (lambda: checks.number("n", [1.0]), TypeError, "n: expected a number, got list"),
        (lambda: checks.number("n", 10**400), ValueError,
         "n: expected a finite number, got one beyond float64"),
        (lambda: checks.eps("eps", -1), ValueError,
         "eps: expected a finite number >= 0, got -1"),
        (lambda: checks.eps("eps", inf), ValueError,
         "eps: expected a finite number >= 0, got inf"),
        (lambda: checks.momentum(nan), ValueError,
         "momentum: expected a number from 0 to 1, got nan"),
        (lambda: checks.hyper_parameter("lr", "1"), TypeError,
         "lr: expected a finite number >= 0, got '1'"),
        (lambda: checks.hyper_parameter("lr", nan), ValueError,
         "lr: expected a finite number >= 0, got nan"),
        (lambda: checks.hyper_parameter("f", 1, FLAG), TypeError,
         "f: expected True or False, got 1"),
        (lambda: checks.activation(["relu"]), ValueError,
         "activation: expected None, 'relu' or 'leaky_relu', got ['relu']"),
        (lambda: checks.dtype("d", "i4", checks.FLOATS), TypeError,
         "d: expected float32 or float64, got int32"),
        (lambda: checks.array("a", [[1], [1, 2]]), ValueError,
         "a: expected an array_like of numbers, got setting an array element"),
        (lambda: checks.values("a", [1, 2], 3), ValueError,
         "a: expected shape (3,), got (2,)"),
        (lambda: checks.values("a", [True], 1), TypeError,
         "a: expected numbers, got dtype bool"),
        (lambda: checks.values("a", [1, -2], 2, 0), ValueError,
         "a: expected values >= 0, got -2"),
        (lambda: checks.ndarray("a", [1.0], checks.FLOATS), TypeError,
         "a: expected ndarray of float32 or float64, got list"),
        (lambda: checks.ndarray("a", np.ones(2), checks.FLOATS, (3,)), ValueError,
         "a: expected shape (3,), got (2,)"),
        (lambda: checks.iterator("it", 3), TypeError, "it: expected an iterable, got int"),
        (lambda: checks.mapping("m", [1]), TypeError, "m: expected a mapping, got list"),
        (lambda: checks.state([1], "a", "others"), TypeError,
         "state: expected a mapping, got list"),
        (lambda: checks.state({"b": 1, 3: 2, "d": 3}, ["c", "b", "a"], "others,"), ValueError,
         "state: expected others, missing: a, c, unknown: 3, d"),
    ],
)  # fmt: skip
def test_names_the_argument_and_says_what_was_expected_and_what_came(check, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        check()


def test_values_below_zero_are_found_beside_nan():
    checks.values("a", [nan, 1], 2, 0)
    with pytest.raises(ValueError, match="a: expected values >= 0"):
        checks.values("a", [nan, -1], 2, 0)

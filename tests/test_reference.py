"""The reference, and the truth of the tests, by other means: fractions, differences, by hand."""

from fractions import Fraction

import numpy as np
import pytest
from support import Wide, exact_batch_norm

from fastbn import reference


def test_a_case_done_by_hand():
    y, cache = reference.batch_norm([[1.0, 10.0], [3.0, 30.0]], [2, 1], [0, 5], eps=0)
    np.testing.assert_array_equal(cache.mean, [2, 20])
    np.testing.assert_array_equal(cache.var, [1, 100])
    np.testing.assert_array_equal(y, [[-2, 4], [2, 6]])
    dx, dgamma, dbeta = reference.batch_norm_backward([[1.0, 0.0], [0.0, 2.0]], cache)
    np.testing.assert_array_equal(dbeta, [1, 2])
    np.testing.assert_array_equal(dgamma, [-1, 2])
    np.testing.assert_array_equal(dx, 0)  # two values: normalised they are -1 and 1, whatever x


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 6), 0), ((3, 2, 2, 2), 1)])
def test_gradients_agree_with_finite_differences(rng, shape, axis):
    x, weight = rng.standard_normal((2, *shape))
    gamma, beta = rng.standard_normal((2, shape[axis]))
    _, cache = reference.batch_norm(x, gamma, beta, axis=axis)
    gradients = reference.batch_norm_backward(weight, cache)
    for array, gradient in zip((x, gamma, beta), gradients, strict=True):
        for i in np.ndindex(array.shape):
            value, losses = array[i], []
            for array[i] in (value + 1e-6, value - 1e-6):
                y, _ = reference.batch_norm(x, gamma, beta, axis=axis)
                losses.append((y * weight).sum())
            array[i] = value
            numeric = (losses[0] - losses[1]) / 2e-6
            assert gradient[i] == pytest.approx(numeric, rel=1e-6, abs=1e-7)


def test_inference_by_the_batch_statistics_is_training(rng):
    x = rng.standard_normal((4, 3, 5))
    y, cache = reference.batch_norm(x, [1, 2, 3], [4, 5, 6])
    out = np.empty_like(x)
    same = reference.batch_norm_inference(x, cache.mean, cache.var, [1, 2, 3], [4, 5, 6], out=out)
    assert same is out
    np.testing.assert_array_equal(same, y)


def test_results_are_rounded_to_the_type_of_x_once(rng):
    x = rng.standard_normal((4, 3)).astype(">f4")
    y, cache = reference.batch_norm(x, np.ones((3, 1)), None)
    dx, dgamma, dbeta = reference.batch_norm_backward(x, cache)
    assert y.dtype == dx.dtype == dbeta.dtype == np.float32
    assert dgamma.dtype == np.float64
    assert dgamma.shape == (3, 1)
    wide, _ = reference.batch_norm(x.astype(np.float64))
    np.testing.assert_array_equal(y, wide.astype(np.float32))


def fractions(wide):
    return [Fraction(high) + Fraction(low) for high, low in zip(wide.high, wide.low, strict=True)]


def test_wide_numbers_have_thirty_digits(rng):
    numbers = rng.standard_normal((4, 100)) * [[1e10], [1e-7], [1e-3], [1e-21]]
    a, b = Wide(*numbers[:2]), Wide(*numbers[2:])
    pairs = list(zip(fractions(a), fractions(b), strict=True))
    for actual, wanted, least in [
        (a + b, [x + y for x, y in pairs], 1e10),
        (1 - a, [1 - x for x, _ in pairs], 1e10),
        (a * b, [x * y for x, y in pairs], 0),
        (a / b, [x / y for x, y in pairs], 0),
        ((b * b).sqrt(), [abs(y) for _, y in pairs], 0),
        (a[:, None].sum(0), [sum(x for x, _ in pairs)], 1e12),
        (a[None] @ b[:, None], [[sum(x * y for x, y in pairs)]], 1e9),
    ]:
        actual, wanted = Wide(np.ravel(actual.high), np.ravel(actual.low)), np.ravel(wanted)
        for x, y in zip(fractions(actual), wanted, strict=True):
            assert abs(x - y) <= 1e-30 * max(abs(y), least)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 6), 0), ((3, 2, 4), 1)])
def test_the_truth_of_the_tests_agrees_with_the_reference(rng, shape, axis):
    x, dy = rng.standard_normal((2, *shape))
    gamma, beta = rng.standard_normal((2, shape[axis]))
    y, cache = reference.batch_norm(x, gamma, beta, axis=axis)
    gradients = reference.batch_norm_backward(dy, cache)
    exact = exact_batch_norm(x, gamma, beta, dy, axis)
    for actual, wanted in zip((y, *gradients, cache.mean, cache.var), exact, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-13)

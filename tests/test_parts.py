"""Statistics in parts: moments, their merging, and normalisation and gradients from them."""

import copy
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, MEANS_AND_STDS, assert_close, exact_batch_norm

import fastbn
from fastbn import Moments, reference
from fastbn.functional.parts import merge_packed, packed

LAYOUTS = {"NCHW": ((9, 5, 8, 8), 1), "NHWC": ((9, 8, 8, 5), -1), "NC": ((60, 70), 1)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_are_those_of_batch_norm(variant, rng, layout, dtype):
    shape, axis = LAYOUTS[layout]
    x = (3 + rng.standard_normal(shape)).astype(dtype)
    moments = fastbn.batch_moments(x, axis=axis)
    _, cache = fastbn.batch_norm(x, axis=axis)
    assert moments.count == x.size // shape[axis]
    np.testing.assert_allclose(moments.mean, cache.mean, rtol=1e-14)
    np.testing.assert_allclose(moments.var, cache.var, rtol=1e-13)  # 4 bits may cancel there
    for actual, wanted in zip(moments, reference.batch_moments(x, axis=axis), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-13)


def test_moments_of_nothing_are_neutral():
    nothing = fastbn.batch_moments(np.empty((0, 2), np.float32))
    assert nothing.count == 0
    np.testing.assert_array_equal(nothing.mean, [0, 0])
    some = fastbn.batch_moments(np.array([[1.0, 2], [3, 5]]))
    for merged in (fastbn.merge_moments(nothing, some), fastbn.merge_moments(some, nothing)):
        for actual, wanted in zip(merged, some, strict=True):
            np.testing.assert_array_equal(actual, wanted)
    assert fastbn.merge_moments(nothing, nothing).count == 0


@settings(max_examples=100, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 2000), max_size=12),
    mean_and_std=st.sampled_from([(0, 1), (1e6, 1), (-1e6, 1), (1e12, 1e6), (1e-6, 1e-12)]),
    single=st.booleans(),
    shuffled=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**32 - 1),
)
def test_merging_any_partition_gives_the_moments_of_the_whole(
    cuts, mean_and_std, single, shuffled, seed
):
    mean, std = mean_and_std
    x = mean + std * np.random.default_rng(seed).standard_normal((2000, 3))
    x = x.astype(np.float32) if single else x
    parts = [fastbn.batch_moments(part) for part in np.split(x, sorted(cuts))]
    shuffled.shuffle(parts)
    merged, whole = fastbn.merge_moments(*parts), fastbn.batch_moments(x)
    assert merged.count == whole.count
    # Each part's own sums are rounded too: some 100 additions a lane, 16 lanes.
    eps = np.finfo(np.float64).eps
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=2 * eps * np.abs(x).max())
    np.testing.assert_allclose(merged.var, whole.var, rtol=4 * eps)
    var = exact_batch_norm(x, np.ones(3), np.zeros(3), x, 1)[-1]
    np.testing.assert_allclose(merged.var, var, rtol=4 * eps)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_from_another_process_merges_as_exactly(rng, duplicate):
    x = 1e6 + rng.standard_normal((1000, 4))
    parts = [fastbn.batch_moments(part) for part in np.array_split(x, 7)]
    wanted, actual = fastbn.merge_moments(*parts), fastbn.merge_moments(*map(duplicate, parts))
    np.testing.assert_array_equal(actual.var, wanted.var)
    np.testing.assert_array_equal(actual.mean_low, wanted.mean_low)


def test_moments_made_by_hand_are_merged(rng):
    x = rng.standard_normal((90, 4))
    parts = [Moments(p.mean(0), p.var(0), len(p)) for p in np.array_split(x, 4)]
    mean, var, count = fastbn.merge_moments(*parts)
    assert count == 90
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-15)
    np.testing.assert_allclose(var, x.var(0), rtol=1e-14)


def test_packed_moments_merge_to_the_same_bits(rng):
    x = 1e6 + rng.standard_normal((1000, 4))
    moments = [fastbn.batch_moments(part) for part in (x[:3], x[3:3], x[3:700], x[700:])]
    rows = np.array([packed(each) for each in moments])
    merged, wanted = merge_packed(rows), fastbn.merge_moments(*moments)
    assert merged.count == 1000
    for field in ("mean", "mean_low", "var"):
        np.testing.assert_array_equal(getattr(merged, field), getattr(wanted, field))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("mean", "std"), MEANS_AND_STDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_parts_is_as_exact_as_whole(variant, rng, layout, mean, std, activation):
    shape, axis = LAYOUTS[layout]
    x = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    residual, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, shape[axis])).astype(np.float32)
    options = {"axis": axis, "activation": activation}
    parts = [slice(0, 2), slice(2, 7), slice(7, None)]

    moments = fastbn.merge_moments(*(fastbn.batch_moments(x[p], axis=axis) for p in parts))
    results = [
        fastbn.normalize(x[p], moments, gamma, beta, residual=residual[p], **options) for p in parts
    ]
    dys = [dy[p] for p in parts]
    caches = [cache for _, cache in results]
    dgamma, dbeta = np.sum(
        [fastbn.batch_norm_backward_reduce(*pair) for pair in zip(dys, caches, strict=True)], axis=0
    )
    images = [
        fastbn.batch_norm_backward_apply(*pair, dgamma, dbeta)
        for pair in zip(dys, caches, strict=True)
    ]
    y = np.concatenate([y for y, _ in results])
    dx, dresidual = (np.concatenate(arrays) for arrays in zip(*images, strict=True))

    wide = (a.astype(np.float64) for a in (x, gamma, beta))
    wanted, exact = reference.batch_norm(*wide, residual=residual.astype(float), **options)
    if activation:  # where rounding alone decides on which side of 0 a value is, ours counts
        exact = exact._replace(slope=np.where(y > 0, 1.0, 0.0))
    wanted_gradients = reference.batch_norm_backward(dy.astype(np.float64), exact)
    assert_close(y, wanted, scale=np.abs(wanted).max() + np.abs(residual).max())
    for actual, right in zip((dx, dgamma, dbeta, dresidual), wanted_gradients, strict=True):
        assert_close(actual, right, np.float32)


def test_halves_of_the_backward_pass_make_the_whole(rng):
    x, dy = rng.standard_normal((2, 6, 4, 5, 5)).astype(np.float32)
    mask = rng.random((6, 5, 5)) < 0.7
    for options in ({}, {"activation": "relu"}, {"residual": dy}, {"mask": mask}):
        _, cache = fastbn.batch_norm(x, np.arange(4.0), **options)
        dx, dgamma, dbeta, *more = fastbn.batch_norm_backward(dy, cache)
        sums = fastbn.batch_norm_backward_reduce(dy, cache)
        assert [s.dtype for s in sums] == [np.float64] * 2
        np.testing.assert_array_equal(sums[0], dgamma)
        np.testing.assert_array_equal(sums[1].astype(np.float32), dbeta)
        out = np.empty_like(x)
        applied = fastbn.batch_norm_backward_apply(dy, cache, *sums, out=out)
        image = applied[0] if more else applied
        assert image is out
        np.testing.assert_array_equal(image, dx)
        if more:
            np.testing.assert_array_equal(applied[1], more[0])


def test_an_empty_part_takes_part(rng):
    x = rng.standard_normal((8, 3))
    moments = fastbn.batch_moments(x)
    y, cache = fastbn.normalize(x[:0], moments)
    assert y.shape == (0, 3)
    np.testing.assert_array_equal(fastbn.batch_norm_backward_reduce(x[:0], cache), np.zeros((2, 3)))
    assert fastbn.batch_norm_backward_apply(x[:0], cache, *np.ones((2, 3))).shape == (0, 3)


X = np.arange(12.0).reshape(4, 3)
THREE = fastbn.batch_moments(X)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), ValueError, "moments: expected one or more, got none"),
        ((3,), TypeError, "moments[0]: expected Moments, got int"),
        ((THREE, (1, 2, 3)), TypeError, "moments[1]: expected Moments, got tuple"),
        ((THREE, fastbn.batch_moments(X.T)), ValueError, "moments[1].mean: expected 3 number(s)"),
        ((Moments(np.zeros(3), -np.ones(3), 2),), ValueError,
         "moments[0].var: expected values >= 0, got -1.0"),
        ((Moments(np.zeros(3), np.ones(3), -1),), ValueError,
         "moments[0].count: expected values >= 0, got -1"),
        ((Moments(np.zeros(3), np.ones(3), 1.5),), ValueError,
         "moments[0].count: expected an integer, got 1.5"),
        ((Moments(np.zeros(3), np.array(["a"] * 3), 1),), ValueError,
         "moments[0].var: expected 3 number(s), got <U1 of shape (3,)"),
    ],
)  # fmt: skip
def test_bad_moments_are_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastbn.merge_moments(*arguments)


@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        (3, TypeError, "moments: expected Moments, got int"),
        (fastbn.batch_moments(X[:0]), ValueError,
         "moments: expected those of one value per channel at least, got count 0"),
        (fastbn.batch_moments(X.T), ValueError, "mean: expected 3 value(s), one per channel"),
        (THREE._replace(count=np.array([4])), ValueError,
         "moments.count: expected 1 number(s), got int64 of shape (1,)"),
    ],
)  # fmt: skip
def test_normalize_names_what_does_not_fit_and_writes_nothing(moments, error, message):
    target = np.full((4, 3), 7.0)
    with pytest.raises(error, match=re.escape(message)):
        fastbn.normalize(X, moments, out=target)
    np.testing.assert_array_equal(target, 7)


def test_halves_name_what_does_not_fit_and_write_nothing(rng):
    target = np.full((4, 3), 7.0)
    _, part = fastbn.normalize(X, fastbn.batch_moments(np.tile(X, (2, 1))))
    _, groups = fastbn.batch_norm(X, virtual_batch_size=2)
    _, lost = fastbn.batch_norm(X.copy(), out=target)
    sums = np.ones((2, 3))
    cases = [
        (lambda: fastbn.batch_norm_backward(X, part, out=target), ValueError,
         "cache: expected statistics of the 4 values per channel of x alone, got those of 8; "
         "use batch_norm_backward_reduce and _apply"),
        (lambda: fastbn.batch_norm_backward_reduce(X, groups), ValueError,
         "cache: expected one group of examples; use batch_norm_backward"),
        (lambda: fastbn.batch_norm_backward_apply(X, groups, *sums), ValueError,
         "cache: expected one group of examples; use batch_norm_backward"),
        (lambda: fastbn.batch_norm_backward_reduce(X, "c"), TypeError, "cache: expected what"),
        (lambda: fastbn.batch_norm_backward_reduce(X.T, part), ValueError, "dy: expected shape"),
        (lambda: fastbn.batch_norm_backward_apply(X, part, [1, 2], sums[1], out=target),
         ValueError, "dgamma: expected 3 value(s), one per channel, got shape (2,)"),
        (lambda: fastbn.batch_norm_backward_apply(X, part, *sums, out=target[0]), ValueError,
         "out: expected shape (4, 3)"),
    ]  # fmt: skip
    target[...] = 7
    for call, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            call()
    np.testing.assert_array_equal(target, 7)
    assert lost.mean.shape == (3,)

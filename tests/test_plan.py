import numpy as np
import pytest

from fastbn.functional.plan import plan


def of(array, axis):
    return plan(array.shape, array.strides, array.itemsize, axis)


@pytest.mark.parametrize(
    ("array", "axis", "expected"),
    [
        (np.zeros((2, 3, 4, 5)), 1, (2, 3, 20)),
        (np.zeros((2, 3, 4, 5)), -1, (24, 5, 1)),
        (np.zeros((2, 3, 4, 5)), 0, (1, 2, 60)),
        (np.zeros(7), 0, (1, 7, 1)),
        (np.zeros((2, 3, 4), order="F"), 1, (4, 3, 2)),
        (np.zeros((2, 5, 4, 3)).transpose(0, 3, 1, 2), 1, (40, 3, 1)),
        (np.zeros((2, 1, 4)), 1, (1, 1, 8)),
        (np.zeros((4, 1, 1)), 0, (1, 4, 1)),
        (np.zeros((0, 3, 4)), 1, (0, 3, 4)),
        (np.zeros((2, 0, 4)), 1, (2, 0, 4)),
    ],
)
def test_permutations_of_contiguous_memory_are_followed(array, axis, expected):
    assert of(array, axis) == expected


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 6))[:, ::2],
        np.zeros((4, 6))[::-1],
        np.zeros((4, 6))[:, :3],
        np.broadcast_to(np.zeros(6), (4, 6)),
    ],
)
def test_other_memory_has_no_plan(array):
    assert of(array, 1) is None


@pytest.mark.parametrize(("ndim", "axis"), [(0, 0), (1, 1), (2, 2), (2, -3)])
def test_a_missing_axis_is_named(ndim, axis):
    with pytest.raises(ValueError, match=rf"axis: expected an axis of x, .* {ndim} dim.* {axis}$"):
        of(np.zeros((1,) * ndim), axis)

import numpy as np
import pytest

from omniconv.inspect.cam.localise import box_iou, boxes


def test_the_box_is_that_of_the_largest_region():
    maps = np.zeros((3, 20, 30))
    maps[0, 4:9, 10:25] = 1.0
    maps[0, 15:17, 1:3] = 5.0  # brighter and smaller
    maps[1, 3, 3] = 2.0
    assert boxes(maps, 0.15).tolist() == [[10, 4, 25, 9], [3, 3, 4, 4], [0, 0, 0, 0]]


def test_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 20, (50, 2, 2, 2)), axis=2)  # pair, box side, axis
    first, second = (
        np.concatenate([corners[:, 0, :, k], corners[:, 1, :, k]], 1)[:, [0, 2, 1, 3]] for k in (0, 1)
    )
    for a, b, iou in zip(first, second, box_iou(first, second), strict=True):
        one, two = (np.zeros((20, 20), bool) for _ in range(2))
        one[a[1] : a[3], a[0] : a[2]] = True
        two[b[1] : b[3], b[0] : b[2]] = True
        union = (one | two).sum()
        assert iou == pytest.approx((one & two).sum() / union if union else 0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\): got 1"):
        boxes(np.zeros((1, 2, 2)), 1)
    with pytest.raises(ValueError, match=r"maps must be \(N, H, W\): got shape \(2, 2\)"):
        boxes(np.zeros((2, 2)))

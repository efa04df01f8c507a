"""Weakly supervised localisation: the box that an activation map draws around an object."""

import numpy as np

__all__ = ["box_iou", "boxes"]


def boxes(maps: np.ndarray, threshold: float = 0.2) -> np.ndarray:
    """Return the box around the largest connected region of each map above `threshold` times its maximum.

    Args:
        maps: (N, H, W), not negative.
        threshold: share of the maximum, in [0, 1); 0.15 to 0.2 is usual.

    Shapes:
        - output: (N, 4) int64: left, top, right, bottom in pixels, the last two outside the region. A map
          that is zero everywhere has an empty box (0, 0, 0, 0).

    Raises:
        ValueError: if `maps` has another number of axes or `threshold` lies outside [0, 1).
    """
    from scipy import ndimage

    if maps.ndim != 3:
        raise ValueError(f"maps must be (N, H, W): got shape {maps.shape}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1): got {threshold}")
    found = np.zeros((len(maps), 4), np.int64)
    for index, one in enumerate(maps):
        regions, count = ndimage.label(one > threshold * one.max())  # type: ignore[misc]  # scipy's stubs
        if count:
            largest = np.bincount(regions.ravel())[1:].argmax() + 1
            rows, columns = np.nonzero(regions == largest)
            found[index] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return found


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the area that each pair of boxes (N, 4) shares over the area that they cover, (N,)."""
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, 2:], second[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    areas = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1)
    return shared / np.maximum(areas - shared, 1)

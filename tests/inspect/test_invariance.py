"""Transforms of images against rolls and turns; invariance of networks that are invariant."""

import pytest
import torch
from torch import nn

from omniconv.inspect.invariance import invariance, transform_images


def test_transforms_are_what_they_say():
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    moved = transform_images(x, "translation", 2, angle=90)
    torch.testing.assert_close(moved[:, :, 2:], x[:, :, :-2])
    torch.testing.assert_close(moved[:, :, :2], x[:, :, :2].flip(2))  # mirrored at the border
    torch.testing.assert_close(transform_images(x, "translation", 1)[..., 1:], x[..., :-1])
    square = x[..., :7, :]
    torch.testing.assert_close(transform_images(square, "rotation", 90), square.rot90(-1, (2, 3)))
    large = transform_images(torch.ones(1, 1, 8, 8).tril(), "scale", 2)
    assert large[0, 0].diagonal(4).max() == 0
    assert large[0, 0].diagonal(-4).min() == 1


def test_agreement():
    torch.manual_seed(0)
    x = torch.randn(50, 2, 8, 8)
    anywhere = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    # The largest pixel may leave the image only at the border, which is mirrored.
    assert invariance(anywhere, x, "translation", [0.0]).mean == 1
    place = nn.Sequential(nn.Conv2d(2, 64, 8), nn.Flatten()).train()
    field = invariance(place, x, "rotation", [0, 45])
    assert field.data["agreement"][0] == 1
    assert field.data["agreement"][1] < 0.5
    assert place.training
    assert field.plot().axes


def test_unknown_changes_are_refused():
    with pytest.raises(ValueError, match="did you mean rotation"):
        invariance(nn.Flatten(), torch.zeros(1, 1, 2, 2), "rotatoin", [1])  # type: ignore[arg-type]

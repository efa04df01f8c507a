"""Cheap convolutions against the dense ones that their factors compose to."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.sic import SICUnit, SpatialBottleneck, TopologicalProjection, window_indices


def neighbours(a, b, size, window):
    """Return whether two places on a ring are within a window."""
    return min((a - b) % size, (b - a) % size) <= window // 2


@pytest.mark.parametrize(("grid", "window"), [((5,), (3,)), ((4, 6), (3, 5)), ((3, 4, 5), (1, 3, 3))])
def test_a_channel_sees_the_window_around_it(grid, window):
    seen = window_indices(grid, window)
    places = list(itertools.product(*map(range, grid)))
    for channel, here in enumerate(places):
        wanted = {
            other
            for other, there in enumerate(places)
            if all(neighbours(a, b, g, w) for a, b, g, w in zip(here, there, grid, window, strict=True))
        }
        assert set(seen[:, channel].tolist()) == wanted
        assert len(seen) == len(wanted)


def test_the_projection_is_a_masked_1x1_convolution():
    torch.manual_seed(0)
    layer = TopologicalProjection((3, 4), (3, 3)).double()
    dense = torch.zeros(12, 12, dtype=torch.float64)
    for place, channel in itertools.product(range(9), range(12)):
        dense[channel, layer.indices[place, channel]] = layer.weight[place, channel].detach()
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, dense[:, :, None, None]))
    assert int((dense != 0).sum()) == 12 * 9


@pytest.mark.parametrize(("channels", "out", "stride"), [(4, 4, 1), (4, 4, 2), (3, 5, 1)])
def test_a_unit_is_the_dense_convolution_of_its_factors(channels, out, stride):
    torch.manual_seed(0)
    unit = SICUnit(channels, out, stride=stride).double()
    project = unit.project.get_parameter("weight")
    dense = torch.einsum("oc,cuv->ocuv", project[:, :, 0, 0], unit.spatial.weight[:, 0])
    x = torch.randn(2, channels, 9, 7, dtype=torch.float64)
    expected = F.conv2d(x, dense, stride=stride, padding=1)
    torch.testing.assert_close(unit(x), x + expected if channels == out and stride == 1 else expected)


def test_the_bottleneck_projects_blocks_of_pixels():
    torch.manual_seed(0)
    layer = SpatialBottleneck(3, 2).double()
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    down, up = layer.reduce.weight[:, 0], layer.restore.weight[:, 0]
    project = layer.project.get_parameter("weight")[:, :, 0, 0]
    expected = x.clone()
    for i, j in itertools.product(range(2), range(3)):
        block = (slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
        vector = project @ (x[0][block] * down).sum((1, 2))
        expected[0][block] += vector[:, None, None] * up
    torch.testing.assert_close(layer(x), expected)

"""Separable and segmented convolutions against dense ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.separable import SegmentedConv2d, SeparableConv2d


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_separable_is_the_dense_convolution_of_outer_products(kernel, stride):
    layer, x = SeparableConv2d(4, 6, kernel, stride), torch.randn(2, 4, 9, 7)
    dense = layer.pointwise.weight[:, :, 0, 0, None, None] * layer.depthwise.weight[:, 0]
    torch.testing.assert_close(layer(x), F.conv2d(x, dense, stride=stride, padding=kernel // 2))


def test_an_activation_stands_between_the_steps():
    layer, x = SeparableConv2d(4, 6, act=nn.ReLU, names=("a", "b")), torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(layer(x), layer.b(layer.a(x).relu()))
    assert {name for name, _ in layer.named_parameters()} == {"a.weight", "b.weight"}


@pytest.mark.parametrize("segments", [1, 2, 6])
def test_segments_go_from_regular_to_depthwise(segments):
    layer, x = SegmentedConv2d(4, 6, segments), torch.randn(2, 4, 5, 7)
    z = F.conv2d(x, layer.pointwise.weight)
    size = 6 // segments
    wanted = [
        F.conv2d(z[:, start : start + size], layer.spatial.weight[start : start + size], padding=1)
        for start in range(0, 6, size)
    ]
    torch.testing.assert_close(layer(x), torch.cat(wanted, 1))
    assert layer.spatial.weight.shape == (6, size, 3, 3)

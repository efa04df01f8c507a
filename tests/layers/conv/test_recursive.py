"""Recursive convolution: counts, receptive field, and two levels written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.recursive import RecursiveConv2d


def test_two_levels_are_the_paper_equation():
    torch.manual_seed(0)
    layer = RecursiveConv2d(3, 5, 2).double()
    x = torch.randn(2, 3, 11, 14, dtype=torch.float64)
    one = F.conv2d(x, layer.down.weight, stride=2, padding=2, groups=3)
    two = F.conv2d(one, layer.down.weight, stride=2, padding=2, groups=3)
    y = F.interpolate(layer.convs[0](two), one.shape[2:], mode="bilinear")
    y = F.interpolate(layer.convs[1](one + y), x.shape[2:], mode="bilinear")
    torch.testing.assert_close(layer(x), layer.convs[2](x + y))


@pytest.mark.parametrize("levels", [1, 3])
def test_parameters_rise_linearly_and_the_field_exponentially(levels):
    layer = RecursiveConv2d(1, 5, levels)
    assert sum(p.numel() for p in layer.parameters()) == (levels + 2) * 25
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    x = torch.zeros(1, 1, 128, 128, requires_grad=True)
    layer(x)[0, 0, 64, 64].backward()
    seen = x.grad[0, 0].nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).min() >= 5 * 2**levels

"""Blurred subsampling against a convolution with the binomial filter."""

import math

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.pool.blur import BlurPool2d


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (5, 1), (7, 3)])
def test_it_is_a_convolution_with_the_binomial_filter(kernel, stride):
    row = torch.tensor([math.comb(kernel - 1, u) for u in range(kernel)], dtype=torch.float64)
    row = row / row.sum()
    x = torch.randn(2, 3, 11, 8, dtype=torch.float64)
    padded = F.pad(x, (kernel // 2,) * 4, mode="reflect")
    expected = F.conv2d(padded, torch.outer(row, row).expand(3, 1, -1, -1), stride=stride, groups=3)
    torch.testing.assert_close(BlurPool2d(kernel, stride)(x), expected)


def test_an_alternating_map_vanishes():
    x = (-1.0) ** torch.arange(9.0).expand(1, 1, 9, 9)
    assert BlurPool2d()(x).abs().max() < 1e-7

"""Recursive gated convolution: its order, and its global filter as a circular convolution."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.recursive_gated import GlobalLocalFilter, RecursiveGatedConv2d


@pytest.mark.parametrize("order", [1, 3])
def test_without_biases_the_output_is_homogeneous_of_degree_order_plus_one(order):
    torch.manual_seed(0)
    layer = RecursiveGatedConv2d(8, order).double()
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(3 * x), 3 ** (order + 1) * layer(x))


def test_order_two_is_the_paper_equation():
    torch.manual_seed(0)
    layer = RecursiveGatedConv2d(8, 2, kernel_size=3, scale=0.5).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    p, q0, q1 = layer.proj_in(x).split((4, 4, 8), 1)
    weight, bias = layer.dwconv.weight, layer.dwconv.bias
    q0 = F.conv2d(q0, weight[:4], bias[:4], padding=1, groups=4) / 2
    q1 = F.conv2d(q1, weight[4:], bias[4:], padding=1, groups=8) / 2
    torch.testing.assert_close(layer(x), layer.proj_out(layer.pws[0](p * q0) * q1))


@pytest.mark.parametrize("size", [(5, 6), (4, 7)])
def test_the_global_filter_is_a_circular_convolution(size):
    torch.manual_seed(0)
    layer = GlobalLocalFilter(4, size).double()
    nn.init.normal_(layer.complex_weight)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    u = F.layer_norm(x.permute(0, 2, 3, 1), (4,), eps=1e-6).permute(0, 3, 1, 2)
    # A multiplier of orthonormal transforms is one of plain transforms, whose inverse is the kernel.
    kernel = torch.fft.irfft2(torch.view_as_complex(layer.complex_weight.detach()), size)
    whole = sum(
        kernel[:, i, j, None, None] * u[:, 2:].roll((i, j), (2, 3))
        for i in range(size[0])
        for j in range(size[1])
    )
    local = F.conv2d(u[:, :2], layer.dw.weight, padding=1, groups=2)
    y = torch.stack((local[:, 0], whole[:, 0], local[:, 1], whole[:, 1]), 1)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (4,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), y)
    assert math.prod(layer.complex_weight.shape[1:3]) < math.prod(size)

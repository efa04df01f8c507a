"""Convolutions with batch norm, and parallel kernels, against convolutions written by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.conv_norm import ConvNorm2d
from omniconv.layers.conv.rep_depthwise import RepDepthwiseConv2d


def _disturb(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in module.double().state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module.eval()


def test_training_normalises_the_convolution_by_its_batch():
    layer = ConvNorm2d(3, 4, 3, stride=2).double()
    y = layer(torch.randn(5, 3, 9, 8, dtype=torch.float64))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(
        y.var((0, 2, 3), unbiased=False), torch.ones(4, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_the_merged_kernel_is_the_sum_of_both_scaled_ones():
    layer = _disturb(RepDepthwiseConv2d(2, 7, 3, multiplier=2, stride=2))
    merged = layer.merged()
    weight = torch.zeros(4, 1, 7, 7, dtype=torch.float64)
    for branch, border in ((layer.large, 0), (layer.small, 2)):
        scale = branch.norm.weight / (branch.norm.running_var + 1e-5).sqrt()
        weight[:, :, border : 7 - border, border : 7 - border] += (
            scale[:, None, None, None] * branch.conv.weight
        )
    torch.testing.assert_close(merged.weight, weight)
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x, weight, merged.bias, 2, 3, groups=2), layer(x))

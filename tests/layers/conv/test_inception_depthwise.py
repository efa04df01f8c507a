"""Inception depthwise convolution against one dense depthwise convolution full of zeros."""

import torch
from torch.nn import functional as F

from omniconv.layers.conv.inception_depthwise import InceptionDepthwiseConv2d


def test_it_is_one_depthwise_convolution_with_zeros_in_its_kernels():
    torch.manual_seed(0)
    layer = InceptionDepthwiseConv2d(16).double()
    kernel, bias = torch.zeros(16, 1, 11, 11, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    kernel[:10, :, 5, 5] = 1
    kernel[10:12, :, 4:7, 4:7], bias[10:12] = layer.dwconv_hw.weight, layer.dwconv_hw.bias
    kernel[12:14, :, 5:6], bias[12:14] = layer.dwconv_w.weight, layer.dwconv_w.bias
    kernel[14:, :, :, 5:6], bias[14:] = layer.dwconv_h.weight, layer.dwconv_h.bias
    x = torch.randn(2, 16, 9, 13, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, bias, padding=5, groups=16))
    assert torch.equal(layer(x)[:, :10], x[:, :10])

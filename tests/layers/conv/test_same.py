"""TensorFlow's padding, against its definition and against PyTorch where both exist."""

import math

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.same import SameConv2d


@pytest.mark.parametrize("size", [(1, 1), (7, 10), (8, 8), (5, 12)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 3, 1), (3, 2, 2), (2, 2, 1)]
)
def test_pads_as_tensorflow_defines(size, kernel, stride, dilation):
    torch.manual_seed(0)
    conv = SameConv2d(2, 3, kernel, stride, dilation=dilation)
    x = torch.randn(2, 2, *size)
    # tf.nn.convolution: total = max((ceil(n / s) - 1) s + d (k - 1) + 1 - n, 0), floor(total / 2) in front.
    pads = []
    for n in reversed(size):
        total = max((math.ceil(n / stride) - 1) * stride + dilation * (kernel - 1) + 1 - n, 0)
        pads += [total // 2, total - total // 2]
    expected = F.conv2d(F.pad(x, pads), conv.weight, conv.bias, stride, 0, dilation)
    assert expected.shape[2:] == tuple(math.ceil(n / stride) for n in size)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=0)


def test_without_stride_it_is_pytorchs_same():
    conv = SameConv2d(4, 4, 5, groups=2)
    x = torch.randn(1, 4, 9, 6)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding="same", groups=2))


def test_exports_with_any_size():
    conv = SameConv2d(2, 3, 3, 2)
    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        conv, (torch.randn(2, 2, 11, 14),), dynamic_shapes=({0: dim, 2: dim, 3: dim},)
    )
    for size in ((5, 2, 8, 9), (1, 2, 3, 30)):
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), conv(x))


def test_refuses_a_stride_that_skips_pixels():
    with pytest.raises(ValueError, match="stride must not exceed"):
        SameConv2d(2, 2, 1, 2)

"""MSA-Conv against unfolded windows."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.layers.attention.msa_conv import MSAConv2d


def unfolded(layer: MSAConv2d, x: Tensor) -> Tensor:
    """Return the layer's output, with windows cut out by unfold."""
    heads, k, dilation = layer.num_heads, layer.kernel_size, layer.dilation
    q, key, value = layer.qkv_conv(x).chunk(3, 1)
    windows = [
        F.unfold(part, k, dilation, k // 2 * dilation).view(len(x), heads, -1, k * k, x[0, 0].numel())
        for part in (key, value)
    ]
    q = q.view(len(x), heads, -1, 1, x[0, 0].numel())
    share = (q * windows[0]).sum(2, keepdim=True).div(q.shape[2] ** 0.5).softmax(3)
    y = (share * windows[1]).sum(3).view_as(x)
    return F.conv2d(x + y, layer.mlp.weight, None, layer.mlp.stride, k // 2, groups=layer.mlp.groups)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "heads"), [(3, 1, 1, 1), (5, 2, 1, 2), (7, 1, 2, 1), (3, 2, 3, 6)]
)
@torch.no_grad()
def test_windows_are_those_of_unfold(kernel, stride, dilation, heads):
    torch.manual_seed(0)
    layer = MSAConv2d(6, 4, kernel, num_heads=heads, stride=stride, dilation=dilation).double()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), unfolded(layer, x))


@torch.no_grad()
def test_shifts_and_pooled_keys_equal_their_sums():
    torch.manual_seed(0)
    layer = MSAConv2d(4, num_heads=2, kernel_size=1, shift=3, pool=1).double()
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    q, k, v = layer.qkv_conv(x).chunk(3, 1)
    for part, roll in ((slice(0, 2), 0), (slice(2, 4), 3)):
        near = (q[:, part] * k[:, part].roll(roll, 3)).sum(1) / 2**0.5
        all_of_it = (q[:, part] * k[:, part].mean((2, 3), keepdim=True)).sum(1) / 2**0.5
        share = torch.sigmoid(near - all_of_it)
        expected = share * v[:, part].roll(roll, 3) + (1 - share) * v[:, part].mean((2, 3), keepdim=True)
        torch.testing.assert_close(layer.attend(x)[:, part], expected)


@torch.no_grad()
def test_without_borders_shifts_of_the_map_commute():
    torch.manual_seed(0)
    layer = MSAConv2d(4, num_heads=4, shift=2, pool=1, padding_mode="circular").double()
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x.roll((1, 3), (2, 3))), layer(x).roll((1, 3), (2, 3)))

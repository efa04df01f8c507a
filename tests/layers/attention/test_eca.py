"""ECA against a banded matrix."""

import pytest
import torch

from omniconv.layers.attention.eca import EfficientChannelAttention, eca_kernel_size


@pytest.mark.parametrize(
    ("channels", "kernel"), [(16, 3), (32, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)]
)
def test_kernel_sizes_of_the_paper(channels, kernel):
    assert eca_kernel_size(channels) == kernel


@pytest.mark.parametrize(("channels", "kernel"), [(16, 3), (5, 7)])
def test_gates_are_those_of_a_band(channels, kernel):
    torch.manual_seed(0)
    layer = EfficientChannelAttention(channels, kernel).double()
    offsets = torch.arange(channels)[None] - torch.arange(channels)[:, None] + kernel // 2
    taps = layer.conv.weight.flatten()[offsets.clamp(0, kernel - 1)]
    band = torch.where((offsets >= 0) & (offsets < kernel), taps, 0.0)
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    expected = x * torch.sigmoid(x.mean((2, 3)) @ band.T)[:, :, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive: got 4"):
        EfficientChannelAttention(8, 4)

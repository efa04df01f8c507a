"""PKCAM against a loop over channels, and what its gates depend on."""

import math

import pytest
import torch

from omniconv.layers.attention.eca import EfficientChannelAttention
from omniconv.layers.attention.pkcam import PKCAM


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def along_channels(kernel, row):
    """The correlation of a row with an odd kernel, zeros beyond both ends."""
    half = len(kernel) // 2
    padded = [0.0] * half + row + [0.0] * half
    return [sum(k * value for k, value in zip(kernel, padded[i:], strict=False)) for i in range(len(row))]


def test_it_is_the_loop():
    torch.manual_seed(0)
    layer, x = PKCAM(8, 2).double(), torch.randn(2, 8, 3, 4, dtype=torch.float64)
    earlier = (torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64))
    y = layer(x, *earlier)
    taps = [p.flatten().tolist() for p in (layer.local.weight, layer.broad.weight)]
    v, u = layer.input_fusion.weight.flatten().tolist(), layer.output_fusion.weight.flatten().tolist()
    for n in range(2):
        z = x[n].mean((1, 2)).tolist()
        rows = [earlier[0][n].tolist() * 4, earlier[1][n].tolist(), z]
        fused = [max(0.0, sum(w * row[c] for w, row in zip(v, rows, strict=True))) for c in range(8)]
        local, broad = along_channels(taps[0], z), along_channels(taps[1], fused)
        for c in range(8):
            gate = sigmoid(u[0] * sigmoid(local[c]) + u[1] * sigmoid(broad[c]))
            torch.testing.assert_close(y[n, c], x[n, c] * (1 + gate))


@pytest.mark.parametrize("excitation", ["eca", "se"])
def test_gates_depend_on_earlier_layers_until_the_fusion_selects_the_local_row(excitation):
    torch.manual_seed(1)
    layer, x = PKCAM(32, 1, excitation), torch.randn(2, 32, 3, 4)
    earlier = torch.randn(2, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, earlier).sum(), earlier)
    assert gradient.any()
    with torch.no_grad():
        layer.output_fusion.weight.copy_(torch.tensor([[1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(layer(x, earlier).sum(), earlier)
    assert not gradient.any()


def test_the_local_row_is_eca():
    layer, eca, x = PKCAM(16, 1), EfficientChannelAttention(16), torch.rand(2, 16, 3, 4) + 1
    with torch.no_grad():
        layer.output_fusion.weight.copy_(torch.tensor([[1.0, 0.0]]))
        eca.conv.weight.copy_(layer.local.weight)
    gates = eca(x) / x
    torch.testing.assert_close(layer(x, torch.randn(2, 8)), x * (1 + gates.sigmoid()))

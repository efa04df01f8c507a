"""Squeeze-and-excitation against the paper's fully connected form."""

import pytest
import torch
from torch import nn

from omniconv.layers.attention.se import SqueezeExcite


@pytest.mark.parametrize("names", [("fc1", "fc2"), ("conv_reduce", "conv_expand")])
def test_layer_is_its_equation(names):
    torch.manual_seed(0)
    layer = SqueezeExcite(12, 3, names=names).double()
    assert list(layer.state_dict()) == [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    w1, b1, w2, b2 = (p.flatten(1) if p.ndim > 1 else p for p in layer.parameters())
    gates = torch.sigmoid(torch.relu(x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
    torch.testing.assert_close(layer(x), x * gates[:, :, None, None])


def test_other_activation_and_gate():
    layer = SqueezeExcite(4, 2, act=nn.SiLU, gate=nn.Hardsigmoid)
    nn.init.zeros_(layer.fc2.weight)
    nn.init.constant_(layer.fc2.bias, 3.0)
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize(("channels", "width"), [(16, 8), (256, 16), (2048, 128)])
def test_default_width(channels, width):
    assert SqueezeExcite(channels, device="meta").fc1.out_channels == width

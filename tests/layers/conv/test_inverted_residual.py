"""The blocks of MobileNetV2 and EfficientNet, against their equations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.inverted_residual import DepthwiseSeparable, InvertedResidual, round_channels
from omniconv.layers.conv.same import SameConv2d
from omniconv.layers.conv.split_residual import split_forward


def disturb(module: nn.Module) -> nn.Module:
    """Give every norm statistics and weights of its own, and leave training mode."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2)
            for tensor in (m.running_mean, m.weight, m.bias):
                nn.init.normal_(tensor, 0.5)
    return module.eval()


def norm(x, bn):
    shape = (1, -1, 1, 1)
    return (x - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt() * bn.weight.view(
        shape
    ) + bn.bias.view(shape)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(32 * 0.35, 16), (16 * 0.35, 8), (24 * 1.4, 32), (1280 * 1.4, 1792), (40 * 1.1, 48), (3, 8), (11.9, 16)],
)  # fmt: skip
def test_round_channels(channels, expected):
    # 11.2 would round to 8, which is below 90% of it.
    assert round_channels(channels) == expected


@pytest.mark.parametrize("se_channels", [0, 3])
def test_block_is_its_equation(se_channels):
    torch.manual_seed(0)
    block = disturb(InvertedResidual(8, 8, expansion=3, se_channels=se_channels, act=nn.SiLU)).double()
    x = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    y = F.silu(norm(torch.einsum("nchw,oc->nohw", x, block.conv_pw.weight[:, :, 0, 0]), block.bn1))
    padded = F.pad(y, (1, 1, 1, 1))
    z = sum(
        padded[:, :, i : i + 6, j : j + 9] * block.conv_dw.weight[:, 0, i, j].view(1, -1, 1, 1)
        for i in range(3)
        for j in range(3)
    )
    z = F.silu(norm(z, block.bn2))
    if se_channels:
        se = block.se
        pooled = z.mean((2, 3))
        hidden = F.silu(F.linear(pooled, se.conv_reduce.weight[:, :, 0, 0], se.conv_reduce.bias))
        gates = torch.sigmoid(F.linear(hidden, se.conv_expand.weight[:, :, 0, 0], se.conv_expand.bias))
        z = z * gates[:, :, None, None]
    out = norm(torch.einsum("nchw,oc->nohw", z, block.conv_pwl.weight[:, :, 0, 0]), block.bn3)
    torch.testing.assert_close(block(x), x + out)


def test_projection_is_linear():
    # Without the shortcut, the sign of the projection flips the sign of the output: nothing comes after it.
    block = disturb(InvertedResidual(8, 16))
    x = torch.randn(1, 8, 5, 5)
    y = block(x)
    with torch.no_grad():
        block.conv_pwl.weight.neg_()
        block.bn3.running_mean.neg_()
        block.bn3.bias.neg_()
    torch.testing.assert_close(block(x), -y)


@pytest.mark.parametrize("make", [InvertedResidual, DepthwiseSeparable])
def test_shortcut_only_between_equal_shapes(make):
    for out, stride, skip in ((8, 1, True), (16, 1, False), (8, 2, False)):
        block = disturb(make(8, out, stride=stride))
        nn.init.zeros_(block.bn3.weight if make is InvertedResidual else block.bn2.weight)
        nn.init.zeros_(block.bn3.bias if make is InvertedResidual else block.bn2.bias)
        x = torch.randn(2, 8, 7, 6)
        y = block(x)
        torch.testing.assert_close(y, x if skip else torch.zeros_like(y))


def test_same_padding_reaches_only_strided_convolutions():
    assert type(InvertedResidual(8, 8, padding="same").conv_dw) is nn.Conv2d
    assert type(InvertedResidual(8, 8, padding="same", stride=2).conv_dw) is SameConv2d


@pytest.mark.parametrize("options", [{}, {"stride": 2, "kernel_size": 5}, {"stride": 2, "padding": "same"}])
@pytest.mark.parametrize("parts", [1, 3, 48])
def test_split_forward_is_forward(options, parts):
    torch.manual_seed(0)
    block = disturb(InvertedResidual(8, 8, **options)).double()
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(split_forward(block, x, parts), block(x), rtol=1e-12, atol=1e-12)


def test_split_forward_refuses_what_it_cannot_split():
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="eval mode"):
        split_forward(InvertedResidual(8, 8), x, 2)
    with pytest.raises(ValueError, match="squeeze-and-excitation"):
        split_forward(InvertedResidual(8, 8, se_channels=2).eval(), x, 2)
    with pytest.raises(ValueError, match="got 5 and 48"):
        split_forward(InvertedResidual(8, 8).eval(), x, 5)


def test_drop_path_drops_whole_branches():
    torch.manual_seed(0)
    block = InvertedResidual(8, 8, drop_path=0.5).train()
    x = torch.randn(64, 8, 3, 3)
    kept = (block(x) != x).flatten(1).any(1)
    assert 16 < kept.sum() < 48

"""DCNv3 and DCNv4 against loops over the public order of their weights."""

import math

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.conv.dcn import DCNv3, DCNv4
from omniconv.layers.conv.deform import DeformConv2d


def sample(image, y, x):
    """Return the bilinear samples of maps (C, H, W) at one place, zero outside."""
    total = image.new_zeros(image.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total = total + (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return total


def aggregate(value, offset, mask, scale):
    """Return the public operator: offsets (H, W, G, 9, 2) as x, y; taps column by column."""
    y = torch.zeros_like(value)
    groups = offset.shape[2]
    for i in range(value.shape[1]):
        for j in range(value.shape[2]):
            for g, part in enumerate(value.chunk(groups)):
                total = 0
                for k in range(9):
                    dx, dy = k // 3 - 1, k % 3 - 1
                    at = offset[i, j, g, k].tolist()
                    place = i + scale * (dy + at[1]), j + scale * (dx + at[0])
                    total = total + mask[i, j, g, k] * sample(part, *place)
                rows = slice(g * len(part), (g + 1) * len(part))
                y[rows, i, j] = total
    return y


def shaken(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.double().eval()


@pytest.mark.parametrize("dw_kernel_size", [None, 3])
@torch.no_grad()
def test_dcnv4_reads_public_weights_as_the_public_operator_does(dw_kernel_size):
    torch.manual_seed(0)
    layer = shaken(DCNv4(6, 2, dw_kernel_size=dw_kernel_size, offset_scale=0.5))
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    seen = layer.offset_mask_dw(x)[0].permute(1, 2, 0)
    found = layer.offset_mask(seen)[..., : 2 * 27].unflatten(-1, (2, 27))
    value = layer.value_proj(x[0].permute(1, 2, 0)).permute(2, 0, 1)
    y = aggregate(value, found[..., :18].unflatten(-1, (9, 2)), found[..., 18:], 0.5)
    torch.testing.assert_close(layer(x)[0], layer.output_proj(y.permute(1, 2, 0)).permute(2, 0, 1))


@torch.no_grad()
def test_dcnv3_reads_public_weights_as_the_public_operator_does():
    torch.manual_seed(0)
    layer = shaken(DCNv3(6, 2, offset_scale=2.0))
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    seen = layer.dw_conv(x)[0].permute(1, 2, 0)
    mask = layer.mask(seen).unflatten(-1, (2, 9)).softmax(-1)
    value = layer.input_proj(x[0].permute(1, 2, 0)).permute(2, 0, 1)
    y = aggregate(value, layer.offset(seen).unflatten(-1, (2, 9, 2)), mask, 2.0)
    torch.testing.assert_close(layer(x)[0], layer.output_proj(y.permute(1, 2, 0)).permute(2, 0, 1))


def test_parameters_have_the_public_names():
    names = {name for name, _ in DCNv4(32, 2, dw_kernel_size=3).named_parameters()}
    layers = ("offset_mask_dw", "offset_mask", "value_proj", "output_proj")
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    layers = ("dw_conv.0", "dw_conv.1.1", "offset", "mask", "input_proj", "output_proj")
    names = {name for name, _ in DCNv3(32, 2).named_parameters()}
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert DCNv4(32, 2).offset_mask.out_features == 56


@pytest.mark.parametrize(("modulated", "share"), [(False, 1.0), (True, 0.5)])
def test_a_new_layer_is_an_ordinary_convolution(modulated, share):
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, stride=2, padding=1, groups=2, modulated=modulated, bias=False)
    x = torch.randn(2, 4, 9, 8)
    wanted = share * F.conv2d(x, layer.weight, stride=2, padding=1, groups=2)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_new_dcnv4_gives_its_bias_and_learns():
    layer = DCNv4(8, 2)
    y = layer(torch.randn(1, 8, 5, 5))
    assert torch.equal(y, torch.zeros_like(y))
    (y + 1).square().sum().backward()
    assert layer.offset_mask.weight.grad.abs().max() > 0

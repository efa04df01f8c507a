"""Kernels for every place against torch's depthwise convolution and a loop over places."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.reparam import reparameterize
from omniconv.layers.conv.tvconv import PositionConv2d, TVConv2d, translation_variant
from omniconv.models.factory import create_model


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2), (1, 3)])
def test_every_place_has_its_kernel(kernel, stride):
    torch.manual_seed(0)
    layer = PositionConv2d(2, (7, 8), kernel, stride=stride, bias=True).double()
    assert layer.bias is not None
    x = torch.randn(3, 2, 7, 8, dtype=torch.float64)
    y, p = layer(x), kernel // 2
    padded = F.pad(x, (p,) * 4)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            window = padded[:, :, stride * i : stride * i + kernel, stride * j : stride * j + kernel]
            expected = (window.flatten(2) * layer.weight[:, :, i, j]).sum(2) + layer.bias[:, i, j]
            torch.testing.assert_close(y[:, :, i, j], expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_equal_kernels_are_a_depthwise_convolution(stride):
    torch.manual_seed(0)
    layer = PositionConv2d(4, (9, 7), stride=stride)
    kernel = torch.randn(4, 1, 3, 3)
    layer.weight.data.copy_(kernel.view(4, 9, 1, 1).expand_as(layer.weight))
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, stride=stride, padding=1, groups=4))


def test_affinity_maps_start_as_ones_and_places_differ_once_they_do():
    torch.manual_seed(0)
    layer = TVConv2d(2, (12, 12))
    assert torch.equal(layer.posi_map, torch.ones(1, 4, 12, 12))
    # What is left of the generator's zero padding reaches three pixels inwards.
    inside = layer.maps()[0][:, :, 3:-3, 3:-3]
    torch.testing.assert_close(inside, inside[:, :, :1, :1].expand_as(inside))
    nn.init.normal_(layer.posi_map)
    assert layer.maps()[0][:, :, 3:-3, 3:-3].std((2, 3)).min() > 1e-3


def test_a_network_takes_it_for_its_depthwise_convolutions():
    torch.manual_seed(0)
    model = create_model("mobilenetv2_test", num_classes=5)
    x = torch.randn(2, 3, 32, 48)
    converted = translation_variant(model, x)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    layers = [m for m in converted.modules() if isinstance(m, TVConv2d)]
    assert len(layers) == len(depthwise) == 4
    assert layers[0].size == (16, 24)
    deployed = reparameterize(converted)
    assert not any(isinstance(m, TVConv2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(x), converted.eval()(x))

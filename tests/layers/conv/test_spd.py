"""Space-to-depth convolution against slices, strided convolutions and the networks that it is put into."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.spd import SPDConv2d, replace_strides
from omniconv.models.factory import create_model


def test_the_layer_convolves_the_sub_maps():
    torch.manual_seed(0)
    layer = SPDConv2d(2, 5, scale=3).double()
    x = torch.randn(2, 2, 12, 9, dtype=torch.float64)
    parts = [x[:, c : c + 1, r::3, q::3] for c in range(2) for r in range(3) for q in range(3)]
    torch.testing.assert_close(layer(x), F.conv2d(torch.cat(parts, 1), layer.weight, layer.bias, padding=1))


def test_the_layer_is_a_strided_convolution_with_a_larger_kernel():
    torch.manual_seed(0)
    layer = SPDConv2d(3, 4).double()
    x = torch.randn(2, 3, 10, 8, dtype=torch.float64)
    weight = torch.zeros(4, 3, 6, 6, dtype=torch.float64)
    for c in range(3):
        for r in range(2):
            for q in range(2):
                weight[:, c, r::2, q::2] = layer.weight.detach()[:, 4 * c + 2 * r + q]
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias, stride=2, padding=2))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [
        (3, 2, 1, 1),
        (7, 2, 3, 1),
        (1, 2, 0, 1),
        (2, 2, 0, 4),
        (4, 2, 1, 2),
        (4, 4, 0, 1),
        (11, 4, 5, 1),
        (5, 3, 1, 1),
    ],
)
def test_strided_convolutions_are_embedded_exactly(kernel, stride, padding, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, groups=groups).double()
    x = torch.randn(2, 4, 6 * stride, 5 * stride, dtype=torch.float64)
    layer = SPDConv2d.from_strided(conv)
    torch.testing.assert_close(layer(x), conv(x))
    if (kernel, stride) == (3, 2):
        x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
        torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": (2, 1)},
        {"stride": 2},
        {"stride": 2, "padding": (1, 0)},
        {"stride": 2, "padding": 2, "dilation": 2},
    ],
)
def test_other_convolutions_are_refused_by_name(options):
    model = nn.Sequential(nn.Conv2d(3, 3, 3, **options))
    with pytest.raises(
        ValueError, match=r"0: a strided convolution must be square, not dilated, and put out"
    ):
        replace_strides(model, torch.zeros(1, 3, 16, 16))


def test_a_network_computes_the_same_without_strides():
    torch.manual_seed(0)
    model = create_model("resnext_test", num_classes=5).eval()
    # Its maximum pool would change what it computes.
    model.set_submodule("maxpool", nn.AvgPool2d(2))
    x = torch.randn(2, 3, 64, 96)
    converted = replace_strides(model.train(), x)
    assert converted.training
    assert not any(getattr(m, "stride", (1, 1)) not in (1, (1, 1)) for m in converted.modules())
    torch.testing.assert_close(converted.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-4)


def test_maximum_pools_start_as_averages_and_global_pools_stay():
    pool, wide, stays = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(pool, nn.MaxPool2d(5, 1, 2), wide, stays)
    x = torch.randn(2, 3, 16, 12)
    converted = replace_strides(model, x)
    assert [type(m) for m in converted] == [SPDConv2d, nn.MaxPool2d, SPDConv2d, nn.AdaptiveAvgPool2d]
    torch.testing.assert_close(converted[0](x), F.avg_pool2d(x, 3, 2, 1))
    torch.testing.assert_close(converted[2](x), F.avg_pool2d(x, 2))

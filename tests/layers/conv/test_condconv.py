"""CondConv against the mixture of its experts' outputs, sample by sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.conv.condconv import CondConv2d, ExpertConv2d
from omniconv.models.image.mobilenetv2 import MobileNetV2Config, Stage


@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [
        ((3, 5), 3, {"stride": 2, "padding": 1}),
        ((4, 6), 3, {"dilation": 2, "padding": 2, "groups": 2}),
        ((4, 4), 5, {"groups": 4, "bias": False}),
        ((3, 7), 1, {}),
    ],
)
def test_the_layer_is_the_mixture_of_its_experts_outputs(channels, kernel, options):
    torch.manual_seed(0)
    layer = CondConv2d(channels[0], channels[1], kernel, experts=3, **options).double()
    x = torch.randn(4, channels[0], 9, 7, dtype=torch.float64)
    routing = torch.sigmoid(layer.routing_fn.weight @ x.mean((2, 3)).T + layer.routing_fn.bias[:, None]).T
    kernels = layer.conv.weight.view(3, channels[1], -1, kernel, kernel)
    bias = torch.zeros(3, channels[1], dtype=torch.float64) if layer.conv.bias is None else layer.conv.bias
    numbers = {name: value for name, value in options.items() if name != "bias"}
    for index in range(4):
        outputs = [F.conv2d(x[index], kernels[e], bias[e], **numbers) for e in range(3)]
        expected = sum(weight * y for weight, y in zip(routing[index], outputs, strict=True))
        torch.testing.assert_close(layer(x)[index], expected)


def test_one_expert_of_weight_one_is_an_ordinary_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    assert conv.bias is not None
    layer = ExpertConv2d.like(conv, 1)
    layer.load_state_dict({"weight": conv.weight.view(1, -1), "bias": conv.bias.view(1, -1)})
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(layer(x, torch.ones(2, 1)), conv(x))


def test_experts_start_with_about_one_half():
    torch.manual_seed(0)
    layer = CondConv2d(64, 8, 1, experts=8)
    routing = layer.routing_fn(torch.randn(32, 64, 6, 6)).detach()
    assert float((routing - 0.5).abs().max()) < 0.2


def test_a_stage_without_expansion_has_no_experts():
    with pytest.raises(ValueError, match="a stage with experts needs an expansion above 1"):
        MobileNetV2Config(stages=(Stage(1, 16, 1, 1, experts=2),))

"""FFNet: what it merges into, and the official names."""

import pytest
import torch
from torch import nn

from omniconv.models.factory import create_model
from omniconv.models.image.ffnet import OFFICIAL_NAMES, FFNetConfig, ResidualPointwise
from tests.models.image.names import assert_become_ours, batch_norm, layer


def test_a_shortcut_beside_a_norm_and_mixture_is_one_mixture():
    torch.manual_seed(0)
    module = ResidualPointwise(4).double().eval()
    for tensor in (module.norm.weight, module.norm.bias, module.norm.running_mean, module.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(module.merged()(x), module(x))


def test_deployed_the_only_norm_is_the_head():
    model = create_model("ffnet_test").deploy()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ["head.norm"]
    assert isinstance(model.stages[1].downsample[1], nn.Conv2d)


def _conv_bn(*names: str) -> list[str]:
    return [
        *layer(*(f"{name}.c" for name in names), bias=False),
        *batch_norm(*(f"{name}.bn" for name in names)),
    ]


def test_official_names():
    official = [*_conv_bn("patch_embed.0", "patch_embed.2"), *batch_norm("norm"), *layer("head")]
    # The second stage's first entry is its downsampling.
    official += _conv_bn("stages.1.0.proj.0.conv", "stages.1.0.proj.0.conv1", "stages.1.0.proj.1.conv")
    for block, large in (("stages.0.0", False), ("stages.1.1", True)):
        token, channel = f"{block}.token_mixer.0", f"{block}.channel_mixer"
        official += [f"{token}.layer_scale", f"{channel}.layer_scale"]
        official += layer(f"{channel}.main.fc1", f"{channel}.main.fc2")
        official += _conv_bn(f"{token}.main.fc", f"{channel}.main.conv.conv", f"{channel}.main.conv.conv1")
        for conv in (f"{token}.main.conv1", f"{token}.main.conv2"):
            official += _conv_bn(f"{conv}.conv", f"{conv}.conv1") if large else layer(conv)
    assert_become_ours(official, OFFICIAL_NAMES, create_model("ffnet_test", device="meta"))


def test_every_stage_needs_its_kernel_size():
    with pytest.raises(ValueError, match="depths and kernel_sizes must be equally long"):
        FFNetConfig(kernel_sizes=(3,))

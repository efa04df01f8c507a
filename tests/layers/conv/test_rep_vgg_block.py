"""RepVGG's block and the convolution that it merges into."""

import pytest
import torch
from torch import nn

from omniconv.layers.attention.se import SqueezeExcite
from omniconv.layers.conv.rep_vgg_block import RepVGGBlock


def disturb(module: nn.Module) -> nn.Module:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2)
            for tensor in (m.running_mean, m.weight, m.bias):
                nn.init.normal_(tensor, 0.5)
    return module.double().eval()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("out", "stride"), [(8, 1), (8, 2), (12, 1)])
@pytest.mark.parametrize("groups", [1, 4])
def test_merged_is_the_block(kernel_size, out, stride, groups):
    torch.manual_seed(0)
    block = disturb(RepVGGBlock(8, out, kernel_size=kernel_size, stride=stride, groups=groups))
    merged = block.merged()
    assert [type(m) for m in merged] == [nn.Conv2d, nn.ReLU]
    assert merged[0].kernel_size == (kernel_size, kernel_size)
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64)
    expected = block(x)
    assert (expected > 0).float().mean() > 0.1
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10)


def test_merged_keeps_the_gate_and_shares_nothing():
    torch.manual_seed(0)
    block = disturb(RepVGGBlock(8, 8, attn=SqueezeExcite(8, 2)))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    expected = block(x)
    merged = block.merged()
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    torch.testing.assert_close(block(x), expected)


def test_identity_branch_only_between_equal_shapes():
    assert RepVGGBlock(8, 8).identity is not None
    assert RepVGGBlock(8, 8, stride=2).identity is None
    assert RepVGGBlock(8, 12).identity is None


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd and positive: got 2"):
        RepVGGBlock(8, 8, kernel_size=2)

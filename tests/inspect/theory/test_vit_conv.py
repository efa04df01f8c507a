"""Attention that was made from a convolution against that convolution."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.inspect.theory.vit_conv import (
    TokenConv2d,
    attention_from_conv,
    bias_for_leak,
    conv_blocks,
    convs_to_attention,
    heads_needed,
)


@pytest.mark.parametrize(
    ("kernel", "patch", "heads"), [(3, 2, 9), (5, 2, 9), (7, 2, 25), (1, 4, 1), (3, 1, 9)]
)
@torch.no_grad()
def test_attention_computes_the_convolution(kernel, patch, heads):
    torch.manual_seed(kernel)
    conv = nn.Conv2d(2, 3, kernel, padding=kernel // 2).double()
    images = torch.randn(2, 2, 3 * patch, 4 * patch, dtype=torch.float64)
    attention = attention_from_conv(TokenConv2d(conv, patch), (3, 4), leak=1e-9)
    assert attention.num_heads == heads == heads_needed(kernel, patch)
    y = attention(F.pixel_unshuffle(images, patch).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    expected = F.conv2d(images, conv.weight, conv.bias, padding=kernel // 2)
    torch.testing.assert_close(F.pixel_shuffle(y, patch), expected, rtol=0, atol=1e-6)


def test_a_softmax_with_the_bias_leaks_as_much_as_is_allowed():
    scores = torch.zeros(40, dtype=torch.float64)
    scores[7] = bias_for_leak(40, 1e-3)
    assert math.isclose(1 - float(scores.softmax(0)[7]), 1e-3, rel_tol=1e-9)


def test_blocks_of_a_generic_kernel_are_independent():
    torch.manual_seed(0)
    blocks = conv_blocks(torch.randn(1, 1, 3, 3, dtype=torch.float64), 2)
    assert torch.linalg.matrix_rank(blocks.flatten(1)) == 9


@torch.no_grad()
def test_a_network_is_converted_as_a_whole():
    torch.manual_seed(0)
    model = nn.Sequential(TokenConv2d(nn.Conv2d(2, 2, 3, padding=1), 2), nn.GELU(), nn.Linear(8, 5)).double()
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    converted = convs_to_attention(model, (4, 5), leak=1e-9)
    torch.testing.assert_close(converted(x), model(x), rtol=0, atol=1e-6)
    assert isinstance(model[0], TokenConv2d)


@pytest.mark.parametrize(
    "kwargs", [{"kernel_size": 4}, {"kernel_size": 3}, {"kernel_size": 3, "padding": 1, "stride": 2}]
)
def test_other_convolutions_are_refused(kwargs):
    with pytest.raises(ValueError, match="must be dense, with an odd square kernel that keeps the size"):
        TokenConv2d(nn.Conv2d(2, 2, **kwargs), 2)

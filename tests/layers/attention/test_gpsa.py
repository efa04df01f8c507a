"""Gated positional attention against all pairs of tokens, and against the convolution that it starts as."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.attention.gpsa import GatedPositionalSelfAttention, attention_distance


def pairwise_attention(layer: GatedPositionalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """The paper's equation, one pair of tokens after another."""
    _, height, width, channels = x.shape
    heads = layer.num_heads
    d = channels // heads
    tokens = x.flatten(1, 2)
    qk = layer.qk(tokens)
    maps = torch.empty(len(x), heads, height * width, height * width, dtype=x.dtype)
    places = [(row, column) for row in range(height) for column in range(width)]
    for h in range(heads):
        q = qk[..., h * d : (h + 1) * d]
        k = qk[..., channels + h * d : channels + (h + 1) * d]
        scores = torch.empty(len(places), len(places), dtype=x.dtype)
        for i, (y, x_) in enumerate(places):
            for j, (y2, x2) in enumerate(places):
                r = torch.tensor([x2 - x_, y2 - y, (x2 - x_) ** 2 + (y2 - y) ** 2], dtype=x.dtype)
                scores[i, j] = layer.pos_proj.weight[h] @ r + layer.pos_proj.bias[h]
        gate = layer.gating_param[h].sigmoid()
        mixed = (1 - gate) * torch.softmax(q @ k.mT / math.sqrt(d), -1) + gate * torch.softmax(scores, -1)
        maps[:, h] = mixed / mixed.sum(-1, keepdim=True)
    return maps


def random_layer(dim: int, heads: int) -> GatedPositionalSelfAttention:
    torch.manual_seed(0)
    layer = GatedPositionalSelfAttention(dim, heads, qkv_bias=True).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


@torch.no_grad()
def test_two_small_softmaxes_are_the_one_over_all_pairs():
    layer = random_layer(8, 4)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    maps = pairwise_attention(layer, x)
    torch.testing.assert_close(layer.attention(x), maps)
    values = layer.v(x).flatten(1, 2).unflatten(-1, (4, 2)).transpose(1, 2)
    expected = layer.proj((maps @ values).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_nine_heads_start_as_a_convolution():
    layer = GatedPositionalSelfAttention(18, 9, locality_strength=60.0).double()
    nn.init.normal_(layer.v.weight)
    layer.gating_param.fill_(50.0)
    x = torch.randn(1, 6, 7, 18, dtype=torch.float64)
    kernel = torch.empty(18, 18, 3, 3, dtype=torch.float64)
    for head in range(9):
        mine = slice(2 * head, 2 * head + 2)
        kernel[:, :, head % 3, head // 3] = layer.proj.weight[:, mine] @ layer.v.weight[mine]
    expected = F.conv2d(x.permute(0, 3, 1, 2), kernel, layer.proj.bias)
    torch.testing.assert_close(layer(x)[:, 1:-1, 1:-1].permute(0, 3, 1, 2), expected)


def test_distance_of_maps_that_look_one_step_aside():
    aside = torch.roll(torch.eye(6), 1, 1)[
        None, None
    ]  # five tokens look one step to the right, the last one back
    assert math.isclose(float(attention_distance(aside, 1, 6)), (5 + 5) / 6, rel_tol=1e-6)

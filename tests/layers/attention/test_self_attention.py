"""Self-attention against torch's own module."""

import torch
from torch import nn

from omniconv.layers.attention.self_attention import SelfAttention, SelfAttention2d


@torch.no_grad()
def test_it_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    layer = SelfAttention(12, 3).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.copy_(layer.qkv.weight)
    theirs.in_proj_bias.copy_(layer.qkv.bias)
    theirs.out_proj.load_state_dict(layer.proj.state_dict())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.attention(x), weights)


@torch.no_grad()
def test_pixels_are_tokens():
    layer = SelfAttention2d(6, 2)
    x = torch.randn(2, 6, 3, 4)
    expected = SelfAttention.forward(layer, x.permute(0, 2, 3, 1).reshape(2, 12, 6))
    torch.testing.assert_close(layer(x).permute(0, 2, 3, 1).reshape(2, 12, 6), expected)


def test_a_layer_reads_its_widths_from_its_weights():
    layer = SelfAttention(12, 3)
    layer.qkv, layer.proj = nn.Linear(12, 3 * (2 * 2 + 5)), nn.Linear(15, 12)
    x = torch.randn(2, 7, 12)
    q, k, v = layer.heads(x)
    assert q.shape == k.shape == (2, 3, 7, 2)
    assert v.shape == (2, 3, 7, 5)
    rows = layer.qkv(x)
    assert k[1, 2, 3].equal(rows[1, 3, 6 + 4 : 6 + 6])
    assert v[1, 1, 4].equal(rows[1, 4, 12 + 5 : 12 + 10])

"""MetaMixer filled with the parts of attention and of feed-forward networks."""

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.layers.attention.metamixer import (
    FFNifiedAttention,
    MetaMixer,
    ProjectedKeys,
    ProjectedValues,
)


def test_softmax_and_projected_keys_and_values_make_multi_head_attention():
    torch.manual_seed(0)
    query = nn.Conv2d(12, 12, 1)
    mixer = MetaMixer(
        query, ProjectedKeys(12, 3), nn.Softmax(-1), ProjectedValues(12, 3), dynamic=True
    ).double()
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    parts = (query, mixer.keys.proj, mixer.values.proj)
    reference.in_proj_weight.data = torch.cat([part.weight[:, :, 0, 0] for part in parts])
    reference.in_proj_bias.data = torch.cat([part.bias for part in parts])
    reference.out_proj.weight.data = mixer.values.out.weight[:, :, 0, 0]
    reference.out_proj.bias.data = mixer.values.out.bias
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    expected = reference(tokens, tokens, tokens)[0].transpose(1, 2).view_as(x)
    torch.testing.assert_close(mixer(x), expected)


def test_pointwise_keys_and_values_make_a_feed_forward_network():
    torch.manual_seed(0)
    keys, values = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
    x = torch.randn(2, 4, 3, 5)
    hidden = F.gelu(F.linear(x.movedim(1, 3), keys.weight.flatten(1), keys.bias))
    expected = F.linear(hidden, values.weight.flatten(1), values.bias).movedim(3, 1)
    torch.testing.assert_close(MetaMixer(nn.Identity(), keys, nn.GELU(), values)(x), expected)


def test_ffnified_attention_is_two_depthwise_convolutions_around_gelu():
    torch.manual_seed(0)
    mixer = FFNifiedAttention(4, 3)
    x = torch.randn(3, 4, 6, 5)
    query = F.batch_norm(F.conv2d(x, mixer.query.conv.weight), None, None, training=True)
    y = F.gelu(F.conv2d(query, mixer.keys.weight, mixer.keys.bias, padding=1, groups=4))
    expected = F.conv2d(y, mixer.values.weight, mixer.values.bias, padding=1, groups=4)
    torch.testing.assert_close(mixer(x), expected)

"""Attention with clipped offsets and a margin of zeros, one pair of tokens after another."""

import torch
from torch import nn

from omniconv.layers.attention.patch_attention import PatchAttention


@torch.no_grad()
def test_attention_pair_by_pair():
    torch.manual_seed(0)
    layer = PatchAttention(4, 3, 2, head_dim=2, key_dim=5, reach=1).double()
    nn.init.normal_(layer.position)
    height, width = 4, 2
    x = torch.randn(1, height, width, 4, dtype=torch.float64)
    expected = torch.empty(1, height, width, 3, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            heads = []
            for h in range(2):
                query = layer.query.weight[5 * h : 5 * h + 5] @ x[0, i, j]
                scores, values = [], []
                for u in range(-1, height + 1):
                    for v in range(-1, width + 1):
                        inside = 0 <= u < height and 0 <= v < width
                        token = x[0, u, v] if inside else torch.zeros(4, dtype=torch.float64)
                        row, column = (max(-2, min(2, step)) + 2 for step in (u - i, v - j))
                        key = layer.key.weight[5 * h : 5 * h + 5] @ token
                        scores.append(query @ key / 5**0.5 + layer.position[h, row, column])
                        values.append(layer.value.weight[2 * h : 2 * h + 2] @ token)
                heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            expected[0, i, j] = layer.proj(torch.cat(heads))
    torch.testing.assert_close(layer(x), expected)

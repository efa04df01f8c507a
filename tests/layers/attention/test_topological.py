"""Topological attention against attention with the mask written out."""

import pytest
import torch
from torch.nn import functional as F

from omniconv.layers.attention.topological import TopologicalAttention
from omniconv.ops.tree_field.api import tree_field


def explicit(layer, x):
    """The layer's equation with the whole mask."""
    n, c = x.shape[1:]
    identity = torch.eye(n, dtype=x.dtype)
    distance = tree_field(identity, layer.tree, lambda z: z, method="dense")
    z = distance / sum(layer.size)
    mask = torch.exp(sum(a * z ** (t + 1) for t, a in enumerate(layer.mask)))
    q, k, v = (t.reshape(len(x), n, layer.num_heads, -1).transpose(1, 2) for t in layer.qkv(x).split(c, 2))
    scores = mask * ((F.elu(q) + 1) @ (F.elu(k) + 1).mT)
    return layer.proj((scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 9)])
def test_equals_attention_with_the_mask_written_out(size):
    torch.manual_seed(0)
    layer = TopologicalAttention(8, size, 2).double()
    with torch.no_grad():
        layer.mask.copy_(torch.tensor([-3.0, 2.0, -1.5]))
    x = torch.randn(2, size[0] * size[1], 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), explicit(layer, x))


def test_the_mask_adds_three_parameters_and_starts_as_none():
    layer = TopologicalAttention(8, (4, 3), 2).double()
    assert sum(p.numel() for p in layer.parameters()) == (8 * 24 + 24) + (8 * 8 + 8) + 3
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    q, k, v = (t.reshape(1, 12, 2, 4).transpose(1, 2) for t in layer.qkv(x).split(8, 2))
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    plain = layer.proj((scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(1, 12, 8))
    torch.testing.assert_close(layer(x), plain)


def test_distances_are_those_of_a_spanning_tree_of_the_grid():
    layer = TopologicalAttention(4, (5, 6), 1)
    distance = tree_field(torch.eye(30), layer.tree, lambda z: z, method="dense").round()
    rows, columns = torch.arange(30) // 6, torch.arange(30) % 6
    on_grid = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    assert (distance >= on_grid).all()
    assert int((distance == 1).sum()) == 2 * 29
    assert (on_grid[distance == 1] == 1).all()

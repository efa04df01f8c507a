"""Spatial-reduction attention against its sums."""

import math

import pytest
import torch

from omniconv.layers.attention.spatial_reduction import SpatialReductionAttention


@pytest.mark.parametrize("reduction", [1, 2])
@torch.no_grad()
def test_every_pixel_attends_to_all_patches(reduction):
    torch.manual_seed(0)
    layer = SpatialReductionAttention(6, 2, reduction).double()
    x = torch.randn(2, 6, 4, 6, dtype=torch.float64)
    tokens = x.flatten(2).mT
    patches = tokens
    if reduction > 1:
        rows = x.view(2, 6, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 24)
        patches = layer.norm(torch.nn.functional.linear(rows, layer.sr.weight.flatten(1), layer.sr.bias))
    q, (k, v) = layer.q(tokens), layer.kv(patches).split(6, 2)
    expected = torch.empty_like(q)
    for part in (slice(0, 3), slice(3, 6)):
        share = (q[..., part] @ k[..., part].mT / math.sqrt(3)).softmax(-1)
        expected[..., part] = share @ v[..., part]
    torch.testing.assert_close(layer(x).flatten(2).mT, layer.proj(expected))

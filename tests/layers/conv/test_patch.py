"""Patches against a matrix product."""

from typing import Any

import torch

from omniconv.layers.conv.patch import PatchConv2d


@torch.no_grad()
def test_every_patch_is_multiplied_by_one_matrix():
    layer: Any = PatchConv2d(2, 5, 3).double()
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    full = torch.zeros(2, 2, 9, 6, dtype=torch.float64)
    full[:, :, :7] = x
    patches = full.reshape(2, 2, 3, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(2, 3, 2, 18)
    expected = patches @ layer.weight.reshape(5, 18).T + layer.bias
    torch.testing.assert_close(layer(x), expected.permute(0, 3, 1, 2))

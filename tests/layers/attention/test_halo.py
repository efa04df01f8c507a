"""Halo attention against a query at a time."""

import math

import pytest
import torch
from torch import Tensor

from omniconv.layers.attention.halo import HaloAttention, halo_windows


def gathered(layer: HaloAttention, x: Tensor, step: int) -> Tensor:
    """Return the layer's output, computed for one query of one head after another."""
    heads, dim, block, halo, stride = (
        layer.num_heads, layer.head_dim, layer.block_size, layer.halo_size, layer.stride
    )  # fmt: skip
    _, _, height, width = x.shape
    weight_q, weight_kv = layer.q.weight[:, :, 0, 0], layer.kv.weight[:, :, 0, 0]
    per_head = len(weight_kv) // heads
    y = x.new_zeros(len(x), heads * (per_head - dim), -(-height // stride), -(-width // stride))
    for n in range(len(x)):
        for row in range(0, height, stride):
            for column in range(0, width, stride):
                top, left = row // block * block - halo, column // block * block - halo
                for head in range(heads):
                    q = weight_q[head * dim : (head + 1) * dim] @ x[n, :, row, column]
                    logits, values = [], []
                    for i in range(block + 2 * halo):
                        for j in range(block + 2 * halo):
                            inside = 0 <= top + i < height and 0 <= left + j < width
                            pixel = x[n, :, top + i, left + j] if inside else torch.zeros_like(x[n, :, 0, 0])
                            kv = weight_kv[head * per_head : (head + 1) * per_head] @ pixel
                            dy = i - row % block // stride * step + block + 2 * halo - 1
                            dx = j - column % block // stride * step + block + 2 * halo - 1
                            position = layer.pos_embed.height_rel[dy] + layer.pos_embed.width_rel[dx]
                            logits.append(q @ kv[:dim] / math.sqrt(dim) + q @ position)
                            values.append(kv[dim:])
                    share = torch.stack(logits).softmax(0)
                    part = slice(head * (per_head - dim), (head + 1) * (per_head - dim))
                    y[n, part, row // stride, column // stride] = share @ torch.stack(values)
    return y


@pytest.mark.parametrize(("stride", "query_step"), [(1, None), (2, None), (2, 1)])
@torch.no_grad()
def test_blocks_equal_a_query_at_a_time(stride, query_step):
    torch.manual_seed(0)
    layer = HaloAttention(
        4, 6, num_heads=2, head_dim=3, block_size=2, halo_size=1, stride=stride, query_step=query_step
    ).double()
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), gathered(layer, x, query_step or stride))


@torch.no_grad()
def test_a_stride_leaves_queries_out():
    torch.manual_seed(0)
    strided = HaloAttention(8, block_size=4, halo_size=2, stride=2)
    plain = HaloAttention(8, block_size=4, halo_size=2)
    plain.load_state_dict(strided.state_dict())
    x = torch.randn(2, 8, 12, 9)
    torch.testing.assert_close(strided(x), plain(x)[:, :, ::2, ::2])


@torch.no_grad()
def test_shifts_by_a_block_and_no_others_commute():
    torch.manual_seed(0)
    layer = HaloAttention(4, num_heads=1, block_size=4, halo_size=1).double()
    x = torch.zeros(1, 4, 20, 20, dtype=torch.float64)
    x[:, :, 6:12, 6:12] = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    moved = layer(x.roll((4, 4), (2, 3)))
    torch.testing.assert_close(moved, layer(x).roll((4, 4), (2, 3)))
    assert (layer(x.roll(1, 3)) - layer(x).roll(1, 3)).abs().max() > 1e-3


def test_windows_repeat_what_the_paper_says():
    x = torch.randn(2, 3, 32, 48)
    assert halo_windows(x, 8, 3).numel() / x.numel() == 196 / 64

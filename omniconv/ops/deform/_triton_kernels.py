"""Kernels over pairs of a pixel and a group, for Triton: a program takes some pairs and a block of channels.

Where a sample lies, and which share each of its four pixels has, is worked out once for all channels of the block, and
the pixels are read as vectors of channels. This is what makes `DCNv4 <https://arxiv.org/abs/2401.06197>`_ fast: a
group has few channels, and with one thread for each of them most of what is read would be offsets, again and again.

Arrays are pixel-major: x (N, H, W, G, D) with the D channels of each of G groups, offset (N, H', W', G, K, 2), mask
(N, H', W', G, K) or None, and output (N, H', W', T, G, D) with T = K rows a pixel where the taps are kept and one where
they are added up.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Four pixels a channel of a tile and their addresses must fit into the registers of a program's threads.
_TILE, _MOST = 1024, 128


@triton.jit
def _pairs(blocks, out_h, out_w, GROUPS: tl.constexpr, PAIRS: tl.constexpr):
    """Return the sample, and of each pair its index over all samples, group, row and column, and whether it exists."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pair = tl.program_id(0) % blocks * PAIRS + tl.arange(0, PAIRS)
    pixel = pair // GROUPS
    exists = pixel < out_h * out_w
    return n, n * (out_h * out_w * GROUPS) + pair, pair % GROUPS, pixel // out_w, pixel % out_w, exists


@triton.jit
def _between(
    index, k, offset, size, kernel: tl.constexpr, stride: tl.constexpr, padding: tl.constexpr, dilation: tl.constexpr,
    scale: tl.constexpr,
):  # fmt: skip
    """Return the pixel before the position of a tap along one axis, and the share of the pixel after it.

    What is no place on the map, or no number, must not become an address: it goes where no pixel is on the map.
    """
    middle: tl.constexpr = dilation * (kernel - 1) // 2
    position = index * stride + (middle - padding) + scale * (k * dilation - middle + offset)
    position = tl.where((position > -1) & (position < size), position, -2.0)
    low = tl.floor(position)
    return low.to(tl.int64), position - low


@triton.jit
def _corner(corner: tl.constexpr, low_y, low_x, part_y, part_x, height, width):
    """Return the shares of one of the four pixels along both axes, and whether it is on the map."""
    y, x = low_y + corner // 2, low_x + corner % 2
    share_y = part_y if corner // 2 else 1 - part_y
    share_x = part_x if corner % 2 else 1 - part_x
    return share_y, share_x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _sample(
    k, at, offset, mask, row, column, exists, height, width, kernel: tl.constexpr, stride: tl.constexpr,
    padding: tl.constexpr, dilation: tl.constexpr, scale: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Return where tap k of each pair lies along both axes, as `_between` does, and its mask."""
    move_y = tl.load(offset + 2 * at, mask=exists, other=0).to(WIDE)
    move_x = tl.load(offset + 2 * at + 1, mask=exists, other=0).to(WIDE)
    low_y, part_y = _between(
        row, k // kernel[1], move_y, height, kernel[0], stride[0], padding[0], dilation[0], scale
    )
    low_x, part_x = _between(
        column, k % kernel[1], move_x, width, kernel[1], stride[1], padding[1], dilation[1], scale
    )
    weight = tl.full((PAIRS,), 1, WIDE)
    if mask is not None:
        weight = tl.load(mask + at, mask=exists, other=0).to(WIDE)
    return low_y, part_y, low_x, part_x, weight


@triton.jit
def _forward(
    x, offset, mask, y, blocks, height, width, out_h, out_w,
    kernel: tl.constexpr, stride: tl.constexpr, padding: tl.constexpr, dilation: tl.constexpr, scale: tl.constexpr,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the samples of some pairs, or their sum over the taps, for a block of channels."""
    n, pair, group, row, column, exists = _pairs(blocks, out_h, out_w, GROUPS, PAIRS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    fits = exists[:, None] & (channel < DEPTH)
    out = y + ((pair - group) * ROWS + group)[:, None] * DEPTH + channel
    total = tl.full((PAIRS, CHANNELS), 0, WIDE)
    for k in range(kernel[0] * kernel[1]):
        low_y, part_y, low_x, part_x, weight = _sample(
            k, pair * (kernel[0] * kernel[1]) + k, offset, mask, row, column, exists, height, width,
            kernel, stride, padding, dilation, scale, WIDE, PAIRS,
        )  # fmt: skip
        first = ((n * height + low_y) * width + low_x) * GROUPS + group
        for corner in tl.static_range(4):
            share_y, share_x, on_map = _corner(corner, low_y, low_x, part_y, part_x, height, width)
            where = (first + (corner // 2 * width + corner % 2) * GROUPS)[:, None] * DEPTH + channel
            value = tl.load(x + where, mask=fits & on_map[:, None], other=0).to(WIDE)
            total += (weight * share_y * share_x)[:, None] * value
        if ROWS > 1:
            tl.store(out + k * (GROUPS * DEPTH), total, mask=fits)
            total = tl.full((PAIRS, CHANNELS), 0, WIDE)
    if ROWS == 1:
        tl.store(out, total, mask=fits)


@triton.jit
def _backward(
    grad, x, offset, mask, of_x, of_offset, of_mask, blocks, height, width, out_h, out_w,
    kernel: tl.constexpr, stride: tl.constexpr, padding: tl.constexpr, dilation: tl.constexpr, scale: tl.constexpr,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of offset and mask of some pairs, and add what they give to that of x.

    A tap with mask m has of each of its four pixels the shares a along rows and b along columns. Where c is the product
    of pixel and output gradient, summed over the channels, the pixel gives m a b times the output gradient to x, a b c
    to the mask and, with a sign that says on which side it lies, m b c and m a c times the scale to the offsets.
    """
    n, pair, group, row, column, exists = _pairs(blocks, out_h, out_w, GROUPS, PAIRS)
    for k in range(kernel[0] * kernel[1]):
        at = pair * (kernel[0] * kernel[1]) + k
        low_y, part_y, low_x, part_x, weight = _sample(
            k, at, offset, mask, row, column, exists, height, width,
            kernel, stride, padding, dilation, scale, WIDE, PAIRS,
        )  # fmt: skip
        first = ((n * height + low_y) * width + low_x) * GROUPS + group
        source = (pair - group) * ROWS + k % ROWS * GROUPS + group
        to_weight = tl.full((PAIRS,), 0, WIDE)
        to_y = tl.full((PAIRS,), 0, WIDE)
        to_x = tl.full((PAIRS,), 0, WIDE)
        for begin in range(0, DEPTH, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)[None, :]
            fits = exists[:, None] & (channel < DEPTH)
            above = tl.load(grad + source[:, None] * DEPTH + channel, mask=fits, other=0).to(WIDE)
            for corner in tl.static_range(4):
                share_y, share_x, on_map = _corner(corner, low_y, low_x, part_y, part_x, height, width)
                where = (first + (corner // 2 * width + corner % 2) * GROUPS)[:, None] * DEPTH + channel
                here = fits & on_map[:, None]
                product = tl.sum(above * tl.load(x + where, mask=here, other=0).to(WIDE), 1)
                to_weight += share_y * share_x * product
                to_y += (corner // 2 * 2 - 1) * share_x * product
                to_x += (corner % 2 * 2 - 1) * share_y * product
                tl.atomic_add(
                    of_x + where, (weight * share_y * share_x)[:, None] * above, here, sem="relaxed"
                )
        tl.store(of_offset + 2 * at, scale * weight * to_y, mask=exists)
        tl.store(of_offset + 2 * at + 1, scale * weight * to_x, mask=exists)
        if mask is not None:
            tl.store(of_mask + at, to_weight, mask=exists)


def forward(x: Tensor, offset: Tensor, mask: Tensor | None, y: Tensor, *geometry: Any) -> None:
    """Write the samples, or their sums, to y; `geometry` is kernel, stride, padding, dilation and scale."""
    grid, sizes, constants = _plan(x, offset, y, geometry)
    _forward[grid](x, offset, mask, y, *sizes, **constants)


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, of_x: Tensor, of_offset: Tensor, of_mask: Tensor,
    *geometry: Any,
) -> None:  # fmt: skip
    """Write the gradients of offset and mask, and add that of x to what is there."""
    grid, sizes, constants = _plan(x, offset, grad, geometry)
    _backward[grid[:1]](grad, x, offset, mask, of_x, of_offset, of_mask, *sizes, **constants)


def _plan(
    x: Tensor, offset: Tensor, y: Tensor, geometry: Sequence[Any]
) -> tuple[tuple[int, int], list[Any], dict[str, Any]]:
    """Return the numbers of programs, for pairs and for channels, and the kernels' sizes and constants."""
    n, out_h, out_w, groups = offset.shape[:4]
    depth = x.shape[3] // groups
    channels = min(1 << (depth - 1).bit_length(), _MOST)
    pairs = min(_TILE // channels, _MOST)
    blocks = -(-out_h * out_w * groups // pairs)
    kernel, stride, padding, dilation = map(tuple, geometry[:4])
    constants = {
        "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "scale": geometry[4],
        "GROUPS": groups, "DEPTH": depth, "ROWS": y.shape[3], "PAIRS": pairs, "CHANNELS": channels,
        "WIDE": tl.float64 if torch.float64 in (x.dtype, offset.dtype) else tl.float32,
    }  # fmt: skip
    return (n * blocks, -(-depth // channels)), [blocks, *x.shape[1:3], out_h, out_w], constants

"""Convolution of the lowered map of `omniconv.ops.im2win`, whose windows are overlapping slices of memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops._numba import spread
from omniconv.ops.conv._compiled import incapable, register
from omniconv.ops.conv._torch import output_size, products
from omniconv.ops.im2win import im2win
from omniconv.ops.memory_format import memory_format


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    from omniconv.ops._simd import lanes
    from omniconv.ops.conv._im2win_kernels import convolve
    from omniconv.ops.conv._registers import make_sums

    form = memory_format(x)
    out, channels, height, _ = weight.shape
    lowered, step = im2win(x, height, stride=stride[0], padding=padding), height * stride[1]
    # Output channels fill whole vectors.
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -out % lanes(x.dtype)))
    # The kernels in the order of a window, output channels innermost.
    if form == torch.channels_last:
        # A window and its channels are one slice.
        lowered, step = lowered.permute(0, 2, 3, 1).flatten(2).unsqueeze(1), step * channels
        taps = weight.permute(3, 2, 1, 0).flatten(0, 2).unsqueeze(0)
    else:
        taps = weight.permute(1, 3, 2, 0).flatten(1, 2)
    y = x.new_empty(x.shape[0], *output_size(x, weight, stride, padding, dilation), len(weight))
    # As many windows at a time as share a row evenly; more than twelve would not fit into the registers.
    count = math.ceil(y.shape[2] / math.ceil(y.shape[2] / 12))
    least = 1 + 100_000 // (1 + weight.numel() * y.shape[2])
    spread(
        convolve, y.shape[0] * y.shape[1], lowered.contiguous(), taps.contiguous(), y, step,
        make_sums(x.dtype, count, "a").address, count, least=least,
    )  # fmt: skip
    y = y[..., :out]
    if bias is not None:
        y += bias
    return y.permute(0, 3, 1, 2).contiguous(memory_format=form)


run = register("im2win_conv", _compute)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> str | None:
    """Return None, or why the call cannot be computed here."""
    if x.ndim != 4 or groups > 1 or max(dilation) > 1:
        return (
            f"it is for two axes, one group and dilation 1, not {x.ndim - 2}, {groups} and {tuple(dilation)}"
        )
    return incapable(x, weight)


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> float:
    """Return about how many seconds the call takes: vectors run over output channels, and the lowering takes time."""
    rate = 1.2e10 * min(1, weight.shape[0] / 16)
    lowered = x.numel() * weight.shape[2] / stride[0]
    return 2.5e-4 + 1e-9 * lowered + products(x, weight, stride, padding, dilation) / rate

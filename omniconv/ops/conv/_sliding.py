"""Convolution as sums over a sliding window, from `Accelerating Machine Learning Primitives on Commodity Hardware
<https://arxiv.org/abs/2310.05218>`_.

A vector of neighbouring outputs is the sum over taps of a vector of neighbouring pixels, which moves on by one pixel
with every tap, times one weight; several such vectors stay in registers over all taps and channels. Nothing is
lowered: beyond the padded map it takes no memory.
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from omniconv.ops._numba import spread
from omniconv.ops.conv._compiled import incapable, register
from omniconv.ops.conv._torch import output_size, products
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
    from omniconv.ops.conv._registers import make_sums
    from omniconv.ops.conv._sliding_kernels import convolve

    height, width = output_size(x, weight, stride, padding, dilation)
    # Rows are at least a vector long.
    wide = max(width, lanes(x.dtype))
    sides = (padding[1], padding[1] + wide - width, padding[0], padding[0])
    padded = F.pad(x, sides) if any(sides) else x
    y = x.new_empty(x.shape[0], weight.shape[0], height, wide)
    count = _vectors(wide, lanes(x.dtype))
    # A thread is worth its while from some hundred thousand multiplications on.
    least = 1 + 100_000 // (1 + wide * weight[0].numel())
    spread(
        convolve, math.prod(y.shape[:3]), padded.contiguous(), weight.contiguous(), y, *dilation,
        groups, make_sums(x.dtype, count, "b").address, count, least=least,
    )  # fmt: skip
    if bias is not None:
        y += bias[:, None, None]
    return y[..., :width].contiguous(memory_format=memory_format(x))


def _vectors(width: int, lanes: int) -> int:
    """Return how many vectors of outputs to compute at a time: up to eight, where few outputs come twice."""
    whole = range(1, min(8, width // lanes) + 1)
    return min(whole, key=lambda count: (math.ceil(width / (count * lanes)) * (count + 1), -count))


_convolve = register("sliding_conv", _compute)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    """Compute with the sliding window."""
    if x.ndim == 3:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        return _convolve(x, weight, bias, [1, 1], [0, *padding], [1, *dilation], groups).squeeze(2)
    return _convolve(x, weight, bias, stride, padding, dilation, groups)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> str | None:
    """Return None, or why the call cannot be computed here."""
    if max(stride) > 1:
        return f"a window that slides moves by one, not {tuple(stride)}"
    return incapable(x, weight)


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> float:
    """Return about how many seconds the call takes; infinite for channels-last maps, which it would have to turn."""
    if x.shape[1] > 1 and not x.is_contiguous():
        return math.inf
    return 1.5e-4 + products(x, weight, stride, padding, dilation) / 2e10

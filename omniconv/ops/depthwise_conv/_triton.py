"""Triton's kernels, for CUDA: sums tap by tap where rows of taps are short, products of matrices where they are long.

Both sums of `_sums.py`, of which derivatives of every order are made, are computed in two ways. *Directly*, a program
holds a block of pixels of some channels and goes through the taps: it loads the pixels that a tap meets, neighbours
side by side, and adds them times the tap. For the gradient of the weight it holds a block of taps as well and goes
through the samples. So every multiplication loads a pixel.

*As products of matrices*, which tensor cores compute, one pixel serves B multiplications. The rows of all maps of a
channel are cut into segments of B columns. To a block of segments s, a row u of k taps adds

    Y[s, j] += sum over a of  X_u[s, a] T_u[a, j],        T_u[a, j] = w[u, a - j], and 0 where there is no such tap.

X_u[s] is the window of B + k - 1 pixels that this row meets, wherever the segment lies and in whatever sample, and T_u
is a band that is read from the taps. Columns of a segment lie `dilation` apart, so that windows have no holes. The
gradient of the weight multiplies windows with gradients G of the segments; taps are sums over diagonals:

    dw[u, v] = sum over j of  P_u[j + v, j],              P_u[a, j] = sum over s of  X_u[s, a] G[s, j].

Programs that share a sum write partial ones, which are added in the same order every time. Maps are read and written
where they lie, by their strides. Nothing was measured on a GPU yet, so `auto` takes these kernels where `omniconv.tune`
found them to be the fastest, and nowhere else.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omniconv.ops._triton import interpreted, unsupported
from omniconv.ops.depthwise_conv._sums import differentiable, empty_map, output_size
from omniconv.ops.dispatch import transformed

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# From so many taps a row on, matrices are multiplied. 9 of the 24 rows of a band for 16 columns are filled then, and
# tensor cores multiply more than ten times as fast as other ones do.
_LONG = 9
# Sums of a program: four for each of its 128 threads, or sixteen where there is little else to hold.
_SUMS, _WEIGHT_SUMS = 512, 2048
# Most channels, taps and segments of a program, and bytes of a window that it multiplies at once.
_CHANNELS, _TAPS, _SEGMENTS, _WINDOW = 32, 64, 64, 64
# Pixels of a channel in all samples are counted in 32 bits, and the output may have more of them.
_PIXELS = 1 << 30
# Programs that sum up the gradient of a weight, about: several for each multiprocessor of the largest GPUs.
_PROGRAMS = 2048


class _Layout:
    """The three axes of a call in the order in which kernels run over them: rows of taps lie along the last one."""

    def __init__(
        self,
        x: Tensor,
        out: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        gap: Sequence[int],
    ) -> None:
        axes = range(len(kernel))
        long = [a for a in axes if kernel[a] >= _LONG and stride[a] == gap[a] == 1]
        self.matrices = bool(long) and x.dtype != torch.float64
        last = max(long, key=lambda a: (kernel[a], a)) if self.matrices else axes[-1]
        missing: list[int | None] = [None] * (3 - len(axes))
        self.order = missing + sorted(axes, key=lambda a: a == last)
        self.out, self.kernel = self.sort(out), self.sort(kernel)
        self.pixels = math.prod(out)
        # What all kernels are told: numbers that may change from call to call, and those that are compiled in.
        self.sizes = self.sort(x.shape[2:]), self.out, self.sort(padding, missing=0)
        self.steps = self.kernel, self.sort(stride), self.sort(dilation), self.sort(gap)
        columns = _ceil(out[last], dilation[last])
        self.columns = _block(columns, 16, 32)
        self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.segments = self.out[0] * self.out[1] * _ceil(columns, self.columns) * dilation[last]

    def sort(self, values: Sequence[int], missing: int = 1) -> tuple[int, ...]:
        """Return one number an axis, in the kernels' order."""
        return tuple(missing if axis is None else values[axis] for axis in self.order)

    def strides(self, t: Tensor) -> tuple[int, ...]:
        """Return the five strides of a map."""
        return *t.stride()[:2], *self.sort(t.stride()[2:])


def _kernels() -> Any:
    from omniconv.ops.depthwise_conv import _triton_kernels

    return _triton_kernels


def _ceil(size: int, each: int) -> int:
    return -(-size // each)


def _block(size: int, least: int, most: int) -> int:
    """Return the power of two that holds `size`, within limits."""
    return min(most, max(least, 1 << (size - 1).bit_length()))


def _group(x: Tensor, channels: int, pixels: int, sums: int) -> int:
    """Return how many channels a program takes: those that lie side by side, or what small maps leave room for."""
    return _block(channels, 1, _CHANNELS if x.stride(1) == 1 else sums // _block(pixels, 1, sums))


def _run_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    gap: Sequence[int],
    flip: bool,
) -> Tensor:
    kernels = _kernels()
    if x.dtype == torch.bfloat16 and interpreted():
        # The interpreter multiplies no matrices of bfloat16, and rounds to it towards zero.
        bias = bias if bias is None else bias.float()
        args = size, stride, padding, dilation, gap, flip
        return _run_convolve(x.float(), weight.float(), bias, *args).to(x.dtype)
    samples, channels = x.shape[0], size[0]
    y = empty_map(x, (samples, *size))
    if y.numel() == 0:
        return y
    layout = _Layout(x, size[1:], weight.shape[2:], stride, padding, dilation, gap)
    first, taps = 0, layout.strides(weight.transpose(0, 1))
    if flip:
        # A flipped kernel is read from its last tap on backwards.
        first = sum((k - 1) * step for k, step in zip(layout.kernel, taps[2:], strict=True))
        taps = (*taps[:2], *(-step for step in taps[2:]))
    if layout.matrices:
        rows = samples * layout.segments
        block = _block(rows, 16, _SEGMENTS)
        programs = channels * _ceil(rows, block)
        depth = _WINDOW // x.element_size()
        kernel, blocks = kernels.matrix_convolve, (layout.precision, block, layout.columns, depth)
    else:
        pixels = samples * layout.pixels
        group = _group(y, channels, pixels, _SUMS)
        block = _block(pixels, 1, _SUMS // group)
        programs = _ceil(channels, group) * _ceil(pixels, block)
        kernel, blocks = kernels.direct_convolve, (block, group)
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            x, weight, bias if bias is None else bias.contiguous(), y, samples, channels, *layout.sizes,
            layout.strides(x), layout.strides(y), taps, first, *layout.steps,
            weight.shape[0] // x.shape[1], weight.shape[0] // channels, *blocks,
        )  # fmt: skip
    return y


def _run_weight(
    x: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    gap: Sequence[int],
) -> Tensor:
    kernels = _kernels()
    if x.dtype == torch.bfloat16 and interpreted():
        return _run_weight(x.float(), grad.float(), kernel, stride, padding, dilation, gap).to(x.dtype)
    samples, channels = x.shape[0], max(x.shape[1], grad.shape[1])
    if grad.numel() == 0:
        return x.new_zeros((channels, 1, *kernel))
    layout = _Layout(x, grad.shape[2:], kernel, stride, padding, dilation, gap)
    *rows, taps = layout.kernel
    if layout.matrices:
        depth = _block(layout.columns + taps - 1, 32, 64)
        block = _block(layout.segments, 16, _SEGMENTS)
        programs = channels * math.prod(rows) * _ceil(taps, depth - layout.columns + 1)
        cuts = _ceil(layout.segments, block)
        function, blocks = kernels.matrix_weight, (layout.precision, block, layout.columns, depth)
    else:
        taps = _block(math.prod(kernel), 1, _TAPS)
        group = _group(x, channels, layout.pixels, _WEIGHT_SUMS // taps)
        block = _block(layout.pixels, 1, _WEIGHT_SUMS // (taps * group))
        programs = _ceil(channels, group) * _ceil(math.prod(kernel), taps)
        cuts = _ceil(layout.pixels, block)
        function, blocks = kernels.direct_weight, (block, taps, group)
    # Pixels and samples are shared out only as far as it takes to have enough programs.
    cuts = min(cuts, _ceil(_PROGRAMS, programs))
    shares = min(samples, _ceil(_PROGRAMS, programs * cuts))
    summed = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = x.new_empty((cuts * shares, channels, *kernel), dtype=summed)
    with torch.cuda.device_of(x):
        function[(programs, cuts, shares)](
            x, grad, parts, samples, channels, *layout.sizes,
            layout.strides(x), layout.strides(grad), layout.strides(parts), *layout.steps,
            channels // x.shape[1], channels // grad.shape[1], *blocks,
        )  # fmt: skip
    return parts.sum(0).to(x.dtype).unsqueeze(1)


_convolve, _ = differentiable("triton", _run_convolve, _run_weight)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute with Triton's kernels."""
    size = output_size(x, weight, stride, padding, dilation)
    once = [1] * len(size)
    return _convolve(x, weight, bias, [weight.shape[0], *size], stride, padding, dilation, once, False)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> str | None:
    """Return None, or why the call cannot be computed here."""
    if reason := unsupported(x, weight):
        return reason
    if transformed():
        return "it knows no torch.func transform and no forward-mode gradient"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"maps and kernels must be of one floating type, not {x.dtype} and {weight.dtype}"
    if x.numel() // x.shape[1] >= _PIXELS:
        return f"it is for fewer than {_PIXELS} pixels a channel, not {x.numel() // x.shape[1]}"
    return None


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> float:
    """Return infinity: nothing was measured on a GPU yet, so `auto` relies on what `omniconv.tune` measures there."""
    return math.inf

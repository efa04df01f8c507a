"""Direct loops over vectors of channels, for CPUs: any number of axes, stride, dilation, padding and type."""

import math
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from omniconv.ops.depthwise_conv._layout import Layout, register_width, thread_count
from omniconv.ops.depthwise_conv._sums import (
    differentiable,
    empty_map,
    output_size,
    repeat_channels,
    repeating_seconds,
)
from omniconv.ops.dispatch import needs_grad, transformed

_HAS_NUMBA = find_spec("numba") is not None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A map in a buffer should stay in the second cache of a core.
_BUFFER_BYTES = 1 << 20
# More sums would not fit into 32 registers beside the operands; fewer wait for one another.
_MOST_SUMS = 14


class _Layout(Layout):
    """Axes of pixels, outputs, taps, stride, padding, dilation and gap; registers run along the last one."""

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
        values = (x.shape[2:], out, kernel, stride, padding, dilation, gap)
        super().__init__(values, missing=(1, 1, 1, 1, 0, 1, 1))
        self.cut(_BUFFER_BYTES)

    def reach(self, axis: int) -> float:
        _, _, kernel, stride, _, dilation, _ = self.axes[axis]
        return ((kernel - 1) * dilation + 1) / stride

    def tile_bytes(self) -> int:
        """Return the bytes of the largest box that a tile reads, rows padded."""
        extents = [
            (self.outs(axis) - 1) * stride + (kernel - 1) * dilation + 1
            for axis, (_, _, kernel, stride, _, dilation, _) in enumerate(self.axes)
        ]
        rows = [min(self.axes[axis][0], extents[axis] // self.axes[axis][6] + 2) for axis in (0, 1)]
        return 64 * rows[0] * rows[1] * extents[2]

    def scratch(self) -> int:
        """Return the bytes of scratch memory that a thread needs."""
        row = self.outs(2) + 1
        return self.tile_bytes() + 64 * (max(self.outs(0) * self.outs(1) * self.outs(2), 16 * row) + row)


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
    from omniconv.ops._simd import VECTOR, accumulate, lanes, run_parallel
    from omniconv.ops.depthwise_conv._direct_kernels import convolve_kernel
    from omniconv.ops.depthwise_conv._packing import weight_packing

    n, channels = x.shape[:2]
    layout = _Layout(x, size[1:], weight.shape[2:], stride, padding, dilation, gap)
    y = empty_map(x, (n, *size))
    if y.numel() == 0:
        return y
    width = lanes(x.dtype)
    taps, blocks = math.prod(weight.shape[2:]), math.ceil(channels / width)
    computed = torch.float64 if width == 8 else torch.float32
    packed = torch.empty((blocks * (taps + 1), width), dtype=computed)
    start = packed.data_ptr() + blocks * taps * VECTOR
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    weight_packing(x.dtype)[0](
        packed.data_ptr(), layout.axes[2][2], start, channels, weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), flip, *layout.taps(weight),
    )  # fmt: skip
    last = layout.axes[2]
    size2, _, kernel2, stride2, padding2, dilation2, gap2 = last
    met = (padding2, (size2 - 1) * gap2 + padding2, stride2, dilation2)
    count = register_width(last[1] // layout.tiles[2], kernel2, _MOST_SUMS, met)
    loops = accumulate(computed, count, last[3] * VECTOR, keep=False)
    threads = thread_count(y.numel() * taps)
    scratch = torch.empty(threads * layout.scratch(), dtype=torch.uint8)
    table = [
        threads, scratch.data_ptr(), layout.scratch(), n, channels, 1,
        x.data_ptr(), *layout.strides(x), y.data_ptr(), *layout.strides(y),
        packed.data_ptr(), start, loops.address, count, *layout.fields(),
    ]  # fmt: skip
    run_parallel(convolve_kernel(x.dtype), table, threads)
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
    from omniconv.ops._simd import VECTOR, accumulate, lanes, run_parallel
    from omniconv.ops.depthwise_conv._direct_kernels import weight_kernel
    from omniconv.ops.depthwise_conv._packing import weight_packing

    n, channels = x.shape[:2]
    width = lanes(x.dtype)
    layout = _Layout(x, grad.shape[2:], kernel, stride, padding, dilation, gap)
    last = layout.axes[2]
    size2, out2, real, stride2, padding2, dilation2, gap2 = last
    met = (padding2, (size2 - 1) * gap2 + padding2, dilation2, stride2)
    count = register_width(real, out2, _MOST_SUMS - 2, met)
    last[2] = math.ceil(real / count) * count
    blocks = math.ceil(channels / width)
    threads = thread_count(grad.numel() * math.prod(kernel)) if grad.numel() else 1
    # Few blocks are cut along the samples too; the number of parts depends on nothing but sizes and threads, so
    # that the sums are the same bit for bit every time.
    parts = max(1, min(n * math.prod(layout.tiles), threads if blocks % threads else 1))
    shape = [parts, blocks, layout.axes[0][2], layout.axes[1][2], last[2], width]
    sums = torch.empty(shape, dtype=torch.float64 if width == 8 else torch.float32)
    loops = accumulate(sums.dtype, count, last[5] * VECTOR, keep=True)
    scratch = torch.empty(threads * layout.scratch(), dtype=torch.uint8)
    table = [
        threads, scratch.data_ptr(), layout.scratch(), n, channels, parts,
        x.data_ptr(), *layout.strides(x), grad.data_ptr(), *layout.strides(grad),
        sums.data_ptr(), 0, loops.address, count, *layout.fields(),
    ]  # fmt: skip
    run_parallel(weight_kernel(x.dtype), table, threads)
    found = x.new_empty((channels, 1, *kernel))
    *sizes, _ = layout.taps(found)
    weight_packing(x.dtype)[1](sums.data_ptr(), parts, last[2], channels, found.data_ptr(), *sizes, real)
    return found


_convolve, weight_gradient = differentiable("direct", _run_convolve, _run_weight, "cpu")


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute with the direct kernels."""
    x = repeat_channels(x, weight.shape[0] // x.shape[1])
    size = output_size(x, weight, stride, padding, dilation)
    once = [1] * len(size)
    return _convolve(x, weight, bias, [x.shape[1], *size], stride, padding, dilation, once, False)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> str | None:
    """Return None, or why the call cannot be computed here."""
    if not _HAS_NUMBA:
        return "numba is not installed (pip install 'omniconv[fast]')"
    if x.device.type != "cpu":
        return f"it is for CPUs, not {x.device.type}"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"maps and kernels must be of one floating type, not {x.dtype} and {weight.dtype}"
    if transformed():
        return "it knows no torch.func transform and no forward-mode gradient"
    return None


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> float:
    """Return about how many seconds the call takes: overhead, maps, rows, and the taps that meet the map."""
    outputs = taps = rows = 1
    longest = 0
    for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        out = (size + 2 * p - d * (k - 1) - 1) // s + 1
        # Taps on the padding are left out; symbolic sizes are spared the arithmetic.
        met = k if torch.compiler.is_compiling() else max(1, k - p * (p + d) // (s * d * max(1, out)))
        # Registers run along the axis with the longest kernel, rows along the others.
        if k < longest:
            rows = rows * out * met
        else:
            rows, longest = outputs * taps, k
        outputs, taps = outputs * out, taps * met
    planes = x.shape[0] * weight.shape[0]
    # Rows that lie across the memory's are slower to turn.
    copied = 1.8e-10 if weight.shape[-1] == longest else 3e-10
    once = 7e-5 + copied * (x.numel() + planes * outputs) + planes * (outputs * taps / 8e10 + 1.4e-9 * rows)
    if (multiplier := weight.shape[0] // x.shape[1]) > 1:
        once += repeating_seconds(x, multiplier)
    return 3 * once if needs_grad(x, weight) else once

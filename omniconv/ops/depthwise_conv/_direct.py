"""Direct loops over vectors of channels, for CPUs: any number of axes, stride, dilation, padding and type."""

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from omniconv.ops.depthwise_conv._sums import differentiable, empty_map, output_size, repeat_channels
from omniconv.ops.dispatch import needs_grad, transformed
from omniconv.ops.memory_format import memory_format

_HAS_NUMBA = find_spec("numba") is not None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A map in a buffer should stay in the second cache of a core.
_BUFFER_BYTES = 1 << 20
# More sums would not fit into 32 registers beside the operands; fewer wait for one another.
_MOST_SUMS = 14
# Below this many multiplications a second thread costs more than it does.
_WORTH_A_THREAD = 100_000


# What a vector that the registers take up or give back costs, in multiplications, and what calling the loops does.
_HANDING, _CALLING = 2, 15


@lru_cache(4096)
def register_width(length: int, starts: int, most: int, met: tuple[int, int, int, int]) -> int:
    """Return how many neighbouring sums the registers should hold.

    The more there are, the rarer is the operand that they share, but the more of them wait while the first or the last
    of them alone meets the map. Sums i have met what lies from (low - i step) to (high - i step), rounded inwards to
    `each`, and at most `starts`.
    """
    low, high, step, each = met
    best, least = 1, math.inf
    for count in range(1, min(most, length) + 1):
        parts = math.ceil(length / count)
        work = 0
        for part in range(parts):
            first = part * count
            begin = max(0, math.ceil((low - (first + count - 1) * step) / each))
            end = min(starts, (high - first * step) // each + 1)
            # A sum waits four multiplications for itself.
            work += max(0, end - begin) * max(count + 1, 4) + _HANDING * count + _CALLING
        if work < least:
            best, least = count, work
    return best


class _Layout:
    """The three axes of a call in the order in which the kernels run over them, and how they are cut into tiles."""

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
        real = len(kernel)
        # The registers run along the last axis: it should have the longest kernel, then the most pixels.
        order = sorted(range(real), key=lambda axis: (kernel[axis], out[axis], axis))
        self.order = [None] * (3 - real) + order
        values = (x.shape[2:], out, kernel, stride, padding, dilation, gap)
        missing = (1, 1, 1, 1, 0, 1, 1)
        self.axes: list[list[int]] = [
            list(missing) if axis is None else [int(value[axis]) for value in values] for axis in self.order
        ]
        self.tiles = [1, 1, 1]
        while self._box() * 64 > _BUFFER_BYTES:
            # Tiles overlap by the extent of the kernel, so cut where that is the smallest share.
            shares = [
                (axis[1] / tiles) * axis[3] / ((axis[2] - 1) * axis[5] + 1)
                for axis, tiles in zip(self.axes, self.tiles, strict=True)
            ]
            best = max(range(3), key=lambda axis: shares[axis])
            if shares[best] < 2 or self.axes[best][1] < 2 * self.tiles[best]:
                break
            self.tiles[best] *= 2

    def _extent(self, axis: int) -> int:
        _, out, kernel, stride, _, dilation, _ = self.axes[axis]
        return (math.ceil(out / self.tiles[axis]) - 1) * stride + (kernel - 1) * dilation + 1

    def _box(self) -> int:
        """Return the pixels of the largest box that a tile reads, rows padded."""
        rows = [min(self.axes[axis][0], self._extent(axis) // self.axes[axis][6] + 2) for axis in (0, 1)]
        return rows[0] * rows[1] * self._extent(2)

    def outputs(self) -> int:
        """Return the outputs of the largest tile."""
        return math.prod(
            math.ceil(axis[1] / tiles) for axis, tiles in zip(self.axes, self.tiles, strict=True)
        )

    def scratch(self) -> int:
        """Return the bytes of scratch memory that a thread needs."""
        row = self.axes[2][1] // self.tiles[2] + 1
        return 64 * (self._box() + max(self.outputs(), 16 * row) + row)

    def strides(self, t: Tensor) -> list[int]:
        """Return a map's strides in bytes: samples, channels, axes."""
        size = t.element_size()
        spatial = [0 if axis is None else t.stride(2 + axis) * size for axis in self.order]
        return [t.stride(0) * size, t.stride(1) * size, *spatial]

    def fields(self) -> list[int]:
        """Return what the kernels' table says of the axes."""
        return [value for axis, tiles in zip(self.axes, self.tiles, strict=True) for value in (*axis, tiles)]

    def taps(self, weight: Tensor) -> list[int]:
        """Return what the packing of a weight (C, 1, *K) is told: its strides in bytes and its kernel."""
        return [
            weight.stride(0) * weight.element_size(),
            *self.strides(weight)[2:],
            *(axis[2] for axis in self.axes),
        ]


def thread_count(work: float) -> int:
    return max(1, min(torch.get_num_threads(), int(work / _WORTH_A_THREAD) + 1))


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
        once += copying(x, multiplier)
    return 3 * once if needs_grad(x, weight) else once


def copying(x: Tensor, times: int) -> float:
    """Return about how many seconds it takes to copy every channel several times and to sum the copies' gradients."""
    return (5e-10 if memory_format(x) == torch.contiguous_format else 1.1e-9) * times * x.numel()

"""Long kernels on CPUs: the convolution theorem along the longest axis, sums along the others.

With the Fourier transforms X_f and W_f of rows of the map and of the kernel along the last axis, the sums of `_sums.py`
for stride 1 are

    Y_f[n, c, o] = sum over u of  X_f[n, c, o + u - padding] conj(W_f[c, u]),
    D_f[c, u] = sum over n, o of  X_f[n, c, o + u - padding] conj(G_f[n, c, o]),

where o and u are positions along the other axes alone. So the taps of a row cost no more than one of them, and a kernel
of k x k taps grows with k instead of k^2. Transforming the other axes too would spare little: these sums run at the
full rate of multiplications, and a transform of every column would cost what they do.

Rows wrap around in a transform; it is long enough that what is wrapped meets zeros. Rounding errors are those of a sum
over whole rows, and so is what a number that is not finite spoils.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omniconv.ops.depthwise_conv import _direct
from omniconv.ops.depthwise_conv._layout import Layout, register_width, thread_count
from omniconv.ops.depthwise_conv._sums import (
    differentiable,
    empty_map,
    output_size,
    repeat_channels,
    repeating_seconds,
)
from omniconv.ops.dispatch import needs_grad

# The spectra of a map and of its output or gradient should stay in the second cache of a core.
_CACHE_BYTES = 3 << 18
# Longer transforms, which are programs without loops, take too long to compile.
_LONGEST = 192
# From so many taps that meet the map on, transforms were measured to gain over the direct sums, for all sizes of maps.
_WORTH_TRANSFORMING = 50
# Complex sums that fit into 32 registers beside what they share.
_MOST_SUMS = 12


class _Layout(Layout):
    """Axes of pixels, outputs, taps and padding; rows, which are transformed, lie along the last one."""

    def __init__(self, x: Tensor, out: Sequence[int], kernel: Sequence[int], padding: Sequence[int]) -> None:
        super().__init__((x.shape[2:], out, kernel, padding), missing=(1, 1, 1, 0))
        size, outs, taps, pad = self.axes[2]
        # Taps that never meet the map would wrap around to where they do.
        first, last = max(0, pad - outs + 1), min(taps, size + pad)
        self.left_out = first, taps - last
        self.axes[2][2:] = last - first, pad - first
        while self._length() > _LONGEST:
            self.tiles[2] += 1
        self.cut(_CACHE_BYTES)
        self.length = self._length()

    def _length(self) -> int:
        """Return the length of the transforms: as far as the map reaches, and the taps beyond without meeting it."""
        from omniconv.ops._fourier import smooth_length

        size, outs, taps, pad = self.axes[2]
        least = taps
        for tile in range(self.tiles[2]):
            first, last = outs * tile // self.tiles[2], outs * (tile + 1) // self.tiles[2]
            reached = last - first + taps - 1
            least = max(least, last - first, min(reached, size + pad - first), reached - max(0, pad - first))
        return smooth_length(least)

    def _rows(self) -> tuple[int, int]:
        """Return how many rows of spectra the largest tile of a map and of its output has, zeros included."""
        outs = self.outs(0) * self.outs(1)
        planes = min(self.axes[0][0], self.outs(0) - 1 + self.axes[0][2])
        return max(outs, planes * (self.outs(1) + self.axes[1][2] + _MOST_SUMS)), outs

    def tile_bytes(self) -> int:
        """Return the bytes of the spectra of a map and of its output."""
        return (self._length() // 2 + 1) * sum(self._rows()) * 128

    def scratch(self) -> int:
        """Return the bytes of scratch memory that a thread needs."""
        frequencies = self.length // 2 + 1
        rows = *self._rows(), self.axes[0][2] * (self.axes[1][2] + _MOST_SUMS)
        return 64 * (16 * self.length + (frequencies + 1) * sum(2 * count + 1 for count in rows))

    def first(self, weight: Tensor, flip: bool) -> int:
        """Return where the first tap lies that is not left out, of a kernel that is read backwards the last one."""
        return weight.data_ptr() + self.left_out[flip] * self.strides(weight)[4]

    def met(self) -> tuple[int, int, int, int]:
        """Return between which outputs and taps of the middle axis the map lies, for `register_width`."""
        size, _, _, pad = self.axes[1]
        return pad, size - 1 + pad, 1, 1


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
    from omniconv.ops._fourier import inverse, transform
    from omniconv.ops._simd import correlate, lanes, run_parallel
    from omniconv.ops.depthwise_conv._fft_kernels import convolve_kernel, frequency_step, taps_kernel
    from omniconv.ops.depthwise_conv._packing import weight_packing

    n, channels = x.shape[:2]
    y = empty_map(x, (n, *size))
    if y.numel() == 0:
        return y
    layout = _Layout(x, size[1:], weight.shape[2:], padding)
    length, width = layout.length, lanes(x.dtype)
    computed = torch.float64 if width == 8 else torch.float32
    blocks = math.ceil(channels / width)
    rows = layout.axes[0][2] * layout.axes[1][2]
    packed = torch.zeros((blocks * rows, length, width), dtype=computed)
    # Pairs of real and imaginary parts; the last one is that of no bias.
    start = torch.zeros((blocks + 1, 2, width), dtype=computed)
    added = torch.empty((blocks, width), dtype=computed)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    weight_packing(x.dtype)[0](
        packed.data_ptr(), length, added.data_ptr(), channels, layout.first(weight, flip),
        0 if bias is None else bias.data_ptr(), flip, *layout.taps(weight),
    )  # fmt: skip
    # Frequency zero of a row is its sum.
    start[:-1, 0] = length * added
    threads = thread_count(y.numel() * math.prod(weight.shape[2:]))
    spectra = torch.empty(blocks * (length // 2 + 1) * frequency_step(rows), dtype=torch.uint8)
    forwards = transform(computed, length).address
    run_parallel(
        taps_kernel(),
        [threads, blocks, rows, length, packed.data_ptr(), spectra.data_ptr(), forwards],
        threads,
    )
    middle = layout.axes[1]
    count = register_width(middle[1] // layout.tiles[1], middle[2], _MOST_SUMS, layout.met())
    scratch = torch.empty(threads * layout.scratch(), dtype=torch.uint8)
    table = [
        threads, scratch.data_ptr(), layout.scratch(), n, channels, 1,
        x.data_ptr(), *layout.strides(x), y.data_ptr(), *layout.strides(y), spectra.data_ptr(), start.data_ptr(),
        correlate(computed, count, keep=False).address, count,
        forwards, inverse(computed, length).address, length, *layout.fields(),
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
    from omniconv.ops._fourier import inverse, transform
    from omniconv.ops._simd import correlate, lanes, run_parallel
    from omniconv.ops.depthwise_conv._fft_kernels import weight_kernel
    from omniconv.ops.depthwise_conv._packing import weight_packing

    n, channels = x.shape[:2]
    found = x.new_zeros((channels, 1, *kernel))
    if grad.numel() == 0:
        return found
    layout = _Layout(x, grad.shape[2:], kernel, padding)
    length, width = layout.length, lanes(x.dtype)
    computed = torch.float64 if width == 8 else torch.float32
    blocks = math.ceil(channels / width)
    middle = layout.axes[1]
    count = register_width(middle[2], middle[1], _MOST_SUMS, layout.met())
    threads = thread_count(grad.numel() * math.prod(kernel))
    # Few blocks are cut along the samples too; the number of parts depends on nothing but sizes and threads, so
    # that the sums are the same bit for bit every time.
    parts = max(1, min(n * math.prod(layout.tiles), threads if blocks % threads else 1))
    kept = [axis[2] for axis in layout.axes]
    sums = torch.empty((parts, blocks, *kept, width), dtype=computed)
    scratch = torch.empty(threads * layout.scratch(), dtype=torch.uint8)
    table = [
        threads, scratch.data_ptr(), layout.scratch(), n, channels, parts,
        x.data_ptr(), *layout.strides(x), grad.data_ptr(), *layout.strides(grad), sums.data_ptr(), 0,
        correlate(computed, count, keep=True).address, count,
        transform(computed, length).address, inverse(computed, length).address, length, *layout.fields(),
    ]  # fmt: skip
    run_parallel(weight_kernel(x.dtype), table, threads)
    weight_packing(x.dtype)[1](
        sums.data_ptr(), parts, kept[2], channels, layout.first(found, False), *layout.taps(found)
    )
    return found


_convolve, _ = differentiable("fft", _run_convolve, _run_weight, "cpu")


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute with transforms of rows."""
    x = repeat_channels(x, weight.shape[0] // x.shape[1])
    size = output_size(x, weight, stride, padding, dilation)
    return _convolve(x, weight, bias, [x.shape[1], *size], stride, padding, dilation, [1] * len(size), False)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> str | None:
    """Return None, or why the call cannot be computed here."""
    kernel = weight.shape[2:]
    if any(s != 1 for s in stride) or any(d != 1 for d in dilation):
        return f"it is for stride and dilation 1, not {stride} and {dilation}"
    if max(kernel) > _LONGEST // 2:
        return f"it is for at most {_LONGEST // 2} taps along an axis, not {max(kernel)}"
    return _direct.supports(x, weight, bias, stride, padding, dilation)


def estimate(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> float:
    """Return about how many seconds the call takes: overhead, maps, transforms of rows, products of spectra."""
    kernel = weight.shape[2:]
    if len(kernel) == 1:
        # There is nothing that the transforms of a row would be shared by.
        return math.inf
    row = 0
    for axis in range(1, len(kernel)):
        if kernel[axis] >= kernel[row]:
            row = axis
    length = x.shape[2 + row] + padding[row]
    if not torch.compiler.is_compiling() and length > _LONGEST:
        # Tiles overlap by the kernel.
        length *= 1 + kernel[row] / (_LONGEST - kernel[row])
    rows = outs = met = in_row = 1
    for axis, (size, k, p) in enumerate(zip(x.shape[2:], kernel, padding, strict=True)):
        out = size + 2 * p - k + 1
        # Taps on the padding are left out; symbolic sizes are spared the arithmetic.
        taps = k if torch.compiler.is_compiling() else max(1, k - p * (p + 1) // max(1, out))
        if axis == row:
            in_row = taps
        else:
            rows, outs, met = rows * size, outs * out, met * taps
    if in_row * met < _WORTH_TRANSFORMING:
        return math.inf
    maps = x.shape[0] * weight.shape[0]
    pixels = maps * (rows + outs) * x.shape[2 + row]
    once = 1.4e-4 + 5e-11 * pixels + maps * length * (3.7e-10 * (rows + outs) + 4e-11 * outs * met)
    if (multiplier := weight.shape[0] // x.shape[1]) > 1:
        once += repeating_seconds(x, multiplier)
    return 3 * once if needs_grad(x, weight) else once

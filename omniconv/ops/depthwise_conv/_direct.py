"""Direct loops over vectors of channels, for CPUs: any number of axes, stride, dilation, padding and type.

Every gradient is one of two sums. The convolution of a map whose pixels lie `gap` apart,

    y[n, c, o] = sum over u of  w[c, u] X[n, c, stride o + dilation u - padding],   X[gap i] = x[i], else 0,

has as its gradient with respect to x another one with stride and gap exchanged and the kernel flipped, and with
respect to w

    dw[c, u] = sum over n, o of  X[n, c, stride o + dilation u - padding] g[n, c, o],

whose own gradients are convolutions again. So derivatives of every order run on these two kernels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

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
def _width(length: int, starts: int, most: int, met: tuple[int, int, int, int]) -> int:
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
        return 64 * (self._box() + self.outputs() + self.axes[2][1] + 8)

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


def _threads(work: float) -> int:
    return max(1, min(torch.get_num_threads(), int(work / _WORTH_A_THREAD) + 1))


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an empty map in the type and memory format of `x`."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


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
    from omniconv.ops.depthwise_conv._direct_kernels import convolve_kernel, weight_packing

    n, channels = x.shape[:2]
    layout = _Layout(x, size, weight.shape[2:], stride, padding, dilation, gap)
    y = _empty(x, (n, channels, *size))
    if y.numel() == 0:
        return y
    width = lanes(x.dtype)
    taps, blocks = math.prod(weight.shape[2:]), math.ceil(channels / width)
    computed = torch.float64 if width == 8 else torch.float32
    packed = torch.empty((blocks * (taps + 1), width), dtype=computed)
    start = packed.data_ptr() + blocks * taps * VECTOR
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    weight_packing(x.dtype)[0](
        packed.data_ptr(), start, channels, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), flip,
        *layout.taps(weight),
    )  # fmt: skip
    last = layout.axes[2]
    size2, _, kernel2, stride2, padding2, dilation2, gap2 = last
    met = (padding2, (size2 - 1) * gap2 + padding2, stride2, dilation2)
    count = _width(last[1] // layout.tiles[2], kernel2, _MOST_SUMS, met)
    loops = accumulate(computed, count, last[3] * VECTOR, keep=False)
    threads = _threads(y.numel() * taps)
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
    from omniconv.ops.depthwise_conv._direct_kernels import weight_kernel, weight_packing

    n, channels = x.shape[:2]
    width = lanes(x.dtype)
    layout = _Layout(x, grad.shape[2:], kernel, stride, padding, dilation, gap)
    last = layout.axes[2]
    size2, out2, real, stride2, padding2, dilation2, gap2 = last
    met = (padding2, (size2 - 1) * gap2 + padding2, dilation2, stride2)
    count = _width(real, out2, _MOST_SUMS - 2, met)
    last[2] = math.ceil(real / count) * count
    blocks = math.ceil(channels / width)
    threads = _threads(grad.numel() * math.prod(kernel)) if grad.numel() else 1
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


def _mirrored(padding: Sequence[int], dilation: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Return the padding of the convolution that is the gradient of another one's input."""
    return [d * (k - 1) - p for p, d, k in zip(padding, dilation, kernel, strict=True)]


def _save_convolve(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[4:]


def _backward_convolve(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight), (stride, padding, dilation, gap, flip) = ctx.saved_tensors, ctx.sizes
    kernel = weight.shape[2:]
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        mirrored = _mirrored(padding, dilation, kernel)
        of_x = _convolve(grad, weight, None, x.shape[2:], gap, mirrored, dilation, stride, not flip)
    if ctx.needs_input_grad[1]:
        of_weight = weight_gradient(x, grad, kernel, stride, padding, dilation, gap)
        if flip:
            of_weight = of_weight.flip(tuple(range(2, weight.ndim)))
    if ctx.needs_input_grad[2]:
        of_bias = grad.sum((0, *range(2, grad.ndim)))
    return of_x, of_weight, of_bias, None, None, None, None, None, None


def _save_weight(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[2:]


def _backward_weight(ctx: Any, change: Tensor) -> tuple[Tensor | None, ...]:
    (x, grad), (kernel, stride, padding, dilation, gap) = ctx.saved_tensors, ctx.sizes
    of_x = of_grad = None
    if ctx.needs_input_grad[0]:
        mirrored = _mirrored(padding, dilation, kernel)
        of_x = _convolve(grad, change, None, x.shape[2:], gap, mirrored, dilation, stride, True)
    if ctx.needs_input_grad[1]:
        of_grad = _convolve(x, change, None, grad.shape[2:], stride, padding, dilation, gap, False)
    return of_x, of_grad, None, None, None, None, None


# Compiled and exported programs call operators that torch knows by name; eager programs call the same functions
# without what torch's registry adds to every call, which for small maps is more than the call itself.
_convolve_op = torch.library.custom_op(
    "omniconv::depthwise_convolve", _run_convolve, mutates_args=(), device_types="cpu"
)
_weight_op = torch.library.custom_op(
    "omniconv::depthwise_weight", _run_weight, mutates_args=(), device_types="cpu"
)
_convolve_op.register_autograd(_backward_convolve, setup_context=_save_convolve)
_weight_op.register_autograd(_backward_weight, setup_context=_save_weight)


@_convolve_op.register_fake
def _(x, weight, bias, size, stride, padding, dilation, gap, flip):
    return _empty(x, (*x.shape[:2], *size))


@_weight_op.register_fake
def _(x, grad, kernel, stride, padding, dilation, gap):
    return x.new_empty((x.shape[1], 1, *kernel))


class _EagerConvolve(torch.autograd.Function):
    # A separate setup_context would have torch inspect the signature at every call.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_convolve(ctx, inputs, y := _run_convolve(*inputs))
        return y

    backward: Any = staticmethod(_backward_convolve)


class _EagerWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_weight(ctx, inputs, found := _run_weight(*inputs))
        return found

    backward: Any = staticmethod(_backward_weight)


def _traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def _convolve(x: Tensor, *others: Any) -> Tensor:
    return _convolve_op(x, *others) if _traced(x) else _EagerConvolve.apply(x, *others)


def weight_gradient(x: Tensor, *others: Any) -> Tensor:
    """Return the gradient of the weight, given x, that of the output, kernel, stride, padding, dilation and gap."""
    return _weight_op(x, *others) if _traced(x) else _EagerWeight.apply(x, *others)


def _repeat(x: Tensor, times: int) -> Tensor:
    """Return every channel several times, side by side, in the memory format of `x`, which its gradient keeps too."""
    if memory_format(x) == torch.contiguous_format:
        return x.repeat_interleave(times, 1)
    x = x.movedim(1, -1).unsqueeze(-1)
    return x.expand(*x.shape[:-1], times).flatten(-2).movedim(-1, 1)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """Compute with the direct kernels."""
    multiplier = weight.shape[0] // x.shape[1]
    if multiplier > 1:
        x = _repeat(x, multiplier)
    size = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, p, d, k, step in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(
            f"the kernel must fit into the padded map: got kernel {tuple(weight.shape[2:])}, dilation {dilation}, "
            f"map {tuple(x.shape[2:])} and padding {padding}"
        )
    return _convolve(x, weight, bias, size, stride, padding, dilation, [1] * len(size), False)


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
        # Every channel is copied for each of its kernels, and the gradients of the copies are summed.
        once += (5e-10 if memory_format(x) == torch.contiguous_format else 1.1e-9) * multiplier * x.numel()
    return 3 * once if needs_grad(x, weight) else once

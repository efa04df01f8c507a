"""The map lowered by windows has N C H' K W entries, fewer than im2col's N C K K H' W', its windows are slices of
contiguous memory, and a compiled convolution of it outruns the plain loops.

The layers are the twelve on which MEC and Im2win were measured, with a quarter of their channels.
"""

import math
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.conv.api import conv
from omniconv.ops.im2win import im2win, windows
from omniconv.papers.check import Check

# Input channels, size, output channels, kernel, stride.
LAYERS = (
    (3, 227, 24, 11, 4), (3, 231, 24, 11, 4), (3, 227, 16, 7, 2), (16, 224, 16, 7, 2), (24, 24, 64, 5, 1),
    (64, 12, 128, 3, 1), (3, 224, 16, 3, 1), (16, 112, 32, 3, 1), (16, 56, 16, 3, 1), (32, 28, 32, 3, 1),
    (64, 14, 64, 3, 1), (128, 7, 128, 3, 1),
)  # fmt: skip
ERRORS = {torch.float32: 1e-4, torch.float64: 1e-10}
FASTER = 3.0
ROUNDS = 3


def inputs(layer: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int]:
    """Return maps, kernels and stride of a layer."""
    channels, size, out, kernel, stride = layer
    random = torch.Generator().manual_seed(size)
    x = torch.randn(1, channels, size, size, generator=random, dtype=dtype)
    return x, torch.randn(out, channels, kernel, kernel, generator=random, dtype=dtype), stride


def error(dtype: torch.dtype) -> float:
    """Return the largest relative error over the layers and both memory formats."""
    worst = 0.0
    for layer in LAYERS:
        x, w, stride = inputs(layer, dtype)
        exact = F.conv2d(x, w, stride=stride)
        for form in (torch.contiguous_format, torch.channels_last):
            found = conv(x.contiguous(memory_format=form), w, stride=stride, impl="im2win")
            worst = max(worst, float((found - exact).abs().max() / exact.abs().max()))
    return worst


def naive_loops():
    """Return the convolution as seven plain loops, compiled."""
    from numba import njit

    @njit(nogil=True)
    def convolve(x, w, y, stride):
        for n in range(y.shape[0]):
            for o in range(y.shape[1]):
                for i in range(y.shape[2]):
                    for j in range(y.shape[3]):
                        total = y[n, o, i, j]
                        for c in range(w.shape[1]):
                            for u in range(w.shape[2]):
                                for v in range(w.shape[3]):
                                    total += w[o, c, u, v] * x[n, c, i * stride + u, j * stride + v]
                        y[n, o, i, j] = total

    return convolve


def speedups() -> list[float]:
    """Return how many times as fast as the plain loops each layer is, on one thread."""
    loops, found = naive_loops(), []
    for layer in LAYERS:
        x, w, stride = inputs(layer)
        shape = F.conv2d(x, w, stride=stride).shape
        seconds: tuple[list[float], list[float]] = ([], [])
        for round in range(ROUNDS + 1):
            started = time.perf_counter()
            loops(x.numpy(), w.numpy(), torch.zeros(shape).numpy(), stride)
            between = time.perf_counter()
            conv(x, w, stride=stride, impl="im2win")
            if round:
                seconds[0].append(between - started)
                seconds[1].append(time.perf_counter() - between)
        found.append(statistics.median(seconds[0]) / statistics.median(seconds[1]))
    return found


def run(check: Check) -> None:
    """Measure errors, memory, contiguity and times."""
    for dtype, limit in ERRORS.items():
        name = str(dtype).removeprefix("torch.")
        check.require(f"relative error over twelve layers, {name}", error(dtype), "<=", limit)

    exact = smaller = contiguous = views = 0
    overlapping, shares = 0, []
    for layer in LAYERS:
        x, w, stride = inputs(layer)
        kernel = w.shape[2]
        lowered = im2win(x, kernel, stride=stride)
        size = (x.shape[2] - kernel) // stride + 1
        allocated = lowered.untyped_storage().nbytes()
        columns = F.unfold(x, kernel, stride=stride).untyped_storage().nbytes()
        exact += allocated == 4 * x.shape[1] * size * kernel * x.shape[3]
        overlapping += kernel > stride
        smaller += kernel > stride and allocated < columns
        shares.append(allocated / columns)
        window = windows(lowered, (kernel, kernel), stride=stride)
        contiguous += all(
            window[0, c, i, j].is_contiguous() for c in (0, -1) for i in (0, -1) for j in (0, -1)
        )
        views += window.untyped_storage().data_ptr() == lowered.untyped_storage().data_ptr()
    check.require("layers whose lowered map takes exactly N C H' K W entries", exact, "==", len(LAYERS))
    check.require(
        "layers with K > stride whose lowered map is smaller than im2col's", smaller, "==", overlapping
    )
    check.require("layers whose windows are contiguous", contiguous, "==", len(LAYERS))
    check.require("layers whose windows are views of the lowered map", views, "==", len(LAYERS))
    mean = math.exp(statistics.fmean(map(math.log, shares)))
    check.note(f"the lowered map has {mean:.2f} of im2col's entries (geometric mean)")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = speedups()
    finally:
        torch.set_num_threads(threads)
    check.require("times as fast as compiled plain loops, least of twelve layers", min(found), ">=", FASTER)
    check.note("times as fast as plain loops, by layer: " + ", ".join(f"{ratio:.1f}" for ratio in found))

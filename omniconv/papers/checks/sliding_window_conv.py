"""Convolution as a sliding window needs no memory beyond the padded map, where im2col needs k^2 maps, and outruns
im2col with a matrix product by more the larger the kernel is; sliding sums take a logarithmic number of steps.

Times are of one thread, maps of 512 x 512 pixels, rounds of both interleaved, medians.
"""

import math
import statistics
import time

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.conv.api import conv
from omniconv.ops.sliding_window import sliding_window
from omniconv.papers.check import Check

KERNELS = range(1, 34)
DILATIONS = (1, 2, 3)
ERROR = 1e-5
EXTRA_BYTES = 0
TIMED = range(3, 32, 2)
FASTER_FROM = 5
FASTER = 1.5
TREND = 0.8
SIZE = 512
ROUNDS = 3


def convolution_error() -> float:
    """Return the largest error of convolutions with all kernels, of one and two axes, against torch in float64."""
    torch.manual_seed(0)
    worst = 0.0
    for k in KERNELS:
        for d in DILATIONS:
            for x, w in (
                (torch.randn(1, 2, 101, 117), torch.randn(3, 2, k, k)),
                (torch.randn(1, 1, 101, 117), torch.randn(2, 1, k, 34 - k)),
                (torch.randn(1, 2, 131), torch.randn(3, 2, k)),
            ):
                run = F.conv1d if x.ndim == 3 else F.conv2d
                exact = run(x.double(), w.double(), padding=k // 2, dilation=d)
                found = conv(x, w, padding=k // 2, dilation=d, impl="sliding")
                worst = max(worst, float((found - exact).abs().max() / exact.abs().max()))
    return worst


def pooling_error() -> float:
    """Return the largest error of max and average pooling with all windows."""
    torch.manual_seed(0)
    x, worst = torch.randn(2, 3, 131), 0.0
    for k in KERNELS:
        for d in DILATIONS:
            most = F.max_pool1d(x, k, 1, dilation=d)
            worst = max(worst, float((sliding_window(x, k, torch.maximum, dilation=d) - most).abs().max()))
        mean = F.avg_pool1d(x.double(), k, 1)
        worst = max(worst, float((sliding_window(x, k) / k - mean).abs().max()))
    return worst


def allocated(x: Tensor, w: Tensor, impl: str) -> int:
    """Return the bytes that torch allocates in a convolution."""
    conv(x, w, padding=w.shape[2] // 2, impl=impl)
    with torch.profiler.profile(profile_memory=True) as profile:
        conv(x, w, padding=w.shape[2] // 2, impl=impl)
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events() or ())


def ratios(channels: int) -> list[float]:
    """Return how many times as fast as im2col the sliding window is, by kernel."""
    torch.manual_seed(0)
    x, found = torch.randn(1, channels, SIZE, SIZE), []
    for k in TIMED:
        w = torch.randn(channels, 1, k, k)
        seconds: dict[str, list[float]] = {"sliding": [], "im2col": []}
        for round in range(ROUNDS + 1):
            for impl, times in seconds.items():
                started = time.perf_counter()
                conv(x, w, padding=k // 2, groups=channels, impl=impl)
                if round:
                    times.append(time.perf_counter() - started)
        found.append(statistics.median(seconds["im2col"]) / statistics.median(seconds["sliding"]))
    return found


def share_of_steps(length: int = 4096) -> float:
    """Return the largest number of combined entries over 2 N log2 k."""
    worst = 0.0
    for k in range(2, 1025):
        entries = 0

        def combine(a: Tensor, b: Tensor) -> Tensor:
            nonlocal entries
            entries += a.numel()
            return a

        sliding_window(torch.empty(length), k, combine)
        worst = max(worst, entries / (2 * length * math.log2(k)))
    return worst


def run(check: Check) -> None:
    """Measure errors, memory, times and steps."""
    check.require("relative error of convolutions, kernels 1 to 33", convolution_error(), "<=", ERROR)
    check.require("error of max and average pooling, windows 1 to 33", pooling_error(), "<=", ERROR)

    x = torch.randn(1, 1, SIZE, SIZE)
    for k in (5, 15):
        w, map_bytes = torch.randn(1, 1, k, k), 4 * SIZE**2
        padded = 4 * (SIZE + 2 * (k // 2)) ** 2
        extra = allocated(x, w, "sliding") - padded - map_bytes
        check.require(f"bytes beyond the padded map and the output, k = {k}", extra, "==", EXTRA_BYTES)
        columns = (allocated(x, w, "im2col") - map_bytes) / map_bytes
        check.require(f"maps that im2col allocates, k = {k}", columns, ">=", k**2)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, channels in (("1 channel", 1), ("depthwise, 2 channels", 2)):
            found = ratios(channels)
            least = min(ratio for k, ratio in zip(TIMED, found, strict=True) if k >= FASTER_FROM)
            check.require(f"times as fast as im2col, least of k = 5 to 31, {name}", least, ">=", FASTER)
            trend = float(spearmanr(list(TIMED), found)[0])  # pyright: ignore[reportArgumentType]
            check.require(f"rank correlation of that with k = 3 to 31, {name}", trend, ">=", TREND)
            text = ", ".join(f"{k}: {ratio:.1f}" for k, ratio in zip(TIMED, found, strict=True))
            check.note(f"times as fast as im2col, {name}, by k: {text}")
    finally:
        torch.set_num_threads(threads)
    check.require("entries combined over 2 N log2 k, most of k = 2 to 1024", share_of_steps(), "<=", 1)

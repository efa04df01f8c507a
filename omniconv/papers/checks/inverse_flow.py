"""The inverse of a convolution is a layer with exact gradients in 2n - 1 steps each way, as good in a flow as Glow's
1x1 convolutions, and a flow that runs it from data to latent variables samples faster.

Training sees scikit-learn's 8x8 digits. Sampling is compared with the same flow turned round, whose inverses run in
the sampling direction; both run in plain torch, anti-diagonal by anti-diagonal, as they would on a GPU.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.layers.conv.inverse import CornerConv2d, InverseConv2d
from omniconv.ops.inverse_conv.api import corner_conv, inverse_conv
from omniconv.ops.inverse_conv.reference import reference
from omniconv.papers.check import Check
from omniconv.papers.small_flow import Flow, Mix1x1, bits_per_dim, digit_counts, train_flow

ERROR = {torch.float32: 1e-5, torch.float64: 1e-10}
ROUND_TRIP = 1e-5
GRADIENT_ERROR = 1e-10
LOG_DET = 1e-8
SLOPE, DENSE_SLOPE = 1.2, 2.0
BITS_MARGIN = 0.02
SAMPLING = 3.0
STEPS = 400
SEEDS = (0, 1, 2)
IMPLS = ("torch", "compiled")


def kernel(channels: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return weights whose products neither grow nor vanish much from pixel to pixel."""
    return torch.randn(channels, channels, size, size, dtype=dtype) * 0.5 / (size * math.sqrt(channels))


def dense_error(dtype: torch.dtype) -> float:
    """Return the largest difference from the dense system's solution, in float64."""
    worst = 0.0
    for size in (2, 3, 5):
        for channels in range(1, 9):
            y, weight = torch.randn(2, channels, 6, 7, dtype=torch.float64), kernel(channels, size)
            wanted = reference(y, weight)
            for impl in IMPLS:
                got = inverse_conv(y.to(dtype), weight.to(dtype), impl=impl)
                worst = max(worst, float((got.double() - wanted).abs().max()))
    return worst


def round_trip_error() -> float:
    """Return the largest difference after an inverse and torch's own convolution, in float32."""
    worst = 0.0
    for size in (2, 3, 5):
        y, weight = torch.randn(2, 6, 16, 13), kernel(6, size, torch.float32)
        full = weight.clone()
        full[:, :, -1, -1] = weight[:, :, -1, -1].tril(-1) + torch.eye(6)
        for impl in IMPLS:
            x = inverse_conv(y, weight, impl=impl)
            back = F.conv2d(F.pad(x, (size - 1, 0, size - 1, 0)), full)
            worst = max(worst, float((back - y).abs().max()))
    return worst


def gradient_error() -> float:
    """Return the largest difference of the gradients from autograd's through the dense system."""
    worst = 0.0
    for size in (2, 3, 5):
        leaves = [torch.randn(2, 3, 5, 6, dtype=torch.float64), kernel(3, size)]
        probe = torch.randn(2, 3, 5, 6, dtype=torch.float64)
        found = []
        compared = [partial(inverse_conv, impl=impl) for impl in IMPLS]
        for solve in (reference, *compared):
            own = [t.clone().requires_grad_() for t in leaves]
            found.append(torch.autograd.grad((solve(*own) * probe).sum(), own))
        worst = max(
            worst, *(float((a - b).abs().max()) for g in found[1:] for a, b in zip(g, found[0], strict=True))
        )
    return worst


def passes_gradcheck() -> int:
    """Return how many of the implementations and kernel sizes pass gradcheck."""
    return sum(
        gradcheck(
            lambda y, w, impl=impl: inverse_conv(y, w, impl=impl),
            (
                torch.randn(1, 2, 4, 3, dtype=torch.float64).requires_grad_(),
                kernel(2, size).requires_grad_(),
            ),
        )
        for impl in IMPLS
        for size in (2, 3, 5)
    )


def log_det(function: Callable[[Tensor], Tensor], channels: int = 3) -> float:
    """Return the logarithm of the determinant of a map's whole Jacobian."""
    x = torch.randn(1, channels, 5, 4, dtype=torch.float64)
    jacobian: Any = torch.autograd.functional.jacobian(function, x)
    return abs(float(torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]))


class Products(TorchDispatchMode):
    """Counts matrix products, of which a sweep makes one a step."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def sequential_steps(size: int) -> tuple[int, int]:
    """Return the products of the forward and of the backward pass of a map of size x size."""
    y = torch.randn(2, 3, size, size, requires_grad=True)
    weight = kernel(3, 3, torch.float32).requires_grad_()
    with Products() as forward:
        x = inverse_conv(y, weight, impl="torch")
    with Products() as backward:
        x.sum().backward()
    return forward.count, backward.count


def slope(seconds: Callable[[int], float], sizes: tuple[int, ...]) -> float:
    """Return the exponent with which time grows with pixels, by least squares."""
    points = torch.tensor([[math.log(n * n), math.log(seconds(n))] for n in sizes], dtype=torch.float64)
    points = points - points.mean(0)
    return float((points[:, 0] * points[:, 1]).sum() / (points[:, 0] ** 2).sum())


def median_seconds(function: Callable[[], Any], rounds: int = 7) -> float:
    """Return the median time of a call after one to warm up."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_of(solve: Callable[[Tensor, Tensor], Tensor], channels: int) -> Callable[[int], float]:
    """Return a function from size to the seconds that `solve` takes for four maps."""

    def seconds(n: int) -> float:
        y, weight = torch.randn(4, channels, n, n), kernel(channels, 3, torch.float32)
        return median_seconds(lambda: solve(y, weight))

    return seconds


class Swept(CornerConv2d):
    """A corner convolution whose inverse runs in plain torch."""

    def inverse(self, y: Tensor) -> Tensor:
        """Solve anti-diagonal by anti-diagonal."""
        return inverse_conv(y, self.weight, impl="torch")


def sampling_ratio(turned: type[CornerConv2d], rounds: int = 15) -> float:
    """Return how many times as fast a flow samples with convolutions as with their inverses, `turned`."""
    flows = [Flow(lambda c, layer=layer: [layer(c)]).eval() for layer in (turned, InverseConv2d)]
    latents = torch.randn(100, 8, 2, 2), torch.randn(100, 2, 4, 4)
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(rounds + 2):
            for flow, taken in zip(flows, times, strict=True):
                start = time.perf_counter()
                flow.decode(*latents)
                taken.append(time.perf_counter() - start)
    return statistics.median(a / b for a, b in zip(*(t[2:] for t in times), strict=True))


def run(check: Check) -> None:
    """Measure errors, steps, times, and small flows."""
    torch.manual_seed(0)
    for dtype, limit in ERROR.items():
        check.require(f"difference from the dense solution, {dtype}", dense_error(dtype), "<=", limit)
    check.require("difference after the inverse and F.conv2d, float32", round_trip_error(), "<=", ROUND_TRIP)
    check.require("gradcheck passed, of 6", passes_gradcheck(), "==", 6)
    check.require("difference of gradients from the dense system's", gradient_error(), "<=", GRADIENT_ERROR)
    weight = kernel(3, 3)
    for name, function in (("convolution", corner_conv), ("inverse", inverse_conv)):
        found = log_det(lambda x, function=function: function(x, weight))
        check.require(f"log-determinant of the {name}'s Jacobian", found, "<=", LOG_DET)

    for size in (4, 8, 16):
        forward, backward = sequential_steps(size)
        check.require(f"sequential steps forwards at n = {size}", forward, "==", 2 * size - 1)
        check.require(f"sequential steps backwards at n = {size}", backward, "==", 2 * size - 1)

    growth = slope(seconds_of(inverse_conv, 8), (16, 32, 64, 128))
    dense = slope(seconds_of(reference, 2), (12, 16, 24, 32))
    check.require("exponent of time by pixels", growth, "<=", SLOPE, baseline=dense)
    check.require("the same for the dense system", dense, ">=", DENSE_SLOPE)

    train, test = digit_counts()
    mixings: dict[str, Callable[[int], list]] = {
        "inverse": lambda c: [InverseConv2d(c)],
        "1x1": lambda c: [Mix1x1(c)],
    }
    bits = {
        name: [bits_per_dim(train_flow(mixing, train, seed, STEPS), test) for seed in SEEDS]
        for name, mixing in mixings.items()
    }
    means = {name: sum(values) / len(values) for name, values in bits.items()}
    check.require(
        "bits per dimension of digits over Glow's, mean of 3 seeds",
        means["inverse"] - means["1x1"], "<=", BITS_MARGIN, baseline=means["1x1"], unit="bits",
    )  # fmt: skip
    check.note(f"bits with inverse convolutions {bits['inverse']}, with 1x1 {bits['1x1']}")

    ratio = sampling_ratio(Swept)
    check.require("times as fast as with inverses when sampling", ratio, ">=", SAMPLING, unit="times")
    check.note(f"with compiled inverses, on this CPU, {sampling_ratio(CornerConv2d):.2f} times")

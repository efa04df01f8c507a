"""Attention inside every pixel's window is a convolution in all that matters: it follows shifts, takes any size and
costs the same for every pixel; rolled heads and pooled keys let it see beyond its window.

Costs are counted, not timed: all numbers that the operations of a pass put out. The trained networks are the small ones
of `omniconv.papers.mixers`, on CIFAR-10, with windows of 3 pixels, eight heads, and both mechanisms or neither.
"""

import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.inspect.receptive_field import receptive_field
from omniconv.layers.attention.msa_conv import MSAConv2d
from omniconv.models.image.stm import MIXERS
from omniconv.papers.check import Check
from omniconv.papers.mixers import make_network
from omniconv.papers.small import accuracy, cifar10, train

ERROR = 1e-5
SLOPE_ERROR = 0.05
SIDES = (32, 48, 64, 96)
MARGIN = 0.0
SEEDS = (0, 1, 2)
IMAGES, TEST_IMAGES, EPOCHS = 4000, 2000, 2


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def by_unfold(layer: MSAConv2d, x: Tensor) -> Tensor:
    """Return the layer's output with windows cut out by unfold."""
    heads, k, dilation = layer.num_heads, layer.kernel_size, layer.dilation
    pixels = x[0, 0].numel()
    q, *rest = layer.qkv_conv(x).chunk(3, 1)
    keys, values = (
        F.unfold(part, k, dilation, k // 2 * dilation).view(len(x), heads, -1, k * k, pixels) for part in rest
    )
    q = q.view(len(x), heads, -1, 1, pixels)
    share = (q * keys).sum(2, keepdim=True).div(math.sqrt(q.shape[2])).softmax(3)
    y = x + (share * values).sum(3).view_as(x)
    return F.conv2d(y, layer.mlp.weight, None, layer.mlp.stride, k // 2)


def unfold_error() -> float:
    """Return the largest relative difference from unfolded windows over kernels, strides and dilations."""
    worst = 0.0
    for kernel in (3, 5, 7):
        for stride, dilation in ((1, 1), (2, 1), (1, 2), (2, 3)):
            torch.manual_seed(kernel)
            layer = MSAConv2d(12, 8, kernel, num_heads=3, stride=stride, dilation=dilation)
            x = torch.randn(2, 12, 17, 14)
            worst = max(worst, error(layer(x), by_unfold(layer, x)))
    return worst


def mean_error() -> float:
    """Return how far the layer is from averages over its windows when all queries are zero."""
    torch.manual_seed(0)
    layer = MSAConv2d(8, kernel_size=5, num_heads=2)
    layer.qkv_conv.weight[:8].zero_()
    layer.qkv_conv.get_parameter("bias")[:8].zero_()
    x = torch.randn(2, 8, 11, 9)
    values = layer.qkv_conv(x).chunk(3, 1)[2]
    return error(layer.attend(x), F.avg_pool2d(values, 5, 1, 2))


class Count(TorchDispatchMode):
    """Counts the numbers that operations put out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and not func.is_view:
            self.total += output.numel()
        return output


class GlobalAttention(nn.Module):
    """The same attention over the whole map, as its equation reads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all pixels."""
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        return (v @ (q.mT @ k).softmax(2).mT).view_as(x)


def cost_slope(layer: nn.Module) -> float:
    """Return the slope of log cost over log pixels."""
    costs = []
    for side in SIDES:
        with Count() as count:
            layer.to("meta")(torch.empty(1, 16, side, side, device="meta"))
        costs.append(math.log(count.total))
    return statistics.linear_regression([2 * math.log(side) for side in SIDES], costs).slope


def support(shift: int = 0, pool: int = 0) -> int:
    """Return on how many pixels the attention at the middle of a map of 25 x 25 depends."""
    torch.manual_seed(0)
    layer = MSAConv2d(10, kernel_size=5, num_heads=5, dilation=2, shift=shift, pool=pool)
    x = torch.randn(1, 10, 25, 25)
    return int(receptive_field(layer.attend, x).support.sum())


def run(check: Check) -> None:
    """Measure the layer, what it costs, what it sees, and what seeing further is worth."""
    with torch.no_grad():
        check.require("relative difference from unfolded windows", unfold_error(), "<=", ERROR)
        torch.manual_seed(0)
        layer = MSAConv2d(8, num_heads=4, padding_mode="circular")
        x = torch.randn(2, 8, 12, 10)
        moved = error(layer(x.roll((5, 3), (2, 3))), layer(x).roll((5, 3), (2, 3)))
        check.require("the layer after a shift, with borders that wrap around", moved, "<=", ERROR)
        check.require("queries of zero: difference from the mean over the window", mean_error(), "<=", ERROR)
        fine = sum(
            bool(torch.isfinite(layer(torch.randn(1, 8, side, side))).all()) for side in (*SIDES, 33, 75)
        )
        check.require("sizes from 32 to 96 that the same weights take", fine, "==", len(SIDES) + 2)
        slope = cost_slope(MSAConv2d(16, num_heads=4))
        whole = cost_slope(GlobalAttention(16))
    check.require(
        "distance from 1 of the slope of log cost over log pixels", abs(slope - 1), "<=", SLOPE_ERROR,
        baseline=abs(whole - 1),
    )  # fmt: skip
    check.require("the same from 2, of global attention", abs(whole - 2), "<=", SLOPE_ERROR)
    window = support()
    check.require("pixels that a 5 x 5 window of dilation 2 depends on", window, "==", 25)
    check.require("the same with heads rolled by 3", support(shift=3), ">", window)
    check.require("the same with pooled keys", support(pool=2), "==", 25 * 25)

    training, test = cifar10(IMAGES, TEST_IMAGES)
    mixers = {
        "near": lambda channels, place: MSAConv2d(channels, num_heads=8, groups=channels),
        "far": lambda channels, place: MSAConv2d(channels, num_heads=8, groups=channels, shift=2, pool=2),
    }
    scores: dict[str, list[float]] = {name: [] for name in mixers}
    MIXERS.update(mixers)
    try:
        for seed in SEEDS:
            for name, found in scores.items():
                model = make_network(name, seed, 3)
                train(model, training, epochs=EPOCHS, seed=seed, shift=2)
                found.append(accuracy(model, test))
    finally:
        for name in mixers:
            del MIXERS[name]
    mean = {name: sum(found) / len(found) for name, found in scores.items()}
    check.require(
        "accuracy with both mechanisms minus that without, mean of 3 seeds", mean["far"] - mean["near"], ">=",
        MARGIN, baseline=mean["near"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}; slopes {slope:.3f} and, of global attention, {whole:.3f}")

"""A 3x3 and two band kernels on three eighths of the channels cost a twelfth of a 7x7 depthwise convolution, are one
large sparse depthwise convolution, and take less time; networks of them have the published size and cost.

Times are of a forward pass, channels 96, maps of 56 x 56, medians of interleaved rounds; each layer in the memory
format in which it is faster.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.design.cost import count_cost
from omniconv.layers.conv.inception_depthwise import InceptionDepthwiseConv2d
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

PUBLISHED = {
    "inception_next_tiny": (28.056e6, 4.2e9),
    "inception_next_small": (49.374e6, 8.4e9),
    "inception_next_base": (86.672e6, 14.9e9),
}
PARAMETER_ERROR = 0.001
MACS_ERROR = 0.01
DENSE_ERROR = 1e-6
MACS_PER_VALUE = (9 + 11 + 11) / 8
SHARE = 0.079
LATENCY = 0.8
ROUNDS = 15


def loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution with zeros beyond the map, one output pixel at a time."""
    height, width = weight.shape[2:]
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2))
    y = torch.empty_like(x)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = padded[:, :, i : i + height, j : j + width]
            y[:, :, i, j] = (window * weight[:, 0]).sum((2, 3)) + bias
    return y


def dense_kernel(layer: InceptionDepthwiseConv2d, channels: int) -> tuple[Tensor, Tensor]:
    """Return kernels (C, 1, 11, 11) and biases of the one convolution that the layer is."""
    kernel, bias = torch.zeros(channels, 1, 11, 11), torch.zeros(channels)
    first = layer.splits[0]
    kernel[:first, :, 5, 5] = 1
    for conv in (layer.dwconv_hw, layer.dwconv_w, layer.dwconv_h):
        last = first + conv.out_channels
        height, width = conv.kernel_size
        rows = slice(5 - height // 2, 6 + height // 2)
        kernel[first:last, :, rows, 5 - width // 2 : 6 + width // 2] = conv.weight.detach()
        assert conv.bias is not None
        bias[first:last] = conv.bias.detach()
        first = last
    return kernel, bias


def milliseconds(layers: dict[str, nn.Module]) -> dict[str, float]:
    """Return each layer's median time in its faster memory format."""
    x = torch.randn(8, 96, 56, 56)
    formats = {False: x, True: x.contiguous(memory_format=torch.channels_last)}
    times: dict[tuple[str, bool], list[float]] = {(name, last): [] for name in layers for last in formats}
    with torch.inference_mode():
        for turn in range(ROUNDS + 2):
            for name, layer in layers.items():
                for last, images in formats.items():
                    started = time.perf_counter()
                    layer(images)
                    if turn >= 2:
                        times[name, last].append(1000 * (time.perf_counter() - started))
    return {name: min(statistics.median(times[name, last]) for last in formats) for name in layers}


def run(check: Check) -> None:
    """Measure counts, the mixer against two other ways of writing it, and its time."""
    for name, (parameters, macs) in PUBLISHED.items():
        cost = count_cost(create_model(name, device="meta"), (3, 224, 224))
        error = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: parameters off the published ones by", error, "<=", PARAMETER_ERROR)
        check.require(
            f"{name}: multiply-adds off the published ones by", abs(cost.macs / macs - 1), "<=", MACS_ERROR
        )

    torch.manual_seed(0)
    layer = InceptionDepthwiseConv2d(48)
    x = torch.randn(2, 48, 13, 17)
    with torch.no_grad():
        y = layer(x)
        rest, *parts = x.split(layer.splits, 1)
        convs = (layer.dwconv_hw, layer.dwconv_w, layer.dwconv_h)
        looped = [
            loop(part.double(), conv.weight.double(), conv.bias.double())
            for part, conv in zip(parts, convs, strict=True)
            if conv.bias is not None
        ]
        explicit = torch.cat([rest.double(), *looped], 1)
        kernel, bias = dense_kernel(layer, 48)
        dense = F.conv2d(x, kernel, bias, padding=5, groups=48)
    check.require(
        "difference from split, loops and concatenation", (y - explicit).abs().max(), "<=", DENSE_ERROR
    )
    check.require(
        "difference from one 11x11 depthwise convolution", (y - dense).abs().max(), "<=", DENSE_ERROR
    )
    changed = (y[:, : layer.splits[0]] != x[:, : layer.splits[0]]).sum()
    check.require("changed values in the channels that pass", changed, "==", 0)

    macs = count_cost(InceptionDepthwiseConv2d(96), (96, 56, 56)).macs / (96 * 56 * 56)
    square = nn.Conv2d(96, 96, 7, padding=3, groups=96)
    full = count_cost(square, (96, 56, 56)).macs / (96 * 56 * 56)
    check.require("multiply-adds a pixel and channel", macs, "==", MACS_PER_VALUE, baseline=full)
    check.require("share of a 7x7 depthwise convolution, to three places", round(macs / full, 3), "==", SHARE)

    times = milliseconds({"inception": InceptionDepthwiseConv2d(96), "square": square})
    check.require(
        "time over that of a 7x7 depthwise convolution", times["inception"] / times["square"], "<", LATENCY,
        baseline=1.0,
    )  # fmt: skip
    check.note(f"Milliseconds for 8 maps: {times['inception']:.2f} against {times['square']:.2f}.")

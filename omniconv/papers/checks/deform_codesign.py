"""Deformable convolution may be made depthwise, bounded and square for small hardware: every step costs less there, and
hardly any accuracy, and all of them stay ahead of an ordinary convolution where objects turn and change their size.

The digits are 2,000 of MNIST's test set and 2,000 others, turned by up to 60 degrees and scaled by 0.5 to 1.1, once
each. Offsets are bounded to 2 pixels there, for the maps have 10 x 10; the exact parts use other bounds.
"""

import gzip
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.deform_hardware import deform_cost, simulate_line_buffer
from omniconv.layers.conv.deform_hardware import HardwareDeformConv2d
from omniconv.ops.deform.api import deform_aggregate, deform_conv2d
from omniconv.ops.deform.offsets import square_offset
from omniconv.papers.check import Check, shared_data
from omniconv.papers.small import Split, accuracy, standardise, train

CONV_ERROR = 1e-6
LOOP_ERROR = 1e-5
BUFFER_ERROR = 1e-12
CLOSE = 2.0
GAIN = 1.0
SEEDS = (0, 1, 2)
EPOCHS = 6
IMAGES = 2000
LADDER: dict[str, dict[str, object]] = {
    "full": {},
    "depthwise": {"depthwise": True},
    "bounded": {"depthwise": True, "bound": 2.0},
    "square": {"depthwise": True, "bound": 2.0, "square": True},
}
BANDWIDTH, MACS = 4e9, 1e11


def rest_error() -> float:
    """Return the largest difference of any variant from its ordinary convolution while the offsets are zero."""
    x = torch.randn(2, 5, 9, 8, generator=generator(0, "rest"), dtype=torch.float64)
    worst = 0.0
    for depthwise, square, rounded in itertools.product((False, True), repeat=3):
        for bound in (None, 1.5):
            torch.manual_seed(0)
            layer = HardwareDeformConv2d(
                5, 6, depthwise=depthwise, square=square, bound=bound, rounded=rounded, dtype=torch.float64
            )
            middle = layer.pointwise(x)
            wanted = F.conv2d(middle, layer.weight, layer.bias, padding=1, groups=6 if depthwise else 1)
            worst = max(worst, float((layer(x) - wanted).detach().abs().max()))
    return worst


def loops(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """Return the deformable convolution of one image, sample by sample and pixel by pixel."""
    _, channels, height, width = x.shape
    y = torch.zeros(1, weight.shape[0], height, width, dtype=x.dtype)
    for i, j, k in itertools.product(range(height), range(width), range(9)):
        row = i + k // 3 - 1 + float(offset[0, 2 * k, i, j])
        column = j + k % 3 - 1 + float(offset[0, 2 * k + 1, i, j])
        sample = torch.zeros(channels, dtype=x.dtype)
        for v in (math.floor(row), math.floor(row) + 1):
            for u in (math.floor(column), math.floor(column) + 1):
                if 0 <= v < height and 0 <= u < width:
                    sample += (1 - abs(row - v)) * (1 - abs(column - u)) * x[0, :, v, u]
        y[0, :, i, j] += weight[:, :, k // 3, k % 3] @ sample
    return y


def dilation_error() -> float:
    """Return the largest difference of a square kernel stretched by s from a convolution of dilation s + 1."""
    random = generator(0, "dilation")
    x = torch.randn(2, 4, 11, 9, generator=random, dtype=torch.float64)
    weight = torch.randn(5, 4, 3, 3, generator=random, dtype=torch.float64)
    worst = 0.0
    for stretch in range(4):
        offset = square_offset(torch.full((2, 1, 11, 9), float(stretch), dtype=torch.float64))
        wanted = F.conv2d(x, weight, padding=stretch + 1, dilation=stretch + 1)
        worst = max(worst, float((deform_conv2d(x, offset, weight, padding=1) - wanted).abs().max()))
    return worst


def buffered(bound: float | None, rounded: bool) -> tuple[float, int]:
    """Return by how much the simulated accelerator's samples err, and how many of its counts the cost model misses."""
    random = generator(0, "buffer")
    height, width, channels = 17, 12, 3
    x = torch.randn(1, channels, height, width, generator=random, dtype=torch.float64)
    offset = 4 * torch.randn(1, 18, height, width, generator=random, dtype=torch.float64)
    offset = offset if bound is None else offset.clamp(-bound, bound)
    offset = offset.round() if rounded else offset
    wanted = deform_aggregate(x, offset, padding=1, keep_taps=True)[0]
    trace = simulate_line_buffer(x[0].numpy(), offset[0].numpy(), bound=bound, rounded=rounded)
    cost = deform_cost(channels, channels, height, width, bound=bound, rounded=rounded)
    counts = ("random_reads", "sequential_reads", "buffer_reads")
    wrong = sum(getattr(trace, count) != getattr(cost, count) for count in counts)
    return float(np.abs(trace.samples - wanted.numpy()).max()), wrong


def digits() -> tuple[Split, Split]:
    """Return (train, test) of digits on 20 x 20 pixels, each turned and scaled once."""
    folder = shared_data("mnist")
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    images = torch.tensor(np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)).float()
    y = torch.tensor(np.frombuffer(labels, np.uint8, offset=8)).long()
    random = generator(0, "turned digits")
    angle = (2 * torch.rand(len(y), generator=random) - 1) * math.pi / 3
    size = 0.5 + 0.6 * torch.rand(len(y), generator=random)
    cos, sin = angle.cos() / size, angle.sin() / size
    none = torch.zeros_like(angle)
    turns = torch.stack([torch.stack([cos, -sin, none], 1), torch.stack([sin, cos, none], 1)], 1)
    grid = F.affine_grid(turns, [len(y), 1, 20, 20], align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    order = torch.randperm(len(y), generator=random)
    images, y = images[order], y[order]
    images = standardise(images, images[:IMAGES])
    return (images[:IMAGES], y[:IMAGES]), (images[-IMAGES:], y[-IMAGES:])


def make_network(seed: int, form: dict[str, object] | None) -> nn.Module:
    """Return a stem and two layers of a form of deformable convolution, or of ordinary convolution if None."""
    torch.manual_seed(derive(seed, "weights"))

    def layer(in_channels: int, out_channels: int) -> list[nn.Module]:
        if form is None:
            conv: nn.Module = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        else:
            conv = HardwareDeformConv2d(in_channels, out_channels, **form)  # type: ignore[arg-type]
        return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]

    stem = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(*stem, *layer(16, 24), *layer(24, 32), *head)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure the variants, the hardware's model and simulation, and a small training."""
    check.require(
        "difference of 16 variants at rest from ordinary convolutions", rest_error(), "<=", CONV_ERROR
    )
    random = generator(0, "loops")
    x = torch.randn(1, 3, 7, 6, generator=random, dtype=torch.float64)
    offset = 2 * torch.randn(1, 18, 7, 6, generator=random, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=random, dtype=torch.float64)
    error = float((deform_conv2d(x, offset, weight, padding=1) - loops(x, offset, weight)).abs().max())
    check.require("difference of the full form from loops, borders included", error, "<=", LOOP_ERROR)
    leaves = tuple(t.clone().requires_grad_() for t in (x, offset, weight))
    right = gradcheck(lambda *t: deform_conv2d(*t, padding=1), leaves, raise_exception=False)
    check.require("gradients of map, offsets and kernels are those of finite differences", right, "==", 1)
    error = dilation_error()
    check.require(
        "difference of a kernel stretched by s from dilation s + 1, s up to 3", error, "<=", CONV_ERROR
    )

    cuts = []
    for channels in (16, 64, 256):
        full, depthwise = (deform_cost(channels, channels, 8, 8, depthwise=d).macs for d in (False, True))
        cuts.append(full * (9 + channels) == depthwise * 9 * channels)
    check.require(
        "of 3 widths C, those where depthwise cuts multiply-adds by 9 C / (9 + C)", sum(cuts), "==", 3
    )
    results = [buffered(bound, rounded) for bound in (None, 1.0, 2.5, 5.0) for rounded in (False, True)]
    error = max(found for found, _ in results)
    check.require(
        "difference of samples that may only be read from the line buffer", error, "<=", BUFFER_ERROR
    )
    wrong = sum(found for _, found in results)
    check.require("counts of 24 that differ from the cost model", wrong, "==", 0)
    seconds = [
        deform_cost(64, 64, 32, 32, **form).latency(bandwidth=BANDWIDTH, macs=MACS)  # type: ignore[arg-type]
        for form in LADDER.values()
    ]
    falling = sum(a > b for a, b in itertools.pairwise(seconds))
    check.require("of 3 steps from full to square, those that cut the latency", falling, "==", 3)
    microseconds = ", ".join(f"{name} {1e6 * s:.0f}" for name, s in zip(LADDER, seconds, strict=True))
    check.note(f"modelled microseconds at 4 GB/s and 100 G multiply-adds a second: {microseconds}")

    images, test = digits()
    forms: dict[str, dict[str, object] | None] = {"plain": None, **LADDER}
    scores: dict[str, list[float]] = {name: [] for name in forms}
    for seed in SEEDS:
        for name, form in forms.items():
            model = make_network(seed, form)
            train(model, images, epochs=EPOCHS, lr=5e-3, seed=seed, shift=0, flip=False)
            scores[name].append(accuracy(model, test))
    means = {name: sum(found) / len(found) for name, found in scores.items()}
    ladder = [means[name] for name in LADDER]
    check.require(
        "accuracies of full, depthwise, bounded and square, largest less smallest, mean of 3 seeds",
        max(ladder) - min(ladder), "<=", CLOSE, baseline=means["full"], unit="points",
    )  # fmt: skip
    for name in LADDER:
        check.require(
            f"accuracy of {name} minus that of ordinary convolutions",
            means[name] - means["plain"], ">=", GAIN, baseline=means["plain"], unit="points",
        )  # fmt: skip
    check.note(f"accuracies {scores}")

"""Gates and convolutions as large as the map mix all pixels at a cost of L log L, and replace or precede attention in a
small vision transformer that has few pictures to learn from.

The small training sees 2,000 pictures of CIFAR-10. All networks have the same depth, width and tokens, patches of 4 x 4
pixels; attention spends the parameters that Hyena needs more in its pointwise layers.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.sequence.hyena_nd import HyenaNd
from omniconv.ops.long_conv.api import long_conv
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, cifar10, train

ERROR = 1e-5
SLOPES = (0.9, 1.3)
ATTENTION_SLOPE = 1.7
SIZES = (32, 48, 64, 96)
PARAMETERS = 0.02
GAIN = 2.0
HYBRID = -0.5
WIDTH = 32
DEPTH = 3
HIDDEN = 2 * WIDTH
EPOCHS = 5
SEEDS = (0, 1, 2)


class Attention(nn.Module):
    """Self-attention of 4 heads over the pixels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, 3 * channels, 1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix all pixels."""
        n, c = x.shape[:2]
        q, k, v = self.project(x).reshape(n, 3, 4, c // 4, -1).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.mix(y.transpose(2, 3).reshape(x.shape))


class Block(nn.Module):
    """Pre-norm transformer block over maps, with any mixer."""

    def __init__(self, mixer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norms = nn.ModuleList(nn.GroupNorm(1, WIDTH) for _ in range(2))
        self.mlp = nn.Sequential(nn.Conv2d(WIDTH, hidden, 1), nn.GELU(), nn.Conv2d(hidden, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix pixels, then channels."""
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Tokens(nn.Module):
    """Patches of 4 x 4 pixels and a learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(WIDTH, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens as a map."""
        return self.patches(x) + self.position


def count(module: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def hyena() -> nn.Module:
    """Return the mixer as the paper uses it, small networks for its kernels."""
    return HyenaNd(WIDTH, width=32)


def make_network(seed: int, mixers: str) -> nn.Module:
    """Return a transformer whose blocks are (h)yena or (a)ttention, all of the same number of parameters."""
    torch.manual_seed(derive(seed, "weights"))
    spare = count(hyena()) - count(Attention(WIDTH))
    wider = HIDDEN + round(spare / (2 * WIDTH + 1))
    blocks = [Block(hyena(), HIDDEN) if m == "h" else Block(Attention(WIDTH), wider) for m in mixers]
    head = (nn.GroupNorm(1, WIDTH), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
    return nn.Sequential(Tokens(), *blocks, *head)


def convolution_error() -> float:
    """Return the largest difference from torch's convolution of padded maps, relative to the largest output."""
    worst = 0.0
    for h, w in ((1, 1), (7, 5), (32, 32), (33, 64)):
        torch.manual_seed(h)
        x, kernel = torch.randn(2, 3, h, w), torch.randn(3, h, w)
        padded = F.pad(x.double(), (w - 1, 0, h - 1, 0))
        direct = F.conv2d(padded, kernel.double().flip(1, 2)[:, None], groups=3)
        for impl in ("torch", "chunked"):
            y = long_conv(x, kernel, impl=impl)
            worst = max(worst, float((y - direct).abs().max() / direct.abs().max()))
    return worst


def wrong_pixels(directions: Any) -> int:
    """Return how many (output, input) pairs of pixels depend on each other and should not, or the reverse."""
    torch.manual_seed(0)
    layer = HyenaNd(
        3, order=3 if directions == "alternate" else 2, directions=directions, dtype=torch.float64
    )
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    wrong = 0
    for i in range(6):
        for j in range(7):
            (gradient,) = torch.autograd.grad(layer(x)[0, :, i, j].sum(), x)
            seen = gradient[0].abs().amax(0) > 1e-12
            wanted = torch.ones(6, 7, dtype=torch.bool)
            if directions == "causal":
                wanted = (torch.arange(6)[:, None] <= i) & (torch.arange(7) <= j)
            wrong += int((seen != wanted).sum())
    return wrong


def slope(layer: Callable[[Tensor], Tensor], rounds: int = 5) -> float:
    """Return the exponent of time against the number of pixels, from medians of interleaved rounds."""
    maps = [torch.randn(1, 32, size, size) for size in SIZES]
    times: list[list[float]] = [[] for _ in maps]
    with torch.no_grad():
        for _ in range(rounds + 1):
            for x, found in zip(maps, times, strict=True):
                began = time.perf_counter()
                layer(x)
                found.append(time.perf_counter() - began)
    medians = [statistics.median(found[1:]) for found in times]
    logs = torch.tensor([[size**2 for size in SIZES], medians], dtype=torch.float64).log()
    pixels, seconds = logs - logs.mean(1, keepdim=True)
    return float((pixels * seconds).sum() / pixels.square().sum())


def run(check: Check) -> None:
    """Measure the convolution, what pixels see, ranks, the cost's slope, and a small training of three networks."""
    check.require(
        "relative difference of the convolution from the direct one", convolution_error(), "<=", ERROR
    )
    for directions in ("causal", "alternate", "all"):
        name = f"pairs of pixels that are wrongly connected or not, directions {directions}"
        check.require(name, wrong_pixels(directions), "==", 0)
    torch.manual_seed(0)
    for product in (True, False):
        kernels = HyenaNd(16, product=product, dtype=torch.float64).filter((16, 15))
        ranks = torch.linalg.matrix_rank(kernels, rtol=1e-9)
        if product:
            check.require("largest rank of product kernels", int(ranks.max()), "==", 1)
        else:
            check.require("least rank of joint kernels", int(ranks.min()), ">", 1)

    exponent = slope(HyenaNd(32))
    check.require("exponent of Hyena's time against pixels, 32 x 32 to 96 x 96", exponent, ">=", SLOPES[0])
    check.require("the same", exponent, "<=", SLOPES[1])
    check.require("exponent of attention's time", slope(Attention(32)), ">", ATTENTION_SLOPE)

    kinds = {"h" * DEPTH: "Hyena", "a" * DEPTH: "attention", "h" * (DEPTH - 1) + "a": "hybrid"}
    counts = [count(make_network(0, kind)) for kind in kinds]
    check.require("largest share by which parameters differ", max(counts) / min(counts) - 1, "<=", PARAMETERS)
    pictures, test = cifar10(2000, 2000)
    scores: dict[str, list[float]] = {name: [] for name in kinds.values()}
    for seed in SEEDS:
        for kind, name in kinds.items():
            model = make_network(seed, kind)
            train(model, pictures, epochs=EPOCHS, seed=seed)
            scores[name].append(accuracy(model, test))
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    check.require(
        "accuracy of Hyena minus attention, 2,000 pictures, mean of 3 seeds",
        means["Hyena"] - means["attention"], ">=", GAIN, baseline=means["attention"], unit="points",
    )  # fmt: skip
    best = max(means["Hyena"], means["attention"])
    check.require(
        "accuracy of the hybrid minus the better of both", means["hybrid"] - best, ">=", HYBRID,
        baseline=best, unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}")

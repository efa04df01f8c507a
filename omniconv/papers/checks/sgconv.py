"""A kernel as long as the sequence needs parameters that grow with the logarithm of the length, and weights that decay
with the distance; then it remembers what local kernels of as many parameters cannot.

Recall: the first of 128 symbols says the class, the others are noise of another alphabet, and the answer is read at
the last step. Decay: scikit-learn's digits at 16 x 16 pixels, one pixel a step, with the same network and recipe.
"""

import time
from functools import partial
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.sequence.block import GatedBlock
from omniconv.layers.sequence.sgconv import SGConv
from omniconv.ops.depthwise_conv.api import depthwise_conv
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, digits, train

DIRECT_ERROR = {torch.float32: 1e-5, torch.float64: 1e-10}
# An FFT mixes all steps, so that its causality is exact up to rounding alone.
LEAK = 1e-12
ENVELOPE = 0.05
SLOPE = 1.15
RECALL_GAIN = 10.0
DECAY_GAIN = 0.0
SEEDS = (0, 1, 2)
WIDTH = 16


def direct_error(dtype: torch.dtype) -> float:
    """Return the largest relative difference from sums over lags, of outputs with and without a past."""
    torch.manual_seed(0)
    layer = SGConv(4, 256, 16).to(dtype)
    x = torch.randn(2, 4, 256, dtype=dtype)
    with torch.no_grad():
        y, kernel = layer(x).double(), layer.kernel().double()
        lags = torch.arange(256)[:, None] - torch.arange(256)
        matrix = torch.where(lags >= 0, kernel[:, lags.clamp(min=0)], 0.0)
        wanted = torch.einsum("cts,ncs->nct", matrix, x.double()) + layer.skip.double()[:, None] * x
    return float((y - wanted).abs().max() / wanted.abs().max())


def leak() -> float:
    """Return by how much outputs before step 100 change when the inputs from there on do, in float64."""
    torch.manual_seed(0)
    layer = SGConv(4, 256, 16).double()
    x = torch.randn(1, 4, 256, dtype=torch.float64)
    other = torch.cat([x[..., :100], torch.randn(1, 4, 156, dtype=torch.float64)], -1)
    return float((layer(x) - layer(other))[..., :100].detach().abs().max())


def envelope_error(upsampling: str, first: int) -> float:
    """Return how far the ratios of mean |k| between neighbouring sub-kernels, from `first` on, are from alpha."""
    torch.manual_seed(0)
    layer = SGConv(128, 4096, 64, decay=0.5, upsampling=upsampling)
    kernel = layer.kernel().detach().abs()
    edges = [0] + [64 * 2**i for i in range(layer.weight.shape[2])]
    means = [float(kernel[:, a:b].mean()) for a, b in pairwise(edges)][first:]
    return max(abs(b / a / 0.5 - 1) for a, b in pairwise(means))


@torch.no_grad()
def slopes() -> tuple[float, float]:
    """Return the slopes of log time over log length of SGConv, 1k to 64k, and of attention, 256 to 4k."""
    torch.manual_seed(0)
    calls: list = []
    for exponent in range(10, 17):
        calls.append((SGConv(16, 2**exponent, 64), torch.randn(1, 16, 2**exponent)))
    for exponent in range(8, 13):
        q = torch.randn(1, 1, 2**exponent, 16)
        calls.append((lambda x: F.scaled_dot_product_attention(x, x, x), q))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(9):
        for (layer, x), seconds in zip(calls, times, strict=True):
            started = time.perf_counter()
            layer(x)
            seconds.append(time.perf_counter() - started)
    logs = np.log([median(s[2:]) for s in times])
    own = np.polyfit(np.arange(10, 17) * np.log(2), logs[:7], 1)[0]
    return float(own), float(np.polyfit(np.arange(8, 13) * np.log(2), logs[7:], 1)[0])


class LocalConv(nn.Module):
    """Causal depthwise convolution of K taps with a skip, as many parameters as SGConv has."""

    def __init__(self, channels: int, taps: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, taps, device=device, dtype=dtype) / taps**0.5)
        self.skip = nn.Parameter(torch.randn(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        padded = F.pad(x, (self.weight.shape[2] - 1, 0))
        return depthwise_conv(padded, self.weight) + self.skip[:, None] * x


class Network(nn.Module):
    """Two gated blocks between a linear map of every step and a linear classifier of the last or the mean step."""

    def __init__(self, inputs: int, classes: int, inner, *, last: bool) -> None:
        super().__init__()
        self.embed = nn.Conv1d(inputs, WIDTH, 1)
        self.blocks = nn.Sequential(*(GatedBlock(inner, WIDTH) for _ in range(2)))
        self.head = nn.Linear(WIDTH, classes)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Classify (N, C, L)."""
        y = self.blocks(self.embed(x))
        return self.head(y[..., -1] if self.last else y.mean(2))


def recall(count: int, name: str, length: int = 128) -> Split:
    """Return one-hot sequences (N, 16, L): one of 8 symbols, then noise of 8 others; the first is the class."""
    random = generator(0, "recall", name)
    symbols = torch.randint(8, (count, length), generator=random)
    labels = symbols[:, 0].clone()
    symbols[:, 1:] += 8
    return F.one_hot(symbols, 16).float().transpose(1, 2), labels


def trained(seed: int, data: tuple[Split, Split], inner, *, last: bool, epochs: float) -> float:
    """Return the test accuracy of a network with these inner layers."""
    torch.manual_seed(derive(seed, "weights"))
    training, test = data
    model = Network(training[0].shape[1], int(training[1].max()) + 1, inner, last=last)
    train(model, training, epochs=epochs, batch=64, lr=5e-3, seed=seed, shift=0, flip=False)
    return accuracy(model, test)


def run(check: Check) -> None:
    """Measure counts, sums, causality, envelope and cost, then recall and decay."""
    right = [SGConv(3, 2**e, 32).weight.numel() == 3 * 32 * (1 + e - 5) for e in range(6, 17)]
    check.require("lengths 2^6 to 2^16 with d (1 + log2(L / d)) parameters a channel", sum(right), "==", 11)
    for dtype, most in DIRECT_ERROR.items():
        check.require(f"difference from a direct causal sum, {dtype}", direct_error(dtype), "<=", most)
    check.require("change of outputs before a change of the input, float64", leak(), "<=", LEAK)
    # Interpolation smooths noise, and only from the third sub-kernel on by the same share.
    for upsampling, first in (("nearest", 0), ("linear", 2)):
        name = f"error of the ratio alpha between mean |k| of neighbouring sub-kernels, {upsampling}"
        check.require(name, envelope_error(upsampling, first), "<=", ENVELOPE)
    own, attention = slopes()
    check.require("slope of log time over log length", own, "<=", SLOPE, baseline=attention)

    task = recall(2000, "train"), recall(1000, "test")
    sgconv = partial(SGConv, WIDTH, 128, 4)
    local = partial(LocalConv, WIDTH, sgconv().weight[0, 0].numel())
    scores = [[trained(s, task, inner, last=True, epochs=6) for s in SEEDS] for inner in (sgconv, local)]
    ours, other = (sum(values) / len(values) for values in scores)
    check.require(
        "accuracy minus that of local kernels with as many parameters, recall of the first of 128 symbols",
        ours - other, ">=", RECALL_GAIN, baseline=other, unit="points",
    )  # fmt: skip
    check.note(f"recall: SGConv {scores[0]}, local {scores[1]}; chance is 12.5")

    (x, y), (test, labels) = digits(16)
    pixels = (x.flatten(2), y), (test.flatten(2), labels)
    forms = [partial(SGConv, WIDTH, 256, 8, decay=decay) for decay in (0.5, 1.0)]
    scores = [[trained(s, pixels, inner, last=False, epochs=12) for s in SEEDS] for inner in forms]
    ours, other = (sum(values) / len(values) for values in scores)
    check.require(
        "accuracy with decay 1/2 minus without decay, digits pixel by pixel, mean of 3 seeds",
        ours - other, ">", DECAY_GAIN, baseline=other, unit="points",
    )  # fmt: skip
    check.note(f"digits: with decay {scores[0]}, without {scores[1]}")

"""A convolution with a kernel as long as the sequence costs L log L, its Fourier transform is a product of
block-diagonal matrices that can be learned, and squashing small taps to zero makes freely learned kernels generalise.

The small training reads the digits of scikit-learn, enlarged to 16 x 16, as sequences of 256 pixels. Roughness is the
total variation of a kernel's magnitude spectrum over its mean magnitude.
"""

import statistics
import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.sequence.block import GatedBlock
from omniconv.layers.sequence.long_conv import Butterfly, LongConv, squash
from omniconv.ops.long_conv.api import long_conv
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, digits, train

LENGTHS = (1, 2, 3, 7, 31, 64, 127, 1000, 1023, 2047, 4096)
ERRORS = {torch.float32: 1e-5, torch.float64: 1e-10}
BUTTERFLY_ERROR = 1e-4
LEARNED_ERROR = 1e-5
SLOPES = (0.9, 1.25)
ROUGHNESS = 0.7
GAIN = 3.0
SQUASH = 0.003
CHANNELS = 24
EPOCHS = 8
SEEDS = (0, 1, 2)


def convolution_error(dtype: torch.dtype) -> float:
    """Return the largest difference from the direct sum of any length, relative to the largest output."""
    worst = 0.0
    for length in LENGTHS:
        torch.manual_seed(length)
        x, kernel = (
            torch.randn(2, 3, length, dtype=torch.float64),
            torch.randn(3, length, dtype=torch.float64),
        )
        x, kernel = x.to(dtype), kernel.to(dtype)
        direct = F.conv1d(F.pad(x.double(), (length - 1, 0)), kernel.double().flip(1)[:, None], groups=3)
        for impl in ("torch", "chunked", "monarch"):
            y = long_conv(x, kernel, impl=impl)
            worst = max(worst, float((y - direct).abs().max() / direct.abs().max()))
    return worst


def butterfly_error() -> float:
    """Return the largest difference between butterflies of two and three factors and the FFT."""
    worst = 0.0
    for points, order in ((256, 2), (4096, 2), (512, 3), (4096, 3)):
        torch.manual_seed(points)
        layer = Butterfly(points, order)
        z = torch.randn(4, points, dtype=torch.complex64) / points**0.5
        # Frequencies come as the digits of time did, the first digit counting least.
        f = torch.view_as_complex(layer(torch.view_as_real(z)).detach()).unflatten(1, layer.factors)
        f = f.permute(0, *range(order, 0, -1)).flatten(1)
        worst = max(worst, float((f - torch.fft.fft(z)).abs().max()))
    return worst


def learned_difference() -> float:
    """Return how far a layer with learned transforms is from the plain layer before any training."""
    torch.manual_seed(0)
    learned, plain = LongConv(8, 300, butterfly=2), LongConv(8, 300)
    plain.load_state_dict(learned.state_dict(), strict=False)
    x = torch.randn(2, 8, 300)
    return float((learned(x) - plain(x)).detach().abs().max())


def seconds(lengths: list[int], channels: int = 32, rounds: int = 9) -> list[float]:
    """Return median times of the convolution, the lengths taken in turn."""
    calls = [(torch.randn(1, channels, n), torch.randn(channels, n)) for n in lengths]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, found in zip(calls, times, strict=True):
            repeats = max(1, 2**15 // call[0].shape[2])
            began = time.perf_counter()
            for _ in range(repeats):
                long_conv(*call)
            found.append((time.perf_counter() - began) / repeats)
    return [statistics.median(found[1:]) for found in times]


def make_network(seed: int, threshold: float) -> nn.Module:
    """Return two blocks of long convolution over the pixels of an image, read row by row."""
    torch.manual_seed(derive(seed, "weights"))
    inner = partial(LongConv, CHANNELS, 256, squash=threshold)
    blocks = [GatedBlock(inner, CHANNELS) for _ in range(2)]
    head = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(1, CHANNELS, 1), *blocks, *head)


@torch.no_grad()
def roughness(model: nn.Module) -> float:
    """Return the mean roughness of the spectra of all kernels that are not zero."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LongConv):
            spectrum = torch.fft.rfft(module.eval().taps(), 512).abs()
            spectrum = spectrum[spectrum.sum(1) > 0]
            found.append(spectrum.diff(dim=1).abs().mean(1) / spectrum.mean(1))
    return float(torch.cat(found).mean())


def run(check: Check) -> None:
    """Measure errors, the cost's slope, the soft threshold, and a small training with and without it."""
    for dtype, limit in ERRORS.items():
        check.require(
            f"relative difference from the direct sum, {dtype}", convolution_error(dtype), "<=", limit
        )
    check.require("difference between butterflies and the FFT", butterfly_error(), "<=", BUTTERFLY_ERROR)
    check.require(
        "difference between learned and plain transforms at the start",
        learned_difference(), "<=", LEARNED_ERROR,
    )  # fmt: skip

    kernel = torch.randn(64, 1000)
    analytic = kernel.sign() * (kernel.abs() - 0.5).clamp(min=0)
    difference = float((squash(kernel, 0.5) - analytic).abs().max())
    check.require("difference between squash and the soft threshold", difference, "==", 0)

    lengths = [2**i for i in range(10, 17)]
    logs = torch.tensor([lengths, seconds(lengths)], dtype=torch.float64).log()
    steps, times = logs - logs.mean(1, keepdim=True)
    slope = float((steps * times).sum() / steps.square().sum())
    check.require("exponent of time against length, 1k to 64k", slope, ">=", SLOPES[0])
    check.require("the same", slope, "<=", SLOPES[1])

    images, test = digits(16)
    scores: dict[float, list[float]] = {SQUASH: [], 0.0: []}
    rough: dict[float, list[float]] = {SQUASH: [], 0.0: []}
    for seed in SEEDS:
        for threshold in scores:
            model = make_network(seed, threshold)
            train(model, images, epochs=EPOCHS, seed=seed, shift=1, flip=False)
            scores[threshold].append(accuracy(model, test))
            rough[threshold].append(roughness(model))
    gains = {threshold: statistics.fmean(values) for threshold, values in scores.items()}
    roughs = {threshold: statistics.fmean(values) for threshold, values in rough.items()}
    check.require(
        "roughness of trained kernels' spectra with squash over that without, mean of 3 seeds",
        roughs[SQUASH] / roughs[0.0], "<=", ROUGHNESS, baseline=1.0,
    )  # fmt: skip
    check.require(
        "accuracy with squash minus without, digits as sequences, mean of 3 seeds",
        gains[SQUASH] - gains[0.0], ">=", GAIN, baseline=gains[0.0], unit="points",
    )  # fmt: skip
    check.note(f"accuracies with squash {scores[SQUASH]}, without {scores[0.0]}")
    check.note(f"roughness with squash {rough[SQUASH]}, without {rough[0.0]}")

"""Two filters a channel, used again at every scale, are one long causal convolution of few parameters and
near-linear cost, and classify spoken digits from the waveform as a TCN of the same reach does.

The recordings are those of the Free Spoken Digit Dataset, 0.5 s at 8 kHz; takes 0 to 4 of each speaker and digit are
the test set, as its authors say. Both networks cut the waveform into 127 steps by the same strided convolution and see
all of them; recipe, budget, width and seeds are the same.
"""

import io
import tarfile
import time
import wave
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.sequence.block import GatedBlock
from omniconv.layers.sequence.multires import MultiresConv, multires_depth
from omniconv.papers.check import Check, shared_data
from omniconv.papers.small import Split, accuracy, train

HAAR_ERROR = 1e-6
KERNEL_ERROR = 1e-5
STEP_ERROR = 1e-5
SLOPE = 1.15
MARGIN = -1.0
SHARE = 1 / 3
SEEDS = (0, 1, 2)
STEPS = 127
WIDTH = 32


def count(parameters) -> int:
    """Return how many numbers there are."""
    return sum(p.numel() for p in parameters)


def haar_error(length: int = 300) -> float:
    """Return the largest difference of the tree's details from the undecimated Haar transform, by block sums."""
    torch.manual_seed(0)
    layer = MultiresConv(1, 2, 128, wavelet=True)
    x = torch.randn(1, 1, length)
    sums = np.concatenate([np.zeros(257), np.cumsum(x[0, 0].double().numpy())])
    end, worst = np.arange(length) + 257, 0.0
    for level in range(1, layer.depth + 1):
        with torch.no_grad():
            layer.weight.copy_(torch.eye(layer.weight.shape[1])[1 + level])
        half = 2 ** (level - 1)
        newer, older = sums[end] - sums[end - half], sums[end - half] - sums[end - 2 * half]
        wanted = (older - newer) * 2 ** (-level / 2)
        worst = max(worst, float(np.abs(layer(x)[0, 0].detach().numpy() - wanted).max()))
    return worst


def long_kernel(layer: MultiresConv) -> np.ndarray:
    """Return the kernels (C, span) of a fading memory, as products of polynomials in the delay."""
    filters, weight = (p.detach().double().numpy() for p in (layer.filters, layer.weight))
    taps = filters.shape[2]
    span = (taps - 1) * (2**layer.depth - 1) + 1
    kernels = np.zeros((len(filters), span))
    for c, (low, high) in enumerate(filters):
        kernels[c, 0] = weight[c, 0]
        product = np.ones(1)
        for level in range(layer.depth):
            spread = np.zeros((2, (taps - 1) * 2**level + 1))
            spread[:, :: 2**level] = low, high
            detail = np.convolve(product, spread[1])
            kernels[c, : len(detail)] += weight[c, 2 + level] * detail
            product = np.convolve(product, spread[0])
        kernels[c] += weight[c, 1] * product
    return kernels


def kernel_errors() -> tuple[float, float]:
    """Return how far the impulse response is from the long kernel, and the output from convolution with it by FFT."""
    response, output = 0.0, 0.0
    for taps, length in ((2, 200), (4, 500)):
        torch.manual_seed(taps)
        layer = MultiresConv(5, taps, length)
        kernels = long_kernel(layer)
        steps = kernels.shape[1] + 40
        with torch.no_grad():
            impulse = layer(F.one_hot(torch.tensor(0), steps).float().expand(1, 5, steps))[0].numpy()
            x = torch.randn(2, 5, steps)
            y = layer(x).numpy()
        scale = np.abs(kernels).max()
        response = max(
            response, np.abs(impulse[:, :-40] - kernels).max() / scale, np.abs(impulse[:, -40:]).max()
        )
        fft = np.fft.irfft(np.fft.rfft(x.numpy(), 2 * steps) * np.fft.rfft(kernels, 2 * steps), 2 * steps)[
            ..., :steps
        ]
        output = max(output, np.abs(y - fft).max() / np.abs(fft).max())
    return float(response), float(output)


def earlier_change() -> float:
    """Return how much outputs before step 100 change when the inputs from there on do."""
    torch.manual_seed(0)
    layers = MultiresConv(4, 3, 300), MultiresConv(4, 2, 300, memory_size=40)
    x = torch.randn(1, 4, 300)
    other = torch.cat([x[..., :100], torch.randn(1, 4, 200)], -1)
    return max(float((layer(x) - layer(other))[..., :100].detach().abs().max()) for layer in layers)


def step_error(steps: int = 500) -> float:
    """Return the largest difference between outputs step by step and all at once, both memories."""
    worst = 0.0
    for memory in (None, 64):
        torch.manual_seed(0)
        layer = MultiresConv(8, 4, steps, memory_size=memory)
        x = torch.randn(2, 8, steps)
        state = layer.initial_state(2)
        y = torch.stack([layer.step(x[..., t], state) for t in range(steps)], -1)
        worst = max(worst, float((y - layer(x)).detach().abs().max()))
    return worst


@torch.no_grad()
def slope() -> float:
    """Return the slope of log time over log length, where the tree grows with the sequence."""
    lengths = [2**e for e in range(10, 17)]
    torch.manual_seed(0)
    calls = [(MultiresConv(16, 2, length), torch.randn(1, 16, length)) for length in lengths]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(12):
        for (layer, x), seconds in zip(calls, times, strict=True):
            started = time.perf_counter()
            layer(x)
            seconds.append(time.perf_counter() - started)
    return float(np.polyfit(np.log(lengths), np.log([median(s[2:]) for s in times]), 1)[0])


def spoken_digits() -> tuple[Split, Split]:
    """Return (train, test) of waveforms (N, 1, 4096) of unit power, the end cut off or filled with zeros."""
    parts: tuple[list, list] = ([], [])
    with tarfile.open(shared_data("audio") / "fsdd-george-jackson-nicolas.tar.xz") as tar:
        for member in tar:
            if not member.name.endswith(".wav") or (file := tar.extractfile(member)) is None:
                continue
            digit, _, take = member.name.rsplit("/", 1)[-1][:-4].split("_")
            with wave.open(io.BytesIO(file.read())) as recording:
                samples = np.frombuffer(recording.readframes(4096), "<i2").astype(np.float32)
            x = torch.zeros(1, 4096)
            x[0, : len(samples)] = torch.tensor(samples / np.sqrt(np.mean(samples**2)))
            parts[int(take) < 5].append((member.name, x, int(digit)))
    split = [sorted(part, key=lambda row: row[0]) for part in parts]
    training, test = (
        (torch.stack([r[1] for r in rows]), torch.tensor([r[2] for r in rows])) for rows in split
    )
    return training, test


class TcnBlock(nn.Module):
    """Residual block of two causal dilated convolutions of two taps, after Bai et al. 2018."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 2, dilation=dilation) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))
        self.dropout = nn.Dropout1d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve twice and add."""
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = self.dropout(F.relu(norm(conv(F.pad(y, (self.dilation, 0))))))
        return F.relu(x + y)


def make_network(seed: int, name: str) -> nn.Module:
    """Return stem, body, mean over time and classifier."""
    torch.manual_seed(derive(seed, "weights"))
    if name == "tcn":
        body: list[nn.Module] = [TcnBlock(2**level) for level in range(6)]
    else:
        body = [GatedBlock(partial(MultiresConv, WIDTH, 2, STEPS), WIDTH, dropout=0.1) for _ in range(2)]
    return nn.Sequential(
        nn.Conv1d(1, WIDTH, 64, stride=32), *body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(WIDTH, 10)
    )


def temporal_parameters(model: nn.Module) -> int:
    """Return the number of parameters that mix over time, behind the stem."""
    return sum(
        count(m.parameters()) if isinstance(m, MultiresConv) else m.weight.numel()
        for m in model[1:].modules()  # pyright: ignore[reportIndexIssue]
        if isinstance(m, MultiresConv) or (isinstance(m, nn.Conv1d) and m.kernel_size[0] > 1)
    )


def run(check: Check) -> None:
    """Measure counts, the tree, its kernel, causality, steps, cost, and spoken digits."""
    sizes = [(2, 784), (2, 1024), (4, 1024), (4, 16384), (3, 100)]
    right = [
        count(MultiresConv(6, k, length).parameters()) == 6 * (2 * k + multires_depth(length, k) + 2)
        for k, length in sizes
    ]
    check.require("sizes with exactly 2k + J + 2 parameters a channel", sum(right), "==", len(sizes))
    check.require("difference from the undecimated Haar transform", haar_error(), "<=", HAAR_ERROR)
    response, output = kernel_errors()
    check.require(
        "impulse response against the kernel of (k - 1)(2^J - 1) + 1 taps", response, "<=", KERNEL_ERROR
    )
    check.require("output against an FFT convolution with that kernel", output, "<=", KERNEL_ERROR)
    check.require("change of outputs before a change of the input", earlier_change(), "==", 0)
    check.require("difference between step by step and batch over 500 steps", step_error(), "<=", STEP_ERROR)
    check.require("slope of log time over log length, 1k to 64k", slope(), "<=", SLOPE)

    tcn, multires = (make_network(0, name) for name in ("tcn", "multires"))
    share = temporal_parameters(multires) / temporal_parameters(tcn)
    check.require("temporal parameters over those of the TCN", share, "<=", SHARE)
    training, test = spoken_digits()
    scores: dict[str, list[float]] = {"multires": [], "tcn": []}
    for seed in SEEDS:
        for name, values in scores.items():
            model = make_network(seed, name)
            train(model, training, epochs=6, batch=16, lr=4e-3, seed=seed, shift=0, flip=False)
            values.append(accuracy(model, test))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    check.require(
        "accuracy minus that of a TCN of equal reach, spoken digits, mean of 3 seeds",
        means["multires"] - means["tcn"], ">=", MARGIN, baseline=means["tcn"], unit="points",
    )  # fmt: skip
    check.note(
        f"accuracies {scores['multires']} with {count(multires.parameters())} parameters in all, "
        f"TCN {scores['tcn']} with {count(tcn.parameters())}"
    )

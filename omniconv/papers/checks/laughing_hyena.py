"""Long filters of a trained network become recurrences of few states: filters that are recurrences are found exactly,
no error falls below the Hankel singular value that bounds it, a step costs the same however long ago the sequence
began, and a trained Hyena gives the same answers after distillation at order 16.

The tiny Hyena reads the 64 pixels of a digit one after the other; its filters' networks start with slow sines, so that
kernels are smooth.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from omniconv.compress.factor.hankel import hankel_singular_values
from omniconv.compress.factor.laughing_hyena import distill, distill_filters
from omniconv.core.seeds import derive, generator
from omniconv.layers.sequence.block import GatedBlock
from omniconv.layers.sequence.hyena_nd import HyenaNd
from omniconv.ops.long_conv.api import long_conv
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, digits, train

RECOVERED = 1e-3
FACTOR = 3.0
STREAM_ERROR = 1e-4
STEPS = 2048
SLOPE = 0.1
CACHE_SLOPE = 0.5
ORDER = 16
LOGITS = 0.01
ANSWERS = 99.0
SEEDS = (0, 1, 2)
EPOCHS = 15.0

TIMES = (512, 1024, 2048, 4096, 8192)
WINDOW = 64


def state_space_filters(order: int, length: int = 256, count: int = 8) -> Tensor:
    """Return filters of random stable state-space models with conjugate poles, from the formula."""
    random = generator(order, "filters")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, order // 2, dtype=torch.float64, generator=random)

    poles = torch.polar(uniform(0.6, 0.97), uniform(0.0, torch.pi))
    residues = torch.complex(uniform(-1, 1), uniform(-1, 1))
    taps = (residues[..., None] * poles[..., None] ** torch.arange(length - 1)).sum(1).real
    return torch.cat([uniform(-1, 1)[:, :1], taps], 1)


def relative_errors(kernel: Tensor, order: int) -> list[float]:
    """Return the relative error of every filter's recurrence."""
    fitted = distill_filters(kernel, order).kernel(kernel.shape[1]).detach()
    return ((fitted - kernel).norm(dim=1) / kernel.norm(dim=1)).tolist()


def hankel_ratios(kernel: Tensor, order: int) -> Tensor:
    """Return the Hankel norms of the errors over the singular values that bound them from below."""
    difference = distill_filters(kernel, order).kernel(kernel.shape[1]).detach() - kernel
    return hankel_singular_values(difference)[:, 0] / hankel_singular_values(kernel)[:, order]


def stream_error() -> float:
    """Return the largest difference of 2048 steps from the convolution by FFT, relative to the largest output."""
    kernel = state_space_filters(ORDER, STEPS).float()
    filters = distill_filters(kernel, ORDER, steps=0)
    x = torch.randn(2, len(kernel), STEPS, generator=generator(0, "stream"))
    state, outputs = filters.initial_state(2), []
    with torch.no_grad():
        for now in x.unbind(2):
            y, state = filters.step(now, state)
            outputs.append(y)
        wanted = long_conv(x, filters.kernel(STEPS), impl="torch")
    return float((torch.stack(outputs, 2) - wanted).abs().max() / wanted.abs().max())


def time_slope(step: Callable[[int], object]) -> float:
    """Return the exponent of a step's time against the number of steps before it, from medians."""
    medians = []
    for start in TIMES:
        found = []
        for t in range(start - WINDOW, start):
            began = time.perf_counter()
            step(t)
            found.append(time.perf_counter() - began)
        medians.append(statistics.median(found))
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (TIMES, medians))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def step_slopes() -> tuple[float, float]:
    """Return the exponents of a recurrence's step and of a convolution that keeps all inputs."""
    channels, batch = 64, 8
    kernel = state_space_filters(ORDER, 512, channels).float()
    filters = distill_filters(kernel, ORDER, steps=0)
    x = torch.randn(batch, channels, TIMES[-1], generator=generator(0, "times"))
    backwards = torch.randn(channels, TIMES[-1], generator=generator(1, "times"))
    state = [filters.initial_state(batch)]

    def recur(t: int) -> None:
        _, state[0] = filters.step(x[..., t], state[0])

    def cached(t: int) -> Tensor:
        return (x[..., : t + 1] * backwards[:, -t - 1 :]).sum(-1)

    with torch.no_grad():
        return time_slope(recur), time_slope(cached)


class PixelHyena(nn.Module):
    """Two blocks of causal Hyena over the pixels of an image, read row by row."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        hyena = partial(HyenaNd, channels, 1, directions="causal", width=16, frequency=1.0)
        self.embed = nn.Conv1d(1, channels, 1)
        self.blocks = nn.Sequential(*(GatedBlock(hyena, channels) for _ in range(2)))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.blocks(self.embed(x.flatten(2))).mean(2))


def run(check: Check) -> None:
    """Measure recovery, the Hankel bound, streaming, the cost of a step, and a trained network."""
    kernel = state_space_filters(8)
    check.require(
        "relative error of order-8 filters at 8 states", max(relative_errors(kernel, 8)), "<=", RECOVERED
    )
    check.require("the same at 4 states, best filter", min(relative_errors(kernel, 4)), ">", RECOVERED)

    kernel = state_space_filters(24)
    ratios = torch.stack([hankel_ratios(kernel, order) for order in (4, 8, 12)])
    check.require("Hankel error over the bound, least of 24", float(ratios.min()), ">=", 1 - 1e-9)
    check.require("the same, largest", float(ratios.max()), "<=", FACTOR)

    check.require(
        "relative difference of 2048 steps from the convolution", stream_error(), "<=", STREAM_ERROR
    )
    recurrent, cached = step_slopes()
    check.require("exponent of a step's time against the steps before it", recurrent, "<", SLOPE)
    check.require("the same of a convolution with all inputs kept", cached, ">", CACHE_SLOPE)

    training, test = digits()
    differences, agreements, scores = [], [], []
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "weights"))
        model = PixelHyena()
        train(model, training, epochs=EPOCHS, batch=64, lr=5e-3, seed=seed, shift=0, flip=False)
        scores.append(accuracy(model, test))
        distilled, _ = distill(model, test[0][:1], ORDER)
        with torch.no_grad():
            wanted, logits = model.eval()(test[0]), distilled.eval()(test[0])
        differences.append(float((logits - wanted).norm() / wanted.norm()))
        agreements.append(100 * float((logits.argmax(1) == wanted.argmax(1)).double().mean()))
    check.require(
        "relative difference of logits after distillation at 16 states, worst of 3 seeds",
        max(differences), "<=", LOGITS,
    )  # fmt: skip
    check.require("equal answers, worst of 3 seeds", min(agreements), ">=", ANSWERS, unit="%")
    check.note(f"accuracies {scores}, differences of logits {differences}")

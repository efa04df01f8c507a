"""Without a bound on its masks, deformable aggregation learns what softmax-bounded masks cannot express, and loops that
work out a position once for all channels of its group run three times as fast as one grid_sample of all samples.

The operator is held against loops over pixels, against a depthwise convolution, and against DCNv3 composed as its
public code does in plain PyTorch.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.models.factory import create_model
from omniconv.ops.deform.api import deform_aggregate
from omniconv.papers.check import Check

ERROR = 1e-6
GRADIENT_ERROR = 1e-4
FIT_ERROR = 1e-3
WORSE = 10
SPEEDUP = 3
PARAMETERS = {"tiny": 30e6, "small": 50e6, "base": 97e6, "large": 223e6}
COUNT_ERROR = 0.02
SEEDS = (0, 1, 2)
IMPLS = ("torch", "compiled")
LAPLACIAN = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])


def draw(n: int, channels: int, height: int, width: int, groups: int, dtype=torch.float64) -> list[Tensor]:
    """Return normal maps, offsets and masks of a 3x3 kernel."""
    random = generator(0, "dcnv4", channels, height)
    shapes = ((n, channels), (n, 18 * groups), (n, 9 * groups))
    return [torch.randn(*shape, height, width, generator=random, dtype=dtype) for shape in shapes]


def loops(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Return the aggregation of a 3x3 kernel, sample by sample and pixel by pixel."""
    n, channels, height, width = x.shape
    groups = mask.shape[1] // 9
    y = torch.zeros_like(x)
    for b in range(n):
        for g in range(groups):
            part = slice(g * channels // groups, (g + 1) * channels // groups)
            for i in range(height):
                for j in range(width):
                    for k in range(9):
                        at = 9 * g + k
                        row = i + k // 3 - 1 + float(offset[b, 2 * at, i, j])
                        column = j + k % 3 - 1 + float(offset[b, 2 * at + 1, i, j])
                        for v in (math.floor(row), math.floor(row) + 1):
                            for u in (math.floor(column), math.floor(column) + 1):
                                if 0 <= v < height and 0 <= u < width:
                                    share = (1 - abs(row - v)) * (1 - abs(column - u))
                                    y[b, part, i, j] += mask[b, at, i, j] * share * x[b, part, v, u]
    return y


def composed(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Return the same by `grid_sample` of all samples, as DCNv3's public code does in plain PyTorch."""
    n, channels, height, width = x.shape
    groups = mask.shape[1] // 9
    moved = offset.view(n * groups, 9, 2, height, width)
    tap = torch.arange(9).view(9, 1, 1)
    rows = torch.arange(height).view(-1, 1) + tap // 3 - 1 + moved[:, :, 0]
    columns = torch.arange(width) + tap % 3 - 1 + moved[:, :, 1]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    maps = x.reshape(n * groups, channels // groups, height, width)
    samples = F.grid_sample(maps, grid.view(n * groups, 9 * height, width, 2), align_corners=False)
    samples = samples.view(n * groups, -1, 9, height, width) * mask.view(n * groups, 1, 9, height, width)
    return samples.sum(2).view(x.shape)


def worst(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference."""
    return float((found - wanted).abs().max())


def depthwise_error(impl: str) -> float:
    """Return the difference from a depthwise convolution without offsets and with constant masks."""
    x, offset, _ = draw(2, 6, 9, 7, 3)
    taps = torch.randn(3, 9, generator=generator(0, "taps"), dtype=torch.float64)
    mask = taps.view(1, 27, 1, 1).expand(2, 27, 9, 7)
    kernel = taps.repeat_interleave(2, 0).view(6, 1, 3, 3)
    found = deform_aggregate(x, torch.zeros_like(offset), mask, padding=1, impl=impl)
    return worst(found, F.conv2d(x, kernel, padding=1, groups=6))


class Aggregation(nn.Module):
    """One group, offsets and masks linear in the pixel, no projections."""

    def __init__(self, channels: int, *, softmax: bool) -> None:
        super().__init__()
        self.found = nn.Conv2d(channels, 27, 1)
        self.softmax = softmax
        nn.init.zeros_(self.found.weight)
        nn.init.zeros_(self.found.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate `x`."""
        offset, mask = self.found(x).split((18, 9), 1)
        return deform_aggregate(x, offset, mask.softmax(1) if self.softmax else mask, padding=1)


def fit_error(seed: int, *, softmax: bool, channels: int = 8, steps: int = 600) -> float:
    """Return the squared error, over the target's, with which an aggregation learns the Laplacian of noise."""
    torch.manual_seed(derive(seed, "weights"))
    random = generator(seed, "laplacian")
    model = Aggregation(channels, softmax=softmax)
    kernel = LAPLACIAN.expand(channels, 1, 3, 3)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def error() -> Tensor:
        x = torch.randn(8, channels, 12, 12, generator=random)
        target = F.conv2d(x, kernel, padding=1, groups=channels)
        return (model(x) - target).square().mean() / target.square().mean()

    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        error().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(error())


def seconds(calls: dict[str, Callable[[], object]], rounds: int = 21) -> dict[str, float]:
    """Return the median seconds of every call, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def speedups(groups: int = 8) -> tuple[float, float]:
    """Return how many times as fast the loops are, in a forward pass and in a training step, at 56 x 56 x 128."""
    tensors = draw(1, 128, 56, 56, groups, torch.float32)
    last = [t.contiguous(memory_format=torch.channels_last) for t in tensors]

    def training(run: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        weights = torch.randn_like(tensors[0])
        return lambda: torch.autograd.grad((run(*leaves) * weights).sum(), leaves)

    def compiled(*tensors: Tensor) -> Tensor:
        return deform_aggregate(*tensors, padding=1, impl="compiled")

    with torch.no_grad():
        once = seconds({"compiled": lambda: compiled(*last), "composed": lambda: composed(*tensors)})
    steps = seconds({"compiled": training(compiled, last), "composed": training(composed, tensors)})
    return once["composed"] / once["compiled"], steps["composed"] / steps["compiled"]


def run(check: Check) -> None:
    """Measure the operator, its gradients, its special cases, its expressive power and its speed."""
    x, offset, mask = draw(1, 6, 7, 5, 2)
    wanted = loops(x, 2 * offset, mask)
    bounded = mask.unflatten(1, (-1, 9)).softmax(2).flatten(1, 2)
    leaves = tuple(t.clone().requires_grad_() for t in (x, offset, mask))
    for impl in IMPLS:
        found = deform_aggregate(x, 2 * offset, mask, padding=1, impl=impl)
        check.require(f"{impl}: difference from loops over samples", worst(found, wanted), "<=", ERROR)
        right = gradcheck(
            lambda *t, impl=impl: deform_aggregate(*t, padding=1, impl=impl), leaves,
            rtol=GRADIENT_ERROR, atol=GRADIENT_ERROR, raise_exception=False,
        )  # fmt: skip
        check.require(f"{impl}: gradients of map, offsets and masks within 1e-4", right, "==", 1)
        error = depthwise_error(impl)
        check.require(f"{impl}: difference from a depthwise convolution at rest", error, "<=", ERROR)
        error = worst(
            deform_aggregate(x, offset, bounded, padding=1, impl=impl), composed(x, offset, bounded)
        )
        check.require(f"{impl}: difference from DCNv3 with masks out of a softmax", error, "<=", ERROR)

    errors = {softmax: [fit_error(seed, softmax=softmax) for seed in SEEDS] for softmax in (False, True)}
    free, bound = max(errors[False]), min(errors[True])
    check.require(
        "relative squared error on a Laplacian with free masks, worst of 3 seeds",
        free, "<", FIT_ERROR, baseline=bound,
    )  # fmt: skip
    check.require("error with softmax, best of 3 seeds, over that", bound / free, ">", WORSE)

    once, step = speedups()
    check.require("speed over grid_sample at 56 x 56 x 128, 8 groups", once, ">=", SPEEDUP, unit="times")
    check.note(f"a training step is {step:.1f} times as fast")

    for name, published in PARAMETERS.items():
        model = create_model(f"flash_internimage_{name}", device="meta")
        error = abs(sum(p.numel() for p in model.parameters()) / published - 1)
        check.require(
            f"FlashInternImage {name}: parameters, share off {published:.0f}", error, "<=", COUNT_ERROR
        )

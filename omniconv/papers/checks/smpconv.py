"""A kernel made of moving points is a function of position that needs n (C + d + 1) parameters at any size, and with
few points spans a sequence that a small kernel of as many parameters cannot.

The task is the adding problem over 400 steps: the answer, read at the last step, is the sum of the two numbers that
are marked, one in each half of the sequence.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.conv.depthwise import DepthwiseConv1d
from omniconv.layers.conv.smpconv import SMPConv1d, SMPConv2d, smp_parameter_groups
from omniconv.layers.sequence.block import GatedBlock
from omniconv.papers.check import Check

LOOP_ERROR = 1e-6
SHIFT_ERROR = 1e-6
GRADIENT_ERROR = 1e-3
LOSS_SHARE = 0.2
SEEDS = (0, 1, 2)
LENGTH = 400
WIDTH = 16
POINTS = 16
STEPS = 300
BATCH = 32


def loop_error() -> float:
    """Return the largest difference of kernels from a loop over nodes and points."""
    worst = 0.0
    for make, size, average in ((SMPConv2d, 9, False), (SMPConv1d, 21, True)):
        torch.manual_seed(0)
        layer = make(3, size, 12, average=average, std=0.5, radius=0.5)
        position, radius, weight = (p.detach().numpy() for p in (layer.position, layer.radius, layer.weight))
        kernel = layer.kernel().detach().numpy()
        for node in np.ndindex(*kernel.shape[1:]):
            u = -1 + 2 * np.array(node) / (size - 1)
            bumps = [max(0.0, 1 - np.abs(u - p).sum() / r) for p, r in zip(position, radius, strict=True)]
            active = max(1, sum(b > 0 for b in bumps)) if average else 1
            wanted = sum(w * b for w, b in zip(weight.T, bumps, strict=True)) / active
            worst = max(worst, float(np.abs(kernel[(slice(None), *node)] - wanted).max()))
    return worst


def shift_error() -> float:
    """Return how far a kernel whose points moved by one cell is from the kernel moved by one cell, inside."""
    torch.manual_seed(0)
    layer = SMPConv2d(4, 31)
    with torch.no_grad():
        before = layer.kernel()
        layer.position[:, 0] += 2 / 30
        return float((layer.kernel()[:, 1:] - before[:, :-1]).abs().max() / before.abs().max())


def gradient_error(step: float = 1e-6) -> float:
    """Return the largest relative difference of position and radius gradients from central differences."""
    torch.manual_seed(0)
    layer = SMPConv2d(3, 13, 10, radius=0.3).double()
    probe = torch.randn(3, 13, 13, dtype=torch.float64)
    worst = 0.0
    for parameter in (layer.position, layer.radius):
        (exact,) = torch.autograd.grad((layer.kernel() * probe).sum(), parameter)
        numbers, differences = (
            parameter.detach().view(-1),
            torch.empty(parameter.numel(), dtype=torch.float64),
        )
        for i in range(len(numbers)):
            ends = []
            for change in (step, -2 * step):
                numbers[i] += change
                ends.append(float((layer.kernel() * probe).detach().sum()))
            numbers[i] += step
            differences[i] = (ends[0] - ends[1]) / (2 * step)
        worst = max(worst, float((exact.view(-1) - differences).abs().max() / exact.abs().max()))
    return worst


def count(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def adding(count: int, *names: str | int) -> tuple[Tensor, Tensor]:
    """Return (N, 2, L), uniform numbers and two marks, and the sums of the marked numbers."""
    random = generator(0, "adding", *names)
    numbers, marks = torch.rand(count, LENGTH, generator=random), torch.zeros(count, LENGTH)
    half = LENGTH // 2
    for start in (0, half):
        marks.scatter_(1, start + torch.randint(half, (count, 1), generator=random), 1.0)
    return torch.stack([numbers, marks], 1), (numbers * marks).sum(1)


class LastStep(nn.Module):
    """Linear map of the last step to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, L) to (N,)."""
        return self.linear(x[..., -1])[:, 0]


def small_kernel(*, device=None, dtype=None) -> nn.Module:
    """Return a causal depthwise convolution with as many parameters as the SMPConv."""
    taps = POINTS * (WIDTH + 2) // WIDTH
    conv = DepthwiseConv1d(WIDTH, taps, bias=False, device=device, dtype=dtype)
    return nn.Sequential(nn.ConstantPad1d((taps - 1, 0), 0.0), conv)


def points(*, device=None, dtype=None) -> nn.Module:
    """Return a causal SMPConv over the whole sequence, whose points begin spread over it."""
    return SMPConv1d(
        WIDTH, LENGTH, POINTS, causal=True, average=True, std=0.5, radius=0.25, device=device, dtype=dtype
    )


def final_loss(seed: int, inner) -> float:
    """Return the test loss after training; the variance of the answer is 1 / 6."""
    torch.manual_seed(derive(seed, "weights"))
    blocks = [GatedBlock(inner, WIDTH) for _ in range(2)]
    model = nn.Sequential(nn.Conv1d(2, WIDTH, 1), nn.GELU(), *blocks, LastStep())
    optimizer = torch.optim.AdamW(smp_parameter_groups(model, 5e-3))
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=STEPS, pct_start=0.2)
    for step in range(STEPS):
        x, y = adding(BATCH, seed, step)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, y = adding(1000, "test")
        return float(F.mse_loss(model(x), y))


def run(check: Check) -> None:
    """Measure the kernel, its gradients and counts, and the adding problem."""
    check.require("difference of kernels from a loop over nodes and points", loop_error(), "<=", LOOP_ERROR)
    check.require("change beside the shift when points move by one cell", shift_error(), "<=", SHIFT_ERROR)
    check.require("error of position and radius gradients", gradient_error(), "<=", GRADIENT_ERROR)
    sizes = [(31, 96), (29, 192), (27, 384), (13, 768)]
    right = [count(SMPConv2d(c, k)) == k**2 // 4 * (c + 3) < k**2 * c for k, c in sizes]
    check.require("stages of SMP-T with k^2 / 4 (C + 3) parameters, fewer than k^2 C", sum(right), "==", 4)
    apart = count(SMPConv2d(64, 31, 42)) - count(SMPConv2d(64, 13, 42))
    check.require(
        "parameters of a 31 x 31 kernel less those of a 13 x 13 one with as many points", apart, "==", 0
    )
    layer = SMPConv2d(8, 13)
    shared = float((layer.kernel(25)[:, ::2, ::2] - layer.kernel()).detach().abs().max())
    check.require("difference of a kernel at twice the resolution at shared nodes", shared, "==", 0)

    ours, other = count(points()), count(small_kernel())
    check.require("parameters less those of the small kernel", ours - other, "<=", 0)
    losses = [[final_loss(seed, inner) for seed in SEEDS] for inner in (points, small_kernel)]
    own, baseline = (sum(values) / len(values) for values in losses)
    check.require(
        "loss of the adding problem over 400 steps as a share of the small kernel's, mean of 3 seeds",
        own / baseline, "<", LOSS_SHARE, baseline=baseline,
    )  # fmt: skip
    check.note(
        f"losses {losses[0]}, small kernel of {other // WIDTH} taps {losses[1]}; the mean scores 0.167"
    )

"""Kernels that the features themselves modulate give every layer a full view whose weights depend on the context, and
a network without residual additions, strides or pooling that learns as well as a residual one.

Trained are a Terminator and a residual network of at least as many parameters on scikit-learn's digits, 8 x 8 pixels,
as images and one pixel a step, with the same recipe and budget.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.conv.hyperzzw import SlowFastBlock, global_hyperzzw
from omniconv.layers.conv.terminator import Terminator
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, digits, train

LOOP_ERROR = 1e-5
MEAN = 1e-5
CHANGE = 0.05
REACHED = {2: 95.0, 1: 90.0}
MARGIN = -1.0
GRADIENTS = 10.0
SEEDS = (0, 1, 2)
CHANNELS = 6


def loop_error() -> float:
    """Return the largest difference of global products from loops over positions, for images and sequences."""
    torch.manual_seed(0)
    worst = 0.0
    for sizes in ((6, 6), (5, 8), (16,), (21,)):
        x, mixed, kernel = torch.randn(2, 3, *sizes), torch.randn(2, 3, *sizes), torch.randn(3, *sizes)
        y = global_hyperzzw(x, mixed, kernel)
        side = max(sizes) if len(sizes) == 2 else next(s for s in range(99) if s * s >= sizes[0])
        positions = list(itertools.product(*map(range, sizes)))
        # Where a position lies in the square, and back.
        place = {p: p if len(p) == 2 else divmod(p[0], side) for p in positions}
        at = {where: p for p, where in place.items()}
        for p in positions:
            row, column = place[p]
            wanted = torch.zeros(2, 3)
            for inner in range(side):
                if (row, inner) in at and (inner, column) in at:
                    a, b = (slice(None), *at[row, inner]), (slice(None), slice(None), *at[inner, column])
                    wanted += kernel[a] * x[(slice(None), *a)] * mixed[b]
            worst = max(worst, float((y[(slice(None), slice(None), *p)] - wanted).abs().max()))
    return worst


def make_block(axes: int) -> SlowFastBlock:
    """Return a block in eval mode and float64."""
    torch.manual_seed(0)
    return SlowFastBlock(2, 4, axes).double().eval()


def change(function: Callable[[Tensor], Tensor], *shape: int) -> float:
    """Return the relative difference of a function's Jacobians at two random inputs."""
    torch.manual_seed(1)
    first, second = (jacobian(function, torch.randn(shape, dtype=torch.float64)) for _ in range(2))
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    return float((first - second).norm() / first.norm())


def support(axes: int) -> float:
    """Return the share of pairs of an output and an input with a derivative, after one block."""
    torch.manual_seed(1)
    x = torch.randn(1, 2, *((25,), (6, 7))[axes - 1], dtype=torch.float64)
    matrix = jacobian(make_block(axes), x)
    assert isinstance(matrix, Tensor)
    return float((matrix != 0).double().mean())


def largest_mean() -> float:
    """Return the largest mean of a channel of the branches as they are joined, over samples and channels."""
    torch.manual_seed(0)
    block, seen = SlowFastBlock(4, 6), []
    block.compress.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(torch.randn(5, 4, 9, 8) * 3 + 2)
    return float(seen[0].detach().mean((2, 3)).abs().max())


def gradient_ratio(seed: int, training: Split) -> float:
    """Return the norm of the first block's gradients over the last one's before training, or its inverse if larger."""
    torch.manual_seed(derive(seed, "gradients"))
    model = Terminator(1, 10, CHANNELS)
    F.cross_entropy(model(training[0][:128]), training[1][:128]).backward()
    first, last = (
        torch.stack([p.grad.norm() for p in block.parameters() if p.grad is not None]).norm()
        for block in (model.blocks[0], model.blocks[-1])
    )
    return float(max(first / last, last / first))


class Residual(nn.Module):
    """Two convolutions with batch norm, added to the input."""

    def __init__(self, axes: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(axes, width, width), nn.ReLU(), *_conv(axes, width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return F.relu(x + self.body(x))


def _conv(axes: int, inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    # Nine taps either way; three blocks of them see nearly the whole sequence.
    if axes == 1:
        return nn.Conv1d(inputs, outputs, 9, padding=4, bias=False), nn.BatchNorm1d(outputs)
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def make_residual(axes: int, least: int) -> nn.Module:
    """Return the narrowest residual network of three blocks with at least so many parameters."""
    for width in itertools.count(4):
        blocks = [Residual(axes, width) for _ in range(3)]
        mean = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[axes - 1](1)
        model = nn.Sequential(
            *_conv(axes, 1, width), nn.ReLU(), *blocks, mean, nn.Flatten(), nn.Linear(width, 10)
        )
        if count(model) >= least:
            return model
    raise AssertionError


def scores(axes: int, training: Split, test: Split) -> tuple[list[float], list[float]]:
    """Return the test accuracies of Terminator and residual network."""
    values: tuple[list[float], list[float]] = ([], [])
    for seed in SEEDS:
        for index, kept in enumerate(values):
            torch.manual_seed(derive(seed, "weights"))
            model: nn.Module = Terminator(1, 10, CHANNELS, axes=axes)
            if index:
                model = make_residual(axes, count(model))
            train(model, training, epochs=10, batch=64, lr=5e-3, seed=seed, shift=0, flip=False)
            kept.append(accuracy(model, test))
    return values


def run(check: Check) -> None:
    """Measure the operator, what depends on what, means, and digits."""
    check.require("difference of global products from loops", loop_error(), "<=", LOOP_ERROR)
    block = make_block(2)
    kernel = block.slow_local[1](5, 5).detach()[:, None]
    own = change(block, 1, 2, 6, 6)
    check.require("relative change of the Jacobian from one input to another", own, ">", CHANGE)
    fixed = change(lambda x: F.conv2d(x, kernel, padding=2, groups=2), 1, 2, 6, 6)
    check.require("the same for an implicit kernel without context", fixed, "==", 0)
    for axes, what in ((2, "an image"), (1, "a sequence")):
        name = f"share of inputs that an output depends on after one block, {what}"
        check.require(name, support(axes), "==", 1)
    check.require("largest mean of a channel of the joined branches", largest_mean(), "<", MEAN)

    training, test = digits()
    ratios = [gradient_ratio(seed, training) for seed in SEEDS]
    name = "ratio of gradient norms of the first and the last block, either way"
    check.require(name, max(ratios), "<=", GRADIENTS)
    for axes, what in ((2, "digits"), (1, "digits pixel by pixel")):
        splits = [(x.flatten(2), y) if axes == 1 else (x, y) for x, y in (training, test)]
        ours, other = scores(axes, *splits)
        mean, baseline = (sum(values) / len(values) for values in (ours, other))
        name = f"accuracy of a small Terminator, {what}, mean of 3 seeds"
        check.require(name, mean, ">=", REACHED[axes], baseline=baseline, unit="%")
        name = f"its accuracy minus that of a residual network, {what}"
        check.require(name, mean - baseline, ">=", MARGIN, baseline=baseline, unit="points")
        check.note(f"{what}: Terminator {ours}, residual network {other}")

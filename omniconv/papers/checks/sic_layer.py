"""One kernel a channel and a projection, full, within a grid of channels or at fewer pixels, cost what the closed forms
say and serve nearly as well as dense convolutions of several times the multiply-adds.

Costs are a pixel's, at n channels: k^2 n^2 for a dense convolution, k^2 n + n^2 for a single intra-channel one,
k^2 n + c n with c neighbours on the grid, and n + n^2 / s^2 + n for the bottleneck. The small training sees
Fashion-MNIST averaged to 14 x 14 pixels; both networks have the same depth, widths, recipe and seeds.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.layers.conv.sic import SICUnit, SpatialBottleneck, TopologicalProjection
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

MASKED, COMPOSED = 1e-6, 1e-5
SHARE = 1 / 4
MARGIN = -1.5
SEEDS = (0, 1)

PIXELS, KERNEL, STRIDE = 16, 3, 2
GRIDS = {64: ((8, 8), (4, 4, 4)), 128: ((8, 16), (4, 4, 8))}


class _Products(TorchDispatchMode):
    """Counts products of elements, which the counter of convolutions leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.addcmul.default):
            self.count += result.numel()
        return result


def macs(layer: nn.Module, channels: int) -> float:
    """Return the multiply-adds a pixel."""
    shape = (channels, PIXELS, PIXELS)
    with torch.no_grad(), _Products() as products:
        layer(torch.randn(1, *shape))
    return (count_cost(layer, shape).macs + products.count) / PIXELS**2


def wrong_costs() -> int:
    """Return how many layers cost other than their closed form says."""
    wrong = 0
    for n, grids in GRIDS.items():
        layers: list[tuple[nn.Module, float]] = [
            (nn.Conv2d(n, n, KERNEL, padding=1, bias=False), KERNEL**2 * n * n),
            (SICUnit(n, n, KERNEL), KERNEL**2 * n + n * n),
            (SpatialBottleneck(n, STRIDE), n + n * n / STRIDE**2 + n),
        ]
        for grid in grids:
            window = (3,) * len(grid)
            unit = SICUnit(n, n, KERNEL, grid=grid, window=window)
            layers.append((unit, KERNEL**2 * n + math.prod(window) * n))
        wrong += sum(macs(layer, n) != formula for layer, formula in layers)
    return wrong


@torch.no_grad()
def masked_error() -> tuple[float, int]:
    """Return how far projections are from dense ones under the mask of their windows, and wrong counts of weights."""
    worst, wrong = 0.0, 0
    for grid in (*GRIDS[64], *GRIDS[128]):
        torch.manual_seed(0)
        window, channels = (3,) * len(grid), math.prod(grid)
        layer = TopologicalProjection(grid, window)
        # Whether two places are neighbours on the ring of an axis; on all axes at once by Kronecker products.
        mask = torch.ones(1, 1)
        for size in grid:
            steps = (torch.arange(size)[:, None] - torch.arange(size)).abs()
            mask = torch.kron(mask, (torch.minimum(steps, size - steps) <= 1).float())
        dense = torch.zeros(channels, channels)
        for place, seen in enumerate(layer.indices):
            dense[torch.arange(channels), seen] = layer.weight[place]
        x = torch.randn(2, channels, 5, 4)
        difference = layer(x) - F.conv2d(x, (dense * mask)[:, :, None, None])
        worst = max(worst, float(difference.abs().max()))
        wrong += int((dense * mask != 0).sum()) != channels * math.prod(window)
    return worst, wrong


@torch.no_grad()
def composed_error() -> float:
    """Return how far a unit is from the dense convolution that its factors and shortcut make."""
    torch.manual_seed(0)
    unit, x = SICUnit(16, 16), torch.randn(2, 16, 9, 7)
    project = unit.project.get_parameter("weight")
    dense = torch.einsum("oc,cuv->ocuv", project[:, :, 0, 0], unit.spatial.weight[:, 0])
    dense[torch.arange(16), torch.arange(16), 1, 1] += 1
    return float((unit(x) - F.conv2d(x, dense, padding=1)).abs().max())


def make_network(seed: int, *, sic: bool) -> nn.Module:
    """Return a plain network of four convolutions, the last three of them SIC units if `sic`."""
    torch.manual_seed(derive(seed, "weights"))
    layers: list[nn.Module] = [nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    for channels, out, stride in ((24, 24, 1), (24, 48, 2), (48, 48, 1)):
        if sic:
            layers.append(SICUnit(channels, out, stride=stride))
        else:
            layers.append(nn.Conv2d(channels, out, 3, stride, 1, bias=False))
        layers += [nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def run(check: Check) -> None:
    """Measure costs, the forms' equality with dense ones, and a small training."""
    check.require(
        "layers of 64 and 128 channels that cost other than the closed form", wrong_costs(), "==", 0
    )
    error, wrong = masked_error()
    check.require("difference from a 1x1 convolution under the windows' mask", error, "<=", MASKED)
    check.require("grids with another number of weights than predicted", wrong, "==", 0)
    check.require("difference from the dense convolution of the factors", composed_error(), "<=", COMPOSED)

    small, dense = (count_cost(make_network(0, sic=sic), (1, 14, 14)).macs for sic in (True, False))
    check.require(
        "multiply-adds of the network of SIC units over the dense one's", small / dense, "<=", SHARE
    )
    images, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(12000, 10000))
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for sic in scores:
            model = make_network(seed, sic=sic)
            train(model, images, epochs=5, lr=5e-3, seed=seed, shift=1)
            scores[sic].append(accuracy(model, test))
    means = {sic: sum(values) / len(values) for sic, values in scores.items()}
    check.require(
        "accuracy of SIC units minus that of dense convolutions, Fashion-MNIST, mean of 2 seeds",
        means[True] - means[False], ">=", MARGIN, baseline=means[False], unit="points",
    )  # fmt: skip
    check.note(f"accuracies of SIC units {scores[True]}, dense {scores[False]}")

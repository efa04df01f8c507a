"""A depthwise convolution with a kernel for every place costs what one kernel for all does, and beats it with a third
of the multiply-adds where the place matters, but not where it says nothing.

Handwritten digits of 8 x 8 pixels lie in a picture of 16 x 16. In the first task a digit fills a quadrant, and the
class is the digit plus the quadrant's number, modulo ten. In the control the digit lies anywhere, wrapped around the
edges, and the class is the digit. Both networks have the same depth, recipe and seeds.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.layers.conv.reparam import reparameterize
from omniconv.layers.conv.tvconv import PositionConv2d, TVConv2d, translation_variant
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, digits, train

DEPLOYED, CONSTANT, LOOP = 1e-6, 1e-6, 1e-5
VARIANCE = 0.1
SHARE = 1 / 3
ADVANTAGE, CONTROL = 0.0, 1.0
WIDTH, NARROW = 24, 12
EPOCHS = 4
SEEDS = (0, 1, 2)


class _Multiplications(TorchDispatchMode):
    """Counts products of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.addcmul.default):
            self.count += result.numel()
        return result


def trained_layer(size: tuple[int, int] = (12, 10), stride: int = 1) -> TVConv2d:
    """Return a layer whose affinity maps are no longer ones."""
    torch.manual_seed(0)
    layer = TVConv2d(6, size, stride=stride)
    nn.init.normal_(layer.posi_map)
    return layer


@torch.no_grad()
def deployed_error() -> float:
    """Return the largest difference of the deployed layer from the one in training."""
    worst = 0.0
    for stride in (1, 2):
        layer, x = trained_layer(stride=stride), torch.randn(2, 6, 12, 10)
        worst = max(worst, float((layer.merged()(x) - layer(x)).abs().max()))
    return worst


@torch.no_grad()
def loop_error() -> float:
    """Return the largest difference from a loop over places."""
    layer, x = trained_layer().merged(), torch.randn(2, 6, 12, 10)
    y, padded = layer(x), F.pad(x, (1, 1, 1, 1))
    worst = 0.0
    for i in range(12):
        for j in range(10):
            window = padded[:, :, i : i + 3, j : j + 3].flatten(2)
            worst = max(
                worst, float((y[:, :, i, j] - (window * layer.weight[:, :, i, j]).sum(2)).abs().max())
            )
    return worst


@torch.no_grad()
def constant_error() -> float:
    """Return how far equal kernels at all places are from a depthwise convolution."""
    torch.manual_seed(0)
    layer, x, kernel = PositionConv2d(6, (12, 10)), torch.randn(2, 6, 12, 10), torch.randn(6, 1, 3, 3)
    layer.weight.copy_(kernel.view(6, 9, 1, 1).expand_as(layer.weight))
    return float((layer(x) - F.conv2d(x, kernel, padding=1, groups=6)).abs().max())


def cost() -> tuple[int, int]:
    """Return the multiplications of the deployed layer and of a depthwise convolution of its shape."""
    layer = trained_layer().merged()
    with torch.no_grad(), _Multiplications() as counted:
        layer(torch.randn(1, 6, 12, 10))
    return counted.count, count_cost(nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 12, 10)).macs


@torch.no_grad()
def shift_difference(layer: nn.Module) -> float:
    """Return how far a shifted input is from shifting the output, away from the edges, relative to the output."""
    x = torch.randn(1, 6, 12, 10, generator=generator(0, "shift"))
    moved, kept = layer(x.roll((2, 1), (2, 3))), layer(x).roll((2, 1), (2, 3))
    inner = (slice(None), slice(None), slice(4, -2), slice(3, -2))
    return float((moved - kept)[inner].abs().max() / kept[inner].abs().max())


def quadrants(split: Split) -> Split:
    """Return every digit in each of the four quadrants; the class is the digit plus the quadrant, modulo ten."""
    images, labels = split
    placed = [F.pad(images, (8 * (q % 2), 8 - 8 * (q % 2), 8 * (q // 2), 8 - 8 * (q // 2))) for q in range(4)]
    return torch.cat(placed), torch.cat([(labels + q) % 10 for q in range(4)])


def anywhere(split: Split, name: str) -> Split:
    """Return every digit at four places drawn for it; the class is the digit."""
    images, labels = split
    images = F.pad(images, (0, 8, 0, 8)).repeat(4, 1, 1, 1)
    shifts = torch.randint(16, (len(images), 2), generator=generator(0, "places", name)).tolist()
    rolled = [image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)]
    return torch.stack(rolled), labels.repeat(4)


def make_network(seed: int, width: int) -> nn.Module:
    """Return a small network of depthwise separable convolutions."""
    torch.manual_seed(derive(seed, "weights"))
    layers: list[nn.Module] = [
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for factor, stride in ((1, 1), (2, 2), (2, 1), (4, 2)):
        out = factor * width
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
        ]  # fmt: skip
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def make_variant(seed: int) -> nn.Module:
    """Return the narrow network with kernels for every place."""
    return translation_variant(make_network(seed, NARROW), torch.zeros(1, 1, 16, 16))


def macs(model: nn.Module) -> int:
    """Return the multiply-adds of the deployed network."""
    deployed = reparameterize(model)
    # Products of elements, which the counter of matrix products leaves out: one a weight.
    places = sum(m.weight.numel() for m in deployed.modules() if isinstance(m, PositionConv2d))
    return count_cost(deployed, (1, 16, 16)).macs + places


def compare(training: Split, test: Split) -> dict[str, list[float]]:
    """Return the accuracies of both networks, one a seed."""
    scores: dict[str, list[float]] = {"variant": [], "depthwise": []}
    for seed in SEEDS:
        for name, model in (("variant", make_variant(seed)), ("depthwise", make_network(seed, WIDTH))):
            train(model, training, epochs=EPOCHS, lr=5e-3, seed=seed, shift=0, flip=False)
            scores[name].append(accuracy(model, test))
    return scores


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def run(check: Check) -> None:
    """Measure the layer's forms, cost and translation variance, and two small trainings."""
    check.require("difference of the deployed layer", deployed_error(), "<=", DEPLOYED)
    check.require("difference from a loop over places", loop_error(), "<=", LOOP)
    check.require(
        "difference of equal kernels from a depthwise convolution", constant_error(), "<=", CONSTANT
    )
    counted, depthwise = cost()
    check.require("multiplications of the deployed layer", counted, "==", depthwise)
    check.require(
        "relative change when the input is shifted", shift_difference(trained_layer()), ">", VARIANCE
    )
    convolution = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    check.require("the same of a depthwise convolution", shift_difference(convolution), "<=", 1e-5)

    share = macs(make_variant(0)) / macs(make_network(0, WIDTH))
    check.require("multiply-adds of the network with kernels for every place, share", share, "<=", SHARE)
    training, test = digits()
    placed = compare(quadrants(training), quadrants(test))
    check.require(
        "accuracy over that of the depthwise network where the place matters, mean of 3 seeds",
        mean(placed["variant"]) - mean(placed["depthwise"]), ">=", ADVANTAGE,
        baseline=mean(placed["depthwise"]), unit="points",
    )  # fmt: skip
    free = compare(anywhere(training, "train"), anywhere(test, "test"))
    check.require(
        "the same where digits lie anywhere (control)",
        mean(free["variant"]) - mean(free["depthwise"]), "<=", CONTROL,
        baseline=mean(free["depthwise"]), unit="points",
    )  # fmt: skip
    check.note(f"accuracies where the place matters {placed}, anywhere {free}")

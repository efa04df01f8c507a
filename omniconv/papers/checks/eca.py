"""A gate that sees its channel's k neighbours through one kernel of k weights costs 80 parameters in ResNet-50,
and helps as a gate of squeeze-and-excitation does with fifty times the parameters.

Kernels and totals are those of the paper's section 3. The small training sees Fashion-MNIST averaged to 14 x 14
pixels, which quarters its cost, with the same recipe and seeds for both networks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.layers.attention.eca import EfficientChannelAttention, eca_kernel_size
from omniconv.layers.attention.se import SqueezeExcite
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

BAND_ERROR = 1e-6
KERNELS = {16: 3, 32: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
ADDED = {"the paper's kernels (3, 5, 5, 7)": 80, "the formula's (5, 5, 5, 7)": 86}
MACS_SHARE = 0.0005
MARGIN = -0.1
SE_RATIO = 50
SEEDS = (0, 1, 2)


def band_error() -> float:
    """Return the largest difference between the gates and those of a banded matrix with shared diagonals."""
    worst = 0.0
    for channels, kernel in ((16, 3), (32, 5), (7, 9)):
        torch.manual_seed(channels)
        layer = EfficientChannelAttention(channels, kernel).double()
        weights = layer.conv.weight.flatten()
        band = torch.zeros(channels, channels, dtype=torch.float64)
        for row in range(channels):
            for tap in range(kernel):
                column = row + tap - kernel // 2
                if 0 <= column < channels:
                    band[row, column] = weights[tap]
        x = torch.randn(3, channels, 4, 6, dtype=torch.float64)
        expected = x * torch.sigmoid(x.mean((2, 3)) @ band.T)[:, :, None, None]
        worst = max(worst, float((layer(x) - expected).detach().abs().max()))
    return worst


def gates(layer: nn.Module, means: Tensor) -> Tensor:
    """Return the gates (N, C) of images whose channel means are `means`."""
    x = means[:, :, None, None]
    return (layer(x) / x)[:, :, 0, 0]


def support(channels: int = 32, kernel: int = 5) -> int:
    """Return on how many pooled channels the gate of the middle one depends."""
    torch.manual_seed(0)
    layer = EfficientChannelAttention(channels, kernel).double()
    means = torch.rand(1, channels, dtype=torch.float64) + 1
    means.requires_grad_()
    (gradient,) = torch.autograd.grad(gates(layer, means)[0, channels // 2], means)
    # The gate is recovered by a division whose own gradient cancels up to rounding.
    return int((gradient.abs() > 1e-12).sum())


def permuted_difference(channels: int = 32) -> dict[str, float]:
    """Return how far permuted inputs are from giving permuted gates, for ECA and for SE with permuted weights."""
    torch.manual_seed(0)
    order = torch.randperm(channels)
    means = torch.rand(4, channels, dtype=torch.float64) + 1
    eca = EfficientChannelAttention(channels, 5).double()
    se = SqueezeExcite(channels, 8).double()
    other = SqueezeExcite(channels, 8).double()
    state = se.state_dict()
    state["fc1.weight"] = state["fc1.weight"][:, order]
    state["fc2.weight"], state["fc2.bias"] = state["fc2.weight"][order], state["fc2.bias"][order]
    other.load_state_dict(state)
    with torch.no_grad():
        return {
            "eca": float((gates(eca, means[:, order]) - gates(eca, means)[:, order]).abs().max()),
            "se": float((gates(other, means[:, order]) - gates(se, means)[:, order]).abs().max()),
        }


def make_network(seed: int, gate: str | None) -> nn.Module:
    """Return a small residual network with a gate in every block, or none."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(
        "resnet18", num_classes=10, in_chans=1, depths=(1, 1, 1), widths=(16, 32, 64), stem="3x3", gate=gate
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def run(check: Check) -> None:
    """Measure the layer, its counts, its locality, and a small training."""
    check.require("difference from a banded matrix with shared diagonals", band_error(), "<=", BAND_ERROR)
    right = sum(eca_kernel_size(channels) == kernel for channels, kernel in KERNELS.items())
    check.require(
        "kernel sizes of 16 to 2048 channels that the formula gets right", right, "==", len(KERNELS)
    )
    sizes = [count(EfficientChannelAttention(channels)) == kernel for channels, kernel in KERNELS.items()]
    check.require("layers among those with exactly k parameters", sum(sizes), "==", len(KERNELS))

    plain = count_cost(create_model("resnet50", device="meta"), (3, 224, 224))
    for (name, added), kernels in zip(ADDED.items(), ((3, 5, 5, 7), ()), strict=True):
        cost = count_cost(create_model("ecaresnet50", gate_kernels=kernels, device="meta"), (3, 224, 224))
        check.require(
            f"parameters added to ResNet-50 by {name}", cost.parameters - plain.parameters, "==", added
        )
        share = cost.macs / plain.macs - 1
        check.require(f"share of multiply-adds added by {name}", share, "<", MACS_SHARE)

    check.require("pooled channels that a gate of kernel 5 depends on", support(), "==", 5)
    permuted = permuted_difference()
    check.require("change of ECA's gates when channels are permuted", permuted["eca"], ">", 1e-3)
    check.require("the same for SE with permuted weights", permuted["se"], "<=", 1e-12)

    none, eca, se = (count(make_network(0, gate)) for gate in (None, "eca", "se"))
    check.require(
        "SE's parameters over ECA's in the small network", (se - none) / (eca - none), ">=", SE_RATIO
    )

    images, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(20000, 10000))
    scores: dict[str | None, list[float]] = {"eca": [], None: []}
    for seed in SEEDS:
        for gate in scores:
            model = make_network(seed, gate)
            train(model, images, epochs=4, seed=seed, shift=1)
            scores[gate].append(accuracy(model, test))
    means = {gate: sum(values) / len(values) for gate, values in scores.items()}
    check.require(
        "accuracy with ECA minus without attention, Fashion-MNIST, mean of 3 seeds",
        means["eca"] - means[None], ">=", MARGIN, baseline=means[None], unit="points",
    )  # fmt: skip
    check.note(f"accuracies with ECA {scores['eca']}, without {scores[None]}")

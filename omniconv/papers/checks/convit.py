"""Attention that starts as a convolution and may leave it learns from few images what plain attention does not.

Counts are those of the public networks. The small training sees Fashion-MNIST averaged to 14 x 14 pixels, of which a
patch of two by two is a token; ConViT and the same network with plain attention everywhere (DeiT) have the same sizes,
recipe and seeds, and see as many images, be they few or ten times as many, as in the paper.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.attention.gpsa import GatedPositionalSelfAttention, attention_distance
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

COUNTS = {"convit_tiny": 5.711e6, "convit_small": 27.777e6, "convit_base": 86.540e6}
COUNT_ERROR = 0.001
CONVOLUTION_ERROR = 1e-4
GAIN = 2.0
MOVED = 0.01
SEEDS = (0, 1, 2)
FEW, MANY = 600, 6000
STEPS = 80
BATCH = 48


def convolution_error() -> float:
    """Return how far nine heads that look at their places alone are from a 3x3 convolution, off the border."""
    torch.manual_seed(0)
    layer = GatedPositionalSelfAttention(36, 9, locality_strength=50.0)
    nn.init.normal_(layer.v.weight)
    nn.init.constant_(layer.gating_param, 50.0)
    kernel = torch.empty(36, 36, 3, 3)
    for head in range(9):
        mine = slice(4 * head, 4 * head + 4)
        kernel[:, :, head % 3, head // 3] = (layer.proj.weight[:, mine] @ layer.v.weight[mine]).detach()
    x = torch.randn(2, 8, 9, 36)
    expected = F.conv2d(x.permute(0, 3, 1, 2), kernel, layer.proj.bias).permute(0, 2, 3, 1)
    return float((layer(x)[:, 1:-1, 1:-1] - expected).detach().abs().max())


@torch.no_grad()
def start(strength: float) -> tuple[float, float]:
    """Return the mean distance at which heads look at first, and the largest error of a row's sum."""
    torch.manual_seed(0)
    layer = GatedPositionalSelfAttention(36, 9, locality_strength=strength)
    attention = layer.attention(torch.randn(2, 10, 10, 36))
    return float(attention_distance(attention, 10, 10).mean()), float((attention.sum(-1) - 1).abs().max())


def make_network(seed: int, local_blocks: int) -> nn.Module:
    """Return three blocks, some of which start as convolutions."""
    torch.manual_seed(derive(seed, "weights"))
    return create_model(
        "convit_tiny", num_classes=10, in_chans=1, dim=36, depth=3, num_heads=9, patch_size=2, img_size=14,
        mlp_ratio=2.0, local_blocks=local_blocks,
    )  # fmt: skip


def gates(model: nn.Module) -> Tensor:
    """Return the gates of all local blocks."""
    local = (m for m in model.modules() if isinstance(m, GatedPositionalSelfAttention))
    return torch.cat([m.gating_param.detach() for m in local])


def run(check: Check) -> None:
    """Measure counts, the convolutional limit, the start, and a small training."""
    for name, wanted in COUNTS.items():
        count = sum(p.numel() for p in create_model(name, device="meta").parameters())
        check.require(
            f"relative error of the parameters of {name}", abs(count / wanted - 1), "<=", COUNT_ERROR
        )
    error = convolution_error()
    check.require(
        "difference of nine heads with open gates from a 3x3 convolution", error, "<=", CONVOLUTION_ERROR
    )
    distances = []
    for strength in (2.0, 1.0, 0.5, 0.1):
        distance, error = start(strength)
        distances.append(distance)
        check.require(f"error of the sums of attention at strength {strength}", error, "<=", 1e-5)
    growth = min(b - a for a, b in itertools.pairwise(distances))
    check.require(
        "growth of the non-locality at the start as the strength falls", growth, ">", 0, unit="tokens"
    )

    (images, labels), test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(MANY, 4000))
    scores: dict[tuple[int, int], list[float]] = {}
    moved: list[float] = []
    for count in (FEW, MANY):
        for blocks in (2, 0):
            found = scores.setdefault((count, blocks), [])
            for seed in SEEDS:
                model = make_network(seed, blocks)
                few = (images[:count], labels[:count])
                train(model, few, epochs=STEPS * BATCH / count, batch=BATCH, seed=seed, shift=1)
                found.append(accuracy(model, test))
                if blocks:
                    moved.append(float((gates(model) - 1).abs().mean()))
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    gains = {count: means[count, 2] - means[count, 0] for count in (FEW, MANY)}
    check.require(
        f"accuracy of ConViT minus DeiT, {FEW} images of Fashion-MNIST, mean of 3 seeds",
        gains[FEW], ">=", GAIN, baseline=means[FEW, 0], unit="points",
    )  # fmt: skip
    check.require(
        f"the same minus what it is with {MANY} images", gains[FEW] - gains[MANY], ">", 0,
        baseline=gains[MANY], unit="points",
    )  # fmt: skip
    check.require(
        "mean change of the gates' parameters in training, least of the runs", min(moved), ">", MOVED
    )
    check.note(f"accuracies by (images, local blocks): {scores}")

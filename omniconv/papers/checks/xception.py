"""Xception has the published size, a separable convolution is the dense one whose kernel factorises, and a nonlinearity
between its two steps does not help.
"""

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.layers.conv.separable import SegmentedConv2d, SeparableConv2d
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

PARAMETERS = 22_855_952
MACS, MACS_SHARE = 8.4e9, 0.02
ERROR = 1e-5
MARGIN = -0.2
SMALL = {"stem": (16, 32), "entry": (64,), "middle": 2, "exit": (96, 128, 160), "drop_rate": 0.0}
IMAGES, EPOCHS = 8000, 2
SEEDS = (0, 1, 2)


@torch.no_grad()
def factorised_error() -> float:
    """Return the distance of a separable convolution from the dense one of kernels p_oc d_c."""
    torch.manual_seed(0)
    layer, x = SeparableConv2d(16, 24), torch.randn(2, 16, 13, 9)
    depthwise, pointwise = (parameter for parameter in layer.parameters())
    dense = torch.einsum("oc,cij->ocij", pointwise[:, :, 0, 0], depthwise[:, 0])
    return float((layer(x) - F.conv2d(x, dense, padding=1)).abs().max())


@torch.no_grad()
def segment_error(segments: int) -> float:
    """Return the distance of a segmented convolution from each segment's own dense convolution."""
    torch.manual_seed(0)
    layer, x = SegmentedConv2d(16, 24, segments), torch.randn(2, 16, 13, 9)
    z = torch.einsum("oc,nchw->nohw", layer.pointwise.weight[:, :, 0, 0], x)
    parts = zip(z.chunk(segments, 1), layer.spatial.weight.chunk(segments), strict=True)
    wanted = torch.cat([F.conv2d(part, weight, padding=1) for part, weight in parts], 1)
    return float((layer(x) - wanted).abs().max())


def make(seed: int, act: str) -> nn.Module:
    """Return a small Xception."""
    torch.manual_seed(derive(seed, "weights"))
    return create_model("legacy_xception", num_classes=10, in_chans=1, act=act, **SMALL)


def run(check: Check) -> None:
    """Measure counts, both layers, and two trainings a seed."""
    cost = count_cost(create_model("legacy_xception", device="meta"), (3, 299, 299))
    check.require("parameters", cost.parameters, "==", PARAMETERS)
    share = abs(cost.macs / MACS - 1)
    check.require("multiply-adds at 299 pixels: distance from the published", share, "<=", MACS_SHARE)

    error = factorised_error()
    check.require("separable minus dense convolution with a factorised kernel", error, "<=", ERROR)
    for segments, what in (
        (1, "regular convolution"),
        (3, "three convolutions"),
        (24, "depthwise convolution"),
    ):
        error = segment_error(segments)
        check.require(f"{segments} segments minus a 1x1 and a {what}", error, "<=", ERROR)

    images, test = fashion_mnist(IMAGES, 10000)
    scores: dict[str, list[float]] = {"none": [], "relu": []}
    for seed in SEEDS:
        for act in scores:
            model = make(seed, act)
            train(model, images, epochs=EPOCHS, seed=seed, shift=1)
            scores[act].append(accuracy(model, test))
    means = {act: sum(found) / len(SEEDS) for act, found in scores.items()}
    check.require(
        "accuracy without activation between the steps minus with ReLU, Fashion-MNIST, mean of 3 seeds",
        means["none"] - means["relu"], ">=", MARGIN, baseline=means["relu"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies without {scores['none']}, with ReLU {scores['relu']}")

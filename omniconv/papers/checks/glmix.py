"""Attention between 64 soft clusters of pixels costs in proportion to the pixels, where attention between these
costs in proportion to their square; clusters are means that resolution does not change; GLNet has the published
size and cost.

Growth is of what an exchange between pixels costs: gathering and dispatching on one side, similarities and weighted
sums on the other. Projections, and the attention between slots, which costs the same for every map, are left out.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.design.cost import count_cost
from omniconv.layers.attention.glmix import GLMix
from omniconv.layers.attention.self_attention import SelfAttention2d
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

PUBLISHED = {"glnet_4g": (27.00e6, 4.5e9), "glnet_9g": (60.01e6, 9.7e9), "glnet_16g": (106.06e6, 16.7e9)}
PARAMETER_ERROR = 0.01
MACS_ERROR = 0.03
SIZES = (28, 56, 112)
SLOPE_ERROR = 0.05
SUM_ERROR = 1e-5
CLUSTER_ERROR = 1e-5
RESOLUTION_ERROR = 1e-5
CHANNELS, HEADS = 64, 2


class GlobalBranch(nn.Module):
    """The slots of GLMix without its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = GLMix(CHANNELS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the slots of `x`."""
        return self.mixer.mix_slots(x, x)


def slope(costs: list[int]) -> float:
    """Return the growth of the logarithm of the costs with that of the pixels, by least squares."""
    pixels = torch.tensor([2 * math.log(size) for size in SIZES], dtype=torch.float64)
    pixels = pixels - pixels.mean()
    return float((pixels * torch.tensor(costs, dtype=torch.float64).log()).sum() / pixels.square().sum())


def growth() -> tuple[float, float]:
    """Return the slopes of the global branch and of attention between pixels."""
    branch, attention = GlobalBranch(), SelfAttention2d(CHANNELS, HEADS)
    side = branch.mixer.side
    fixed = count_cost(attention, (CHANNELS, side, side)).macs
    slots, pixels = [], []
    for size in SIZES:
        slots.append(count_cost(branch, (CHANNELS, size, size)).macs - fixed)
        projections = 4 * CHANNELS**2 * size**2
        pixels.append(count_cost(attention, (CHANNELS, size, size)).macs - projections)
    return slope(slots), slope(pixels)


@torch.no_grad()
def sum_errors() -> tuple[float, float, float]:
    """Return how far the weights over pixels, and over slots, are from summing to one, and a constant map from staying.

    The map stays if the layer gathers and dispatches by these weights, attention between the slots aside.
    """
    torch.manual_seed(0)
    layer = GLMix(CHANNELS, HEADS)
    nn.init.constant_(layer.scale, 4.0)
    x, seeds = torch.randn(2, 2, CHANNELS, 13, 17)
    logits = layer.similarity(x, seeds)
    over_pixels, over_slots = logits.softmax(2).sum(2), logits.softmax(1).sum(1)
    layer.set_submodule("attention", nn.Identity())
    constant = x[:, :, :1, :1].expand_as(x)
    kept = layer.mix_slots(constant, seeds)
    differences = (over_pixels - 1, over_slots - 1, kept - constant)
    pixels, slots, change = (float(difference.abs().max()) for difference in differences)
    return pixels, slots, change


@torch.no_grad()
def cluster_error() -> float:
    """Return the difference from averaging and broadcasting by hand where every pixel belongs to one slot alone."""
    torch.manual_seed(0)
    layer = GLMix(16, 2, slots=9).double()
    nn.init.constant_(layer.scale, 200.0)
    corners = torch.eye(16, dtype=torch.float64)[:9]
    seeds = corners.T.view(1, 16, 3, 3).repeat_interleave(4, 2).repeat_interleave(5, 3)
    label = torch.cat([torch.arange(9), torch.randint(0, 9, (171,))]).view(12, 15)
    length = torch.rand(12, 15, 1, dtype=torch.float64) + 0.5
    x = (corners[label] * length).permute(2, 0, 1)[None]
    slots = torch.stack([x[0, :, label == slot].mean(1) for slot in range(9)], 1)
    mixed = layer.attention(slots.view(1, 16, 3, 3)).flatten(2)[0]
    expected = mixed[:, label][None]
    return float((layer.mix_slots(x, seeds) - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def resolution_error() -> float:
    """Return the change of the global branch when every pixel is split in nine."""
    torch.manual_seed(0)
    layer = GLMix(CHANNELS, HEADS)
    nn.init.constant_(layer.scale, 4.0)
    x, seeds = torch.randn(2, 1, CHANNELS, 16, 24)
    coarse = F.interpolate(layer.mix_slots(x, seeds), scale_factor=3)
    fine = layer.mix_slots(F.interpolate(x, scale_factor=3), F.interpolate(seeds, scale_factor=3))
    return float((fine - coarse).abs().max() / coarse.abs().max())


def run(check: Check) -> None:
    """Measure counts, growth, and what slots are."""
    for name, (parameters, macs) in PUBLISHED.items():
        cost = count_cost(create_model(name, device="meta"), (3, 224, 224))
        error = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: parameters off the published ones by", error, "<=", PARAMETER_ERROR)
        error = abs(cost.macs / macs - 1)
        check.require(f"{name}: multiply-adds off the published ones by", error, "<=", MACS_ERROR)

    slots, pixels = growth()
    check.require("exponent of the exchange through slots off 1 by", abs(slots - 1), "<=", SLOPE_ERROR)
    check.require("exponent of attention between pixels off 2 by", abs(pixels - 2), "<=", SLOPE_ERROR)

    gathered, dispatched, change = sum_errors()
    check.require("weights that gather pixels sum to 1, off by", gathered, "<=", SUM_ERROR)
    check.require("weights that dispatch slots sum to 1, off by", dispatched, "<=", SUM_ERROR)
    check.require("change of a constant map by gathering and dispatching", change, "<=", SUM_ERROR)
    check.require("difference from pooling and broadcasting by hand", cluster_error(), "<=", CLUSTER_ERROR)
    check.require("change when every pixel is split in nine", resolution_error(), "<=", RESOLUTION_ERROR)
    with torch.no_grad():
        logits = create_model("glnet_test", num_classes=5).eval()(torch.randn(1, 3, 45, 83))
    check.require("finite logits of 5 for an image of 45 x 83", logits.isfinite().sum(), "==", 5)

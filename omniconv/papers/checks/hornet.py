"""Recursive gated convolution of order n multiplies n + 1 linear functions of the pixels, for a cost that is
bounded for every n and hardly rises with it; the networks have the published size.

The bound, H W C (2 K^2 + 11/3 C + 2), is the paper's section 3.1; of it the counter sees the convolutions.
"""

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.design.cost import count_cost
from omniconv.layers.conv.recursive_gated import GlobalLocalFilter, RecursiveGatedConv2d
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

PARAMETERS = {
    "hornet_tiny_7x7": 22.41e6,
    "hornet_tiny_gf": 22.99e6,
    "hornet_small_7x7": 49.53e6,
    "hornet_base_7x7": 87.26e6,
}
PARAMETER_ERROR = 0.005
ORDERS = (2, 3, 4, 5)
SLOPE_ERROR = 1e-3
CHANNELS, SIZE, KERNEL = 64, 14, 7
GROWTH = 0.12
FILTER_ERROR = 1e-5


def without_biases(layer: nn.Module) -> nn.Module:
    """Return the layer in float64, with every bias at zero."""
    for name, parameter in layer.double().named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return layer


def degree(layer: nn.Module) -> float:
    """Return the slope of log output against log scale of the input, by least squares over a decade."""
    x = torch.randn(2, CHANNELS, 9, 7, dtype=torch.float64)
    scales = torch.logspace(-0.5, 0.5, 7, dtype=torch.float64)
    with torch.no_grad():
        sizes = torch.stack([layer(scale * x).norm() for scale in scales]).log()
    logs = scales.log() - scales.log().mean()
    return float((logs * sizes).sum() / logs.square().sum())


def filter_error(size: tuple[int, int]) -> float:
    """Return the largest relative difference of a global filter from a circular convolution, pixel by pixel."""
    torch.manual_seed(1)
    layer = GlobalLocalFilter(8, size).double()
    nn.init.normal_(layer.complex_weight)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with torch.no_grad():
        u = layer.pre_norm(x)
        kernel = torch.fft.irfft2(torch.view_as_complex(layer.complex_weight), size)
        whole = torch.zeros_like(u[:, 4:])
        for i in range(size[0]):
            for j in range(size[1]):
                whole += kernel[:, i, j, None, None] * u[:, 4:].roll((i, j), (2, 3))
        local = F.conv2d(u[:, :4], layer.dw.weight, padding=1, groups=4)
        alternating = torch.stack((local, whole), 2).flatten(1, 2)
        expected = layer.post_norm(alternating)
        return float((layer(x) - expected).abs().max() / expected.abs().max())


def run(check: Check) -> None:
    """Measure counts, order, cost and the global filter."""
    for name, published in PARAMETERS.items():
        count = sum(p.numel() for p in create_model(name, device="meta").parameters())
        check.require(
            f"{name}: parameters off the published ones by", abs(count / published - 1), "<=", PARAMETER_ERROR
        )

    torch.manual_seed(0)
    costs = []
    for order in ORDERS:
        layer = RecursiveGatedConv2d(CHANNELS, order)
        widths = layer.widths[0] + sum(layer.widths)
        check.require(f"order {order}: channels of p and all q over C", widths / CHANNELS, "==", 2)
        cost = count_cost(layer, (CHANNELS, SIZE, SIZE)).macs / (SIZE**2 * CHANNELS)
        bound = 2 * KERNEL**2 + 11 / 3 * CHANNELS + 2
        check.require(
            f"order {order}: multiply-adds a pixel and channel, against the bound", cost, "<=", bound
        )
        costs.append(cost)
        slope = degree(without_biases(layer))
        check.require(
            f"order {order}: exponent of the output's growth off {order + 1} by",
            abs(slope - order - 1), "<=", SLOPE_ERROR,
        )  # fmt: skip
    plain = degree(without_biases(nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=3, groups=CHANNELS)))
    check.require("the same of a plain convolution off 1 by", abs(plain - 1), "<=", SLOPE_ERROR)
    check.require("growth of the cost from order 2 to order 5", costs[-1] / costs[0] - 1, "<", GROWTH)
    check.note(f"Multiply-adds a pixel and channel: {', '.join(f'{cost:.1f}' for cost in costs)}.")

    worst = max(filter_error(size) for size in ((8, 6), (7, 9), (5, 5)))
    check.require("difference of global filters from circular convolutions", worst, "<=", FILTER_ERROR)

"""Oversized convolutions with zeros beyond the map let every output see every input on its axis and tell it where it
is, which circular ones of the same reach cannot; networks of them have the published size and take maps of any size.

The probe sees one layer with random bands on flat images with a tenth of noise, and predicts the row of a pixel from
its channels by least squares, on other images than it was fitted to.
"""

import torch
from scipy.linalg import toeplitz
from torch import Tensor
from torch.nn import functional as F

from omniconv.core.seeds import generator
from omniconv.design.cost import count_cost
from omniconv.layers.conv.oversized import OversizedConv2d
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

PUBLISHED = {
    "parcnetv2_xt": (7.4e6, 1.6e9),
    "parcnetv2_tiny": (25e6, 4.3e9),
    "parcnetv2_small": (39e6, 7.8e9),
    "parcnetv2_base": (56e6, 12.5e9),
}
PARAMETER_ERROR = 0.02
MACS_ERROR = 0.05
BAND_ERROR = 1e-5
SHIFT = 3
CIRCULAR_ERROR = 1e-6
BORDER_CHANGE = 0.1
PROBE_SIZE, PROBE_CHANNELS, PROBE_IMAGES, NOISE = 28, 64, 8, 0.1
OVERSIZED_FIT, CIRCULAR_FIT = 0.9, 0.1
RESIZE_ERROR = 1e-5


def circular(layer: OversizedConv2d, x: Tensor) -> Tensor:
    """Convolve with the same bands on a map whose ends meet."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, 0, height - 1, height - 1), mode="circular")
    x = F.conv2d(x, layer.conv_h.weight, groups=len(layer.conv_h.weight))
    x = F.pad(x, (width - 1, width - 1, 0, 0), mode="circular")
    return F.conv2d(x, layer.conv_w.weight, groups=len(layer.conv_w.weight))


def band_errors(size: int = 14, channels: int = 4) -> tuple[float, float, int]:
    """Return the differences from matrix products and from transforms, and the fewest inputs that an output sees."""
    torch.manual_seed(0)
    layer = OversizedConv2d(channels, 2 * size - 1)
    x = torch.randn(2, channels, size, size, requires_grad=True)
    y = layer.conv_h(x)
    matrices = torch.stack(
        [
            torch.from_numpy(toeplitz(band[:size].flip(0).numpy(), band[size - 1 :].numpy()))
            for band in layer.conv_h.weight.detach().flatten(1)
        ]
    )
    dense = torch.einsum("cij,ncjw->nciw", matrices, x)
    length = 3 * size
    # torch's convolution is a correlation: the band is turned around.
    bands = torch.fft.rfft(layer.conv_h.weight.flatten(1).flip(1), length)
    product = torch.fft.rfft(x, length, dim=2) * bands[:, :, None]
    transformed = torch.fft.irfft(product, length, dim=2)[:, :, size - 1 : 2 * size - 1]
    seen = size
    for row in range(size):
        (gradient,) = torch.autograd.grad(y[0, 0, row, 0], x, retain_graph=True)
        seen = min(seen, int((gradient[0, 0, :, 0] != 0).sum()))
    errors = [
        float((y - other).detach().abs().max() / y.abs().max().item()) for other in (dense, transformed)
    ]
    return errors[0], errors[1], seen


@torch.no_grad()
def shift_errors(size: int = 14) -> tuple[float, float]:
    """Return how far shifting an impulse at the border is from shifting its response, zeros beyond and ends joined."""
    torch.manual_seed(0)
    layer = OversizedConv2d(4, 2 * size - 1)
    impulse = torch.zeros(1, 4, size, size)
    impulse[:, :, 0, 0] = 1
    moved = impulse.roll((SHIFT, SHIFT), (2, 3))
    errors = []
    for run in (layer, lambda x: circular(layer, x)):
        response = run(impulse).roll((SHIFT, SHIFT), (2, 3))
        errors.append(float((run(moved) - response).norm() / response.norm()))
    return errors[0], errors[1]


def fit(features: Tensor, other: Tensor) -> float:
    """Return R^2 of the row of every pixel of `other` (N, C, H, W), by least squares on `features`."""
    rows = torch.arange(features.shape[2], dtype=features.dtype)
    target = rows[None, :, None].expand(len(features), -1, features.shape[3]).flatten()

    def flat(x: Tensor) -> Tensor:
        pixels = x.movedim(1, 3).flatten(0, 2)
        return torch.cat([pixels, torch.ones(len(pixels), 1, dtype=x.dtype)], 1)

    weights = torch.linalg.lstsq(flat(features), target[:, None]).solution
    residual = flat(other) @ weights - target[:, None]
    return 1 - float(residual.square().sum() / (target - target.mean()).square().sum())


@torch.no_grad()
def probes() -> tuple[float, float]:
    """Return R^2 of the probe behind the oversized and behind the circular layer."""
    torch.manual_seed(0)
    layer = OversizedConv2d(PROBE_CHANNELS, 2 * PROBE_SIZE - 1).double()
    noise = torch.randn(
        2, PROBE_IMAGES, PROBE_CHANNELS, PROBE_SIZE, PROBE_SIZE,
        generator=generator(0, "probe"), dtype=torch.float64,
    )  # fmt: skip
    images, others = 1 + NOISE * noise
    oversized = fit(layer(images), layer(others))
    return oversized, fit(circular(layer, images), circular(layer, others))


@torch.no_grad()
def resized(check: Check) -> None:
    """Require that other sizes need no new weights."""
    torch.manual_seed(0)
    options = {"num_classes": 10, "depths": (1, 1, 1, 1)}
    plain = create_model("parcnetv2_xt", **options).eval()
    stretched = create_model("parcnetv2_xt", resize_kernels=True, **options).eval()
    stretched.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 224, 224)
    error = (stretched(x) - plain(x)).abs().max() / plain(x).abs().max()
    check.require("difference by stretching kernels to the size they are for", error, "<=", RESIZE_ERROR)
    for size in (160, 288):
        logits = stretched(torch.randn(1, 3, size, size))
        check.require(f"finite logits of 10 at {size} pixels", logits.isfinite().sum(), "==", 10)


def run(check: Check) -> None:
    """Measure counts, bands, shifts, the probe and other sizes."""
    for name, (parameters, macs) in PUBLISHED.items():
        cost = count_cost(create_model(name, device="meta"), (3, 224, 224))
        error = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: parameters off the published ones by", error, "<=", PARAMETER_ERROR)
        error = abs(cost.macs / macs - 1)
        check.require(f"{name}: multiply-adds off the published ones by", error, "<=", MACS_ERROR)

    dense, transformed, seen = band_errors()
    check.require("difference from a Toeplitz matrix", dense, "<=", BAND_ERROR)
    check.require("difference from a product of transforms", transformed, "<=", BAND_ERROR)
    check.require("fewest of 14 inputs on its axis that an output sees", seen, "==", 14)

    bordered, joined = shift_errors()
    check.require("change of an impulse's response when it leaves the border", bordered, ">", BORDER_CHANGE)
    check.require("the same with circular convolution", joined, "<=", CIRCULAR_ERROR)

    oversized, ring = probes()
    check.require("R^2 of the row of a pixel, oversized", oversized, ">", OVERSIZED_FIT, baseline=ring)
    check.require("R^2 of the row of a pixel, circular", ring, "<", CIRCULAR_FIT)
    resized(check)

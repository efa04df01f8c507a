"""Recursive convolution with l levels has l + 2 kernels, sees k 2^l pixels and costs less than 5/3 of one depthwise
convolution; RecNeXt has the published size and cost when its norms are merged, and the same outputs.
"""

import torch
from torch import nn

from omniconv.design.cost import count_cost
from omniconv.layers.conv.recursive import RecursiveConv2d
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

PUBLISHED = {
    "recnext_m0": (2.502e6, 0.4e9),
    "recnext_m1": (5.161e6, 0.9e9),
    "recnext_m2": (6.859e6, 1.2e9),
    "recnext_m3": (8.220e6, 1.4e9),
    "recnext_m4": (14.084e6, 2.4e9),
    "recnext_m5": (22.903e6, 4.7e9),
}
PARAMETER_ERROR = 0.01
MACS_ERROR = 0.05
FUSED_ERROR = 1e-4
LEVELS = (1, 2, 3, 4, 5)
KERNEL, CHANNELS, SIZE = 5, 6, 256
LIMIT = 5 / 3
REST = 1e-3


def disturb(model: nn.Module) -> None:
    """Give every batch norm random statistics and weights, and leave training mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
            nn.init.normal_(module.get_buffer("running_mean"), 0, 0.2)
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, 0, 0.2)
    model.eval()


def support(levels: int) -> int:
    """Return the side of the square that the middle pixel's gradient comes from, with kernels that cancel nothing."""
    layer = RecursiveConv2d(1, KERNEL, levels).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.0)
    x = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 0, SIZE // 2, SIZE // 2], x)
    seen = gradient[0, 0].nonzero()
    return int((seen.amax(0) - seen.amin(0) + 1).min())


def run(check: Check) -> None:
    """Measure counts, merging, and the recursive convolution's parameters, cost and field."""
    for name, (parameters, macs) in PUBLISHED.items():
        cost = count_cost(create_model(name, device="meta").deploy(), (3, 224, 224))
        error = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: merged parameters off the published ones by", error, "<=", PARAMETER_ERROR)
        # Published with one decimal, so half of its last digit is allowed where that is more.
        allowed = max(MACS_ERROR * macs, 0.05e9)
        error = abs(cost.macs - macs) / allowed
        check.require(f"{name}: multiply-adds off the published ones, of the allowed", error, "<=", 1)
        check.note(f"{name}: {cost.macs / 1e9:.3f} G multiply-adds, {macs / 1e9:.1f} published.")

    torch.manual_seed(0)
    model = create_model("recnext_m0", num_classes=10)
    disturb(model)
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        wanted, merged = model(x), model.deploy()(x)
    error = (merged - wanted).abs().max() / wanted.abs().max()
    check.require("difference of merged and trained form", error, "<=", FUSED_ERROR)

    plain = KERNEL**2 * CHANNELS
    one = count_cost(RecursiveConv2d(CHANNELS, KERNEL, 0), (CHANNELS, SIZE, SIZE))
    check.require("level 0: parameters, those of one depthwise convolution", one.parameters, "==", plain)
    ratios = []
    for levels in LEVELS:
        cost = count_cost(RecursiveConv2d(CHANNELS, KERNEL, levels), (CHANNELS, SIZE, SIZE))
        check.require(f"{levels} levels: kernels", cost.parameters / plain, "==", levels + 2)
        ratios.append(cost.macs / one.macs)
    check.require("largest cost over that of one depthwise convolution", max(ratios), "<", LIMIT)
    check.require("distance from 5/3 at 5 levels", LIMIT - ratios[-1], "<=", REST)
    for levels in LEVELS[:-1]:
        check.require(
            f"{levels} levels: side of the receptive field", support(levels), ">=", KERNEL * 2**levels,
            baseline=support(0), unit="pixels",
        )  # fmt: skip

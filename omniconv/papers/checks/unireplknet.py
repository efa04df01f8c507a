"""A 13x13 depthwise kernel trained beside dilated small ones merges into one kernel with the same outputs and the
published cost, and gives a network a wider effective receptive field than 3x3 kernels do at equal cost.

The receptive fields are those of new networks (layer scale 1, norms calibrated on their input), in which the
baseline spends the cost of the large kernels on more layers.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import generator
from omniconv.design.cost import count_cost
from omniconv.layers.conv.dilated_reparam import DILATED_BRANCHES, insert_zeros
from omniconv.models.factory import create_model
from omniconv.models.image.unireplknet import UniRepLKNet, UniRepLKNetConfig
from omniconv.papers.check import Check

MERGED = {"unireplknet_a": 4.437e6, "unireplknet_t": 31.038e6, "unireplknet_s": 55.646e6}
TRAINING = {"unireplknet_t": 31.693e6}

COUNT_ERROR = 0.005
MERGE_ERROR = 1e-4
MERGE_ERROR_DOUBLE = 1e-10
DILATION_ERROR = 1e-6
LOOP_ERROR = 1e-5
COST_MISMATCH = 0.05
SEEDS = (0, 1, 2, 3, 4)
ERF_SHARE = 0.5
ERF_SIZE = 256

LARGE = UniRepLKNetConfig((2, 2, 6, 2), (16, 32, 64, 128), 13, (0, 1, 1, 1), layer_scale=1.0)
# 3x3 kernels throughout, and as much deeper as the large kernels cost.
SMALL = replace(LARGE, depths=(2, 3, 8, 3), large_every=(0, 0, 0, 0))


def _counts(check: Check) -> None:
    for figures, form in ((MERGED, "deployed"), (TRAINING, "training")):
        for name, published in figures.items():
            model = create_model(name, device="meta")
            model = model.deploy() if form == "deployed" else model
            error = abs(sum(p.numel() for p in model.parameters()) / published - 1)
            check.require(f"{name}: parameters of the {form} form off by", error, "<=", COUNT_ERROR)


def _randomise(model: nn.Module, random: torch.Generator) -> None:
    """Give every weight and statistic a say: as published, scales of 1e-6 hide all but the shortcuts."""
    for name, value in model.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 2, generator=random)
        elif value.is_floating_point() and (value.ndim == 1 or "act" in name):
            value.normal_(0.3, 0.3, generator=random)
        elif value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=random)


@torch.no_grad()
def _merging(check: Check) -> None:
    worst, worst_double, without_beta = 0.0, 0.0, float("inf")
    for kernel_size in DILATED_BRANCHES:
        random = generator(kernel_size, "unireplknet")
        torch.manual_seed(kernel_size)
        model = create_model("unireplknet_test", kernel_size=kernel_size).eval()
        _randomise(model, random)
        x = torch.randn(2, 3, 96, 70, generator=random)
        logits = model(x)
        worst = max(worst, float((model.deploy()(x) - logits).norm() / logits.norm()))
        model, x = model.double(), x.double()
        logits = model(x)
        worst_double = max(worst_double, float((model.deploy()(x) - logits).norm() / logits.norm()))
        # The same merge with the response norm's bias lost: what the fold is worth.
        for name, value in model.named_parameters():
            if name.endswith("act.1.beta"):
                value.zero_()
        without_beta = min(without_beta, float((model.deploy()(x) - logits).norm() / logits.norm()))
    claim = "largest relative difference of training and merged logits over all kernel sizes"
    check.require(claim, worst, "<=", MERGE_ERROR, baseline=without_beta)
    check.require(claim + ", double precision", worst_double, "<=", MERGE_ERROR_DOUBLE, baseline=without_beta)
    check.note("The baseline of the merge is the same with the bias of the response norm left out.")


@torch.no_grad()
def _convolutions(check: Check) -> None:
    random = generator(0, "unireplknet")
    worst = 0.0
    for size, dilation in sorted({branch for branches in DILATED_BRANCHES.values() for branch in branches}):
        kernel = torch.randn(4, 1, size, size, generator=random)
        x = torch.randn(2, 4, 23, 31, generator=random)
        margin = (size - 1) * dilation // 2
        dilated = F.conv2d(x, kernel, padding=margin, dilation=dilation, groups=4)
        dense = F.conv2d(x, insert_zeros(kernel, dilation), padding=margin, groups=4)
        worst = max(worst, float((dense - dilated).abs().max() / dilated.abs().max()))
    check.require("dilated and zero-filled kernels differ by, relatively", worst, "<=", DILATION_ERROR)

    conv = create_model("unireplknet_test").deploy().get_submodule("stages.1.0.dwconv")
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    x = torch.randn(1, conv.in_channels, 17, 14, generator=random)
    padded, weight = F.pad(x, (6,) * 4).double(), conv.weight.double()
    expected = torch.empty_like(x, dtype=torch.float64)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = padded[:, :, i : i + 13, j : j + 13]
            expected[:, :, i, j] = (window * weight[:, 0]).sum((2, 3)) + conv.bias
    error = (conv(x) - expected).abs().max() / expected.abs().max()
    check.require("13x13 depthwise convolution and the explicit loop differ by", error, "<=", LOOP_ERROR)


def _receptive_field(config: UniRepLKNetConfig, seed: int) -> float:
    """Return the side, in pixels, of the centred square that half of the gradient of the centre comes from."""
    torch.manual_seed(seed)
    model = UniRepLKNet(config, num_classes=0)
    x = torch.randn(2, 3, ERF_SIZE, ERF_SIZE, generator=generator(seed, "field"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    x.requires_grad_()
    y: Tensor = model.eval().forward_features(x)
    y[:, :, y.shape[2] // 2, y.shape[3] // 2].relu().sum().backward()
    assert x.grad is not None
    energy = x.grad.abs().sum((0, 1))
    # The centre of the middle pixel of the last map, in input pixels.
    middle = ERF_SIZE // 2
    for half in range(1, middle + 1):
        inside = energy[middle - half : middle + half, middle - half : middle + half].sum()
        if inside >= ERF_SHARE * energy.sum():
            return 2.0 * half
    return float(ERF_SIZE)


def _receptive_fields(check: Check) -> None:
    shape = (3, ERF_SIZE, ERF_SIZE)
    large, small = (count_cost(UniRepLKNet(config).deploy(), shape).macs for config in (LARGE, SMALL))
    check.require(
        "cost of the 3x3 network off that of the 13x13 one by", abs(small / large - 1), "<=", COST_MISMATCH
    )
    fields = [[_receptive_field(config, seed) ** 2 for seed in SEEDS] for config in (LARGE, SMALL)]
    ours, baseline = (sum(field) / len(field) for field in fields)
    check.require(
        "area that half of the gradient comes from, 13x13 against 3x3 kernels",
        ours,
        ">",
        baseline,
        baseline=baseline,
        unit="px",
    )
    wider = sum(a > b for a, b in zip(*fields, strict=True))
    check.require("seeds of which the 13x13 network sees the larger area", wider, "==", len(SEEDS))


def run(check: Check) -> None:
    """Measure."""
    _counts(check)
    _merging(check)
    _convolutions(check)
    _receptive_fields(check)

"""Splitting a bottleneck's 3x3 convolution into paths of equal cost trains better than one wide path; the sum over
paths, the concatenation of paths and the grouped convolution are one function.

Counts are those of the paper and the public weights; widths are those of the paper's table 2.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.scaling import cardinality_width
from omniconv.models.factory import create_model
from omniconv.models.image.resnet import Bottleneck, ResNetConfig
from omniconv.papers.check import Check
from omniconv.papers.small import cifar10, train

EXACT = {"resnext50_32x4d": 25_028_904, "resnext101_64x4d": 83_455_272, "resnext101_32x8d": 88_791_336}
CIFAR = {"resnext29_8x64d_cifar": 34.4e6, "resnext29_16x64d_cifar": 68.1e6}
CIFAR_TOLERANCE = 0.01
FORMS_ERROR = 1e-5
WIDTHS = {1: 64, 2: 40, 4: 24, 8: 14, 32: 4}
COMPLEXITY, COMPLEXITY_TOLERANCE = 70e3, 0.03
WINS = 2
SEEDS = (0, 1, 2)


def _norm(x: Tensor, bn: torch.nn.Module, part: slice = slice(None)) -> Tensor:
    mean, var = bn.get_buffer("running_mean")[part], bn.get_buffer("running_var")[part]
    weight, bias = bn.get_parameter("weight")[part], bn.get_parameter("bias")[part]
    scale = weight * (var + cast(float, bn.eps)).rsqrt()
    return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]


def _paths(block: Bottleneck, x: Tensor) -> list[Tensor]:
    """Return what each path puts out before its 1x1 expansion."""
    width = block.conv2.in_channels // block.conv2.groups
    outputs = []
    for start in range(0, block.conv2.in_channels, width):
        part = slice(start, start + width)
        y = F.relu(_norm(F.conv2d(x, block.conv1.weight[part]), block.bn1, part))
        y = F.conv2d(y, block.conv2.weight[part], stride=block.conv2.stride, padding=1)
        outputs.append(F.relu(_norm(y, block.bn2, part)))
    return outputs


def split_transform_sum(block: Bottleneck, x: Tensor) -> Tensor:
    """Form (a) of the paper's figure 3: every path has its own expansion, and the paths are summed."""
    paths = _paths(block, x)
    weights = block.conv3.weight.chunk(len(paths), 1)
    total = sum((F.conv2d(y, w) for y, w in zip(paths, weights, strict=True)), torch.zeros(()))
    return F.relu(block.downsample(x) + _norm(total, block.bn3))


def early_concatenation(block: Bottleneck, x: Tensor) -> Tensor:
    """Form (b): the paths are concatenated and expanded together."""
    y = F.conv2d(torch.cat(_paths(block, x), 1), block.conv3.weight)
    return F.relu(block.downsample(x) + _norm(y, block.bn3))


def forms_error() -> float:
    """Return the largest relative difference between the three forms, in outputs and all gradients."""
    torch.manual_seed(0)
    block = Bottleneck(ResNetConfig(cardinality=8, base_width=14), 64, 32, 2, 0, 0.0)
    block(torch.randn(8, 64, 12, 12))
    block.eval()
    x = torch.randn(2, 64, 9, 10, requires_grad=True)
    probe = torch.randn_like(block(x))
    inputs = [x, *block.parameters()]
    results = []
    for form in (block, lambda x: split_transform_sum(block, x), lambda x: early_concatenation(block, x)):
        y = form(x)
        results.append([y.detach(), *torch.autograd.grad((y * probe).sum(), inputs)])
    return max(
        float((one - reference).abs().max() / reference.abs().max())
        for other in results[1:]
        for one, reference in zip(other, results[0], strict=True)
    )


def run(check: Check) -> None:
    """Measure counts, the three forms, the width rule and the training loss of 1 and 8 paths."""
    counts = {name: sum(p.numel() for p in create_model(name, device="meta").parameters()) for name in EXACT}
    for name, expected in EXACT.items():
        check.require(f"parameters of {name}", counts[name], "==", expected)
    for name, expected in CIFAR.items():
        model = create_model(name, num_classes=10, device="meta")
        off = abs(sum(p.numel() for p in model.parameters()) / expected - 1)
        check.require(f"relative distance of the parameters of {name}", off, "<=", CIFAR_TOLERANCE)

    check.require("largest relative difference of the three forms", forms_error(), "<=", FORMS_ERROR)

    found = {cardinality: cardinality_width(cardinality) for cardinality in WIDTHS}
    check.require(
        "path widths that agree with table 2", sum(found[c] == d for c, d in WIDTHS.items()), "==", 5
    )
    weights = [c * (512 * d + 9 * d * d) for c, d in found.items()]
    off = max(abs(weight / COMPLEXITY - 1) for weight in weights)
    check.require("largest relative distance of a block's weights from 70 k", off, "<=", COMPLEXITY_TOLERANCE)

    images, _ = cifar10(10000, 500)
    losses: dict[int, list[float]] = {1: [], 8: []}
    parameters = {}
    for seed in SEEDS:
        for cardinality, width in ((1, 64), (8, 14)):
            torch.manual_seed(derive(seed, "weights"))
            model = create_model(
                "resnext50_32x4d", num_classes=10, depths=(2, 2), widths=(32, 64),
                cardinality=cardinality, base_width=width,
            )  # fmt: skip
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            parameters[cardinality] = sum(p.numel() for p in model.parameters())
            losses[cardinality].append(train(model, images, epochs=4, seed=seed))
    wins = sum(eight <= one for eight, one in zip(losses[8], losses[1], strict=True))
    check.require("seeds of 3 in which 8 paths reach the lower training loss", wins, ">=", WINS)
    rounded = {c: [round(loss, 4) for loss in values] for c, values in losses.items()}
    check.note(
        f"training losses with 1 path {rounded[1]}, with 8 paths {rounded[8]}; parameters {parameters}"
    )

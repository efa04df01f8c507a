"""Two weights a channel, whatever the number of subspaces, give each subspace an attention map of its own, and make
MobileNets cheaper without loss where the module stands for blocks.

The savings in MobileNetV1 and V2 are those of the paper's positions: layer 11 and 12 of V1 (512 channels), 14 and
17 of V2, the last bottleneck of 96 and of 160 channels. The training has a thin MobileNetV1 on Fashion-MNIST
averaged to 14 x 14 pixels; modules stand for two of its four blocks that keep 48 channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.layers.attention.ulsam import ULSAM, substitute_ulsam
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

ERROR = 1e-6
SAVING = 0.10
V2_SAVING, V2_ERROR = 0.13, 0.01
MARGIN = -0.5
SEEDS = (0, 1, 2)
IMAGES, EPOCHS = 12000, 2
V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
THIN_BLOCKS = ((32, 1), (48, 2), *[(48, 1)] * 4, (64, 2), (64, 1))
THIN_POSITIONS = ("4", "5")


def make_mobilenet(
    blocks: tuple[tuple[int, int], ...], width: int, channels: int, classes: int, stride: int
) -> nn.Sequential:
    """Return MobileNetV1: a stem, and blocks of a depthwise 3x3 and a pointwise convolution with batch norm and
    ReLU.
    """

    def layer(inside: int, outside: int, kernel: int, step: int, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inside, outside, kernel, step, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]

    body: list[nn.Module] = [nn.Sequential(*layer(channels, width, 3, stride))]
    for out, step in blocks:
        body.append(nn.Sequential(*layer(width, width, 3, step, width), *layer(width, out, 1, 1)))
        width = out
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def by_loop(layer: ULSAM, x: Tensor) -> Tensor:
    """The module in training mode, one subspace after another."""
    parts, size = [], x.shape[1] // layer.subspaces
    for s, part in enumerate(x.split(size, 1)):
        mine = slice(s * size, (s + 1) * size)
        y = part * layer.conv_dws.weight[mine, 0]
        y = F.batch_norm(y, None, None, layer.bn_dws.weight[mine], layer.bn_dws.bias[mine], True).relu()
        y = F.conv2d(F.max_pool2d(y, 3, 1, 1), layer.conv_point.weight[s : s + 1])
        norm = layer.bn_point
        y = F.batch_norm(y, None, None, norm.weight[s : s + 1], norm.bias[s : s + 1], True).relu()
        y = torch.exp(y)
        parts.append(part + part * (y / y.sum((2, 3), keepdim=True)))
    return torch.cat(parts, 1)


def loop_error(subspaces: int) -> float:
    """Return the largest relative difference from the loop."""
    torch.manual_seed(subspaces)
    layer, x = ULSAM(32, subspaces), torch.randn(3, 32, 9, 6)
    with torch.no_grad():
        expected = by_loop(layer, x)
        return float((layer(x) - expected).abs().max() / expected.abs().max())


def check_layer(check: Check) -> None:
    """Measure the module by itself."""
    for subspaces in (1, 2, 4, 8, 16):
        layer = ULSAM(512, subspaces)
        weights = layer.conv_dws.weight.numel() + layer.conv_point.weight.numel()
        check.require(f"weights of 512 channels in {subspaces} subspaces", weights, "==", 2 * 512)
    macs = count_cost(ULSAM(512, 4), (512, 14, 14)).macs
    check.require("multiply-adds of its convolutions at 14 x 14", macs, "==", 2 * 512 * 14 * 14)
    check.require(
        "difference from a loop over subspaces", max(loop_error(g) for g in (1, 4, 16)), "<=", ERROR
    )
    torch.manual_seed(0)
    layer, x = ULSAM(32, 8).eval(), torch.randn(2, 32, 8, 16)
    sums = layer.attention(x).detach().sum((2, 3))
    check.require("attention maps that do not sum to 1 by", float((sums - 1).abs().max()), "<=", ERROR)
    nn.init.zeros_(layer.conv_point.weight)
    difference = float((layer(x).detach() - x * (1 + 1 / 128)).abs().max() / x.abs().max())
    check.require("difference from x (1 + 1 / (H W)) without pointwise weights", difference, "<=", ERROR)


def check_savings(check: Check) -> None:
    """Measure what substitution saves."""
    v1 = make_mobilenet(V1_BLOCKS, 32, 3, 1000, 2)
    v2 = create_model("mobilenetv2_100")
    images = torch.randn(1, 3, 64, 64)
    for name, model, positions in (
        ("V1", v1, ("10", "11")), ("V2", v2, ("blocks.4.2", "blocks.5.2"))
    ):  # fmt: skip
        before = count_cost(model, (3, 224, 224))
        after = count_cost(substitute_ulsam(model, positions, images), (3, 224, 224))
        saved = {
            "parameters": 1 - after.parameters / before.parameters,
            "multiply-adds": 1 - after.macs / before.macs,
        }
        for what, share in saved.items():
            check.require(f"share of MobileNet{name}'s {what} saved by two modules", share, ">=", SAVING)
            if name == "V2":
                check.require(
                    f"the same off the published {V2_SAVING}", abs(share - V2_SAVING), "<=", V2_ERROR
                )
    block, module = v1.get_submodule("11"), ULSAM(512)
    analytic = 14 * 14 * (512 * 512 + 9 * 512 - 2 * 512)
    macs = [count_cost(part, (512, 14, 14)).macs for part in (block, module)]
    check.require("multiply-adds saved by one module for a block of 512", macs[0] - macs[1], "==", analytic)


def make_network(seed: int, *, attention: bool) -> nn.Module:
    """Return the thin network, with modules in place of two blocks or without."""
    torch.manual_seed(derive(seed, "weights"))
    model: nn.Module = make_mobilenet(THIN_BLOCKS, 32, 1, 10, 1)
    if attention:
        model = substitute_ulsam(model, THIN_POSITIONS, torch.randn(2, 1, 14, 14))
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure the module, the savings, and a small training."""
    check_layer(check)
    check_savings(check)
    counts = [sum(p.numel() for p in make_network(0, attention=a).parameters()) for a in (True, False)]
    check.require("share of the thin network's parameters saved", 1 - counts[0] / counts[1], ">=", SAVING)
    training, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(IMAGES, 10000))
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for attention in scores:
            model = make_network(seed, attention=attention)
            train(model, training, epochs=EPOCHS, seed=seed, shift=1)
            scores[attention].append(accuracy(model, test))
    means = {attention: sum(values) / len(values) for attention, values in scores.items()}
    check.require(
        "accuracy with two blocks substituted minus without, Fashion-MNIST, mean of 3 seeds",
        means[True] - means[False], ">=", MARGIN, baseline=means[False], unit="points",
    )  # fmt: skip
    check.note(f"accuracies with ULSAM {scores[True]}, without {scores[False]}")

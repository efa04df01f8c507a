"""A residual network whose blocks have products where others have activations computes the same in any basis of its
stream, which a network of ReLUs does not, and learns about as well.

Its blocks are steps of a hyperbolic system: one with a Sobel kernel moves what it sees to one side. The small training
sees CIFAR-10 averaged to 16 x 16 pixels, with a bottleneck ResNet of as many parameters beside it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.layers.conv.reparam import fuse_conv_bn
from omniconv.models.image.qlnet import BallProjection, QLBlock, QLNet, QLNetConfig, change_basis
from omniconv.models.image.resnet import Bottleneck, ResNet, ResNetConfig
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, cifar10, train

SYMMETRY_ERROR = 1e-8
BROKEN = 1e-2
POINTS = 10
MOVED = 0.1
SHIFT_ERROR = 0.05
MISMATCH = 0.03
MARGIN = -2.0
SEEDS = (0, 1, 2)
CONFIG = QLNetConfig((3, 3, 3), (8, 16, 24), wide_until=8, stem="3x3")
LEARNER = QLNetConfig((1, 2, 1), (10, 20, 40), wide_until=0, stem="3x3")
BASELINE = ResNetConfig((1, 2, 1), (5, 10, 20), stem="3x3")


def _randomise(model: nn.Module, seed: int) -> None:
    """Give every weight and statistic a say; new residual branches are zero."""
    random = generator(seed, "qlnet")
    for name, value in model.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 2, generator=random)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_(0.3, 0.3, generator=random)
        elif value.ndim > 1:
            value.normal_(0, (1 / value[0].numel()) ** 0.5, generator=random)


def _matrix(channels: int, seed: int, *, orthogonal: bool) -> Tensor:
    """Return a random rotation, or a random invertible matrix of condition 4."""
    left, right = (
        torch.linalg.qr(
            torch.randn(channels, channels, generator=generator(seed, side), dtype=torch.float64)
        )[0]
        for side in ("left", "right")
    )
    stretch = torch.linspace(0.5, 2, channels, dtype=torch.float64)
    return left if orthogonal else left @ torch.diag(stretch) @ right


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def _rotate_resnet(model: ResNet, stage: int, matrix: Tensor) -> None:
    """Change the basis of the stream between a stage's first block and the next stage's, as in a QLNet."""
    stages = [[block for block in model.get_submodule(name).children()] for name in model.stage_names]
    blocks = [block for block in [*stages[stage], stages[stage + 1][0]] if isinstance(block, Bottleneck)]
    inverse = torch.linalg.inv(matrix)

    def write(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
        weight, bias = fuse_conv_bn(conv.weight, None, norm)
        fused = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride[0], dtype=weight.dtype)
        fused.weight = nn.Parameter(torch.einsum("ij,jkhw->ikhw", matrix, weight))
        fused.bias = nn.Parameter(matrix @ bias)
        return fused

    def read(conv: nn.Conv2d) -> None:
        conv.weight.copy_(torch.einsum("ijhw,jk->ikhw", conv.weight, inverse))

    for block in blocks[:-1]:
        block.conv3, block.bn3 = write(block.conv3, block.bn3), nn.Identity()  # type: ignore[assignment]
    for block in blocks[1:]:
        read(block.conv1)
    first, last = blocks[0].downsample, blocks[-1].downsample
    assert isinstance(first, nn.Sequential)
    assert isinstance(last, nn.Sequential)
    read(last[0])  # type: ignore[arg-type]
    blocks[0].downsample = write(first[0], first[1])  # type: ignore[arg-type]


@torch.no_grad()
def _symmetry(check: Check) -> None:
    model = QLNet(CONFIG, 10).double().eval()
    _randomise(model, 0)
    x = torch.randn(4, 3, 32, 24, generator=generator(0, "images"), dtype=torch.float64)
    expected = model(x)
    rotated = invertible = 0.0
    # Whole stages behind a ball, and within every stage; blocks 3 and 6 end with the ball.
    for first, last in ((3, 6), (6, 8)):
        channels = CONFIG.widths[first // 3]
        other = change_basis(model, first, last, _matrix(channels, first, orthogonal=True))
        rotated = max(rotated, float((other(x) - expected).abs().max()))
    for first, last in ((0, 3), (4, 6), (7, 8)):
        channels = CONFIG.widths[first // 3]
        other = change_basis(model, first, last, _matrix(channels, first, orthogonal=False))
        invertible = max(invertible, float((other(x) - expected).abs().max()))

    resnet = ResNet(ResNetConfig((2, 2, 2), (4, 4, 6), stem="3x3"), 10).double().eval()
    _randomise(resnet, 0)
    before = resnet(x)
    _rotate_resnet(resnet, 1, torch.eye(16, dtype=torch.float64))
    same = float((resnet(x) - before).abs().max())
    resnet = ResNet(ResNetConfig((2, 2, 2), (4, 4, 6), stem="3x3"), 10).double().eval()
    _randomise(resnet, 0)
    _rotate_resnet(resnet, 1, _matrix(16, 0, orthogonal=True))
    broken = float((resnet(x) - before).abs().max())
    claim = "largest change of the outputs after a random"
    check.require(f"{claim} rotation of a stage's stream", rotated, "<", SYMMETRY_ERROR, baseline=broken)
    check.require(f"{claim} invertible change of basis", invertible, "<", SYMMETRY_ERROR, baseline=broken)
    check.require(f"{claim} rotation in a ResNet of ReLUs", broken, ">", BROKEN)
    check.require("change of the ResNet's outputs after the identity as rotation", same, "<", SYMMETRY_ERROR)
    check.note("The baseline is the same rotation of a stage's stream in the ResNet.")

    generated = torch.randn(16, 16, generator=generator(1, "path"), dtype=torch.float64) / 8
    skew = generated - generated.T
    worst, moved = 0.0, math.inf
    plain = model.deploy().blocks()[3].conv3.get_parameter("weight")
    for t in torch.linspace(0, 1, POINTS + 1)[1:].tolist():
        other = change_basis(model, 3, 6, torch.linalg.matrix_exp(t * skew))
        worst = max(worst, float((other(x) - expected).abs().max()))
        weight = other.blocks()[3].conv3.get_parameter("weight")
        moved = min(moved, float((weight - plain).norm() / plain.norm()) / t)
    check.require(f"{claim} step along exp(tB), {POINTS} points", worst, "<", SYMMETRY_ERROR)
    check.require("relative way of the weights for each unit of t, smallest", moved, ">", MOVED)


@torch.no_grad()
def _advection(check: Check) -> None:
    """One channel, a product of u with one, and the Sobel kernel: u_t = u_x moves u to the left."""
    step, count = 0.02, 100
    block = QLBlock(1, 1, QLNetConfig((1,), (1,), multiplier=1, wide_until=0), 1, False).double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    # Products of (u, 0) with (1, 1): the norm's shift of the second half is the one.
    norm = block.get_submodule("conv1.bn")
    block.get_parameter("conv1.conv.weight").copy_(torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1, 1))
    norm.get_parameter("bias").copy_(torch.tensor([0.0, 0, 1, 1]))
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    block.conv2.weight.copy_(sobel.expand(2, 1, 3, 3))
    block.get_parameter("conv3.conv.weight").copy_(torch.tensor([step, 0.0]).view(1, 2, 1, 1))
    nn.init.ones_(block.get_parameter("conv3.bn.weight"))
    axis = torch.arange(64, dtype=torch.float64)
    blob = torch.exp(-((axis[:, None] - 32) ** 2 + (axis[None] - 32) ** 2) / 32)[None, None]

    def centre(u: Tensor) -> tuple[float, float]:
        mass = u[0, 0] / u.sum()
        return float((mass.sum(1) * axis).sum()), float((mass.sum(0) * axis).sum())

    u = blob
    for _ in range(count):
        u = block(u)
    (row, column), predicted = centre(u), 32 - count * step
    check.require(
        "shift of a blob by blocks with a Sobel kernel off the predicted one by, relatively",
        abs(column - predicted) / (32 - predicted), "<", SHIFT_ERROR,
    )  # fmt: skip
    check.require("shift of the blob to the other side, in pixels", abs(row - 32), "<=", 1e-6)
    outside = torch.randn(1, 9, 5, 5, dtype=torch.float64) * 4
    longest = BallProjection()(outside).norm(dim=1).max()
    check.require("longest vector in the ball over its radius", longest / 3, "<=", 1 + 1e-12)


def _training(check: Check) -> None:
    def make(kind: str) -> nn.Module:
        return QLNet(LEARNER, 10) if kind == "qlnet" else ResNet(BASELINE, 10)

    sizes = {kind: sum(p.numel() for p in make(kind).parameters()) for kind in ("qlnet", "resnet")}
    mismatch = abs(sizes["resnet"] / sizes["qlnet"] - 1)
    check.require("parameters of QLNet and ResNet differ by", mismatch, "<=", MISMATCH)
    images, test = ((F.avg_pool2d(x, 2), y) for x, y in cifar10(3000, 2000))
    scores: dict[str, list[float]] = {"qlnet": [], "resnet": []}
    for seed in SEEDS:
        for kind, found in scores.items():
            torch.manual_seed(derive(seed, "weights"))
            model = make(kind)
            train(model, images, epochs=3, batch=64, seed=seed, shift=1)
            found.append(accuracy(model, test))
    means = {kind: sum(found) / len(found) for kind, found in scores.items()}
    check.require(
        "accuracy of QLNet minus ResNet of as many parameters, CIFAR-10, mean of 3 seeds",
        means["qlnet"] - means["resnet"], ">=", MARGIN, baseline=means["resnet"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies of QLNet {scores['qlnet']}, of ResNet {scores['resnet']}")


def run(check: Check) -> None:
    """Measure the symmetry, the system behind a block, and a small training."""
    _symmetry(check)
    _advection(check)
    _training(check)

"""Inception-ResNets have the published sizes, need their residuals scaled down where they are wide, and small ones
reach a loss in fewer steps than a network of the same cost without shortcuts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.models.image.inception_resnet import InceptionResidual
from omniconv.papers.check import Check
from omniconv.papers.small import Split, cifar10, train

PARAMETERS = {"inception_v4": 42.680e6, "inception_resnet_v2": 55.843e6}
PARAMETERS_SHARE = 0.001
MAPS = ((384, 35), (1024, 17), (1536, 8))
WIDTH, DEPTH = 1152, 20
BRANCHES = {"branch0": ((192, 1),), "branch1": ((128, 1), (160, (1, 7)), (192, (7, 1)))}
GROWTH = 3.0
COST_SHARE = 0.1
LOSS, IMAGES, BATCH, WINDOW = 1.8, 6400, 32, 20
PLAIN_DEPTHS, RESIDUAL_DEPTHS, SMALL = (1, 1, 1), (1, 2, 1), 1 / 8
SEEDS = (0, 1, 2)


def identity_error() -> float:
    """Return the largest distance of a residual block of scale 0 from ReLU, over all blocks of a small network."""
    torch.manual_seed(0)
    model = create_model("inception_resnet_test", scales=(0.0, 0.0, 0.0), head_width=None)
    blocks = [module for module in model.modules() if isinstance(module, InceptionResidual)]
    errors = []
    for block in blocks:
        x = torch.randn(2, block.conv2d.out_channels, 7, 9)
        errors.append(float((block(x) - x.relu()).abs().max()))
    return max(errors)


@torch.no_grad()
def growth(scale: float) -> list[float]:
    """Return how many times the input's variance each output of a stack of wide blocks has, as initialised."""
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH, 6, 6).relu()
    start = x.var()
    growths = []
    for _ in range(DEPTH):
        block = InceptionResidual(WIDTH, BRANCHES, scale)
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        x = block(x)
        growths.append(float(x.var() / start))
    return growths


def make(residual: bool) -> nn.Module:
    """Return a small Inception-ResNet, or a small Inception-v4 of about its cost."""
    if residual:
        return create_model(
            "inception_resnet_test",
            num_classes=10,
            version=2,
            head_width=None,
            depths=RESIDUAL_DEPTHS,
            width=SMALL,
        )
    return create_model("inception_v4_test", num_classes=10, depths=PLAIN_DEPTHS, width=SMALL)


def steps_to_loss(seed: int, residual: bool, images: Split) -> int:
    """Return after how many steps the mean loss of the last ones reaches LOSS; all of them if it never does."""
    torch.manual_seed(derive(seed, "weights"))
    losses: list[float] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(logits, labels)
        losses.append(value.item())
        return value

    train(make(residual), images, epochs=1, batch=BATCH, seed=seed, shift=1, loss=loss)
    for step in range(WINDOW, len(losses) + 1):
        if sum(losses[step - WINDOW : step]) / WINDOW <= LOSS:
            return step
    return len(losses)


def run(check: Check) -> None:
    """Measure counts, the scale's effect, and two trainings a seed."""
    for name, published in PARAMETERS.items():
        count = sum(p.numel() for p in create_model(name, device="meta").parameters())
        share = abs(count / published - 1)
        check.require(f"{name}: distance from the published count", share, "<=", PARAMETERS_SHARE)
    maps = create_model("inception_v4", device="meta").forward_stages(
        torch.empty(1, 3, 299, 299, device="meta")
    )
    right = sum(tuple(fmap.shape[1:]) == (c, n, n) for (c, n), fmap in zip(MAPS, maps[-3:], strict=True))
    check.require("maps of 384, 1024 and 1536 channels at 35, 17 and 8 pixels", right, "==", len(MAPS))

    check.require("residual blocks of scale 0 minus ReLU", identity_error(), "==", 0)
    bare, scaled = growth(1.0), growth(0.1)
    check.require(f"growth of the variance over {DEPTH} blocks without scaling", bare[-1], ">", GROWTH)
    rising = bare[4] < bare[9] < bare[-1]
    check.require("the same rises from 5 to 10 to 20 blocks", rising, "==", True)
    check.require("growth with scale 0.1", scaled[-1], "<", GROWTH, baseline=bare[-1])

    costs = {residual: count_cost(make(residual), (3, 16, 16)).macs for residual in (True, False)}
    share = abs(costs[True] / costs[False] - 1)
    check.require("difference of the two small networks' multiply-adds", share, "<=", COST_SHARE)
    (x, y), _ = cifar10(IMAGES, 1)
    images = F.avg_pool2d(x, 2), y
    steps = {
        residual: [steps_to_loss(seed, residual, images) for seed in SEEDS] for residual in (True, False)
    }
    means = {residual: sum(found) / len(SEEDS) for residual, found in steps.items()}
    check.require(
        f"steps to a loss of {LOSS} with shortcuts less those without, CIFAR-10 at 16 pixels, mean of 3 seeds",
        means[True] - means[False], "<", 0, baseline=means[False], unit="steps",
    )  # fmt: skip
    check.note(f"steps with shortcuts {steps[True]}, without {steps[False]}; multiply-adds {costs}")

"""Networks stitched of two trained anchors by least squares cost what lies between them, begin far closer to what the
dearer anchor expects than by chance, and after 200 common steps are more accurate for it and the better the dearer.

The multiply-adds of all 71 routes through DeiT-Ti, DeiT-S and DeiT-B are held to the list in the official repository.
The small anchors are residual networks of 2 + 2 and 4 + 4 blocks and widths from 16 and 48, trained once on
Fashion-MNIST, averaged to 14 x 14 pixels; stitches are fitted to 100 images and trained with the dearer anchor as
teacher. Random stitches, PyTorch's own, get the same steps.
"""

import copy

import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from omniconv.compress.adaptive.snnet import StitchableNetwork, train_stitches
from omniconv.compress.adaptive.steps import steps
from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

ROUTES = 71
# Of one 224 x 224 image, in millions, as the official repository lists them by number of the route.
PUBLISHED = (
    1258,
    4608,
    17583,
    4696,
    4317,
    4798,
    4419,
    4040,
    4522,
    4143,
    3763,
    4245,
    3866,
    3487,
    3968,
    3589,
    3210,
    3692,
    3312,
    2933,
    3415,
    3036,
    2657,
    3138,
    2759,
    2380,
    2861,
    2482,
    2103,
    2585,
    2206,
    1826,
    2308,
    1929,
    1550,
    2031,
    1652,
    17961,
    16506,
    18341,
    16885,
    15430,
    17264,
    15809,
    14353,
    16188,
    14732,
    13277,
    15112,
    13656,
    12201,
    14035,
    12580,
    11124,
    12959,
    11504,
    10048,
    11883,
    10427,
    8972,
    10806,
    9351,
    7895,
    9730,
    8275,
    6819,
    8654,
    7198,
    5743,
    7577,
    6122,
)
MACS_ERROR = 0.03
FIT = 5.0
MARGIN = 3.0
CORRELATION = 0.5
SEEDS = (0, 1, 2)
STEPS, BATCH, LEARNING_RATE = 200, 32, 5e-4
SHAPE = (1, 14, 14)


def deit_error() -> tuple[int, float]:
    """Return the routes through three DeiTs, and the largest relative difference of their cost from the published."""
    with torch.device("meta"):
        anchors = [create_model(f"deit_{size}_patch16_224") for size in ("tiny", "small", "base")]
        network = StitchableNetwork(anchors, torch.empty(1, 3, 224, 224))
    costs = sorted((index, macs) for macs, index in network.costs((3, 224, 224)))
    errors = [abs(macs / 1e6 / wanted - 1) for (_, macs), wanted in zip(costs, PUBLISHED, strict=True)]
    return len(network.routes), max(errors)


def make_anchors(images: Split) -> list[nn.Module]:
    """Return two trained residual networks, a cheap and a dear one."""
    anchors = []
    for depth, width in ((2, 16), (4, 48)):
        torch.manual_seed(derive(width, "weights"))
        model = create_model(
            "resnet18", num_classes=10, in_chans=1, depths=(depth, depth), widths=(width, 2 * width)
        )
        train(model, images, epochs=1.5, shift=1)
        anchors.append(model.eval())
    return anchors


def randomized(network: StitchableNetwork, seed: int) -> StitchableNetwork:
    """Return a copy with new stitches."""
    network = copy.deepcopy(network)
    torch.manual_seed(derive(seed, "stitches"))
    for stitch in network.stitches:
        stitch.fc.reset_parameters()  # type: ignore[union-attr]
    return network


@torch.no_grad()
def stitch_error(network: StitchableNetwork, images: torch.Tensor) -> float:
    """Return the mean squared error behind the stitches, in units of the features' mean square, over all stitches."""
    errors = []
    features = []
    for anchor in network.anchors.eval():
        x, outputs = images, []
        for step in steps(anchor):
            x = step.run(x)
            outputs.append(x)
        features.append(outputs)
    for route in network.routes:
        if route.leave is not None:
            wanted = features[route.front + 1][route.enter - 1]
            found = network.stitches[route.stitch](features[route.front][route.leave])
            errors.append(float((found - wanted).square().mean() / wanted.square().mean()))
    return sum(errors) / len(errors)


def joint_training(network: StitchableNetwork, images: Split, teacher: nn.Module, seed: int) -> None:
    """Train all routes in place."""
    x, y = images
    random = generator(seed, "batches")
    chosen = (torch.randint(len(y), (BATCH,), generator=random) for _ in range(STEPS))
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05)
    network.train()
    train_stitches(network, ((x[i], y[i]) for i in chosen), optimizer, teacher=teacher, seed=seed)


def accuracies(network: StitchableNetwork, test: Split) -> list[float]:
    """Return the accuracy of every route in percent."""
    scores = []
    for index in range(len(network.routes)):
        network.set_stitch(index)
        scores.append(accuracy(network, test))
    return scores


def run(check: Check) -> None:
    """Count routes and costs, fit stitches, and train them together."""
    routes, error = deit_error()
    check.require("routes through DeiT-Ti, DeiT-S and DeiT-B", routes, "==", ROUTES)
    check.require("relative difference of their multiply-adds from the published", error, "<=", MACS_ERROR)

    images, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(20000, 2000))
    anchors = make_anchors(images)
    fitted = StitchableNetwork(anchors, images[0][:100]).eval()
    same = 0
    for index, anchor in enumerate(anchors):
        fitted.set_stitch(index)
        with torch.no_grad():
            same += int(torch.equal(fitted(test[0][:100]), anchor(test[0][:100])))
    check.require("anchors that their numbers reproduce bit for bit", same, "==", len(anchors))

    costs = {index: macs for macs, index in fitted.costs(SHAPE)}
    low, high = (count_cost(anchor, SHAPE).macs for anchor in anchors)
    outside = sum(not low < costs[index] < high for index in range(2, len(fitted.routes)))
    check.require("stitched networks that do not cost what lies between their anchors", outside, "==", 0)

    held_out = test[0][:500]
    least = stitch_error(fitted, held_out)
    chance = [stitch_error(randomized(fitted, seed), held_out) for seed in SEEDS]
    check.require(
        "error behind random stitches over that behind fitted ones, on images not fitted to",
        sum(chance) / len(chance) / least, ">=", FIT, baseline=least, unit="times",
    )  # fmt: skip

    scores: dict[str, list[list[float]]] = {"fitted": [], "random": []}
    for seed in SEEDS:
        for name, start in (("fitted", copy.deepcopy(fitted)), ("random", randomized(fitted, seed))):
            joint_training(start, images, anchors[1], seed)
            scores[name].append(accuracies(start, test))
    means = {
        name: [sum(column) / len(column) for column in zip(*rows, strict=True)]
        for name, rows in scores.items()
    }
    stitched = {name: sum(values[2:]) / len(values[2:]) for name, values in means.items()}
    check.require(
        "mean accuracy of stitched networks, fitted minus random start, 3 seeds",
        stitched["fitted"] - stitched["random"], ">=", MARGIN, baseline=stitched["random"], unit="points",
    )  # fmt: skip
    order = [costs[index] for index in range(len(fitted.routes))]
    correlation = float(spearmanr(order, means["fitted"]).statistic)  # type: ignore[attr-defined]
    check.require(
        "rank correlation of multiply-adds and accuracy over all routes", correlation, ">", CORRELATION
    )
    check.note(f"multiply-adds {order}, accuracies {[round(v, 2) for v in means['fitted']]}")
    check.note(f"accuracies from random stitches {[round(v, 2) for v in means['random']]}")

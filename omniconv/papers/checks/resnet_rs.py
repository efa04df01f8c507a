"""ResNet-RS has the published counts, and over a long training it is the recipe's regularisation that pays.

Multiply-adds are half of the paper's operations. The training sees 500 pictures of CIFAR-10, averaged to 16 x 16
pixels, for 30 epochs, so that a network overfits: once with the usual shifts and flips and a weight decay of 0.05,
once with the recipe (RandAugment, label smoothing, dropout, stochastic depth, averaged weights, half the weight decay).
Depth against width is reported, not required.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.data.augment import rand_augment
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.models.image.resnet import ResNet
from omniconv.models.image.resnet_blocks import ResNetConfig
from omniconv.models.image.resnetrs import scale
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, read_cifar10, standardise, train

PARAMETERS = {
    "resnetrs50": (35.692e6, 0.002),
    "resnetrs101": (63.619e6, 0.002),
    "resnetrs152": (86.622e6, 0.002),
    "resnetrs200": (93.210e6, 0.002),
    "resnetrs270": (130e6, 0.01),
    "resnetrs350": (164e6, 0.01),
    "resnetrs420": (191.892e6, 0.002),
}
OPERATIONS, OPERATIONS_TOLERANCE = 4.6e9, 0.05
STAGES = ((3, 256), (4, 512), (6, 1024), (3, 2048))
SEEDS = (0, 1, 2)
IMAGES, EPOCHS, BATCH, PEAK = 500, 30, 50, 3e-3
SMALL = ResNetConfig(
    (1, 1), (16, 32), bottleneck=False, stem="3x3", shortcut="pool", gate="se", gate_reduction=4
)
SHORT, LONG = 1, 5


def added() -> dict[str, tuple[int, int]]:
    """Return the parameters that each switch adds to ResNet-50, as counted and by the formula."""

    def count(**options: Any) -> int:
        model = create_model("resnet50", device="meta", **options)
        return sum(p.numel() for p in model.parameters())

    plain = count()
    gates = sum(n * (2 * c * c // 4 + c // 4 + c) for n, c in STAGES)
    # Three convolutions for one of 7x7, with norms over 32 channels; and a convolution and a norm for the pooling.
    stem = 27 * 32 + 9 * 32 * 32 + 9 * 32 * 64 - 49 * 3 * 64 + 2 * (32 + 32)
    pool = 9 * 64 * 64 + 2 * 64
    return {
        "squeeze and excitation": (count(gate="se", gate_reduction=4) - plain, gates),
        "the deep stem": (count(stem="deep") - plain, stem),
        "the convolution for the pooling": (count(stem="rs") - count(stem="deep"), pool),
        "average-pooled shortcuts": (count(shortcut="pool") - plain, 0),
    }


def pictures(name: str, count: int) -> Split:
    """Return pictures (N, 3, 16, 16) from 0 to 1 and their labels."""
    images, labels = read_cifar10(name)
    return F.avg_pool2d(images[:count], 2) / 255, labels[:count]


def make_network(seed: int, config: ResNetConfig, **options: float) -> nn.Module:
    """Return the network of a configuration for ten classes."""
    torch.manual_seed(derive(seed, "weights"))
    return ResNet(ResNetConfig(**{**vars(config), **options}), 10)


def fit(split: Split, mean: Tensor, deviation: Tensor, seed: int, *, recipe: bool) -> nn.Module:
    """Train the small network with the usual augmentation, or with everything of the recipe."""
    model = make_network(seed, SMALL, **({"drop_rate": 0.25, "drop_path_rate": 0.1} if recipe else {}))
    averaged = copy.deepcopy(model)
    images, labels = split
    steps = EPOCHS * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, weight_decay=0.025 if recipe else 0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.2)
    random = generator(seed, "order")
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=random).split(BATCH):
            x = images[chosen]
            dy, dx = torch.randint(-1, 2, (2,), generator=random).tolist()
            x = F.pad(x, (1,) * 4)[..., 1 + dy : 17 + dy, 1 + dx : 17 + dx]
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=random) < 0.5, x.flip(3), x)
            if recipe:
                x = rand_augment(x, random, magnitude=10)
            x = (x - mean) / deviation
            loss = F.cross_entropy(model(x), labels[chosen], label_smoothing=0.1 if recipe else 0.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for kept, value in zip(
                    averaged.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    kept.copy_(value if not kept.is_floating_point() else kept.lerp(value, 0.02))
    return averaged if recipe else model


def run(check: Check) -> None:
    """Measure counts, what each switch adds, and two small trainings."""
    for name, (published, tolerance) in PARAMETERS.items():
        found = sum(p.numel() for p in create_model(name, device="meta").parameters())
        check.require(
            f"relative distance of the parameters of {name}", abs(found / published - 1), "<=", tolerance
        )
    operations = 2 * count_cost(create_model("resnetrs50", device="meta"), (3, 160, 160)).macs
    check.require(
        "relative distance of the operations of resnetrs50 at 160 pixels, two a multiply-add",
        abs(operations / OPERATIONS - 1), "<=", OPERATIONS_TOLERANCE,
    )  # fmt: skip
    for name, (counted, formula) in added().items():
        check.require(
            f"parameters that {name} adds to ResNet-50, less the formula's", counted - formula, "==", 0
        )

    training, (images, labels) = pictures("train20k.tar", IMAGES), pictures("val2k.tar", 2000)
    mean = training[0].mean((0, 2, 3), keepdim=True)
    deviation = training[0].std((0, 2, 3), keepdim=True)
    test = ((images - mean) / deviation, labels)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for recipe in scores:
            scores[recipe].append(accuracy(fit(training, mean, deviation, seed, recipe=recipe), test))
    means = {recipe: sum(values) / len(values) for recipe, values in scores.items()}
    check.require(
        "accuracy of the recipe minus usual training, 30 epochs, mean of 3 seeds",
        means[True] - means[False], ">", 0, baseline=means[False], unit="points",
    )  # fmt: skip
    check.note(f"accuracies with the recipe {scores[True]}, without {scores[False]}")

    more, labels = pictures("train20k.tar", 1500)
    more, test = standardise(more, more), (standardise(test[0], test[0]), test[1])
    grown = {}
    for along, overfits in (("depth", True), ("width", False)):
        for length, epochs in (("short", SHORT), ("long", LONG)):
            model = make_network(0, scale(SMALL, 2.0, overfits=overfits))
            train(model, (more, labels), epochs=epochs, batch=BATCH, seed=0, shift=1)
            grown[f"{along}, {length}"] = accuracy(model, test)
    check.note(f"accuracies of networks of twice the operations, one seed: {grown}")

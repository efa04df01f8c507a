"""NASNet-A has the published sizes, cells are data that always build, the controller learns what is rewarded, and a
cell that is good on one data set is good on another.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.design.nas.controller import Controller, ControllerTrainer, choice_sizes, decode, random_choices
from omniconv.layers.scheduled_drop_path import ScheduledDropPath
from omniconv.models.factory import create_model
from omniconv.models.image.nasnet import OPERATIONS, Genotype, NASNet, NASNetConfig
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, digits, fashion_mnist, train
from omniconv.testing.models import count_tolerance

# (parameters, multiply-adds, image side, classes), as printed
PUBLISHED = {
    "nasnetalarge": (88.9e6, 23.8e9, 331, 1000),
    "nasnetamobile": (5.3e6, 564e6, 224, 1000),
    "nasneta_cifar": (3.3e6, None, 32, 10),
}
PARAMETERS_SHARE, MACS_SHARE = 0.01, 0.02
DROP, DROP_ERROR = 0.4, 0.02
GENOTYPES = 10
UPDATES, LR, GAIN = 400, 3.5e-3, 0.15
CELLS = 8
SMALL = {"cells": 1, "channels": 4, "stem_width": 8, "stem": "keep", "drop_rate": 0.0}
EPOCHS, BATCH, IMAGES = 2, 50, 700


def dropped(progress: float) -> float:
    """Return the share of samples that a path drops at a point of the training."""
    layer = ScheduledDropPath(DROP)
    layer.set_progress(progress)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float((layer(torch.ones(20000, 1)) == 0).float().mean())


def runs(genotype: Genotype) -> bool:
    """Return whether a genotype builds a network that gives finite logits."""
    model = NASNet(NASNetConfig(1, 4, 6, "keep", genotype=genotype), 3, 1).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 1, 11, 14))
    return logits.shape == (2, 3) and bool(logits.isfinite().all())


class Oracle:
    """A quality of cells that depends on every choice and on the operations that meet in a block.

    Each value of each choice is worth a number in [0, 1], each pair of operations one as well; the quality is the
    mean over both kinds.
    """

    def __init__(self, blocks: int = 5) -> None:
        random = generator(0, "oracle")
        self.single = [torch.rand(size, generator=random) for size in choice_sizes(blocks)]
        self.pair = torch.rand(len(OPERATIONS), len(OPERATIONS), generator=random)

    def __call__(self, choices: Tensor) -> Tensor:
        """Return the quality of every row."""
        single = torch.stack([table[choices[:, i]] for i, table in enumerate(self.single)], 1).mean(1)
        pair = self.pair[choices[:, 2::5], choices[:, 3::5]].mean(1)
        return (single + pair) / 2


def score(genotype: Genotype, train_split: Split, test: Split) -> float:
    """Return the test accuracy of a small network of such cells after a short training."""
    torch.manual_seed(derive(0, "weights"))
    model = NASNet(NASNetConfig(genotype=genotype, **SMALL), 10, 1)
    train(model, train_split, epochs=EPOCHS, batch=BATCH, shift=1, flip=False)
    return accuracy(model, test)


def run(check: Check) -> None:
    """Measure counts, the drop path, the search, and cells on two data sets."""
    for name, (parameters, macs, side, classes) in PUBLISHED.items():
        cost = count_cost(create_model(name, num_classes=classes, device="meta"), (3, side, side))
        # A printed figure is known to half of its last digit.
        share = count_tolerance(parameters, PARAMETERS_SHARE) / parameters
        distance = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: distance from the published parameters", distance, "<=", share)
        if macs:
            distance = abs(cost.macs / macs - 1)
            check.require(f"{name}: distance from the published multiply-adds", distance, "<=", MACS_SHARE)

    for progress in (0.0, 0.5, 1.0):
        error = abs(dropped(progress) - progress * DROP)
        check.require(
            f"share of dropped paths at {progress} minus {progress} x {DROP}", error, "<=", DROP_ERROR
        )
    x = torch.randn(50, 3)
    check.require(
        "drop path in eval mode is the identity", torch.equal(ScheduledDropPath(DROP).eval()(x), x), "==", 1
    )

    torch.manual_seed(derive(0, "controller"))
    controller, oracle = Controller(), Oracle()
    trainer = ControllerTrainer(controller, oracle, lr=LR)
    random = generator(0, "search")
    qualities = [trainer.step(random) for _ in range(UPDATES)]
    found = sum(qualities[-20:]) / 20
    baseline = float(oracle(random_choices(400, generator=random)).mean())
    check.require(
        f"mean quality of the controller's cells after {UPDATES} updates over that of random search",
        found / baseline - 1, ">=", GAIN, baseline=baseline,
    )  # fmt: skip
    drawn = [*random_choices(GENOTYPES, generator=random), *controller.sample(GENOTYPES, random)[0]]
    good = sum(runs(decode(row)) for row in drawn)
    check.require("random and sampled genotypes that build and run", good, "==", 2 * GENOTYPES)

    small, other = digits(), tuple((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(IMAGES, 1000))
    genotypes = [decode(row) for row in random_choices(CELLS, generator=generator(0, "cells"))]
    here = [score(genotype, *small) for genotype in genotypes]
    there = [score(genotype, *other) for genotype in genotypes]
    best = there[here.index(max(here))]
    rank = 1 + sum(accuracy > best for accuracy in there)
    check.require(
        f"rank on Fashion-MNIST of the cell, of {CELLS} random ones, that is best on digits",
        rank,
        "<=",
        CELLS // 2,
    )
    check.note(f"accuracies on digits {here}, on Fashion-MNIST {there}")

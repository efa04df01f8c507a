"""Every rule for layer ratios meets the sparsity it is given; a network under a random mask fixed before training
comes the closer to the dense one the wider it is, and Erdos-Renyi-kernel ratios are no worse than uniform ones.

The counts are those of ResNet-18, ResNet-50 and VGG-16; saliencies are measured on their forms for 32 x 32 pixels.
The training sees Fashion-MNIST averaged to 14 x 14 pixels.
"""

import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.prune.masks import hold_masks, keep_largest, prunable_weights
from omniconv.compress.prune.random_prune import random_prune, random_prune_like
from omniconv.compress.prune.ratios import (
    erdos_renyi_densities,
    erk_densities,
    layer_counts,
    uniform_densities,
    uniform_plus_densities,
)
from omniconv.compress.prune.saliency import grasp_scores, snip_scores, synflow_masks
from omniconv.compress.report import weight_layers
from omniconv.core.seeds import derive
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
TOLERANCE = 0.001
RULES = (uniform_densities, uniform_plus_densities, erdos_renyi_densities, erk_densities)
NETWORKS = {"resnet18": {}, "resnet50": {}, "vgg16": {}}
SMALL = {"resnet18": {}, "resnet50": {}, "vgg16_bn": {"hidden": 512, "window": 1}}
STEPS = 100
WIDTHS = (8, 16, 32)
WIDTH_TOLERANCE = 0.3
WIDEST_GAP = 1.0
SEEDS = (0, 1, 2)
IMAGES, TEST, EPOCHS = 6_400, 5_000, 2
RECIPE = {"batch": 64, "lr": 5e-3, "shift": 1}


def rule_errors() -> tuple[float, float]:
    """Return the largest difference from the sparsity asked for, and the largest density of a layer."""
    error = density = 0.0
    for name in NETWORKS:
        layers = weight_layers(create_model(name, device="meta"))
        shapes = {key: tuple(layer.weight.shape) for key, layer in layers.items()}
        total = sum(map(math.prod, shapes.values()))
        for rule in RULES:
            for sparsity in SPARSITIES:
                counts = layer_counts(rule, shapes, sparsity)
                error = max(error, abs(1 - sum(counts.values()) / total - sparsity))
                density = max(density, *(counts[key] / math.prod(shape) for key, shape in shapes.items()))
    return error, density


def first_loss(model: nn.Module) -> Tensor:
    """Return the loss on one batch of noise, which is enough to count weights."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return F.cross_entropy(model(images), torch.arange(4))


def saliency_errors() -> tuple[float, int]:
    """Return the largest difference from the sparsity asked for, and by how much counts of layers miss SNIP's."""
    error, wrong = 0.0, 0
    for name, options in SMALL.items():
        torch.manual_seed(0)
        model = create_model(name, num_classes=10, **options)
        scores = {"SNIP": snip_scores(model, first_loss), "GraSP": grasp_scores(model, first_loss)}
        for sparsity in SPARSITIES:
            found = {key: keep_largest(value, sparsity) for key, value in scores.items()}
            found["SynFlow"] = synflow_masks(model, sparsity, (3, 32, 32), rounds=1)
            for masks in found.values():
                kept = sum(int(mask.sum()) for mask in masks.values())
                error = max(error, abs(1 - kept / sum(mask.numel() for mask in masks.values()) - sparsity))
            if name == "resnet18":
                weights = prunable_weights(random_prune_like(model, found["SNIP"])[0])
                wrong += sum(
                    abs(int(weights[key].count_nonzero()) - int(mask.sum()))
                    for key, mask in found["SNIP"].items()
                )
    return error, wrong


def network(width: int) -> nn.Sequential:
    """Return three convolutions and a classifier."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 10))


def revived() -> int:
    """Return how many pruned weights are not zero after steps with momentum."""
    torch.manual_seed(0)
    model, _ = random_prune(network(8), 0.9)
    masks = {name: weight != 0 for name, weight in prunable_weights(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    with hold_masks(model, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(32, 1, 14, 14)), torch.randint(10, (32,))).backward()
            optimizer.step()
    return sum(int(weight[~masks[name]].count_nonzero()) for name, weight in prunable_weights(model).items())


def score(seed: int, width: int, sparsity: float, data: Split, test: Split, rule=erk_densities) -> float:
    """Train a network under a random mask and return its accuracy."""
    torch.manual_seed(derive(seed, "weights"))
    model, _ = random_prune(network(width), sparsity, rule=rule, seed=seed)
    with hold_masks(model) as keeper:
        train(model, data, epochs=EPOCHS, seed=seed, after_step=lambda *_: keeper.apply(), **RECIPE)
    return accuracy(model, test)


def run(check: Check) -> None:
    """Measure the counts, the masks, and what width and ratios do."""
    error, density = rule_errors()
    check.require("largest difference from the sparsity asked for, four rules", error, "<=", TOLERANCE)
    check.require("largest density of a layer", density, "<=", 1)
    error, wrong = saliency_errors()
    check.require("largest difference from the sparsity asked for, three saliencies", error, "<=", TOLERANCE)
    check.require("weights by which layers' counts miss SNIP's", wrong, "==", 0)
    check.require(f"pruned weights that are not zero after {STEPS} steps with momentum", revived(), "==", 0)

    (images, labels), (test_images, test_labels) = fashion_mnist(IMAGES, TEST)
    data, test = (F.avg_pool2d(images, 2), labels), (F.avg_pool2d(test_images, 2), test_labels)
    dense, gaps = [], []
    for width in WIDTHS:
        whole, sparse = (
            statistics.mean(score(seed, width, sparsity, data, test) for seed in SEEDS)
            for sparsity in (0.0, 0.8)
        )
        dense.append(whole)
        gaps.append(whole - sparse)
    for i in (1, 2):
        check.require(
            f"rise of the gap to dense at 80% from width {WIDTHS[i - 1]} to {WIDTHS[i]}, mean of {len(SEEDS)} seeds",
            gaps[i] - gaps[i - 1], "<=", WIDTH_TOLERANCE, baseline=gaps[i - 1], unit="points",
        )  # fmt: skip
    check.require(
        f"gap to dense at 80% and width {WIDTHS[-1]}",
        gaps[-1],
        "<=",
        WIDEST_GAP,
        baseline=dense[-1],
        unit="points",
    )
    erk, uniform = (
        statistics.mean(score(seed, WIDTHS[1], 0.95, data, test, rule) for seed in SEEDS)
        for rule in (erk_densities, uniform_densities)
    )
    check.require(
        f"accuracy of ERK over uniform ratios at 95%, mean of {len(SEEDS)} seeds",
        erk - uniform, ">=", 0, baseline=uniform, unit="points",
    )  # fmt: skip
    check.note(f"dense accuracies by width {dense}; gaps at 80% {gaps}")

"""The knapsack is solved exactly and fits its budget; at half the multiply-adds it keeps more accuracy than uniform L1
pruning, and fine-tuning with inner distillation is at least as good as without.

A residual network of 8 layers (16, 32 and 64 channels) on Fashion-MNIST averaged to 14 x 14 pixels: 6,400 images for
training, 5,000 of the test set. 2 epochs of training; then 50 steps of fine-tuning, with and without distillation from
the same pruned network.
"""

import copy
import statistics

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.prune.knapsack import (
    InnerDistillation,
    fill_knapsack,
    knapsack,
    taylor_scores,
)
from omniconv.compress.prune.structured import structured_pruning
from omniconv.compress.structure.graph import Structure, trace_structure
from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

PROBLEMS, ITEMS = 200, 15
FILLED = 0.99
LINEAR = 0.05
EQUAL = 1e-5
GAIN = 5.0
DISTILLED = 0.0
SEEDS = (0, 1, 2)
IMAGES, TEST = 6_400, 5_000
SHAPE = (1, 14, 14)
RATIO = 0.5
BATCHES, BATCH = 20, 32
GAMMA = 0.5
TRAIN = {"epochs": 2, "batch": 64, "lr": 5e-3, "shift": 1}
TUNE = {"epochs": 0.5, "batch": 64, "lr": 2e-3, "shift": 1}


def short_of_best() -> float:
    """Return the largest difference of the knapsack's value from the best of all subsets."""
    random = np.random.default_rng(0)
    subsets = (np.arange(2**ITEMS)[:, None] >> np.arange(ITEMS)) & 1
    worst = 0.0
    for _ in range(PROBLEMS):
        values, weights = random.random(ITEMS), random.integers(1, 100, ITEMS)
        capacity = int(random.integers(50, weights.sum()))
        best = (subsets @ values)[subsets @ weights <= capacity].max()
        items = {str(i): torch.tensor([value]) for i, value in enumerate(values)}
        keep = knapsack(items, {str(i): int(w) for i, w in enumerate(weights)}, capacity)
        chosen = np.array([bool(kept) for kept in keep.values()])
        if weights[chosen].sum() > capacity:
            return float("inf")
        worst = max(worst, abs(best - values[chosen].sum()))
    return worst


def l1_norms(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """Return by group the sum of absolute weights of each unit."""
    return structure.scores({name: p.abs() for name, p in model.named_parameters() if p.ndim > 1})


def run(check: Check) -> None:
    """Measure the solver, the budget, the rebuilt network, and accuracy before and after fine-tuning."""
    claim = f"value short of the best of all subsets, worst of {PROBLEMS} problems of {ITEMS} items"
    check.require(claim, short_of_best(), "<=", 1e-9)

    (images, labels), (test_images, test_labels) = fashion_mnist(IMAGES, TEST)
    data, test = (F.avg_pool2d(images, 2), labels), (F.avg_pool2d(test_images, 2), test_labels)
    batches = list(zip(data[0].split(BATCH), data[1].split(BATCH), strict=True))[:BATCHES]
    losses = [lambda m, x=x, y=y: F.cross_entropy(m(x), y) for x, y in batches]
    scores: dict[str, list[float]] = {name: [] for name in ("dense", "knapsack", "L1", "plain", "distilled")}
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "weights"))
        dense = create_model("resnet8_small", num_classes=10, in_chans=1)
        train(dense, data, seed=seed, **TRAIN)
        dense.eval()
        structure = trace_structure(dense, SHAPE)
        keep = fill_knapsack(structure, taylor_scores(dense, structure, losses), RATIO)
        pruned = structure.remove(dense, keep)
        uniform, _ = structured_pruning(dense, SHAPE, RATIO, of="macs", scores=l1_norms, structure=structure)
        if seed == SEEDS[0]:
            counted = count_cost(pruned, SHAPE).macs
            budget = (1 - RATIO) * count_cost(dense, SHAPE).macs
            check.require("multiply-adds in units of the budget", counted / budget, "<=", 1)
            check.require("share of the budget that is used", counted / budget, ">=", FILLED)
            gap = abs(structure.macs(keep) / counted - 1)
            check.require("relative gap of predicted and counted multiply-adds", gap, "<=", LINEAR)
            with torch.no_grad():
                wanted = structure.mask(dense, keep)(test[0][:500])
                error = (pruned(test[0][:500]) - wanted).abs().max() / wanted.abs().max()
            check.require(
                "relative difference of the rebuilt network from the masked one", error, "<=", EQUAL
            )
        torch.manual_seed(derive(seed, "maps"))
        pair = InnerDistillation(copy.deepcopy(pruned), dense, test[0][:2], gamma=GAMMA)
        scores["dense"].append(accuracy(dense, test))
        scores["knapsack"].append(accuracy(pruned, test))
        scores["L1"].append(accuracy(uniform, test))
        train(pruned, data, seed=seed + 10, **TUNE)
        scores["plain"].append(accuracy(pruned, test))
        train(pair, data, seed=seed + 10, loss=lambda out, y: F.cross_entropy(out[0], y) + out[1], **TUNE)
        scores["distilled"].append(accuracy(pair.student, test))
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    check.require(
        f"accuracy at {RATIO:.0%} of the multiply-adds above uniform L1, not fine-tuned, mean of {len(SEEDS)} seeds",
        mean["knapsack"] - mean["L1"], ">=", GAIN, baseline=mean["L1"], unit="points",
    )  # fmt: skip
    check.require(
        f"accuracy after fine-tuning with inner distillation above without, mean of {len(SEEDS)} seeds",
        mean["distilled"] - mean["plain"], ">=", DISTILLED, baseline=mean["plain"], unit="points",
    )  # fmt: skip
    check.note(f"Accuracies in percent: {', '.join(f'{name} {value:.2f}' for name, value in mean.items())}.")

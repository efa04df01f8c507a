"""Distortions of layers pruned alone add up, so dynamic programming over their curves finds layer ratios that disturb
the output less than uniform, global magnitude, ERK and LAMP ratios, and cost no accuracy.

Pictures are Fashion-MNIST averaged to 14 x 14 pixels, 10,000 for training, 256 of them for calibration; distortion
and accuracy are measured on test pictures. Nothing is trained after pruning. Mild ratios are drawn from 10 to 50%.
"""

import copy
import itertools
import statistics
import time
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.prune.global_magnitude import global_magnitude
from omniconv.compress.prune.masks import prunable_weights
from omniconv.compress.prune.ratios import erk_magnitude, lamp, uniform_magnitude
from omniconv.compress.prune.rd_prune import allocate, distortion_curves, rd_prune
from omniconv.core.seeds import derive
from omniconv.papers.check import Check
from omniconv.papers.small import fashion_mnist, train

PROBLEMS, PROBLEM_LAYERS, PROBLEM_LEVELS = 20, 5, 6
CONFIGURATIONS = 30
MILD = (0.1, 0.5)
GAP = 0.15
CORRELATION = 0.95
SPARSITIES = (0.90, 0.95, 0.98)
RATIO = 1.0
LOSS = -0.5
DEPTHS = (8, 16, 32, 64, 128)
SLOPE = (0.8, 1.2)
SEEDS = (0, 1, 2)
IMAGES, TEST, EPOCHS, CALIBRATION = 10_000, 5_000, 3, 256
RECIPE = {"batch": 64, "lr": 2e-3, "shift": 1}
RIVALS = {"uniform": uniform_magnitude, "global": global_magnitude, "ERK": erk_magnitude, "LAMP": lamp}


def network() -> nn.Sequential:
    """Return three convolutions and two linear layers of 389,920 weights."""
    layers: list[nn.Module] = []
    for inputs, outputs, pool in ((1, 32, 2), (32, 64, 2), (64, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(pool))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10))


def brute_force_difference() -> float:
    """Return how far dynamic programming ends above the best of all combinations, at most."""
    random = np.random.default_rng(0)
    worst = 0.0
    for _ in range(PROBLEMS):
        kept = np.sort(random.integers(1, 400, (PROBLEM_LAYERS, PROBLEM_LEVELS)))[:, ::-1]
        cost = np.sort(random.random((PROBLEM_LAYERS, PROBLEM_LEVELS)) ** 3)
        budget = int(random.uniform(kept.min(1).sum(), kept.max(1).sum()))
        rows = range(PROBLEM_LAYERS)
        chosen = allocate(kept.tolist(), cost.tolist(), budget)
        assert sum(kept[i, k] for i, k in zip(rows, chosen, strict=True)) <= budget
        combinations = np.array(list(itertools.product(range(PROBLEM_LEVELS), repeat=PROBLEM_LAYERS)))
        feasible = combinations[kept[rows, combinations].sum(1) <= budget]
        worst = max(worst, abs(cost[rows, chosen].sum() - cost[rows, feasible].sum(1).min()))
    return worst


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a model says in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(250)])


def distortion(output: Tensor, reference: Tensor) -> float:
    """Return the mean squared difference of outputs."""
    return float((output - reference).double().square().mean())


def accuracy(output: Tensor, labels: Tensor) -> float:
    """Return the share of correct answers in percent."""
    return 100 * float((output.argmax(1) == labels).float().mean())


def additivity(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the mean relative gap between joint distortion and the sum of single ones, and their correlation."""
    weights = prunable_weights(model)
    random = np.random.default_rng(0)
    shares = 1 - random.uniform(*MILD, (CONFIGURATIONS, len(weights)))
    kept = {
        name: [round(share * weight.numel()) for share in shares[:, i]]
        for i, (name, weight) in enumerate(weights.items())
    }
    curves = distortion_curves(model, images, kept, worst_case=False)
    sums, joint, reference = np.sum(list(curves.values()), 0), [], logits(model, images)
    for index in range(CONFIGURATIONS):
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            for name, weight in prunable_weights(pruned).items():
                count = kept[name][index]
                weight *= weight.abs() >= weight.abs().flatten().topk(count).values[-1]
        joint.append(distortion(logits(pruned, images), reference))
    gaps = np.abs(np.array(joint) - sums) / joint
    return float(gaps.mean()), float(np.corrcoef(joint, sums)[0, 1])


def time_slope() -> float:
    """Return the exponent with which the time of `allocate` rises with the number of layers."""
    random = np.random.default_rng(0)
    times: dict[int, list[float]] = defaultdict(list)
    problems = {}
    for depth in DEPTHS:
        kept = np.sort(random.integers(1, 3000, (depth, 20)))[:, ::-1]
        problems[depth] = (kept.tolist(), np.sort(random.random((depth, 20))).tolist())
    for _ in range(5):
        for depth, (kept, cost) in problems.items():
            started = time.perf_counter()
            # As many budget levels for every depth.
            allocate(kept, cost, 1000 * depth, steps=1000)
            times[depth].append(time.perf_counter() - started)
    medians = [statistics.median(times[depth]) for depth in DEPTHS]
    return float(np.polyfit(np.log(DEPTHS), np.log(medians), 1)[0])


def run(check: Check) -> None:
    """Measure the search, additivity, distortion and accuracy, and the time."""
    claim = f"distortion above the best of all combinations, {PROBLEMS} problems"
    check.require(claim, round(brute_force_difference(), 12), "==", 0)

    (images, labels), (test_images, test_labels) = fashion_mnist(IMAGES, TEST)
    data, test = (F.avg_pool2d(images, 2), labels), (F.avg_pool2d(test_images, 2), test_labels)
    moved: dict[tuple[str, float], list[float]] = defaultdict(list)
    right: dict[tuple[str, float], list[float]] = defaultdict(list)
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "weights"))
        dense = network()
        train(dense, data, epochs=EPOCHS, seed=seed, **RECIPE)
        reference = logits(dense, test[0])
        right["dense", 0].append(accuracy(reference, test[1]))
        calibration = data[0][:CALIBRATION]
        if seed == SEEDS[0]:
            gap, correlation = additivity(dense, calibration)
            claim = f"relative gap of joint and summed distortion, mean of {CONFIGURATIONS} configurations"
            check.require(claim, gap, "<", GAP)
            check.require("correlation of joint and summed distortion", correlation, ">", CORRELATION)
        for sparsity in SPARSITIES:
            models = {name: rival(dense, sparsity)[0] for name, rival in RIVALS.items()}
            models["RD"] = rd_prune(dense, sparsity, calibration)[0]
            models["RD of mean curves"] = rd_prune(dense, sparsity, calibration, worst_case=False)[0]
            for name, model in models.items():
                output = logits(model, test[0])
                moved[name, sparsity].append(distortion(output, reference))
                right[name, sparsity].append(accuracy(output, test[1]))
    distortions = {key: statistics.mean(values) for key, values in moved.items()}
    means = {key: statistics.mean(values) for key, values in right.items()}
    for sparsity in SPARSITIES:
        least = min(distortions[name, sparsity] for name in RIVALS)
        check.require(
            f"output distortion at {sparsity:.0%} over the least of the four others, mean of {len(SEEDS)} seeds",
            distortions["RD", sparsity] / least, "<=", RATIO, baseline=least,
        )  # fmt: skip
        best = max(means[name, sparsity] for name in RIVALS)
        check.require(
            f"accuracy at {sparsity:.0%} above the best of the four others, mean of {len(SEEDS)} seeds",
            means["RD", sparsity] - best, ">=", LOSS, baseline=best, unit="points",
        )  # fmt: skip
    for sparsity in SPARSITIES:
        figures = [
            f"{name} {means[name, sparsity]:.2f}% (distortion {distortions[name, sparsity]:.3g})"
            for name in ("RD", "RD of mean curves", *RIVALS)
        ]
        check.note(f"At {sparsity:.0%}: {', '.join(figures)}; dense {means['dense', 0]:.2f}%.")
    slope = time_slope()
    check.require("exponent of the search's time in the number of layers", slope, ">=", SLOPE[0])
    check.require("exponent of the search's time in the number of layers", slope, "<=", SLOPE[1])

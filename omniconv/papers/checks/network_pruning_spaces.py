"""Sub-networks of equal multiply-adds differ in error by their multiply-adds for each parameter, with a best ratio in
between; the space refined around it is no worse than the whole one.

A residual network of 8 layers on Fashion-MNIST averaged to 14 x 14 pixels: 6,400 images and 2 epochs for the network,
40 sub-networks with half of its multiply-adds that train for 25 steps each, then 16 of the refined space, whose ratios
lie within 10% of the best; 5,000 images of the test set.
"""

import statistics

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.prune.pruning_spaces import (
    PruningSpace,
    Subnetwork,
    error_distribution,
    keep_largest_units,
    optimal_ratio,
)
from omniconv.compress.structure.graph import Structure, trace_structure
from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

VECTORS = 200
REGIME, WIDTH = 0.5, 0.01
EQUAL = 1e-5
CURVATURE = 0.0
THIRDS = 1.0
WORSE = 0.0
MEMBERS, REFINED, AROUND = 40, 16, 1.1
IMAGES, TEST, FEW = 6_400, 5_000, 1_600
SHAPE = (1, 14, 14)
TRAIN = {"epochs": 2, "batch": 64, "lr": 5e-3, "shift": 1}
TUNE = {"epochs": 1, "batch": 64, "lr": 2e-3, "shift": 1}


def miscounted(model: nn.Module, structure: Structure) -> int:
    """Return how many of the sampled vectors are not counted exactly."""
    whole = count_cost(model, SHAPE)
    wrong = 0
    for member in PruningSpace((0.0, 1.0)).sample(structure, VECTORS, seed=1).members:
        cost = count_cost(structure.remove(model, keep_largest_units(model, structure, member.counts)), SHAPE)
        wrong += round(member.macs * whole.macs) != cost.macs
        wrong += round(member.parameters * whole.parameters) != cost.parameters
    return wrong


def error(model: nn.Module, structure: Structure, member: Subnetwork, data: Split, test: Split) -> float:
    """Return the error in percent of a sub-network after brief training."""
    pruned = structure.remove(model, keep_largest_units(model, structure, member.counts))
    train(pruned, data, **TUNE)
    return 100 - accuracy(pruned, test)


def run(check: Check) -> None:
    """Measure counts, sampler, distribution, the pruned network, and errors in two spaces."""
    (images, labels), (test_images, test_labels) = fashion_mnist(IMAGES, TEST)
    data, test = (F.avg_pool2d(images, 2), labels), (F.avg_pool2d(test_images, 2), test_labels)
    few = data[0][:FEW], data[1][:FEW]
    torch.manual_seed(derive(0, "weights"))
    model = create_model("resnet8_small", num_classes=10, in_chans=1)
    structure = trace_structure(model, SHAPE)
    claim = f"multiply-adds and parameters of {VECTORS} vectors that are not exact"
    check.require(claim, miscounted(model, structure), "==", 0)

    space = PruningSpace((REGIME - WIDTH, REGIME + WIDTH))
    drawn = space.sample(structure, MEMBERS)
    missed = max(abs(member.macs - REGIME) for member in drawn.members)
    check.require("largest difference from the share of multiply-adds asked for", missed, "<=", WIDTH)
    check.require("share of draws that lie in the space", drawn.acceptance, ">", 0)

    train(model, data, **TRAIN)
    model.eval()
    dense = 100 - accuracy(model, test)
    keep = keep_largest_units(model, structure, drawn.members[0].counts)
    with torch.no_grad():
        wanted = structure.mask(model, keep)(test[0][:500])
        difference = (structure.remove(model, keep)(test[0][:500]) - wanted).abs().max() / wanted.abs().max()
    check.require("relative difference of a pruned network from the masked one", difference, "<=", EQUAL)

    errors = [error(model, structure, member, few, test) for member in drawn.members]
    at = np.linspace(min(errors) - 1, max(errors) + 1, 50)
    wanted = np.array([np.mean(np.array(errors) < one) for one in at])
    gap = float(abs(error_distribution(errors, at.tolist()) - wanted).max())
    check.require("difference of the error distribution from counting", gap, "<=", 1e-12)

    ratios = [member.ratio for member in drawn.members]
    best, curvature = optimal_ratio(ratios, errors)
    check.require(
        "curvature of the parabola of error over the logarithm of the ratio", curvature, ">", CURVATURE
    )
    check.require("best ratio above the least one", best / min(ratios), ">", 1)
    check.require("best ratio below the largest one", best / max(ratios), "<", 1)
    order = np.argsort(abs(np.log(np.array(ratios) / best)))
    near, far = (
        statistics.mean(errors[i] for i in part) for part in (order[: MEMBERS // 3], order[-(MEMBERS // 3) :])
    )
    check.require(
        "mean error of the third farthest from the best ratio above that of the nearest third",
        far - near, ">=", THIRDS, baseline=far, unit="points",
    )  # fmt: skip
    narrow = PruningSpace(space.macs, ratio=(best / AROUND, best * AROUND))
    refined = narrow.sample(structure, REFINED, seed=2)
    better = [error(model, structure, member, few, test) for member in refined.members]
    check.require(
        "median error of the refined space above that of the whole one",
        statistics.median(better) - statistics.median(errors), "<=", WORSE,
        baseline=statistics.median(errors), unit="points",
    )  # fmt: skip
    check.note(
        f"Acceptance {drawn.acceptance:.2%}, refined {refined.acceptance:.2%}; ratios from {min(ratios):.2f} to "
        f"{max(ratios):.2f}, the best {best:.2f}; errors from {min(errors):.2f}% to {max(errors):.2f}%, refined from "
        f"{min(better):.2f}% to {max(better):.2f}%; the whole network's is {dense:.2f}%."
    )
    spread = np.corrcoef([member.spread for member in drawn.members], errors)[0, 1]
    check.note(f"Correlation of error with the spread of keep ratios: {spread:.2f}.")

"""Tokens that leave a segmenter as soon as they are clear save a fifth of the multiply-adds for at most a point of
mIoU; what an image costs follows from what is in it; and the surest tokens of every class, kept as context, do no harm.

A vision transformer of 144 tokens and six blocks with exits behind the second and fourth learns to segment drawn
scenes, with all heads together, and is then fine-tuned with pruning; the network that it is compared with takes the
same steps without pruning.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from omniconv.compress.adaptive.dtop import DynamicTokenPruning
from omniconv.compress.adaptive.early_exit import exit_loss
from omniconv.papers.check import Check
from omniconv.papers.small import train
from omniconv.papers.small_scenes import make_segmenter, mean_iou, scenes

SAME = 1e-6
MASKED = 1e-5
SAVING = 0.20
DROP = 1.0
CORRELATION = 0.5
CONTEXT = 0.0
THRESHOLD, KEEP = 0.9, 5
FALLING = (1.0, 0.99, 0.95, 0.9, 0.8, 0.6)
SEEDS = (0, 1, 2)
EXITS = (2, 4)
TRAIN, TEST, EPOCHS, FINE, BATCH = 1000, 150, 2.0, 0.5, 16


class AllExits(nn.Module):
    """The network while nobody leaves."""

    def __init__(self, network: DynamicTokenPruning) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the scores of all exits."""
        return self.network.forward_exits(x)


def with_threshold(network: DynamicTokenPruning, threshold: float, keep: int = KEEP) -> DynamicTokenPruning:
    """Return a copy with another threshold."""
    network = copy.deepcopy(network).eval()
    network.threshold, network.keep = threshold, keep
    return network


def run(check: Check) -> None:
    """Train, prune, and count."""
    images, masks, _ = scenes(TRAIN, "train")
    test, truth, objects = scenes(TEST, "test")
    recipe: dict[str, Any] = {"batch": BATCH, "shift": 0, "flip": False, "loss": exit_loss}
    scores: dict[str, list[float]] = {"unpruned": [], "pruned": [], "without context": []}
    savings: list[float] = []
    correlations: list[float] = []
    for seed in SEEDS:
        network = DynamicTokenPruning(make_segmenter(seed), EXITS, threshold=THRESHOLD, keep=KEEP)
        train(AllExits(network), (images, masks), epochs=EPOCHS, seed=seed, **recipe)
        whole = copy.deepcopy(network)
        train(AllExits(whole), (images, masks), epochs=FINE, lr=2e-4, seed=seed, **recipe)
        train(network, (images, masks), epochs=FINE, lr=2e-4, seed=seed, **recipe)
        network.eval()
        if seed == SEEDS[0]:
            exact(check, network, test[:20])
        full = with_threshold(whole, 1.0).image_macs(test[:1])[0]
        macs = network.image_macs(test)
        savings.append(1 - sum(macs) / len(macs) / full)
        correlations.append(float(spearmanr(objects, macs).statistic))  # type: ignore[attr-defined]
        scores["unpruned"].append(mean_iou(with_threshold(whole, 1.0), test, truth))
        scores["pruned"].append(mean_iou(network, test, truth))
        scores["without context"].append(mean_iou(with_threshold(network, THRESHOLD, 0), test, truth))
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    saving = sum(savings) / len(savings)
    check.require("multiply-adds saved at a threshold of 0.9, mean of 3 seeds", saving, ">=", SAVING)
    check.require(
        "mIoU lost by pruning, mean of 3 seeds",
        mean["unpruned"] - mean["pruned"], "<=", DROP, baseline=mean["unpruned"], unit="points",
    )  # fmt: skip
    correlation = sum(correlations) / len(correlations)
    check.require("rank correlation of objects and multiply-adds of an image", correlation, ">=", CORRELATION)
    check.require(
        "mIoU with five tokens a class as context minus without, mean of 3 seeds",
        mean["pruned"] - mean["without context"], ">=", CONTEXT, baseline=mean["without context"], unit="points",
    )  # fmt: skip
    check.note(f"mIoU {scores}; saved {savings}; correlations {correlations}")


@torch.no_grad()
def exact(check: Check, network: DynamicTokenPruning, x: Tensor) -> None:
    """Measure what must hold for any weights."""
    whole = network.segmenter.eval()(x)
    difference = float((with_threshold(network, 1.0)(x) - whole).abs().max())
    check.require("logits at threshold 1 beside the segmenter's", difference, "<=", SAME)

    logits, taken = network.infer(x)
    difference = float((network.forward_masked(x)[-1] - logits).abs().max())
    check.require("logits with masked beside removed tokens", difference, "<=", MASKED)

    # Every head sees the tokens that are left; those that left did so once.
    written: list[int] = []
    handle = network.segmenter.head.register_forward_hook(lambda m, a, y: written.append(y.shape[1]))
    _, taken = network.infer(x)
    handle.remove()
    counts = torch.bincount(taken.flatten(), minlength=len(EXITS) + 1)
    missed = abs(int(counts.sum()) - taken.numel()) + abs(sum(written) - int(counts[-1]))
    check.require("tokens not predicted exactly once", missed, "==", 0)

    costs = [sum(with_threshold(network, threshold).image_macs(x)) for threshold in FALLING]
    rises = sum(b > a for a, b in pairwise(costs))
    check.require("rises of cost as the threshold falls from 1 to 0.6", rises, "==", 0)

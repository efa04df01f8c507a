"""Middle blocks of a trained segmenter on soft cluster centres save over 30% of the multiply-adds without training, and
lose at most half of the mIoU that average pooling and bilinear enlargement lose at equal cost.

A vision transformer of 144 tokens and six blocks learns to segment drawn scenes; then blocks 3 to 5 run on centres.
Pooling runs the same blocks on the smallest grid with which it costs at least as much.
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.adaptive.expedit import ClusteredBlocks, cluster_tokens, expedite, token_weights
from omniconv.design.cost import count_cost
from omniconv.models.dense.segmenter import Segmenter
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import train
from omniconv.papers.small_scenes import SIZE, make_segmenter, mean_iou, scenes

IDENTITY_ERROR = 1e-4
WEIGHT_ERROR = 1e-5
SAVING = 0.30
DROP_SHARE = 0.5
SEEDS = (0, 1, 2)
BLOCKS = ["encoder.blocks.2", "encoder.blocks.3", "encoder.blocks.4"]
SCALES = (1.0, 0.75, 0.5, 0.25)
TRAIN, TEST, EPOCHS, BATCH = 1000, 200, 3.0, 16
ITERATIONS = 5
SHAPE = (3, SIZE, SIZE)


class PooledBlocks(nn.Module):
    """The baseline: blocks on an average-pooled grid of tokens, enlarged again bilinearly."""

    def __init__(self, blocks: list[nn.Module], side: int) -> None:
        super().__init__()
        self.blocks, self.side = nn.Sequential(*blocks), side

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (N, L, D) of as many rows as columns."""
        grid = math.isqrt(x.shape[1])
        small = F.adaptive_avg_pool2d(x.mT.unflatten(2, (grid, grid)), self.side).flatten(2).mT
        maps = self.blocks(small).mT.unflatten(2, (self.side, self.side))
        return F.interpolate(maps, size=(grid, grid), mode="bilinear").flatten(2).mT


def replaced(model: Segmenter, names: list[str], make: Callable[[list[nn.Module]], nn.Module]) -> Segmenter:
    """Return a copy with what `make` makes of the named blocks in their place."""
    result = copy.deepcopy(model)
    result.set_submodule(names[0], make([result.get_submodule(name) for name in names]))
    for name in names[1:]:
        result.set_submodule(name, nn.Identity())
    return result


def pooled(model: Segmenter, side: int) -> Segmenter:
    """Return a copy with the baseline in place of the blocks."""
    return replaced(model, BLOCKS, lambda blocks: PooledBlocks(blocks, side))


def saved_by_formula(length: int, centres: int, dim: int, blocks: int) -> int:
    """Return the multiply-adds that clustering must save, counted by hand."""

    def block(tokens: int) -> int:
        return 12 * tokens * dim**2 + 2 * tokens**2 * dim

    pair = length * centres * dim  # one product between all tokens and all centres
    return blocks * (block(length) - block(centres)) - (2 * ITERATIONS + 2) * pair


def weight_error() -> float:
    """Return by how much the weights of a token, in clustering and reconstruction, miss one."""
    torch.manual_seed(0)
    z = torch.randn(2, 12, 12, 48)
    s = cluster_tokens(z, (6, 6), 10.0).flatten(1, 2)
    return max(
        float((token_weights(z.flatten(1, 2), s, 10.0, k).sum(2) - 1).abs().max()) for k in (5, 20, 99)
    )


@torch.no_grad()
def exact(check: Check, model: Segmenter, x: Tensor) -> int:
    """Measure what must hold for any weights, and return the side of the grid with which pooling costs as much."""
    check.require("weights of a token that miss a sum of one", weight_error(), "<=", WEIGHT_ERROR)
    same, _ = expedite(model, BLOCKS, scale=1.0, temperature=1e-6)
    error = float((same(x) - model(x)).abs().max())
    check.require("logits with one centre a token and no temperature", error, "<=", IDENTITY_ERROR)

    fast, _ = expedite(model, BLOCKS, iterations=ITERATIONS)
    before, after = (count_cost(network, SHAPE).macs for network in (model, fast))
    formula = saved_by_formula(144, 36, 48, len(BLOCKS))
    check.require("multiply-adds saved beside the formula", before - after - formula, "==", 0)
    check.require("share of multiply-adds saved at half the side", 1 - after / before, ">=", SAVING)

    large = Segmenter(create_model("vit_large_patch16_224", img_size=640, device="meta"), 150)  # pyright: ignore
    names = [f"encoder.blocks.{index}" for index in range(10, 22)]
    clustered = replaced(large, names, lambda blocks: ClusteredBlocks(blocks, prefix_tokens=1))
    slow, quick = (count_cost(network, (3, 640, 640)) for network in (large, clustered))
    share = 1 - quick.macs / slow.macs
    check.require("the same by blocks 11 to 22 of ViT-L at 640 pixels", share, ">=", SAVING)
    check.require("parameters added to it", quick.parameters - slow.parameters, "==", 0)
    return next(side for side in range(1, 13) if count_cost(pooled(model, side), SHAPE).macs >= after)


def run(check: Check) -> None:
    """Measure the identity, the costs, and what a trained segmenter loses."""
    images, masks, _ = scenes(TRAIN, "train")
    test, truth, _ = scenes(TEST, "test")
    side = exact(check, make_segmenter(0).eval(), test)
    check.note(f"the pooled grid has {side} x {side} places, the clustered one 6 x 6")
    drops: dict[str, list[float]] = {"clustered": [], "pooled": []}
    errors: list[list[float]] = []
    full: list[float] = []
    for seed in SEEDS:
        model = make_segmenter(seed)
        train(model, (images, masks), epochs=EPOCHS, batch=BATCH, seed=seed, shift=0, flip=False)
        full.append(mean_iou(model, test, truth))
        for name, fast in (("clustered", expedite(model, BLOCKS)[0]), ("pooled", pooled(model, side))):
            drops[name].append(full[-1] - mean_iou(fast, test, truth))
        with torch.no_grad():
            wanted = model(test)
            changes = [expedite(model, BLOCKS, scale=scale)[0](test) - wanted for scale in SCALES]
        errors.append([float(change.square().mean().sqrt()) for change in changes])
    lost, naive = (sum(drops[name]) / len(SEEDS) for name in ("clustered", "pooled"))
    check.require(
        "mIoU lost by clustering, mean of 3 seeds",
        lost, "<=", DROP_SHARE * naive, baseline=naive, unit="points",
    )  # fmt: skip
    means = [sum(column) / len(column) for column in zip(*errors, strict=True)]
    least = min(b - a for a, b in pairwise(means))
    check.require("least rise of the logits' error from one smaller grid to the next", least, ">", 0.0)
    check.note(f"mIoU {full}, lost by clustering {drops['clustered']}, by pooling {drops['pooled']}")
    check.note(f"error of the logits at scales {SCALES}: {means}")

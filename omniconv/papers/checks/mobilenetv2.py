"""Inverted residuals with linear bottlenecks give a network of 3.5 M parameters and 300 M multiply-adds; a linear
projection keeps what a ReLU would lose, and the wide inner map need never be in memory as a whole.

The numbers are those of the row and the paper: table 2 and 3 (counts), figure 1 (embedding a spiral), figure 6 a
(linear against ReLU bottleneck) and section 5.1 (execution in slices).
"""

import math
import weakref
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.layers.conv.inverted_residual import DepthwiseSeparable, InvertedResidual
from omniconv.layers.conv.split_residual import split_forward
from omniconv.models.factory import create_model
from omniconv.models.image.mobilenetv2 import Stage
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, cifar10, train

PARAMETERS = 3_504_872
MACS, MACS_TOLERANCE = 300e6, 0.02
SPLIT_ERROR = 1e-5
DIMENSIONS = (2, 3, 5, 15, 30)
MARGIN = -0.3
SEEDS = (0, 1, 2)

# The paper's table at 0.35 width for 32-pixel images: two strides fewer, and fewer repeats.
_STAGES = (Stage(1, 16, 1, 1), Stage(6, 24, 1, 1), Stage(6, 32, 2, 2), Stage(6, 64, 2, 2), Stage(6, 96, 1, 1))


class PeakBytes(TorchDispatchMode):
    """Follows how many bytes of tensors made within the block are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator and note new storages among its results."""
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            # Views and in-place results live in a storage that is counted already or was there before.
            if key in self.known or key in inputs:
                continue
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)
        return result


def peak_bytes(function, *args) -> int:
    """Return the most bytes of tensors that `function(*args)` has alive at once."""
    with torch.no_grad(), PeakBytes() as mode:
        function(*args)
    return mode.peak


def spiral_error(dimensions: int, matrices: int = 200) -> float:
    """Return the mean relative error of a spiral after embedding in n dimensions, ReLU and pseudo-inverse."""
    t = torch.linspace(0.05, 1, 500, dtype=torch.float64)
    spiral = torch.stack([t * torch.cos(4 * math.pi * t), t * torch.sin(4 * math.pi * t)])
    errors = []
    for index in range(matrices):
        random = generator(index, "spiral", dimensions)
        embed = torch.randn(dimensions, 2, generator=random, dtype=torch.float64)
        back = torch.linalg.pinv(embed) @ torch.relu(embed @ spiral)
        errors.append(float((back - spiral).norm() / spiral.norm()))
    return sum(errors) / len(errors)


def make_network(seed: int, *, linear: bool) -> nn.Module:
    """Return the small network; without `linear`, every projection is followed by ReLU6."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model("mobilenetv2_035", num_classes=10, stages=_STAGES, head_width=320, drop_rate=0.0)
    for block in model.modules() if not linear else ():
        if isinstance(block, InvertedResidual):
            block.bn3 = nn.Sequential(block.bn3, nn.ReLU6())
        elif isinstance(block, DepthwiseSeparable):
            block.bn2 = nn.Sequential(block.bn2, nn.ReLU6())
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure the counts, the split execution, the spiral and the two bottlenecks."""
    cost = count_cost(create_model("mobilenetv2_100", device="meta"), (3, 224, 224))
    check.require("parameters at width 1.0", cost.parameters, "==", PARAMETERS)
    off = abs(cost.macs / MACS - 1)
    check.require("relative distance of the multiply-adds from 300 M", off, "<=", MACS_TOLERANCE)

    # The widest map of the paper's network: the first block of stage 2, at 112 x 112 and 96 channels.
    torch.manual_seed(0)
    block = InvertedResidual(16, 24, stride=2)
    block(torch.randn(8, 16, 28, 28))
    block.eval()
    x = torch.randn(1, 16, 112, 112)
    with torch.no_grad():
        whole = block(x)
        error = float((split_forward(block, x, 6) - whole).abs().max() / whole.abs().max())
    check.require("relative error of execution in t = 6 slices", error, "<=", SPLIT_ERROR)
    plain = peak_bytes(block, x)
    sliced = peak_bytes(split_forward, block, x, 6)
    check.require("peak bytes in 6 slices", sliced, "<", plain, baseline=plain, unit="bytes")

    errors = [spiral_error(n) for n in DIMENSIONS]
    falls = min(before - after for before, after in pairwise(errors))
    check.require("least fall of the spiral's error from one dimension to the next", falls, ">", 0)
    check.note(
        "relative error of the spiral in "
        + ", ".join(f"{n} dimensions {e:.3f}" for n, e in zip(DIMENSIONS, errors, strict=True))
    )

    images, test = cifar10(10000, 2000)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for linear in (True, False):
            model = make_network(seed, linear=linear)
            train(model, images, epochs=4, lr=4e-3, seed=seed)
            scores[linear].append(accuracy(model, test))
    linear, relu = (sum(scores[key]) / len(SEEDS) for key in (True, False))
    check.require(
        "accuracy of linear minus ReLU bottlenecks, CIFAR-10 subset, width 0.35, mean of 3 seeds",
        linear - relu, ">=", MARGIN, baseline=relu, unit="points",
    )  # fmt: skip
    check.note(f"accuracies with linear bottlenecks {scores[True]}, with ReLU6 {scores[False]}")

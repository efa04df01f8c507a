"""Reading only the outputs 1, 2, 4, 8, ... layers back leaves L log L links, joins any two layers by a short path, and
uses parameters at least as well as reading all of them.

Counts are those of the paper's table for 100 classes. Gradients pass a network of 400 layers that adds what it reads,
and the same layers as a plain chain. The small training sees Fashion-MNIST averaged to 10 x 10 pixels; the two networks
are equally deep and their parameters differ by less than 3%.
"""

import math
from collections import deque

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.models.factory import create_model
from omniconv.models.image.densenet import DenseBlock, inputs_of
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

PARAMETERS = {
    "sparsenet_40_24_cifar": 0.757e6,
    "sparsenet_100_36_cifar": 5.646e6,
    "sparsenet_100_16_32_64_cifar": 7.2e6,
    "sparsenet_bc_100_24_cifar": 1.461e6,
    "sparsenet_bc_100_16_32_64_cifar": 4.365e6,
}
COUNT_ERROR = 0.01
LAYERS = 1000
FIT = 0.99
SIZES = tuple(range(16, 513, 8))
RATIO = 10.0
MISMATCH = 0.03
MARGIN = -0.5
SEEDS = (0, 1, 2)
SMALL = {
    "sparse": {"depths": (8, 8, 8), "growth_rates": (8, 8, 8), "aggregation": "sparse"},
    "dense": {"depths": (8, 8, 8), "growth_rates": (4, 4, 4), "aggregation": "dense"},
}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _fit(x: np.ndarray, y: np.ndarray) -> float:
    """Return R^2 of the best line through the points."""
    line = np.polyval(np.polyfit(x, y, 1), x)
    return float(1 - ((y - line) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _links(check: Check) -> None:
    wrong = sum(
        inputs_of(layer, "sparse") != [layer - 2**i for i in range(20) if 2**i <= layer]
        for layer in range(1, LAYERS + 1)
    )
    check.require(f"layers of {LAYERS} that do not read exactly l - 1, l - 2, l - 4, ...", wrong, "==", 0)
    sizes = np.array(SIZES, float)
    links = {
        kind: np.cumsum([len(inputs_of(layer, kind)) for layer in range(1, SIZES[-1] + 1)])[
            np.array(SIZES) - 1
        ]
        for kind in ("sparse", "dense")
    }
    check.require(
        "R^2 of the links as a line in L log2 L", _fit(sizes * np.log2(sizes), links["sparse"]), ">", FIT
    )
    check.require("R^2 of DenseNet's links as a line in L^2", _fit(sizes**2, links["dense"]), ">", FIT)

    longest = {}
    for size in (64, 256):
        readers = {layer: [] for layer in range(size + 1)}
        for layer in range(1, size + 1):
            for earlier in inputs_of(layer, "sparse"):
                readers[earlier].append(layer)
        longest[size] = 0
        for start in range(size + 1):
            steps, queue = {start: 0}, deque([start])
            while queue:
                layer = queue.popleft()
                for reader in readers[layer]:
                    if reader not in steps:
                        steps[reader] = steps[layer] + 1
                        queue.append(reader)
            longest[size] = max(longest[size], *(steps[layer] for layer in range(start, size + 1)))
        bound = math.ceil(math.log2(size))
        check.require(f"longest shortest path in a block of {size} layers", longest[size], "<=", bound)


def _gradient_ratio(seed: int, *, sparse: bool) -> float:
    """Return the gradient's norm at the first of 396 layers over that at the last, of a new network."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(
        "sparsenet_40_24_cifar", num_classes=10, in_chans=1, depths=(132, 132, 132), growth_rates=(8, 8, 8),
        merge="sum",
    )  # fmt: skip
    blocks = [module for module in model.modules() if isinstance(module, DenseBlock)]
    (images, labels), _ = fashion_mnist(32, 1)
    images = F.avg_pool2d(images, 2)
    if sparse:
        logits = model(images)
    else:
        x = images
        for module in model.get_submodule("features").children():
            for layer in module.values() if isinstance(module, DenseBlock) else [module]:
                x = layer(x)
        logits = model.forward_head(x)
    F.cross_entropy(logits, labels).backward()
    first, last = (
        layer.get_parameter("conv1.weight").grad
        for layer in (blocks[0]["denselayer1"], blocks[-1]["denselayer132"])
    )
    assert first is not None
    assert last is not None
    return float(first.double().norm() / last.double().norm())


def _gradients(check: Check) -> None:
    ratios, chains = ([_gradient_ratio(seed, sparse=sparse) for seed in SEEDS] for sparse in (True, False))
    claim = "gradient at the first of 400 layers over that at the last"
    check.require(f"{claim}, largest of 3 seeds", max(ratios), "<=", RATIO, baseline=max(chains))
    check.require(f"{claim}, smallest of 3 seeds", min(ratios), ">=", 1 / RATIO, baseline=min(chains))
    off = min(max(ratio, 1 / ratio) if ratio > 0 and math.isfinite(ratio) else math.inf for ratio in chains)
    check.require("the same of a plain chain, or its inverse if below 1, smallest", off, ">", RATIO)


def _training(check: Check) -> None:
    def make(kind: str) -> nn.Module:
        return create_model("sparsenet_40_24_cifar", num_classes=10, in_chans=1, **SMALL[kind])

    sparse, dense = _count(make("sparse")), _count(make("dense"))
    check.require("parameters of the two small networks differ by", abs(dense / sparse - 1), "<=", MISMATCH)
    images, test = ((F.adaptive_avg_pool2d(x, 10), y) for x, y in fashion_mnist(4000, 10000))
    scores: dict[str, list[float]] = {"sparse": [], "dense": []}
    for seed in SEEDS:
        for kind, found in scores.items():
            torch.manual_seed(derive(seed, "weights"))
            model = make(kind)
            train(model, images, epochs=2, batch=64, seed=seed, shift=1)
            found.append(accuracy(model, test))
    means = {kind: sum(found) / len(found) for kind, found in scores.items()}
    check.require(
        "accuracy of SparseNet minus DenseNet of as many parameters, Fashion-MNIST, mean of 3 seeds",
        means["sparse"] - means["dense"], ">=", MARGIN, baseline=means["dense"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies of SparseNet {scores['sparse']}, of DenseNet {scores['dense']}")


def run(check: Check) -> None:
    """Measure counts, links, gradients, and a small training."""
    for name, published in PARAMETERS.items():
        found = _count(create_model(name, num_classes=100, device="meta"))
        check.require(f"{name}: parameters off by", abs(found / published - 1), "<=", COUNT_ERROR)
    _links(check)
    _gradients(check)
    _training(check)

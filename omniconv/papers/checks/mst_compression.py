"""Along a minimum spanning tree of its channels a binary convolution is computed exactly with fewer bit operations, and
a loss that pulls channels to their parents makes the trees of a trained network much shorter at hardly any accuracy.

Pictures are Fashion-MNIST, averaged to 14 x 14 pixels. The network has a real first convolution, three binary ones and
a real classifier; with and without the loss it has the same recipe and seeds.
"""

import functools
import statistics

import numpy as np
import torch
from scipy.sparse.csgraph import minimum_spanning_tree as scipy_tree
from scipy.sparse.csgraph import shortest_path
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.binary.conv import BinaryConv2d, sign
from omniconv.compress.binary.mst import (
    MSTConv2d,
    MSTLoss,
    SpanningTree,
    hamming_distances,
    minimum_spanning_tree,
    mst_compress,
)
from omniconv.core.seeds import derive, generator
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

SIMULATION = 0.05
SHORTER = 0.6
LOST = -1.0
SEEDS = (0, 1, 2)

WEIGHT = 1.5
EPOCHS = 5.0
RECIPE = {"epochs": EPOCHS, "batch": 128, "lr": 5e-3, "shift": 1}
CHANNELS, TAPS = 64, 576


def wrong_outputs() -> int:
    """Return how many outputs of trees differ from those of the dense binary convolutions, strides 1 and 2."""
    wrong = 0
    for stride in (1, 2):
        for seed in SEEDS:
            torch.manual_seed(seed)
            conv = BinaryConv2d(16, 32, 3, stride, 1, bias=False)
            x = torch.randn(2, 16, 13, 10)
            wrong += int((MSTConv2d(conv)(x) != conv(x)).sum())
    return wrong


def random_signs(seed: int) -> Tensor:
    """Return random weights of 1 and -1."""
    return 2 * torch.randint(2, (CHANNELS, TAPS), generator=generator(seed, "signs")) - 1


def eccentricities(tree: SpanningTree) -> np.ndarray:
    """Return how deep the tree would be with each channel as its root."""
    adjacency = np.zeros((len(tree.parents),) * 2)
    for v, p in enumerate(tree.parents):
        adjacency[v, p] = v != p
    return shortest_path(adjacency, directed=False, unweighted=True).max(1)


def random_savings(draws: int = 20) -> tuple[float, float]:
    """Return the mean saving for random weights, and that simulated with independent normal distances.

    The distance of two random channels of n weights is binomial, close to normal with mean n / 2 and variance n / 4.
    """
    measured, simulated = [], []
    random = np.random.default_rng(0)
    for seed in range(draws):
        tree = minimum_spanning_tree(hamming_distances(random_signs(seed)))
        measured.append(CHANNELS * TAPS / tree.operations(TAPS))
        distances = np.triu(random.normal(TAPS / 2, TAPS**0.5 / 2, (CHANNELS, CHANNELS)), 1)
        simulated.append(CHANNELS * TAPS / (TAPS + scipy_tree(distances).sum()))
    return statistics.fmean(measured), statistics.fmean(simulated)


def binary_network() -> nn.Sequential:
    """Return a network of three binary convolutions between a real one and a real classifier."""
    convolutions: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    for inputs, outputs, stride in ((16, 32, 2), (32, 64, 2), (64, 64, 1)):
        binary = BinaryConv2d(inputs, outputs, 3, stride, 1, bias=False)
        convolutions += [binary, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def tree_distance(model: nn.Module) -> int:
    """Return the sum of the edges of all layers' trees."""
    layers = [m for m in model.modules() if isinstance(m, BinaryConv2d)]
    return sum(
        minimum_spanning_tree(hamming_distances(sign(m.weight.detach()).flatten(1))).distance for m in layers
    )


def pulled(logits: Tensor, labels: Tensor, pull: MSTLoss) -> Tensor:
    """Return the loss of the task and of the trees."""
    return F.cross_entropy(logits, labels) + WEIGHT * pull()


def run(check: Check) -> None:
    """Measure exactness, the tree, random weights, and a small training."""
    check.require("outputs unlike the dense binary convolution's, strides 1 and 2", wrong_outputs(), "==", 0)
    longer = deeper = 0
    for seed in SEEDS:
        distances = hamming_distances(random_signs(seed))
        tree = minimum_spanning_tree(distances)
        # scipy takes zeros for missing edges, so all are longer by one here.
        longer += abs(tree.distance - int(scipy_tree(distances.numpy() + 1).sum()) + CHANNELS - 1)
        deeper += tree.depth - int(eccentricities(tree).min())
    check.require("difference of tree lengths from scipy's", longer, "==", 0)
    check.require("edges by which another root would be less deep", deeper, "==", 0)
    measured, simulated = random_savings()
    check.require(
        "saving for random weights against independent normal distances", abs(measured / simulated - 1), "<=",
        SIMULATION, baseline=simulated,
    )  # fmt: skip
    check.note(f"64 channels of 576 random weights save {measured:.3f} times, simulated {simulated:.3f}")

    training, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(10000, 10000))
    scores: dict[str, list[float]] = {"plain": [], "pulled": []}
    lengths: dict[str, list[int]] = {"plain": [], "pulled": []}
    for seed in SEEDS:
        for name in scores:
            torch.manual_seed(derive(seed, "weights"))
            model = binary_network()
            loss = functools.partial(pulled, pull=MSTLoss(model)) if name == "pulled" else F.cross_entropy
            train(model, training, seed=seed, loss=loss, **RECIPE)
            scores[name].append(accuracy(model, test))
            lengths[name].append(tree_distance(model))
            if name == "pulled":
                check.note(f"seed {seed}: {' '.join(mst_compress(model)[1].notes)}")
    plain, short = (statistics.fmean(lengths[name]) for name in ("plain", "pulled"))
    check.require(
        "length of all trees with the loss over without, means of 3 seeds",
        short / plain,
        "<=",
        SHORTER,
        baseline=plain,
    )
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    check.require(
        "accuracy with the loss minus without, mean of 3 seeds", means["pulled"] - means["plain"], ">=", LOST,
        baseline=means["plain"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}, lengths {lengths}")

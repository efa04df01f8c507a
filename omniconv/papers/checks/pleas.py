"""PLeaS merges a network with a permuted copy of itself exactly and keeps both networks exactly at double width; at the
size of one network its least squares make it better than averages of weights, permuted or not.

The network has six convolutions with batch norms, one residual sum among them, and 16 to 32 channels. (c) trains it
from two seeds a pair for one epoch on 30,000 pictures of Fashion-MNIST at 14 x 14 pixels, and merges with 1,024 of
these, without labels. Everybody's batch norms are measured anew on the same pictures. The budgets count multiply-adds
without zeros, so 2.0 is both networks side by side.
"""

import copy
import itertools
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.compress.merge.matching import Match, lay_out, match_units, merge_units
from omniconv.compress.merge.pleas import match_norms, pleas
from omniconv.compress.structure.graph import Structure, trace_structure
from omniconv.core.seeds import derive
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

ERROR = 1e-5
MARGIN = 5.0
FALL = -1.0
BUDGETS = (1.0, 1.25, 1.6, 2.0)
SEEDS = (0, 1, 2)
SHAPE = (1, 14, 14)
PICTURES = 1024
RECIPE = {"epochs": 1.0, "batch": 128, "lr": 4e-3, "shift": 1}


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution and its norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Network(nn.Module):
    """Six convolutions, of which the third and fourth stand on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(block(1, 16), block(16, 32, 2))
        self.branch = nn.Sequential(block(32, 32), block(32, 32))
        self.last = nn.Sequential(block(32, 32, 2), block(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.first(x)
        return self.head(self.last(x + self.branch(x)).mean((2, 3)))


def permuted(model: nn.Module, structure: Structure) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the same function with its units in random order, and the orders."""
    twin = copy.deepcopy(model)
    state, orders = twin.state_dict(), {}
    for name, group in structure.groups.items():
        order = orders[name] = torch.randperm(group.size)
        for part in group.slices:
            # Units of this network are single channels, in order.
            state[part.name].copy_(state[part.name].index_select(part.dim, part.index[order]))
    return twin, orders


def averaged(
    model: Network, other: Network, structure: Structure, matches: dict[str, Match], batches: list[Tensor]
) -> Network:
    """Return the mean of both networks' weights under a matching, with batch norms measured anew."""
    axes = lay_out(model, other, structure, matches, {})
    merged = merge_units(model, other, axes)
    match_norms(merged, model, other, axes, batches)
    return merged


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference beside the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def exact(
    check: Check, model: Network, other: Network, structure: Structure, batches: list[Tensor], x: Tensor
) -> None:
    """Parts (a) and (b), on trained networks and pictures that they have not seen."""
    model.eval(), other.eval()
    torch.manual_seed(0)
    twin, orders = permuted(model, structure)
    matches = match_units(model, twin, structure, batches)
    wrong = sum(
        int((order[matches[n].order] != torch.arange(len(order))).sum()) for n, order in orders.items()
    )
    check.require("permuted units that are not recovered", wrong, "==", 0)
    merged, _ = pleas(model, twin, batches, SHAPE, structure=structure)
    check.require(
        "network merged with its permuted copy: relative error", distance(merged(x), model(x)), "<=", ERROR
    )
    wide, _ = pleas(model, other, batches, SHAPE, 2.0, heads=["head"], structure=structure)
    wanted = torch.cat((model(x), other(x)), 1)
    check.require("two networks side by side: relative error", distance(wide(x), wanted), "<=", ERROR)


def run(check: Check) -> None:
    """Measure the three parts."""
    (images, labels), (test_images, test_labels) = fashion_mnist(test=5000)
    data, test = (F.avg_pool2d(images, 2), labels), (F.avg_pool2d(test_images, 2), test_labels)
    batches = list(data[0][:PICTURES].split(128))
    structure = trace_structure(Network(), SHAPE)
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        pair = []
        for number in range(2):
            torch.manual_seed(derive(seed, "weights", number))
            pair.append(Network())
            train(pair[-1], data, seed=derive(seed, "order", number), **RECIPE)
        model, other = pair
        if seed == SEEDS[0]:
            exact(check, model, other, structure, batches, test[0][:500])
        plain = {n: Match(torch.arange(g.size), torch.zeros(g.size)) for n, g in structure.groups.items()}
        matches = match_units(model, other, structure, batches)
        merged = {
            "averaged": averaged(model, other, structure, plain, batches),
            "permuted and averaged": averaged(model, other, structure, matches, batches),
        }
        for budget in BUDGETS:
            merged[f"{budget}"], _ = pleas(model, other, batches, SHAPE, budget, structure=structure)
        for name, network in {"one": model, "other": other, **merged}.items():
            found.setdefault(name, []).append(accuracy(network, test))
    mean = {name: statistics.mean(values) for name, values in found.items()}
    for name in ("averaged", "permuted and averaged"):
        check.require(
            f"accuracy at the size of one network above {name} weights, mean of {len(SEEDS)} seeds",
            mean["1.0"] - mean[name], ">=", MARGIN, baseline=mean[name], unit="points",
        )  # fmt: skip
    for small, large in itertools.pairwise(BUDGETS):
        check.require(
            f"accuracy at {large} times the multiply-adds above that at {small}, mean of {len(SEEDS)} seeds",
            mean[f"{large}"] - mean[f"{small}"], ">=", FALL, baseline=mean[f"{small}"], unit="points",
        )  # fmt: skip
    check.note(f"Accuracies by seed: {found}")

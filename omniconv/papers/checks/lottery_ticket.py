"""A network pruned by magnitude over rounds and rewound to its first weights trains in isolation as well as the dense
one, at a fifth of the size; the same masks with other random weights do not.

LeNet-300-100 on 4,000 pictures of Fashion-MNIST, Adam of 1.2e-3 with batches of 60, 500 steps a round. A round takes
20% of what is left, 10% in the output layer: 21% is left after 7 rounds, 7% after 12. The early-stop iteration is that
of the least loss on 1,000 other pictures, looked at every 20 steps.
"""

import copy
import statistics

import torch
from torch import nn
from torch.nn import functional as F

from omniconv.compress.prune.lottery_ticket import conv_network, lenet_300_100, rounds, smallest_of_layers
from omniconv.compress.prune.masks import MaskKeeper
from omniconv.core.seeds import derive, generator
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist

PARAMETERS = 266_610
MILLIONS = {2: 4.3, 4: 2.4}
SMALL, SMALLEST = 7, 12
LOSS = -0.5
MARGIN = 0.5
SEEDS = (0, 1, 2)
IMAGES, VALIDATION, TEST = 4_000, 1_000, 5_000
STEPS, EVERY = 500, 20
RATES = {"5": 0.1}


class Training:
    """Trains a network and returns its test accuracy and early-stop iteration; remembers the state it started with."""

    def __init__(self, data: Split, validation: Split, test: Split, seed: int) -> None:
        self.data, self.validation, self.test, self.seed = data, validation, test, seed
        self.start: dict[str, torch.Tensor] = {}
        self.revived = 0

    def __call__(self, model: nn.Module) -> tuple[float, int]:
        """Train in place."""
        self.start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), 1.2e-3, fused=True)
        random = generator(self.seed, "train")
        images, labels = self.data
        best, stop = float("inf"), 0
        for step in range(1, STEPS + 1):
            chosen = torch.randint(len(labels), (60,), generator=random)
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            if step % EVERY == 0:
                with torch.no_grad():
                    loss = float(F.cross_entropy(model(self.validation[0]), self.validation[1]))
                if loss < best:
                    best, stop = loss, step
        for name, weight in model.state_dict().items():
            if name.endswith("weight"):
                self.revived += int(weight[self.start[name] == 0].count_nonzero())
        return accuracy(model, self.test), stop


def run(check: Check) -> None:
    """Measure counts, rewinding, and what tickets are worth."""
    count = sum(p.numel() for p in lenet_300_100().parameters())
    check.require("parameters of LeNet-300-100", count, "==", PARAMETERS)
    for depth, millions in MILLIONS.items():
        count = sum(p.numel() for p in conv_network(depth).parameters())
        check.require(f"parameters of Conv-{depth} in millions", round(count / 1e6, 1), "==", millions)

    (images, labels), test = fashion_mnist(IMAGES + VALIDATION, TEST)
    data, validation = (images[:IMAGES], labels[:IMAGES]), (images[IMAGES:], labels[IMAGES:])
    dense, small, smallest, control = [], [], [], []
    wrong = moved = revived = 0
    for seed in SEEDS:
        torch.manual_seed(derive(seed, "weights"))
        model = lenet_300_100()
        first = copy.deepcopy(model.state_dict())
        training = Training(data, validation, test, seed)
        expected = {name: first[f"{name}.weight"].numel() for name in ("1", "3", "5")}
        results = []
        for step, done in enumerate(rounds(model, training, smallest_of_layers(0.2, RATES), SMALLEST)):
            for name, mask in done.masks.items():
                wrong += abs(int(mask.sum()) - expected[name])
                expected[name] -= round(RATES.get(name, 0.2) * expected[name])
                moved += int((training.start[f"{name}.weight"] != first[f"{name}.weight"] * mask).sum())
            results.append(done.result)
            if step == SMALLEST:
                torch.manual_seed(derive(seed, "other weights"))
                other = lenet_300_100()
                with MaskKeeper(other, done.masks):
                    control.append(training(other))
        revived += training.revived
        dense.append(results[0])
        small.append(results[SMALL])
        smallest.append(results[SMALLEST])
    check.require("weights by which layers miss 0.8^k, rounded in each round", wrong, "==", 0)
    check.require("weights that differ from the first ones after rewinding", moved, "==", 0)
    check.require("pruned weights that training revived", revived, "==", 0)

    right = {
        name: statistics.mean(accuracy for accuracy, _ in values)
        for name, values in (("dense", dense), ("small", small), ("smallest", smallest), ("control", control))
    }
    check.require(
        f"accuracy of tickets with 21% of the weights above dense, mean of {len(SEEDS)} seeds",
        right["small"] - right["dense"], ">=", LOSS, baseline=right["dense"], unit="points",
    )  # fmt: skip
    check.require(
        f"accuracy of tickets with 7% above random re-initialisation, mean of {len(SEEDS)} seeds",
        right["smallest"] - right["control"], ">=", MARGIN, baseline=right["control"], unit="points",
    )  # fmt: skip
    stops = [statistics.mean(stop for _, stop in values) for values in (smallest, control)]
    check.require(
        "early-stop iteration of tickets with 7% minus that of random re-initialisation",
        stops[0] - stops[1], "<=", 0, baseline=stops[1], unit="iterations",
    )  # fmt: skip
    check.note(f"(accuracy, early stop): dense {dense}; 21% {small}; 7% {smallest}; re-initialised {control}")

"""Convolutions with a stride can stand for maximum pooling without loss, and guided backpropagation is a rule at
every ReLU that lets through neither signals of inactive units nor negative ones.

The training has nets of half width (48 channels) on Fashion-MNIST averaged to 14 x 14 pixels, without dropout,
which the few updates do not need; the twin has maximum pooling behind the same convolutions (ConvPool-CNN), which
the paper compares.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.inspect.backprop import Rule, backpropagate
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

PARAMETERS = 1_369_738
EXTRA = 3 * 3 * (96 * 96 + 192 * 192) + 96 + 192
"""Parameters of one more 3x3 convolution a stage."""
ERROR = 1e-6
APART = 1e-2
MARGIN = -1.0
SEEDS = (0, 1, 2)
IMAGES, EPOCHS, BATCH = 6000, 1, 50
NETS = {"All-CNN": "all_cnn_c", "max-pool twin": "convpool_cnn_c"}


def count(name: str) -> int:
    """Return the number of parameters with 10 classes."""
    return sum(p.numel() for p in create_model(name, num_classes=10, device="meta").parameters())


def strided(name: str) -> tuple[int, int, int]:
    """Return how many convolutions, strided convolutions and poolings a network has."""
    modules = list(create_model(name, num_classes=10, device="meta").modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    return (
        len(convolutions),
        sum(m.stride == (2, 2) for m in convolutions),
        sum(isinstance(m, nn.MaxPool2d) for m in modules),
    )


def by_hand(model: nn.Sequential, x: Tensor, classes: Tensor, rule: Rule) -> tuple[Tensor, float]:
    """Return the signal at the pixels by a recursion of two masks, and the largest that left an inactive ReLU."""
    maps = [x]
    for layer in model:
        maps.append(layer(maps[-1]))
    signal = F.one_hot(classes, maps[-1].shape[1]).to(x.dtype)
    leaked = 0.0
    for layer, before in zip(reversed(model), maps[-2::-1], strict=True):
        if isinstance(layer, nn.Linear):
            signal = signal @ layer.weight
        elif isinstance(layer, nn.Flatten):
            signal = signal.view(before.shape)
        elif isinstance(layer, nn.Conv2d):
            signal = F.conv_transpose2d(signal, layer.weight, padding=1)
        else:
            forward = before > 0 if rule != "deconvnet" else torch.ones_like(before)
            backward = signal > 0 if rule != "gradient" else torch.ones_like(before)
            signal = signal * forward * backward
            leaked = max(leaked, float(signal[before <= 0].abs().max()))
    return signal, leaked


def compare_rules(check: Check) -> None:
    """Hold the three rules against the recursion and against one another."""
    torch.manual_seed(0)
    widths = (3, 8, 12, 8)
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 9 * 11, 5)).double()
    x, classes = torch.randn(6, 3, 9, 11, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    signals: dict[str, Tensor] = {}
    rules: tuple[Rule, ...] = ("gradient", "deconvnet", "guided")
    for rule in rules:
        signals[rule] = torch.from_numpy(
            backpropagate(model, x, classes, rule=rule).data["gradient"]
        ).double()
        with torch.no_grad():
            expected, leaked = by_hand(model, x, classes, rule)
        error = float((signals[rule] - expected).abs().max() / expected.abs().max())
        check.require(f"{rule}: difference from two masks at every ReLU, relative", error, "<=", ERROR)
        if rule == "guided":
            check.require("largest guided signal that leaves an inactive ReLU", leaked, "==", 0)
    for rule in rules[:2]:
        apart = float((signals["guided"] - signals[rule]).norm() / signals[rule].norm())
        check.require(f"guided signal's relative distance from {rule}", apart, ">", APART)


def make_network(name: str, seed: int) -> nn.Module:
    """Return a network of half width without dropout."""
    torch.manual_seed(derive(seed, "weights"))
    options = {"width": 48, "drop_rate": 0.0, "input_drop_rate": 0.0}
    model = create_model(name, num_classes=10, in_chans=1, **options)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure the tables, the backward rules, and a small training."""
    check.require("parameters of All-CNN-C", count("all_cnn_c"), "==", PARAMETERS)
    for base in "abc":
        plain = strided(f"cnn_{base}")
        check.require(f"poolings of base {base.upper()} without a strided convolution", plain[2], "==", 2)
        rows = {"strided_cnn": (0, 2, 0), "convpool_cnn": (2, 0, 2), "all_cnn": (2, 2, 0)}
        described = sum(
            strided(f"{name}_{base}") == (plain[0] + more, steps, pools)
            for name, (more, steps, pools) in rows.items()
        )
        check.require(f"networks derived from base {base.upper()} as the table says", described, "==", 3)
        sizes = [count(f"{name}_{base}") - count(f"cnn_{base}") for name in rows]
        check.require(
            f"base {base.upper()}: parameters that ConvPool- and All-CNN add, and Strided-CNN does not",
            sizes[1] + sizes[2] + (sizes[0] != 0), "==", 2 * EXTRA,
        )  # fmt: skip
    compare_rules(check)

    training, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(IMAGES, 10000))
    scores: dict[str, list[float]] = {title: [] for title in NETS}
    for seed in SEEDS:
        for title, name in NETS.items():
            model = make_network(name, seed)
            train(model, training, epochs=EPOCHS, batch=BATCH, seed=seed, shift=1)
            scores[title].append(accuracy(model, test))
    means = {title: sum(values) / len(values) for title, values in scores.items()}
    check.require(
        "accuracy minus the max-pool twin's, Fashion-MNIST, mean of 3 seeds",
        means["All-CNN"] - means["max-pool twin"], ">=", MARGIN, baseline=means["max-pool twin"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies {scores}")

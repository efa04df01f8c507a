"""Two formulae take the place of norm and activation: S0 trains in batches of four, where batch norm suffers, and B0 in
large ones as well as batch norm does; a search of random graphs with early rejection finds such layers, and evolution
finds better ones than chance.

The trainings see CIFAR-10 averaged to 16 x 16 pixels. The search sees the 8 x 8 digits: a plain chain of five
convolutions, each followed by the layer, is trained for 30 steps; a layer is rejected if its output ignores the input,
if the network falls below 20% or is not finite, or if 20 steps of ascent take the gradient's norm above 1e8. The best
of the first 100 random layers stands against the best of 100 trials of evolution, the first 40 of them random.
"""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.nas.evonorm_search import GraphNorm, Layer, evolve, gradient_ascent, random_layer
from omniconv.layers.norm.evonorm import EvoNormB0, EvoNormS0
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, cifar10, digits, train

ERROR = 1e-6
INDEPENDENCE = 1e-7
S0_GAIN, B0_MARGIN = 1.0, -1.0
KEPT_SHARE = 0.05
CHANCE = 0.1
SEEDS = (0, 1, 2)
RANDOM_LAYERS, TRIALS, FIRST = 500, 100, 40
DEPTH, WIDTH, STEPS = 5, 8, 30
QUALITY, ASCENT, LIMIT = 0.2, 20, 1e8


def numpy_reference(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    """Return B0 or S0 in training as the paper's table writes them."""
    weight, bias, v = (
        layer.get_parameter(n).detach().numpy()[:, None, None] for n in ("weight", "bias", "v")
    )
    if isinstance(layer, EvoNormB0):
        batch = np.sqrt(x.var((0, 2, 3), keepdims=True) + layer.eps)
        instance = np.sqrt(x.var((2, 3), keepdims=True) + layer.eps)
        return x / np.maximum(batch, v * x + instance) * weight + bias
    assert isinstance(layer, EvoNormS0)
    grouped = x.reshape(len(x), layer.groups, -1)
    deviation = np.sqrt(grouped.var(2) + layer.eps).repeat(x.shape[1] // layer.groups, 1)
    return x / (1 + np.exp(-v * x)) / deviation[:, :, None, None] * weight + bias


def make_layers() -> dict[str, nn.Module]:
    """Return both layers in float64 with parameters drawn at random."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"B0": EvoNormB0(8), "S0": EvoNormS0(8, 4)}
    for layer in layers.values():
        for parameter in layer.double().parameters():
            nn.init.normal_(parameter)
    return layers


def dependence(layer: nn.Module, x: Tensor, *, training: bool) -> float:
    """Return how much the first sample's output changes when the others are left out."""
    with torch.no_grad():
        layer.train(training)
        return float((layer(x)[:1] - layer(x[:1])).abs().max())


def make_network(seed: int, norm: str) -> nn.Module:
    """Return a small residual network with a norm."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(
        "resnet18", num_classes=10, depths=(1, 1), widths=(32, 32), stem="3x3", shortcut="pool", norm=norm
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def compare(norm: str, training: Split, test: Split, *, batch: int, lr: float) -> dict[str, list[float]]:
    """Return the accuracies of networks with `norm` and with batch norm, seed by seed."""
    scores: dict[str, list[float]] = {norm: [], "batch": []}
    for seed in SEEDS:
        for name in scores:
            model = make_network(seed, name)
            train(model, training, epochs=1, batch=batch, lr=lr, seed=seed, shift=1)
            scores[name].append(accuracy(model, test))
    return scores


class Search:
    """Evaluates layers on digits, with the paper's two rejections."""

    def __init__(self) -> None:
        self.training, self.test = digits()

    def network(self, layer: Layer) -> nn.Module:
        """Return a plain chain of convolutions, each followed by the layer."""
        torch.manual_seed(0)
        modules: list[nn.Module] = []
        for index in range(DEPTH):
            modules.append(nn.Conv2d(WIDTH if index else 1, WIDTH, 3, 1 if index else 2, 1, bias=False))
            modules.append(GraphNorm(layer, WIDTH, groups=4))
        return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))

    def evaluate(self, layer: Layer) -> tuple[float, ...] | None:
        """Return the accuracy after a short training, or None if the layer is rejected."""
        if not GraphNorm(layer, WIDTH).reads_input:
            return None
        model = self.network(layer)
        images, labels = self.training
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        order = generator(0, "search")
        for step in range(STEPS):
            chosen = torch.randint(len(images), (32,), generator=order)
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            # A loss that never left that of a guess ends the trial halfway.
            if not loss.isfinite() or (step == STEPS // 2 and loss > 2.5):
                return None
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        score = accuracy(model, self.test) / 100
        if score < QUALITY:
            return None
        batch = (images[:32], labels[:32])
        model = self.network(layer).train()
        norm = gradient_ascent(
            model, lambda m: F.cross_entropy(m(batch[0]), batch[1]), steps=ASCENT, limit=LIMIT
        )
        return (score,) if norm <= LIMIT else None


def run(check: Check) -> None:
    """Measure the layers, two small trainings, and the search."""
    x = torch.randn(4, 8, 6, 5, dtype=torch.float64, generator=generator(0, "input"))
    layers = make_layers()
    for name, layer in layers.items():
        difference = np.abs(layer(x).detach().numpy() - numpy_reference(layer, x.numpy())).max()
        check.require(f"difference of {name} from the formula in NumPy", difference, "<=", ERROR)
        count = sum(p.numel() for p in layer.parameters())
        check.require(f"parameters of {name} a channel", count / 8, "==", 3)
        correct = gradcheck(layer.eval(), (x[:2].clone().requires_grad_(),), raise_exception=False)
        check.require(f"gradients of {name} are those of finite differences", correct, "==", 1)
    s0, b0 = (dependence(layers[name], x, training=True) for name in ("S0", "B0"))
    check.require("change of S0 in training when other samples are left out", s0, "<=", INDEPENDENCE)
    check.require("the same of B0 in training", b0, ">", INDEPENDENCE)
    b0 = dependence(layers["B0"], x, training=False)
    check.require("the same of B0 in eval mode", b0, "<=", INDEPENDENCE)

    (images, labels), test = ((F.avg_pool2d(x, 2), y) for x, y in cifar10(4000, 2000))
    for norm, batch, lr, count, margin in (
        ("evonorm_s0", 4, 1e-3, 2000, S0_GAIN),
        ("evonorm_b0", 64, 3e-3, 4000, B0_MARGIN),
    ):
        scores = compare(norm, (images[:count], labels[:count]), test, batch=batch, lr=lr)
        means = {name: sum(values) / len(values) for name, values in scores.items()}
        check.require(
            f"accuracy of {norm} minus batch norm with ReLU, batches of {batch}, mean of 3 seeds",
            means[norm] - means["batch"], ">=", margin, baseline=means["batch"], unit="points",
        )  # fmt: skip
        check.note(f"accuracies in batches of {batch}: {scores}")

    search = Search()
    source = random.Random(0)
    scores = [search.evaluate(random_layer(source)) for _ in range(RANDOM_LAYERS)]
    kept = [score[0] for score in scores if score is not None]
    check.require("share of random layers that are kept", len(kept) / RANDOM_LAYERS, "<", KEPT_SHARE)
    check.require("lowest accuracy of a kept layer", min(kept, default=0.0), ">", CHANCE)
    chance = max((score[0] for score in scores[:TRIALS] if score is not None), default=0.0)
    evolved = evolve(search.evaluate, random.Random(0), trials=TRIALS, first=FIRST)
    best = max((candidate.scores[0] for candidate in evolved), default=0.0)
    check.require("best accuracy of evolution, 100 trials", best, ">", chance, baseline=chance)
    check.note(f"{len(kept)} of {RANDOM_LAYERS} random layers kept, {len(evolved)} of {TRIALS} evolved ones")

"""Gates that also read what earlier stages pooled cost less than a thousand parameters and hardly any time, and train a
network as well as ECA does.

Totals are those of the authors' table, there in units of 2^20. The training sees 5,000 pictures of Fashion-MNIST,
averaged to 14 x 14 pixels, with the same recipe and seeds for both networks.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.layers.attention.eca import EfficientChannelAttention
from omniconv.layers.attention.pkcam import PKCAM
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

ADDED = 1000
TOTALS = {"resnet18": 11.69e6, "resnet34": 21.80e6, "resnet50": 25.56e6}
TOLERANCE = 0.001
ERROR = 1e-6
MARGIN = -0.3
OVERHEAD = 0.25
SEEDS = (0, 1, 2)
IMAGES, EPOCHS, TEST = 5000, 3, 4000
ROUNDS = 15


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def local_error() -> float:
    """Return how far the gate is from the sigmoid of ECA's, where the fusion selects the local row alone."""
    torch.manual_seed(0)
    layer, eca = PKCAM(64, 2).double(), EfficientChannelAttention(64).double()
    with torch.no_grad():
        layer.output_fusion.weight.copy_(torch.tensor([[1.0, 0.0]]))
        eca.conv.weight.copy_(layer.get_parameter("local.weight"))
        x = torch.rand(4, 64, 5, 6, dtype=torch.float64) + 1
        gates = eca(x) / x
        y = layer(x, torch.randn(4, 16), torch.randn(4, 64))
        return float((y - x * (1 + gates.sigmoid())).abs().max())


def reach(gate: str) -> float:
    """Return the largest gradient of the second stage's gated map by what the first stage's last block pooled."""
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=10, depths=(1, 1), widths=(16, 32), stem="3x3", gate=gate)
    layer = model.get_submodule("layer2.0.se")
    x = torch.randn(2, 32, 4, 4)
    stem, pooled = torch.randn(2, 16), torch.randn(2, 16, requires_grad=True)
    y: Tensor = layer(x, stem, pooled) if gate == "pkcam" else layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), pooled, allow_unused=True, materialize_grads=True)
    return float(gradient.abs().max())


def make_network(seed: int, gate: str) -> nn.Module:
    """Return a residual network of eight layers."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(
        "resnet18", num_classes=10, in_chans=1, depths=(1, 1, 1), widths=(16, 32, 64), stem="3x3", gate=gate
    )
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def overhead(images: Tensor, labels: Tensor) -> float:
    """Return by which share a training step with PKCAM takes longer than one with ECA, medians of rounds in turn."""
    models = {gate: make_network(0, gate).train() for gate in ("eca", "pkcam")}
    seconds: dict[str, list[float]] = {gate: [] for gate in models}
    for _ in range(ROUNDS):
        for gate, model in models.items():
            start = time.perf_counter()
            F.cross_entropy(model(images), labels).backward()
            seconds[gate].append(time.perf_counter() - start)
    return statistics.median(seconds["pkcam"]) / statistics.median(seconds["eca"]) - 1


def run(check: Check) -> None:
    """Measure counts, the two special properties of the gate, its time, and a small training."""
    for name, total in TOTALS.items():
        plain, gated = (count(create_model(name, gate=gate, device="meta")) for gate in (None, "pkcam"))
        check.require(f"parameters that PKCAM adds to {name}", gated - plain, "<", ADDED)
        check.require(
            f"relative distance of {name} from the authors' total", abs(gated / total - 1), "<=", TOLERANCE
        )
    check.require("distance from ECA's gates with the local row selected", local_error(), "<=", ERROR)
    check.require("gradient of a gate by an earlier stage's pooled vector", reach("pkcam"), ">", 0)
    check.require("the same for ECA", reach("eca"), "==", 0)

    training, test = ((F.avg_pool2d(x, 2), y) for x, y in fashion_mnist(IMAGES, TEST))
    slower = overhead(training[0][:128], training[1][:128])
    check.require("share of time that PKCAM adds to a training step with ECA", slower, "<=", OVERHEAD)
    scores: dict[str, list[float]] = {"eca": [], "pkcam": []}
    for seed in SEEDS:
        for gate in scores:
            model = make_network(seed, gate)
            train(model, training, epochs=EPOCHS, seed=seed, shift=1)
            scores[gate].append(accuracy(model, test))
    means = {gate: sum(values) / len(values) for gate, values in scores.items()}
    check.require(
        "accuracy with PKCAM minus with ECA, Fashion-MNIST, mean of 3 seeds",
        means["pkcam"] - means["eca"], ">=", MARGIN, baseline=means["eca"], unit="points",
    )  # fmt: skip
    check.note(f"accuracies with PKCAM {scores['pkcam']}, with ECA {scores['eca']}")

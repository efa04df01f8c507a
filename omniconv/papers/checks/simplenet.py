"""Thirteen plain convolutions need 2 to 25 times fewer parameters and operations than the networks that they are
listed beside, and with 1x1 kernels late they learn at least as well as with 1x1 kernels early, and as LeNet.

The figures of other networks are those of their papers; multiply-adds of VGG-16 and WRN-16-8 on 32-pixel images are
sums over their tables of convolutions and linear layers. The training sees Fashion-MNIST reduced to 16 x 16 pixels,
which the slim network's four poolings need at least, with the same recipe and seeds for all. The network with early
1x1 kernels has them in its second and third convolution and 43 instead of 256 channels in its eleventh, so that all
parameters agree within 1%; LeNet (20 and 50 channels of 5x5, 500 hidden units) has a third more.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

PARAMETERS = 5_489_290
PARAMETER_ERROR = 0.005
FEWER = {"VGG-16": (138.36e6, 25.0), "WRN-16-8": (11.0e6, 2.0)}
OPERATIONS = {"VGG-16": (313.5e6, 1.0), "WRN-16-8": (1548e6, 2.0)}
MARGIN = 0.0
SEEDS = (0, 1, 2)
IMAGES, EPOCHS = 4000, 2
EARLY = {"groups": ((64, 32, 32, 32), (32, 32, 64), (64, 64), (128, 43, 64), (64,)), "pointwise": (1, 2)}


def count(model: nn.Module) -> int:
    """Return the number of parameters of convolutions and linear layers."""
    return sum(
        p.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters()
    )


def joins(model: nn.Module) -> int:
    """Return how many operations of a network read more than one result of others."""
    return sum(len(node.all_input_nodes) > 1 for node in fx.symbolic_trace(model).graph.nodes)


def make_lenet() -> nn.Module:
    """Return LeNet for 16-pixel images."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5, padding=2), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5, padding=2), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def make_network(name: str, seed: int) -> nn.Module:
    """Return one of the three networks of the training."""
    torch.manual_seed(derive(seed, "weights"))
    if name == "LeNet":
        return make_lenet()
    options = EARLY if name == "early 1x1" else {}
    model = create_model("simplenet_cifar_310k", num_classes=10, in_chans=1, **options)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def small_pictures() -> tuple[Split, Split]:
    """Return Fashion-MNIST at 16 x 16 pixels."""

    def shrink(images: Tensor) -> Tensor:
        return F.interpolate(images, size=(16, 16), mode="area")

    (x, y), (tx, ty) = fashion_mnist(IMAGES, 10000)
    return (shrink(x), y), (shrink(tx), ty)


def run(check: Check) -> None:
    """Measure counts, the graph, and a small training."""
    model = create_model("simplenet_cifar_5m", num_classes=10, device="meta")
    parameters, macs = count(model), count_cost(model, (3, 32, 32)).macs
    error = abs(parameters / PARAMETERS - 1)
    check.require(
        f"parameters of convolutions and linear layer, off {PARAMETERS}", error, "<=", PARAMETER_ERROR
    )
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    check.require("convolutions", len(convolutions), "==", 13)
    check.require("operations that join two results", joins(create_model("simplenet_cifar_310k")), "==", 0)
    for name, (figure, factor) in FEWER.items():
        check.require(f"parameters of {name} over SimpleNet's", figure / parameters, ">=", factor)
    for name, (figure, factor) in OPERATIONS.items():
        check.require(
            f"multiply-adds of {name} over SimpleNet's, 32-pixel image", figure / macs, ">=", factor
        )

    training, test = small_pictures()
    scores: dict[str, list[float]] = {"slim": [], "early 1x1": [], "LeNet": []}
    for seed in SEEDS:
        for name in scores:
            model = make_network(name, seed)
            train(model, training, epochs=EPOCHS, seed=seed, shift=1)
            scores[name].append(accuracy(model, test))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    for name in ("early 1x1", "LeNet"):
        check.require(
            f"slim network's accuracy minus that of {name}, Fashion-MNIST, mean of 3 seeds",
            means["slim"] - means[name], ">=", MARGIN, baseline=means[name], unit="points",
        )  # fmt: skip
    check.note(f"accuracies {scores}, parameters { {name: count(make_network(name, 0)) for name in scores} }")

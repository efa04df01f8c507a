"""A kernel mixed from experts for every sample equals the mixture of the experts' convolutions at the cost of one, and
serves pictures of several domains better than one kernel for all, with a routing that tells the domains apart.

The small training sees Fashion-MNIST averaged to 14 x 14 pixels, a third of the pictures each as they are, with light
and dark exchanged, and turned by 90 degrees. Both networks have the same widths, recipe and seeds.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.layers.conv.condconv import CondConv2d, ExpertConv2d
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, fashion_mnist, train

ERROR = 1e-5
PARAMETERS = {"efficientnet_cc_b0_4e": 13.314e6, "efficientnet_cc_b0_8e": 24.013e6}
PARAMETERS_TOLERANCE = 0.01
MACS, MACS_TOLERANCE = 413e6, 0.02
COST = 1.08
SMALL_COST = 1.1
GAIN = 1.0
SEPARABLE = 90.0
EXPERTS = 4
SEEDS = (0, 1, 2)

OPTIONS = (
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"groups": 4, "padding": 1},
    {"groups": 8, "stride": 2},
)


@torch.no_grad()
def mixture_error() -> float:
    """Return the largest difference from the mixture of all experts' outputs."""
    worst = 0.0
    for options in OPTIONS:
        torch.manual_seed(0)
        layer = CondConv2d(8, 16, 3, experts=3, **options)
        x = torch.randn(4, 8, 9, 11)
        routing = layer.routing_fn(x)
        expected = torch.zeros(())
        for expert in range(3):
            kernel, bias = layer.conv.weight[expert].view(16, -1, 3, 3), layer.conv.bias
            y = F.conv2d(x, kernel, None if bias is None else bias[expert], **options)
            expected = expected + routing[:, expert, None, None, None] * y
        worst = max(worst, float((layer(x) - expected).abs().max()))
    return worst


@torch.no_grad()
def loop_error() -> float:
    """Return the largest difference of the grouped form from one convolution a sample."""
    torch.manual_seed(0)
    layer, x = CondConv2d(8, 16, 3, padding=1), torch.randn(5, 8, 9, 11)
    return float((layer(x) - torch.cat([layer(one[None]) for one in x])).abs().max())


@torch.no_grad()
def single_error() -> float:
    """Return the largest difference of one expert of weight one from an ordinary convolution."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    layer = ExpertConv2d.like(conv, 1)
    layer.load_state_dict({"weight": conv.weight.view(1, -1)})
    x = torch.randn(4, 8, 9, 11)
    return float((layer(x, torch.ones(4, 1)) - conv(x)).abs().max())


def domains(split: Split, name: str) -> tuple[Split, Tensor]:
    """Return the pictures, each in a domain drawn for it, and the domains (N,)."""
    images, labels = F.avg_pool2d(split[0], 2), split[1]
    chosen = torch.randint(3, (len(labels),), generator=generator(0, "domains", name))
    forms = torch.stack([images, -images, images.rot90(1, (2, 3))])
    return (forms[chosen, torch.arange(len(labels))], labels), chosen


def make_network(seed: int, *, experts: int) -> nn.Module:
    """Return four convolutions, the last three of them mixtures of experts unless `experts` is 0."""
    torch.manual_seed(derive(seed, "weights"))
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for channels, out, stride in ((8, 16, 1), (16, 16, 2), (16, 32, 1)):
        if experts:
            layers.append(CondConv2d(channels, out, 3, experts=experts, stride=stride, padding=1, bias=False))
        else:
            layers.append(nn.Conv2d(channels, out, 3, stride, 1, bias=False))
        layers += [nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@torch.no_grad()
def routings(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return the weights of all layers' experts (N, layers x experts)."""
    found: list[Tensor] = []
    hooks = [
        m.routing_fn.register_forward_hook(lambda *args: found.append(args[2]))
        for m in model.modules()
        if isinstance(m, CondConv2d)
    ]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return torch.cat(found, 1).numpy()


def separability(routing: np.ndarray, domain: np.ndarray) -> float:
    """Return how many domains of the second half a linear classifier of the first tells right, in percent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    half = len(routing) // 2
    scaled = StandardScaler().fit(routing[:half]).transform(routing)
    classifier = LogisticRegression(max_iter=1000).fit(scaled[:half], domain[:half])
    return 100 * float(classifier.score(scaled[half:], domain[half:]))


def run(check: Check) -> None:
    """Measure the layer, the networks' counts, and a training on several domains."""
    check.require("difference from the mixture of the experts' outputs", mixture_error(), "<=", ERROR)
    check.require("difference of the grouped form from a loop over samples", loop_error(), "<=", ERROR)
    check.require("difference of one expert of weight one from a convolution", single_error(), "<=", ERROR)

    plain = count_cost(create_model("efficientnet_b0", device="meta"), (3, 224, 224))
    for name, published in PARAMETERS.items():
        cost = count_cost(create_model(name, device="meta"), (3, 224, 224))
        off = abs(cost.parameters / published - 1)
        check.require(
            f"parameters of {name}, off the published by a share of", off, "<=", PARAMETERS_TOLERANCE
        )
        if name.endswith("8e"):
            off = abs(cost.macs / MACS - 1)
            check.require(
                f"multiply-adds of {name}, off the published by a share of", off, "<=", MACS_TOLERANCE
            )
        check.require(f"multiply-adds of {name} over B0's", cost.macs / plain.macs, "<=", COST)

    small = [count_cost(make_network(0, experts=experts), (1, 14, 14)).macs for experts in (EXPERTS, 0)]
    check.require(
        "multiply-adds of the small network over the static one's", small[0] / small[1], "<", SMALL_COST
    )
    training, test = fashion_mnist(10000, 6000)
    (images, _), (tests, tested) = domains(training, "train"), domains(test, "test")
    scores: dict[int, list[float]] = {EXPERTS: [], 0: []}
    separable = []
    for seed in SEEDS:
        for experts in scores:
            model = make_network(seed, experts=experts)
            train(model, images, epochs=4, lr=5e-3, seed=seed, shift=1, flip=False)
            scores[experts].append(accuracy(model, tests))
            if experts:
                separable.append(separability(routings(model, tests[0]), tested.numpy()))
    means = {experts: sum(values) / len(values) for experts, values in scores.items()}
    check.require(
        "accuracy with experts minus without on three domains of Fashion-MNIST, mean of 3 seeds",
        means[EXPERTS] - means[0], ">=", GAIN, baseline=means[0], unit="points",
    )  # fmt: skip
    check.require(
        "domains that a linear classifier reads off the routing, worst of 3 seeds",
        min(separable), ">=", SEPARABLE, unit="%",
    )  # fmt: skip
    check.note(f"accuracies with {EXPERTS} experts {scores[EXPERTS]}, without {scores[0]}")

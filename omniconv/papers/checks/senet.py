"""A gate that sees all channels' means adds exactly the weights the paper counts and hardly any multiply-adds, and lets
a small network use global statistics that its own receptive field cannot gather.

The count is section 4 of the paper, (2 / r) sum N_s C_s^2, plus the biases that the public weights have.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import derive, generator
from omniconv.design.cost import count_cost
from omniconv.layers.attention.se import SqueezeExcite
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import Split, accuracy, train

STAGES = ((3, 256), (4, 512), (6, 1024), (3, 2048))
REDUCTION = 16
WEIGHTS = 2_514_944
MACS_SHARE = 0.003
ERROR = 1e-6
GAIN = 10.0
SEEDS = (0, 1, 2)


def reference(layer: SqueezeExcite, x: Tensor) -> Tensor:
    """The layer as the paper writes it: two fully connected layers on a vector of means."""
    w1, b1, w2, b2 = (p.flatten(1) if p.ndim > 1 else p for p in layer.parameters())
    z = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
    gates = 1 / (1 + torch.exp(-(torch.relu(z @ w1.T + b1) @ w2.T + b2)))
    return x * gates[:, :, None, None]


def layer_error() -> float:
    """Return the largest relative difference from the reference, in output and all gradients."""
    torch.manual_seed(0)
    layer = SqueezeExcite(64, 4)
    x = torch.randn(4, 64, 9, 7, requires_grad=True)
    probe = torch.randn(4, 64, 9, 7)
    results = []
    for form in (layer, lambda x: reference(layer, x)):
        y = form(x)
        results.append([y.detach(), *torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def open_gates_difference() -> float:
    """Return the largest difference between a network whose gates are all 1 and the one without gates."""
    torch.manual_seed(0)
    options = {"num_classes": 10, "depths": (1, 1), "widths": (16, 32)}
    plain, gated = create_model("resnet50", **options).eval(), create_model("seresnet50", **options).eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    for module in gated.modules():
        if isinstance(module, SqueezeExcite):
            nn.init.zeros_(module.get_submodule("fc2").get_parameter("weight"))
            nn.init.constant_(module.get_submodule("fc2").get_parameter("bias"), 100.0)
    for model in (plain, gated):
        for module in model.modules():
            # Residual branches start at zero; here they must count.
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return float((plain(x) - gated(x)).abs().max())


def odd_channel(count: int, name: str, size: int = 16) -> Split:
    """Return images whose class is the one of three channels whose global mean differs in sign from the others'.

    Every channel is a constant +-0.3 plus smooth noise of unit variance and a mean of exactly zero over the whole
    image, so that a patch says next to nothing about the constant and the whole image says it all. Both signs are
    equally likely for every class, so no linear function of the means tells the classes apart.
    """
    random = generator(0, "odd channel", name)
    labels = torch.randint(3, (count,), generator=random)
    sign = torch.randint(2, (count, 1), generator=random) * 2.0 - 1
    signs = torch.where(F.one_hot(labels, 3).bool(), -sign, sign)
    noise = F.interpolate(torch.randn(count, 3, 4, 4, generator=random), size=(size, size), mode="bilinear")
    noise = noise - noise.mean((2, 3), keepdim=True)
    noise = noise / noise.std((2, 3), keepdim=True)
    return 0.3 * signs[:, :, None, None] + noise, labels


def make_network(seed: int, *, gated: bool) -> nn.Module:
    """Return four blocks of convolution, batch norm and ReLU, each with a gate if `gated`."""
    torch.manual_seed(derive(seed, "weights"))
    layers: list[nn.Module] = []
    for block in range(4):
        layers += [
            nn.Conv2d(3 if block == 0 else 16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
        if gated:
            layers.append(SqueezeExcite(16, 8))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def run(check: Check) -> None:
    """Measure the count, the cost, the layer, open gates, and the worth of a global view."""
    plain, gated = (
        count_cost(create_model(n, device="meta"), (3, 224, 224)) for n in ("resnet50", "seresnet50")
    )
    weights = sum(2 * blocks * channels**2 // REDUCTION for blocks, channels in STAGES)
    biases = sum(blocks * (channels + channels // REDUCTION) for blocks, channels in STAGES)
    check.require("weights of the formula (2 / r) sum N C^2 at r = 16", weights, "==", WEIGHTS)
    extra = gated.parameters - plain.parameters
    check.require("parameters that SE adds to ResNet-50, less its biases", extra - biases, "==", WEIGHTS)
    share = gated.macs / plain.macs - 1
    check.require("share of multiply-adds that SE adds at 224 pixels", share, "<", MACS_SHARE)

    check.require("relative error of the layer and its gradients", layer_error(), "<=", ERROR)
    check.require("difference that gates of 1 make to a network", open_gates_difference(), "==", 0)

    training, test = odd_channel(6000, "train"), odd_channel(2000, "test")
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for gates in (True, False):
            model = make_network(seed, gated=gates)
            train(model, training, epochs=8, lr=5e-3, seed=seed, shift=0)
            scores[gates].append(accuracy(model, test))
    means = {gates: sum(values) / len(values) for gates, values in scores.items()}
    check.require(
        "accuracy with minus without SE where only global channel statistics tell, mean of 3 seeds",
        means[True] - means[False], ">=", GAIN, baseline=means[False], unit="points",
    )  # fmt: skip
    check.note(f"accuracies with SE {scores[True]}, without {scores[False]}; chance is 33.3")

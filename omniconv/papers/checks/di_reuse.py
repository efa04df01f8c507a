"""Data-type-aware intensity counts exactly what networks compute and move, and ranks twelve networks by the rate at
which a CPU gets through their multiply-adds better than plain arithmetic intensity does.

The paper measures energy on two GPUs; the proxy here is multiply-adds a second at batch one. Weights are random,
pictures 224 pixels wide. The weight of 0.8 is the paper's; nothing is fitted. One thread computes: a first run with
two, while others used the machine, measured how threads wait for each other (ResNet-18 took 940 ms) and no gain.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.deploy.latency import measure
from omniconv.design.data_reuse import Reuse, conv_reuse, data_reuse, fit_alpha, rank_correlation, total_reuse
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

KNOWN = {"resnet50": 4.09e9, "mobilenetv2_100": 0.30e9, "squeezenet": 0.82e9, "vgg16": 15.47e9}
TOLERANCE = 0.01
GAIN = 0.05

SHAPE = (3, 224, 224)
NETWORKS = (
    "resnet18", "resnet50", "resnext50_32x4d", "vgg16", "squeezenet", "mobilenetv2_100", "efficientnet_b0",
    "densenet121", "convnext_tiny", "repvgg_a0", "legacy_xception", "convmixer_768_32",
)  # fmt: skip
ROUNDS = 9


class Fire(nn.Module):
    """Squeezes to few channels, expands by pointwise and by 3x3 filters side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.point = nn.Conv2d(squeeze, expand, 1)
        self.square = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return both kinds of filters of the squeezed map."""
        x = self.squeeze(x).relu()
        return torch.cat([self.point(x), self.square(x)], 1).relu()


def squeezenet() -> nn.Module:
    """Return SqueezeNet 1.0, https://arxiv.org/abs/1602.07360."""
    fires = [(96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128)]
    fires += [(256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256)]
    parts: list[nn.Module] = [Fire(*sizes) for sizes in fires]

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    parts = [nn.Conv2d(3, 96, 7, 2), nn.ReLU(), pool(), *parts[:3], pool(), *parts[3:7], pool(), parts[7]]
    return nn.Sequential(*parts, nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make(name: str) -> nn.Module:
    """Return a network with random weights, in eval mode."""
    torch.manual_seed(0)
    return (squeezenet() if name == "squeezenet" else create_model(name)).eval()


def walk(model: nn.Module) -> list[tuple[int, int, int]]:
    """Run a network and return multiply-adds, weights and activations of its layers as their tensors show them."""
    found: list[tuple[int, int, int]] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = module.get_parameter("weight")
        macs = output.numel() // weight.shape[0] * weight.numel()
        found.append((macs, weight.numel(), inputs[0].numel() + output.numel()))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.inference_mode():
        model(torch.zeros(1, *SHAPE))
    for handle in handles:
        handle.remove()
    return found


def _counts(check: Check) -> None:
    wrong = 0
    for name, known in KNOWN.items():
        model = make(name)
        rows = data_reuse(model, SHAPE)
        counted = [(row.macs, row.parameters, row.activations) for row in rows]
        wrong += sum(
            abs(a - b)
            for one, other in zip(counted, walk(model), strict=True)
            for a, b in zip(one, other, strict=True)
        )
        macs = total_reuse(rows).macs
        check.require(f"{name}: multiply-adds beside the published", abs(macs / known - 1), "<=", TOLERANCE)
        wrong_ends = sum(
            row.weighted(1) != row.weight_reuse or row.weighted(0) != row.activation_reuse for row in rows
        )
        check.require(f"{name}: layers whose DI at 1 or 0 is not the reuse of one type", wrong_ends, "==", 0)
    check.require("difference of all counts to a walk through the running networks", wrong, "==", 0)


def _closed_forms(check: Check) -> None:
    pixels, channels = 49, 24
    layers: dict[str, tuple[nn.Module, Reuse]] = {
        "standard": (nn.Conv2d(channels, 40, 3, padding=1), conv_reuse(channels, 40, 9, pixels)),
        "pointwise": (nn.Conv2d(channels, 40, 1), conv_reuse(channels, 40, 1, pixels)),
        "grouped": (
            nn.Conv2d(channels, 40, 3, padding=1, groups=4),
            conv_reuse(channels, 40, 9, pixels, groups=4),
        ),
        "depthwise": (
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            conv_reuse(channels, channels, 25, pixels, groups=channels),
        ),
        "fully connected": (
            nn.Sequential(nn.Flatten(), nn.Linear(channels * pixels, 40)),
            conv_reuse(channels * pixels, 40, 1, 1),
        ),
    }
    wrong = 0
    for layer, form in layers.values():
        (row,) = data_reuse(layer, (channels, 7, 7))
        wrong += (row.macs, row.parameters, row.activations) != (form.macs, form.parameters, form.activations)
    check.require("kinds of layers whose closed form is not what is counted", wrong, "==", 0)
    (dense,), (deep,), (point,) = (
        data_reuse(layers[kind][0], (channels, 7, 7))
        for kind in ("fully connected", "depthwise", "pointwise")
    )
    check.require("fully connected: reuse of weights", dense.weight_reuse, "==", 1)
    check.require("depthwise: reuse of weights over output pixels", deep.weight_reuse / pixels, "==", 1)
    check.require("pointwise: reuse of weights over output pixels", point.weight_reuse / pixels, "==", 1)
    ratio = point.activation_reuse / (channels * 40 / (channels + 40))
    check.require("pointwise: reuse of activations over C C' / (C + C')", abs(ratio - 1), "<=", 1e-12)


def _ranking(check: Check) -> None:
    models = {name: make(name) for name in NETWORKS}
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))

    def caller(model: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return model(x)

        return call

    times = measure({name: caller(model) for name, model in models.items()}, rounds=ROUNDS, warmup=2)
    reuse = {name: total_reuse(data_reuse(model, SHAPE)) for name, model in models.items()}
    rate = {name: reuse[name].macs / (1e-3 * times[name].median) for name in models}
    wanted = list(rate.values())
    weighted = rank_correlation([reuse[name].weighted() for name in models], wanted)
    plain = rank_correlation([reuse[name].intensity for name in models], wanted)
    check.require(
        "rank correlation with the rate, of DI over that of arithmetic intensity",
        weighted - plain,
        ">=",
        GAIN,
        baseline=plain,
        unit="(baseline: that of arithmetic intensity)",
    )
    alpha, fitted = fit_alpha(reuse, rate)
    check.note(f"Rank correlation of DI {weighted:.3f}, of arithmetic intensity {plain:.3f}.")
    check.note(f"Pearson's correlation is highest, {fitted:.3f}, with a weight of {alpha:.2f}.")
    for name in models:
        r = reuse[name]
        check.note(
            f"{name}: {r.macs / 1e9:.2f} G multiply-adds, {times[name].median:.1f} ms, {rate[name] / 1e9:.0f} G/s, "
            f"M/P {r.weight_reuse:.0f}, M/A {r.activation_reuse:.0f}, DI {r.weighted():.0f}, AI {r.intensity:.0f}."
        )


def run(check: Check) -> None:
    """Measure the claim."""
    _closed_forms(check)
    _counts(check)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _ranking(check)
    finally:
        torch.set_num_threads(threads)

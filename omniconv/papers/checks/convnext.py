"""ConvNeXt-T, -S, -B and -L have the published size and cost, start as the identity, and the path from ResNet-50
to ConvNeXt-T changes the cost at every step as the paper says; trained alike, a ConvNeXt comes within a point
of a ResNet of equal cost, or above it.

The last part is at the scale of minutes: 32-pixel images and a few epochs, where the paper trains for 300. Of its
two ConvNeXts, that with the 2 x 2 stem was designed before anything was measured. That with the paper's 4 x 4 stem
came after a first comparison at unequal cost (40.0% against 35.5%), which the part about equal cost refused.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.seeds import generator
from omniconv.design.cost import count_cost
from omniconv.models.factory import create_model
from omniconv.models.image.convnext import ConvNeXtBlock
from omniconv.papers import small
from omniconv.papers.check import Check

PUBLISHED = {
    "convnext_tiny": (28.589e6, 4.5e9),
    "convnext_small": (50.224e6, 8.7e9),
    "convnext_base": (88.591e6, 15.4e9),
    "convnext_large": (197.767e6, 34.4e9),
}
PATH = (
    ("stage_ratio", 4.53),
    ("patchify", 4.42),
    ("depthwise", 2.35),
    ("width", 5.27),
    ("inverted", 4.64),
    ("depthwise_first", 4.07),
    ("kernel5", 4.10),
    ("kernel7", 4.15),
    ("kernel9", 4.21),
    ("kernel11", 4.29),
)
"""Table 10 of the paper: the steps that change the cost, and what follows in GFLOPs (multiply-adds)."""
FREE_STEPS = ("kernel7", "gelu", "few_acts", "few_norms")
START = 4.09

PARAMETER_ERROR = 0.001
MACS_ERROR = 0.01
IDENTITY_ERROR = 1e-5
LAYOUT_ERROR = 1e-5
LOOP_ERROR = 1e-5
COST_MISMATCH = 0.05
POINTS = 1.0
DESIGNS = {
    "ConvNeXt with a 2 x 2 stem": {"widths": (32, 64, 128), "patch_size": 2},
    "ConvNeXt with a 4 x 4 stem": {"widths": (64, 128, 256)},
}
SEEDS = (0, 1)
EPOCHS = 1.5


def _macs(name: str) -> float:
    return count_cost(create_model(name, device="meta"), (3, 224, 224)).macs


def _counts(check: Check) -> None:
    for name, (parameters, macs) in PUBLISHED.items():
        cost = count_cost(create_model(name, device="meta"), (3, 224, 224))
        error = abs(cost.parameters / parameters - 1)
        check.require(f"{name}: parameters off the published ones by", error, "<=", PARAMETER_ERROR)
        error = abs(cost.macs / macs - 1)
        check.require(f"{name}: multiply-adds off the published ones by", error, "<=", MACS_ERROR)


def _path(check: Check) -> None:
    before, published = _macs("modernized_resnet50"), START
    worst = abs(before / 1e9 / START - 1)
    agreeing = 0
    for step, figure in PATH:
        macs = _macs(f"modernized_resnet50_{step}")
        agreeing += (macs > before) == (figure > published)
        worst = max(worst, abs(macs / 1e9 / figure - 1))
        before, published = macs, figure
    check.require(
        "steps of the path that change the cost in the paper's direction", agreeing, "==", len(PATH)
    )
    free = {_macs(f"modernized_resnet50_{step}") for step in FREE_STEPS}
    check.require("different costs of the steps that change nothing", len(free), "==", 1)
    last = _macs("modernized_resnet50_downsampling")
    check.require("separate downsampling adds", (last - free.pop()) / 1e9, ">", 0, unit="GMACs")
    check.note(f"Largest difference from table 10 along the path: {100 * worst:.2f}%.")


def _blocks(check: Check) -> None:
    random = generator(0, "convnext")
    model = create_model("convnext_tiny").eval()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in model.modules():
        if isinstance(block, ConvNeXtBlock):
            block.register_forward_hook(lambda _, x, y: (inputs.append(x[0]), outputs.append(y), None)[-1])
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96, generator=random))
    errors = [float((y - x).norm() / x.norm()) for x, y in zip(inputs, outputs, strict=True)]
    check.require("largest relative change of a map by a new block", max(errors), "<=", IDENTITY_ERROR)

    options = {"num_classes": 10, "depths": (1, 1, 2, 1), "widths": (16, 32, 64, 128), "layer_scale": 1.0}
    first = create_model("convnext_tiny", conv_mlp=True, **options).eval()
    last = create_model("convnext_tiny", conv_mlp=False, **options).eval()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        shapes = last.state_dict()
        last.load_state_dict(
            {name: value.view_as(shapes[name]) for name, value in first.state_dict().items()}
        )
        images = torch.randn(2, 3, 64, 96, generator=random)
        expected = first(images)
        error = (last(images) - expected).abs().max() / expected.abs().max()
    check.require("channels-last and channels-first pointwise layers differ by", error, "<=", LAYOUT_ERROR)


def _loop(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution, one output pixel at a time."""
    margin = weight.shape[-1] // 2
    padded = F.pad(x, (margin,) * 4)
    y = torch.empty_like(x)
    for n, c in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                window = padded[n, c, i : i + 2 * margin + 1, j : j + 2 * margin + 1]
                y[n, c, i, j] = (window * weight[c, 0]).sum()
    return y


def _depthwise(check: Check) -> None:
    conv = create_model("convnext_test", kernel_size=7).get_submodule("stages.0.blocks.0.conv_dw")
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    x = torch.randn(2, conv.in_channels, 9, 11, generator=generator(1, "convnext"))
    with torch.no_grad():
        error = (conv(x) - conv.bias[:, None, None] - _loop(x, conv.weight)).abs().max()
    check.require("depthwise convolution and the explicit loop differ by", error, "<=", LOOP_ERROR)


def _learning(check: Check) -> None:
    networks: dict[str, Callable[[], nn.Module]] = {
        name: partial(create_model, "convnext_tiny", num_classes=10, depths=(2, 2, 2), **options)
        for name, options in DESIGNS.items()
    }
    networks["ResNet"] = partial(
        create_model, "resnet20_cifar", num_classes=10, depths=(2, 2, 2), widths=(12, 24, 48)
    )
    macs = {name: count_cost(make(), (3, 32, 32)).macs for name, make in networks.items()}
    for name in DESIGNS:
        off = abs(macs[name] / macs["ResNet"] - 1)
        check.require(f"cost of the small {name} off that of the ResNet by", off, "<=", COST_MISMATCH)
    train, test = small.cifar10()
    scores: dict[str, list[float]] = {name: [] for name in networks}
    for seed in SEEDS:
        for name, make in networks.items():
            torch.manual_seed(seed)
            model = make()
            small.train(model, train, epochs=EPOCHS, seed=seed)
            scores[name].append(small.accuracy(model, test))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    for name in DESIGNS:
        check.require(
            f"accuracy of the {name} on CIFAR-10, against a ResNet of equal cost less a point",
            means[name],
            ">=",
            means["ResNet"] - POINTS,
            baseline=means["ResNet"],
            unit="%",
        )


def run(check: Check) -> None:
    """Measure."""
    _counts(check)
    _path(check)
    _blocks(check)
    _depthwise(check)
    _learning(check)

"""A network trained with three branches a block deploys as a plain stack of 3x3 convolutions and ReLU: with the same
outputs, the published sizes and less time, and no worse than the plain stack trained as it is.

Counts are those of the paper's tables and the authors' model page.
"""

import statistics
import time

import torch
from torch import nn

from omniconv.core.seeds import derive
from omniconv.layers.conv.rep_vgg_block import RepVGGBlock
from omniconv.models.factory import create_model
from omniconv.papers.check import Check
from omniconv.papers.small import accuracy, fashion_mnist, train

DEPLOYED = {"a0": 8.30e6, "a1": 12.78e6, "a2": 25.49e6, "b0": 14.33e6, "b1": 51.82e6, "b1g4": 36.12e6}
TRAINING = {"a0": 9.11e6, "a1": 14.09e6, "a2": 28.21e6, "b0": 15.82e6, "b1": 57.42e6, "b1g4": 39.97e6}
COUNT_TOLERANCE = 0.005
ERRORS = {torch.float32: 1e-4, torch.float64: 1e-10}
LATENCY = 0.8
MARGIN = -0.3
SEEDS = (0, 1, 2)


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def disturb(model: nn.Module) -> nn.Module:
    """Give every batch norm random statistics and weights, and leave training mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
            nn.init.normal_(module.get_buffer("running_mean"), 0, 0.2)
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def milliseconds(models: dict[str, nn.Module], x: torch.Tensor, rounds: int = 15) -> dict[str, float]:
    """Return the median time of a forward pass of each model, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, model in models.items():
                started = time.perf_counter()
                model(x)
                if turn >= 2:
                    times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def make_network(seed: int, *, branches: bool) -> nn.Module:
    """Return a small RepVGG, or the same stack with convolution, batch norm and ReLU alone."""
    torch.manual_seed(derive(seed, "weights"))
    model = create_model(
        "repvgg_a0", num_classes=10, in_chans=1, depths=(2, 4, 1), widths=(32, 64, 128), stem_width=32
    )
    if not branches:
        for name, block in list(model.named_modules()):
            if isinstance(block, RepVGGBlock):
                model.set_submodule(name, nn.Sequential(block.conv_kxk, block.act))
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def run(check: Check) -> None:
    """Measure counts, equality, the deployed form, latency and the worth of the branches."""
    off = {}
    for name in DEPLOYED:
        model = create_model(f"repvgg_{name}", device="meta")
        off[f"{name} training"] = abs(count(model) / TRAINING[name] - 1)
        off[f"{name} deployed"] = abs(count(model.deploy()) / DEPLOYED[name] - 1)
    check.require(
        "largest relative distance of parameter counts, both forms, A0 to B1g4",
        max(off.values()), "<=", COUNT_TOLERANCE,
    )  # fmt: skip

    model = create_model("repvgg_a0")
    disturb(model)
    for dtype, tolerance in ERRORS.items():
        model.to(dtype)
        x = torch.randn(2, 3, 96, 96, dtype=dtype)
        with torch.no_grad():
            before, after = model(x), model.deploy()(x)
        error = float((after - before).abs().max() / before.abs().max())
        name = str(dtype).removeprefix("torch.")
        check.require(f"relative difference of A0's outputs after conversion, {name}", error, "<=", tolerance)
    model.float()

    deployed = model.deploy()
    leaves = [m for n, m in deployed.named_modules() if not list(m.children()) and not n.startswith("head")]
    plain = [isinstance(m, nn.ReLU) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)) for m in leaves]
    check.require(
        "share of 3x3 convolutions and ReLU among the modules before the pool",
        sum(plain) / len(plain),
        "==",
        1,
    )

    found = milliseconds({"trained": model, "deployed": deployed}, torch.randn(1, 3, 224, 224))
    check.require(
        "latency of the deployed A0 at 224 pixels over that of the form that trains",
        found["deployed"] / found["trained"], "<", LATENCY, baseline=1.0,
    )  # fmt: skip

    images, test = fashion_mnist(15000, 10000)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for branches in (True, False):
            model = make_network(seed, branches=branches)
            train(model, images, epochs=4, seed=seed)
            scores[branches].append(accuracy(model, test))
    three, one = (sum(scores[key]) / len(SEEDS) for key in (True, False))
    check.require(
        "accuracy of three branches minus plain 3x3 training, Fashion-MNIST, mean of 3 seeds",
        three - one, ">=", MARGIN, baseline=one, unit="points",
    )  # fmt: skip
    check.note(f"accuracies with three branches {scores[True]}, plain {scores[False]}")

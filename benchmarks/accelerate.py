"""Whole networks, training step and inference: `omniconv.accelerate` against the same network in plain PyTorch.

    python benchmarks/accelerate.py [--dtype bfloat16] [--only TEXT]

Both sides have the same weights and run in channels-last, one process, in turn, medians; ratios are medians of those
of neighbouring runs. A training step is the forward pass in training mode and the gradients of all weights; bfloat16
is autocast. timm's networks are timm's own where it is installed. RepLKNet and Conv-TasNet are written here as anybody
would write them.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import omniconv

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.parity import import_timm

RESULTS = Path(__file__).parent / "results"


class Residual(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        return x + super().forward(x)


class Large(nn.Module):
    """RepLKNet's large kernel with a small one beside it, as it trains (Ding et al., arXiv:2203.06717)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.large = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.small = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.large_norm, self.small_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two branches."""
        return self.large_norm(self.large(x)) + self.small_norm(self.small(x))


def normed(inputs: int, outputs: int, kernel: int, *, act: bool = True, **more: Any) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **more)
    return [conv, nn.BatchNorm2d(outputs), *[nn.ReLU()] * act]


def replknet_31b() -> nn.Module:
    widths, depths, kernels = (128, 256, 512, 1024), (2, 2, 18, 2), (31, 29, 27, 13)
    layers = [
        *normed(3, 128, 3, stride=2), *normed(128, 128, 3, groups=128), *normed(128, 128, 1),
        *normed(128, 128, 3, stride=2, groups=128),
    ]  # fmt: skip
    for stage, (width, depth, kernel) in enumerate(zip(widths, depths, kernels, strict=True)):
        if stage:
            layers += [*normed(widths[stage - 1], width, 1), *normed(width, width, 3, stride=2, groups=width)]
        for _ in range(depth):
            mixing = [
                *normed(width, width, 1),
                Large(width, kernel),
                nn.ReLU(),
                *normed(width, width, 1, act=False),
            ]
            forward = [
                *normed(width, 4 * width, 1, act=False),
                nn.GELU(),
                *normed(4 * width, width, 1, act=False),
            ]
            layers += [Residual(nn.BatchNorm2d(width), *mixing), Residual(nn.BatchNorm2d(width), *forward)]
    return nn.Sequential(
        *layers, nn.BatchNorm2d(1024), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000)
    )


class ConvTasNet(nn.Module):
    """Two speakers from one microphone, the published best size (Luo and Mesgarani, arXiv:1809.07454)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 512, 16, stride=8, bias=False)
        blocks = [
            Residual(
                nn.Conv1d(128, 512, 1), nn.PReLU(), nn.GroupNorm(1, 512),
                nn.Conv1d(512, 512, 3, padding=2**i, dilation=2**i, groups=512), nn.PReLU(), nn.GroupNorm(1, 512),
                nn.Conv1d(512, 128, 1),
            )
            for _ in range(3) for i in range(8)
        ]  # fmt: skip
        self.masks = nn.Sequential(
            nn.GroupNorm(1, 512),
            nn.Conv1d(512, 128, 1),
            *blocks,
            nn.PReLU(),
            nn.Conv1d(128, 1024, 1),
            nn.Sigmoid(),
        )
        self.decoder = nn.ConvTranspose1d(512, 1, 16, stride=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return both speakers (N, 2, L) of a mixture (N, 1, L)."""
        code = self.encoder(x)
        masks = self.masks(code).unflatten(1, (2, 512))
        return self.decoder((code[:, None] * masks).flatten(0, 1)).unflatten(0, (-1, 2))


def timms(name: str, ours: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = import_timm()
        return timm.create_model(name) if timm else omniconv.create_model(ours)

    return make


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "RepLKNet-31B": (replknet_31b, (4, 3, 224, 224)),
    "UniRepLKNet-T": (lambda: omniconv.create_model("unireplknet_t"), (4, 3, 224, 224)),
    "Conv-TasNet": (ConvTasNet, (2, 1, 32000)),
    "ConvNeXt-T": (timms("convnext_tiny", "convnext_tiny"), (8, 3, 224, 224)),
    "EfficientNet-B0": (timms("efficientnet_b0", "efficientnet_b0"), (8, 3, 224, 224)),
    "MobileNetV2": (timms("mobilenetv2_100", "mobilenetv2_100"), (8, 3, 224, 224)),
    "ResNet-50": (timms("resnet50", "resnet50"), (8, 3, 224, 224)),
}


def without_depthwise(model: nn.Module) -> nn.Module:
    """Return a copy without its depthwise convolutions of stride 1: how fast the network could be if they were free."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            depthwise = isinstance(child, nn.Conv1d | nn.Conv2d) and 1 < child.groups == child.in_channels
            if depthwise and max(child.stride) == 1:
                setattr(module, name, nn.Identity())
    return model


def step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)  # for dropped paths
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = model(x)
    loss = y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()
    return y.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def infer(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(x)


def difference(one: Tensor, other: Tensor) -> float:
    """Return how far two tensors are apart, relative to the other one."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def rounds(calls: dict[str, Callable[[], object]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Return seconds of interleaved rounds in turned order, `least` or more after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order, began = list(calls), time.perf_counter()
    while len(times[order[0]]) < least or time.perf_counter() - began < seconds:
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
        order.reverse()
    return times


def compare(
    calls: dict[str, Callable[[], object]], seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return median milliseconds, and how many times as fast as the first one each is: the median over the rounds."""
    times = rounds(calls, seconds)
    first = next(iter(times.values()))
    ratios = {
        name: statistics.median(a / b for a, b in zip(first, values, strict=True))
        for name, values in times.items()
    }
    return {name: round(1e3 * statistics.median(values), 4) for name, values in times.items()}, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="networks with this in their name")
    parser.add_argument("--seconds", default=12.0, type=float, help="for every comparison")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    rows = []
    for name, (make, shape) in NETWORKS.items():
        if arguments.only.lower() not in name.lower():
            continue
        torch.manual_seed(0)
        plain = make()
        x = torch.randn(shape)
        if x.ndim == 4:
            plain, x = (
                plain.to(memory_format=torch.channels_last),
                x.contiguous(memory_format=torch.channels_last),
            )
        fast = omniconv.accelerate(copy.deepcopy(plain).train())
        models = {"plain": plain.train(), "accelerated": fast.train()}
        (y, gradients), (fast_y, fast_gradients) = (step(m, x, dtype) for m in models.values())
        _, exact = step(copy.deepcopy(plain).double(), x.double(), torch.float64)
        # All together: the gradient of a bias before a batch norm is nothing but rounding.
        fast_all, plain_all, exact_all = (
            torch.cat([g.flatten() for g in gs]) for gs in (fast_gradients, gradients, exact)
        )
        error = difference(fast_all, plain_all)
        models["limit"] = without_depthwise(plain)
        training_ms, training = compare(
            {n: lambda m=m, x=x: step(m, x, dtype) for n, m in models.items()}, 1.5 * arguments.seconds
        )
        models = {"plain": plain.eval(), "accelerated": omniconv.accelerate(copy.deepcopy(plain).eval())}
        output = difference(*(infer(m, x, dtype) for m in reversed(models.values())))
        inference_ms, inference = compare(
            {n: lambda m=m, x=x: infer(m, x, dtype) for n, m in models.items()}, arguments.seconds
        )
        row = {
            "network": name, "shape": shape,
            "training": round(training["accelerated"], 3), "limit": round(training["limit"], 3),
            "inference": round(inference["accelerated"], 3),
            "training_ms": training_ms, "inference_ms": inference_ms,
            "output_difference": max(difference(fast_y, y), output),
            "gradient_difference": error, "rounding": difference(plain_all, exact_all),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:16s} training {row['training_ms']} {row['training']:.2f} x of {row['limit']:.2f}, "
            f"inference {row['inference_ms']} {row['inference']:.2f} x; "
            f"outputs {row['output_difference']:.1e}, gradients {error:.1e} "
            f"(rounding {row['rounding']:.1e})",
            flush=True,
        )
    if not arguments.only:
        result = {
            "subject": f"networks by accelerate against plain PyTorch in channels-last, {arguments.dtype}",
            "rows": rows, "threads": torch.get_num_threads(), "machine": platform.machine(),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
            "geometric_mean_training": round(math.exp(statistics.fmean(math.log(r["training"]) for r in rows)), 3),
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"accelerate_{arguments.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

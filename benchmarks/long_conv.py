"""Long convolutions by `omniconv.ops.long_conv`, against what a user would write with torch: FFTs, or `F.conv1d`.

    python benchmarks/long_conv.py [--only TEXT]

Causal kernels as long as the sequence, float32, forward alone and a training step (forward and the gradients of
sequences and kernels). One process, in turn, medians. The FFT composition is the usual one, padded to 2 L. `F.conv1d`
takes part as far as its L^2 products end within a second. Peak memory is what a step in a fresh process adds to the
process' own peak.
"""

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops.dispatch import explain
from omniconv.ops.long_conv.api import long_conv

RESULTS = Path(__file__).parent / "results"

CASES = [
    (8, 128, 1024), (1, 128, 1024), (8, 128, 4096), (2, 256, 4096), (4, 64, 16384), (2, 32, 65536), (2, 16, 262144),
    (1, 8, 2**20),
]  # fmt: skip
"""Samples, channels, length."""

DIRECT_LIMIT = 3e9
"""Multiplications up to which `F.conv1d` takes part."""


def composition(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the convolution as it is usually written."""
    n = 2 * x.shape[2]
    return torch.fft.irfft(torch.fft.rfft(x, n) * torch.fft.rfft(kernel, n), n)[..., : x.shape[2]]


def direct(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the convolution as torch's own sum of products."""
    k = kernel.shape[1]
    return F.conv1d(x, kernel.flip(1)[:, None], padding=k - 1, groups=x.shape[1])[..., : x.shape[2]]


SIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "omniconv": long_conv, "torch.fft": composition, "conv1d": direct,
}  # fmt: skip


def draw(case: tuple[int, int, int], grad: bool) -> tuple[Tensor, Tensor]:
    """Return sequences and kernels of unit norm."""
    torch.manual_seed(0)
    n, c, length = case
    x, kernel = torch.randn(n, c, length), torch.randn(c, length) / math.sqrt(length)
    return x.requires_grad_(grad), kernel.requires_grad_(grad)


def step(side: str, x: Tensor, kernel: Tensor) -> None:
    """Run forward, and backward where gradients are wanted."""
    y = SIDES[side](x, kernel)
    if y.requires_grad:
        torch.autograd.grad(y, (x, kernel), torch.ones_like(y))


def measure(calls: dict[str, Callable[[], None]], seconds: float = 1.2, most: int = 15) -> dict[str, float]:
    """Return medians of interleaved rounds, as many as fit the time but at least three."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or (
        time.perf_counter() - started < seconds and len(next(iter(times.values()))) < most
    ):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def peak(side: str, case: tuple[int, int, int]) -> float:
    """Return the megabytes that a training step adds to the peak of a fresh process that holds its inputs."""
    command = [sys.executable, __file__, "--peak", side, *map(str, case)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _print_peak(side: str, case: tuple[int, int, int]) -> None:
    step(side, *draw((1, 2, 64), True))
    x, kernel = draw(case, True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(side, x, kernel)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose shape, such as 8x128x1024, has this in it")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        n, c, length = map(int, arguments.peak[1:])
        _print_peak(arguments.peak[0], (n, c, length))
        return
    rows = []
    for case in CASES:
        name = "x".join(map(str, case))
        if arguments.only not in name:
            continue
        sides = [side for side in SIDES if side != "conv1d" or math.prod(case) * case[2] <= DIRECT_LIMIT]
        row = {"shape": case, "chosen": explain(long_conv, *draw(case, True)).chosen}
        for what, grad in (("forward", False), ("step", True)):
            x, kernel = draw(case, grad)
            times = measure({s: lambda s=s, x=x, kernel=kernel: step(s, x, kernel) for s in sides})
            row[f"{what}_ms"] = {side: round(1e3 * t, 3) for side, t in times.items()}
            row[f"{what}_speedup"] = round(
                min(t for s, t in times.items() if s != "omniconv") / times["omniconv"], 3
            )
        row["peak_mb"] = {side: round(peak(side, case), 1) for side in sides}
        row["maps_mb"] = round(4 * math.prod(case) / 2**20, 1)
        rows.append(row)
        print(
            f"{name:14s} forward {row['forward_ms']}  {row['forward_speedup']} x   step {row['step_ms']}  "
            f"{row['step_speedup']} x   peak {row['peak_mb']} MB beside maps of {row['maps_mb']}  ({row['chosen']})",
            flush=True,
        )
    if not arguments.only:
        means = {
            what: round(math.exp(statistics.fmean(math.log(row[f"{what}_speedup"]) for row in rows)), 3)
            for what in ("forward", "step")
        }
        result = {
            "subject": "causal convolutions with kernels as long as the sequence, float32",
            "geometric_mean": means, "rows": rows, "threads": torch.get_num_threads(),
            "machine": platform.machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        print(means)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "long_conv.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

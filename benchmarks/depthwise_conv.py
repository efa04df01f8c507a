"""Training steps of depthwise convolutions taken from real networks, against plain PyTorch.

    python benchmarks/depthwise_conv.py [--dtype bfloat16] [--only TEXT]

A step is the forward pass and the gradients of maps and kernels. Both sides run in channels-first and in
channels-last (2-d maps) and the better one counts; one process, in turn, medians. Beside each time stands the floor:
what the multiplications of taps that meet the map would take at the rate of a matrix product measured here, or the
maps at the bandwidth of a copy, whichever is longer; and the most memory that the step allocates through torch.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from omniconv.ops import depthwise_conv, explain

RESULTS = Path(__file__).parent / "results"

Shape = tuple[str, tuple[int, ...], tuple[int, ...], int, int]


def images(network: str, kernel: int, *sizes: tuple[int, ...], batch: int = 8) -> list[Shape]:
    """Return cases of square kernels from (channels, pixels, stride)."""
    return [(network, (batch, c, p, p), (kernel, kernel), s, 1) for c, p, s in sizes]


CASES: list[Shape] = [
    *images("MobileNetV2", 3, (32, 112, 1), (96, 112, 2), (144, 56, 1), (144, 56, 2), (192, 28, 1), (192, 28, 2)),
    *images("MobileNetV2", 3, (384, 14, 1), (576, 14, 1), (576, 14, 2), (960, 7, 1)),
    *images("EfficientNet-B0", 5, (144, 56, 2), (240, 28, 1), (480, 14, 1), (672, 14, 1), (672, 14, 2), (1152, 7, 1)),
    *images("ConvNeXt-T", 7, (96, 56, 1), (192, 28, 1), (384, 14, 1), (768, 7, 1)),
    *images("RepLKNet-31B", 31, (128, 56, 1), batch=4),
    *images("RepLKNet-31B", 29, (256, 28, 1), batch=4),
    *images("RepLKNet-31B", 27, (512, 14, 1), batch=4),
    *images("RepLKNet-31B", 13, (1024, 7, 1), batch=4),
    *images("RepLKNet-31B", 5, (128, 56, 1), batch=4),
    *images("31 x 31", 31, (192, 28, 1), (64, 56, 1), (96, 28, 1), (384, 14, 1)),
    *images("UniRepLKNet-T", 13, (160, 28, 1), (320, 14, 1), (640, 7, 1), (384, 14, 1)),
    *[("SLaK-T", (4, c, p, p), k, 1, 1) for c, p, n in ((96, 56, 51), (192, 28, 49)) for k in ((n, 5), (5, n))],
    *[("InceptionNeXt", (8, c, p, p), k, 1, 1) for c, p in ((128, 56), (64, 28)) for k in ((1, 11), (11, 1))],
    *[("DeepLab, dilated", (8, c, p, p), (3, 3), 1, d) for c, p, d in ((96, 56, 6), (256, 28, 12), (256, 28, 18))],
    ("2 x 2 to halve", (8, 96, 56, 56), (2, 2), 2, 1),
    ("4 x 4 to halve", (8, 96, 56, 56), (4, 4), 2, 1),
    *[("Conv-TasNet", (4, 512, 3199), (3,), 1, d) for d in (1, 8, 128)],
    *[("ConvNeXt-1D", (8, c, n), (k,), 1, 1) for c, n, k in ((128, 4096, 31), (256, 1024, 31), (384, 512, 7))],
    *[("Conformer", (8, c, n), (31,), 1, 1) for c, n in ((144, 400), (512, 400))],
    *[("QuartzNet", (8, c, 800), (k,), 1, 1) for c, k in ((256, 33), (256, 51), (512, 87))],
    ("ModernTCN", (8, 64, 512), (51,), 1, 1),
    ("Hyena's short filter", (8, 256, 4096), (3,), 1, 1),
    ("7 x 7 x 7", (1, 32, 32, 32, 32), (7, 7, 7), 1, 1),
    ("MedNeXt", (1, 32, 64, 64, 64), (3, 3, 3), 1, 1),
    ("MedNeXt", (1, 64, 32, 32, 32), (5, 5, 5), 1, 1),
    ("MedNeXt", (1, 64, 32, 32, 32), (3, 3, 3), 2, 1),
    ("X3D", (2, 54, 16, 56, 56), (3, 3, 3), 1, 1),
    ("X3D", (2, 108, 16, 28, 28), (5, 1, 1), 1, 1),
    ("CSN", (2, 128, 8, 28, 28), (3, 3, 3), 1, 1),
]  # fmt: skip


def machine_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Return multiplications a second of a matrix product, and bytes a second of a copy."""
    a = torch.randn(1536, 1536).to(dtype)
    product = min(_seconds(lambda: a @ a) for _ in range(5))
    big = torch.ones(2**26, dtype=torch.uint8)
    other = torch.ones_like(big)
    copied = min(_seconds(lambda: other.copy_(big)) for _ in range(5))
    return 1536**3 / product, 2 * big.numel() / copied


def met_taps(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Return how many taps of all outputs along an axis meet the map and not its padding."""
    padding = dilation * (kernel - 1) // 2
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return sum(0 <= o * stride + t * dilation - padding < size for o in range(outputs) for t in range(kernel))


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most memory that torch's allocator holds during a call beyond what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    moments = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, amount in moments:
        held += amount
        most = max(most, held)
    return most


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def steps(case: Shape, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return a training step of the case by either side in every memory format."""
    _, shape, kernel, stride, dilation = case
    torch.manual_seed(0)
    x, w = torch.randn(shape).to(dtype), torch.randn(shape[1], 1, *kernel).to(dtype)
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    formats = {"first": torch.contiguous_format} | ({"last": torch.channels_last} if x.ndim == 4 else {})
    found = {}
    for name, form in formats.items():
        leaf = x.clone(memory_format=form).requires_grad_()
        weight = w.clone().requires_grad_()
        with torch.no_grad():
            grad = torch.randn_like(depthwise_conv(leaf, weight, **how, impl="torch"))

        def step(impl: str, x: Tensor = leaf, w: Tensor = weight, g: Tensor = grad) -> object:
            return torch.autograd.grad(depthwise_conv(x, w, **how, impl=impl), (x, w), g)

        found[f"torch {name}"] = lambda step=step: step("torch")
        found[f"auto {name}"] = lambda step=step: step("auto")
        found[f"chosen {name}"] = explain(depthwise_conv, leaf, weight, **how).chosen
    return found


def measure(calls: dict[str, Callable[[], object]], seconds: float = 1.5, most: int = 25) -> dict[str, float]:
    """Return medians of interleaved rounds, as many as fit the time but at least three."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or (
        time.perf_counter() - began < seconds and len(next(iter(times.values()))) < most
    ):
        for name, call in calls.items():
            times[name].append(_seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="cases whose network has this in its name")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    rate, bandwidth = machine_rates(dtype)
    rows = []
    for case in CASES:
        network, shape, kernel, stride, dilation = case
        if arguments.only.lower() not in network.lower():
            continue
        calls = steps(case, dtype)
        chosen = {k.removeprefix("chosen "): calls.pop(k) for k in list(calls) if k.startswith("chosen")}
        times = measure(calls)
        best = {side: min((t, n.split()[1]) for n, t in times.items() if n.startswith(side))
                for side in ("torch", "auto")}  # fmt: skip
        outputs = math.prod(shape) // stride ** len(kernel)
        taps = shape[0] * shape[1] * math.prod(
            met_taps(size, k, stride, dilation) for size, k in zip(shape[2:], kernel, strict=True)
        )  # fmt: skip
        floor = max(3 * taps / rate, 3 * (math.prod(shape) + outputs) * dtype.itemsize / bandwidth)
        memory = {side: peak_bytes(calls[f"{side} {form}"]) for side, (_, form) in best.items()}
        row = {
            "network": network, "shape": shape, "kernel": kernel, "stride": stride, "dilation": dilation,
            "milliseconds": {name: round(1e3 * t, 4) for name, t in times.items()},
            "chosen": chosen[best["auto"][1]], "format": best["auto"][1],
            "speedup": round(best["torch"][0] / best["auto"][0], 3),
            "floor_ms": round(1e3 * floor, 4), "memory": round(memory["auto"] / memory["torch"], 3),
        }  # fmt: skip
        rows.append(row)
        size = "x".join(map(str, shape))
        print(
            f"{network:22s} {size:18s} {'x'.join(map(str, kernel)):7s} s{stride} d{dilation:<4d}"
            f"torch {1e3 * best['torch'][0]:9.2f} ms  auto {1e3 * best['auto'][0]:8.2f}  floor {1e3 * floor:7.2f}  "
            f"{row['speedup']:7.2f} x  ({row['chosen']}, channels-{row['format']}), memory {row['memory']:.2f}",
            flush=True,
        )
    mean = math.exp(statistics.fmean(math.log(row["speedup"]) for row in rows))
    least, memory = min(row["speedup"] for row in rows), max(row["memory"] for row in rows)
    print(
        f"{len(rows)} cases, geometric mean {mean:.2f} x, least {least:.2f} x, memory at most {memory:.2f} x"
    )
    if not arguments.only:
        result = {
            "subject": f"training step of depthwise convolutions, {arguments.dtype}",
            "geometric_mean": round(mean, 3), "rows": rows, "threads": torch.get_num_threads(),
            "machine": platform.machine(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"depthwise_conv_{arguments.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

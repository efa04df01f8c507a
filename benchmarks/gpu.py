"""On a CUDA device: kernels of `omniconv.ops` against what a user would run instead there.

    python benchmarks/gpu.py [--only depthwise | long_conv | deform | gather_host]

Depthwise convolutions in bfloat16 against torch's own, which is cuDNN's where that has one; long convolutions against
`torch.fft`; DCNv4's aggregation against plain torch and against a composition by `grid_sample`; features of a table in
host memory against a gather on the host and a copy from pinned memory. Forward pass and training step (forward pass and
all gradients), both sides in one process, in turn, medians by the device's clock (of gathered rows by the host's); maps
of two axes in both memory formats, of which the better one counts for each side. Before they are timed, outputs and
gradients are compared with those of the plain side in a wider type. Beside the steps of depthwise convolutions stands
the floor, as in `depthwise_conv.py`: multiplications at the rate of a bfloat16 matrix product, or maps at the bandwidth
of a copy, whichever takes longer. A kernel that fails is a row with its error.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omniconv.ops import deform_aggregate, depthwise_conv, explain, gather_host
from omniconv.ops.dispatch import table_of
from omniconv.ops.long_conv.api import long_conv

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.accelerate import compare, difference
from benchmarks.depthwise_conv import met_taps

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda"
# How many times as fast as the plain side: steps with 31x31 and 13x13 taps, elsewhere forward passes.
WANTED = {"depthwise": 5, "long_conv": 3, "deform": 3, "gather_host": 1.65}
SECONDS, LIMIT = 0.4, 150  # of measuring one comparison, and after which a row is given up
WRONG = 0.05  # relative difference from which on a result is no matter of rounding
# Bytes written before each call: nothing is left in caches, and the host gets ahead of the device.
FLUSH = 2**31
SIDE = 8192  # of the matrices whose product tells how fast the device multiplies
DIRECT_LIMIT = 1e11  # multiplications up to which the direct sum takes part in long convolutions

DEPTHWISE = [
    ("RepLKNet-31B", (32, 128, 56, 56), (31, 31)),
    *[("31 x 31 on UniRepLKNet-S", (64, c, p, p), (31, 31)) for c, p in ((192, 28), (384, 14))],
    *[("UniRepLKNet-T", (64, c, p, p), (13, 13)) for c, p in ((160, 28), (320, 14), (640, 7))],
    ("UniRepLKNet-S", (64, 192, 28, 28), (13, 13)),
    ("RepLKNet-31B", (32, 1024, 7, 7), (13, 13)),
    *[("ConvNeXt-T", (64, c, p, p), (7, 7)) for c, p in ((96, 56), (384, 14))],
    *[("UniRepLKNet-T", (64, c, p, p), (3, 3)) for c, p in ((80, 56), (320, 14))],
    ("ConvNeXt-1D", (64, 128, 4096), (31,)),
    ("Conformer", (64, 512, 400), (31,)),
]
LONG = [
    (shape, direction, row.name)
    for shape in ((8, 512, 2**12), (8, 256, 2**14), (4, 128, 2**16), (2, 64, 2**18), (1, 32, 2**20))
    for direction in ("causal", "bidirectional")
    for row in table_of(long_conv).implementations
    if row.name != "depthwise" or math.prod(shape) * shape[2] <= DIRECT_LIMIT
]
# InternImage-T: maps of 224 pixels' four stages, 16 channels a group.
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
DEFORM = [((32, c, p, p), dtype) for c, p in STAGES for dtype in ("float32", "bfloat16")]
# Features of ogbn-products, ogbn-papers100M and Reddit, and rows of 4 KB; of a table of 1 GB.
GATHER, GATHERED, TABLE = [100, 128, 602, 1024], 2**17, 2**28


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return median milliseconds on the device, of interleaved rounds in turned order after two to warm up."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=DEVICE)
    for call in [*calls.values()] * 2:
        call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, began = list(calls), time.perf_counter()
    while len(times[order[0]]) < 5 or time.perf_counter() - began < SECONDS:
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
        for name in order:
            flush.zero_()
            events[name][0].record()
            calls[name]()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end))
        order.reverse()
    return {name: round(statistics.median(values), 5) for name, values in times.items()}


def peak_mb(call: Callable[[], object]) -> float:
    """Return the most megabytes that torch's allocator holds on the device during a call beyond what it held before."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - held) / 2**20, 2)


@cache
def rates() -> dict[str, float]:
    """Return multiplications a second of a bfloat16 matrix product, and bytes a second of a copy."""
    a = torch.randn(SIDE, SIDE, device=DEVICE).bfloat16()
    big = torch.ones(FLUSH // 2, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(big)
    times = measure({"product": lambda: a @ a, "copy": lambda: other.copy_(big)})
    return {"products": 1e3 * SIDE**3 / times["product"], "bytes": 2e3 * FLUSH / 2 / times["copy"]}


def step(function: Callable[..., Tensor], leaves: list[Tensor], above: Tensor) -> list[Tensor]:
    """Return output and gradients."""
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, above)]


def compare_sides(sides: dict[str, Callable[..., Tensor]], tensors: list[Tensor]) -> dict[str, Any]:
    """Return what is common to rows: the first of the sides in a wider type is right, the last one is ours."""
    *plain, ours = sides
    wide = torch.float64 if tensors[0].dtype == torch.float32 else torch.float32
    leaves = [t.to(wide).requires_grad_() for t in tensors]
    above = torch.randn_like(sides[plain[0]](*tensors))
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    right = step(sides[plain[0]], leaves, above.to(wide))
    torch.backends.cudnn.benchmark = True  # cuDNN's best algorithm
    differences: dict[str, float] = {}
    passes, steps = {}, {}
    last = {"last": torch.channels_last} if tensors[0].ndim == 4 else {}
    formats = {"first": torch.contiguous_format} | last
    for name, form in formats.items():
        leaves = [t.clone(memory_format=form).requires_grad_() for t in tensors]
        placed = above.clone(memory_format=form)
        for side, function in sides.items():
            passes[f"{side} {name}"] = partial(torch.no_grad()(function), *leaves)
            steps[f"{side} {name}"] = once = partial(step, function, leaves, placed)
            try:
                apart = [difference(one, other) for one, other in zip(once(), right, strict=True)]
            except Exception as error:
                raise RuntimeError(f"{side}, channels-{name}: {error}") from error
            if not all(part < WRONG for part in apart):
                raise ArithmeticError(f"{side}, channels-{name}: output and gradients differ by {apart}")
            differences[side] = float(f"{max(*apart, differences.get(side, 0.0)):.3g}")
    del right
    row: dict[str, Any] = {"ours": ours, "difference": differences}
    for what, calls in (("forward", passes), ("step", steps)):
        row[f"{what}_ms"] = measure(calls)
        best = {s: min((t, n) for n, t in row[f"{what}_ms"].items() if n.split()[0] == s) for s in sides}
        row[what] = {side: round(best[side][0] / best[ours][0], 3) for side in plain}
        row[f"{what}_best_ms"] = best[ours][0]
    peak = row["peak_mb"] = {name: peak_mb(call) for name, call in steps.items()}
    row["memory"] = {side: round(peak[best[ours][1]] / peak[best[side][1]], 3) for side in plain}
    return row


def depthwise(network: str, shape: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, Any]:
    torch.manual_seed(0)
    x, w = torch.randn(shape, device=DEVICE), torch.randn(shape[1], 1, *kernel, device=DEVICE)
    padding = [k // 2 for k in kernel]
    sides = {i: partial(depthwise_conv, padding=padding, impl=i) for i in ("torch", "triton")}
    row = compare_sides(sides, [x.bfloat16(), w.bfloat16()])
    met = math.prod(met_taps(size, k, 1, 1) for size, k in zip(shape[2:], kernel, strict=True))
    taps, machine = math.prod(shape[:2]) * met, rates()
    floor = 1e3 * max(3 * taps / machine["products"], 6 * 2 * math.prod(shape) / machine["bytes"])
    return row | {"floor_ms": round(floor, 5), "times_floor": round(row["step_best_ms"] / floor, 3)}


def by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the convolution as it is usually written; lag zero is in the middle of kernels of 2 L taps."""
    length = x.shape[2]
    circle = kernel.roll(-length, 1) if kernel.shape[1] == 2 * length else kernel
    product = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(circle, 2 * length)
    return torch.fft.irfft(product, 2 * length)[..., :length]


def long(shape: tuple[int, int, int], direction: str, impl: str) -> dict[str, Any]:
    torch.manual_seed(0)
    taps = shape[2] * (2 if direction == "bidirectional" else 1)
    x, kernel = torch.randn(shape, device=DEVICE), torch.randn(shape[1], taps, device=DEVICE)
    ours = partial(long_conv, bidirectional=direction == "bidirectional", impl=impl)
    row = compare_sides({"torch.fft": by_fft, impl: ours}, [x, kernel])
    call = x.requires_grad_(), kernel.requires_grad_()
    return row | {"auto": explain(long_conv, *call, bidirectional=direction == "bidirectional").chosen}


def by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Return DCNv3's aggregation as it is usually written, without its softmax; in float32, as under autocast."""
    n, c, h, w = x.shape
    groups = n * mask.shape[1] // 9
    taps = torch.cartesian_prod(*[torch.arange(-1, 2, device=x.device)] * 2)[:, :, None, None]
    axes = (torch.arange(size, device=x.device) for size in (h, w))
    pixels = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    position = pixels + taps + offset.float().reshape(groups, 9, 2, h, w)
    grid = (2 * position + 1) / torch.tensor([h, w], device=x.device)[:, None, None] - 1
    grid = grid.flip(2).permute(0, 1, 3, 4, 2).reshape(groups, 9 * h, w, 2)
    samples = F.grid_sample(x.float().reshape(groups, -1, h, w), grid, align_corners=False)
    samples = samples.unflatten(2, (9, h)) * mask.float().reshape(groups, 1, 9, h, w)
    return samples.sum(2).view(n, c, h, w).to(x.dtype)


def deform(shape: tuple[int, int, int, int], dtype: str) -> dict[str, Any]:
    torch.manual_seed(0)
    n, c, h, w = shape
    depths = c, 2 * 9 * c // 16, 9 * c // 16
    tensors = [torch.randn(n, d, h, w, device=DEVICE).to(getattr(torch, dtype)) for d in depths]
    plain, ours = (partial(deform_aggregate, padding=1, impl=impl) for impl in ("torch", "triton"))
    return compare_sides({"torch": plain, "grid_sample": by_grid_sample, "triton": ours}, tensors)


def gather(width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    table = torch.rand(TABLE // width, width).pin_memory()
    indices = torch.randint(len(table), (16, GATHERED))
    batch = torch.empty(GATHERED, width).pin_memory()
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "pinned": lambda i: torch.index_select(table, 0, i, out=batch).to(DEVICE, non_blocking=True),
        "pageable": lambda i: table[i].to(DEVICE),
        "gather_host": lambda i: gather_host(table, i, device=DEVICE),
    }
    if not torch.equal(sides["gather_host"](indices[0]), sides["pageable"](indices[0])):
        raise ArithmeticError("gather_host gathers other rows")

    # Other rows every time, or they would be in the host's caches.
    def once(side: Callable[[Tensor], Tensor], turn: Iterator[Tensor]) -> None:
        side(next(turn))
        torch.cuda.synchronize()

    calls = {name: partial(once, side, itertools.cycle(indices)) for name, side in sides.items()}
    ms, _ = compare(calls, SECONDS)
    return {
        "case": f"{GATHERED} rows of {width} numbers", "ours": "gather_host", "forward_ms": ms,
        "difference": {"gather_host": 0.0},
        "forward": {name: round(ms[name] / ms["gather_host"], 3) for name in ("pinned", "pageable")},
        "forward_best_ms": ms["gather_host"],
        "note": "gather_host has no kernel of its own yet: the host gathers on both sides",
    }  # fmt: skip


SUBJECTS: dict[str, tuple[Callable[..., dict], list[tuple]]] = {
    "depthwise": (depthwise, DEPTHWISE), "long_conv": (long, LONG), "deform": (deform, DEFORM),
    "gather_host": (gather, [(width,) for width in GATHER]),
}  # fmt: skip


def attempt(function: Callable[..., dict], *arguments: Any) -> dict[str, Any]:
    """Return what a function returns, or what went wrong."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


class Worker:
    """A process for rows, and a new one after a row that failed: kernels can spoil their process, or never end."""

    pool: Any = None

    def __call__(self, function: Callable[..., dict], *arguments: Any) -> dict[str, Any]:
        """Return what `attempt` returns within the time."""
        self.pool = self.pool or multiprocessing.get_context("spawn").Pool(1)
        try:
            found = self.pool.apply_async(attempt, (function, *arguments)).get(LIMIT)
        except multiprocessing.TimeoutError:
            found = {"error": f"crashed, or did not end within {LIMIT} s"}
        if "error" in found:
            self.pool.terminate()
            self.pool = None
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SUBJECTS), help="one subject; nothing is written then")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; none is here", file=sys.stderr)
        sys.exit(2)
    worker = Worker()
    machine = worker(rates)
    if "error" in machine:
        raise RuntimeError(machine["error"])
    result: dict[str, Any] = {
        "subject": "kernels on a CUDA device against what a user would run instead",
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton"),
        "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "rates": machine, "wanted": WANTED,
    }  # fmt: skip
    print(result, flush=True)
    for subject, (function, cases) in SUBJECTS.items():
        if arguments.only not in (None, subject):
            continue
        rows = result[subject] = []
        for case in cases:
            names = [" x ".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in case]
            rows.append({"case": ", ".join(names)} | worker(function, *case))
            print(subject, json.dumps(rows[-1]), flush=True)
    if not arguments.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

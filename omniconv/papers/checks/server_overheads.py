"""Most of a large image's time is spent outside the network, preprocessing sets the ceiling of throughput, batches
raise it, and a broker in memory carries more than one on disk.

One small network on a CPU and JPEG files of three sizes, in one process. Everything that is compared is measured in
turn, round after round, and medians are taken.
"""

import asyncio
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from omniconv.core.seeds import generator
from omniconv.deploy.serve.brokers import Broker, Cascade, DiskBroker, MemoryBroker
from omniconv.deploy.serve.pipeline import Clock, ServingPipeline, load_test
from omniconv.models.factory import create_model
from omniconv.papers.check import Check

SUM_ERROR = 0.1
LARGE_SHARE = 0.5
CEILING_ERROR = 0.15
BATCHING = 1.3
CONCURRENCY = 16

SIZES = {"small": (60, 70), "medium": (375, 500), "large": (2400, 3000)}
REQUESTS = {"small": 60, "medium": 60, "large": 6}
NETWORK_SIZE = 64
ROUNDS = 5
OBJECTS = 5
FRAMES = 400


def jpeg(height: int, width: int) -> bytes:
    """Return a drawn scene with fine and coarse structure as a JPEG file."""
    low = torch.rand(1, 3, 9, 12, generator=generator(0, "scene"))
    smooth = nn.functional.interpolate(low, size=(height, width), mode="bicubic")[0]
    noise = 0.05 * torch.randn(3, height, width, generator=generator(0, "noise"))
    pixels = ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def network() -> nn.Module:
    """Return the small network."""
    torch.manual_seed(0)
    return create_model(
        "resnet18", num_classes=10, depths=(1, 1, 1, 1), widths=(16, 32, 64, 128)
    ).eval()  # fmt: skip


class Nothing(nn.Module):
    """A network that answers at once."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return x.new_zeros(len(x), 10)


def pipeline(model: nn.Module, **options: Any) -> ServingPipeline:
    """Return a pipeline with one decoding thread."""
    return ServingPipeline(model, NETWORK_SIZE, **{"max_wait_ms": 0.0, **options})


def sum_error(file: bytes) -> float:
    """Return by how much the stages miss the latency that is measured around the call, mean of 50 requests."""

    async def measure() -> float:
        errors = []
        async with pipeline(network()) as served:
            for _ in range(55):
                started = time.perf_counter()
                _, clock = await served.predict(file)
                seconds = time.perf_counter() - started
                errors.append(abs(sum(clock.stages.values()) - seconds) / seconds)
        return statistics.mean(errors[5:])

    return asyncio.run(measure())


def alternate(ways: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Return the median of what each way gives over interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found[name].append(way())
    return {name: statistics.median(values) for name, values in found.items()}


def preparing_rate(file: bytes, count: int = 100) -> float:
    """Return how many images a second one thread decodes, resizes and normalises, with nothing around it."""
    served = pipeline(Nothing())
    started = time.perf_counter()
    for _ in range(count):
        served.prepare(file, Clock())
    return count / (time.perf_counter() - started)


def throughput(file: bytes, model: nn.Module, requests: int, **options: Any) -> float:
    """Return requests a second at full concurrency."""
    served = pipeline(model, **options)
    return load_test(
        served, [file], concurrency=CONCURRENCY, requests=requests, warmup=CONCURRENCY
    ).throughput


def second(objects: list[np.ndarray]) -> list[float]:
    """Return an answer for each object at once, so that the broker is what is measured."""
    return [float(array[0, 0, 0]) for array in objects]


def carried(make: Callable[[Path], Broker | None]) -> float:
    """Return how many images a second, five objects each, come through a broker."""
    objects = [np.full((3, 32, 32), float(k), np.float32) for k in range(OBJECTS)]
    with tempfile.TemporaryDirectory() as folder, Cascade(second, make(Path(folder) / "log")) as cascade:
        started = time.perf_counter()
        futures = [cascade.submit(objects) for _ in range(FRAMES)]
        answers = [future.result() for future in futures]
        seconds = time.perf_counter() - started
    if answers != [[float(k) for k in range(OBJECTS)]] * FRAMES:
        raise AssertionError("a broker mixed up its answers")
    return FRAMES / seconds


def run(check: Check) -> None:
    """Measure the clock, the shares, the ceiling, batching and the brokers."""
    files = {name: jpeg(*size) for name, size in SIZES.items()}
    check.require(
        "difference of the stages' sum from the latency of a request",
        sum_error(files["medium"]),
        "<=",
        SUM_ERROR,
    )

    reports = {
        name: load_test(pipeline(network()), [file], requests=REQUESTS[name], warmup=3)
        for name, file in files.items()
    }
    shares = {name: report.outside_inference for name, report in reports.items()}
    check.require("share outside inference, medium less small", shares["medium"] - shares["small"], ">", 0)
    check.require("share outside inference, large less medium", shares["large"] - shares["medium"], ">", 0)
    check.require("share outside inference of a large image", shares["large"], ">", LARGE_SHARE)

    medium, small, model = files["medium"], files["small"], network()
    rates = alternate(
        {
            "preparing": lambda: preparing_rate(medium),
            "serving": lambda: throughput(medium, Nothing(), 100),
        }
    )
    check.require(
        "difference of the throughput without inference from the rate of preprocessing",
        abs(rates["serving"] / rates["preparing"] - 1), "<=", CEILING_ERROR, baseline=rates["preparing"],
    )  # fmt: skip

    batching = alternate(
        {
            "one": lambda: throughput(small, model, 160, max_batch=1),
            "many": lambda: throughput(small, model, 160, max_batch=16),
        }
    )
    check.require(
        "throughput with dynamic batches over single images, 16 requests at a time",
        batching["many"] / batching["one"], ">=", BATCHING, baseline=batching["one"],
    )  # fmt: skip

    brokers = alternate(
        {
            "memory": lambda: carried(lambda path: MemoryBroker()),
            "disk": lambda: carried(DiskBroker),
            "fused": lambda: carried(lambda path: None),
        }
    )
    check.require(
        "images through a broker in memory over those through one on disk",
        brokers["memory"] / brokers["disk"], ">", 1.0, baseline=brokers["disk"],
    )  # fmt: skip
    loss = reports["large"]
    check.note(
        f"share outside inference {[round(s, 2) for s in shares.values()]} of the small, medium and large image; "
        f"bottlenecks {[report.bottleneck for report in reports.values()]}; preprocessing costs "
        f"{1 - loss.ceiling() * loss.busy_ms['infer'] / 1e3:.0%} of the throughput that inference alone would allow "
        f"with a large image; images a second through no broker {brokers['fused']:.0f}, "
        f"memory {brokers['memory']:.0f}, disk {brokers['disk']:.0f}"
    )

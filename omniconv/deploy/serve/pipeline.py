"""Serving with one clock: where the time of a request goes, and which stage keeps more requests from being answered.

Paper: AbouElhamayed et al., Beyond Inference: Performance Analysis of DNN Server Overheads for Computer Vision,
https://arxiv.org/abs/2403.12981. There a Triton server with DALI is measured; here images are decoded by worker
threads, collected by this library's own `Batcher` and computed by one thread. The clock hands every moment between a
request and its answer to exactly one stage, so the stages add up to the latency.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.core.errors import DataError
from omniconv.data.decode import read_image
from omniconv.deploy.serve.batcher import Batcher

__all__ = ["Clock", "PipelineReport", "ServingPipeline", "load_test"]

STAGES = (
    "worker wait", "decode", "resize", "normalise", "queue", "batch", "copy", "infer", "postprocess", "respond",
)  # fmt: skip


class Clock:
    """The time of one request: each mark gives what has passed since the last one to a stage.

    Attributes:
        stages: seconds by stage.
    """

    def __init__(self) -> None:
        self.stages: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.stages[stage] += now - self._last
        self._last = now


@dataclass(frozen=True)
class PipelineReport:
    """What a load found.

    Attributes:
        requests: answered.
        throughput: requests a second.
        latency_ms: mean from request to answer.
        p99_ms: 99 of 100 requests were faster.
        stages: mean milliseconds of a request in each stage; they add up to the latency.
        busy_ms: milliseconds of its threads that each stage takes for one request; less than the stage where a batch
            shares it, and nothing where a request only waits.
        workers: threads that decode.
        on_workers: stages that these threads run; one thread runs all others.
    """

    requests: int
    throughput: float
    latency_ms: float
    p99_ms: float
    stages: Mapping[str, float]
    busy_ms: Mapping[str, float]
    workers: int
    on_workers: tuple[str, ...]

    @property
    def outside_inference(self) -> float:
        """Share of the latency that is not inference."""
        return 1 - self.stages["infer"] / sum(self.stages.values())

    def ceiling(self, without: str = "") -> float:
        """Return how many requests a second the busiest threads allow, if one stage took no time."""
        busy = {stage: ms for stage, ms in self.busy_ms.items() if stage != without}
        workers = sum(ms for stage, ms in busy.items() if stage in self.on_workers) / self.workers
        compute = sum(ms for stage, ms in busy.items() if stage not in self.on_workers)
        return 1e3 / max(workers, compute, 1e-9)

    def loss(self, stage: str) -> float:
        """Return the share of the possible throughput that one stage costs."""
        return 1 - self.ceiling() / self.ceiling(without=stage)

    @property
    def bottleneck(self) -> str:
        """The stage that costs most throughput."""
        return max(self.busy_ms, key=lambda stage: (self.loss(stage), self.busy_ms[stage]))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as a plain dict."""
        return {**asdict(self), "outside_inference": self.outside_inference, "bottleneck": self.bottleneck}

    def table(self) -> str:
        """Return the stages, their share of latency and what they cost in throughput, as text."""
        lines = [f"{'stage':12s} {'ms':>9s} {'of latency':>11s} {'throughput lost':>16s}"]
        for stage, ms in self.stages.items():
            lost = f"{self.loss(stage):.0%}" if stage in self.busy_ms else "-"
            lines.append(f"{stage:12s} {ms:9.2f} {ms / self.latency_ms:11.0%} {lost:>16s}")
        return "\n".join(
            [
                *lines,
                f"{self.throughput:.1f} requests/s, latency {self.latency_ms:.2f} ms; bottleneck: {self.bottleneck}",
            ]
        )


def _best(output: Tensor) -> list[tuple[int, float]]:
    """Return the best class and its probability of each image."""
    values, indices = output.softmax(1).max(1)
    return list(zip(indices.tolist(), values.tolist(), strict=True))


class ServingPipeline:
    """From the bytes of an image file to an answer, every stage timed; an async context manager.

    Args:
        model: the network, for inputs (N, C, size, size).
        size: side of its inputs in pixels.
        mean, std: of each channel, as the network was trained with, for pixels from 0 to 255.
        postprocess: from a batch of outputs to the answers.
        workers: threads that decode.
        preprocess: where images are resized and normalised: on the "workers", or on the network's "device", to which
            they are then copied in full size.
        max_batch: images that are computed together.
        max_wait_ms: how long the first image of a batch waits for others.
        queue: images that may wait.
        device: of the network.

    Raises:
        ValueError: if `preprocess` is neither, or there is no worker.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        *,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        postprocess: Callable[[Tensor], Sequence[Any]] = _best,
        workers: int = 1,
        preprocess: Literal["workers", "device"] = "workers",
        max_batch: int = 16,
        max_wait_ms: float = 2.0,
        queue: int = 1024,
        device: torch.device | str = "cpu",
    ) -> None:
        if preprocess not in ("workers", "device"):
            raise ValueError(f"preprocess must be workers or device: got {preprocess!r}")
        if workers < 1:
            raise ValueError(f"workers must be positive: got {workers}")
        self.device = torch.device(device)
        self.model, self.size, self.postprocess = model.eval().to(self.device), size, postprocess
        self.workers, self.preprocess = workers, preprocess
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self._batching = max_batch, max_wait_ms, queue
        self._busy: defaultdict[str, float] = defaultdict(float)  # seconds of the computing thread

    @property
    def on_workers(self) -> tuple[str, ...]:
        """Stages that the decoding threads run."""
        return ("decode", "resize", "normalise") if self.preprocess == "workers" else ("decode",)

    async def __aenter__(self) -> Self:
        max_batch, max_wait_ms, queue = self._batching
        self._decoding = ThreadPoolExecutor(self.workers, "omniconv-decode")
        self._computing = ThreadPoolExecutor(1, "omniconv-compute")
        self._batcher = Batcher(
            self._compute, self._computing, max_batch=max_batch, max_wait_ms=max_wait_ms, queue=queue
        )
        self._batcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._batcher.close()
        self._decoding.shutdown()
        self._computing.shutdown()

    async def predict(self, content: bytes) -> tuple[Any, Clock]:
        """Return the answer for one image file, and its times.

        Raises:
            DataError: if it is no readable image.
            QueueFull: if too many wait.
        """
        clock = Clock()
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self._decoding, self.prepare, content, clock)
        (answer,) = await self._batcher.submit([(image, clock)])
        clock.mark("respond")
        return answer, clock

    def prepare(self, content: bytes, clock: Clock) -> Tensor:
        """Return what goes into the queue: the network's input, or the image in full size."""
        clock.mark("worker wait")
        pixels = read_image(content, channels=len(self._mean), name="the request's image")
        if pixels.dtype != np.uint8:
            raise DataError(
                f"the request's image has {pixels.dtype} pixels where uint8 is served; convert it"
            )
        clock.mark("decode")
        if self.preprocess == "device":
            return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        small = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        clock.mark("resize")
        x = torch.from_numpy(np.array(small).reshape(self.size, self.size, -1)).permute(2, 0, 1).float()
        x = (x - self._mean) / self._std
        clock.mark("normalise")
        return x

    @torch.inference_mode()
    def _compute(self, items: list[tuple[Tensor, Clock]]) -> Sequence[Any]:
        own = Clock()
        clocks = [clock for _, clock in items]
        for clock in clocks:
            clock.mark("queue")

        def mark(stage: str) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # launches return before their work is done
            for clock in (own, *clocks):
                clock.mark(stage)

        if self.preprocess == "device":
            images = [image.to(self.device) for image, _ in items]
            mark("copy")
            size = (self.size, self.size)
            images = [
                F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
                for image in images
            ]
            mark("resize")
            x = torch.stack(images)
            mark("batch")
            x = (x - self._mean.to(self.device)) / self._std.to(self.device)
            mark("normalise")
        else:
            x = torch.stack([image for image, _ in items])
            mark("batch")
            x = x.to(self.device)
            mark("copy")
        output = self.model(x)
        mark("infer")
        answers = self.postprocess(output)
        mark("postprocess")
        for stage, seconds in own.stages.items():
            self._busy[stage] += seconds
        return answers

    async def load(self, files: Sequence[bytes], *, concurrency: int, requests: int) -> PipelineReport:
        """Send image files round and round, so many at a time, each as soon as one is answered.

        Args:
            files: contents of image files.
            concurrency: requests under way at any time.
            requests: in all.
        """
        clocks: list[Clock] = []
        left = iter(range(requests))
        self._busy.clear()

        async def client() -> None:
            for index in left:
                _, clock = await self.predict(files[index % len(files)])
                clocks.append(clock)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        seconds = time.perf_counter() - started
        totals = {stage: sum(clock.stages[stage] for clock in clocks) for stage in STAGES}
        busy = {**self._busy, **{stage: totals[stage] for stage in self.on_workers}}
        latencies = [1e3 * sum(clock.stages.values()) for clock in clocks]
        return PipelineReport(
            requests=requests,
            throughput=requests / seconds,
            latency_ms=sum(latencies) / requests,
            p99_ms=float(np.percentile(latencies, 99)),
            stages={stage: 1e3 * seconds / requests for stage, seconds in totals.items() if seconds},
            busy_ms={stage: 1e3 * busy[stage] / requests for stage in STAGES if stage in busy},
            workers=self.workers,
            on_workers=self.on_workers,
        )


def load_test(
    pipeline: ServingPipeline,
    files: Sequence[bytes],
    *,
    concurrency: int = 1,
    requests: int = 100,
    warmup: int = 10,
) -> PipelineReport:
    """Run a closed loop of requests against a pipeline and return its report.

    Args:
        pipeline: started and closed here.
        files: contents of image files, sent in turn.
        concurrency: requests under way at any time.
        requests: that count.
        warmup: requests before them.

    Raises:
        ValueError: if a number is not positive, or there is no file.
    """
    if min(concurrency, requests, len(files)) < 1:
        raise ValueError(
            f"concurrency, requests and files must be positive: got {concurrency}, {requests}, {len(files)}"
        )

    async def run() -> PipelineReport:
        async with pipeline:
            if warmup:
                await pipeline.load(files, concurrency=concurrency, requests=warmup)
            return await pipeline.load(files, concurrency=concurrency, requests=requests)

    return asyncio.run(run())

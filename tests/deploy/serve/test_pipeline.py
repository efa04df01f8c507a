import asyncio
import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from omniconv.core.errors import DataError
from omniconv.deploy.serve import pipeline as pipeline_module
from omniconv.deploy.serve.pipeline import Clock, PipelineReport, ServingPipeline, load_test


def jpeg(height, width, mode="RGB", seed=0):
    low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(low).resize((width, height)).convert(mode).save(file, "JPEG")
    return file.getvalue()


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    return ServingPipeline(model, 32, **options)


def test_every_moment_belongs_to_a_stage():
    async def measure():
        async with make() as pipeline:
            started = time.perf_counter()
            _, clock = await pipeline.predict(jpeg(60, 70))
            return time.perf_counter() - started, clock

    seconds, clock = asyncio.run(measure())
    assert 0 < sum(clock.stages.values()) <= seconds
    assert list(clock.stages) == [
        "worker wait", "decode", "resize", "normalise", "queue", "batch", "copy", "infer", "postprocess", "respond",
    ]  # fmt: skip


def test_both_places_of_preprocessing_give_the_same_answers():
    async def ask(place):
        async with make(preprocess=place) as pipeline:
            files = [jpeg(45, 61), jpeg(90, 33, seed=1), jpeg(50, 40, "L"), jpeg(1, 9)]
            return [answer for answer, _ in await asyncio.gather(*(pipeline.predict(file) for file in files))]

    for (a, p), (b, q) in zip(asyncio.run(ask("workers")), asyncio.run(ask("device")), strict=True):
        assert a == b
        assert p == pytest.approx(q, abs=0.02)


@pytest.mark.parametrize("place", ["workers", "device"])
def test_load_reports_all_requests(place):
    report = load_test(make(preprocess=place), [jpeg(60, 70)], concurrency=4, requests=12, warmup=2)
    assert report.requests == 12
    assert sum(report.stages.values()) == pytest.approx(report.latency_ms)
    assert ("resize" in report.on_workers) == (place == "workers")
    assert set(report.busy_ms) == set(report.stages) - {"worker wait", "queue", "respond"}
    assert report.bottleneck in report.busy_ms
    assert report.bottleneck in report.table()
    assert 0 < report.outside_inference < 1


def test_ceilings_and_losses_by_hand():
    report = PipelineReport(
        requests=1, throughput=1, latency_ms=10, p99_ms=10, stages={"decode": 6, "infer": 4},
        busy_ms={"decode": 6, "resize": 2, "infer": 3, "postprocess": 0.5}, workers=2, on_workers=("decode", "resize"),
    )  # fmt: skip
    assert report.ceiling() == 1e3 / 4  # two workers need 8 ms together, the other thread 3.5
    assert report.ceiling(without="decode") == 1e3 / 3.5
    assert report.loss("decode") == pytest.approx(1 - 3.5 / 4)
    assert report.loss("infer") == 0
    assert report.bottleneck == "decode"
    assert report.outside_inference == 0.6


def test_clock_gives_every_moment_to_one_stage(monkeypatch):
    moments = iter([1.0, 3.0, 3.5, 10.0])
    monkeypatch.setattr(pipeline_module.time, "perf_counter", lambda: next(moments))
    clock = Clock()
    for stage in ("a", "b", "a"):
        clock.mark(stage)
    assert clock.stages == {"a": 2.0 + 6.5, "b": 0.5}


def test_bad_requests_are_told_and_others_answered():
    async def ask():
        async with make() as pipeline:
            return await asyncio.gather(
                pipeline.predict(b"no image"), pipeline.predict(jpeg(20, 20)), return_exceptions=True
            )

    bad, good = asyncio.run(ask())
    assert isinstance(bad, DataError)
    assert isinstance(good, tuple)
    with pytest.raises(ValueError, match="preprocess must be workers or device"):
        make(preprocess="gpu")
    with pytest.raises(ValueError, match="workers must be positive: got 0"):
        make(workers=0)
    with pytest.raises(ValueError, match="must be positive: got 1, 0, 1"):
        load_test(make(), [b""], requests=0)

"""Latency of several ways to run one network, measured so that they can be compared.

All candidates run in one process in turn, round after round, so that a slow moment of the machine hits all of
them; medians of many rounds after a warm-up are what is reported.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.deploy.runtimes import open_exported

__all__ = ["Latency", "eager_candidate", "exported_candidate", "measure"]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call.

    Attributes:
        median: half of the calls were faster.
        p90: nine of ten calls were faster.
        best: the fastest call.
        rounds: timed calls.
        threads: CPU threads that PyTorch, and by default every runtime, uses.
    """

    median: float
    p90: float
    best: float
    rounds: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as a plain dict."""
        return asdict(self)


def measure(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3
) -> dict[str, Latency]:
    """Time calls without arguments in turn and return what each takes.

    Args:
        candidates: name -> function that does one call and waits for its result.
        rounds: timed calls of each candidate.
        warmup: calls of each candidate before that.

    Raises:
        UsageError: if there is no candidate or no round.
    """
    if not candidates or rounds < 1:
        raise UsageError(f"nothing to measure: got {len(candidates)} candidates and {rounds} rounds")
    for _ in range(warmup):
        for call in candidates.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) * 1e3)
    threads = torch.get_num_threads()
    return {
        name: Latency(
            median=float(np.median(values)),
            p90=float(np.percentile(values, 90)),
            best=min(values),
            rounds=rounds,
            threads=threads,
        )
        for name, values in times.items()
    }


def eager_candidate(model: nn.Module, images: torch.Tensor, *, rounds: int = 5) -> Callable[[], object]:
    """Return a call of eager PyTorch in the faster of its two memory formats, in eval mode without gradients.

    Args:
        model: the network, on the device of `images`; it is left in eval mode.
        images: one batch (N, C, H, W).
        rounds: timed calls for the choice of the memory format.
    """
    import copy

    def call(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                y = module(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                return y

        return run

    plain = call(model.eval(), images.contiguous())
    if images.ndim != 4:
        return plain
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
    other = call(last, images.contiguous(memory_format=torch.channels_last))
    times = measure({"plain": plain, "last": other}, rounds=rounds, warmup=2)
    return plain if times["plain"].median <= times["last"].median else other


def exported_candidate(
    path: str | os.PathLike[str], images: np.ndarray, *, threads: int | None = None
) -> Callable[[], object]:
    """Return a call of an exported file (torch.export, ONNX in float or int8, OpenVINO) on one batch of raw images.

    Raises:
        DataError: if the file is missing or damaged.
        ResourceError: if the package that runs it is not installed.
    """
    runner = open_exported(path, threads=threads)
    images = np.ascontiguousarray(images)
    return lambda: runner(images)

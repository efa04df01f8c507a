"""`tune`: time the implementations of every operator that a network calls, and remember the fastest."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.ops import dispatch
from omniconv.ops.choices import remember_choices
from omniconv.ops.dispatch import PLAIN, Table

__all__ = ["Timing", "Tuning", "tune"]

# Another implementation than plain torch must be faster by more than the noise of measuring.
_MARGIN = 1.03


@dataclass(frozen=True)
class Timing:
    """How long the implementations of an operator took for one call of a network.

    Attributes:
        op: name of the operator.
        call: described.
        milliseconds: of every implementation that can take the call; with gradients where they are wanted.
        chosen: the one that runs from now on.
    """

    op: str
    call: str
    milliseconds: Mapping[str, float]
    chosen: str


@dataclass(frozen=True)
class Tuning:
    """What `tune` measured; reads as a table when printed.

    Attributes:
        timings: one a different call.
    """

    timings: tuple[Timing, ...]

    def __str__(self) -> str:
        lines = []
        for timing in self.timings:
            times = ", ".join(f"{name} {ms:.3g}" for name, ms in timing.milliseconds.items())
            lines.append(f"{timing.op}: {timing.chosen} (ms: {times}) for {timing.call}")
        return "\n".join(lines) or "no operator of omniconv was called"


def tune(model: nn.Module, *inputs: Any, seconds: float = 0.5) -> Tuning:
    """Measure which implementations are the fastest for a network on this machine, and store the choices.

    The network runs once, in its own mode, to see which operators it calls and how; in training mode gradients are
    timed too. What is stored holds for calls of the same types, shapes and number of threads, in this program and in
    later ones; `omniconv.ops.choices.forget_choices` forgets it.

    Args:
        model: calls operators of omniconv, for example after `omniconv.accelerate`.
        *inputs: what it is called with; sizes matter, values do not.
        seconds: of measuring for every different call.
    """
    with dispatch.recording() as calls, torch.set_grad_enabled(model.training):
        model(*inputs)
    timings = []
    for (op, call), (table, example, grad) in calls.items():
        milliseconds = _measure(table, example, grad, seconds)
        best = min(milliseconds, key=lambda name: milliseconds[name] * (_MARGIN if name != PLAIN else 1.0))
        timings.append(Timing(op, call, milliseconds, best))
    for op in {timing.op for timing in timings}:
        remember_choices(op, {t.call: t.chosen for t in timings if t.op == op})
    return Tuning(tuple(timings))


def _measure(table: Table, call: tuple[Any, ...], grad: bool, seconds: float) -> dict[str, float]:
    """Return median milliseconds of interleaved rounds."""

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return fresh.normal_().requires_grad_(grad and value.requires_grad)

    def runner(run: Callable[..., Any], call: tuple[Any, ...]) -> Callable[[], None]:
        leaves = [v for v in call if isinstance(v, Tensor) and v.requires_grad]

        def once() -> None:
            y = run(*call)
            if leaves:
                torch.autograd.grad(y, leaves, torch.ones_like(y))
            if y.is_cuda:
                torch.cuda.synchronize(y.device)

        return once

    with torch.set_grad_enabled(grad):
        call = tuple(drawn(value) for value in call)
        rows = [row for row in table.implementations if row.supports(*call) is None]
        runs = {row.name: runner(row.run, call) for row in rows}
        for once in runs.values():
            once()  # compiles what is compiled
        times: dict[str, list[float]] = {name: [] for name in runs}
        began = time.perf_counter()
        while len(times[PLAIN]) < 3 or time.perf_counter() - began < seconds:
            for name, once in runs.items():
                start = time.perf_counter()
                once()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}

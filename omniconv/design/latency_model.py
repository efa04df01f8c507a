"""A latency predictor for this machine: seconds of a layer from its operations, its bytes and the call itself.

Fitted by non-negative least squares, kind by kind, to layers that are timed once; predicts any network that can be
counted, without running it. It is kept beside what `omniconv.tune` measured.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omniconv.core.files import atomic_write
from omniconv.design.cost import LayerCost, layer_costs
from omniconv.ops.choices import choices_file

__all__ = ["LatencyModel", "fit_latency_model", "load_latency_model", "save_latency_model"]

# For operators of which no probe was timed, by whether they multiply.
_OTHERS = {True: "any product", False: "any other"}


def _group(row: LayerCost) -> str:
    """Return what shares coefficients: products by their kind, other operators by themselves, in place or not."""
    return row.kind if row.macs else row.op.rstrip("_")


@dataclass(frozen=True)
class LatencyModel:
    r"""Predicts seconds from counted costs.

    .. math:: t = a_k M + b_k B + c_k

    for M multiply-adds and B bytes of an operator of kind k; those of a network are added.

    Attributes:
        coefficients: seconds a multiply-add, a byte and a call, for kinds of products ("conv", "depthwise", as in
            `LayerCost`), for other operators by torch's name, and for those that were not timed.
        machine: where they were measured, with how many threads.
    """

    coefficients: dict[str, tuple[float, float, float]]
    machine: str

    def seconds(self, row: LayerCost, batch: int = 1) -> float:
        """Return the predicted seconds of one operator."""
        group = _group(row)
        known = group if group in self.coefficients else _OTHERS[row.macs > 0]
        per_mac, per_byte, per_call = self.coefficients[known]
        moved = row.parameter_bytes + batch * (row.input_bytes + row.output_bytes)
        return per_mac * batch * row.macs + per_byte * moved + per_call

    def layers(self, model: nn.Module, input_shape: tuple[int, ...], batch: int = 1) -> dict[str, float]:
        """Return predicted seconds by the name of the module that calls the operators."""
        found: dict[str, float] = {}
        for row in layer_costs(model, input_shape):
            found[row.name] = found.get(row.name, 0.0) + self.seconds(row, batch)
        return found

    def predict(self, model: nn.Module, input_shape: tuple[int, ...], batch: int = 1) -> float:
        """Return the predicted seconds of one forward pass in eval mode.

        Args:
            model: any module; it is left untouched and does not run.
            input_shape: of one sample, for example (3, 224, 224).
            batch: samples.
        """
        return sum(self.layers(model, input_shape, batch).values())

    @staticmethod
    def fit(rows: Sequence[LayerCost], seconds: Sequence[float], machine: str) -> "LatencyModel":
        """Fit to timed operators, so that the squares of relative errors are least.

        Raises:
            ValueError: if there is none.
        """
        from scipy.optimize import nnls

        if not rows or len(rows) != len(seconds):
            raise ValueError(f"every operator needs a time: got {len(rows)} and {len(seconds)}")
        members: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            for group in (_group(row), _OTHERS[row.macs > 0]):
                members.setdefault(group, []).append(index)
        coefficients = {}
        for group, chosen in members.items():
            times = np.array([seconds[i] for i in chosen])
            terms = np.array([(rows[i].macs, rows[i].bytes, 1.0) for i in chosen]) / times[:, None]
            scale = np.maximum(terms.max(0), 1e-30)
            found, _ = nnls(terms / scale, np.ones(len(chosen)))
            a, b, c = (found / scale).tolist()
            coefficients[group] = (a, b, c)
        for group in _OTHERS.values():
            coefficients.setdefault(group, next(iter(coefficients.values())))
        return LatencyModel(coefficients, machine)


def _machine() -> str:
    return f"{platform.machine()} {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


class _Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.function(x)


_POINTWISE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu, torch.sigmoid, nn.functional.gelu, nn.functional.silu, nn.functional.hardtanh, nn.functional.hardswish,
    lambda x: x + x, lambda x: x * x,
)  # fmt: skip


def _probes() -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Yield layers of every kind, small and large, with the shape of a sample."""
    for size, channels in ((112, 16), (56, 64), (28, 128), (14, 256), (7, 512)):
        shape = (channels, size, size)
        for outputs, kernel, stride in ((channels, 3, 1), (2 * channels, 3, 2), (channels // 2, 5, 1)):
            yield nn.Conv2d(channels, outputs, kernel, stride, kernel // 2), shape
        for outputs, stride in ((4 * channels, 1), (channels // 4, 1), (2 * channels, 2)):
            yield nn.Conv2d(channels, outputs, 1, stride), shape
        for kernel, stride in ((3, 1), (3, 2), (7, 1)):
            yield nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels), shape
        for groups in (4, channels // 8):
            yield nn.Conv2d(channels, channels, 3, padding=1, groups=groups), shape
        yield nn.BatchNorm2d(channels), shape
        yield nn.MaxPool2d(3, 2, 1), shape
        yield nn.AdaptiveAvgPool2d(1), shape
        for function in _POINTWISE:
            yield _Call(function), shape
        yield _Call(lambda x: torch.cat([x, x], 1)), shape
        yield _Call(lambda x: x.transpose(1, 3).contiguous()), shape
        tokens = (size * size // 4, channels)
        yield nn.Linear(channels, 4 * channels), tokens
        yield nn.LayerNorm(channels), tokens
        yield _Call(lambda x: x @ x.transpose(1, 2)), (min(tokens[0], 784), channels)
        yield _Call(lambda x: x.softmax(-1)), (min(tokens[0], 784), channels)
    for inputs, outputs in ((512, 1000), (2048, 1000), (4096, 4096)):
        yield nn.Linear(inputs, outputs), (inputs,)


def _time(call: Callable[[], object], budget: float) -> float:
    """Return the median seconds of calls within a budget, at least three."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fit_latency_model(*, budget: float = 0.02) -> LatencyModel:
    """Time about a hundred layers on this machine, with torch's present number of threads, and fit the predictor.

    Args:
        budget: seconds for each layer.
    """
    rows, seconds = [], []
    for layer, shape in _probes():
        layer.eval()
        (row,) = layer_costs(layer, shape)
        x = torch.randn(1, *shape)
        with torch.inference_mode():
            rows.append(row)
            seconds.append(_time(lambda layer=layer, x=x: layer(x), budget))
    return LatencyModel.fit(rows, seconds, _machine())


def _file() -> Any:
    return choices_file().with_name("latency.json")


def _stored() -> dict[str, Any]:
    try:
        stored = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def save_latency_model(model: LatencyModel) -> None:
    """Keep a predictor beside what `omniconv.tune` measured, one for each machine and number of threads.

    Raises:
        OSError: if the file cannot be written.
    """
    _file().parent.mkdir(parents=True, exist_ok=True)
    stored = _stored() | {model.machine: asdict(model)}
    atomic_write(_file(), json.dumps(stored, indent=1) + "\n")


def load_latency_model() -> LatencyModel | None:
    """Return the predictor kept for this machine and torch's present number of threads, or None."""
    found = _stored().get(_machine())
    if not isinstance(found, dict):
        return None
    coefficients = {kind: (a, b, c) for kind, (a, b, c) in found["coefficients"].items()}
    return LatencyModel(coefficients, found["machine"])

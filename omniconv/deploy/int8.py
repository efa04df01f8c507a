"""Static int8 of an ONNX file: 8-bit weights a channel and 8-bit activations, kept only if faster and as good.

The file is quantized with ONNX Runtime's quantizer (pairs of QuantizeLinear and DequantizeLinear around every
operator that has an integer kernel). The ranges of the activations come from real samples, in several ways that
are all tried: the extremes, percentiles, and the range of least squared error.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omniconv.core.errors import RefusedError, UsageError
from omniconv.core.files import atomic_path
from omniconv.deploy.latency import measure
from omniconv.deploy.runtimes import Runner, open_exported, quiet, require

__all__ = ["Int8Report", "Int8Trial", "quantize_int8"]

Predict = Callable[[np.ndarray], np.ndarray]

# Operators with integer kernels on CPUs, and those that only move values and so need no float in between.
_HEAVY = ("Conv", "Gemm", "MatMul")
_QUANTIZED = (
    *_HEAVY, "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Concat", "Pad", "Slice", "Split", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose",
)  # fmt: skip
_BINS = 2048
_METHODS = ("minmax", "percentile", "error")
_PERCENTILE = 99.99
_LEVELS = 255


@dataclass(frozen=True)
class Int8Trial:
    """One way of quantizing that was tried.

    Attributes:
        method: how the ranges were chosen: "minmax", "percentile" or "error" (least squared error).
        float_nodes: operators that stayed in float.
        score: what it reached.
    """

    method: str
    float_nodes: list[str]
    score: float


@dataclass(frozen=True)
class Int8Report:
    """What static int8 costs and brings.

    Attributes:
        path: the quantized file.
        bytes_before: size of the float file.
        bytes_after: size of the quantized file.
        method: how the ranges of the kept file were chosen.
        float_nodes: operators of the kept file that stayed in float.
        measure: what the scores are.
        score_before: of the float file.
        score_after: of the quantized file.
        drop: how much lower that is.
        latency_before: median milliseconds of the float file.
        latency_after: median milliseconds of the quantized file.
        speedup: their ratio.
        batch: images in a timed call.
        threads: CPU threads in a timed call.
        tried: everything that was tried.
    """

    path: str
    bytes_before: int
    bytes_after: int
    method: str
    float_nodes: list[str]
    measure: str
    score_before: float
    score_after: float
    drop: float
    latency_before: float
    latency_after: float
    speedup: float
    batch: int
    threads: int
    tried: list[Int8Trial] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and numbers."""
        return asdict(self)


def quantize_int8(
    onnx_path: str | os.PathLike[str],
    calibration: Sequence[np.ndarray],
    out: str | os.PathLike[str],
    *,
    evaluate: Callable[[Predict], float] | None = None,
    max_drop: float = 0.01,
    min_speedup: float = 1.0,
    batch: int = 1,
    rounds: int = 20,
) -> Int8Report:
    """Quantize an exported ONNX file to int8 and keep the result if it is as fast and nearly as good.

    Args:
        onnx_path: the float file, as `deploy.export.export_model` writes it.
        calibration: real training images as inputs of the file, each (C, H, W) with raw pixel values; 100 to 500.
        out: the quantized file.
        evaluate: function from `predict` (raw images (N, C, H, W) to outputs (N, K)) to a score of which more is
            better, such as the accuracy on validation data. By default the share of calibration images on which
            the largest output is that of the float file.
        max_drop: largest allowed drop of the score.
        min_speedup: how many times as fast as the float file the result must be.
        batch: images in a timed call.
        rounds: timed calls.

    Raises:
        ResourceError: if onnx or onnxruntime is not installed.
        UsageError: if there is no calibration image, no operator that could be quantized, or a single output and
            no `evaluate`.
        RefusedError: if int8 drops the score by more than `max_drop`, or is not `min_speedup` times as fast as the
            float file; the message has the numbers. Nothing is written then.
    """
    source, target = Path(onnx_path), Path(out)
    for package in ("onnx", "onnxruntime"):
        require(package, "int8 quantization", "export")
    if len(calibration) == 0:
        raise UsageError("int8 needs real images for calibration; got none")
    before = open_exported(source)
    name = "score" if evaluate else "agreement"
    score = evaluate or _agreement(before, calibration)
    score_before = float(score(before))

    with tempfile.TemporaryDirectory(prefix="omniconv-int8-") as temporary, quiet():
        folder = Path(temporary)
        model = _prepared(source)
        nodes = _quantizable(model)
        heavy = [node.name for node in model.graph.node if node.op_type in _HEAVY and node.name in nodes]
        if not heavy:
            raise UsageError(f"{source.name} has no convolution or matrix product to quantize")
        ranges = _calibrate(model, nodes, calibration, folder / "observed.onnx")
        tried: list[Int8Trial] = []
        best: tuple[Path, Int8Trial] | None = None
        # First and last layer stay in float only where the accuracy asks for it: they cost the most there.
        for kept in ([], [heavy[0], heavy[-1]]):
            for method in _METHODS:
                path = folder / f"{method}-{len(kept)}.onnx"
                _quantize(model, [node for node in nodes if node not in kept], ranges[method], path)
                trial = Int8Trial(method, kept, float(score(open_exported(path))))
                tried.append(trial)
                if best is None or trial.score > best[1].score:
                    best = path, trial
            assert best is not None
            if score_before - best[1].score <= max_drop:
                break
        path, trial = best
        drop = score_before - trial.score
        if not drop <= max_drop:
            raise RefusedError(
                f"int8 lowers the {name} of {source.name} by {drop:.4f} ({score_before:.4f} to {trial.score:.4f}; "
                f"{max_drop:.4f} allowed); nothing written"
            )
        images = np.stack([calibration[0]] * batch)
        after = open_exported(path)
        times = measure({"float": lambda: before(images), "int8": lambda: after(images)}, rounds=rounds)
        slow, fast = times["float"].median, times["int8"].median
        if slow / fast < min_speedup:
            raise RefusedError(
                f"int8 runs {source.name} {slow / fast:.2f} times as fast as float here ({fast:.3g} ms, float "
                f"{slow:.3g} ms, batch {batch}, {before.threads} threads; {min_speedup:g} times asked); nothing written"
            )
        with atomic_path(target) as written:
            written.write_bytes(path.read_bytes())
    return Int8Report(
        target.name,
        source.stat().st_size,
        target.stat().st_size,
        trial.method,
        trial.float_nodes,
        name,
        score_before,
        trial.score,
        drop,
        slow,
        fast,
        slow / fast,
        batch,
        before.threads,
        tried,
    )


def _agreement(before: Runner, calibration: Sequence[np.ndarray]) -> Callable[[Predict], float]:
    if before(calibration[0][None]).shape[1] == 1:
        raise UsageError("int8 of a network with one output needs a score: pass evaluate")
    expected = [int(before(image[None]).argmax()) for image in calibration]

    def score(predict: Predict) -> float:
        same = [
            int(predict(image[None]).argmax()) == want
            for image, want in zip(calibration, expected, strict=True)
        ]
        return sum(same) / len(same)

    return score


def _prepared(source: Path) -> Any:
    """Return the model with shapes inferred, constants folded and every node named."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(source), data_prop=True)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def _quantizable(model: Any) -> list[str]:
    """Return the names of the nodes to quantize: the network itself, not its preprocessing nor its output.

    The preprocessing is what comes before the first convolution or matrix product with weights; the output is
    what comes after the last one.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inside: set[str] = set()  # tensors that depend on a heavy node
    heads: set[str] = set()
    names = []
    for node in model.graph.node:
        heavy = node.op_type in _HEAVY and len(node.input) > 1 and node.input[1] in weights
        if heavy or inside.intersection(node.input):
            inside.update(node.output)
            if node.op_type in _QUANTIZED:
                names.append(node.name)
    for node in reversed(model.graph.node):
        if node.op_type in _HEAVY and node.name in names:
            break
        heads.add(node.name)
    return [name for name in names if name not in heads]


def _calibrate(
    model: Any, nodes: list[str], calibration: Sequence[np.ndarray], path: Path
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return, for every method, the range of every tensor that the nodes read or write.

    Two passes over the images, one image at a time: the extremes, then a histogram between them. So the memory
    does not grow with the number of images.
    """
    import onnx

    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    constant = {tensor.name for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    chosen = set(nodes)
    tensors = {
        name
        for node in model.graph.node
        if node.name in chosen
        for name in (*node.input, *node.output)
        if name and name not in constant
    }
    floats = {
        value.name for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }  # fmt: skip
    order = sorted(tensors & floats)
    for name in order:
        if name not in outputs:
            observed.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    onnx.save(observed, path)
    runner = open_exported(path)
    names = [output.name for output in observed.graph.output]

    def passes() -> Iterator[tuple[str, np.ndarray]]:
        for image in calibration:
            for name, value in zip(names, runner.run(np.ascontiguousarray(image[None])), strict=True):
                if name in tensors:
                    yield name, value

    low, high = dict.fromkeys(order, 0.0), dict.fromkeys(order, 0.0)
    for name, value in passes():
        low[name] = min(low[name], float(value.min()))
        high[name] = max(high[name], float(value.max()))
    counts = {name: np.zeros(_BINS, np.int64) for name in order}
    for name, value in passes():
        if high[name] > low[name]:
            # Zeros are left out: they come out exact whatever the range, and after a ReLU they are the most.
            counts[name] += np.histogram(value[value != 0], _BINS, (low[name], high[name]))[0]
    ranges: dict[str, dict[str, tuple[float, float]]] = {method: {} for method in _METHODS}
    for name in order:
        limits = low[name], high[name]
        ranges["minmax"][name] = limits
        ranges["percentile"][name] = _percentile_range(counts[name], *limits)
        ranges["error"][name] = _least_error_range(counts[name], *limits)
    return ranges


def _percentile_range(counts: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return the range that leaves out the same small share of values at either end; 0 stays in it."""
    if not counts.any():
        return low, high
    edges = np.linspace(low, high, _BINS + 1)
    share = np.cumsum(counts) / counts.sum()
    tail = (100 - _PERCENTILE) / 100
    first, last = int(np.searchsorted(share, tail)), int(np.searchsorted(share, 1 - tail))
    return min(0.0, float(edges[first])), max(0.0, float(edges[min(last, _BINS - 1) + 1]))


def _least_error_range(counts: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return the range, shrunk from both ends alike, whose 8-bit rounding and clipping errs least in square."""
    if not counts.any():
        return low, high
    edges = np.linspace(low, high, _BINS + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    best, found = np.inf, (low, high)
    for keep in np.linspace(1.0, 0.3, 71):
        a, b = low * keep, high * keep
        step = (b - a) / _LEVELS
        clipped = np.clip(centers, a, b)
        outside = (centers - clipped) ** 2
        error = float((counts * (outside + np.where(outside > 0, 0.0, step**2 / 12))).sum())
        if error < best:
            best, found = error, (float(a), float(b))
    return found


def _quantize(model: Any, nodes: list[str], ranges: dict[str, tuple[float, float]], path: Path) -> None:
    """Write the model with the nodes quantized: unsigned activations, signed weights with a scale a channel."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data: dict[str, Any] = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        copy,
        True,  # a scale per channel
        False,  # all eight bits
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, data),
        nodes,
        [],
        list(_QUANTIZED),
        {"ForceQuantizeNoInputCheck": False},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(os.fspath(path), False)

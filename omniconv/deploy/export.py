"""Export with preprocessing inside the graph, verified on real samples before a single file appears.

The exported network takes raw pixel values `image` (N, C, H, W) of any batch size, height and width, and gives
what the user wants to know: probabilities, or values. Whatever runs it needs no preprocessing of its own.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from omniconv.core.errors import RefusedError, UsageError
from omniconv.core.version import __version__
from omniconv.deploy.runtimes import FORMATS, Runner, open_exported, quiet, require
from omniconv.layers.conv.reparam import reparameterize

__all__ = ["Deployable", "ExportReport", "ExportedFile", "export_model"]

Output = Literal["probabilities", "multilabel", "values"]

OPSET = 20  # antialiased resize needs 18; every ONNX Runtime since 1.17 and OpenVINO since 2024 take 20
_TITLES = {"torch": "torch.export", "onnx": "ONNX", "openvino": "OpenVINO"}
_SINGLES = 16  # samples compared one by one
_BATCHES = (2, 5)
_MAX_PIXELS = 8_000_000  # in one batch of the comparison


@dataclass(frozen=True)
class ExportedFile:
    """One exported file.

    Attributes:
        path: its name in the export folder.
        format: "torch", "onnx" or "openvino".
        bytes: its size on disk, weights beside it included.
        max_difference: largest difference from eager PyTorch over all verified samples.
        verified: whether that is within the tolerance; always, since other files are not written.
    """

    path: str
    format: str
    bytes: int
    max_difference: float
    verified: bool = True


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how it was verified.

    Attributes:
        files: the exported files.
        tolerance: largest difference that was allowed.
        batches: batches on which every file was compared with PyTorch, as shapes (N, C, H, W).
    """

    files: list[ExportedFile]
    tolerance: float
    batches: list[list[int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and numbers."""
        return asdict(self)


class Deployable(nn.Module):
    """Preprocessing, network and output function as one module, from raw pixels to what a user asks for.

    Args:
        preprocess: module from raw pixels (N, C, H, W) to the network's input.
        model: the network; its outputs (N, K) are logits, or values.
        output: "probabilities" (softmax over classes), "multilabel" (a sigmoid each) or "values".
        units: of values: mean and standard deviation of each, where the network was trained on standardised
            ones; the outputs are then in the units of the data. By default they are as the network gives them.

    Raises:
        UsageError: if `output` is none of these.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        preprocess: nn.Module,
        model: nn.Module,
        output: Output,
        units: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if output not in ("probabilities", "multilabel", "values"):
            raise UsageError(f"output must be probabilities, multilabel or values: got {output!r}")
        self.preprocess: nn.Module = preprocess
        self.model: nn.Module = model
        self.output: Output = output
        mean, std = units or ([0.0], [1.0])
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    @property
    def output_name(self) -> str:
        """Name of the graph's output."""
        return "values" if self.output == "values" else "probabilities"

    def forward(self, image: Tensor) -> Tensor:
        """Return probabilities or values (N, K) of raw images (N, C, H, W)."""
        y = self.model(self.preprocess(image))
        if self.output == "probabilities":
            return y.softmax(1)
        return y.sigmoid() if self.output == "multilabel" else y * self.std + self.mean


class _Probe(nn.Module):
    """Returns every submodule's output in the order in which they finish, to find where an export goes wrong."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.names: list[str] = []

    def forward(self, image: Tensor) -> list[Tensor]:
        names: list[str] = []
        found: list[Tensor] = []

        def keep(name: str):
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.is_floating_point():
                    names.append(name)
                    # A copy, since an in-place activation may overwrite it; an output may be returned once.
                    found.append(output.clone())

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in self.inner.named_modules() if name]
        try:
            last = self.inner(image)
        finally:
            for handle in handles:
                handle.remove()
        self.names = [name.removeprefix("model.") for name in names] + [""]
        return [*found, last.clone()]


def export_model(
    model: nn.Module,
    preprocess: nn.Module,
    samples: Sequence[Tensor],
    folder: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("torch", "onnx"),
    output: Output = "probabilities",
    units: tuple[Sequence[float], Sequence[float]] | None = None,
    names: Sequence[str] = (),
    tolerance: float = 1e-4,
    metadata: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export a trained network with its preprocessing, verified against eager PyTorch on real samples.

    The network is re-parameterized, wrapped as `Deployable` and traced once for any batch size, height and
    width. Every file is read back by the runtime that will run it and compared on the samples as they are, cut
    and enlarged, in batches of 1, 2 and 5. Files appear in the folder only when all of them agree.

    Args:
        model: the network; it is left untouched.
        preprocess: module from raw pixels to the network's input, such as `data.preprocess.Preprocess`. If it
            has `to_dict`, its settings are written into the files.
        samples: raw images (C, H, W) from the data, uint8 or float32; their dtype becomes that of the input.
        folder: where model.pt2, model.onnx and model.xml go.
        formats: of "torch", "onnx", "openvino".
        output: what the network's outputs become, see `Deployable`.
        units: mean and standard deviation of the values, see `Deployable`.
        names: of the classes, or of the values.
        tolerance: largest allowed difference; for "values" it is relative to the largest magnitude above 1.
        metadata: further entries for the files' metadata.

    Raises:
        UsageError: if a format is unknown or there is no sample.
        ResourceError: if a format needs a package that is not installed.
        RefusedError: if a file differs from PyTorch, naming the first module whose output does, or if the
            network cannot be expressed in a format. Nothing is written then.
    """
    for kind in formats:
        if kind not in FORMATS:
            raise UsageError(f"no export format {kind!r}; there are {', '.join(FORMATS)}")
    if not samples:
        raise UsageError("export needs at least one real sample to verify on")
    _require_packages(formats)

    eager = _on_cpu(Deployable(preprocess, model, output, units))
    with torch.no_grad():
        deployed = Deployable(eager.preprocess, reparameterize(eager.model), output, units).eval()
    batches = list(_batches(samples))
    expected = [_expected(eager, batch) for batch in batches]

    info = {
        "producer": f"omniconv {__version__}",
        "output": output,
        "classes": list(names),
        **(metadata or {}),
    }
    describe = getattr(preprocess, "to_dict", None)
    if callable(describe):
        info["preprocess"] = describe()

    target = Path(folder)
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target) as temporary, quiet():
            report = _write_verified(
                eager, deployed, batches, expected, formats, Path(temporary), info, tolerance
            )
            for path in sorted(Path(temporary).glob("model.*")):
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(path, target / path.name)
    except BaseException:
        # Neither an error nor Ctrl-C leaves an empty folder behind.
        if not existed and not any(target.iterdir()):
            target.rmdir()
        raise
    return report


def _write_verified(
    eager: Deployable,
    deployed: Deployable,
    batches: list[Tensor],
    expected: list[np.ndarray],
    formats: Sequence[str],
    folder: Path,
    info: dict[str, Any],
    tolerance: float,
) -> ExportReport:
    """Write all formats to `folder` and compare each with `expected`."""
    program = _trace(deployed, batches[0])
    files = []
    for kind in formats:
        path = _write(program, kind, folder, info, deployed.output_name)
        runner = open_exported(path)
        relative = deployed.output == "values"
        differences = [
            _difference(want, runner(batch.numpy()), relative)
            for batch, want in zip(batches, expected, strict=True)
        ]
        worst = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
        if not differences[worst] <= tolerance:
            where = _first_difference(eager, deployed, batches[worst], kind, folder, tolerance)
            after = f" after {where}" if where else ""
            raise RefusedError(
                f"{_TITLES[kind]} differs from PyTorch ({_short(differences[worst])} > {_short(tolerance)})"
                f"{after}; nothing written"
            )
        parts = [path, path.with_suffix(".bin")] if kind == "openvino" else [path]
        size = sum(part.stat().st_size for part in parts)
        files.append(ExportedFile(path.name, kind, size, float(max(differences))))
    if "onnx" not in formats:
        (folder / FORMATS["onnx"]).unlink(missing_ok=True)
    return ExportReport(files, tolerance, [list(batch.shape) for batch in batches])


# Writing


def _trace(module: nn.Module, like: Tensor) -> ExportedProgram:
    """Trace a module for images of any batch size, height and width."""
    # Sizes that are all different and above 1: PyTorch would otherwise take them for equal, or for constant.
    height, width = (min(side, 256) for side in like.shape[2:])
    example = torch.zeros(3, like.shape[1], height + 4, width + 4 + (height == width), dtype=like.dtype)
    dims = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
    try:
        program = torch.export.export(module, (example,), dynamic_shapes={"image": dims}, strict=False)
    except Exception as error:  # the tracer lets every exception of the traced code through
        raise RefusedError(
            f"the network cannot be traced for any image size ({_line(error)}); nothing written"
        ) from error
    for graph_module in program.graph_module.modules():
        for node in getattr(getattr(graph_module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # would carry this machine's paths to whoever gets the file
    return program


def _write(
    program: ExportedProgram, kind: str, folder: Path, info: dict[str, Any], output_name: str | None
) -> Path:
    """Write one format and return the path of the file to open."""
    path = folder / FORMATS[kind]
    if kind == "torch":
        extra: dict[str, Any] = {"omniconv.json": json.dumps(info)}
        torch.export.save(program, path, extra_files=extra)
        return path
    onnx_path = folder / FORMATS["onnx"]
    if not onnx_path.exists():
        _write_onnx(program, onnx_path, info, output_name)
    if kind == "openvino":
        _write_openvino(onnx_path, path, info)
    return path


def _write_onnx(program: ExportedProgram, path: Path, info: dict[str, Any], output_name: str | None) -> None:
    onnx = require("onnx", "export to ONNX", "export")
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=[output_name] if output_name else None,
            verbose=False,
        )
    except Exception as error:  # the exporter's errors share no base
        raise RefusedError(f"ONNX cannot express the network ({_line(error)}); nothing written") from error
    assert exported is not None
    proto = exported.model_proto
    _tidy(proto)
    onnx.helper.set_model_props(
        proto, {k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()}
    )
    proto.producer_name, proto.producer_version = "omniconv", __version__
    onnx.save(proto, path)


def _tidy(proto: Any) -> None:
    """Call the dimensions N, H and W, and keep of the exporter's notes only which module a node came from."""
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    letters = {shape[axis].dim_param: letter for axis, letter in ((0, "N"), (2, "H"), (3, "W"))}
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for value in values:
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in letters:
                dim.dim_param = letters[dim.dim_param]
    for node in proto.graph.node:
        scopes = [p for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
        kept = [(p.key, p.value) for p in scopes]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)


def _write_openvino(onnx_path: Path, path: Path, info: dict[str, Any]) -> None:
    openvino: Any = require("openvino", "export to OpenVINO", "openvino")
    model = openvino.Core().read_model(os.fspath(onnx_path))
    operators = require("openvino.opset11", "export to OpenVINO", "openvino")
    for node in model.get_ops():
        # OpenVINO reads an antialiased ONNX resize and then ignores the antialiasing; its own Pillow mode is the
        # same computation as PyTorch's.
        if node.get_type_name() == "Interpolate" and node.get_attributes().get("antialias"):
            axes = np.array([2, 3])
            size = operators.gather(node.input_value(1), axes, np.array(0))
            fixed = operators.interpolate(node.input_value(0), size, "bilinear_pillow", "sizes", axes=axes)
            node.output(0).replace(fixed.output(0))
    model.validate_nodes_and_infer_types()
    for key, value in info.items():
        model.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["omniconv", key])
    openvino.save_model(model, os.fspath(path), compress_to_fp16=False)


# Verifying


def _batches(samples: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield batches of real pixels in several sizes: as they are, several at once, cut to a corner, enlarged."""
    singles = [sample.detach().cpu() for sample in samples[:_SINGLES]]
    for sample in singles:
        yield sample[None]
    shapes = [tuple(sample.shape) for sample in singles]
    common = max(shapes, key=shapes.count)
    alike = [sample for sample in singles if tuple(sample.shape) == common]
    pixels = common[1] * common[2]
    for count in _BATCHES:
        if count * pixels <= _MAX_PIXELS:
            yield torch.stack([alike[index % len(alike)] for index in range(count)])
    first = torch.stack([alike[0], alike[-1]])
    yield first[:, :, : max(1, common[1] * 2 // 3), : max(1, common[2] * 3 // 4)].contiguous()
    if 4 * pixels <= _MAX_PIXELS:
        yield torch.cat([first, first.flip(3)], 3)


def _expected(eager: Deployable, batch: Tensor) -> np.ndarray:
    try:
        with torch.inference_mode():
            return eager(batch).numpy()
    except Exception as error:  # the network may raise anything
        shape = " x ".join(map(str, batch.shape))
        raise RefusedError(
            f"the network takes no images of {shape} ({_line(error)}); nothing written"
        ) from error


def _difference(want: np.ndarray, got: np.ndarray, relative: bool) -> float:
    """Return the largest difference; NaN if either holds one."""
    if want.shape != got.shape:
        return float("inf")
    scale = max(1.0, float(np.abs(want).max())) if relative else 1.0
    return float(np.abs(want - got).max()) / scale


def _first_difference(
    eager: Deployable, deployed: Deployable, batch: Tensor, kind: str, folder: Path, tolerance: float
) -> str | None:
    """Return the name of the first module whose output differs in an export that returns all of them."""
    probe = _Probe(deployed).eval()
    probed = folder / "probe"
    probed.mkdir()
    try:
        runner: Runner = open_exported(_write(_trace(probe, batch), kind, probed, {}, None))
        got = runner.run(batch.numpy())
        with torch.inference_mode():
            want = [output.numpy() for output in probe(batch)]
        for name, a, b in zip(probe.names, want, got, strict=True):
            if not _difference(a, b, relative=True) <= tolerance:
                return name
        # The file follows the re-parameterized network, so that one differs from the original.
        original = _Probe(eager).eval()
        with torch.inference_mode():
            outputs = [output.numpy() for output in original(batch)]
        merged = dict(zip(probe.names, want, strict=True))
        for name, a in zip(original.names, outputs, strict=True):
            if name in merged and not _difference(a, merged[name], relative=True) <= tolerance:
                return name
    except Exception:  # the search must not hide what was found: that the outputs differ
        return None
    return None


# Small things


def _on_cpu(module: Deployable) -> Deployable:
    return copy.deepcopy(module).cpu().float().eval()


def _require_packages(formats: Sequence[str]) -> None:
    if set(formats) & {"onnx", "openvino"}:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "export to ONNX", "export")
    if "openvino" in formats:
        require("openvino", "export to OpenVINO", "openvino")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _short(value: float) -> str:
    """Return 0.031 as "0.031" and 0.0001 as "1e-4"."""
    if 0 < value < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.2g}"

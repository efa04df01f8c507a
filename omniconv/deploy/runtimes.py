"""Exported files, opened with the library that runs them, all called the same way: array in, array out.

Nothing here reports anything to anybody: OpenVINO's usage statistics, which `import openvino` would send, are
replaced by the do-nothing form that OpenVINO itself ships, and ONNX Runtime's are switched off.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from omniconv.core.errors import DataError, ResourceError, UsageError

__all__ = ["Runner", "open_exported", "quiet", "require"]

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx", "openvino": "model.xml"}
_SUFFIXES = {".pt2": "torch", ".onnx": "onnx", ".xml": "openvino"}


@dataclass(frozen=True)
class Runner:
    """An exported network, ready to run on the CPU.

    Attributes:
        format: "torch", "onnx" or "openvino".
        threads: CPU threads that it uses.
        run: function from images (N, C, H, W), raw pixel values, to all outputs.
    """

    format: str
    threads: int
    run: Callable[[np.ndarray], list[np.ndarray]]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the first output, (N, K), of images (N, C, H, W)."""
        return self.run(images)[0]


def require(package: str, what: str, extra: str) -> ModuleType:
    """Import an optional package, or raise ResourceError with the command that installs it."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise ResourceError(f"{what} needs {package}; install it with: pip install 'omniconv[{extra}]'")
    if package.startswith("openvino"):
        return _import_openvino(package)
    module = importlib.import_module(package)
    if package == "onnxruntime":
        module.disable_telemetry_events()
    return module


def _import_openvino(package: str) -> ModuleType:
    # `import openvino` sends an event unless its telemetry package cannot be imported; then OpenVINO takes its
    # own stub. None in sys.modules is Python's way of saying "not importable".
    kept = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # the documented way to block an import
    try:
        return importlib.import_module(package)
    finally:
        if kept is None:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = kept


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and log lines of exporters and quantizers off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_exported(path: str | os.PathLike[str], *, threads: int | None = None) -> Runner:
    """Open an exported file (`.pt2`, `.onnx` or OpenVINO's `.xml`) and verify that it can be run here.

    Args:
        path: the file.
        threads: CPU threads; those of PyTorch by default. The torch format always runs with PyTorch's.

    Raises:
        UsageError: if the ending of the name says no known format.
        DataError: if the file is missing or damaged.
        ResourceError: if the package that runs it is not installed.
    """
    file = Path(path)
    if file.suffix not in _SUFFIXES:
        raise UsageError(f"{file} is not an exported network; known endings: {', '.join(_SUFFIXES)}")
    if not file.is_file():
        raise DataError(f"no exported network {file}")
    kind = _SUFFIXES[file.suffix]
    count = threads or torch.get_num_threads()
    opener = {"torch": _open_torch, "onnx": _open_onnx, "openvino": _open_openvino}[kind]
    try:
        return Runner(kind, count, opener(file, count))
    except ResourceError:
        raise
    except Exception as error:  # each runtime has exceptions of its own for a damaged file
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{file} is not a network that {kind} can run ({first})") from None


def _open_torch(file: Path, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    with quiet():
        module = torch.export.load(file).module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        if not images.flags.writeable:  # PyTorch warns of such arrays, though nothing here writes into them
            images = images.copy()
        with torch.inference_mode():
            outputs = module(torch.from_numpy(images))
        return [output.numpy() for output in (outputs if isinstance(outputs, list | tuple) else [outputs])]

    return run


def _open_onnx(file: Path, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    onnxruntime = require("onnxruntime", "running ONNX files", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin after a call would slow down whatever runs next in this process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _open_openvino(file: Path, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    openvino: Any = require("openvino", "running OpenVINO files", "openvino")
    # OpenVINO computes in bfloat16 on CPUs that have it unless told otherwise.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(os.fspath(file), "CPU", settings)

    def run(images: np.ndarray) -> list[np.ndarray]:
        results = compiled(images)
        # OpenVINO hands out views of buffers that the next call overwrites.
        return [np.array(results[output]) for output in compiled.outputs]

    return run
